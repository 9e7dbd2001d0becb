"""Seconds of matrix products by their size: a roofline with the idle part of the last wave and the traffic that arithmetic
does not hide.

In: sizes, a Device. Out: FLOP/s, seconds. Bears no identity.
"""

from __future__ import annotations

from famc.cost.device import Device
from famc.cost.fitted import Constants

BEST = {"bf16": 0.79, "fp16": 0.79, "fp8": 0.73, "fp4": 0.65, "fp32": 0.79}
"""Share of the datasheet's dense peak that the best product reaches where nobody measured it: means over chips with 8-bit
units of stas00/ml-engineering's table of maximum achievable rates (bf16: H100 0.80, H200 0.80, B200 0.78, GB200 0.73; fp8:
H100 0.71, B200 0.76, GB200 0.72); fp4 and fp32 assumed."""
OLDER = 0.87
"""The same of chips without 8-bit units: A100 in that table."""
SYSTOLIC = 0.95
"""The same of a TPU, whose few large arrays stay full (assumed after jax-ml.github.io/scaling-book, chapter Rooflines)."""
LOW = ("fp8", "mxfp8", "fp8-rowwise", "nvfp4")
"""Precisions whose products are made below 16 bits; attention and the head stay at 16."""
KEYS = {"mxfp8": "fp8", "fp8-rowwise": "fp8", "nvfp4": "fp4"}
"""Layout.precision -> the device's figure."""
WIDTH = {"fp8": 0.5, "fp4": 0.25}
"""Energy of an operation for one at 16 bits, taken as its width."""
STREAMS = 4.0
"""Experts' products that run at once (Transformer Engine's grouped GEMM); each group has a last wave of its own."""


def best(device: Device, precision: str) -> float:
    """FLOP/s of the best product: measured, or else a share of the peak.

    fp16 and bf16 stand for each other. fp8 without a figure loses as much against its peak as bf16 does where that is
    known; fp4 without a stated peak is taken for twice fp8. ValueError where the device has no such precision.
    """
    key = KEYS.get(precision, precision)
    known, peaks = dict(device.matmuls), dict(device.peaks)
    for same in ("bf16", "fp16") if key in ("bf16", "fp16") else (key,):
        if same in known:
            return known[same]
    if key not in peaks:
        if key == "fp4" and "fp8" in peaks:
            return 2 * best(device, "fp8")
        if key in ("bf16", "fp16"):
            key = "fp16" if key == "bf16" else "bf16"
    peak = device.peak(key)
    if device.name.startswith("tpu"):
        return peak * SYSTOLIC
    if "fp8" not in peaks:
        return peak * OLDER
    if key in WIDTH and "bf16" in known:
        return peak * BEST[key] * min(1.0, known["bf16"] / peaks["bf16"] / BEST["bf16"])
    return peak * BEST.get(key, OLDER)


def rate(device: Device, precision: str, c: Constants) -> float:
    """FLOP/s that large products sustain in training: the best product x what the power limit leaves of its clock.

    A chip that does more operations for each watt of its limit lowers its clock further: sustained x (TFLOP/s a watt, at
    16 bits) ^ -throttle, at most 1. Power grows with up to the cube of the clock, so throttle is a half at most. A TPU keeps
    its clock.
    """
    most = best(device, precision)
    if device.name.startswith("tpu"):
        return most
    if device.power <= 0:
        return most * c.sustained
    density = most * WIDTH.get(KEYS.get(precision, precision), 1.0) / 1e12 / device.power
    return most * min(1.0, float(c.sustained * density**-c.throttle))


def seconds(
    m: float, n: float, k: float, flops: float, bandwidth: float, c: Constants, copies: float = 1.0
) -> float:
    """[m, k] x [k, n] at `flops` FLOP/s and `bandwidth` bytes/s, 16-bit operands; `copies` matrices share the m rows.

    2 m n k / flops x (1 + tile / (m n)): thread blocks come in waves, of which the last is half empty on average (NVIDIA,
    Matrix Multiplication Background User's Guide, section "Wave Quantization"); + traffic x bytes / bandwidth; + one start.
    """
    waves = max(1.0, copies / STREAMS)
    work = 2.0 * m * n * k / flops * (1.0 + waves * c.tile / (m * n))
    moved = 2.0 * (m * k + copies * k * n + m * n)
    return work + c.traffic * moved / bandwidth + waves * c.kernel
