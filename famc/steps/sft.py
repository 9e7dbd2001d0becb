"""`sft`: learns to answer. Loss on the assistant's tokens, end of turn included; whole conversations packed in rows,
each isolated from its neighbours.

In: tokenizer, a mix of messages, the parent's model. Out: a Hugging Face model folder.
Identity: as pretrain, and what the loss is on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from famc.steps.base import COMMON, Default, Training, batch_rows, constant, finetune_lr


class Sft(Training):
    """Supervised fine-tuning on conversations."""

    DEFAULTS: ClassVar[Mapping[str, Default]] = {
        **COMMON,
        "lr.peak": finetune_lr(2e-5, 5e-6, 2e-3, "SFT"),
        "lr.schedule": constant("cosine", "cosine to a tenth"),
        "weight_decay": constant(0.01, "light, as the model is already trained"),
        "epochs": constant(2.0, "two passes"),
        "batch_tokens": batch_rows(32),
    }

    loss_on: Literal["assistant", "all"] = Field("assistant", description="tokens that the loss counts")
    modes: tuple[str, ...] = Field(
        (), description="thinking modes that the template renders, e.g. [think, no_think]"
    )
