"""Whether an export fits a device that people have, and how fast it runs there, at batch 1: phone, laptop, Jetson, GPU.

In: a Shape, how its weights are stored, a Target. Out: Fit. Memory is counted, speed is a roofline with shares that were
fitted to published measurements of other models: **modelled**, within a factor of `DECODE_BAND` for nine of ten.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from famc.cost import decode, roofline, sums
from famc.cost.decode import Stored
from famc.cost.device import Device
from famc.cost.of_shape import anatomy
from famc.cost.parameters import count
from famc.cost.shape import DECODERS, ENCODERS, Shape

PROMPT, ANSWER = 512, 128  # tokens for which speeds are told, as llama-bench's pp512 and tg128
CHUNK = 512  # tokens of a prompt that runtimes compute at once (llama.cpp's ubatch)

# --- what a kind of device makes of its bandwidth -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rates:
    """Of one kind of device. `shares`: of its memory bandwidth that decoding reaches, by kind of quantisation; `layer`:
    seconds a block and token beside that; `compute`: share of the peak at 16 bits (else fp32) in prefill, for weights of 16
    bits and for smaller ones. `source`: of the shares."""

    shares: Mapping[str, float]
    layer: float
    compute: tuple[float, float]
    source: str


# Kinds of quantisation: 16 bits and more; 8 bits; 4 bits in one block layout; k: llama.cpp's nested blocks, whose unpacking
# costs more. Fitted to tokens/s = 1 / (bytes / (bandwidth x share) + layers x start) on 61 published measurements of Llama 2
# and 3 and Qwen (0.6 to 70 B parameters), in logarithms, robustly; residuals: median 6 %, nine of ten within a factor of 1.45.
# tests/cost/test_deploy.py has them. As tokens/s x bytes of the file / bandwidth, of 7 and 8 B models, that is what others
# tell: NVIDIA 0.81 in 16 bits, 0.64 in Q4_K_M; Apple 0.75 to 0.85, 0.82 (Q8_0), 0.71 (Q4_0), 0.50 (Q4_K_M); phones 0.6-0.71.
_DAI = "XiongjieDai/GPU-Benchmarks-on-LLM-Inference README, llama.cpp of 2023-12 and 2024-05"
RATES: dict[str, Rates] = {
    "cuda": Rates(
        {"16": 0.84, "8": 0.80, "4": 0.68, "k": 0.66},
        4e-5,
        (0.5, 0.4),
        f"{_DAI}; pytorch-labs/gpt-fast README; NVIDIA/TensorRT-Edge-LLM issue 60 (Jetson). `layer` between llama.cpp of 2024"
        " (90 us) and of 2025 with CUDA graphs (10 us); the oldest figures of HBM cards lie 30 % below, today's above",
    ),
    "rocm": Rates(
        {"16": 0.70, "8": 0.55, "4": 0.55, "k": 0.5},
        4e-5,
        (0.4, 0.3),
        "pytorch-labs/gpt-fast README: one die of an MI250X, Llama-2-7B: 0.63 in bf16; smaller ones assumed",
    ),
    "metal": Rates(
        {"16": 0.87, "8": 0.95, "4": 0.83, "k": 0.76},
        1.5e-4,
        (0.65, 0.57),
        f"{_DAI}; ggml-org/llama.cpp pull requests 10171 and 16634; AlexsJones/llmfit pull request 1031;"
        " geerlingguy/ai-benchmarks issue 48; brand-o/normiebench issues 3 and 40",
    ),
    "phone": Rates(
        {"16": 0.63, "8": 0.63, "4": 0.59, "k": 0.58},
        2e-5,
        (0.45, 2.0),  # of the fp32 peak: integer dot products do four times as many a cycle
        "pytorch/executorch examples/models/llama/README.md: OnePlus 12, Llama 3.2 1B and 3B; k assumed",
    ),
}
_ASSUMED = Rates({"16": 0.6, "8": 0.55, "4": 0.5, "k": 0.45}, 4e-5, (0.4, 0.3), "assumed")
DECODE_BAND = 1.45  # nine of ten published measurements lie within this factor
PREFILL_BAND = 2.2  # the same of prompts of 512 tokens; runtimes differ by more than devices

OVERHEAD = {"cuda": 0.5e9, "rocm": 0.6e9, "metal": 0.0, "phone": 0.6e9, "cpu": 0.2e9}
"""Bytes of a runtime before it has a model: driver context, libraries, packed copies. Phone: fitted to the resident sizes
in ExecuTorch's README; Metal's lie outside of what its GPU may use; the others assumed."""
_OVERHEAD = 1.0e9  # of other stacks. Assumed

RUNTIMES = {"gguf": "llama.cpp", "onnx": "onnxruntime-genai"}  # of a format on CPUs; else torch


@dataclass(frozen=True, slots=True)
class Target:
    """Where an export must run. `device`: what it is, None where only its memory is known (no speed is told then); `stack`:
    the backend's, a key of RATES or `cpu`. `memory`: bytes for weights and cache, where stated: the runtime's own are then
    not counted."""

    name: str
    context: int = 4096
    device: Device | None = None
    stack: str = "cuda"
    memory: float | None = None

    def __post_init__(self) -> None:
        if self.context < 1:
            raise ValueError(f"{self.name}: a context of {self.context} tokens: it must be at least 1")
        if self.device is None and self.memory is None:
            raise ValueError(f"{self.name}: neither a device nor its memory is known")

    @property
    def limit(self) -> float:
        """Bytes that may be filled."""
        if self.memory is not None:
            return self.memory
        assert self.device is not None
        return self.device.usable


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens/s. `decode`: behind a prompt of PROMPT tokens, `decode_full`: at the end of the context; None for encoders,
    which generate nothing. `prefill`: of that prompt. Bands: nine of ten measurements. `basis`: measured (a CPU like those
    of decode.EFFICIENCY), modelled, assumed."""

    prefill: float
    prefill_band: tuple[float, float]
    decode: float | None
    decode_band: tuple[float, float] | None
    decode_full: float | None
    basis: str
    source: str


