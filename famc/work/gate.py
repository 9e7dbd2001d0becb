"""`gate`: a condition that must hold before release.

In: `parity` of an export, or `score` of a variant and maybe `beats`, the score of another. Out:
verdict.json with every check: what, value, limit, whether it held. A failed gate fails the step, unless it
is advisory. nan never passes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from famc.errors import StepFailed, did_you_mean
from famc.job import Job
from famc.steps.others import HIGHER_IS_BETTER, MAIN_METRIC
from famc.work.scores import (
    RESULTS,
    UNITS,
    Score,
    Units,
    difference,
    independent,
    read_json,
    stable,
    write_json,
)

MONOTONIC_SIGMA = 2.0  # a bigger size may be worse by so many standard errors: that is noise


@dataclass(frozen=True)
class Check:
    """One comparison. `value` and `limit` are numbers, or words where words are compared."""

    what: str
    value: float | str
    relation: str  # how the value must stand to the limit: <=, >=, <, >, ==
    limit: float | str
    source: str
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether it holds; comparisons with nan are false."""
        if isinstance(self.value, str) or isinstance(self.limit, str):
            return self.relation == "==" and self.value == self.limit
        compared = {
            "<=": self.value <= self.limit, ">=": self.value >= self.limit,
            "<": self.value < self.limit, ">": self.value > self.limit, "==": self.value == self.limit,
        }  # fmt: skip
        return compared[self.relation]

    def record(self) -> dict[str, Any]:
        """As it stands in verdict.json."""
        value, limit = (stable(x) if isinstance(x, float) else x for x in (self.value, self.limit))
        found = {
            "what": self.what,
            "value": value,
            "limit": limit,
            "relation": self.relation,
            "passed": self.passed,
        }
        return found | ({"note": self.note} if self.note else {}) | {"from": self.source}

    def __str__(self) -> str:
        text = f"{self.what} is {_word(self.value)}, must be {self.relation} {_word(self.limit)}"
        return f"{text} ({self.source}{'; ' + self.note if self.note else ''})"


def run(job: Job, inputs: dict[str, Path], out: Path) -> dict[str, Any]:
    """Check, write the verdict, and fail if it does not hold."""
    checks = list(checks_of(job, inputs))
    if not checks:
        raise StepFailed(
            f"{job.name}: nothing to check", "write one of parity, max_drop, require, beats, monotonic"
        )
    failed = [check for check in checks if not check.passed]
    advisory = bool(job.params.get("advisory"))
    write_json(
        out / "verdict.json",
        {"passed": not failed, "advisory": advisory, "checks": [check.record() for check in checks]},
    )
    if failed and not advisory:
        count = f"{len(failed)} of {len(checks)} conditions" if len(checks) > 1 else "its condition"
        lines = "\n".join(f"  {check}" for check in failed)
        raise StepFailed(
            f"{job.name}: {count} did not hold\n{lines}", "nothing that follows from it is released"
        )
    numbers = {
        "passed": int(not failed),
        "checks": len(checks),
        "failed": len(failed),
        "advisory": int(advisory),
    }
    return {**numbers, "failures": "; ".join(map(str, failed))} if failed else dict(numbers)


def checks_of(job: Job, inputs: Mapping[str, Path]) -> Iterator[Check]:
    """Every comparison that the gate asks for."""
    params = job.params
    if params.get("parity"):
        yield from _parity(params["parity"], _source(job, inputs, "parity"))
    if params.get("max_drop"):
        drop = params["max_drop"]
        wanted = tuple(params.get("metrics") or ())
        yield from _max_drop(
            float(drop["points"]), float(drop["sigma"]), wanted, _source(job, inputs, "parity")
        )
    if params.get("require"):
        yield from _require(
            params["require"], _source(job, inputs, "score" if "score" in inputs else "parity")
        )
    if params.get("monotonic"):
        yield from _monotonic(params, _source(job, inputs, "score"), _source(job, inputs, "beats"))
    elif params.get("beats"):
        yield from _beats(params, _source(job, inputs, "score"), _source(job, inputs, "beats"))


