"""This machine: what it is, and what `famc calibrate` measured of it, where that still holds.

In: /proc, cgroups, the folders of backends. Out: Accelerator, and why a calibration was not used.
"""

from __future__ import annotations

import os
from pathlib import Path

from famc.backend.accelerator import Accelerator, Precision
from famc.backend.files import folders_of, packaged_dir, read_accelerator
from famc.cost.device import GB

CALIBRATED = "this-cpu"  # name of the backend that `famc calibrate` writes, and of its file

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
# Share of that which large linear layers reach, forward and backward. AMX: 0.75 of 1.3 TFLOP/s, and more than what is assumed
# in fp32, measured by `famc calibrate`; others: fitted to Qwen3 of 1.3, 5.8 and 12.2 M parameters on AVX512-BF16 cores.
_CPU_EFFICIENCY = {"bf16": 0.75, "fp32": 0.6}
_AMX_EFFICIENCY = {"bf16": 0.58, "fp32": 1.0}
WATTS_A_CORE = 5.0  # assumed: EPYC 9654 has 360 W for 96 cores, laptops 45 W for 8
# Instruction sets that decide which kernels oneDNN and MKL run: a calibration holds for the same ones only.
KERNEL_FLAGS = ("amx_bf16", "amx_int8", "avx512_bf16", "avx512_fp16", "avx512_vnni", "avx512f", "avx2", "fma", "asimd")  # fmt: skip


def cpu_precision(flags: frozenset[str]) -> tuple[str, str]:
    """The precision to train in on a CPU with these /proc/cpuinfo flags, and why."""
    for flag, label in (("amx_bf16", "AMX-BF16"), ("avx512_bf16", "AVX512-BF16")):
        if flag in flags:
            return "bf16", f"this CPU multiplies bf16 in hardware ({label})"
    return "fp32", "this CPU has neither AMX-BF16 nor AVX512-BF16: bf16 would be slower than fp32"


def cpu_flags(root: Path = Path("/")) -> frozenset[str]:
    """Instruction-set flags of the first core; empty where the system does not say."""
    for key, value in _cpuinfo(root):
        if key in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def cpu_model(root: Path = Path("/")) -> str:
    """What the first core is called, with family, model and stepping, as clouds name many of them alike; ARM cores by their
    implementer and part. Empty where the system does not say."""
    found: dict[str, str] = {}
    for key, value in _cpuinfo(root):
        if key == "processor" and found:
            break  # the second core
        found.setdefault(key, value)
    name = found.get("model name") or found.get("Hardware") or ""
    parts = [
        f"{label} {found[key]}"
        for key, label in (
            ("cpu family", "family"),
            ("model", "model"),
            ("stepping", "stepping"),
            ("CPU implementer", "implementer"),
            ("CPU part", "part"),
        )
        if key in found
    ]
    return " ".join([name, *([f"({', '.join(parts)})"] if parts else [])]).strip()


def _cpuinfo(root: Path) -> list[tuple[str, str]]:
    lines = _text(root / "proc/cpuinfo").splitlines()
    pairs = (line.partition(":") for line in lines)
    return [(key.strip(), value.strip()) for key, colon, value in pairs if colon]


def local_cpu(
    beside: Path | None = None, root: Path = Path("/"), affinity: int | None = None
) -> tuple[Accelerator, tuple[str, ...]]:
    """This machine as a plan should see it, and what is to be told about it.

    The nearest `this-cpu.yaml` that `famc calibrate` wrote for it (beside the spec, else the user's), with the memory that is
    there now; where none holds, `detect_cpu`. A file that can't be read, or was measured on another machine, is named in the
    reasons and passed over.
    """
    here = detect_cpu(root, affinity)
    found, why = find_calibration(beside, here.cores, root)
    if found is None:
        return here, why
    seen = found.model_copy(update={"name": here.name, "memory_gb": here.memory_gb})
    seen.__dict__.pop("device", None)
    return seen, why


def find_calibration(
    beside: Path | None, cores: int, root: Path = Path("/")
) -> tuple[Accelerator | None, tuple[str, ...]]:
    """The nearest calibration that holds for this machine with so many cores, and why nearer ones do not."""
    why: list[str] = []
    for folder in folders_of(beside):
        path = folder / f"{CALIBRATED}.yaml"
        if folder == packaged_dir() or not path.is_file():
            continue
        try:
            found = read_accelerator(path)
        except (OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            why.append(f"{path} is not used: it can't be read ({first}); run `famc calibrate` again")
            continue
        stale = _stale(found, cores, root)
        if stale:
            why.append(f"{path} is not used: {stale}; run `famc calibrate` again")
            continue
        if found.measured is not None and found.measured.disturbed:
            why.append(
                f"{path} knows one thread only: other programs ran when it was measured; run `famc calibrate` again"
            )
        return found, tuple(why)
    return None, tuple(why)


def _stale(found: Accelerator, cores: int, root: Path) -> str | None:
    """Why a calibration does not hold here."""
    was = found.measured
    if was is None:
        return "it holds no measurement"
    if was.cpu_model != cpu_model(root):
        return f"it was measured on {was.cpu_model or 'an unknown CPU'}, and this is {cpu_model(root) or 'an unknown CPU'}"
    if was.cores != cores:
        return f"it was measured with {was.cores} cores, and {cores} can be used now"
    if was.flags != kernel_flags(root):
        return "this CPU offers other instruction sets than when it was measured"
    return None


def kernel_flags(root: Path = Path("/")) -> tuple[str, ...]:
    """Those of KERNEL_FLAGS that this CPU has."""
    flags = cpu_flags(root)
    return tuple(flag for flag in KERNEL_FLAGS if flag in flags)


def detect_cpu(root: Path = Path("/"), affinity: int | None = None) -> Accelerator:
    """This machine: cores and memory that this process may use, peak by instruction set (assumed)."""
    flags = cpu_flags(root)
    isa, bf16, fp32 = next(row for row in _PER_CORE if not row[0] or row[0] in flags)
    peaks: dict[Precision, float] = {"bf16": bf16, "fp32": fp32} if bf16 else {"fp32": fp32}
    shares = _AMX_EFFICIENCY if isa == "amx_bf16" else _CPU_EFFICIENCY
    efficiency: dict[Precision, float] = {p: shares[p] for p in peaks}
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
        tdp_w=WATTS_A_CORE * cores,
        node_power_factor=1.5,
        basis="assumed",
        sources={
            "peak_tflops": why,
            "efficiency": "of large linear layers: measured on AMX cores, fitted to small training runs on AVX512-BF16 ones",
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
