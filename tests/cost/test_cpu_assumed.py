"""Curves of CPUs that were not measured, against training steps that were."""

import pytest

from famc.backend import Accelerator, load_accelerator
from famc.backend.cpu import _CPU_EFFICIENCY
from famc.cost.cpu_assumed import assumed, rates
from famc.cost.cpu_time import Step, step_seconds
from famc.cost.of_shape import anatomy
from famc.cost.parameters import count
from famc.cost.shape import Shape

AVX512 = Accelerator(
    name="cpu", kind="cpu", peak_tflops={"bf16": 0.3, "fp32": 0.15}, efficiency=_CPU_EFFICIENCY, memory_gb=24,
    bandwidth_gbs=20, tdp_w=10, cores=2, sources={},
)  # fmt: skip  # what detect_cpu says of the machine these were measured on
SMALL = {
    128: Shape("qwen3", 4096, 4, 128, 384, 4, 2, 32, True, 256),
    256: Shape("qwen3", 4096, 6, 256, 768, 4, 2, 64, True, 256),
    384: Shape("qwen3", 4096, 6, 384, 1152, 6, 3, 64, True, 256),
}


@pytest.mark.parametrize(
    ("hidden", "precision", "threads", "gflops"),
    [
        (128, "fp32", 1, 44), (128, "bf16", 1, 63), (256, "fp32", 1, 49), (256, "fp32", 2, 100),
        (256, "bf16", 1, 95), (256, "bf16", 2, 164), (384, "bf16", 2, 155), (384, "fp32", 2, 90),
    ],
)  # fmt: skip
def test_training_within_30_percent_of_measured(
    hidden: int, precision: str, threads: int, gflops: float
) -> None:
    """6 x parameters x tokens / time of real steps of 16 x 256 tokens on AVX512-BF16 cores, optimizer included."""
    shape = SMALL[hidden]
    step = Step(anatomy(shape), 16, 256, precision=precision)
    seconds = step_seconds(step, assumed(AVX512.device), threads=threads).seconds
    assert 6 * count(shape).total * 16 * 256 / seconds / 1e9 == pytest.approx(gflops, rel=0.3)


def test_a_faster_peak_makes_products_faster_and_nothing_else() -> None:
    slow, fast = (
        step_seconds(
            Step(anatomy(SMALL[256]), 16, 256, precision="fp32"),
            assumed(AVX512.model_copy(update={"peak_tflops": {"fp32": peak}}).with_cores(1).device),
        )
        for peak in (0.05, 0.1)
    )
    assert fast.linears == pytest.approx(slow.linears / 2)
    assert fast.vectors == slow.vectors


def test_what_was_measured_is_used_and_says_so() -> None:
    cpu = load_accelerator("cpu").device
    assert rates(cpu) == (assumed(cpu), "assumed")


def test_more_cores_than_were_assumed_for_are_not_read() -> None:
    curves = assumed(AVX512.device)
    assert [one.threads for one in curves.threads] == [1, 2]
    assert curves.at(2).linear_rate("fp32", 512, 1024) == pytest.approx(
        2**0.9 * curves.at(1).linear_rate("fp32", 512, 1024)
    )