# --- an export against its source -------------------------------------------------------------------------


def _parity(wanted: Mapping[str, Any], made: _Made) -> Iterator[Check]:
    found = made.results["parity"]
    for key in ("tokenizer", "template"):
        if wanted.get(key) and key not in found:
            yield _absent(key, found, made.name)
        elif wanted.get(key):
            yield Check(key, str(found[key]), "==", str(wanted[key]), made.name)
    for key, metric, relation, say in LIMITS:
        if wanted.get(key) is None:
            continue
        if metric not in found:
            yield _absent(metric, found, made.name)
            continue
        note = say.format_map({name: _number(value) for name, value in found.items()})
        value = _number(found[metric]) - (1 if key == "perplexity" else 0)
        yield Check(
            "perplexity" if key == "perplexity" else metric,
            value,
            relation,
            float(wanted[key]),
            made.name,
            note,
        )


# of `parity`: key of the spec, metric of the check, how it must stand to the limit, what a reader should know
LIMITS = (
    ("kl", "kl", "<=", "nats a token"),
    ("perplexity", "perplexity_ratio", "<=", "relative rise, ± {perplexity_ratio_error:.2g}"),
    ("greedy", "greedy_equal", ">=", "share of {prompts:g} answers"),
    ("cosine", "cosine_mean", ">=", "over {vectors:g} vectors, worst {cosine_min:.4g}"),
    ("ranking", "kendall_tau", ">=", "over {queries:g} queries and {documents:g} documents"),
    (
        "ndcg",
        "ndcg_drop",
        "<=",
        "relative drop from {ndcg_source:.4g} to {ndcg:.4g} over {queries:g} queries",
    ),
)


def _max_drop(points: float, sigma: float, wanted: tuple[str, ...], made: _Made) -> Iterator[Check]:
    """How much worse the export is, less `sigma` standard errors of the paired difference, at most `points`.

    A point is a hundredth of a score between 0 and 1; for losses and perplexity, one per cent of the
    source's.
    """
    scores = made.results["scores"]
    tasks = tuple(
        name for name in scores if name != "perplexity"
    )  # perplexity has a limit of its own: parity
    for name in wanted or tasks or ("perplexity",):
        entry = scores.get(name)
        if entry is None:
            yield _absent(name, scores, made.name)
            continue
        change = Score.read(entry["difference"])
        if higher_is_better(name, entry):
            unit, sign, word = 100.0, -1.0, "points"
        else:
            unit, sign, word = 100.0 / (Score.read(entry["source"]).value or math.nan), 1.0, "%"
        drop, error = change.value * unit * sign, change.stderr * abs(unit)
        noise = error if math.isfinite(error) else 0.0  # a single text: no error is known, none is granted
        note = f"{word}: allowed {points:g}, and {sigma:g} standard errors of {noise:.2g}"
        yield Check(f"drop of {name}", drop, "<=", points + sigma * noise, made.name, note)


# --- a variant's scores -----------------------------------------------------------------------------------


def _require(wanted: Mapping[str, Mapping[str, Any]], made: _Made) -> Iterator[Check]:
    for name, bound in wanted.items():
        value = made.value(name)
        if value is None:
            yield _absent(name, made.names, made.name)
            continue
        if bound.get("min") is not None:
            yield Check(name, value.value, ">=", float(bound["min"]), made.name, _error(value))
        if bound.get("max") is not None:
            yield Check(name, value.value, "<=", float(bound["max"]), made.name, _error(value))


def _beats(params: Mapping[str, Any], ours: _Made, theirs: _Made) -> Iterator[Check]:
    """Strictly better; with `within`, worse by at most that share of the other's value."""
    within = params.get("within")
    where = f"{ours.name} against {theirs.name}"
    for name, a, b, change, note in _pairs(params, ours, theirs):
        if a is None or b is None or change is None:
            yield _absent(name, (ours if a is None else theirs).names, (ours if a is None else theirs).name)
            continue
        higher = higher_is_better(name, ours.results.get(name, {}))
        limit = b.value
        if within is not None:
            limit -= math.copysign(float(within) * abs(b.value), 1 if higher else -1)
        relation = (">" if higher else "<") + ("" if within is None else "=")
        yield Check(name, a.value, relation, limit, where, note)


