"""A row of the calibration table, or of a user's own cases: which model, on what, spread how, and what was measured.

In: a mapping of column names to text, and a function from a backend's name to its Device. Out: a Case. Columns are those
of benchmarks/data/calibration.csv; those that are empty or absent are unknown. Bears no identity.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from famc.cost.anatomy import Anatomy
from famc.cost.cases.facts import stated
from famc.cost.columns import Row, number, whole
from famc.cost.device import Device
from famc.cost.layout import Layout
from famc.cost.models import of_row
from famc.cost.setup import Setup, Sharding, Software
from famc.cost.software import CORE_YEAR, SEQUENCE_YEAR, guess

T = TypeVar("T")

BACKENDS = {
    "V100-SXM2-16GB": "v100-16g",
    "V100-SXM2-32GB": "v100-32g",
    "V100-SXM3-32GB": "v100-sxm3-32g",
    "A100-SXM-40GB": "a100-40g",
    "A100-SXM-80GB": "a100-80g",
    "H100-SXM-80GB": "h100-80g",
    "H100-SXM-96GB-HBM2e-500W": "h100-hbm2e-96g",
    "H200-SXM-141GB": "h200-141g",
    "B200-SXM": "b200",
    "B300-SXM": "b300",
    "GB200-NVL72": "gb200",
    "GB300-NVL72": "gb300",
}
"""hardware_key of the calibration table -> name in backends/. Others are taken, in lower case, for a backend's own name."""

PER_NODE = {
    "gb200": 72,
    "gb300": 72,
    "v100-sxm3-32g": 16,
    "tpu-v4": 4096,
    "tpu-v5e": 256,
    "tpu-v5p": 8960,
    "tpu-v6e": 256,
}
"""Devices that share the fast links, where not 8: an NVLink rack, a DGX-2, a TPU pod slice's torus."""

FRAMEWORKS: tuple[tuple[str, str], ...] = (
    ("deepspeed n", "deepspeed"),
    ("pytorch_deepspeed", "deepspeed"),
    ("megatron-deepspeed", "megatron-deepspeed"),
    ("megatron-bridge", "megatron-bridge"),
    ("megatron-lm", "megatron-lm"),
    ("mlperf", "mlperf"),
    ("nemo", "nemo"),
    ("llm-foundry", "llm-foundry"),
    ("composer", "llm-foundry"),
    ("torchtitan", "torchtitan"),
    ("fms-fsdp", "fms-fsdp"),
    ("litgpt", "litgpt"),
    ("lit-gpt fork", "tinyllama"),
    ("lit-gpt", "litgpt"),
    ("nanotron", "nanotron"),
    ("maxtext", "maxtext"),
    ("t5x", "maxtext"),
    ("levanter", "maxtext"),
    ("jax", "maxtext"),
    ("primus", "rocm"),
    ("rocm", "rocm"),
    ("habana", "habana"),
    ("gaudi", "habana"),
    ("transformer engine", "nemo"),
    ("llm.c", "llm.c"),
    ("accelerate", "accelerate"),
    ("axolotl", "accelerate"),
    ("transformers", "accelerate"),
    ("trl", "accelerate"),
    ("pytorch fsdp", "accelerate"),
    ("deepspeed", "deepspeed"),
)
"""What the column `framework` contains, lower case -> the name in Software; first match."""

PRECISIONS: tuple[tuple[str, str], ...] = (
    ("nvfp4", "nvfp4"),
    ("mxfp8", "mxfp8"),
    ("fp8-mx", "mxfp8"),
    ("fp8-rowwise", "fp8-rowwise"),
    ("fp8", "fp8"),
    ("fp16", "fp16"),
    ("bf16", "bf16"),
    ("fp32", "fp32"),
)
"""What the column `precision` contains -> Layout.precision; `fp8-cs (fp8-mx)` is measured under the first."""

SHARDINGS: tuple[tuple[str, Sharding], ...] = (
    ("shard_grad_op", "gradients"),
    ("full_shard", "full"),
    ("fsdp", "full"),
    ("hsdp", "full"),
    ("zero-3", "full"),
    ("zero-2", "gradients"),
    ("zero-1", "optimizer"),
    ("dist-optimizer", "optimizer"),
    ("distributed optimizer", "optimizer"),
)
"""What the column `sharding` contains, lower case -> Setup.sharding; else none."""

HALF_GRADIENTS = ("nemo", "megatron-bridge", "mlperf")
"""Software whose performance recipes sum gradients in 16 bits (NeMo's grad_sync_dtype, Megatron's grad_reduce_in_fp32)."""
WHOLE_SEQUENCE = ("megatron-lm", "megatron-deepspeed")
"""Software whose tensor-parallel ranks all normalise the whole sequence: Megatron before 2022.3, its fork for DeepSpeed."""
LORA_RANK = 16
"""Of adapters on attention's projections, where the row's note does not count them (MLPerf's Llama-2 70B LoRA)."""
SQUAD = 250
"""Tokens of one example of SQuAD with its prompt, packed into NeMo's sequences. Assumed."""


