"""`distill`: a size learns from another model of its family.

off_policy: the teacher's distribution on given text, token by token (forward KL, reverse KL or Jensen–Shannon,
arXiv 2306.13649), mixed with next-token loss. on_policy: on what the student writes itself.
In: tokenizer, a mix (text or messages), teacher, and the parent when it does not start from scratch. Out: a model folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from famc.steps.base import (
    COMMON,
    Default,
    Setting,
    Training,
    batch_rows,
    constant,
    finetune_lr,
    pretrain_batch,
    pretrain_lr,
)


def _lr(stage: Training, setting: Setting) -> tuple[float, str]:
    fill = finetune_lr(2e-5, 5e-6, 2e-3, "as SFT") if stage.from_ else pretrain_lr
    return fill(stage, setting)


def _batch(stage: Training, setting: Setting) -> tuple[int, str]:
    fill = batch_rows(32) if stage.from_ else pretrain_batch
    return fill(stage, setting)


class Distill(Training):
    """Knowledge distillation between sizes of a family."""

    DEFAULTS: ClassVar[Mapping[str, Default]] = {
        **COMMON,
        "lr.peak": _lr,
        "lr.schedule": constant("cosine", "cosine to a tenth"),
        "batch_tokens": _batch,
        "epochs": constant(1.0, "one pass"),
    }

    teacher: str = Field(description="variant@size, stage@size, or a variant or stage at the same size")
    mode: Literal["off_policy", "on_policy"] = Field(
        "off_policy", description="whose text the student learns on"
    )
    loss: Literal["forward_kl", "reverse_kl", "jsd"] = Field(
        "forward_kl", description="distance to the teacher"
    )
    temperature: float = Field(1.0, gt=0, le=100, description="of both distributions")
    alpha: float = Field(0.5, ge=0, le=1, description="weight of the teacher; the rest is next-token loss")

    @classmethod
    def references(cls) -> dict[str, str]:
        return {"from": "stage", "data": "data", "teacher": "model"}
