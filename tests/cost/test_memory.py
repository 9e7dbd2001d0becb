"""Bytes of a model that reads and writes, on a device. Training: test_step_memory.py."""

from dataclasses import replace

import pytest

from famc.cost import memory
from famc.cost.layout import Layout
from famc.cost.of_shape import anatomy
from famc.cost.parameters import count
from famc.cost.shape import PRESETS

SHAPE = anatomy(PRESETS["llama3-8b"])
PARAMS = count(PRESETS["llama3-8b"]).total


def test_total_is_the_sum_and_biggest_names_the_largest() -> None:
    held = memory.Memory(weights=1, gradients=2, optimizer=9, activations=3, logits=4, kv_cache=5, overhead=6)
    assert held.total == 30
    assert held.biggest == "optimizer"


def test_kv_cache_of_llama_3_8b_is_128_kib_a_token() -> None:
    """2 x 32 layers x 8 heads x 128 x 2 bytes."""
    held = memory.inference(SHAPE, Layout(micro_batch=1), 8192)
    assert held.kv_cache == 8192 * 131072
    assert held.weights == 2 * PARAMS
    assert memory.inference(SHAPE, replace(Layout(), tp=2), 8192).kv_cache == held.kv_cache / 2
    assert memory.inference(SHAPE, Layout(), 8192, weight_bytes=0.5).weights == PARAMS / 2


def test_an_encoder_has_no_cache_and_t5_one_for_what_it_reads_and_writes() -> None:
    bert, t5 = PRESETS["bert-base"], PRESETS["t5-base"]
    assert memory.inference(anatomy(bert), Layout(micro_batch=8), 512).kv_cache == 0
    assert memory.inference(anatomy(bert), Layout(micro_batch=8), 512).logits == 2048 * bert.vocab * 4
    assert memory.inference(anatomy(t5), Layout(), 512).kv_cache == 2 * 12 * 768 * 512 * 2


def test_encoders_work_on_a_whole_chunk_and_tensor_ranks_share_it() -> None:
    """2,048 tokens of BERT: 12 x 768 x 2 bytes of activations and more, of which two ranks hold about half each."""
    bert = anatomy(PRESETS["bert-base"])
    one, two = (memory.inference(bert, Layout(micro_batch=8, tp=n), 512) for n in (1, 2))
    assert one.activations > 2048 * 12 * 768 * 2
    assert one.activations / 2 <= two.activations < 0.75 * one.activations
    assert two.weights == one.weights / 2


def test_a_text_shorter_than_a_chunk_takes_less() -> None:
    one, two = (memory.inference(SHAPE, Layout(), n) for n in (256, 512))
    assert two.activations == pytest.approx(2 * one.activations)
    assert two.kv_cache == 2 * one.kv_cache
