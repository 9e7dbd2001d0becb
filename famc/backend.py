"""What backends/*.yaml may say: one accelerator a file, each figure with its source. And this CPU."""

from __future__ import annotations

import difflib
import os
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from famc.cost.device import GB, Device

Precision = Literal["bf16", "fp16", "fp8", "fp32"]


class UnknownAccelerator(LookupError):
    """No backends/*.yaml has this name or alias. `candidates` are the nearest ones, else all."""

    def __init__(self, name: str, candidates: tuple[str, ...]) -> None:
        self.name = name
        self.candidates = candidates
        super().__init__(f"no accelerator `{name}`; there are: {', '.join(candidates)}")


class Price(BaseModel):
    """USD for one device and hour. Prices move: each has its date and where it was read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    on_demand: float = Field(gt=0)
    spot: float | None = Field(default=None, gt=0)
    date: str
    source: str


class Accelerator(BaseModel):
    """One accelerator, or one CPU host."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    aliases: tuple[str, ...] = ()
    kind: Literal["gpu", "cpu"]
    peak_tflops: dict[Precision, float] = Field(description="dense TFLOP/s; of one core for a CPU")
    efficiency: dict[Precision, float] = Field(
        description="share of the peak that large training matmuls reach"
    )
    memory_gb: float = Field(gt=0, description="GB (1e9 bytes) of one device; of the host for a CPU")
    bandwidth_gbs: float = Field(gt=0, description="memory bandwidth, GB/s")
    intranode_gbs: float = Field(default=0.0, ge=0, description="GB/s one device can send inside its node")
    internode_gbs: float = Field(default=0.0, ge=0, description="GB/s one device can send to other nodes")
    per_node: int = Field(default=1, ge=1, description="devices of a usual node")
    cores: int = Field(default=1, ge=1, description="CPU cores; 1 for a GPU")
    tdp_w: float = Field(gt=0)
    node_power_factor: float = Field(
        default=1.28, ge=1, description="wall power of a busy node / its devices' TDP"
    )
    usd_per_hour: Price | None = None
    basis: Literal["datasheet", "assumed"] = "datasheet"
    sources: dict[str, str] = Field(description="figure -> where it was read")

    @model_validator(mode="after")
    def _check(self) -> Accelerator:
        for figure in self.sources:
            if figure not in type(self).model_fields:
                raise ValueError(f"sources names `{figure}`, which is no figure of an accelerator")
        if not self.peak_tflops or not self.efficiency:
            raise ValueError("peak_tflops and efficiency need at least one precision each")
        for precision, share in self.efficiency.items():
            if not 0 < share <= 1:
                raise ValueError(f"efficiency {precision} is {share}: it is a share between 0 and 1")
        return self

    @cached_property
    def device(self) -> Device:
        """The same in SI units, for the arithmetic of famc.cost."""
        return Device(
            name=self.name,
            kind=self.kind,
            peaks=tuple((p, v * 1e12) for p, v in self.peak_tflops.items()),
            efficiencies=tuple(self.efficiency.items()),
            memory=self.memory_gb * GB,
            bandwidth=self.bandwidth_gbs * GB,
            intranode=self.intranode_gbs * GB,
            internode=self.internode_gbs * GB,
            power=self.tdp_w,
            node_power_factor=self.node_power_factor,
            cores=self.cores,
        )

    def with_cores(self, cores: int) -> Accelerator:
        """This CPU host seen by a job that may use `cores` of it: its compute, all of the memory."""
        return Accelerator(**self.model_dump() | {"cores": cores, "tdp_w": self.tdp_w * cores / self.cores})

    def training_precision(self) -> tuple[str, str]:
        """The precision to train in where the spec names none, and why."""
        for precision in ("bf16", "fp16"):
            if precision in self.peak_tflops:
                return precision, f"{self.name} multiplies {precision} in hardware"
        return "fp32", f"{self.name} has no 16-bit matrix units"


def packaged_dir() -> Path:
    """The backends that come with famc: package data of a wheel, or the repository's folder."""
    here = Path(__file__).parent
    installed = here / "_backends"
    return installed if installed.is_dir() else here.parent / "backends"


def load_accelerator(name: str, beside: Path | None = None) -> Accelerator:
    """The accelerator called `name`, from `backends/` in or beside `beside`, else famc's own."""
    folders = [packaged_dir()]
    if beside is not None:
        folders.insert(0, (beside.parent if beside.is_file() else beside) / "backends")
    plain = Path(name).name == name
    for folder in folders:
        if plain and (path := folder / f"{name}.yaml").is_file():
            return _read(path, path.stat().st_mtime_ns)
    known: dict[str, Accelerator] = {}
    for folder in reversed(folders):  # the user's names win
        for path in sorted(folder.glob("*.yaml")):
            accelerator = _read(path, path.stat().st_mtime_ns)
            known.update(dict.fromkeys((accelerator.name, *accelerator.aliases), accelerator))
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name.lower(), known, n=5, cutoff=0.5)
    raise UnknownAccelerator(name, tuple(near) or tuple(sorted({a.name for a in known.values()})))


