"""What embedders and rerankers share: budgets in pairs, mined negatives, averaged checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field

from famc.spec.family import Strict
from famc.steps.base import COMMON, Amount, Default, Resolved, Training, constant, finetune_lr


class Merge(Strict):
    """Average of the last checkpoints."""

    method: Literal["slerp", "linear"] = Field(
        "slerp", description="along the arc between weights, as Qwen3-Embedding, or straight"
    )
    last: int = Field(4, ge=2, le=64, description="checkpoints, evenly over the last half of the steps")


class HardNegatives(Strict):
    """Mined negatives: passages that look like an answer."""

    k: int = Field(7, ge=1, le=1000, description="negatives a query")
    margin: float = Field(0.0, ge=0, le=2, description="must score so much below the positive")
    by: str | None = Field(
        None,
        description="embedder that mines, or bm25; default: the parent, or the family's embedder, with BM25",
    )


class Lexical(Strict):
    """The words that an encoder begins with: its token table is trained alone, before the layers."""

    epochs: float = Field(20.0, gt=0, le=10_000, description="passes over the pairs")
    batch: int = Field(1024, ge=2, le=2**20, description="queries a step")
    lr: float = Field(0.01, gt=0, le=10, description="peak learning rate of the token table")


class Contrastive(Training):
    """What both kinds may say: they read pairs, and their batches are counted in pairs."""

    DEFAULTS: ClassVar[Mapping[str, Default]] = {
        **COMMON,
        "lr.peak": finetune_lr(2e-5, 5e-6, 2e-3, "as fine-tuning"),
        "lr.schedule": constant("cosine", "cosine to a tenth"),
        "weight_decay": constant(0.01, "light, as the model is already trained"),
        "epochs": constant(1.0, "one pass"),
        "global_batch": constant(128, "128 queries"),
    }

    global_batch: int | None = Field(None, ge=2, le=2**20, description="queries a step")
    hard_negatives: HardNegatives | None = Field(
        None, description="mined negatives; default: the batch's own"
    )
    merge: Merge | None = Field(None, description="average of the last checkpoints")
    text: Literal["as_is", "words"] = Field(
        "as_is",
        description="words: the tokenizer lower-cases, splits identifiers and drops punctuation, in queries and passages",
    )
    # counted in pairs: a budget or a batch in tokens would be read by nothing
    tokens: None = Field(None, description="not for this kind: set steps or epochs")
    batch_tokens: None = Field(None, description="not for this kind: set global_batch")
    rope_theta: None = Field(None, description="not for this kind: it keeps the parent's positions")
    lora: None = Field(None, description="not for this kind yet")

    def written(self, origin: Callable[[str], str | None]) -> Resolved:
        """Of mined negatives, how many: the step that mines, an input, says how and by whom."""
        found = super().written(origin)
        wanted = {"k": self.hard_negatives.k} if self.hard_negatives else None
        return replace(found, values={**found.values, "hard_negatives": wanted})

    def rows_a_query(self) -> int:
        """What the model reads for each query: for a reranker one pair a passage."""
        return 1 + (self.hard_negatives.k if self.hard_negatives else 0)

    def amount(self, values: Mapping[str, Any], data: Amount) -> tuple[float, float]:
        batch = float(values["global_batch"])
        steps = float(values["steps"] or max(1, math.ceil(data.examples * values["epochs"] / batch)))
        text = min(float(values["context"]), data.tokens / max(2.0 * data.examples, 1.0))
        return steps * batch * text * self.rows_a_query(), steps
