"""Fits the constants of famc/cost/step_time.py to published step times, and predicts those of sources left out.

In: benchmarks/data/calibration.csv. Out: Constants, log errors, famc/cost/data/fitted.json. `benchmarks/planner.py` prints them.
Needs scipy (`pip install scipy`); famc does not.
"""

from __future__ import annotations

import csv
import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import least_squares

from famc.backend import load_accelerator
from famc.cost.cases.rows import Case, case
from famc.cost.device import Device
from famc.cost.fitted import Constants
from famc.cost.step_time import step_time

DATA = Path(__file__).parent / "data" / "calibration.csv"
FITTED = Path(__file__).parent.parent / "famc" / "cost" / "data" / "fitted.json"


@dataclass(frozen=True)
class Prior:
    """What is known of a constant before any training run: its value, bounds, and the spread of its logarithm."""

    value: float
    low: float
    high: float
    spread: float
    unit: str
    why: str


PRIORS: dict[str, Prior] = {
    "sustained": Prior(0.85, 0.7, 1.0, 0.05, "1 at 1 TFLOP/s a watt", "clocks under load, H100 and A100"),
    "throttle": Prior(0.25, 0.02, 0.6, 0.4, "exponent", "between none and the cube root, twice"),
    "tile": Prior(0.9e6, 1e5, 4e6, 0.5, "outputs", "half of 108 tiles of 128 x 128"),
    "traffic": Prior(0.4, 0.05, 1.0, 0.5, "share", "assumed"),
    "vector": Prior(0.80, 0.5, 0.95, 0.1, "share of bandwidth", "copies reach 0.8 to 0.9"),
    "eager": Prior(2.0, 1.0, 4.0, 0.3, "passes", "kernels of a block counted, eager and fused"),
    "quantise": Prior(0.7, 0.1, 3.0, 0.5, "passes", "partly fused into norms and activations"),
    "flash": Prior(0.65, 0.4, 0.9, 0.15, "share", "arXiv:2307.08691: 176-190 of 271 TFLOP/s on A100"),
    "flash_new": Prior(0.45, 0.25, 0.8, 0.15, "share", "arXiv:2407.08608: 350 of 795 TFLOP/s on H100"),
    "vendor": Prior(0.60, 0.4, 0.9, 0.15, "share", "arXiv:2407.08608: cuDNN's backward"),
    "scores": Prior(7.0, 4.0, 16.0, 0.3, "passes", "scale, mask, softmax, dropout, products counted"),
    "kernel": Prior(4e-6, 1.5e-6, 1e-5, 0.3, "s", "usual gap between kernels of a stream"),
    "launch": Prior(25e-6, 5e-6, 60e-6, 0.5, "s", "GPT-2 in PyTorch: 0.6 ms a block, some 27 kernels"),
    "hide_data": Prior(0.8, 0.3, 1.0, 0.2, "share", "assumed"),
    "contention": Prior(0.2, 0.02, 1.0, 0.5, "share", "NCCL takes some 20 of 132 multiprocessors"),
    "hide_tensor": Prior(0.5, 0.1, 0.95, 0.3, "share", "assumed"),
    "hide_expert": Prior(0.4, 0.05, 0.9, 0.5, "share", "assumed"),
    "straggler": Prior(0.008, 0.001, 0.04, 0.5, "a doubling of nodes", "assumed"),
    "optimizer": Prior(1.2, 1.0, 3.0, 0.3, "passes", "assumed"),
    "step": Prior(0.005, 0.0005, 0.05, 0.7, "s", "assumed"),
    "progress": Prior(0.03, 0.002, 0.15, 0.7, "a year", "assumed"),
    "imbalance": Prior(1.1, 1.0, 1.5, 0.1, "ratio", "assumed"),
}
NAMES = tuple(PRIORS)
MOST = 90
"""Rows of one source that a fit reads, evenly taken: 720 alike ones add time, not information."""
SOFT = 0.15
"""Log error from which on a row pulls linearly."""
PULL = 0.15
"""Log error of a row that weighs as much as one spread of a prior, at four rows a constant."""


def hardware(name: str) -> Device:
    """A packaged backend."""
    return load_accelerator(name).device


def load(path: Path = DATA) -> list[Case]:
    """All cases of the table."""
    with path.open(encoding="utf-8") as lines:
        return [case(row, hardware) for row in csv.DictReader(lines)]


def timed(cases: Sequence[Case], qualities: str = "AB") -> list[Case]:
    """Measured steps whose layout is published, of these qualities."""
    return [
        x
        for x in cases
        if x.kind == "throughput" and x.setup is not None and x.step_seconds and x.quality in qualities
    ]


def error(x: Case, c: Constants) -> float:
    """log(predicted / measured)."""
    assert x.setup is not None
    assert x.step_seconds is not None
    return math.log(step_time(x.setup, c).seconds / x.step_seconds)


