"""`sft`: the loss is on the assistant's tokens; at t5, on the answer to what the user says last.

In: tokenizer, a mix of messages, the parent. Out: a model folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from famc.cost.shape import ENCODER_DECODERS
from famc.job import Job
from famc.work.rows import load_rows
from famc.work.seq2seq import train_answers
from famc.work.training import load_tokenizer, save_model, start_model, train_rows


def run(job: Job, inputs: dict[str, Path], out: Path) -> dict[str, Any]:
    """Pack whole conversations, or pair their last two turns; train, save."""
    tokenizer = load_tokenizer(inputs["tokenizer"])
    model = start_model(job, inputs, tokenizer)
    if job.params["shape"]["arch"] in ENCODER_DECODERS:
        metrics = train_answers(job, model, inputs["data"], tokenizer, out)
    else:
        rows = load_rows(inputs["data"], tokenizer, job.params["context"], loss_on=job.params["loss_on"])
        metrics = train_rows(job, model, rows, out)
    save_model(model, inputs["tokenizer"], out, tokenizer)
    return metrics
