"""Rates of matrix products: measured and assumed best ones, power, sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from famc.backend import load_accelerator
from famc.cost import matmul
from famc.cost.device import Device
from famc.cost.fitted import constants

C = constants()


def _device(name: str) -> Device:
    return load_accelerator(name).device


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("a100-80g", "bf16", 271.2),
        ("a100-80g", "fp16", 271.2),
        ("h100-80g", "bf16", 794.5),
        ("h100-80g", "fp8", 1402.6),
        ("mi300x", "bf16", 668.4),
    ],
)
def test_best_rates_are_the_measured_ones(name: str, precision: str, tflops: float) -> None:
    """stas00/ml-engineering, maximum achievable rates; fp16 stands for bf16."""
    assert matmul.best(_device(name), precision) == pytest.approx(tflops * 1e12)


def test_a_chip_far_from_its_peak_at_16_bits_is_so_at_8() -> None:
    """MI300X reaches half of its bf16 peak; its fp8 rate is not taken for an H100's share."""
    chip = _device("mi300x")
    assert 0.42 < matmul.best(chip, "fp8") / chip.peak("fp8") < 0.52


def test_a_chip_without_figures_gets_a_share_of_its_peak() -> None:
    """V100 knows fp16 alone; bf16 asks for it."""
    chip = _device("v100-32g")
    assert matmul.best(chip, "bf16") == matmul.best(chip, "fp16") == pytest.approx(0.87 * 125e12)


def test_four_bits_without_a_figure_are_twice_eight() -> None:
    """Where the peaks name no fp4."""
    chip = replace(_device("b200"), peaks=(("bf16", 2250e12), ("fp8", 4500e12)))
    assert matmul.best(chip, "nvfp4") == 2 * matmul.best(chip, "fp8")


def test_a_precision_that_the_chip_lacks_is_named() -> None:
    """A100 has no fp8."""
    with pytest.raises(ValueError, match="a100-80g has no fp8"):
        matmul.rate(_device("a100-80g"), "fp8", C)


@pytest.mark.parametrize(("name", "low", "high"), [("a100-80g", 235, 271), ("h100-80g", 600, 720)])
def test_large_products_run_at_what_training_reports(name: str, low: float, high: float) -> None:
    """8192^3 at 16 bits, TFLOP/s: profiles of training show some 250 on A100 and 600 to 700 on H100."""
    chip = _device(name)
    taken = matmul.seconds(8192, 8192, 8192, matmul.rate(chip, "bf16", C), chip.bandwidth, C)
    assert low < 2 * 8192**3 / taken / 1e12 < high


def test_a_lower_power_limit_slows_the_same_chip() -> None:
    """500 W instead of 700 W cost between 5 and 20 %."""
    chip = _device("h100-80g")
    ratio = matmul.rate(replace(chip, power=500.0), "bf16", C) / matmul.rate(chip, "bf16", C)
    assert 0.8 < ratio < 0.95


def test_small_products_are_slower() -> None:
    """FLOP/s rise with each side."""
    chip = _device("h100-80g")
    rate = matmul.rate(chip, "bf16", C)
    reached = [2 * s**3 / matmul.seconds(s, s, s, rate, chip.bandwidth, C) for s in (512, 1024, 2048, 8192)]
    assert reached == sorted(reached)
    assert reached[0] < 0.25 * reached[-1]


def test_thin_products_are_bound_by_traffic() -> None:
    """16 columns: far below the peak."""
    chip = _device("a100-80g")
    taken = matmul.seconds(8192, 16, 8192, matmul.rate(chip, "bf16", C), chip.bandwidth, C)
    assert 2 * 8192 * 16 * 8192 / taken < 0.2 * matmul.rate(chip, "bf16", C)


def test_many_experts_cost_more_than_one_matrix_of_the_same_work() -> None:
    """Their weights are all read, and each group has a last wave."""
    chip = _device("h100-80g")
    rate = matmul.rate(chip, "bf16", C)
    one, many = (matmul.seconds(8192, 1536, 2048, rate, chip.bandwidth, C, n) for n in (1, 64))
    assert many > 1.2 * one
