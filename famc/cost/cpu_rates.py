"""What one CPU was measured to do, as curves that can be read between their points.

In: points of `famc calibrate` (famc.backend), or of a CPU that was only looked at (`assumed`). Out: FLOP/s, bytes/s,
seconds. Matrices of a small model are far from the peak, and its tensors live in caches or not: one number each for
compute and bandwidth misses a step's time by factors, so that both are curves over size.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache

Points = tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class ThreadRates:
    """A CPU with so many threads. FLOP/s, bytes/s, seconds.

    `matmul`: the best plain product by precision. `linear`: (width, rows, FLOP/s) of a square linear layer, forward and
    backward, weights and inputs in fp32 and rounded for each product as autocast does. `vector`: (bytes of a tensor,
    bytes/s read and written) of an element-wise operation that makes a new tensor. `softmax`: bytes/s, read and written
    once. `memory`: of a copy that no cache holds. `matvec`: bytes/s of weights. `operation`: one small operation and its
    part of autograd.
    """

    threads: int
    matmul: tuple[tuple[str, float], ...]
    linear: tuple[tuple[str, tuple[tuple[float, float, float], ...]], ...]
    vector: Points
    softmax: float
    memory: float
    matvec: tuple[tuple[str, float], ...]
    operation: float
    fresh: tuple[tuple[str, Points], ...] = ()

    def linear_rate(self, precision: str, width: float, rows: float) -> float:
        """FLOP/s of a linear layer, forward and backward, between the measured widths and rows in logarithms.

        Flat beyond the largest; below the smallest in proportion, as a kernel's start is all there is to it.
        ValueError for a precision that was not measured.
        """
        grid = _grid(self.linear).get(precision)
        if grid is None:
            raise ValueError(
                f"no linear layer was measured in {precision}: {', '.join(p for p, _ in self.linear)}"
            )
        return read(tuple((r, read(points, width)) for r, points in grid), rows)

    def first_seconds(self, precision: str, width: float) -> float:
        """Seconds that a number of rows costs a linear layer once; 0 where that was not measured."""
        points = dict(self.fresh).get(precision)
        return read(points, width, floor=True) if points else 0.0

    def vector_rate(self, size: float) -> float:
        """bytes/s of an element-wise operation on a tensor of `size` bytes; flat outside the measured sizes."""
        return read(self.vector, size, floor=True)


@dataclass(frozen=True, slots=True)
class CpuRates:
    """A CPU by number of threads, ascending; and what a step and a job cost beside the model, in seconds.
    `residual`: a real training step here over what the figures say of it."""

    threads: tuple[ThreadRates, ...]
    step_overhead: float
    startup: float
    residual: float = 1.0

    def at(self, threads: int) -> ThreadRates:
        """The figures with `threads` threads: between two measured numbers each grows by a power of the threads, beyond the
        last they stay."""
        return _at(self, threads)


@lru_cache(maxsize=256)
def _at(rates: CpuRates, threads: int) -> ThreadRates:
    known = rates.threads
    for one in known:
        if one.threads == threads:
            return one
    if threads >= known[-1].threads or len(known) == 1:
        return known[-1]
    upper = next(i for i, one in enumerate(known) if one.threads > threads)
    if upper == 0:
        return known[0]
    low, high = known[upper - 1], known[upper]
    share = math.log(threads / low.threads) / math.log(high.threads / low.threads)

    def mix(a: float, b: float) -> float:
        return float(a * (b / a) ** share)

    return ThreadRates(
        threads=threads,
        matmul=tuple((p, mix(a, b)) for (p, a), (_, b) in zip(low.matmul, high.matmul, strict=True)),
        linear=tuple(
            (p, tuple((w, r, mix(a, b)) for (w, r, a), (_, _, b) in zip(first, second, strict=True)))
            for (p, first), (_, second) in zip(low.linear, high.linear, strict=True)
        ),
        vector=tuple((s, mix(a, b)) for (s, a), (_, b) in zip(low.vector, high.vector, strict=True)),
        softmax=mix(low.softmax, high.softmax),
        memory=mix(low.memory, high.memory),
        matvec=tuple((p, mix(a, b)) for (p, a), (_, b) in zip(low.matvec, high.matvec, strict=True)),
        operation=mix(low.operation, high.operation),
        fresh=low.fresh,
    )


@lru_cache(maxsize=256)
def _grid(
    linear: tuple[tuple[str, tuple[tuple[float, float, float], ...]], ...],
) -> dict[str, tuple[tuple[float, Points], ...]]:
    """precision -> ((rows, ((width, FLOP/s), ...)), ...), both ascending."""
    made: dict[str, tuple[tuple[float, Points], ...]] = {}
    for precision, points in linear:
        by_rows: dict[float, list[tuple[float, float]]] = {}
        for width, rows, rate in points:
            by_rows.setdefault(rows, []).append((width, rate))
        made[precision] = tuple((rows, tuple(sorted(by_rows[rows]))) for rows in sorted(by_rows))
    return made


def read(points: Points, x: float, *, floor: bool = False) -> float:
    """y at x: straight in log x, log y between ascending points. Beyond the last point its y; below the first one its y, or
    without `floor` that much less in proportion."""
    xs = [p[0] for p in points]
    place = bisect_right(xs, x)
    if place == len(points):
        return points[-1][1]
    if place == 0:
        return points[0][1] * (1.0 if floor else x / points[0][0])
    (x0, y0), (x1, y1) = points[place - 1], points[place]
    return float(y0 * (y1 / y0) ** (math.log(x / x0) / math.log(x1 / x0)))
