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
from famc.work.rows import IGNORE, load_rows
from famc.work.training import Blend, attention, load_tokenizer, save_model, start_model, train_rows


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
    metrics = train_rows(job, model, rows, out, blend=follow(teacher, job))
    save_model(model, inputs["tokenizer"], out, tokenizer)
    return metrics


def follow(teacher: Any, job: Job) -> Blend:
    """The blend of next-token loss and distance to the teacher."""
    alpha, temperature = float(job.params["alpha"]), float(job.params["temperature"])
    kind, bf16 = job.params["loss"], job.precision == "bf16"

    def blend(
        loss: torch.Tensor, inputs: dict[str, torch.Tensor], logits: torch.Tensor, count: Any
    ) -> torch.Tensor:
        with (
            torch.no_grad(),
            torch.autocast("cuda" if logits.is_cuda else "cpu", torch.bfloat16, enabled=bf16),
        ):
            wanted = teacher(
                input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False
            ).logits
        kept = inputs["labels"].reshape(-1) != IGNORE
        theirs = wanted.reshape(-1, wanted.shape[-1])
        if not bool(kept.all()):
            theirs, logits = theirs[kept], logits[kept]
        gap = distance(logits.float() / temperature, theirs.float() / temperature, kind).sum() / count
        mixed: torch.Tensor = alpha * temperature**2 * gap + (1.0 - alpha) * loss
        return mixed

    return blend


def distance(student: torch.Tensor, teacher: torch.Tensor, kind: str) -> torch.Tensor:
    """[tokens] distances between rows of logits: forward_kl = KL(teacher || student), reverse_kl, jsd at
    1/2.
    """
    mine, theirs = torch.log_softmax(student, dim=-1), torch.log_softmax(teacher, dim=-1)
    if kind == "forward_kl":
        return _kl(theirs, mine)
    if kind == "reverse_kl":
        return _kl(mine, theirs)
    middle = torch.logsumexp(torch.stack([mine, theirs]), dim=0) - torch.log(torch.tensor(2.0))
    return 0.5 * (_kl(theirs, middle) + _kl(mine, middle))


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    gap: torch.Tensor = (p.exp() * (p - q)).sum(dim=-1)
    return gap
