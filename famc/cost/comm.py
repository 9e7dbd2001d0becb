"""Seconds of collective operations: latency + bytes / bandwidth, over the links that the group of ranks has.

In: sizes in bytes, a Link. Out: seconds. Ring formulas: Thakur, Rabenseifner, Gropp 2005 (doi:10.1177/1094342005051521).
Bears no identity.
"""

from __future__ import annotations

from dataclasses import dataclass

from famc.cost.device import Device

FAST_SHARE = 0.77
"""Of NVLink's one-way bandwidth that a ring moves: fitted with the next two to nccl-tests on 2, 4 and 8 A100
(benchmarks/data/nccl_allreduce.csv), rms 7 %."""
BASE, HOP = 22e-6, 5e-6
"""Seconds of a collective of no bytes, and of each rank on fast links. Same source."""
AXIS = 0.5
"""Share of a TPU's links that lie along one axis of its torus, of two (v5e, v6e; the others have three)."""
SLOW_SHARE = 0.8
"""Of the network's bandwidth. Assumed."""
NET_BASE, NET_HOP = 30e-6, 8e-6
"""As BASE and HOP for a group that spans nodes; a hop is one more node, rings inside of nodes run in parallel. Assumed."""


@dataclass(frozen=True, slots=True)
class Link:
    """What a group of `ranks` sees: bytes/s that a rank moves through a ring, seconds to begin; whether it leaves the
    fast links."""

    ranks: int
    rate: float
    latency: float
    spans: bool = False


def link(device: Device, ranks: int, inner: int, per_node: int) -> Link:
    """The link of `ranks` ranks that are `inner` devices apart (the product of the degrees laid out inside of them).

    A group over nodes uses the network card of each of its members in a node, up to the rate of the fast links. A single
    rank moves nothing: its rate is infinite. A device without stated links is taken for PCIe 4 x16.
    """
    if ranks <= 1:
        return Link(1, float("inf"), 0.0)
    fast = fast_rate(device)
    if ranks * inner <= per_node:
        if device.name.startswith("tpu") and ranks < per_node:
            fast *= AXIS
        return Link(ranks, fast, BASE + HOP * ranks)
    members = max(1, min(ranks, per_node // inner))
    nodes = -(-ranks // members)
    return Link(ranks, min(slow_rate(device) * members, fast), NET_BASE + NET_HOP * nodes, spans=True)


def fast_rate(device: Device) -> float:
    """Bytes/s that a rank moves inside of a node."""
    return (device.intranode or 31e9) * FAST_SHARE


def slow_rate(device: Device) -> float:
    """Bytes/s that a rank moves between nodes; a device without a stated network is taken for 100 Gb/s."""
    return (device.internode or 12.5e9) * SLOW_SHARE


def all_reduce(size: float, over: Link) -> float:
    """Every rank has `size` bytes and gets the sum: 2 (n - 1) / n of them pass each link."""
    return 0.0 if over.ranks <= 1 else over.latency + 2 * (over.ranks - 1) / over.ranks * size / over.rate


def all_gather(size: float, over: Link) -> float:
    """Every rank gets all `size` bytes, of which it has one n-th; a reduce-scatter is the same backwards."""
    return 0.0 if over.ranks <= 1 else over.latency + (over.ranks - 1) / over.ranks * size / over.rate


def all_to_all(size: float, device: Device, over: Link, local: int) -> float:
    """Every rank sends `size` bytes, evenly to all. `local` ranks share the fast links; what goes to other nodes passes a
    rank's own network card."""
    if over.ranks <= 1:
        return 0.0
    n = over.ranks
    if not over.spans:
        return over.latency + (n - 1) / n * size / over.rate
    away = (n - local) / n * size / slow_rate(device)
    return over.latency + max(away, (local - 1) / n * size / fast_rate(device))


def point_to_point(size: float, device: Device, inside: bool) -> float:
    """One rank to the next: a pipeline's boundary."""
    if inside:
        return BASE + size / fast_rate(device)
    return NET_BASE + size / slow_rate(device)


def distinct(draws: int, places: int) -> float:
    """Of so many places the number that `draws` even draws touch: a token goes to a node once for all its experts there
    (DeepSeek-V3, arXiv:2412.19437, section 3.2.2)."""
    return places * (1.0 - (1.0 - 1.0 / places) ** draws)
