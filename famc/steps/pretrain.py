"""`pretrain`: next-token prediction on a packed mix, from scratch or (with `from`) continued.

In: tokenizer, mix, and the parent's model when continued. Out: a Hugging Face model folder.
Identity: data, budget, batch, schedule, optimiser, context, seed. Not: micro_batch, checkpoint_steps, recompute.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field

from famc.steps.base import COMMON, Default, Training, constant, pretrain_batch, pretrain_lr


class Pretrain(Training):
    """Next-token prediction on a mix."""

    DEFAULTS: ClassVar[Mapping[str, Default]] = {
        **COMMON,
        "lr.peak": pretrain_lr,
        "lr.schedule": constant("cosine", "cosine to a tenth (Llama)"),
        "batch_tokens": pretrain_batch,
    }

    fim: float | None = Field(None, ge=0, le=1, description="share of documents as fill-in-the-middle")
    z_loss: float = Field(0.0, ge=0, le=1, description="weight of log(Z)^2 (PaLM: 1e-4)")
