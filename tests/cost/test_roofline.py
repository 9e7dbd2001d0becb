"""The plain roofline, and generation, which is bound by it."""

import pytest

from famc.backend import load_accelerator
from famc.cost.generate import generation_seconds
from famc.cost.of_shape import anatomy
from famc.cost.roofline import step_seconds
from famc.cost.shape import PRESETS

H100 = load_accelerator("h100-80g").device


def test_a_step_is_bound_by_compute_or_by_memory() -> None:
    assert step_seconds(1e12, 0, 1e12, 1e9, 0.5) == pytest.approx(2.0)
    assert step_seconds(1e9, 5e9, 1e12, 1e9, 0.5, overhead=1.0) == pytest.approx(6.0)


def test_decoding_alone_is_bound_by_reading_the_weights() -> None:
    """Llama-3-8B in 16 bit on an H100: 3,350 GB/s / 16.06 GB = 209 tokens/s at the very best; 0.6-0.85 of it
    is usual."""
    rate = 512 / generation_seconds(anatomy(PRESETS["llama3-8b"]), H100, sequences=1, prompt=16, new=512)
    assert 0.5 * 209 < rate < 0.85 * 209


def test_texts_written_together_share_the_weights() -> None:
    model = anatomy(PRESETS["qwen3-0.6b"])
    one, many = (generation_seconds(model, H100, sequences=n, prompt=128, new=128) for n in (1, 64))
    assert many < 3 * one, "64 texts take far less than 64 times one"


def test_replicas_share_the_texts() -> None:
    model = anatomy(PRESETS["qwen3-0.6b"])
    one, eight = (
        generation_seconds(model, H100, sequences=8192, prompt=128, new=128, devices=n) for n in (1, 8)
    )
    assert eight == pytest.approx(one / 8, rel=0.1)


def test_long_texts_leave_room_for_fewer_at_once() -> None:
    """Llama-3-8B keeps 128 KiB a token: of 32,768 tokens 4.3 GB, so that about 13 texts fit beside the weights."""
    model = anatomy(PRESETS["llama3-8b"])
    few, more = (generation_seconds(model, H100, sequences=n, new=32768) for n in (13, 26))
    assert more == pytest.approx(2 * few, rel=0.05)


def test_a_mixture_alone_reads_its_active_experts_only() -> None:
    """30 B of which 3 B are active: between a dense 1.7 B and a dense 8 B."""
    small, mixture, dense = (
        generation_seconds(anatomy(PRESETS[f"qwen3-{name}"]), H100, sequences=1, new=64)
        for name in ("1.7b", "30b-a3b", "8b")
    )
    assert small < mixture < dense


def test_weights_that_a_node_does_not_hold_are_told() -> None:
    model = anatomy(PRESETS["qwen3-235b-a22b"])
    with pytest.raises(
        ValueError, match=r"qwen3_moe needs 47\d GB to write one text of 128 tokens: 4 devices have"
    ):
        generation_seconds(model, H100, sequences=1, new=128, devices=4)
    assert generation_seconds(model, H100, sequences=1, new=128, devices=8) > 0
