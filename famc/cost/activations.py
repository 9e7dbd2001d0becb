"""What the forward pass of a block leaves in memory for its backward pass: bytes of one token on one device.

In: a Block and how it is run. Out: Kept. One rule for every architecture: a matrix keeps its input, a norm its input, a
product of two tensors both of them, attention its queries, keys, values and output; a tensor is counted once. Bears no
identity.

Sources: Korthikanti et al. 2022 (arXiv:2205.05198), section 4, equations 1 to 5, of which `saved` is the general case
without flash attention's scores; Dao et al. 2022 (arXiv:2205.14135), algorithm 1: only the row's log-sum is kept; Hu et al.
2021 (arXiv:2106.09685): a frozen matrix needs no input.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from famc.cost.anatomy import Block, Linear

Adapted = Literal["", "attention", "all", "prefix", "outputs"]

ROUTING = 12  # bytes of a token and expert: the router's logits, their softmax and its gradient, in fp32
IMBALANCE = 1.2
"""Tokens of the fullest rank of experts over the mean. Assumed: a balancing loss holds it between 1 and 1.5."""


@dataclass(frozen=True, slots=True)
class Mode:
    """How a block is run. `width`: bytes of an activation. `tp`, `ep`: ranks that a block is divided over; `sequence`:
    whether norms are divided over tp too. `norms`, `gates`: whether a norm, or act(gate) x up, is one kernel that keeps its
    inputs only. `low`: whether matrices keep their inputs in 8 bits (Transformer Engine). `scores`: whether attention writes
    its scores to memory; `dropout`: whether masks are kept with them, as GPT-3's stacks do. `base`: whether q, k and v are
    parts of one product that stays whole beside the rotated copies. `adapted`: what is trained beside a frozen block (as
    Setup.adapted), empty where the block is; `quantised`: whether frozen matrices are stored in 4 bits."""

    width: int = 2
    tp: int = 1
    ep: int = 1
    sequence: bool = True
    norms: bool = False
    gates: bool = False
    low: bool = False
    scores: bool = False
    dropout: bool = False
    base: bool = False
    adapted: Adapted = ""
    quantised: bool = False


@dataclass(frozen=True, slots=True)
class Kept:
    """Bytes of a token: `whole`: of the block run without recomputation; `half`: where every second product and attention's
    output are kept, and the block's input; `input`: its input alone; `work`: gradients in flight while it is run back."""

    whole: float
    half: float
    input: float
    work: float


@lru_cache(maxsize=65536)
def kept(block: Block, keys: float, mode: Mode, source: float = 0.0) -> Kept:
    """Of one token of `block`. `keys`: length of the sequence that its scores span, where they are written to memory;
    `source`: tokens of the other stack, whose keys and values a cross attention reads, for each of its own."""
    b, h = mode.width, block.hidden
    share = mode.tp if mode.sequence else 1
    low = 1 if mode.low else b
    whole = _norms(block, mode, low) / share
    half = float(b * h) / share
    # gradients of the residual stream; what tensor ranks gather of it, and its gradient before it is scattered
    work = 2.0 * b * h / share + (2.0 * b * h if mode.tp > 1 and mode.sequence else 0.0)
    for core in block.attentions:
        own = core.heads * core.qk_dim
        keyed = core.kv_heads * (core.qk_dim + core.v_dim)
        out = core.heads * core.v_dim
        one = b * (own + keyed * (source if core.cross else 1.0) + out)
        if mode.low and not mode.adapted:
            one += low * out  # the projection's own copy of attention's output
        if mode.base and block.rope and not core.cross:
            one += b * (own + core.kv_heads * core.qk_dim)
        if mode.scores or not core.flash:
            one += core.heads * keys * (2 * b + 1 if mode.dropout else 2 * b)
        else:
            one += 4.0 * core.heads  # a row's log-sum
        whole += one / mode.tp
        half += (b * out + 4.0 * core.heads) / mode.tp
    whole += _linears(block, mode, low)
    second = False
    for x in block.linears:
        if x.name == "router":
            continue
        if not second:
            half += b * x.fan_out * x.active / _split(x, mode, out=True)
        second = not second
    wide = max((x.fan_out * x.active / _split(x, mode, out=True) for x in block.linears), default=0.0)
    work += 2.0 * b * wide
    return Kept(whole, min(half, whole), float(b * h) / share, work)