@dataclass(frozen=True, slots=True)
class Fit:
    """An export on a target: bytes, the verdict and the speed. `context`: the tokens that were asked for, or as many as the
    model reads. `largest`: of the sizes given, the one of most parameters that fits; None where none does."""

    target: str
    context: int
    weights: float
    cache: float
    overhead: float
    limit: float
    speed: Speed | None
    largest: str | None = None

    @property
    def total(self) -> float:
        return self.weights + self.cache + self.overhead

    @property
    def fits(self) -> bool:
        return self.total <= self.limit

    @property
    def biggest(self) -> str:
        """What holds the most."""
        held = {"weights": self.weights, "kv_cache": self.cache, "overhead": self.overhead}
        return max(held, key=lambda name: held[name])

    @property
    def reason(self) -> str:
        """The verdict in words."""
        have = (
            f"{_gb(self.total)} of {_gb(self.limit)} on {self.target} with {self.context} tokens of context"
        )
        if self.fits:
            return have
        best = f"the largest size that fits is {self.largest}" if self.largest else "no size fits"
        return f"needs {have}, most of it {self.biggest}; {best}"


def stored(fmt: str, quant: str, *, tie: bool) -> Stored:
    """As decode.stored, and fp8: weights of the blocks in 8 bits, head and table in 16. ValueError for an unknown format."""
    if fmt == "fp8":
        return Stored(8.0, 16.0, 16.0, 2.0)
    return decode.stored(fmt, quant, tie=tie)


def fit(
    shape: Shape,
    fmt: str,
    quant: str,
    target: Target,
    *,
    how: Stored | None = None,
    sizes: Mapping[str, Shape] | None = None,
) -> Fit:
    """One export (`fmt` and `quant` as in a spec) on one target. `how`: its storage where it isn't the default; `sizes`: among
    which the largest that would fit is sought. ValueError for a format that famc doesn't know."""
    storage = how or stored(fmt, quant, tie=shape.tie)
    weights, cache, overhead, context = _memory(shape, fmt, storage, target)
    fitting = {
        name: count(other).total
        for name, other in (sizes or {}).items()
        if sum(_memory(other, fmt, how or stored(fmt, quant, tie=other.tie), target)[:3]) <= target.limit
    }
    return Fit(
        target.name,
        context,
        weights,
        cache,
        overhead,
        target.limit,
        None
        if target.device is None
        else speed(shape, fmt, quant, storage, target.device, target.stack, context),
        max(fitting, key=lambda name: fitting[name]) if fitting else None,
    )


