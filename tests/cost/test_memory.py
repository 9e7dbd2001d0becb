"""Bytes a device."""

from dataclasses import replace
from typing import Any

import pytest

from famc.cost import memory
from famc.cost.layout import Layout
from famc.cost.parameters import count, lora
from famc.cost.shape import PRESETS, Shape

SHAPE = PRESETS["llama3-8b"]
PARAMS = count(SHAPE).total


def state(held: memory.Memory) -> float:
    return held.weights + held.gradients + held.optimizer


def test_training_state_is_sixteen_bytes_a_parameter() -> None:
    """Llama-3-8B in mixed precision: 128 GB, the figure every guide repeats."""
    held = memory.training(SHAPE, Layout(), 8192)
    assert state(held) == pytest.approx(16 * PARAMS)


@pytest.mark.parametrize("split", [{"dp_shard": 8}, {"tp": 8}, {"dp_shard": 2, "tp": 4}, {"cp": 8}])
def test_state_is_split_over_shards_and_tensor_ranks(split: dict[str, Any]) -> None:
    assert state(memory.training(SHAPE, Layout(**split), 8192)) == pytest.approx(2 * PARAMS)


def test_replicas_save_nothing() -> None:
    one, eight = (memory.training(SHAPE, Layout(dp_replicate=n), 8192) for n in (1, 8))
    assert one == eight


def test_activations_and_logits_grow_with_the_micro_batch_and_shrink_with_context_ranks() -> None:
    one, two = (memory.training(SHAPE, Layout(micro_batch=n), 8192) for n in (1, 2))
    split = memory.training(SHAPE, Layout(micro_batch=2, cp=2), 8192)
    assert two.activations == pytest.approx(2 * one.activations)
    assert two.logits == pytest.approx(2 * one.logits)
    assert split.activations == pytest.approx(one.activations)


def test_pipeline_stages_divide_layers_but_hold_several_micro_batches() -> None:
    """1F1B: four stages with four micro-batches in flight keep as many activations as one stage."""
    one = memory.training(SHAPE, Layout(grad_accum=4), 8192)
    four = memory.training(SHAPE, Layout(pp=4, grad_accum=4), 8192)
    assert four.activations == pytest.approx(one.activations)
    assert one.weights / 4 < four.weights < one.weights / 2


def test_recomputation_saves_activations_in_order() -> None:
    none, selective, full = (
        memory.training(SHAPE, Layout(recompute=r), 8192).activations for r in ("none", "selective", "full")
    )
    assert full < selective < none
    assert full < none / 8


def test_an_adapter_needs_no_optimizer_for_the_base() -> None:
    trained = lora(SHAPE, 16)
    held = memory.training(SHAPE, Layout(), 2048, trainable_params=trained)
    assert held.optimizer == 8 * trained
    assert held.weights == pytest.approx(2 * PARAMS + 4 * trained)


def test_fp32_doubles_activations() -> None:
    half, single = (memory.training(SHAPE, Layout(precision=p), 2048) for p in ("bf16", "fp32"))
    assert single.activations > 1.7 * half.activations


def test_a_mixture_stores_every_expert() -> None:
    shape = PRESETS["qwen3-30b-a3b"]
    assert state(memory.training(shape, Layout(), 512)) == pytest.approx(16 * count(shape).total)


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


def test_a_small_run_on_a_cpu_is_of_the_measured_size() -> None:
    """Qwen3 of 5.8 M parameters, 8 x 512 tokens in bf16: a resident set of 1.18 GB was measured."""
    shape = Shape("qwen3", 4096, 6, 256, 768, 4, 2, 64, True, 512)
    held = memory.training(shape, Layout(micro_batch=8), 512, kind="cpu")
    assert held.total == pytest.approx(1.18e9, rel=0.3)


@pytest.mark.parametrize("name", ["bert-base", "modernbert-base", "t5-base"])
def test_readers_keep_state_like_decoders_and_recompute_less(name: str) -> None:
    shape = PRESETS[name]
    none, selective, full = (
        memory.training(shape, Layout(recompute=r), 512) for r in ("none", "selective", "full")
    )
    assert state(none) == pytest.approx(16 * count(shape).total)
    assert full.activations < selective.activations < none.activations
    assert none.logits == pytest.approx((0.2 if name == "t5-base" else 1) * 512 * shape.vocab * 10)


def test_activations_of_bert_are_those_of_the_papers_equation() -> None:
    """Korthikanti et al. 2022, equation 1, without scores (flash attention) and dropout (24 of the 34 sbh stay
    that are stored in 16 bits: 16h + 2 x 4h), and two fp32 copies for the norms."""
    shape = PRESETS["bert-large"]
    held = memory.training(shape, Layout(), 512)
    assert held.activations == pytest.approx(512 * 24 * (32 + 8) * 1024)


def test_t5_keeps_the_scores_that_its_bias_is_learnt_from() -> None:
    shape = PRESETS["t5-base"]
    short, long = (memory.training(shape, Layout(), n).activations / n for n in (512, 1024))
    assert long - short == pytest.approx(12 * 2 * 2 * 12 * 512 * (0.9 * 0.9 + 0.2 * 1.1))


def test_an_encoder_has_no_cache_and_t5_one_for_what_it_reads_and_writes() -> None:
    bert, t5 = PRESETS["bert-base"], PRESETS["t5-base"]
    assert memory.inference(bert, Layout(micro_batch=8), 512).kv_cache == 0
    assert memory.inference(bert, Layout(micro_batch=8), 512).logits == 2048 * bert.vocab * 4
    assert memory.inference(t5, Layout(), 512).kv_cache == 2 * 12 * 768 * 512 * 2
