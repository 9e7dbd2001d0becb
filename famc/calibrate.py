"""`famc calibrate`: this machine's CPU measured, as a backend that plans for local builds then use.

In: the file to write. Out: Accelerator, and the file `this-cpu.yaml`. The measuring runs in a process of its own
(famc.work.measure), as it needs torch. Bears no identity: no step's key depends on it.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from famc.backend import Accelerator, CpuMeasured, cpu_model, detect_cpu, user_dir
from famc.backend.cpu import CALIBRATED, WATTS_A_CORE, kernel_flags
from famc.cost.cpu_rates import CpuRates
from famc.cost.cpu_time import PROBE, PROBE_ROWS, Step, step_seconds
from famc.cost.of_shape import anatomy
from famc.errors import StepFailed

SECONDS = 35.0  # that are measured; imports and a busy machine add to it
PATIENCE = 4.0  # times as long, and the measuring is given up


def default_path(root: Path | None = None) -> Path:
    """Where a calibration is found by all specs of this user; below `root`, by the specs in that folder."""
    return (user_dir() if root is None else root / "backends") / f"{CALIBRATED}.yaml"


def calibrate(out: Path | None = None, seconds: float = SECONDS) -> Accelerator:
    """Measure this machine's CPU for about `seconds` and write it to `out` (default: the user's own backends).

    Raises StepFailed where the measuring fails or the file can't be written; an older file stays as it was then.
    """
    path = default_path() if out is None else out
    if path.name != f"{CALIBRATED}.yaml":
        raise StepFailed(
            f"{path}: a calibration is looked for under its own name",
            f"call it {path.with_name(f'{CALIBRATED}.yaml')}, in backends/ beside the spec or in {user_dir()}",
        )
    here = detect_cpu()
    found = accelerator(_measured(seconds, here.cores), here)
    _write(path, found)
    return found


def accelerator(figures: Mapping[str, Any], here: Accelerator, root: Path = Path("/")) -> Accelerator:
    """The backend that `famc.work.measure.measure`'s figures make of this machine, which detect_cpu says is `here`."""
    date = time.strftime("%Y-%m-%d", time.gmtime())
    one = figures["curves"][0]
    best = {p: round(value / 1e3, 4) for p, value in one["matmul_gflops"].items()}
    measured = {
        "date": date,
        "cpu_model": cpu_model(root),
        "cores": here.cores,
        "flags": kernel_flags(root),
        **figures,
    }
    rates = CpuMeasured.model_validate(measured).rates()
    took = {p: _probe(p, rates) for p in best}
    # bf16 that no unit multiplies is slower than fp32: then it is no precision of this machine
    used = [p for p in best if p == "fp32" or took[p] < took["fp32"]]
    last = figures["curves"][-1]
    told = f"famc calibrate, {date}, torch {figures['torch']}"
    return Accelerator.model_validate(
        {
            "name": CALIBRATED,
            "kind": "cpu",
            "peak_tflops": {p: best[p] for p in used},
            "efficiency": {p: _efficiency(one, p, best[p]) for p in used},
            "memory_gb": round(here.memory_gb, 2),
            "bandwidth_gbs": max(last["memory_gbs"], *last["matvec_gbs"].values()),
            "cores": here.cores,
            "tdp_w": here.tdp_w,
            "node_power_factor": here.node_power_factor,
            "basis": "measured",
            "measured": measured,
            "sources": {
                "peak_tflops": f"{told}: the best product with one thread",
                "efficiency": f"{told}: the best linear layer, forward and backward, with one thread",
                "memory_gb": here.sources["memory_gb"],
                "bandwidth_gbs": f"{told}: the larger of a copy and matrix x vector, {last['threads']} threads",
                "cores": here.sources["cores"],
                "tdp_w": f"assumed: {WATTS_A_CORE:g} W a core",
                "node_power_factor": "assumed: board, memory and power supply",
            },
        }
    )


def _probe(precision: str, rates: CpuRates) -> float:
    """Seconds of PROBE's training step: in the precision that was tried, what it took."""
    step = Step(anatomy(PROBE), rows=PROBE_ROWS, context=PROBE.context, precision=precision)
    return step_seconds(step, rates).seconds


def _efficiency(curves: Mapping[str, Any], precision: str, peak: float) -> float:
    """The share of the peak (TFLOP/s) that the best linear layer reached."""
    best: float = max(rate for _, _, rate in curves["linear_gflops"][precision])
    return round(min(1.0, best / 1e3 / peak), 4)


def _measured(seconds: float, cores: int) -> dict[str, Any]:
    """What the measuring process finds."""
    with tempfile.TemporaryDirectory(prefix="famc-calibrate-") as folder:
        out = Path(folder) / "figures.json"
        command = [sys.executable, "-m", "famc.work.measure", str(out), str(seconds), str(cores)]
        try:
            done = subprocess.run(
                command,
                check=False,
                capture_output=True,
                text=True,
                timeout=60 + PATIENCE * seconds,
                env=os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
            )
        except subprocess.TimeoutExpired as error:
            raise StepFailed(
                f"measuring this machine took longer than {error.timeout:.0f} s",
                "close other programs and run `famc calibrate` again",
            ) from error
        if done.returncode or not out.is_file():
            last = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
            raise StepFailed(f"measuring this machine failed ({done.returncode}): {last[0]}")
        found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        return found


def _write(path: Path, found: Accelerator) -> None:
    """The whole file or none of it."""
    from ruamel.yaml import YAML

    data = found.model_dump(mode="json", exclude_defaults=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as file:
            file.write(
                "# Written by `famc calibrate`: what this machine's CPU was measured to do. It holds for this CPU,\n"
            )
            file.write(
                "# this number of cores and these instruction sets; run the command again after a change.\n"
            )
            yaml = YAML()
            yaml.width = 110
            yaml.default_flow_style = None  # lists of numbers on one line
            yaml.dump(data, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise StepFailed(
            f"{path} can't be written: {error.strerror or error}", "name another file"
        ) from error