def _monotonic(params: Mapping[str, Any], ours: _Made, theirs: _Made) -> Iterator[Check]:
    """The bigger size is not worse than the next smaller one, beyond two standard errors."""
    where = f"{ours.name} against {theirs.name}"
    for name, a, b, change, note in _pairs(params, ours, theirs):
        if a is None or b is None or change is None:
            yield _absent(name, (ours if a is None else theirs).names, (ours if a is None else theirs).name)
            continue
        higher = higher_is_better(name, ours.results.get(name, {}))
        noise = MONOTONIC_SIGMA * change.stderr if math.isfinite(change.stderr) else 0.0
        limit = b.value - noise if higher else b.value + noise
        granted = f"{note}; {MONOTONIC_SIGMA:g} of them granted"
        yield Check(name, a.value, ">=" if higher else "<=", limit, where, granted)


def _pairs(
    params: Mapping[str, Any], ours: _Made, theirs: _Made
) -> Iterator[tuple[str, Score | None, Score | None, Score | None, str]]:
    for name in tuple(params.get("metrics") or ()) or main_metrics(ours.results, theirs.results):
        a, b = ours.value(name), theirs.value(name)
        if a is None or b is None:
            yield name, a, b, None, ""
            continue
        mine, yours = ours.units.get(name), theirs.units.get(name)
        if mine is not None and yours is not None and mine.ids == yours.ids:
            change, how = difference(mine, yours), f"paired over {len(mine.ids)}"
        else:
            change, how = independent(a, b), f"not the same examples: {a.n} and {b.n}"
        sigmas = abs(change.value) / change.stderr if change.stderr else math.inf
        note = f"difference {change.value:+.4g} ± {change.stderr:.2g}, {sigmas:.1f} standard errors, {how}"
        yield name, a, b, change, note


def main_metrics(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[str, ...]:
    """The main metric of the first task that both have; of foreign tasks, their first metric."""
    both = [name for name in ours if name in theirs]
    return tuple(name for name in both if name in MAIN_METRIC.values())[:1] or tuple(both[:1]) or ("score",)


def higher_is_better(name: str, entry: Mapping[str, Any]) -> bool:
    """By the evaluation's own word, else by famc's table; a metric that neither knows is one of success."""
    if "higher_is_better" in entry:
        return bool(entry["higher_is_better"])
    return HIGHER_IS_BETTER.get(name, HIGHER_IS_BETTER.get(name.partition(".")[0], True))


# --- reading ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Made:
    """What an evaluation or a parity check wrote, and under which address."""

    name: str
    results: Mapping[str, Any]
    units: Mapping[str, Units]

    @property
    def _numbers(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.results.get("parity", self.results)
        return found

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._numbers)

    def value(self, name: str) -> Score | None:
        if name not in self._numbers:
            return None
        entry = self._numbers[name]
        return Score.read(entry) if isinstance(entry, Mapping) else Score(_number(entry), math.nan, 0)


def _source(job: Job, inputs: Mapping[str, Path], role: str) -> _Made:
    if role not in inputs:
        raise StepFailed(f"{job.name} has no {role} to check", "famc plan shows what it needs")
    folder = inputs[role]
    units = read_json(folder / UNITS) if (folder / UNITS).is_file() else {}
    name = job.inputs[role][0] if role in job.inputs else role
    return _Made(name, read_json(folder / RESULTS), {key: Units.read(entry) for key, entry in units.items()})


def _absent(name: str, known: Any, source: str) -> Check:
    return Check(
        name, math.nan, "==", "measured", source, did_you_mean(name, known) or "nothing was measured"
    )


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


def _error(score: Score) -> str:
    return f"± {score.stderr:.2g}" if math.isfinite(score.stderr) else ""


def _word(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.6g}"
