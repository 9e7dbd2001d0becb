"""One training setup without a spec, priced: what `famc estimate` prints. And a table of them.

In: a model (a preset, a published one, a config.json), a backend, what of the layout is fixed; or a CSV file with the columns of
benchmarks/data/calibration.csv. Out: the step object of `famc plan --json`, or one small object a row. Reads those files and
backends; bears no identity.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from famc.backend import Accelerator, UnknownAccelerator, load_accelerator, local_cpu
from famc.cost import money, sums
from famc.cost.anatomy import Anatomy
from famc.cost.cases.rows import Case, case
from famc.cost.cases.unplaced import place
from famc.cost.cases.whole_run import Runs, assumed_batch, runs
from famc.cost.columns import Row
from famc.cost.cpu_assumed import rates
from famc.cost.cpu_time import Step, step_seconds
from famc.cost.device import Device
from famc.cost.hf.config import anatomy as of_config
from famc.cost.layout import DoesNotFit
from famc.cost.memory import Memory
from famc.cost.models import known, published
from famc.cost.of_shape import anatomy
from famc.cost.priced import room
from famc.cost.search import Priced, Wanted, best
from famc.cost.shape import PRESETS
from famc.cost.spreads import RECOMPUTES
from famc.cost.step_memory import fits, step_memory
from famc.cost.step_time import step_time
from famc.errors import FitError, UsageError, did_you_mean

SEQ_LEN, MICRO = 4096, 1
"""Where nothing is said: tokens a sequence, and sequences a device and step."""
TRAINED = ("none", "full")
"""Recomputation that famc's own trainer knows."""
CPU_BAND = {"measured": (0.8, 1.25), "assumed": (0.4, 2.5)}
"""Factors between which 90 % are expected on a CPU, by what is known of it. Measured: famc's own jobs of over 5 s; the other is
assumed."""


