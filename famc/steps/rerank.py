"""`rerank`: query and passage are read together, and the model says how well they fit.

In: tokenizer, a mix of pairs, the parent (a decoder or an encoder; none with `lexical`), mined negatives (by the embedder that stands in
front of it) and a teacher when asked for. Out: a sequence classifier with one label; with head yes_no also the language
model whose `yes` and `no` have the same difference. Identity: all but micro_batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from famc.cost.shape import ENCODERS
from famc.steps.base import Amount, Default, Setting, Training, constant
from famc.steps.retrieval import Contrastive, HardNegatives, Lexical

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


class Matching(Lexical):
    """Looking up the query's words in the passage, which a cross-encoder begins with."""

    epochs: float = Field(1.0, gt=0, le=10_000, description="passes over the queries")
    batch: int = Field(32, ge=2, le=2**20, description="queries a step")
    lr: float = Field(0.002, gt=0, le=10, description="peak learning rate of the token table")


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
    lexical: Matching | None = Field(
        None,
        description="without a parent: begin by looking up the query's words in the passage, as BM25 does (bert, 2 layers, 1 head)",
    )
    teacher: str | None = Field(
        None, description="reranker whose scores are learnt (objective distill): variant@size or stage@size"
    )

    def lexical_seconds(self, data: Amount) -> float:
        """CPU-seconds of the lexical start: about 150 queries a second of one core (measured at hidden 384)."""
        return 0.0 if self.lexical is None else self.lexical.epochs * data.examples / 150

    def amount(self, values: Mapping[str, Any], data: Amount) -> tuple[float, float]:
        """A pair has the query and the passage in it."""
        tokens, steps = super().amount(values, data)
        return 2.0 * tokens, steps

    @classmethod
    def references(cls) -> dict[str, str]:
        return {"from": "stage", "data": "data", "teacher": "model"}
