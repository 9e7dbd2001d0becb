"""How much work a trained stage is: tokens, FLOPs and steps by kind. Pure arithmetic over famc.cost.

GRPO: each prompt's group is generated, scored and learnt from. DPO: policy and reference read both answers. Distillation:
the teacher reads what the student reads. Embedding and reranking: every text of a pair is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from famc.cost import flops
from famc.cost.shape import Shape
from famc.steps.base import Amount, Training, Work
from famc.steps.distill import Distill
from famc.steps.dpo import Dpo
from famc.steps.later import Grpo
from famc.steps.retrieval import Contrastive


def train_work(
    stage: Training, shape: Shape, values: Mapping[str, Any], data: Amount, teacher: Shape | None, params: int
) -> Work:
    """The work of a stage at a shape, with its resolved values."""
    tokens, steps = stage.amount(values, data)
    context = int(values["context"])
    total = flops.training(shape, tokens, context)
    if values.get("lora"):
        total *= 2.0 / 3.0  # no gradients of the frozen weights: forward and the backward through activations
    if isinstance(stage, Dpo):
        total += flops.forward(shape, tokens, context)  # the reference's log-probabilities, computed once
    if isinstance(stage, Grpo):
        # one generation, one pass of the old policy and one of the reference for each learnt token
        total += 3.0 * flops.forward(shape, tokens, context)
    if isinstance(stage, Distill) and teacher is not None:
        total += flops.forward(teacher, tokens, context)
    if isinstance(stage, Contrastive) and teacher is not None:
        total += flops.forward(teacher, tokens, context)
    sequences = float(values.get("global_batch") or max(1, values["batch_tokens"] // context))
    rows = 2 if isinstance(stage, Dpo) else stage.rows_a_query() if isinstance(stage, Contrastive) else 1
    return Work(
        "train", tokens=tokens, flops=total, optimizer_steps=steps, sequences=sequences, context=context, rows=rows, head=not isinstance(stage, Contrastive),
        cpu_seconds=stage.lexical_seconds(data) if isinstance(stage, Contrastive) else 0.0, basis=data.basis if not (values["steps"] or values["tokens"]) else "modelled",
    )  # fmt: skip