def estimate(
    *,
    model: str | None = None,
    config: Path | str | None = None,
    backend: str | None = None,
    devices: int | None = None,
    seq_len: int | None = None,
    global_batch: int | None = None,
    micro_batch: int | None = None,
    tp: int | None = None,
    pp: int | None = None,
    cp: int | None = None,
    ep: int | None = None,
    dp_shard: int | None = None,
    recompute: str | None = None,
    precision: str | None = None,
    tokens: float | None = None,
) -> dict[str, Any]:
    """The step object of `famc plan --json` for pretraining `model` on `backend`; what is None is searched for.

    Without `devices`: one node. Without `seq_len`: 4,096 tokens, or the model's own length if that is shorter. Without
    `global_batch`: as `whole_run.assumed_batch` has it for so many tokens, else one sequence a device. Without `tokens`: one
    step. A pipeline or expert parallelism is planned only where `pp` or `ep` asks for it. Besides the contract's keys: `optimizer_steps`, `step_seconds`, `tokens_per_second_per_device`,
    `interval` (90 % band of the seconds) and, with tokens, `whole_run`: device-hours as published runs took, with their band.

    UsageError for unknown names, numbers below 1 and layouts that cannot be; FitError where nothing fits.
    """
    asked: dict[str, int | str | None] = {
        "devices": devices, "micro_batch": micro_batch, "tp": tp, "pp": pp, "cp": cp, "ep": ep, "dp_shard": dp_shard,
        "recompute": recompute,
    }  # fmt: skip
    numbers = asked | {"seq_len": seq_len, "global_batch": global_batch, "tokens": tokens}
    for name, value in numbers.items():
        if value is not None and name != "recompute" and not 1 <= float(value) < math.inf:
            raise UsageError(f"{name} is {value}: it must be at least 1")
    what, length = _model(model, config)
    where = _backend(backend)
    if where.kind == "cpu" and (devices or 1) > 1:
        raise UsageError(f"devices is {devices}: {where.name} is one host", "leave devices out")
    length = seq_len or min(SEQ_LEN, length or SEQ_LEN)
    count = devices or (where.per_node if where.kind == "gpu" else 1)
    per_node = min(where.per_node, count)
    usual = count * (micro_batch or MICRO)
    if tokens is not None:
        usual = assumed_batch(what, tokens, length, usual)
    piped = (pp or 1) > 1 or (ep or 1) > 1
    wanted = Wanted(
        anatomy=what,
        device=where.device,
        seq_len=length,
        global_batch=global_batch or usual,
        nodes=-(-count // per_node),
        per_node=per_node,
        precision=precision or where.training_precision()[0],
        runtime="any" if piped else "accelerate",
        recomputes=RECOMPUTES if piped else TRAINED,
    )
    forced = {name: value for name, value in asked.items() if value is not None}
    try:
        found = best(wanted, forced)
    except DoesNotFit as error:
        raise FitError(f"{what.name} does not fit {where.name}: {error}") from None
    except ValueError as error:
        raise UsageError(str(error)) from None
    return _object(what, where, found, wanted, tokens)


def batch(path: Path | str) -> Iterator[dict[str, Any]]:
    """One object a row of a CSV file with the columns of benchmarks/data/calibration.csv, as each is priced.

    `{"id", "fits", "step_seconds", "tokens_per_second_per_device", "memory", "device_hours", "params", "interval"}`, with
    `interval_of` (device_hours for a row with tokens, else step_seconds), `layout` and `assumed`: what the row does not say.
    Device-hours are those of a whole run. What a row's columns don't allow to say is None; a row that can't be read is
    `{"id", "error"}`. Empty layout columns are searched for. OSError where the file cannot be read.
    """
    with Path(path).open(encoding="utf-8-sig", newline="") as lines:
        for number, row in enumerate(csv.DictReader(x for x in lines if not x.startswith("#")), 1):
            name = row.get("id") or f"row {number}"
            try:
                yield {"id": name} | _row({k: v or "" for k, v in row.items() if isinstance(k, str)})
            except (ValueError, UnknownAccelerator) as error:
                yield {"id": name, "error": str(error)}
            except OverflowError:
                yield {"id": name, "error": "a number is too large to reckon with"}


# --- one setup --------------------------------------------------------------------------------------------


def _object(
    what: Anatomy, where: Accelerator, found: Priced, w: Wanted, tokens: float | None
) -> dict[str, Any]:
    lay, t = found.layout, found.time
    each = w.global_batch * w.seq_len
    steps = 1 if tokens is None else max(1, -(-int(tokens) // each))
    step, interval, basis = t.seconds, t.interval, "modelled"
    if where.kind == "cpu":
        step, basis = _on_cpu(found)
        low, high = CPU_BAND[basis]
        interval = (step * low, step * high)
    seconds = steps * step
    hours = seconds * lay.devices / 3600
    price = where.usd_per_hour
    energy = money.energy_kwh(seconds, lay.devices, where.device)
    made: dict[str, Any] = {
        "name": what.name, "kind": "pretrain", "key": None, "size": None, "variant": None, "needs": [], "status": "new",
        "because": [], "backend": where.name, "layout": _layout(found), "memory": _memory(found.memory, found.limit),
        "params": _params(what), "tokens": steps * each, "flops": steps * t.model_flops, "mfu": t.mfu * t.seconds / step, "seconds": seconds,
        "device_hours": hours, "cost_usd": hours * price.on_demand if price else None, "energy_kwh": energy,
        "co2e_kg": money.co2e_kg(energy), "basis": basis, "optimizer_steps": steps, "step_seconds": step, "tokens_per_second_per_device": each / step / lay.devices,
        "interval": [steps * x for x in interval],
        "price": f"{price.on_demand:g} USD an hour, {price.source}, {price.date}" if price else "none known",
    }  # fmt: skip
    if tokens is not None and where.kind == "gpu":
        r = runs()
        made["whole_run"] = {"device_hours": hours * r.factor, "interval": [hours * r.low, hours * r.high]}
    return made


def _on_cpu(found: Priced) -> tuple[float, str]:
    """Seconds of a step on all cores, and the basis of it."""
    setup, lay = found.setup, found.layout
    measured, basis = rates(setup.device)
    work = Step(
        setup.anatomy,
        lay.micro_batch,
        setup.seq_len,
        lay.grad_accum,
        lay.precision,
        recompute=lay.recompute != "none",
    )
    return step_seconds(work, measured, threads=setup.device.cores).seconds, basis


def _model(model: str | None, config: Path | str | None) -> tuple[Anatomy, int | None]:
    """The model, and its own length where it is known."""
    if (model is None) == (config is None):
        raise UsageError("name a model or give a config.json", "--model qwen3-8b, or --config FILE")
    if model is not None:
        if model in PRESETS:
            return replace(anatomy(PRESETS[model]), name=model), PRESETS[model].context
        if model in published():
            return known(model), None
        raise UsageError(f"no model '{model}'", did_you_mean(model, [*PRESETS, *published()]))
    try:
        read = json.loads(Path(str(config)).read_text(encoding="utf-8"))
        if not isinstance(read, Mapping):
            raise ValueError("it is no mapping")
        length = read.get("max_position_embeddings")
        return of_config(read), length if isinstance(length, int) else None
    except (OSError, ValueError) as error:
        raise UsageError(f"{config}: {error}") from None


def _backend(name: str | None) -> Accelerator:
    if name is None:
        raise UsageError("name a backend", "--backend h100-80g, or local: this CPU")
    if name == "local":
        return local_cpu()[0]
    try:
        return load_accelerator(name)
    except UnknownAccelerator as error:
        raise UsageError(str(error)) from None


# --- a row ------------------------------------------------------------------------------------------------


def _row(row: Row) -> dict[str, Any]:
    made = case(row, _device)
    blank: dict[str, Any] = dict.fromkeys(
        (
            "fits",
            "step_seconds",
            "tokens_per_second_per_device",
            "memory",
            "device_hours",
            "params",
            "interval",
        )
    )
    blank["params"] = _params(made.anatomy)
    if not made.backend:
        return blank
    r = runs()
    if made.setup is not None:
        setup, found = made.setup, None
        t = step_time(setup)
        seconds, (low, high) = t.seconds, t.interval
        ok = fits(setup)
    else:
        try:
            found = place(row, made, _device(made.backend))
        except DoesNotFit as error:
            memory = _memory(error.memory, error.limit)
            return blank | {"fits": False, "memory": memory, "because": str(error)}
        setup, seconds, ok = found.priced[0].setup, found.step_seconds, True
        low, high = (seconds * x for x in r.searched)
    if not math.isfinite(seconds):
        raise OverflowError
    lay = setup.layout
    each = lay.global_batch * setup.seq_len
    told = blank | {
        "fits": ok,
        "step_seconds": seconds,
        "tokens_per_second_per_device": each / seconds / lay.devices,
        "memory": _memory(step_memory(setup), room(setup)),
        "interval": [low, high],
        "interval_of": "step_seconds",
        "layout": _layout(found.priced[0] if found else Priced(setup, Memory(), t, room(setup))),
        "assumed": list(found.assumed) if found else [],
    }
    return told | _whole(made, seconds * lay.devices / each, r)


def _whole(made: Case, a_token: float, r: Runs) -> dict[str, Any]:
    """A whole run, of device-seconds a token."""
    if made.tokens is None:
        return {}
    if made.tokens <= 0:
        raise ValueError(f"tokens is {made.tokens:g}: it must be above 0")
    hours = a_token * made.tokens / 3600
    return {
        "device_hours": hours * r.factor,
        "interval": [hours * r.low, hours * r.high],
        "interval_of": "device_hours",
    }


@lru_cache(maxsize=256)
def _device(name: str) -> Device:
    return load_accelerator(name).device


# --- shared -----------------------------------------------------------------------------------------------


def _params(a: Anatomy) -> dict[str, int]:
    return {"total": sums.parameters(a), "active": sums.active(a)}


def _memory(held: Memory, allowed: float) -> dict[str, float]:
    parts = {f.name: float(getattr(held, f.name)) for f in fields(held)}
    return parts | {"total": held.total, "limit": allowed}


def _layout(found: Priced) -> dict[str, Any]:
    lay = found.layout
    return {
        "nodes": lay.nodes, "devices": lay.devices, "dp_replicate": lay.dp_replicate, "dp_shard": lay.dp_shard, "tp": lay.tp,
        "cp": lay.cp, "pp": lay.pp, "vpp": found.setup.vpp, "ep": lay.ep, "micro_batch": lay.micro_batch,
        "grad_accum": lay.grad_accum, "recompute": lay.recompute, "precision": lay.precision, "why": list(lay.why),
    }  # fmt: skip
