"""One layout of a wanted step, with its memory and its time.

In: a Wanted, a Spread. Out: Setup, Priced. Bears no identity.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from famc.cost.layout import Layout
from famc.cost.memory import Memory
from famc.cost.setup import Setup
from famc.cost.spreads import MEGATRON, Spread, Wanted
from famc.cost.step_memory import MARGIN, limit, step_memory
from famc.cost.step_time import StepTime, step_time


@dataclass(frozen=True, slots=True)
class Priced:
    """A setup with its memory on the fullest device, of which it may fill `limit` bytes, and the time of its step."""

    setup: Setup
    memory: Memory
    time: StepTime
    limit: float

    @property
    def layout(self) -> Layout:
        return self.setup.layout

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.limit

    @property
    def device_seconds(self) -> float:
        """Of one step, over all devices: what it costs, but for the price."""
        return self.time.seconds * self.setup.layout.devices


def priced(setup: Setup, beside: int = 0) -> Priced:
    """A setup as it stands, whether it fits or not. ValueError where the layout does not divide the model."""
    return Priced(setup, held(setup, beside), step_time(setup), room(setup))


def room(setup: Setup) -> float:
    """Bytes that a step may fill, the model's margin left free."""
    return (1 - MARGIN) * limit(setup)


def held(setup: Setup, beside: int = 0) -> Memory:
    """Memory of the fullest device, with `beside` frozen 16-bit weights that are divided like the model's."""
    found = step_memory(setup, fullest=True)
    if not beside:
        return found
    lay = setup.layout
    ranks = lay.tp * lay.pp * (lay.dp_shard * lay.cp if setup.sharding == "full" else 1)
    return replace(found, weights=found.weights + 2.0 * beside / ranks)


def setup_of(w: Wanted, layout: Layout, vpp: int = 1) -> Setup:
    """The Setup of a layout. Groups of rows are sequences that attend within themselves."""
    document = min(w.document or w.seq_len, w.seq_len) if w.rows > 1 else w.document
    sharding = w.sharding or ("optimizer" if w.software.name in MEGATRON else "full")
    return Setup(
        w.anatomy, w.device, layout, w.seq_len * w.rows, w.per_node, sharding, vpp, True, w.trained, w.adapters,
        w.frozen_bytes, w.optimizer, w.gradient_bytes, w.master, w.fused_loss, w.software, w.adapted, w.shapes, document,
    )  # fmt: skip


def layout_of(
    w: Wanted, s: Spread, shard: int, micro: int, accum: int, recompute: str, precision: str
) -> Layout:
    """The Layout of a spread, its state divided over `shard` of its data ranks."""
    return Layout(
        -(-s.devices // w.per_node), s.devices, s.data // shard, shard, s.tp, s.cp, s.pp, s.ep, micro, accum, recompute,
        precision,
    )  # fmt: skip
