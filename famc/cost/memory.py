"""Bytes on the fullest device, split by what holds them; and those of a model that only reads and writes. Training: step_memory."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from famc.cost import sums
from famc.cost.activations import Mode, kept
from famc.cost.anatomy import Anatomy

if TYPE_CHECKING:
    from famc.cost.layout import Layout

RUNTIME = {"gpu": 1.5e9, "cpu": 0.5e9}
"""Of a model that is not trained. Assumed: CUDA context, NCCL and cuBLAS workspaces; on a CPU the resident interpreter with torch (~480 MB
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


def inference(
    anatomy: Anatomy, layout: Layout, context: int, *, weight_bytes: float | None = None, kind: str = "gpu"
) -> Memory:
    """Weights at compute width (or `weight_bytes`, 0.5 for int4), split over tp x pp; the key-value cache of `micro_batch`
    sequences of `context` tokens (T5: input and answer together); one chunk of 2,048 tokens in flight, of which a block
    holds what it would keep for training. An encoder keeps no cache, and has logits for the whole chunk.
    """
    b = width(layout.precision)
    split = layout.tp * layout.pp
    cache = sums.kv_bytes(anatomy, context, b) * layout.micro_batch
    chunk = min(2048, context * layout.micro_batch)
    mode = Mode(b, layout.tp)
    return Memory(
        weights=sums.parameters(anatomy) * (b if weight_bytes is None else weight_bytes) / split,
        activations=chunk * max((kept(s.block, context, mode).whole for s in anatomy.stacks), default=0.0),
        logits=(layout.micro_batch if cache else chunk) * anatomy.vocab * 4 / layout.tp,
        kv_cache=cache / split,
        overhead=RUNTIME[kind],
    )
