"""The search for a training step's layout: the fastest, the cheapest, or the cheapest that meets a deadline.

In: a Wanted (spreads.py), forced fields. Out: Priced, whose layout says why; DoesNotFit, TooSlow or ValueError. Bears no identity.

Every spread of the model has a bound that its time hardly falls below: what the devices compute at their best, and traffic
between tensor ranks. Spreads are looked at in the order of their bounds, until one is slower than the best that was found;
each has its memory looked at before its time, with the largest micro-batch that fits. For one number of devices the fastest
is the cheapest, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Literal

from famc.cost.bounds import MICRO_TOKENS, Known
from famc.cost.fitted import constants
from famc.cost.layout import DoesNotFit, Layout
from famc.cost.memory import Memory
from famc.cost.priced import Priced, held, layout_of, priced, room, setup_of
from famc.cost.reasons import nearest, why
from famc.cost.setup import Setup
from famc.cost.spreads import Spread, Wanted, check, counts, precisions, spreads
from famc.cost.step_time import step_time

__all__ = ["DoesNotFit", "Priced", "TooSlow", "Wanted", "best", "options", "priced"]

Objective = Literal["time", "cost"]
Forced = Mapping[str, int | str]
Pairs = tuple[tuple[str, int | str], ...]

TIE = 0.005
"""Relative difference below which fewer devices are preferred."""


ALONE = Spread(1, 1, 1, 1, 1, 1, 1, (1,))


class TooSlow(Exception):
    """No layout meets the deadline. `fastest`: the one that comes nearest."""

    def __init__(self, fastest: Priced, deadline: float) -> None:
        self.fastest = fastest
        self.deadline = deadline
        lay = fastest.setup.layout
        super().__init__(
            f"no layout makes a step in {deadline:.3g} s: the fastest takes {fastest.time.seconds:.3g} s "
            f"on {lay.devices} devices"
        )


def best(
    wanted: Wanted, forced: Forced | None = None, objective: Objective = "time", deadline: float | None = None
) -> Priced:
    """The layout with the least step time, or device-seconds (`cost`), or the cheapest with at most `deadline` seconds a step.

    `forced` fixes fields of the layout (spreads.FORCEABLE). All devices may be used, not must; of two within 0.5 % the one
    on fewer devices is taken. On a CPU: one process, the largest micro-batch that fits; its time is no use (see cpu_time).

    DoesNotFit with the largest consumer and the nearest change that would fit; TooSlow; ValueError for what cannot be.
    """
    return _best(wanted, tuple(sorted((forced or {}).items())), objective, deadline)


def options(wanted: Wanted, forced: Forced | None = None) -> tuple[Priced, ...]:
    """Layouts of which none is slower and on as many devices as another: devices ascending, seconds descending.

    Raises as `best` does.
    """
    return _options(wanted, tuple(sorted((forced or {}).items())))


# --- the search -------------------------------------------------------------------------------------------


@lru_cache(maxsize=8192)
def _best(w: Wanted, pairs: Pairs, objective: Objective, deadline: float | None) -> Priced:
    forced = dict(pairs)
    check(w, forced)
    by_cost = objective == "cost" or deadline is not None
    if w.device.kind == "cpu":
        found = _on_cpu(w, forced)
    elif by_cost:
        found = _front(w, forced)
    else:
        found = _fast(w, forced)
    if not found:
        raise _unfit(w, forced)
    if deadline is not None:
        meeting = [p for p in found if p.time.seconds <= deadline]
        if not meeting:
            raise TooSlow(min(found, key=lambda p: p.time.seconds), deadline)
        found = meeting

    def value(p: Priced) -> float:
        return p.device_seconds if by_cost else p.time.seconds

    most = min(map(value, found)) * (1 + TIE)
    chosen = min((p for p in found if value(p) <= most), key=lambda p: p.setup.layout.devices)
    return _explained(w, chosen, forced, "cost" if by_cost else "time")


@lru_cache(maxsize=8192)
def _options(w: Wanted, pairs: Pairs) -> tuple[Priced, ...]:
    forced = dict(pairs)
    check(w, forced)
    found = _on_cpu(w, forced) if w.device.kind == "cpu" else _front(w, forced)
    if not found:
        raise _unfit(w, forced)
    return tuple(_explained(w, p, forced, "") for p in found)


def _explained(w: Wanted, p: Priced, forced: Forced, objective: str) -> Priced:
    reasons = why(w, p, forced, objective)
    return replace(p, setup=replace(p.setup, layout=replace(p.setup.layout, why=reasons)))


def _fast(w: Wanted, forced: Forced) -> list[Priced]:
    """From the most devices down, as long as fewer could be faster."""
    known = Known(w, forced)
    least, found = math.inf, []
    for devices in reversed(counts(w, forced)):
        if known.floor() / devices >= least * (1 + TIE):
            break
        made = _fastest(known, devices, least * (1 + TIE))
        if made is not None:
            found.append(made)
            least = min(least, made.time.seconds)
    return found


def _front(w: Wanted, forced: Forced) -> list[Priced]:
    """For each number of devices the fastest, if it is faster than all on fewer devices."""
    known = Known(w, forced)
    found: list[Priced] = []
    for devices in counts(w, forced):
        least = found[-1].time.seconds * (1 - TIE) if found else math.inf
        made = _fastest(known, devices, least)
        if made is not None:
            found.append(made)
    return found


def _fastest(known: Known, devices: int, least: float) -> Priced | None:
    """The fastest layout on so many devices, if one fits and takes less than `least` seconds.

    Spreads in the order of their bounds; of each the setups that fit, unless their own bounds say that they are slower.
    """
    w = known.w
    chosen: Priced | None = None
    nodes = max(1.0, devices / w.per_node)
    scale = w.global_batch / devices * (1.0 + constants().straggler) ** math.log2(nodes)
    space = known.space(devices)
    queue: list[tuple[float, int, Spread, str, str]] = []
    for spread in spreads(w, known.forced, devices):
        state = known.state(spread, spread.shards[-1])
        if state > space:
            continue
        micro = int(known.forced.get("micro_batch", 1))
        accum = max(1, w.global_batch // (spread.data * micro))
        bubble = 1.0 + (spread.pp - 1) * spread.data / (spread.vpp * w.global_batch)
        for precision in known.precisions:
            for recompute in known.recomputes:
                if state + known.waiting(spread, micro, accum, precision, recompute) > space:
                    continue
                bare = known.bare(precision, recompute, spread.tp, 1, 0, known.most)
                if bare * scale * bubble < least:
                    queue.append((bare * scale * bubble, len(queue), spread, recompute, precision))
    queue.sort()
    for bound, _, spread, recompute, precision in queue:
        if bound >= least:
            break
        state = known.state(spread, spread.shards[-1])
        for micro, accum in _sizes(w, known.forced, spread):
            if state + known.waiting(spread, micro, accum, precision, recompute) > space:
                continue
            bare = known.bare(precision, recompute, spread.tp, spread.cp, spread.ep, micro)
            if bare * scale * (1.0 + (spread.pp - 1) / (spread.vpp * accum)) >= least:
                if spread.pp == 1:
                    break  # smaller ones take longer
                continue
            done = False
            for setup, memory in _fitting(known, spread, micro, accum, recompute, precision):
                time = step_time(setup)
                done = done or setup.layout.dp_shard == spread.shards[0]
                if time.seconds < least:
                    least = time.seconds
                    chosen = Priced(setup, memory, time, room(setup))
            if done and spread.pp == 1:
                break  # of a pipeline, whose bubble grows with the micro-batch, the smaller ones are looked at too
    return chosen


def _fitting(
    known: Known, spread: Spread, micro: int, accum: int, recompute: str, precision: str
) -> Iterator[tuple[Setup, Memory]]:
    """Setups that fit: with the state divided the most, and as little as the micro-batch allows."""
    w, space = known.w, known.space(spread.devices)
    waiting = known.waiting(spread, micro, accum, precision, recompute)

    def tried(shard: int) -> tuple[Setup, Memory] | None:
        if known.state(spread, shard) + waiting > space:
            return None
        setup = setup_of(w, layout_of(w, spread, shard, micro, accum, recompute, precision), spread.vpp)
        memory = known.held(setup)
        return (setup, memory) if memory.total <= space else None

    found = tried(spread.shards[-1])
    if found is None:
        return
    yield found
    for shard in spread.shards[:-1]:
        if found := tried(shard):
            yield found
            return


def _sizes(w: Wanted, forced: Forced, spread: Spread) -> Iterator[tuple[int, int]]:
    """(micro-batch, accumulation steps) of a rank's sequences, the largest micro-batch first."""
    each = w.global_batch // spread.data
    most = max(1, MICRO_TOKENS[w.device.kind] // (w.seq_len * w.rows // spread.cp))
    sizes = range(min(each, most), 0, -1)
    if "micro_batch" in forced:
        sizes = range(int(forced["micro_batch"]), int(forced["micro_batch"]) - 1, -1)
    for micro in sizes:
        accum = each // micro
        if each % micro or int(forced.get("grad_accum", accum)) != accum:
            continue
        if spread.vpp == 1 or accum % spread.pp == 0:  # interleaved stages take micro-batches in rounds
            yield micro, accum


def _on_cpu(w: Wanted, forced: Forced) -> list[Priced]:
    """One process: no recomputation, then some, then all; each with the largest micro-batch that fits."""
    known = Known(replace(w, nodes=1, per_node=1), forced)
    for recompute in known.recomputes:
        for micro, accum in _sizes(known.w, forced, ALONE):
            for setup, memory in _fitting(known, ALONE, micro, accum, recompute, known.precisions[0]):
                return [Priced(setup, memory, step_time(setup), room(setup))]
    return []


# --- where nothing fits -----------------------------------------------------------------------------------


def _unfit(w: Wanted, forced: Forced) -> Exception:
    leanest: Memory | None = None
    devices = 1
    for setup in _lean(w, forced):
        memory = held(setup, w.beside)
        if leanest is None or memory.total < leanest.total:
            leanest, devices = memory, setup.layout.devices
    if leanest is None:
        asked = ", ".join(f"{k} {v}" for k, v in sorted(forced.items())) or "the defaults"
        return ValueError(
            f"{asked}: no layout of {w.nodes} x {w.per_node} devices divides {w.anatomy.name}, sequences of {w.seq_len} "
            f"tokens and a batch of {w.global_batch} that way"
        )
    allowed = room(setup_of(w, Layout(devices=devices)))
    return DoesNotFit(leanest.biggest, nearest(w, forced, leanest, _feasible), leanest, allowed)


def _feasible(w: Wanted, forced: Forced) -> bool:
    try:
        check(w, forced)
    except ValueError:
        return False
    return any(held(setup, w.beside).total <= room(setup) for setup in _lean(w, forced))


def _lean(w: Wanted, forced: Forced) -> Iterator[Setup]:
    """Each spread with its smallest micro-batch and the most recomputation, the most devices first."""
    recompute = str(forced.get("recompute", w.recomputes[-1]))
    alone = w.device.kind == "cpu"
    for devices in [1] if alone else reversed(counts(w, forced)):
        for spread in [ALONE] if alone else spreads(w, forced, devices):
            for precision in precisions(w):
                for micro, accum in list(_sizes(w, forced, spread))[-1:]:
                    yield setup_of(
                        w,
                        layout_of(w, spread, spread.shards[-1], micro, accum, recompute, precision),
                        spread.vpp,
                    )
