"""Bytes on the fullest device, split by what holds them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from famc.cost.flops import DECODER_SHARE, ENCODER_SHARE
from famc.cost.parameters import attention, count, layer
from famc.cost.shape import ENCODER_DECODERS, ENCODERS, Shape

if TYPE_CHECKING:
    from famc.cost.layout import Layout

ADAM_BYTES = 8  # two fp32 moments
RUNTIME = {"gpu": 1.5e9, "cpu": 0.5e9}
"""Assumed: CUDA context, NCCL and cuBLAS workspaces; on a CPU the resident interpreter with torch (~480 MB
measured)."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes per device."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    logits: float = 0.0
    kv_cache: float = 0.0
    overhead: float = 0.0

    @property
    def total(self) -> float:
        return (
            self.weights
            + self.gradients
            + self.optimizer
            + self.activations
            + self.logits
            + self.kv_cache
            + self.overhead
        )

    @property
    def biggest(self) -> str:
        """The name of the largest part."""
        return max(fields(self), key=lambda f: float(getattr(self, f.name))).name


def width(precision: str) -> int:
    """Bytes of an activation: 4 in fp32, else 2 (fp8 training keeps its activations in bf16)."""
    return 4 if precision == "fp32" else 2


def training(
    shape: Shape,
    layout: Layout,
    context: int,
    *,
    trainable_params: int | None = None,
    optimizer_bytes: int = ADAM_BYTES,
    kind: str = "gpu",
    head: bool = True,
) -> Memory:
    """Mixed-precision AdamW: fp32 weights (4), gradients (4) and moments (8) = 16 bytes a parameter, split
    over dp_shard x cp x tp x pp (ZeRO-3, Rajbhandari et al. 2020, arXiv:1910.02054); plus the 16-bit copies
    that compute uses.

    With `trainable_params` (LoRA, a projector) the base is frozen at compute width and only those carry the
    16 bytes. Without `head` no logits over the vocabulary are made (embedders, rerankers).
    """
    p, b = count(shape), width(layout.precision)
    # The fullest pipeline stage holds its share of the blocks and one embedding table.
    tables = p.embedding if layout.pp == 1 else shape.vocab * shape.hidden
    held = ((p.total - p.embedding) / layout.pp + tables) / layout.tp
    ranks = layout.dp_shard * layout.cp  # FSDP shards over the context ranks too, as in torchtitan
    shard = held / ranks
    if trainable_params is None:
        weights, trained = 4 * shard, shard
        casts = held if ranks == 1 else _gathered(shape, layout)
        overhead = casts * b if b < 4 or ranks > 1 else 0.0
    else:
        trained = trainable_params / (layout.pp * layout.tp * ranks)
        weights = b * shard + 4 * trained
        overhead = b * _gathered(shape, layout) if ranks > 1 else 0.0
    tokens = layout.micro_batch * context / (layout.tp * layout.cp)  # tp with sequence parallelism
    written = DECODER_SHARE if shape.arch in ENCODER_DECODERS else 1.0
    return Memory(
        weights=weights,
        gradients=4 * trained,
        optimizer=optimizer_bytes * trained,
        activations=tokens * _activations(shape, layout, context, b),
        logits=tokens * written * shape.vocab * logit_bytes(layout.precision) if head else 0.0,
        overhead=overhead + RUNTIME[kind],
    )


def inference(
    shape: Shape,
    layout: Layout,
    context: int,
    *,
    weight_bytes: float | None = None,
    kind: str = "gpu",
) -> Memory:
    """Weights at compute width (or `weight_bytes`, 0.5 for int4), split over tp x pp; a KV cache of
    2 x layers x kv_heads x head_dim x context for each of `micro_batch` sequences (T5: of input and answer
    together); one chunk of 2,048 tokens in flight. An encoder keeps no cache, and has logits for the whole
    chunk."""
    b = width(layout.precision)
    split = layout.tp * layout.pp
    cache = 2 * shape.layers * shape.kv_heads * shape.head_dim * context * layout.micro_batch * b
    chunk = min(2048, context * layout.micro_batch) / layout.tp
    encoder = shape.arch in ENCODERS
    rows = chunk * layout.tp if encoder else layout.micro_batch
    return Memory(
        weights=count(shape).total * (b if weight_bytes is None else weight_bytes) / split,
        activations=chunk * _block_elements(shape, "none") * b,
        logits=rows * shape.vocab * 4 / layout.tp,
        kv_cache=0.0 if encoder else cache / split,
        overhead=RUNTIME[kind],
    )


