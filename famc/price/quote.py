"""The price of a step: what famc.price gives back. Plain data; bears no identity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from famc.cost.layout import Layout
from famc.cost.memory import Memory

BASES = ("measured", "modelled", "assumed")
BAND = {"measured": (0.8, 1.33), "modelled": (0.6, 1.6), "assumed": (0.4, 2.5)}
"""Factors between which 90 % are expected, where no table of measurements gives them. Measured: famc's own jobs on a calibrated
CPU are told within 25 % of what they took, by records that were looked at on the way (benchmarks/cpu_plan.py); the others are
assumed."""


@dataclass(frozen=True)
class Quote:
    """`memory` of the fullest device, which may hold `limit` bytes. `interval`: seconds between which 90 % are expected.
    `mfu`: model FLOPs over the peak of all devices and the whole job. `precision_why`: where the spec did not say it."""

    layout: Layout
    memory: Memory
    limit: float
    seconds: float
    mfu: float
    basis: str
    interval: tuple[float, float]
    precision_why: str = ""
    threads: int = 1

    @classmethod
    def of(
        cls, *, seconds: float, memory: Memory, limit: float, basis: str, precision: str = "", layout: Layout | None = None,
        flops: float = 0.0, peak: float = 1.0, interval: tuple[float, float] | None = None, why: str = "", threads: int = 1,
    ) -> Self:  # fmt: skip
        """`flops` of the job and `peak` FLOP/s of its devices make the mfu; `interval` as factors, default by the basis."""
        layout = layout or Layout(precision=precision)
        low, high = interval or BAND[basis]
        return cls(
            layout, memory, limit, seconds, flops / (seconds * peak) if flops else 0.0, basis,
            (seconds * low, seconds * high), why, threads,
        )  # fmt: skip


def weaker(*bases: str) -> str:
    """The least sure of them."""
    return max(bases, key=BASES.index)