@lru_cache(maxsize=256)
def _read(path: Path, mtime_ns: int) -> Accelerator:
    from ruamel.yaml import YAML  # here, so that importing famc.backend stays cheap

    data: Any = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    accelerator = Accelerator.model_validate(data)
    if accelerator.name != path.stem:
        raise ValueError(f"{path}: its name is `{accelerator.name}`; name and file must agree")
    return accelerator


# TFLOP/s of one core, sustained by large matmuls, by the best instruction set it has: (flag, bf16, fp32),
# first match. AMX and AVX-512 measured on single cloud cores (bf16 1.28-1.42, fp32 ~0.15); the others assumed
# in proportion.
_PER_CORE: tuple[tuple[str, float, float], ...] = (
    ("amx_bf16", 1.3, 0.15),
    ("avx512_bf16", 0.3, 0.15),
    ("avx512f", 0.0, 0.15),
    ("avx2", 0.0, 0.08),
    ("asimd", 0.0, 0.04),
    ("", 0.0, 0.02),
)
# Share of that which training reaches, element-wise work included: fitted to Qwen3 of 1.3, 5.8 and 12.2 M
# parameters on AVX512-BF16 cores (98 of 300 GFLOP/s in bf16, 55 of 150 in fp32, at large width); on AMX 10-14
# % was measured.
_CPU_EFFICIENCY = {"bf16": 0.35, "fp32": 0.365}
_AMX_EFFICIENCY = 0.12
_WATTS_A_CORE = 5.0  # assumed: EPYC 9654 has 360 W for 96 cores, laptops 45 W for 8


def cpu_precision(flags: frozenset[str]) -> tuple[str, str]:
    """The precision to train in on a CPU with these /proc/cpuinfo flags, and why."""
    for flag, label in (("amx_bf16", "AMX-BF16"), ("avx512_bf16", "AVX512-BF16")):
        if flag in flags:
            return "bf16", f"this CPU multiplies bf16 in hardware ({label})"
    return "fp32", "this CPU has neither AMX-BF16 nor AVX512-BF16: bf16 would be slower than fp32"


def cpu_flags(root: Path = Path("/")) -> frozenset[str]:
    """Instruction-set flags of the first core; empty where the system does not say."""
    for line in _text(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def detect_cpu(root: Path = Path("/"), affinity: int | None = None) -> Accelerator:
    """This machine: cores and memory that this process may use, peak by instruction set (assumed)."""
    flags = cpu_flags(root)
    isa, bf16, fp32 = next(row for row in _PER_CORE if not row[0] or row[0] in flags)
    peaks: dict[Precision, float] = {"bf16": bf16, "fp32": fp32} if bf16 else {"fp32": fp32}
    efficiency: dict[Precision, float] = {"fp32": _CPU_EFFICIENCY["fp32"]}
    if bf16:
        efficiency["bf16"] = _AMX_EFFICIENCY if isa == "amx_bf16" else _CPU_EFFICIENCY["bf16"]
    cores = _cores(root, affinity)
    why = f"assumed for one core with {isa or 'no known vector unit'}"
    return Accelerator(
        name="cpu",
        kind="cpu",
        peak_tflops=peaks,
        efficiency=efficiency,
        memory_gb=_memory(root) / GB,
        bandwidth_gbs=20.0 * max(1.0, min(cores, 16) / 2),
        cores=cores,
        tdp_w=_WATTS_A_CORE * cores,
        node_power_factor=1.5,
        basis="assumed",
        sources={
            "peak_tflops": why,
            "efficiency": "fitted to small Qwen3 training runs on AVX512-BF16 and AMX cores",
            "memory_gb": "the smaller of MemTotal and the cgroup's memory.max",
            "bandwidth_gbs": "assumed: 10 GB/s a core, from 20 to 160",
            "cores": "the smaller of the scheduler affinity and the cgroup's cpu.max",
            "tdp_w": "assumed: 5 W a core",
        },
    )


def _cores(root: Path, affinity: int | None) -> int:
    if affinity is None:
        affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = float(affinity)
    for folder in _cgroups(root):
        quota, _, period = _text(folder / "cpu.max").strip().partition(" ")
        if quota.isdigit() and period.isdigit() and int(period):
            cores = min(cores, int(quota) / int(period))
    return max(1, int(cores))


def _memory(root: Path) -> float:
    meminfo = _text(root / "proc/meminfo").splitlines()
    found = [int(line.split()[1]) * 1024.0 for line in meminfo if line.startswith("MemTotal:")]
    for folder in _cgroups(root):
        limit = _text(folder / "memory.max").strip()
        if limit.isdigit():
            found.append(float(limit))
    if not found:
        found.append(float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")))
    return min(found)


def _cgroups(root: Path) -> list[Path]:
    """This process's cgroup v2 folder and those above it: the tightest limit of the chain holds."""
    base = root / "sys/fs/cgroup"
    own = next((x[3:] for x in _text(root / "proc/self/cgroup").splitlines() if x.startswith("0::")), "/")
    folder = base / own.strip().lstrip("/")
    chain = [folder, *folder.parents]
    return [f for f in chain if f == base or base in f.parents] or [base]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
