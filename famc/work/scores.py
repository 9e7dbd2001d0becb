"""Numbers with their errors: ratios over independent units (documents, conversations, pairs), and their
files.

A score is sum(num) / sum(den) over units. Its standard error is that of the linearised ratio estimator with
n / (n - 1): the tokens of one document are not independent, documents are. Two scores on the same units are
compared pair by pair. Its interval is a percentile bootstrap over units (Efron 1979), which needs no bell curve:
nDCG of a query is often 0 or 1.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = "results.json"
UNITS = "units.json"
RESAMPLES, SHARE = 2000, 0.95  # of a bootstrap; what its interval covers
_DRAWS = 2**22  # numbers drawn at once: 32 MB


@dataclass(frozen=True)
class Score:
    """A value, its standard error (nan for a single unit) and the number of units."""

    value: float
    stderr: float
    n: int

    def record(self) -> dict[str, Any]:
        """As it stands in results.json."""
        return {"value": stable(self.value), "stderr": stable(self.stderr), "n": self.n}

    @classmethod
    def read(cls, entry: Mapping[str, Any]) -> Score:
        """From results.json."""
        return cls(_number(entry.get("value")), _number(entry.get("stderr")), int(entry.get("n") or 0))


@dataclass(frozen=True)
class Units:
    """One metric's numerators and denominators, by unit."""

    ids: tuple[str, ...]
    num: tuple[float, ...]
    den: tuple[float, ...]

    @classmethod
    def of(cls, rows: Iterable[tuple[str, float, float]]) -> Units:
        """From (id, numerator, denominator)."""
        ids, num, den = [], [], []
        for key, top, bottom in rows:
            ids.append(key)
            num.append(float(top))
            den.append(float(bottom))
        return cls(tuple(ids), tuple(num), tuple(den))

    @property
    def value(self) -> float:
        """The ratio; nan without units."""
        total = math.fsum(self.den)
        return math.fsum(self.num) / total if total else math.nan

    def influence(self) -> list[float]:
        """How far each unit pulls the ratio from its value; they sum to nought. nan where there is no ratio."""
        value, total = self.value, math.fsum(self.den)
        if not total:
            return [math.nan] * len(self.ids)
        return [(top - value * bottom) / total for top, bottom in zip(self.num, self.den, strict=True)]

    def score(self) -> Score:
        """The ratio with its standard error."""
        return Score(self.value, _error(self.influence()), len(self.ids))

    def record(self) -> dict[str, Any]:
        """As it stands in units.json."""
        return {
            "ids": list(self.ids),
            "num": [stable(x) for x in self.num],
            "den": [stable(x) for x in self.den],
        }

    @classmethod
    def read(cls, entry: Mapping[str, Any]) -> Units:
        """From units.json."""
        return cls(tuple(entry["ids"]), tuple(map(_number, entry["num"])), tuple(map(_number, entry["den"])))


def difference(ours: Units, theirs: Units) -> Score:
    """ours - theirs on the same units: what both find hard or easy cancels out of the error."""
    if ours.ids != theirs.ids:
        raise ValueError("the two scores are not over the same units")
    pulls = [a - b for a, b in zip(ours.influence(), theirs.influence(), strict=True)]
    return Score(ours.value - theirs.value, _error(pulls), len(pulls))


def independent(ours: Score, theirs: Score) -> Score:
    """ours - theirs where units are not the same, or not known."""
    return Score(ours.value - theirs.value, math.hypot(ours.stderr, theirs.stderr), min(ours.n, theirs.n))


def interval(units: Units, name: str) -> list[float | None]:
    """[low, high]: between these lie 95 % of the ratios of resampled units. The draw depends on `name` alone; [None,
    None] for fewer than two units, or where one is no number.
    """
    num, den = np.array(units.num, np.float64), np.array(units.den, np.float64)
    n = len(num)
    if n < 2 or not (np.isfinite(num).all() and np.isfinite(den).all()):
        return [None, None]
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    generator = np.random.default_rng(seed)
    parts = []
    for at in range(0, RESAMPLES, max(1, _DRAWS // n)):
        drawn = generator.integers(0, n, (min(max(1, _DRAWS // n), RESAMPLES - at), n))
        with np.errstate(divide="ignore", invalid="ignore"):
            parts.append(num[drawn].sum(axis=1) / den[drawn].sum(axis=1))
    ratios = np.concatenate(parts)
    known = ratios[np.isfinite(ratios)]  # a draw may hold only units without a denominator
    if not len(known):
        return [None, None]
    low, high = np.quantile(known, [(1 - SHARE) / 2, (1 + SHARE) / 2])
    return [stable(float(low)), stable(float(high))]


def stable(value: float) -> float | None:
    """Eight significant digits, so that a rounding in the last bit changes no file; None for what is no
    number.
    """
    return float(f"{value:.8g}") if math.isfinite(value) else None


def metric(value: float) -> float | str:
    """For a record's metrics: JSON has no nan."""
    found = stable(value)
    return str(value) if found is None else found


def write_json(path: Path, value: Any) -> None:
    """Two spaces a level, keys as they come; nan is refused."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """A JSON file's value."""
    return json.loads(path.read_text(encoding="utf-8"))


def _error(pulls: list[float]) -> float:
    n = len(pulls)
    return math.sqrt(math.fsum(x * x for x in pulls) * n / (n - 1)) if n > 1 else math.nan


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan
