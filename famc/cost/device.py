"""A backend as the arithmetic sees it: plain numbers, cheap to hash. Made by `backend.Accelerator.device`."""

from __future__ import annotations

from dataclasses import dataclass

from famc.cost.cpu_rates import CpuRates

GB = 1e9
GIB = float(2**30)


class Impossible(ValueError):
    """What no layout or no device of this kind can do: the numbers that the user gave contradict each other."""


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator (or all the cores of one CPU host), in SI units: FLOP/s, bytes, bytes/s, watts."""

    name: str
    kind: str  # gpu | cpu
    peaks: tuple[tuple[str, float], ...]  # precision -> dense FLOP/s of the device; of one core for a CPU
    efficiencies: tuple[
        tuple[str, float], ...
    ]  # precision -> share of the peak that large training matmuls reach
    memory: float
    bandwidth: float
    intranode: float  # bytes/s one device can send to its node
    internode: float  # bytes/s one device can send to other nodes
    power: float  # TDP
    node_power_factor: float = 1.0
    cores: int = 1
    matmuls: tuple[tuple[str, float], ...] = ()  # precision -> best FLOP/s measured on any large product
    capacity: float | None = None  # bytes that the driver reports, where that is not `memory`
    share: float | None = None  # of the memory that a model may fill, where the kind's own does not hold
    rates: CpuRates | None = None  # of a CPU that `famc calibrate` measured

    def peak(self, precision: str) -> float:
        """Dense FLOP/s at `precision`. CPU cores add up with exponent 0.9 (at 2: 0.8 to 1.03 measured)."""
        value = dict(self.peaks).get(precision)
        if value is None:
            known = ", ".join(p for p, _ in self.peaks)
            raise Impossible(f"{self.name} has no {precision}: choose one of {known}")
        return value * self.cores**0.9 if self.kind == "cpu" else value

    def efficiency(self, precision: str) -> float:
        """The stated share at `precision`, or else the first one stated."""
        return dict(self.efficiencies).get(precision, self.efficiencies[0][1])

    def matmul(self, precision: str) -> float:
        """The best FLOP/s that a large matrix product was measured to reach, else the data sheet's peak."""
        return dict(self.matmuls).get(precision) or self.peak(precision)

    @property
    def usable(self) -> float:
        """Bytes a plan may fill: 92 % of a GPU (fragmentation), 80 % of a host (other programs), or the device's own share.
        Assumed."""
        return self.memory * (self.share or (0.8 if self.kind == "cpu" else 0.92))
