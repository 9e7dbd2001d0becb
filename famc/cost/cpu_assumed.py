"""The curves of a CPU that nobody measured: those of one that was, in proportion to the peak that is assumed for it.

In: a Device of kind cpu. Out: CpuRates. How a rate falls with width and rows is alike on CPUs, how high it gets is not: the
peak and the share of it that large layers reach (`efficiency`) come from the backend. What is bound by caches and memory is
taken over as it was measured. All **assumed**; `famc calibrate` replaces it.
"""

from __future__ import annotations

from functools import lru_cache

from famc.cost.cpu_rates import CpuRates, ThreadRates
from famc.cost.device import Device

# One core of a Xeon with AMX, torch 2.13, November 2026 (benchmarks/data/cpu_steps.json): (width, rows, share of the best).
_SHARES: dict[str, tuple[tuple[float, float, float], ...]] = {
    "bf16": (
        (32, 128, 0.011), (64, 128, 0.042), (128, 128, 0.139), (256, 128, 0.262), (512, 128, 0.398), (1024, 128, 0.5),
        (32, 1024, 0.064), (64, 1024, 0.169), (128, 1024, 0.343), (256, 1024, 0.665), (512, 1024, 1.0), (1024, 1024, 0.98),
        (32, 8192, 0.121), (64, 8192, 0.24), (128, 8192, 0.481), (256, 8192, 0.728), (512, 8192, 0.823),
    ),
    "fp32": (
        (32, 128, 0.119), (64, 128, 0.347), (128, 128, 0.715), (256, 128, 0.829), (512, 128, 0.869), (1024, 128, 0.777),
        (32, 1024, 0.513), (64, 1024, 0.711), (128, 1024, 0.878), (256, 1024, 0.961), (512, 1024, 0.977), (1024, 1024, 1.0),
        (32, 8192, 0.544), (64, 8192, 0.747), (128, 8192, 0.9), (256, 8192, 0.875), (512, 8192, 0.838),
    ),
}  # fmt: skip
_VECTOR = (
    (0.25e6, 75.9e9),
    (1e6, 58.5e9),
    (4e6, 27.9e9),
    (16e6, 28.5e9),
    (32e6, 27e9),
    (36e6, 4.9e9),
    (64e6, 4.9e9),
)
_SOFTMAX, _MEMORY, _OPERATION = 16.4e9, 13.6e9, 5.3e-6
_FRESH = (
    ("bf16", ((64.0, 2.9e-3), (256.0, 4.3e-3), (1024.0, 1e-2))),
    ("fp32", ((64.0, 8e-6), (256.0, 4.8e-5), (1024.0, 1.7e-4))),
)
_STEP_OVERHEAD, _STARTUP = 0.6e-3, 3.5
COMPUTE, MEMORY = 0.9, 0.5
"""Powers of the cores by which products and passes over memory grow. Assumed; at 2 cores products gave 0.8 to 1.03."""


@lru_cache(maxsize=256)
def assumed(device: Device) -> CpuRates:
    """Curves with one thread and with all cores of `device`. Precisions other than fp32 have bf16's shape."""
    return CpuRates(
        threads=tuple(_threads(device, n) for n in dict.fromkeys((1, device.cores))),
        step_overhead=_STEP_OVERHEAD,
        startup=_STARTUP,
    )


def rates(device: Device) -> tuple[CpuRates, str]:
    """What this CPU does, and the basis of it: `measured` by `famc calibrate`, else `assumed`."""
    return (device.rates, "measured") if device.rates is not None else (assumed(device), "assumed")


def _threads(device: Device, threads: int) -> ThreadRates:
    compute, memory = threads**COMPUTE, threads**MEMORY
    best = {p: peak * device.efficiency(p) * compute for p, peak in device.peaks}
    return ThreadRates(
        threads=threads,
        matmul=tuple((p, peak * compute) for p, peak in device.peaks),
        linear=tuple(
            (p, tuple((w, r, share * top) for w, r, share in _SHARES["fp32" if p == "fp32" else "bf16"]))
            for p, top in best.items()
        ),
        vector=tuple((size, rate * memory) for size, rate in _VECTOR),
        softmax=_SOFTMAX * compute,
        memory=_MEMORY * memory,
        matvec=tuple((p, _MEMORY * memory) for p, _ in device.peaks),
        operation=_OPERATION,
        fresh=_FRESH,
    )