def errors(cases: Sequence[Case], c: Constants) -> np.ndarray:
    """Those of all cases."""
    return np.array([error(x, c) for x in cases])


def of(values: Sequence[float]) -> Constants:
    """In the order of NAMES."""
    return Constants(**dict(zip(NAMES, values, strict=True)))


def prior() -> Constants:
    """What the model says before it has seen a training run."""
    return of([PRIORS[n].value for n in NAMES])


def fit(cases: Sequence[Case], start: Constants | None = None, rounds: int = 12) -> Constants:
    """Robust least squares of log step times with priors, all sources weighing the same."""
    rows = _thin(cases)
    counts: dict[str, int] = defaultdict(int)
    for x in rows:
        counts[x.src] += 1
    weight = np.array([1 / math.sqrt(counts[x.src] * len(counts)) for x in rows])
    low, high = (np.log([getattr(PRIORS[n], side) for n in NAMES]) for side in ("low", "high"))
    mean = np.log([PRIORS[n].value for n in NAMES])
    spread = np.array([PRIORS[n].spread for n in NAMES])
    first = np.log([getattr(start or prior(), n) for n in NAMES])

    def residuals(p: np.ndarray) -> np.ndarray:
        e = errors(rows, of(np.exp(p).tolist()))
        robust = np.sign(e) * SOFT * np.sqrt(2 * (np.sqrt(1 + (e / SOFT) ** 2) - 1))
        return np.concatenate([robust * weight, (p - mean) / spread * PULL / math.sqrt(len(rows) / 4)])

    got = least_squares(
        residuals,
        np.clip(first, low + 1e-6, high - 1e-6),
        bounds=(low, high),
        max_nfev=rounds,
        x_scale=np.maximum(spread, 0.05),
        diff_step=1e-3,
    )
    return of(np.exp(got.x).tolist())


def leave_out(
    cases: Sequence[Case],
    start: Constants,
    key: Callable[[Case], str],
    others: Sequence[Case] | None = None,
    rounds: int = 6,
) -> np.ndarray:
    """Log errors of each group of cases with the constants fitted to all others (as `others` has them)."""
    out = np.zeros(len(cases))
    for group in sorted({key(x) for x in cases}):
        c = fit([x for x in others or cases if key(x) != group], start, rounds)
        for i, x in enumerate(cases):
            if key(x) == group:
                out[i] = error(x, c)
    return out


@dataclass(frozen=True)
class Score:
    """Of one group: rows, median bias, mean and median absolute error, share of rows within 20 %."""

    rows: int
    bias: float
    mape: float
    median: float
    within: float


def scores(keys: Sequence[str], e: np.ndarray) -> dict[str, Score]:
    """By key, and the mean over keys under `macro-average`."""
    out: dict[str, Score] = {}
    for key in sorted(set(keys)):
        v = e[[k == key for k in keys]]
        a = np.abs(np.exp(v) - 1)
        bias = math.exp(float(np.median(v))) - 1
        out[key] = Score(len(v), bias, float(a.mean()), float(np.median(a)), float((a <= 0.2).mean()))
    each = list(out.values())
    means = [float(np.mean([getattr(s, f) for s in each])) for f in ("bias", "mape", "median", "within")]
    out["macro-average"] = Score(len(e), *means)
    return out


def band(keys: Sequence[str], e: np.ndarray, share: float = 0.9) -> tuple[float, float]:
    """Factors on the prediction between which `share` of the measured times lie, all keys weighing the same."""
    counts = {k: keys.count(k) for k in set(keys)}
    order = np.argsort(-e)  # log(measured / predicted), ascending
    weight = np.cumsum([1 / counts[keys[i]] for i in order])
    weight /= weight[-1]
    ratio = np.exp(-e[order])
    tail = (1 - share) / 2
    return float(ratio[np.searchsorted(weight, tail)]), float(ratio[np.searchsorted(weight, 1 - tail)])


def write(c: Constants, left_out: dict[str, Score], limits: tuple[float, float], path: Path = FITTED) -> None:
    """The data file that famc reads."""
    constants = {
        n: {
            "value": float(f"{getattr(c, n):.4g}"),
            "unit": p.unit,
            "prior": p.value,
            "bounds": [p.low, p.high],
            "prior_from": p.why,
        }
        for n, p in PRIORS.items()
    }
    residuals = {
        k: {f: round(getattr(s, f), 3) for f in ("rows", "bias", "mape", "median", "within")}
        for k, s in left_out.items()
    }
    text = {
        "about": "python benchmarks/planner.py --fit; residuals: each source predicted by a fit without it",
        "constants": constants,
        "band": [round(x, 3) for x in limits],
        "residuals": residuals,
    }
    path.write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")


def _thin(cases: Sequence[Case]) -> list[Case]:
    by: dict[str, list[Case]] = defaultdict(list)
    for x in cases:
        by[x.src].append(x)
    return [x for rows in by.values() for x in rows[:: max(1, math.ceil(len(rows) / MOST))]]
