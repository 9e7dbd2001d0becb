"""The hardware that a spec's backends stand for: an accelerator, how many, what an hour costs, what may run on it.

In: a Family and its folder; this machine's CPU, looked at once and only where a backend is local. Out: Hardware by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from famc.backend import Accelerator, load_accelerator, local_cpu
from famc.cost.money import WORLD, Grid, grid
from famc.spec.family import BackendUse, Family

LOCAL = "local"


@dataclass(frozen=True)
class Hardware:
    """A backend as the spec uses it: the accelerator, how many, what it costs, and the training software's abilities."""

    name: str
    accelerator: Accelerator
    nodes: int
    per_node: int
    scheduler: str
    usd_per_device_hour: float
    price_basis: str
    runtime: Literal["accelerate", "any"] = "accelerate"
    grid: Grid = WORLD
    notes: tuple[str, ...] = ()  # about this machine: why a calibration of it was not used

    @property
    def local(self) -> bool:
        """Whether famc itself starts the jobs, here."""
        return self.scheduler == "local"


def hardware(family: Family, folder: Path, local: Accelerator | None = None) -> dict[str, Hardware]:
    """Every backend of the spec, or `local` where it names none. `local` is this machine (default: looked at)."""
    machine: list[tuple[Accelerator, tuple[str, ...]]] = [] if local is None else [(local, ())]

    def here() -> tuple[Accelerator, tuple[str, ...]]:
        if not machine:
            machine.append(local_cpu(folder))
        return machine[0]

    result = {name: _use(name, use, folder, here) for name, use in family.backends.items()}
    return result or {LOCAL: _use(LOCAL, BackendUse(), folder, here)}


def _use(
    name: str, use: BackendUse, folder: Path, here: Callable[[], tuple[Accelerator, tuple[str, ...]]]
) -> Hardware:
    chip = use.gpu or use.use
    accelerator, notes = (load_accelerator(chip, folder), ()) if chip else here()
    if accelerator.kind == "cpu":
        changes: dict[str, Any] = {}
        if use.cpu:
            accelerator = accelerator.with_cores(use.cpu)
        if use.ram:
            changes["memory_gb"] = use.ram / 1e9
        if changes:
            accelerator = accelerator.model_copy(update=changes)
            accelerator.__dict__.pop("device", None)  # the copy's own, not what the original has cached
    devices = use.per_node if accelerator.kind == "gpu" else 1
    price, basis = _price(use, accelerator, devices)
    return Hardware(
        name, accelerator, use.nodes, devices, use.scheduler, price, basis, use.runtime, grid(use.grid), notes
    )


def _price(use: BackendUse, accelerator: Accelerator, devices: int) -> tuple[float, str]:
    """USD of a device and hour, and where the figure is from."""
    if use.usd_per_gpu_hour is not None:
        return use.usd_per_gpu_hour, "spec"
    if use.usd_per_hour is not None:
        return use.usd_per_hour / devices, "spec"
    if accelerator.usd_per_hour is not None:
        known = accelerator.usd_per_hour
        return known.on_demand, f"{known.source}, {known.date}"
    return 0.0, "none known"
