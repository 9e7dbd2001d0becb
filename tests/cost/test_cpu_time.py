"""Seconds of training steps on a CPU: against steps that were measured, and what must move them."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from famc.cost.cpu_rates import CpuRates, ThreadRates, read
from famc.cost.cpu_time import Step, lexical_seconds, step_seconds
from famc.cost.of_shape import anatomy
from famc.cost.shape import PRESETS, Shape

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from cpu_time import DATA, job_seconds, plain_step, stored

SMALL = Shape("qwen3", 4096, 3, 128, 384, 2, 1, 64, True, 256)
DATA_, RATES = stored(DATA)
ONE = ThreadRates(
    threads=1,
    matmul=(("fp32", 1e11),),
    linear=(("fp32", ((64.0, 128.0, 1e10), (256.0, 128.0, 4e10), (64.0, 1024.0, 2e10), (256.0, 1024.0, 8e10))),),
    vector=((1e6, 4e10), (1e8, 4e9)),
    softmax=1e10,
    memory=1e10,
    matvec=(("fp32", 1e10),),
    operation=5e-6,
    fresh=(("fp32", ((64.0, 1e-3), (256.0, 4e-3))),),
)  # fmt: skip


# --- curves -------------------------------------------------------------------------------------------------


def test_a_curve_is_straight_in_logarithms_and_flat_above() -> None:
    points = ((1.0, 1.0), (100.0, 10.0))
    assert read(points, 10) == pytest.approx(10**0.5)
    assert read(points, 1e6) == 10
    assert read(points, 0.5) == pytest.approx(0.5)
    assert read(points, 0.5, floor=True) == 1
    assert read(points, 1) == 1 and read(points, 100) == 10


def test_a_linear_layer_is_read_between_widths_and_rows() -> None:
    assert ONE.linear_rate("fp32", 256, 1024) == 8e10
    assert ONE.linear_rate("fp32", 128, 128) == pytest.approx(2e10)
    assert ONE.linear_rate("fp32", 256, 362.04) == pytest.approx(8e10 / 2**0.5, rel=1e-3)
    assert ONE.linear_rate("fp32", 4096, 1e6) == 8e10
    assert ONE.linear_rate("fp32", 256, 64) == pytest.approx(2e10), "half the rows, half the rate"
    with pytest.raises(ValueError, match="bf16"):
        ONE.linear_rate("bf16", 256, 1024)


def test_threads_between_measured_numbers_follow_a_power() -> None:
    four = replace(ONE, threads=4, memory=4e10, matmul=(("fp32", 2e11),), vector=((1e6, 8e10), (1e8, 8e9)))
    rates = CpuRates((ONE, four), step_overhead=0.001, startup=3.0)
    assert rates.at(1) is ONE and rates.at(4) is four and rates.at(16) is four
    assert rates.at(2).memory == pytest.approx(2e10)
    assert rates.at(2).matmul == (("fp32", pytest.approx(2**0.5 * 1e11)),)
    assert rates.at(2).vector_rate(1e6) == pytest.approx(4e10 * 2**0.5)


# --- against measurements -----------------------------------------------------------------------------------


def test_steps_that_were_measured_are_told_within_a_twentieth_on_average() -> None:
    errors = []
    for row in DATA_["steps"]:
        told = step_seconds(plain_step(row), RATES).seconds - RATES.step_overhead
        errors.append(abs(told / row["seconds"] - 1))
    assert len(errors) > 40
    assert sum(errors) / len(errors) < 0.06
    assert max(errors) < 0.2


@pytest.mark.parametrize("job", DATA_["jobs"], ids=lambda job: job["name"])
def test_jobs_of_the_example_family_are_told_within_a_quarter(job: dict[str, object]) -> None:
    rates = replace(RATES, residual=DATA_["job_residual"])
    assert job_seconds(job, DATA_["shapes"], rates) == pytest.approx(job["cpu_seconds"], rel=0.25)


# --- what moves a step --------------------------------------------------------------------------------------


def seconds(step: Step, rates: CpuRates = RATES) -> float:
    return step_seconds(step, rates).seconds


BASE = Step(anatomy(SMALL), rows=8, context=256)


@pytest.mark.parametrize(
    "more",
    [
        replace(BASE, rows=16),
        replace(BASE, optimizer="muon"),
        replace(BASE, precision="fp32"),
        replace(BASE, head="logits"),
        replace(BASE, teachers=(anatomy(SMALL),)),
        replace(BASE, teachers=(anatomy(SMALL),), follow=True),
        replace(BASE, recompute=True),
        replace(BASE, varied=True),
        replace(BASE, passes=2, rows=8),
    ],
)
def test_more_work_takes_longer(more: Step) -> None:
    assert seconds(more) > 1.01 * seconds(BASE)


def test_less_work_takes_less() -> None:
    assert seconds(replace(BASE, head="none")) < seconds(BASE)
    assert seconds(replace(BASE, counted=0.3)) < seconds(BASE)
    assert seconds(replace(BASE, trained=0.05)) < seconds(BASE)


def test_parts_make_the_whole_and_trainers_time_is_not_multiplied() -> None:
    one, two = step_seconds(BASE, RATES), step_seconds(BASE, replace(RATES, residual=2.0))
    parts = (one.linears, one.attention, one.vectors, one.head, one.optimizer, one.starts, one.overhead)
    assert one.seconds == pytest.approx(sum(parts)) and min(parts) > 0
    assert two.overhead == one.overhead == RATES.step_overhead
    assert two.seconds - two.overhead == pytest.approx(2 * (one.seconds - one.overhead))


def test_one_pass_is_faster_than_the_same_tokens_in_small_pieces() -> None:
    assert seconds(replace(BASE, rows=1, passes=8)) > 1.1 * seconds(BASE)


def test_a_mixtures_unused_experts_cost_nothing_but_their_update() -> None:
    dense, sparse = anatomy(PRESETS["qwen3-0.6b"]), anatomy(PRESETS["qwen3-30b-a3b"])
    few = step_seconds(Step(dense, 4, 512), RATES)
    many = step_seconds(Step(sparse, 4, 512), RATES)
    assert many.optimizer > 20 * few.optimizer
    assert many.linears < 30 * few.linears  # 3.3 of 30.5 billion parameters, at 64 rows an expert


def test_numbers_of_rows_that_come_anew_are_compiled_for() -> None:
    """A block of q = o, k = v, gate = up, down, and two products of attention of width 64, at 1 ms for 64 and 4 for 256."""
    shape = Shape("qwen3", 512, 6, 256, 1024, 4, 1, 64, True, 256)
    rates = CpuRates((ONE,), 0.0, 0.0)
    step = Step(anatomy(shape), rows=2, context=64, precision="fp32", passes=3)
    gap = seconds(replace(step, varied=True), rates) - seconds(step, rates)
    # q/o 256: 4 ms; k/v sqrt(256 x 64) = 128: 2 ms; gate/up and down above 256: 4 ms each; 2 x 1 ms
    assert gap == pytest.approx(3 * (4 + 2 + 4 + 4 + 2) * 1e-3, rel=1e-6)


def test_a_lexical_start_grows_with_steps_and_texts() -> None:
    shape = Shape("bert", 4096, 1, 1024, 256, 16, 16, 64, True, 256)
    one = lexical_seconds(100, 512, 2, shape, (1024,), RATES)
    assert lexical_seconds(200, 512, 2, shape, (1024,), RATES) == pytest.approx(2 * one)
    assert lexical_seconds(100, 512, 4, shape, (1024,), RATES) > 1.3 * one
    assert lexical_seconds(100, 512, 2, shape, (1024, 256), RATES) > one


def test_a_precision_that_was_not_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="fp8"):
        seconds(replace(BASE, precision="fp8"))


def test_a_step_is_told_fast_and_without_heavy_libraries() -> None:
    began = time.perf_counter()
    for rows in range(1, 201):
        seconds(replace(BASE, rows=rows))
    assert (time.perf_counter() - began) / 200 < 1e-3
    code = "import sys, famc.cost.cpu_time, famc.calibrate; sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
