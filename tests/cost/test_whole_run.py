"""What is assumed of a whole run where nobody says it."""

from __future__ import annotations

import pytest

from famc.backend import load_accelerator
from famc.cost.cases.whole_run import assumed_batch, assumed_devices, runs, stacks
from famc.cost.models import known
from famc.cost.setup import Software


def test_the_batch_follows_the_law_and_feeds_the_devices_evenly() -> None:
    """GPT-2 124M on 9.9e9 tokens: C = 7.38e18, 0.292 x C^0.3271 = 434 K tokens, of 1,024: 424 sequences; llm.c took 512."""
    assert assumed_batch(known("gpt2-124m"), 9_890_693_120, 1024, 8) == 512
    # 384 = 3 x 128 devices
    assert assumed_batch(known("smollm3-3b"), 11.2e12, 4096, 384) % 384 == 0
    # more devices than the law has sequences
    assert assumed_batch(known("gpt2-124m"), 9_890_693_120, 1024, 4096) == 4096


def test_devices_end_a_run_in_a_month() -> None:
    """6 x 6.738e9 x 1e12 FLOPs at 40 % of 312 TFLOP/s for 30 days: 125 A100."""
    device = load_accelerator("a100-80g").device
    assert assumed_devices(known("llama1-7b"), 1e12, device, 8) == 128
    assert assumed_devices(known("pythia-70m"), 1e9, device, 8) == 8


def test_unstated_software_may_be_pytorch_or_megatron() -> None:
    assert stacks(Software("nemo", 2024.5)) == (Software("nemo", 2024.5),)
    pytorch, megatron = stacks(Software("unknown", 2025.0))
    assert (pytorch.name, pytorch.compiled, megatron.name) == ("unknown", True, "megatron-lm")
    assert not stacks(Software("unknown", 2023.0))[0].compiled


def test_the_stored_band_holds_its_factor() -> None:
    r = runs()
    assert r.low < r.factor < r.high
    assert r.factor == pytest.approx(1.29, abs=0.15)
    assert r.searched[0] < 1 < r.searched[1]