def fits(
    exports: Iterable[tuple[str, Shape, str, str]], targets: Iterable[Target], sizes: Mapping[str, Shape]
) -> dict[tuple[str, str], Fit]:
    """All exports (name, shape, format, quantisation) on all targets, by (export, target)."""
    wanted = tuple(targets)
    return {
        (name, target.name): fit(shape, fmt, quant, target, sizes=sizes)
        for name, shape, fmt, quant in exports
        for target in wanted
    }


def _memory(shape: Shape, fmt: str, how: Stored, target: Target) -> tuple[float, float, float, int]:
    """Bytes of weights, cache and runtime, and the tokens of context."""
    context = min(target.context, shape.context)
    weights = decode.file_bytes(shape, how)
    cache = decode.cache_bytes(shape, how, context - 1)
    if target.memory is not None:
        return weights, cache, 0.0, context
    # one chunk in flight, in fp32: the logits, or a block's inner tensors, in the same place
    rows = min(CHUNK, context)
    inner = max(shape.ffn, shape.moe.ffn * shape.moe.active if shape.moe else 0)
    buffer = 4.0 * rows * max(shape.vocab, 2 * inner + 8 * shape.hidden)
    return weights, cache, OVERHEAD.get(target.stack, _OVERHEAD) + buffer, context


# --- speed ----------------------------------------------------------------------------------------------------------


def kind_of(quant: str, how: Stored) -> str:
    """The kind of quantisation: a key of `Rates.shares`."""
    if "_k" in quant.lower():
        return "k"
    return "16" if how.body >= 16 else "8" if how.body >= 7.5 else "4"


def speed(shape: Shape, fmt: str, quant: str, how: Stored, device: Device, stack: str, context: int) -> Speed:
    """Tokens/s on `device`. Decoding moves all active weights and the cache for each token (decode.token_bytes); prefill is
    the slower of its FLOPs and reading the weights once. On CPUs: decode.predict with the format's runtime."""
    prompt = max(1, min(PROMPT, context - 1))
    answer = max(1, min(ANSWER, context - prompt))
    encoder = shape.arch in ENCODERS
    if stack == "cpu":
        runtime = RUNTIMES.get(fmt, "torch")
        near = decode.predict(shape, how, device, runtime, quant, prompt=prompt, tokens=answer)
        full = decode.predict(shape, how, device, runtime, quant, prompt=context, tokens=1)
        source = "famc.cost.decode.EFFICIENCY: two cores with AMX"
        return _speed(near.prefill, None if encoder else near.decode, full.decode, near.basis, source)
    rates = RATES.get(stack, _ASSUMED)
    share = device.bandwidth * rates.shares[kind_of(quant, how)]
    start = shape.layers * rates.layer

    def rate(position: float) -> float:
        return 1 / (decode.token_bytes(shape, how, position) / share + start)

    peaks = dict(device.peaks)
    precision = next((p for p in ("bf16", "fp16", "fp32") if p in peaks), device.peaks[0][0])
    unused = prompt - 1 if shape.arch in DECODERS else 0  # only the last token's logits are made
    first = roofline.step_seconds(
        sums.forward_flops(anatomy(shape), prompt, prompt) - 2.0 * unused * shape.vocab * shape.hidden,
        decode.weight_bytes(shape, how),
        device.peak(precision),
        share,
        rates.compute[0 if how.body >= 16 else 1],
        start,
    )
    basis = "assumed" if rates is _ASSUMED or stack == "rocm" else "modelled"
    return _speed(
        prompt / first, None if encoder else rate(prompt + answer / 2), rate(context - 1), basis, rates.source
    )


def _speed(prefill: float, near: float | None, full: float, basis: str, source: str) -> Speed:
    return Speed(
        prefill,
        _band(prefill, PREFILL_BAND),
        near,
        None if near is None else _band(near, DECODE_BAND),
        None if near is None else full,
        basis,
        source,
    )


def _band(value: float, factor: float) -> tuple[float, float]:
    return value / factor, value * factor


def _gb(value: float) -> str:
    return f"{value / 1e9:.3g} GB"
