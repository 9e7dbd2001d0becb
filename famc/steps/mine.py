"""`mine`: hard negatives for a mix of pairs, by the embedder that will stand in front, by BM25, or by both.

In: `data` (a mix of pairs) and, unless BM25 works alone, `model` (an embedder). Out: `negatives.parquet` and
`stats.json`. Identity: how many negatives, how far below the positive, the methods and their depth; the data
and the embedder by their keys, so that a newly trained embedder has its negatives mined anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from famc.cost import sums
from famc.cost.of_shape import reader
from famc.cost.shape import Shape
from famc.steps.base import Amount, Work

MOST_TOKENS = 512  # of a text that an encoder reads, unless its positions are fewer
_DEPTH, _DEPTH_A_NEGATIVE = 100, 4


def mine_params(hard_negatives: Mapping[str, Any], has_embedder: bool) -> dict[str, Any]:
    """The worker's parameters. `hard_negatives`: k and margin as the stage has them; methods and depth if given.

    By default both methods where there is an embedder: each finds what the other misses. Depth: the best 100 of each,
    or four candidates a negative, as answers and what may be one are left out.
    """
    k = int(hard_negatives["k"])
    methods = hard_negatives.get("methods") or (["embedder", "bm25"] if has_embedder else ["bm25"])
    return {
        "k": k,
        "margin": float(hard_negatives["margin"]),
        "methods": list(methods),
        "depth": int(hard_negatives.get("depth") or max(_DEPTH, _DEPTH_A_NEGATIVE * k)),
    }


def mine_work(shape: Shape | None, pairs: Amount) -> Work:
    """Every query and passage is encoded once, and every query compared with every passage; or BM25 alone."""
    queries = passages = pairs.examples
    # bm25s on one core: 1.6 M tokens/s to index; a query takes 80 us among 6,500 passages, 260 us among 26,000
    cpu = 1.0 + pairs.tokens / 1.6e6 + queries * (2.5e-5 + 9e-9 * passages)
    if shape is None:
        return Work("cpu", cpu_seconds=cpu, basis=pairs.basis)
    context = min(shape.context, MOST_TOKENS)
    length = min(float(context), max(1.0, pairs.tokens / max(1.0, queries + passages)))
    return Work(
        "infer",
        tokens=pairs.tokens,
        flops=sums.forward_flops(reader(shape), pairs.tokens, length)
        + 2.0 * queries * passages * shape.hidden,
        context=context,
        length=length,
        head="none",
        cpu_seconds=cpu,
        basis=pairs.basis,
    )
