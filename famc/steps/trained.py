"""How much work a trained stage is, by kind: tokens, FLOPs, steps, and what a pass consists of. Pure arithmetic over famc.cost.

GRPO: each prompt's group is generated, scored and learnt from. DPO: policy and reference read both answers. Distillation:
the teacher reads what the student reads. Embedding and reranking: every text of a pair is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from famc.cost import sums
from famc.cost.of_shape import anatomy, reader
from famc.cost.shape import Shape
from famc.steps.base import Amount, Training, Work
from famc.steps.distill import Distill
from famc.steps.dpo import Dpo
from famc.steps.embed import Embed
from famc.steps.later import Grpo
from famc.steps.rerank import Rerank
from famc.steps.retrieval import Contrastive
from famc.steps.sft import Sft

DPO_PADDING = 1.4
"""Longest over mean length of a batch of preference pairs, which trl does not sort: famc's own; assumed for other data."""
RANK_PADDING = 1.2
"""The same of a reranker's pairs, which run in passes of like length: of log-normal lengths (sigma 0.6), 32 pairs at once."""


def train_work(
    stage: Training, shape: Shape, values: Mapping[str, Any], data: Amount, teacher: Shape | None
) -> Work:
    """The work of a stage at a shape, with its resolved values."""
    tokens, steps = stage.amount(values, data)
    context = int(values["context"])
    sequences = float(values.get("global_batch") or max(1, values["batch_tokens"] // context))
    basis = data.basis if not (values["steps"] or values["tokens"]) else "modelled"
    shared: dict[str, Any] = {
        "tokens": tokens, "optimizer_steps": steps, "sequences": sequences, "context": context, "basis": basis,
        "cpu_seconds": 0.0, "teachers": () if teacher is None else (teacher,),
        "shapes": context if isinstance(stage, Sft | Dpo | Contrastive) else 1,
    }  # fmt: skip
    rows = 1
    if isinstance(stage, Dpo):
        # the reference's log-probabilities are taken once, before the first step, by the model itself
        rows = 2
        shared |= {"teachers": (shape,), "head": "logits", "varied": True, "padding": DPO_PADDING}
    elif isinstance(stage, Contrastive):  # texts run in passes of like length
        rows = stage.rows_a_query()
        padding = 1.0 if isinstance(stage, Embed) else RANK_PADDING
        shared |= {"head": "none", "varied": True, "padding": padding}
    if isinstance(stage, Embed):
        shared |= {
            "cached": True, "lexical": stage.lexical_start(data, shape.hidden),
            "cpu_seconds": stage.reading_seconds(data), "host_bytes": stage.reading_bytes(data),
        }  # fmt: skip
    if isinstance(stage, Rerank):
        shared["cpu_seconds"] = stage.lexical_seconds(data)
    if isinstance(stage, Grpo):  # the policy that wrote the answers, and the reference beside it
        shared |= {"teachers": (shape, shape), "beside": 1, "generated": tokens}
    if isinstance(stage, Distill):
        shared |= {"follow": True, "beside": 1, "generated": tokens if stage.mode == "on_policy" else 0.0}
    if shared.get("varied"):
        shared["length"] = tokens / max(1.0, steps * sequences * rows)
    made = reader if shared.get("head") == "none" else anatomy
    text = shared.get("length") or float(context)
    flops = (2.0 if values.get("lora") else 3.0) * sums.forward_flops(made(shape), tokens, text)
    flops += sum(sums.forward_flops(made(t), tokens, text) for t in shared["teachers"])
    if shared.get("generated"):
        flops += sums.forward_flops(made(shape), tokens, text)
    return Work("train", flops=flops, rows=rows, **shared)
