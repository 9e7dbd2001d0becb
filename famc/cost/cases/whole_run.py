"""A whole training run of which little more is known than its model, tokens and chip: what else is assumed, and how far
published runs were from it.

In: a Case's facts. Out: batch, devices, stacks; factor and band from data/runs.json, written by
`python benchmarks/planner_runs.py --fit`. Bears no identity.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files

from famc.cost.anatomy import Anatomy
from famc.cost.device import Device
from famc.cost.setup import Software
from famc.cost.sums import active

DAYS, UTILISATION = 30.0, 0.4
"""Where the devices are not known: as many nodes, a power of two, as end such a run in these days at this share of the peak at
16 bits. Assumed."""
COMPILED_YEAR = 2024.0
"""Since when a PyTorch stack that says nothing of itself is taken to compile its model. Assumed."""


@dataclass(frozen=True, slots=True)
class Runs:
    """Device-hours of published runs over those of the searched layout: `factor`, the mean of families of models, and the
    band about the prediction, factor included, that holds 90 % of further families with 95 % confidence. `searched`: the 90 %
    band of step times where the layout is not known."""

    factor: float
    low: float
    high: float
    searched: tuple[float, float]


@cache
def runs() -> Runs:
    """The fitted values, read once."""
    made = json.loads((files("famc.cost") / "data" / "runs.json").read_text(encoding="utf-8"))
    low, high = made["searched"]
    return Runs(float(made["factor"]), float(made["low"]), float(made["high"]), (float(low), float(high)))


def stacks(software: Software) -> tuple[Software, ...]:
    """What may have run it: the software itself; where it is not stated, PyTorch and Megatron-LM of that year."""
    if software.name != "unknown":
        return (software,)
    pytorch = replace(software, compiled=software.compiled or software.year >= COMPILED_YEAR)
    return (pytorch, replace(software, name="megatron-lm"))


def assumed_batch(anatomy: Anatomy, tokens: float, seq_len: int, devices: int) -> int:
    """Sequences a step where nobody says: 0.292 x C^0.3271 tokens, C = 6 x active parameters x tokens FLOPs (DeepSeek LLM,
    arXiv:2401.02954, section 3.1), made a number that the devices share evenly."""
    wanted = 0.2920 * (6.0 * active(anatomy) * tokens) ** 0.3271 / seq_len
    odd = devices
    while odd % 2 == 0:
        odd //= 2
    batch = odd << max(0, round(math.log2(wanted / odd)))
    while batch % devices:
        batch *= 2
    return batch


def assumed_devices(anatomy: Anatomy, tokens: float, device: Device, per_node: int) -> int:
    """Devices where nobody says: see DAYS."""
    peaks = dict(device.peaks)
    peak = peaks.get("bf16") or peaks.get("fp16") or device.peak("fp32")
    needed = 6.0 * active(anatomy) * tokens / (UTILISATION * peak * DAYS * 86400)
    return per_node << max(0, math.ceil(math.log2(needed / per_node)))
