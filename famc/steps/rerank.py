"""`rerank`: query and passage are read together, and the model says how well they fit.

In: tokenizer, a mix of pairs, the parent (a decoder or an encoder), mined negatives (by the embedder that stands in
front of it) and a teacher when asked for. Out: a sequence classifier with one label; with head yes_no also the language
model whose `yes` and `no` have the same difference. Identity: all but micro_batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from famc.cost.shape import ENCODERS
from famc.steps.base import Amount, Default, Setting, Training, constant
from famc.steps.retrieval import Contrastive, HardNegatives

LOSSES: dict[str, tuple[str, ...]] = {
    "pointwise": ("bce",),
    "pairwise": ("ranknet",),
    "listwise": ("listnet", "lambda", "plistmle"),
    "distill": ("margin_mse", "kl"),
}


def _head(stage: Training, setting: Setting) -> tuple[str, str]:
    encoder = setting.shape.arch in ENCODERS
    return (
        ("classifier", "default: encoders have no next token")
        if encoder
        else ("yes_no", "default: the language model's own answer (Qwen3-Reranker)")
    )


def _loss(stage: Training, setting: Setting) -> tuple[str, str]:
    assert isinstance(stage, Rerank)
    first = LOSSES[stage.objective][0]
    return first, f"default: {stage.objective}"


class Rerank(Contrastive):
    """Cross-encoder."""

    DEFAULTS: ClassVar[Mapping[str, Default]] = {
        **Contrastive.DEFAULTS,
        "global_batch": constant(16, "16 queries with their passages"),
        "head": _head,
        "loss": _loss,
    }

    head: Literal["yes_no", "classifier"] | None = Field(
        None, description="how the score is read; default: yes_no for decoders, classifier for encoders"
    )
    objective: Literal["pointwise", "pairwise", "listwise", "distill"] = Field(
        "pointwise",
        description="what is compared: one pair, two, a query's whole list, or a teacher's scores",
    )
    loss: Literal["bce", "ranknet", "listnet", "lambda", "plistmle", "margin_mse", "kl"] | None = Field(
        None,
        description="pointwise: bce; pairwise: ranknet; listwise: listnet, lambda, plistmle; distill: margin_mse, kl",
    )
    hard_negatives: HardNegatives | None = Field(
        HardNegatives(), description="mined negatives: a reranker has no others"
    )
    teacher: str | None = Field(
        None, description="reranker whose scores are learnt (objective distill): variant@size or stage@size"
    )

    def amount(self, values: Mapping[str, Any], data: Amount) -> tuple[float, float]:
        """A pair has the query and the passage in it."""
        tokens, steps = super().amount(values, data)
        return 2.0 * tokens, steps

    @classmethod
    def references(cls) -> dict[str, str]:
        return {"from": "stage", "data": "data", "teacher": "model"}
