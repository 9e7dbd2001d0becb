"""Measuring this machine: figures that a CPU can have, in the time that was asked for."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from famc.backend import CpuMeasured
from famc.cost.cpu_time import PROBE
from famc.work import measure as module
from famc.work.measure import _disturbed, measure, real_step


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """With a few small sizes: the whole grid is for `famc calibrate`."""
    before = torch.get_num_threads()
    few = {
        "WIDTHS": (32, 256),
        "ROWS": (128, 1024),
        "BEST": (512,),
        "MATVEC": (1024, 4096),
        "MEMORY_MB": 64,
        "FRESH_ROWS": 3,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in few.items():
            patch.setattr(module, name, value)
        began = time.perf_counter()
        figures = measure(10, cores=1)
        figures["took"] = time.perf_counter() - began
    torch.set_num_threads(before)
    return figures


def test_the_time_asked_for_is_kept(found: dict[str, Any]) -> None:
    assert found["took"] < 40


def test_figures_are_what_a_cpu_can_do(found: dict[str, Any]) -> None:
    kept = CpuMeasured.model_validate(
        {key: value for key, value in found.items() if key != "took"}
        | {"date": "2026-01-01", "cpu_model": "x", "cores": 1, "flags": ()}
    )
    curve = kept.curves[0]
    assert curve.threads == 1 and not kept.disturbed
    assert 1 < curve.matmul_gflops["fp32"] < 1000
    best = max(rate for _, _, rate in curve.linear_gflops["fp32"])
    assert 0.3 * curve.matmul_gflops["fp32"] < best <= 1.1 * curve.matmul_gflops["fp32"]
    small = next(rate for width, rows, rate in curve.linear_gflops["fp32"] if (width, rows) == (32, 128))
    assert small < best, "small layers are slower"
    assert 0.5 < curve.memory_gbs < 1000 and 0.5 < curve.matvec_gbs["fp32"] < 1000
    assert 0.1 < curve.operation_us < 1000
    assert 0.01 < kept.step_overhead_ms < 1000 and 0.1 < kept.startup_s < 600


def test_a_real_step_is_what_the_figures_say_of_it(found: dict[str, Any]) -> None:
    """Within a factor of two even after ten seconds of measuring beside other programs; benchmarks/cpu_time.py is strict."""
    assert 0.5 < found["residual"] < 2.0


def test_a_longer_model_takes_longer() -> None:
    from dataclasses import replace

    torch.set_num_threads(1)
    short = real_step(replace(PROBE, layers=1), 1, 64, "fp32", budget=0.2)
    assert real_step(replace(PROBE, layers=4), 1, 64, "fp32", budget=0.2) > 1.5 * short


def test_threads_that_waited_for_others_are_noticed() -> None:
    def curve(share: float) -> dict[str, Any]:
        points = [[w, r, 100.0 * share] for w in (64, 128, 512) for r in (128, 1024, 8192)]
        return {"linear_gflops": {"bf16": points, "fp32": points}}

    assert not _disturbed(curve(1), curve(1.8))
    assert not _disturbed(curve(1), curve(0.9))
    assert _disturbed(curve(1), curve(0.1))


def test_disturbed_curves_are_left_out(monkeypatch: pytest.MonkeyPatch, found: dict[str, Any]) -> None:
    good = found["curves"][0]
    points = {p: [[w, r, v / 9] for w, r, v in rows] for p, rows in good["linear_gflops"].items()}
    made = {1: good, 2: good | {"threads": 2, "linear_gflops": points}}
    monkeypatch.setattr(module, "_curves", lambda threads, seconds, vectors: made[threads])
    monkeypatch.setattr(module, "_trainer_overhead", lambda: 0.001)
    monkeypatch.setattr(module, "_residual", lambda made: 1.0)
    again = measure(10, cores=2)
    assert again["disturbed"] and [c["threads"] for c in again["curves"]] == [1]


def test_the_command_wants_three_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert module.main(["out.json"]) == 2
    assert "usage" in capsys.readouterr().err
