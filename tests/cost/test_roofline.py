"""Time, against measurements where there are some."""

from typing import Any

import pytest

from famc.backend import Accelerator, load_accelerator
from famc.cost.layout import Layout
from famc.cost.parameters import count
from famc.cost.roofline import generation, job, step_seconds
from famc.cost.shape import PRESETS, Shape

H100 = load_accelerator("h100-80g").device
AVX512 = Accelerator(
    name="cpu", kind="cpu", peak_tflops={"bf16": 0.3, "fp32": 0.15}, efficiency={"bf16": 0.35, "fp32": 0.365},
    memory_gb=24, bandwidth_gbs=20, tdp_w=10, cores=2, sources={},
)  # fmt: skip  # what detect_cpu says of the machine these were measured on

SMALL = {
    128: Shape("qwen3", 4096, 4, 128, 384, 4, 2, 32, True, 256),
    256: Shape("qwen3", 4096, 6, 256, 768, 4, 2, 64, True, 256),
    384: Shape("qwen3", 4096, 6, 384, 1152, 6, 3, 64, True, 256),
}


@pytest.mark.parametrize(
    ("hidden", "precision", "cores", "gflops"),
    [
        (128, "fp32", 1, 44), (128, "bf16", 1, 63), (256, "fp32", 1, 49), (256, "fp32", 2, 100),
        (256, "bf16", 1, 95), (256, "bf16", 2, 164), (384, "bf16", 2, 155), (384, "fp32", 2, 90),
    ],
)  # fmt: skip
def test_cpu_training_within_30_percent_of_measured(
    hidden: int, precision: str, cores: int, gflops: float
) -> None:
    """6 x parameters x tokens / time of real steps of 16 x 256 tokens, attention and optimizer included."""
    shape = SMALL[hidden]
    estimate = job(
        shape,
        Layout(micro_batch=16, precision=precision),
        AVX512.with_cores(cores).device,
        steps=100,
        context=256,
    )
    modelled = 6 * count(shape).total * 16 * 256 / estimate.step_seconds / 1e9
    assert modelled == pytest.approx(gflops, rel=0.3)


@pytest.mark.parametrize(
    ("model", "backend", "devices", "split", "measured"),
    [  # tokens/s a GPU at 8,192 tokens of context
        ("llama3-8b", "h100-80g", 8, {"dp_shard": 8, "micro_batch": 2, "recompute": "selective"}, 6667),
        ("llama3-8b", "h100-80g", 128, {"dp_shard": 128, "micro_batch": 2, "recompute": "selective"}, 6514),
        (
            "llama3-70b",
            "h100-80g",
            256,
            {"dp_shard": 32, "tp": 8, "micro_batch": 16, "recompute": "full"},
            652,
        ),
        ("llama3-8b", "a100-80g", 64, {"dp_shard": 64, "recompute": "selective"}, 2973),
        ("llama3-70b", "a100-80g", 64, {"dp_shard": 64, "recompute": "full"}, 331),
        (
            "llama3-8b",
            "b200",
            8,
            {"dp_shard": 8, "micro_batch": 2, "grad_accum": 8, "precision": "fp8"},
            30624,
        ),
        ("llama3-8b", "h100-80g", 8, {"dp_shard": 8, "grad_accum": 16, "precision": "fp8"}, 14451),
    ],
)
def test_gpu_training_within_30_percent_of_published(
    model: str, backend: str, devices: int, split: dict[str, Any], measured: float
) -> None:
    """torchtitan (its H100s ran at 500 W) and NVIDIA Megatron-Bridge benchmark tables."""
    layout = Layout(nodes=-(-devices // 8), devices=devices, **split)
    estimate = job(
        PRESETS[model], layout, load_accelerator(backend).device, steps=100, context=8192, per_node=8
    )
    rate = layout.global_batch * 8192 / estimate.step_seconds / devices
    assert rate == pytest.approx(measured, rel=0.3)
    assert 0.2 < estimate.mfu < 0.6


def test_a_step_is_bound_by_compute_or_by_memory() -> None:
    assert step_seconds(1e12, 0, 1e12, 1e9, 0.5) == pytest.approx(2.0)
    assert step_seconds(1e9, 5e9, 1e12, 1e9, 0.5, overhead=1.0) == pytest.approx(6.0)


def test_time_grows_with_steps_and_start_counts_once() -> None:
    one, ten = (
        job(SMALL[128], Layout(precision="fp32"), AVX512.device, steps=n, context=256) for n in (1, 10)
    )
    assert ten.seconds - one.seconds == pytest.approx(9 * one.step_seconds)
    assert one.seconds > one.step_seconds
    assert one.basis == "modelled"


def test_recomputation_takes_time_but_is_no_model_work() -> None:
    none, full = (
        job(
            PRESETS["qwen3-8b"],
            Layout(devices=8, dp_shard=8, recompute=r),
            H100,
            steps=50,
            context=4096,
            per_node=8,
        )
        for r in ("none", "full")
    )
    assert full.step_seconds > 1.15 * none.step_seconds
    assert full.flops == none.flops
    assert full.mfu < none.mfu


def test_narrow_models_reach_less_of_the_peak() -> None:
    small, large = (
        job(PRESETS[n], Layout(micro_batch=4), H100, steps=100, context=4096)
        for n in ("qwen3-0.6b", "qwen3-8b")
    )
    assert small.mfu < large.mfu


def test_slow_links_cost_time() -> None:
    layout = Layout(nodes=8, devices=64, dp_shard=64)
    fast, slow = (
        job(
            PRESETS["qwen3-8b"], layout, load_accelerator(n).device, steps=10, context=2048, per_node=8
        ).step_seconds
        / load_accelerator(n).peak_tflops["bf16"] ** -1
        for n in ("a100-80g", "rtx4090")
    )
    assert slow > 2 * fast


def test_pipeline_bubble_shrinks_with_more_micro_batches() -> None:
    few, many = (
        job(
            PRESETS["llama3-8b"],
            Layout(devices=4, pp=4, grad_accum=n),
            H100,
            steps=100,
            context=4096,
            per_node=8,
        ).mfu
        for n in (4, 64)
    )
    assert many > 1.3 * few


def test_given_flops_replace_those_of_plain_training() -> None:
    layout = Layout(micro_batch=4)
    plain = job(PRESETS["qwen3-0.6b"], layout, H100, steps=10, context=1024)
    more = job(PRESETS["qwen3-0.6b"], layout, H100, steps=10, context=1024, flops=plain.flops * 4 / 3)
    assert plain.step_seconds < more.step_seconds < 1.4 * plain.step_seconds


def test_decoding_alone_is_bound_by_reading_the_weights() -> None:
    """Llama-3-8B in 16 bit on an H100: 3,350 GB/s / 16.06 GB = 209 tokens/s at the very best; 0.6-0.85 of it
    is usual."""
    one = generation(PRESETS["llama3-8b"], H100, sequences=1, prompt=16, new=512)
    rate = 512 / one.step_seconds
    assert 0.5 * 209 < rate < 0.85 * 209


def test_decoding_in_batches_is_cheaper_a_token() -> None:
    alone, together = (
        generation(PRESETS["qwen3-0.6b"], H100, sequences=6400, prompt=128, new=128, batch=b).seconds
        for b in (1, 64)
    )
    assert together < alone / 8
