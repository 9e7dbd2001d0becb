"""What a model is made of, as arithmetic sees it: linear layers, attention, tables. Parameters, FLOPs, memory and time are
sums over it, so that no architecture has a formula of its own.

In: nothing; `of_shape` (spec) and `hf_config` (any config.json) make it. Out: frozen data. Bears no identity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Split = Literal["column", "row", "none"]


@dataclass(frozen=True, slots=True)
class Linear:
    """y = x W (+ b). `copies` such matrices stand side by side (experts), of which a token meets `active`.
    `split`: how tensor parallelism divides it (Shoeybi et al. 2019, arXiv:1909.08053): its outputs, its inputs, or not."""

    name: str
    fan_in: int
    fan_out: int
    bias: bool = False
    copies: int = 1
    active: int = 1
    split: Split = "column"
    cross: bool = False  # keys and values of a cross attention: made of the other stack's tokens

    @property
    def weights(self) -> int:
        """Of all copies, biases included."""
        return self.copies * (self.fan_in * self.fan_out + (self.fan_out if self.bias else 0))


@dataclass(frozen=True, slots=True)
class Attention:
    """The core: scores of `heads` queries of `qk_dim` against `kv_heads` keys, and sums of values of `v_dim`.
    `window`: tokens that one token sees at most. `cross`: keys and values are another stack's. `flash`: scores are never
    written to memory (not so for T5's learnt bias)."""

    heads: int
    kv_heads: int
    qk_dim: int
    v_dim: int
    causal: bool = True
    window: int | None = None
    cross: bool = False
    flash: bool = True
    cached: int | None = (
        None  # numbers a token leaves in the KV cache, where not kv_heads x (qk_dim + v_dim): MLA's latent
    )


@dataclass(frozen=True, slots=True)
class Block:
    """One layer of a stack. `vectors`: weights that are no matrix (norms, biases of positions)."""

    hidden: int
    linears: tuple[Linear, ...]
    attentions: tuple[Attention, ...]
    vectors: int = 0
    norms: int = 2  # passes over the hidden state (for time and memory), q/k norms not counted
    qk_norm: bool = False
    rope: bool = True
    gated: bool = True  # two matrices into the feed-forward, multiplied
    parallel: bool = False  # attention and feed-forward read the same input (GPT-NeoX, Falcon)


@dataclass(frozen=True, slots=True)
class Stack:
    """`layers` alike blocks; kinds that alternate (windowed and not) are gathered into one stack each. `part`: text, vision,
    audio, encoder or decoder, projector. `share`: tokens it reads for one token of the step's length (T5's encoder and
    decoder; 1 elsewhere; 0 for images and audio until `sums.with_media` says how many there are).

    `length`: tokens of one input where that is not the step's length: an image's patches, 30 s of audio. `source`,
    `source_length`: `share` and `length` of the stack that a cross attention reads. `medium`: vision or audio, where the
    share or the source depends on how many of such inputs a sequence has."""

    part: str
    layers: int
    block: Block
    share: float = 1.0
    length: int | None = None
    source: float = 0.0
    source_length: int | None = None
    medium: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows that are looked up: tokens, positions, token types. `head`: whether it is the output head too (tied)."""

    name: str
    rows: int
    width: int
    head: bool = False

    @property
    def weights(self) -> int:
        return self.rows * self.width


@dataclass(frozen=True, slots=True)
class Anatomy:
    """A whole model. `head`: the untied output head or a classifier, None where tied or absent; `vocab`: width of the logits,
    0 where there are none. `vectors`: weights outside all blocks that are neither table nor linear layer."""

    name: str
    stacks: tuple[Stack, ...]
    tables: tuple[Table, ...]
    linears: tuple[Linear, ...] = ()  # outside the blocks: patch embedding, projector, dense before a head
    head: Linear | None = None
    vocab: int = 0
    vectors: int = 0
    parts: tuple[tuple[str, int], ...] = ()  # parameters of each part that is trained or frozen on its own
    head_share: float = 1.0  # tokens that get logits for one of the step's length: T5's decoder's
