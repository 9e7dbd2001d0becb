"""What a search knows of layouts before it has priced one: seconds and bytes that they do not fall below.

In: a Wanted, forced fields. Out: numbers, each made once for a search. Bears no identity.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

from famc.cost.layout import Layout
from famc.cost.memory import Memory
from famc.cost.priced import held, room, setup_of
from famc.cost.setup import Setup
from famc.cost.spreads import Spread, Wanted, experts, is_whole, layers, precisions
from famc.cost.stages import weights
from famc.cost.step_memory import MOMENTS
from famc.cost.step_time import EACH_MICRO, step_time
from famc.cost.sums import parameters

MICRO_TOKENS = {"gpu": 65536, "cpu": 8192}
"""Tokens of a micro-batch on one device from which on more only take memory. Assumed."""


class Known:
    """What one search has learnt and needs again for other numbers of devices."""

    def __init__(self, w: Wanted, forced: Mapping[str, int | str]) -> None:
        self.w, self.forced = w, forced
        self.alone = replace(w, nodes=1, global_batch=1, beside=0)
        self.most = max(1, MICRO_TOKENS[w.device.kind] // (w.seq_len * w.rows))
        self.weights, self.layers, self.whole = parameters(w.anatomy), layers(w.anatomy), is_whole(w)
        self.experts = max(1, experts(w.anatomy)) if w.runtime == "any" else 1
        self.precisions = precisions(w)
        self.recomputes = (str(forced["recompute"]),) if "recompute" in forced else w.recomputes
        self._bare: dict[tuple[str, str, int, int, int, int], float] = {}
        self._held: dict[tuple[object, ...], Memory] = {}
        self._space: dict[bool, float] = {}
        self._state: dict[tuple[int, int, int, int], float] = {}
        self._activations: dict[tuple[str, str], float] = {}

    def floor(self) -> float:
        """Device-seconds of a step that no layout falls below."""
        least = min(self.bare(p, r, 1, 1, 0, self.most) for p in self.precisions for r in self.recomputes)
        return least * self.w.global_batch

    def bare(self, precision: str, recompute: str, tp: int, cp: int, ep: int, micro: int) -> float:
        """Device-seconds for one sequence in such micro-batches: work, starting it, traffic of tensor, context and expert ranks.
        Without an `ep`: at the best one, where a device reads the fewest experts, and no traffic between them."""
        key = (precision, recompute, tp, cp, ep, micro)
        if key not in self._bare:
            kinds = EACH_MICRO if ep else ("tensor", "context")
            self._bare[key] = _bare(
                self.alone, precision, recompute, tp, cp, ep or self.experts, micro, kinds
            )
        return self._bare[key]

    def space(self, devices: int) -> float:
        """Bytes that a device may fill, one of several or alone."""
        alone = devices == 1
        if alone not in self._space:
            self._space[alone] = room(setup_of(self.w, Layout(devices=devices)))
        return self._space[alone]

    def state(self, s: Spread, shard: int) -> float:
        """Bytes a device of weights, gradients and moments, at least: some stacks keep more."""
        w, ranks = self.w, shard * s.cp
        key = (s.tp, s.pp, s.ep, ranks)
        if key in self._state:
            return self._state[key]
        part = weights(w.anatomy, s.tp, s.ep)
        whole = (part.dense + part.experts) / s.pp
        total = self.weights / (s.tp * s.pp)
        moments = MOMENTS[w.optimizer] * (1.0 if w.master else 0.5) + (4.0 if w.master else 0.0)
        if w.trained is not None:
            trained = w.trained / (s.tp * s.pp)
            frozen = (whole if self.whole else total / ranks) * min(1.0, w.frozen_bytes)
            found = trained * moments / ranks + frozen
        elif self.whole:
            found = 3.0 * whole + total * moments / (ranks if w.sharding != "none" else 1)
        else:
            gathered = 0.0
            if ranks > 1:  # stages of a pipeline stay whole, else two blocks
                gathered = whole * (2.0 + w.gradient_bytes) if s.pp > 1 else 4.0 * part.block
            found = total * (moments + 2.0) / ranks + gathered
        self._state[key] = found
        return found

    def activations(self, precision: str, recompute: str) -> float:
        """Bytes of one sequence that wait for the backward pass, undivided."""
        key = (precision, recompute)
        if key not in self._activations:
            layout = Layout(recompute=recompute, precision=precision)
            self._activations[key] = held(setup_of(self.w, layout)).activations
        return self._activations[key]

    def waiting(self, s: Spread, micro: int, accum: int, precision: str, recompute: str) -> float:
        """Bytes a device of activations, at least: of a pipeline those of its first stage, which may have a block less than
        others."""
        total = self.layers
        flight = (total // s.pp) * min(s.pp, accum) / total if s.pp > 1 else 1.0
        return micro * self.activations(precision, recompute) / (s.tp * s.cp) * flight

    def held(self, setup: Setup) -> Memory:
        """Replicas change nothing, nor do more micro-batches than are in flight."""
        lay = setup.layout
        flight = min(lay.grad_accum, 2 * lay.pp) if lay.pp > 1 else 1
        key = (
            lay.dp_shard, lay.tp, lay.cp, lay.pp, setup.vpp, lay.ep, lay.micro_batch, flight, lay.recompute, lay.precision,
            lay.devices > 1,
        )  # fmt: skip
        if key not in self._held:
            self._held[key] = held(setup, self.w.beside)
        return self._held[key]


@lru_cache(maxsize=16384)
def _bare(
    w: Wanted, precision: str, recompute: str, tp: int, cp: int, ep: int, micro: int, kinds: tuple[str, ...]
) -> float:
    layout = Layout(
        devices=tp * cp, tp=tp, cp=cp, ep=ep, micro_batch=micro, recompute=recompute, precision=precision
    )
    t = step_time(setup_of(w, layout))
    moved = sum(v for k, v in t.communication if k in kinds)
    return (t.matmul + t.attention + t.vector + t.launch + moved) * tp * cp / micro