def _norms(block: Block, mode: Mode, low: int) -> float:
    """Bytes of the norms' inputs and outputs, residual stream included.

    PyTorch's LayerNorm is one kernel; it is told from RMSNorm by its offset: two weights a channel.
    """
    b, h = mode.width, block.hidden
    layer_norm = block.vectors >= 2 * h * block.norms
    total = block.norms * h * _norm(mode, low, apart=not mode.norms and not layer_norm)
    if block.qk_norm:
        width = sum((a.heads + a.kv_heads) * a.qk_dim for a in block.attentions)
        total += width * (float(b) + (4 if not mode.norms and not mode.adapted else 0))
    if mode.dropout:  # masks behind attention and the feed-forward
        total += 2.0 * h
    if mode.adapted in ("attention", "all"):  # the adapters' input behind its dropout, and the mask
        total += (b + 1.0) * h * (1 if mode.adapted == "attention" else 2)
    if mode.adapted == "outputs":
        total += 2.0 * b * h
    if mode.quantised:  # bitsandbytes keeps the input of a 4-bit matrix though it is frozen
        total += b * h * (1 if block.parallel and block.norms == 1 else 2)
    return total


def _norm(mode: Mode, low: int, *, apart: bool) -> float:
    """Bytes of a channel. A norm keeps its input, the matrices behind it its output. Made of several kernels (`apart`: an
    RMSNorm that is not fused) it keeps an fp32 copy in place of the input and, where its gain is trained, the normed tensor."""
    b = mode.width
    kept_input = 4.0 if apart else float(b)
    return kept_input if mode.adapted else kept_input + low + (b if apart and b < 4 else 0)


def _linears(block: Block, mode: Mode, low: int) -> float:
    """Bytes of what lies between the matrices: the feed-forward's inner tensors, latents, the routed tokens' copies."""
    b, total = mode.width, 0.0
    inputs = not mode.adapted or mode.adapted == "all" or mode.quantised
    cores = {a.heads * a.v_dim for a in block.attentions}
    for x in block.linears:
        part = _split(x, mode)
        routed = x.active * (IMBALANCE if mode.ep > 1 and x.copies > 1 else 1.0)
        if x.name == "router":
            total += ROUTING * x.fan_out / (mode.tp if mode.sequence else 1)
        elif x.split == "row" and not _projects(x, cores):
            gated = block.gated
            # in: gate and up (or the one product); act(gate), where it is not made again; their product for this matrix
            inner = (2 if gated else 1) * b + (b if gated and not mode.gates else 0)
            inner += low if inputs else 0
            total += routed * x.fan_in * inner / part
            if mode.adapted == "outputs":
                total += routed * x.fan_in * (2 if gated else 1) * b / part
            if x.copies > 1:  # the tokens' copies, sorted by expert, and what the experts give back
                total += routed * x.fan_out * (low + b) / (mode.tp if mode.sequence else 1)
        elif x.fan_in != block.hidden and x.split == "column" and not x.cross:
            # a latent (MLA): its norm's input and output, on every rank; keys are copied from the product that holds the
            # values, which stays whole
            total += x.fan_in * _norm(mode, low, apart=not mode.norms)
            queried = any(x.fan_out == a.heads * a.qk_dim for a in block.attentions)
            total += 0.0 if queried else b * max(0, x.fan_out - max(cores, default=0)) / part
        if mode.adapted == "outputs" and (x.name in ("q", "k", "v", "o", "qkv") or x.split == "none"):
            total += b * x.fan_out * routed / part
    return total


def _projects(x: Linear, cores: set[int]) -> bool:
    """Whether a matrix is attention's output projection, whose input attention keeps."""
    return x.name in ("o", "cross_o") or (x.name.endswith("_o") and x.fan_in in cores)


def _split(x: Linear, mode: Mode, *, out: bool = False) -> float:
    """Ranks that a matrix's inner tensor is divided over. With experts on ranks of their own, tensor parallelism does not
    divide an expert: each tensor rank routes its own part of the sequence, which divides the tokens all the same."""
    if x.split == "none" or (out and x.split == "row"):
        return mode.tp if mode.sequence else 1
    return mode.tp
