"""Rows of a table whose layout is not published: it is searched for, and so is what the run does not say.

In: a row, its Case, its Device. Out: Found. DoesNotFit or ValueError where there is no layout. Bears no identity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from famc.cost.cases.rows import HALF_GRADIENTS, PER_NODE, SHARDINGS, Case
from famc.cost.cases.whole_run import assumed_batch, assumed_devices, stacks
from famc.cost.columns import Row
from famc.cost.device import Device
from famc.cost.search import Priced, Wanted, best
from famc.cost.setup import Sharding, Software
from famc.cost.spreads import RECOMPUTES


@dataclass(frozen=True, slots=True)
class Found:
    """`priced`: the fastest layout for each stack that may have run it, the likelier first. `assumed`: what the row does not say."""

    priced: tuple[Priced, ...]
    batch: int
    devices: int
    assumed: tuple[str, ...]

    @property
    def step_seconds(self) -> float:
        """The geometric mean over stacks."""
        return math.exp(sum(math.log(p.time.seconds) for p in self.priced) / len(self.priced))


def place(row: Row, case: Case, device: Device) -> Found:
    """The fastest layout that the row's columns leave open, on exactly its devices.

    ValueError, with the column, for a row without seq_len, or with neither gbs_seqs nor tokens; for columns that contradict each
    other. DoesNotFit where no layout fits.
    """
    if case.seq_len is None:
        raise ValueError("seq_len is missing")
    if case.tokens is not None and case.tokens <= 0:
        raise ValueError(f"tokens is {case.tokens:g}: it must be above 0")
    assumed: list[str] = []
    per_node = PER_NODE.get(case.backend, 8)
    forced: dict[str, int | str] = dict(case.fixed)
    devices, batch = case.devices, case.batch
    if devices is None and not case.tokens:
        raise ValueError("n_gpus is missing, and so are tokens to assume it from")
    if devices is None:
        devices = assumed_devices(case.anatomy, case.tokens or 0.0, device, per_node)
        assumed.append(f"n_gpus {devices}")
    if batch is None and {"dp", "micro_batch", "grad_accum"} <= forced.keys():
        batch = int(forced["dp"]) * int(forced["micro_batch"]) * int(forced["grad_accum"])
    if batch is None and not case.tokens:
        raise ValueError("gbs_seqs is missing, and so are tokens to assume it from")
    if batch is None:
        batch = assumed_batch(case.anatomy, case.tokens or 0.0, case.seq_len, devices)
        assumed.append(f"gbs_seqs {batch}")
    recompute = row.get("act_ckpt", "")
    if recompute:
        forced["recompute"] = next(
            (r for r in RECOMPUTES if recompute.startswith(r[:3])),
            "selective" if recompute.startswith("min") else "none",
        )
    forced["devices"] = devices
    options = stacks(case.software)
    if len(options) > 1:
        assumed.append("framework " + " or ".join(s.name.replace("unknown", "PyTorch") for s in options))
    found = [best(_wanted(row, case, device, s, per_node, devices, batch), forced) for s in options]
    return Found(tuple(found), batch, devices, tuple(assumed))


def _wanted(
    row: Row, case: Case, device: Device, software: Software, per_node: int, devices: int, batch: int
) -> Wanted:
    text = row.get("sharding", "").lower()
    sharding: Sharding | None = next(
        (value for part, value in SHARDINGS if part in text), "none" if text else None
    )
    pure = "PURE" in row.get("sharding", "")
    half = pure or case.precision == "fp16" or software.name in HALF_GRADIENTS
    return Wanted(
        anatomy=case.anatomy,
        device=device,
        seq_len=case.seq_len or 0,
        global_batch=batch,
        nodes=-(-devices // per_node),
        per_node=per_node,
        precision=case.precision,
        # PyTorch of which nothing more is known: what most of its users run
        runtime="accelerate" if software.name == "unknown" and not _exotic(case) else "any",
        software=software,
        sharding=sharding,
        trained=case.trained,
        adapters=case.trained is not None,
        adapted="attention",
        gradient_bytes=2 if half else 4,
        master=not pure,
    )


def _exotic(case: Case) -> bool:
    """Whether the row states a pipeline or expert parallelism."""
    return any(name in ("pp", "ep", "vpp") and value > 1 for name, value in case.fixed)
