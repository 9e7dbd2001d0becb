"""`pretrain`: next-token prediction on packed text; masked language modelling at bert and modernbert, span corruption
at t5.

In: tokenizer, mix, the parent when continued. Out: a model folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from famc.cost.shape import ENCODER_DECODERS, ENCODERS
from famc.job import Job
from famc.work.mlm import train_masked
from famc.work.rows import load_rows
from famc.work.seq2seq import train_spans
from famc.work.training import load_tokenizer, save_model, start_model, train_rows


def run(job: Job, inputs: dict[str, Path], out: Path) -> dict[str, Any]:
    """Train and save."""
    tokenizer = load_tokenizer(inputs["tokenizer"])
    model = start_model(job, inputs, tokenizer)
    arch = job.params["shape"]["arch"]
    if arch in ENCODERS:
        metrics = train_masked(job, model, inputs["data"], tokenizer, out)
    elif arch in ENCODER_DECODERS:
        metrics = train_spans(job, model, inputs["data"], tokenizer, out)
    else:
        rows = load_rows(inputs["data"], tokenizer, job.params["context"])
        metrics = train_rows(job, model, rows, out)
    save_model(model, inputs["tokenizer"], out, tokenizer)
    return metrics