def logit_bytes(precision: str) -> int:
    """Bytes a token and vocabulary row at the loss: logits, the fp32 log-softmax, its fp32 gradient."""
    return width(precision) + 4 + 4


def _gathered(shape: Shape, layout: Layout) -> float:
    """Parameters whole on a device under FSDP: the block in use, the next one, the embedding."""
    block = layer(shape)
    if shape.moe is not None and layout.ep > 1:
        block = attention(shape) + (block - attention(shape)) // layout.ep
    return (2 * block + shape.vocab * shape.hidden) / layout.tp


def _activations(shape: Shape, layout: Layout, context: int, b: int) -> float:
    """Bytes a token of text kept for the backward pass. 1F1B keeps min(pp, grad_accum) micro-batches on the
    first stage (Narayanan et al. 2021, section 2.2); full recomputation keeps each block's input and one
    block in work. T5: of the tokens that encoder and decoder each have of a text."""
    blocks = shape.layers / layout.pp * min(layout.pp, layout.grad_accum)
    share = ENCODER_SHARE + DECODER_SHARE if shape.arch in ENCODER_DECODERS else 1.0
    # Norms work in fp32: two more copies.
    whole = _block_elements(shape, "none") * b + 8 * shape.hidden * share
    whole += _scores(shape, context / layout.cp, b)
    if layout.recompute == "full":
        return blocks * shape.hidden * share * b + whole
    if layout.recompute == "selective":
        return blocks * _block_elements(shape, "selective") * b + whole
    return blocks * whole


def _scores(shape: Shape, context: float, b: int) -> float:
    """Bytes a token and pair of blocks for attention's scores, where they are kept: T5's bias is learnt, which
    no flash kernel does: scores and their softmax (Korthikanti et al. 2022, equation 1)."""
    if shape.arch not in ENCODER_DECODERS:
        return 0.0
    read, written = ENCODER_SHARE * context, DECODER_SHARE * context
    pairs = ENCODER_SHARE * read + DECODER_SHARE * (written + read)
    return 2 * b * shape.heads * pairs


def _block_elements(shape: Shape, recompute: str) -> float:
    """Values a token one block saves, with flash attention and a gate (after Korthikanti et al. 2022,
    equation 2).

    Saved: two norms' inputs and outputs (4h), q, k, v and attention's output; q and k again after their norm
    and RoPE; gate, up, silu(gate) and their product (4 ffn). `selective` recomputes norms, RoPE and the
    gate's product. BERT norms after each half, and has neither RoPE nor a gate: GELU's input and output (2
    ffn). T5 has no RoPE; its decoder attends twice. Nothing is dropped out.
    """
    q, kv, h = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.hidden
    if shape.arch == "bert":
        return 2 * h + 4 * q + shape.ffn if recompute == "selective" else 4 * h + 4 * q + 2 * shape.ffn
    if shape.arch in ENCODER_DECODERS:
        # of a token of text: an encoder's block, a decoder's, and the keys and values between them
        norm, gate = (1, 2) if recompute == "selective" else (2, 4)
        encoder = 2 * norm * h + 4 * q + gate * shape.ffn + 2 * q
        decoder = 3 * norm * h + 6 * q + gate * shape.ffn
        return ENCODER_SHARE * encoder + DECODER_SHARE * decoder
    moe = shape.moe
    ffn, routed = (shape.ffn, 0) if moe is None else (moe.ffn * moe.active, 2 * moe.active * h + moe.experts)
    if recompute == "selective":
        return 2 * h + 2 * q + 2 * kv + 2 * ffn + routed
    again = (q + kv) * (1 if shape.arch in ("llama", "modernbert") else 2)
    return 4 * h + 2 * q + 2 * kv + again + 4 * ffn + routed