@dataclass(frozen=True, slots=True)
class Case:
    """`setup` is None where the layout is not published or the devices are not counted: it is to be searched for.

    `batch`: sequences a step; `tokens`: of a whole run; `measured` in `unit`, None where the row has none.
    `fixed`: layout fields that the row does state.
    """

    id: str
    kind: str
    quality: str
    src: str
    unit: str
    measured: float | None
    anatomy: Anatomy
    backend: str
    devices: int | None
    seq_len: int | None
    batch: int | None
    tokens: float | None
    precision: str
    software: Software
    trained: int | None
    fixed: tuple[tuple[str, int], ...]
    setup: Setup | None

    @property
    def step_seconds(self) -> float | None:
        """The measured time of an optimizer step, or None where the row measures something else."""
        if self.measured is None:
            return None
        if self.unit == "step_time_s":
            return self.measured
        if self.unit == "tokens_s_gpu" and self.batch and self.seq_len and self.devices:
            return self.batch * self.seq_len / (self.devices * self.measured)
        return None


def case(row: Row, device: Callable[[str], Device]) -> Case:
    """The case of one row. `device` gives a backend by its name, and says which it has where it has not this one.

    ValueError, with the column, for a number that is none or not positive and for columns that contradict each other.
    """
    anatomy = of_row(row)
    key = row.get("hardware_key") or row.get("hardware") or ""
    on = device(BACKENDS.get(key, key.lower())) if key else None
    backend = on.name if on else ""
    per_node = PER_NODE.get(backend, 8)
    software = Software(
        _first(FRAMEWORKS, row.get("framework", ""), "unknown"),
        _year(row.get("date", "")),
        compiled=row.get("compile", "") == "yes",
        overlap="overlap off" not in row.get("sharding", ""),
    )
    if "async" in row.get("note", "").lower() and software.name == "torchtitan":
        software = replace(software, name="torchtitan, async tp")
    if backend == "mi300x" and software.name == "mlperf":
        software = Software("rocm", software.year)
    precision = _first(PRECISIONS, row.get("precision", ""), "bf16")
    mode = row.get("train_mode", "")
    trained = _trained(row, anatomy) if "lora" in mode or "adapter" in mode else None
    devices, seq_len, batch = whole(row, "n_gpus"), whole(row, "seq_len"), whole(row, "gbs_seqs")
    degrees = {
        name: whole(row, name) for name in ("tp", "pp", "cp", "ep", "vpp", "dp", "micro_batch", "grad_accum")
    }
    if "FSDP in slice" in row.get("sharding", ""):
        degrees |= _slices(row, degrees, devices or 0, batch or 0)
    fixed = tuple((k, v) for k, v in degrees.items() if v)
    layout = _layout(degrees, devices, batch, row, software.name, precision, per_node)
    setup = None
    if layout is not None and seq_len and on is not None:
        sharding = _sharding(row, layout, software)
        if software.name == "unknown":
            software = replace(software, name=guess(layout, sharding))
        setup = Setup(
            anatomy,
            on,
            layout,
            seq_len,
            per_node=per_node,
            sharding=sharding,
            vpp=_vpp(degrees, row, layout, anatomy, software.name),
            sequence_parallel=software.name not in WHOLE_SEQUENCE
            or (software.name == "megatron-lm" and software.year >= SEQUENCE_YEAR),
            trained=trained,
            adapters=trained is not None,
            frozen_bytes=_frozen_bytes(row),
            gradient_bytes=2
            if "PURE" in row.get("sharding", "") or precision == "fp16" or software.name in HALF_GRADIENTS
            else 4,
            master="PURE" not in row.get("sharding", "") and "true" not in row.get("precision", ""),
            software=software,
            document=SQUAD if "SQuAD packed" in row.get("note", "") else None,
        )
    if setup is not None:
        setup = stated(row, setup)
    return Case(
        id=row.get("id", ""),
        kind=row.get("kind", "throughput"),
        quality=row.get("quality", ""),
        src=row.get("src", ""),
        unit=row.get("unit", ""),
        measured=number(row, "measured"),
        anatomy=anatomy,
        backend=backend,
        devices=devices,
        seq_len=seq_len,
        batch=batch,
        tokens=number(row, "tokens"),
        precision=precision,
        software=software,
        trained=trained,
        fixed=fixed,
        setup=setup,
    )


# --- the layout -------------------------------------------------------------------------------------------


