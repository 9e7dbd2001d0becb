"""`famc calibrate`: figures become a backend that this machine's plans then use, or an error that says what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from famc import calibrate as module
from famc.backend import detect_cpu, load_accelerator, local_cpu, read_accelerator
from famc.calibrate import accelerator, calibrate, default_path
from famc.errors import StepFailed

STORED = Path(__file__).parents[1] / "benchmarks" / "data" / "cpu_steps.json"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config" / "famc" / "backends"


def figures(**changes: Any) -> dict[str, Any]:
    """What measuring a two-core AMX machine gave."""
    rates = json.loads(STORED.read_text())["rates"]
    kept = ("torch", "step_overhead_ms", "startup_s", "disturbed", "curves")
    return {key: rates[key] for key in kept} | {"residual": 1.05} | changes


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_measured", lambda seconds, cores: figures(disturbed=False))


def test_the_file_is_used_by_plans_of_this_user(measured: None, home: Path) -> None:
    written = calibrate()
    assert [p.name for p in home.iterdir()] == ["this-cpu.yaml"]
    cpu, why = local_cpu()
    assert why == ()
    assert cpu.basis == "measured" and cpu.cores == detect_cpu().cores
    assert cpu.measured == written.measured
    assert load_accelerator("this-cpu") == written


def test_every_figure_says_that_it_was_measured_or_assumed(measured: None, tmp_path: Path) -> None:
    found = calibrate(tmp_path / "backends" / "this-cpu.yaml")
    for figure in ("peak_tflops", "efficiency", "bandwidth_gbs"):
        assert "famc calibrate" in found.sources[figure] and found.measured is not None
        assert found.measured.date in found.sources[figure]
    assert "assumed" in found.sources["tdp_w"]
    assert found == read_accelerator(tmp_path / "backends" / "this-cpu.yaml")


def test_the_peak_is_the_best_product_of_one_core(measured: None, tmp_path: Path) -> None:
    best = figures()["curves"][0]["matmul_gflops"]
    found = calibrate(tmp_path / "this-cpu.yaml")
    assert found.peak_tflops == {p: pytest.approx(v / 1e3, abs=1e-4) for p, v in best.items()}
    assert found.device.peak("fp32") == pytest.approx(best["fp32"] * 1e9 * found.cores**0.9, rel=1e-3)


def test_efficiency_is_the_best_linear_layers_share_of_the_peak(measured: None, tmp_path: Path) -> None:
    """753.75 of 1,541 GFLOP/s in bf16, 184.35 of 216.6 in fp32: the stored figures' largest ones."""
    found = calibrate(tmp_path / "this-cpu.yaml")
    assert found.efficiency == {
        "bf16": pytest.approx(0.4891, abs=1e-3),
        "fp32": pytest.approx(0.8511, abs=1e-3),
    }


def test_bf16_that_no_unit_multiplies_is_no_precision(tmp_path: Path) -> None:
    slow = figures()
    curve = slow["curves"][0]
    curve["linear_gflops"]["bf16"] = [[w, r, v / 50] for w, r, v in curve["linear_gflops"]["bf16"]]
    found = accelerator(slow, detect_cpu())
    assert set(found.peak_tflops) == set(found.efficiency) == {"fp32"}
    assert found.training_precision()[0] == "fp32"


def test_a_calibration_beside_a_spec_has_its_place(tmp_path: Path, home: Path) -> None:
    assert default_path() == home / "this-cpu.yaml"
    assert default_path(tmp_path) == tmp_path / "backends" / "this-cpu.yaml"


def test_another_file_name_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(StepFailed) as caught:
        calibrate(tmp_path / "mine.yaml")
    assert "this-cpu.yaml" in caught.value.hint
    assert list(tmp_path.glob("*.yaml")) == []


def test_a_place_that_cannot_be_written_is_named(measured: None, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StepFailed, match="can't be written"):
        calibrate(tmp_path / "file" / "this-cpu.yaml")


def test_measuring_that_fails_says_how_and_keeps_the_older_file(
    measured: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "this-cpu.yaml"
    calibrate(path)
    before = path.read_bytes()
    monkeypatch.undo()
    monkeypatch.setattr(module.sys, "executable", "/bin/false")
    with pytest.raises(StepFailed, match="failed"):
        calibrate(path, seconds=1)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
