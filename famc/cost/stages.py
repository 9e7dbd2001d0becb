"""Which blocks and weights lie on a device: pipeline stages, tensor and expert ranks.

In: an Anatomy and degrees of parallelism. Out: Stage, Weights. Bears no identity.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from famc.cost.anatomy import Anatomy, Linear
from famc.cost.sums import block_weights


@dataclass(frozen=True, slots=True)
class Stage:
    """`share` of all blocks; `flight`: micro-batches whose activations of all of the stage's blocks wait for their backward
    pass; whether it holds the embedding (`first`) and the head (`last`)."""

    share: float
    flight: float
    first: bool
    last: bool


@lru_cache(maxsize=65536)
def stages(anatomy: Anatomy, pp: int, vpp: int, micro: int, balanced: bool = False) -> tuple[Stage, ...]:
    """The stages that may be the fullest: the first, the second, the last (of one or two, those).

    Blocks are dealt out evenly; where they don't divide, the first stage and then the last get one less, for they hold the
    embedding and the head (so MLPerf's Llama 3.1 405B: 126 blocks on 8). `balanced`: the head counts as the blocks that
    have as many weights. In flight under 1F1B: one micro-batch and one for each stage behind (Narayanan et al. 2021,
    arXiv:2104.04473, section 2.2.1), never more than there are; interleaved: twice the stages behind, and all of the rank's
    chunks but one for each stage (section 2.2.2, and Megatron-LM's forward_backward_pipelining_with_interleaving).

    ValueError where there are more stages than blocks.
    """
    layers = sum(s.layers for s in anatomy.stacks)
    if pp > layers or pp * vpp > layers + 2:  # an embedding and a head may be chunks of their own
        raise ValueError(f"pp {pp} x vpp {vpp}: there are only {layers} layers to divide")
    if pp == 1:
        return (Stage(1.0, 1.0, True, True),)
    if balanced:
        last = anatomy.stacks[-1].block
        each = float(-(-(layers + anatomy.vocab * last.hidden / block_weights(last)) // pp))
        counts = [each, each, max(1.0, layers - each * (pp - 1))]
    else:
        each = float(-(-layers // pp))
        lacking = each * pp - layers
        counts = [each - (lacking >= 1), each, each - (lacking >= 2)]
    places = [0, 1, pp - 1]
    if pp == 2:
        del counts[1], places[1]
        if not balanced:
            counts = [each - (layers < 2 * each), each]
    return tuple(
        Stage(count / layers, _flight(pp - 1 - place, pp, vpp, micro), place == 0, place == pp - 1)
        for place, count in zip(places, counts, strict=True)
    )


def _flight(behind: int, pp: int, vpp: int, micro: int) -> float:
    if vpp == 1:
        return float(min(behind + 1, micro))
    return min(2 * behind + (vpp - 1) * pp + 1, micro * vpp) / vpp


@dataclass(frozen=True, slots=True)
class Weights:
    """Numbers of one device, before data ranks divide them. `dense`, `experts`: of all blocks; `block`: of the largest one,
    its experts included; `below`: tables and what stands before the blocks; `above`: the untied head; `tied`: the table that
    is the head too; `matrix`: the largest matrix of a block."""

    dense: float
    experts: float
    block: float
    below: float
    above: float
    tied: float
    matrix: float


@lru_cache(maxsize=4096)
def weights(anatomy: Anatomy, tp: int, ep: int) -> Weights:
    """Where ep > 1, experts lie whole on ranks of their own (Megatron-Core with expert_tensor_parallel_size 1); else tensor
    parallelism divides each. What it does not divide, norms and the router, is on every rank."""
    dense = experts = block = matrix = 0.0
    for s in anatomy.stacks:
        own, routed = float(s.block.vectors), 0.0
        for x in s.block.linears:
            if x.copies > 1:
                routed += x.weights / (ep if ep > 1 else tp)
            else:
                own += x.weights / split(x, tp)
            matrix = max(matrix, x.fan_in * x.fan_out / split(x, tp))
        dense += s.layers * own
        experts += s.layers * routed
        block = max(block, own + routed)
    below = sum(t.weights / (tp if t.name == "tokens" else 1) for t in anatomy.tables)
    below += anatomy.vectors + sum(x.weights / split(x, tp) for x in anatomy.linears)
    tied = sum(t.weights / tp for t in anatomy.tables if t.head)
    return Weights(
        dense, experts, block, below, anatomy.head.weights / tp if anatomy.head else 0.0, tied, matrix
    )


def split(linear: Linear, tp: int) -> int:
    """Tensor ranks that a matrix outside of experts is divided over."""
    return 1 if linear.split == "none" else tp