def _layout(
    degrees: Mapping[str, int | None],
    devices: int | None,
    batch: int | None,
    row: Row,
    software: str,
    precision: str,
    per_node: int,
) -> Layout | None:
    """The published layout, or None where a degree is missing. What follows from the others is filled in."""
    tp, pp = degrees["tp"], degrees["pp"]
    if not devices or not batch or not tp or not pp:
        return None
    cp, ep = degrees["cp"] or 1, degrees["ep"] or 1
    model = tp * pp * cp
    data = degrees["dp"] or devices // model
    if data * model != devices:
        raise ValueError(f"dp {data} x tp {tp} x pp {pp} x cp {cp} is not n_gpus {devices}")
    each = batch // data
    if each < 1:
        raise ValueError(f"gbs_seqs {batch} cannot feed {data} data ranks")
    micro = degrees["micro_batch"] or (1 if pp > 1 else min(4, each))
    shard = data
    if "HSDP" in row.get("sharding", "") and data > per_node:
        shard = per_node
    if replicas := degrees.get("dp_replicate"):
        shard = data // replicas
    accum = max(1, each // micro)
    recompute = row.get("act_ckpt", "")
    return Layout(
        nodes=-(-devices // per_node),
        devices=devices,
        dp_replicate=data // shard,
        dp_shard=shard,
        tp=tp,
        cp=cp,
        pp=pp,
        ep=ep,
        micro_batch=micro,
        grad_accum=accum,
        recompute="full"
        if recompute == "full"
        else "selective"
        if recompute.startswith(("sel", "min"))
        else "none",
        precision=precision,
    )


def _sharding(row: Row, layout: Layout, software: Software) -> Sharding:
    """What the column says; empty: Megatron's way with a pipeline (ZeRO-1 since its core), else fully sharded."""
    text = row.get("sharding", "").lower()
    if text or layout.data == 1:
        return _first(SHARDINGS, text, "none")
    if layout.pp > 1 or software.name.startswith("megatron"):
        return "optimizer" if software.year >= CORE_YEAR else "none"
    return "full"


def _slices(row: Row, degrees: Mapping[str, int | None], devices: int, batch: int) -> dict[str, int | None]:
    """MaxText's rows say the layout in words: FSDP inside a slice of 256 chips (the 128B model: FSDP16 x TP16), data
    parallel over slices, which the column dp counts. The batch is per chip."""
    slices = degrees["dp"] or 1
    inside = devices // slices
    tp = 16 if "128B" in row.get("model", "") else 1
    data = slices * inside // tp
    return {
        "tp": tp,
        "pp": 1,
        "dp": data,
        "dp_replicate": slices,
        "micro_batch": batch // data,
        "grad_accum": 1,
    }


def _vpp(degrees: Mapping[str, int | None], row: Row, layout: Layout, anatomy: Anatomy, software: str) -> int:
    """Chunks a pipeline rank holds. Unpublished though interleaved: chunks of two layers (NVIDIA's submissions of
    MLPerf), two chunks (Narayanan et al. 2021)."""
    if degrees["vpp"] or layout.pp == 1:
        return degrees["vpp"] or 1
    layers = sum(s.layers for s in anatomy.stacks)
    if software == "mlperf":
        return max(1, layers // layout.pp // 2)
    if "interleav" in row.get("note", "").lower() and layers >= 2 * layout.pp:
        each = layers // layout.pp
        return next((v for v in range(2, each + 1) if layers % (layout.pp * v) == 0), 2)
    return 1


# --- columns ----------------------------------------------------------------------------------------------


def _trained(row: Row, anatomy: Anatomy) -> int:
    """Weights of the adapters: what the note counts, else low-rank ones on attention's projections."""
    if found := re.search(r"trainable params ([\d,]+)", row.get("note", "")):
        return int(found[1].replace(",", ""))
    own = ("q", "k", "v", "o")
    return sum(
        s.layers * sum(LORA_RANK * (x.fan_in + x.fan_out) for x in s.block.linears if x.name in own)
        for s in anatomy.stacks
    )


def _frozen_bytes(row: Row) -> float:
    """nf4: 4 bits and a scale for 64 weights, in fp32 or itself quantised (Dettmers et al. 2023, arXiv:2305.14314,
    section 3): 4.5 and 4.127 bits."""
    precision = row.get("precision", "")
    if "nf4-dq" in precision:
        return 4.127 / 8
    return 4.5 / 8 if "nf4" in precision else 2.0


def _year(date: str) -> float:
    """2024.5 of `2024-07-01`, `2024-07`, `24.07` (NVIDIA's containers); 2024 where there is none."""
    if found := re.match(r"(\d{4})(?:-(\d\d))?(?:-(\d\d))?", date):
        return int(found[1]) + (int(found[2] or 7) - 1) / 12 + (int(found[3] or 1) - 1) / 365
    if found := re.match(r"(\d\d)\.(\d\d)", date):
        return 2000 + int(found[1]) + (int(found[2]) - 1) / 12
    return 2024.0


def _first(table: tuple[tuple[str, T], ...], text: str, default: T) -> T:
    text = text.lower()
    return next((value for part, value in table if part in text), default)
