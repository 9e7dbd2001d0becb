"""Speed of generation at batch 1: bytes that a token moves, the limit that follows, and a prediction.

In: a Shape, how its weights are stored, a Device. Out: bytes, tokens/s, seconds. At batch 1 every weight is
read once a token and used for one multiply-add, far below what a processor does a byte, so decoding is bound
by memory bandwidth: tokens/s <= bandwidth / bytes (the roofline, doi:10.1145/1498765.1498785; Pope et al.
2022, arXiv:2211.05102, section 2).
"""

from __future__ import annotations

from dataclasses import dataclass

from famc.cost import roofline, sums
from famc.cost.device import Device
from famc.cost.of_shape import anatomy
from famc.cost.parameters import around, blocks, matrices
from famc.cost.shape import DECODERS, ENCODERS, Shape

# --- how weights are stored -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Stored:
    """Bits a weight, scales included: of the blocks' matrices, of the output head and of the embedding table;
    `cache`: bytes of one number of the key-value cache in the runtime that loads it.
    """

    body: float
    head: float
    table: float
    cache: float = 4.0


def block_bits(bits: int, block_size: int, *, symmetric: bool = True, scale_bits: int = 32) -> float:
    """Bits a weight of `MatMulNBits`: a scale for each block, and a zero point as wide as a weight if not
    symmetric (onnxruntime, docs/ContribOperators.md).
    """
    if block_size < 1:
        raise ValueError(f"block_size is {block_size}: it must be at least 1")
    return bits + (scale_bits + (0 if symmetric else bits)) / block_size


# Bits a weight of the blocks' matrices, the head, the embedding table. Block layouts from ggml-common.h: 32
# weights and an fp16 scale in q4_0 and q8_0; 256 weights in 144 bytes (q4_K), 176 (q5_K) and 210 (q6_K).
# q4_k_m keeps half of ffn_down and attn_v in q6_K: 4.85 on Llama's shapes. llama.cpp writes an output head,
# and the embedding tied to it, in q6_K in every type from q4 to q6.
_Q6_K = 210 * 8 / 256
_GGUF: dict[str, tuple[float, float, float]] = {
    "f32": (32.0, 32.0, 32.0),
    "f16": (16.0, 16.0, 16.0),
    "bf16": (16.0, 16.0, 16.0),
    "q8_0": (8.5, 8.5, 8.5),
    "q6_k": (_Q6_K, _Q6_K, _Q6_K),
    "q5_k_m": (5.69, _Q6_K, 5.5),
    "q4_k_m": (4.85, _Q6_K, 4.5),
    "q4_0": (4.5, _Q6_K, 4.5),
}
_PLAIN = {"fp32": 32.0, "fp16": 16.0, "bf16": 16.0}


def stored(
    fmt: str,
    quant: str,
    *,
    tie: bool = True,
    block_size: int = 32,
    symmetric: bool = True,
    head: str = "int8",
    table: str = "int8",
) -> Stored:
    """How an export's weights are stored. ValueError for a format that has no row here.

    `head` and `table` are an onnx int4's or int8's: `int4`, `int8` or `fp32`. Where they are tied, the table
    has the head's bits. Eight bits never have zero points.
    """
    if fmt in ("onnx", "safetensors", "torch") and quant in _PLAIN:
        bits = _PLAIN[quant]
        return Stored(bits, bits, bits, bits / 8)
    if fmt == "onnx" and quant in ("int4", "int8"):
        width = {
            "int4": block_bits(4, block_size, symmetric=symmetric), "int8": block_bits(8, block_size), "fp32": 32.0,
        }  # fmt: skip
        return Stored(width[quant], width[head], width[head if tie else table])
    if fmt == "gguf" and quant.lower() in _GGUF:
        body, top, rows = _GGUF[quant.lower()]
        return Stored(body, top, top if tie else rows, 2.0)
    if fmt in ("gptq", "awq") and quant in ("4", "8"):
        # compressed-tensors: blocks packed, with scales in 16 bits; head and table as they were
        packed = block_bits(int(quant), block_size, symmetric=symmetric, scale_bits=16)
        return Stored(packed, 16.0, 16.0, 2.0)
    raise ValueError(f"famc doesn't know how {fmt} {quant} stores its weights")


# --- bytes and limit --------------------------------------------------------------------------------------


def weight_bytes(shape: Shape, how: Stored) -> float:
    """Bytes of weights that one token reads: the blocks (of a mixture, the router and the active experts),
    the norms in fp32, the head, and a single row of the embedding table.
    """
    head = shape.vocab * shape.hidden
    return (_body_bits(shape, how, active=True) + head * how.head + shape.hidden * how.table) / 8


def file_bytes(shape: Shape, how: Stored) -> float:
    """Bytes of an export's weights: all experts of a mixture, and the whole table unless it is the head's own."""
    rows = shape.vocab * shape.hidden
    table = 0.0 if shape.tie else rows * how.table
    return (_body_bits(shape, how, active=False) + rows * how.head + table) / 8


def _body_bits(shape: Shape, how: Stored, *, active: bool) -> float:
    """Bits of all but the tables of tokens: matrices as `how` says; norms, biases and positions in fp32."""
    inside = matrices(shape, active=active)
    return inside * how.body + 32 * (blocks(shape, active=active) + around(shape) - inside)


def cache_bytes(shape: Shape, how: Stored, position: float) -> float:
    """Bytes of the key-value cache that the token at `position` moves: it reads the keys and values of all
    before it and writes its own: 2 x layers x kv_heads x head_dim each. T5's decoder keeps as much of every
    token of its input; an encoder keeps nothing.
    """
    if shape.arch in ENCODERS:
        return 0.0
    return 2.0 * shape.layers * shape.kv_heads * shape.head_dim * how.cache * (position + 1)


