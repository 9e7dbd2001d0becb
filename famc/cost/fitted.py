"""The constants of the time model, as fitted to published measurements, and how far it was off on cases left out.

In: fitted.json, written by `python benchmarks/planner.py --fit`. Out: Constants, a band. Read once, when first asked for.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any


@dataclass(frozen=True, slots=True)
class Constants:
    """Each is physical. Values and units stand in fitted.json; priors, bounds and their sources in benchmarks/planner_fit.py."""

    sustained: (
        float  # share of the best matmul rate that training keeps on a chip of 1 TFLOP/s (16 bits) a watt
    )
    throttle: float  # how that share falls with TFLOP/s a watt: an exponent
    tile: float  # outputs of a product that half a wave of thread blocks leaves idle
    traffic: float  # share of a product's memory traffic that its arithmetic does not hide
    vector: float  # share of the memory bandwidth that element-wise kernels reach
    eager: float  # passes over memory of unfused element-wise work, for one of fused work
    quantise: float  # passes that casting to 8 bits adds, for one of each input and gradient
    flash: float  # FlashAttention-2: share of the best matmul rate, head 128, on chips that it fits (Ampere, Ada)
    flash_new: float  # the same on Hopper and later, whose tensor cores it does not drive fully
    vendor: float  # the chip maker's kernel (cuDNN, FlashAttention-3, Pallas)
    scores: float  # passes over the scores where they are written to memory, forward
    kernel: float  # seconds the device needs to begin a kernel
    launch: float  # seconds Python needs to start one
    hide_data: float  # share of the compute behind which data parallelism and context rings move
    contention: float  # slow-down of compute by what moves behind it: share of the moving time
    hide_tensor: float  # share of tensor parallelism's traffic hidden where the stack overlaps it
    hide_expert: float  # the same of expert parallelism's exchanges
    straggler: float  # slow-down for each doubling of nodes
    optimizer: float  # passes of the update over its state, for the least possible
    step: float  # seconds a step outside of all this
    progress: float  # speed-up a year by better software on the same chip
    imbalance: float  # rows of a mixture's busiest device for the mean


@lru_cache(maxsize=1)
def _data() -> dict[str, Any]:
    text = (files("famc.cost") / "data" / "fitted.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


@lru_cache(maxsize=1)
def constants() -> Constants:
    """The fitted values."""
    return Constants(**{name: float(entry["value"]) for name, entry in _data()["constants"].items()})


@lru_cache(maxsize=1)
def band() -> tuple[float, float]:
    """Factors on a predicted time between which 90 % of the measured ones lay, each source left out of the fit that
    predicted it, and each weighing the same."""
    low, high = _data()["band"]
    return float(low), float(high)
