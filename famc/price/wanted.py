"""A training step's question to the layout search: what is the same for GPUs and CPUs.

In: a Node, a Hardware. Out: Wanted, Priced, as the trainers of famc.work run such a step. Bears no identity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from famc.cost import sums
from famc.cost.anatomy import Anatomy
from famc.cost.of_shape import anatomy, reader
from famc.cost.parameters import count
from famc.cost.search import Priced, Wanted
from famc.cost.shape import Shape
from famc.graph import Node
from famc.hardware import Hardware
from famc.steps.base import Work

Forced = dict[str, int | str]
Found = TypeVar("Found", Priced, tuple[Priced, ...])
RUN_HERE = ("none", "full")
"""Recomputation that famc's trainers have."""


def model_of(shape: Shape, work: Work) -> Anatomy:
    """A model as the step runs it: with logits or without."""
    return reader(shape) if work.head == "none" else anatomy(shape)


def forced(node: Node) -> Forced:
    """What the spec fixes of the layout."""
    return {k: node.runtime[k] for k in ("micro_batch", "recompute") if node.runtime.get(k) is not None}


def adapted(node: Node, model: Anatomy) -> int | None:
    """Weights of adapters, where nothing else is trained."""
    lora = node.params.get("lora")
    return sums.adapters(model, int(lora["r"])) if lora else None


def wanted(node: Node, where: Hardware, precision: str) -> Wanted:
    """The step at its longest: memory has to hold texts as long as the context. A global batch is counted in queries or pairs,
    each of `rows` texts."""
    assert node.shape is not None
    work, model = node.work, model_of(node.shape, node.work)
    trained = adapted(node, model)
    beside = sum(count(t).total for t in work.teachers[len(work.teachers) - work.beside :])
    cpu = where.accelerator.kind == "cpu"
    return Wanted(
        anatomy=model,
        device=where.accelerator.device,
        seq_len=work.context,
        global_batch=max(1, round(work.sequences)),
        nodes=where.nodes,
        per_node=where.per_node,
        precision=precision,
        runtime=where.runtime,
        optimizer=node.params.get("optimizer", "adamw"),
        trained=trained,
        adapters=trained is not None,
        fused_loss=work.head == "fused",
        rows=work.rows,
        shapes=work.shapes,
        beside=beside * (2 if cpu else 1),  # on a CPU models lie in memory with 32 bits
        recomputes=RUN_HERE if cpu or where.runtime == "accelerate" else ("none", "selective", "full"),
    )


def found(work: Work, asked: Wanted, search: Callable[[Wanted], Found]) -> Found:
    """What the search finds. GradCache embeds one text of each query at a time, in micro-batches that need no room for
    the others; unless the whole batch is one micro-batch, which is run plainly (famc.work.embed)."""
    if not work.cached:
        return search(asked)
    made = search(replace(asked, rows=1, document=asked.seq_len if asked.rows > 1 else None))
    whole = made if isinstance(made, tuple) else (made,)
    return search(asked) if any(p.layout.grad_accum == 1 for p in whole) else made