def token_bytes(shape: Shape, how: Stored, position: float = 0.0) -> float:
    """Bytes that decoding the token at `position` moves at least."""
    return weight_bytes(shape, how) + cache_bytes(shape, how, position)


def limit(shape: Shape, how: Stored, bandwidth: float, position: float = 0.0) -> float:
    """Tokens/s that `bandwidth` bytes/s allow. A machine whose caches hold the model may pass it."""
    return bandwidth / token_bytes(shape, how, position)


# --- prediction -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Efficiency:
    """What a runtime makes of a machine. `share`: of the memory bandwidth in decoding; `compute`: of the peak
    at `precision` in prefill; `layer`: seconds a block and token to start its kernels.
    """

    share: float
    precision: str
    compute: float
    layer: float
    basis: str  # measured | assumed


# Fitted to a Qwen3-shaped model of 235 M parameters at batch 1 with 2 threads on AMX cores that read 23.9
# GB/s (prompt 512, decode after 64; onnxruntime 1.32, onnxruntime-genai 0.18, torch 2.13, llama.cpp of
# llama-cpp-python 0.3 built for AVX-512): tokens/s over the bandwidth limit, and prefill FLOP/s over the peak
# of backend.py. Those marked assumed were not measured: they take their neighbour's figure. `layer` is
# assumed for all.
EFFICIENCY: dict[tuple[str, str], Efficiency] = {
    ("onnxruntime", "fp32"): Efficiency(0.95, "fp32", 0.88, 4e-5, "measured"),
    ("onnxruntime", "fp16"): Efficiency(0.5, "fp32", 0.6, 4e-5, "assumed"),
    ("onnxruntime", "int8"): Efficiency(0.75, "fp32", 0.75, 4e-5, "assumed"),
    ("onnxruntime", "int4"): Efficiency(0.55, "fp32", 0.7, 4e-5, "measured"),
    ("onnxruntime-genai", "fp32"): Efficiency(0.95, "fp32", 0.88, 3e-5, "assumed"),
    ("onnxruntime-genai", "fp16"): Efficiency(0.5, "fp32", 0.6, 3e-5, "assumed"),
    ("onnxruntime-genai", "int8"): Efficiency(0.78, "fp32", 0.75, 3e-5, "measured"),
    ("onnxruntime-genai", "int4"): Efficiency(0.62, "fp32", 0.7, 3e-5, "measured"),
    ("llama.cpp", "f16"): Efficiency(0.68, "fp32", 0.7, 2e-5, "measured"),
    ("llama.cpp", "q8_0"): Efficiency(0.56, "fp32", 0.7, 2e-5, "measured"),
    ("llama.cpp", "q4_k_m"): Efficiency(0.52, "fp32", 0.65, 2e-5, "measured"),
    ("llama.cpp", "q4_0"): Efficiency(0.45, "fp32", 0.65, 2e-5, "measured"),
    ("torch", "fp32"): Efficiency(0.95, "fp32", 0.95, 3e-4, "measured"),
    ("torch", "bf16"): Efficiency(0.55, "bf16", 0.37, 3e-4, "measured"),
}
HEAD_OF_ALL = frozenset({"onnxruntime", "onnxruntime-genai"})
"""Runtimes whose prefill computes the logits of every position of the prompt; the others' only those of the
last."""
_OTHERS = Efficiency(
    roofline.DECODE_EFFICIENCY, "fp32", 0.5, roofline.DECODE_LAYER_OVERHEAD["cpu"], "assumed"
)


@dataclass(frozen=True, slots=True)
class Prediction:
    """Tokens/s and seconds at batch 1, and what the efficiency behind them is based on."""

    prefill: float
    decode: float
    first_token: float
    basis: str


def efficiency(runtime: str, quant: str) -> Efficiency:
    """The runtime's figures at this precision, else assumed ones."""
    return EFFICIENCY.get((runtime, quant.lower()), _OTHERS)


def predict(
    shape: Shape, how: Stored, device: Device, runtime: str, quant: str, *, prompt: int, tokens: int
) -> Prediction:
    """What `runtime` would reach on `device` with a prompt of `prompt` tokens and `tokens` new ones.

    Decode: bytes at the middle of the answer / (bandwidth x share) + layers x start-up. Prefill: the larger
    of FLOPs / (peak x share) and reading the weights once, + start-up; width and rows count as in training.
    An encoder puts out every position, and has no second token: its `decode` is the rate of texts of one token.
    """
    known = efficiency(runtime, quant)
    start = shape.layers * known.layer
    moved = token_bytes(shape, how, prompt + tokens / 2)
    decode = moved / (device.bandwidth * known.share) + start
    peaks = dict(device.peaks)
    precision = known.precision if known.precision in peaks else next(iter(peaks))
    half = roofline.HALF_WIDTH[device.kind]
    wide = shape.hidden / (shape.hidden + half.get(precision, half[""]))
    rows = prompt / (prompt + roofline.HALF_ROWS[device.kind])
    unused = 0 if runtime in HEAD_OF_ALL or shape.arch not in DECODERS else prompt - 1
    first = roofline.step_seconds(
        sums.forward_flops(anatomy(shape), prompt, prompt) - 2.0 * unused * shape.vocab * shape.hidden,
        weight_bytes(shape, how),
        device.peak(precision),
        device.bandwidth * known.share,
        known.compute * wide * rows,
        start,
    )
    return Prediction(prefill=prompt / first, decode=1 / decode, first_token=first, basis=known.basis)
