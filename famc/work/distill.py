"""`distill`, off-policy: the student follows the teacher's distribution on given text, token by token.

In: tokenizer, a mix (text or messages), the teacher, the parent if there is one. Out: a model folder.
Loss: alpha x T^2 x distance + (1 - alpha) x next-token loss (Hinton et al., arXiv 1503.02531, section 2);
the distance is forward KL, reverse KL or Jensen–Shannon (GKD, arXiv 2306.13649, section 3).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from famc.errors import StepFailed
from famc.job import Job
from famc.work.loss import Teacher
from famc.work.rows import load_rows
from famc.work.training import (
    Follow,
    attention,
    hidden_states,
    load_tokenizer,
    save_model,
    start_model,
    train_rows,
)


def run(job: Job, inputs: dict[str, Path], out: Path) -> dict[str, Any]:
    """Train beside the frozen teacher, save."""
    if job.params["mode"] != "off_policy":
        raise StepFailed(f"{job.name}: on-policy distillation has no worker in this version of famc")
    tokenizer = load_tokenizer(inputs["tokenizer"])
    model = start_model(job, inputs, tokenizer)
    theirs = AutoConfig.from_pretrained(inputs["teacher"], local_files_only=True)
    if theirs.vocab_size != job.params["shape"]["vocab"]:
        raise StepFailed(
            f"{job.name}: the teacher has {theirs.vocab_size} rows of vocabulary, "
            f"the student {job.params['shape']['vocab']}",
            "teacher and student must share one tokenizer",
        )
    teacher = AutoModelForCausalLM.from_pretrained(
        inputs["teacher"], dtype=torch.float32, local_files_only=True
    )
    teacher.set_attn_implementation(attention(int(job.params["context"])))
    teacher.eval().requires_grad_(False).to("cuda" if torch.cuda.is_available() else "cpu")
    rows = load_rows(inputs["data"], tokenizer, job.params["context"])
    metrics = train_rows(job, model, rows, out, follow=follow(teacher, job))
    save_model(model, inputs["tokenizer"], out, tokenizer)
    return metrics


def follow(teacher: Any, job: Job) -> Follow:
    """What the teacher says about a batch: its hidden states at the tokens that count, and its head."""
    alpha, temperature = float(job.params["alpha"]), float(job.params["temperature"])
    kind, bf16 = job.params["loss"], job.precision == "bf16"

    def ask(inputs: dict[str, torch.Tensor], kept: torch.Tensor) -> Teacher:
        device = inputs["input_ids"].device.type
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=bf16):
            hidden = hidden_states(teacher, inputs)
        return Teacher(hidden[kept], teacher.get_output_embeddings().weight, kind, alpha, temperature)

    return ask
