"""`dpo`: direct preference optimisation against the frozen parent (arXiv 2305.18290), by trl.

In: tokenizer, a mix of preference pairs, the parent's model. Out: a Hugging Face model folder.
Identity: as sft, and beta, loss, sft_weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from famc.steps.base import COMMON, Amount, Default, Training, constant, finetune_lr


class Dpo(Training):
    """Direct preference optimisation."""

    DEFAULTS: ClassVar[Mapping[str, Default]] = {
        **COMMON,
        "lr.peak": finetune_lr(1.3e-6, 5e-7, 1e-4, "DPO"),
        "lr.schedule": constant("linear", "linear to the end (Zephyr)"),
        "lr.warmup": constant(0.1, "10 % of the steps (Zephyr)"),
        "lr.min_ratio": constant(0.0, "to nothing"),
        "weight_decay": constant(0.0, "none: the reference holds the model"),
        "epochs": constant(1.0, "one pass: more overfits"),
        "global_batch": constant(32, "32 pairs"),
    }

    beta: float = Field(0.1, gt=0, le=10, description="strength of the pull to the reference")
    loss: Literal["sigmoid", "ipo"] = Field("sigmoid", description="DPO's own loss, or IPO's")
    sft_weight: float = Field(0.2, ge=0, le=10, description="weight of the loss on the chosen answer (RPO)")
    global_batch: int | None = Field(None, ge=1, le=2**20, description="pairs a step")
    # counted in pairs: a budget or a batch in tokens would be read by nothing
    tokens: None = Field(None, description="not for dpo: set steps or epochs")
    batch_tokens: None = Field(None, description="not for dpo: set global_batch")

    def amount(self, values: Mapping[str, Any], data: Amount) -> tuple[float, float]:
        batch = float(values["global_batch"])
        steps = float(values["steps"] or max(1, math.ceil(data.examples * values["epochs"] / batch)))
        pair = 2.0 * min(values["context"], data.tokens / max(data.examples, 1.0))
        return steps * batch * pair, steps
