"""`embed`: text becomes a vector; near texts, near vectors. InfoNCE with in-batch and mined negatives (arXiv 1807.03748).

In: tokenizer, a mix of pairs, the parent (a decoder, a masked LM, or an embedder), mined negatives and a teacher when
asked for. Out: a folder of sentence-transformers with pooling and prompts. Identity: all but micro_batch, as gradients
are cached over the whole batch (GradCache, arXiv 2101.06983): the batch's negatives never depend on memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from famc.cost.shape import ENCODERS
from famc.spec.family import Strict
from famc.steps.base import Amount, Default, LexicalStart, Setting, Training
from famc.steps.retrieval import Contrastive, Lexical

CLOZE_FOUND = 0.75
"""Share of the sentences that inverse cloze asks for which passages have: of docstrings, at two sentences each. Assumed."""


TEXTS_A_PAIR = 1.5
"""Different texts for each pair, as passages answer several queries. Measured at 7,000 and at 75,000 pairs."""


class Prompts(Strict):
    """What stands before a text, so that one model serves several uses."""

    query: str = Field("", max_length=2000, description="before a query")
    document: str = Field("", max_length=2000, description="before a passage")


def _pooling(stage: Training, setting: Setting) -> tuple[str, str]:
    if isinstance(stage, Embed) and stage.lexical:
        return "cls", "default: a lexical start gathers the words there"
    encoder = setting.shape.arch in ENCODERS
    return (
        ("mean", "default: an encoder's tokens see each other")
        if encoder
        else ("last", "default: only a decoder's last token has seen all")
    )


class Embed(Contrastive):
    """Contrastive text embeddings."""

    DEFAULTS: ClassVar[Mapping[str, Default]] = {**Contrastive.DEFAULTS, "pooling": _pooling}

    loss: Literal["infonce"] = Field("infonce", description="contrastive loss")
    temperature: float = Field(0.05, gt=0, le=10, description="of the similarities")
    symmetric: bool = Field(True, description="passages look for their queries as well")
    false_negatives: float | None = Field(
        0.1,
        ge=0,
        le=2,
        description="what is nearer to the query than its positive by so much is no negative (Qwen3-Embedding); null: off",
    )
    pooling: Literal["last", "mean", "cls"] | None = Field(
        None, description="token(s) that become the vector; default: last for decoders, mean for encoders"
    )
    bidirectional: bool = Field(False, description="a decoder's tokens see what follows (qwen3)")
    lexical: Lexical | None = Field(
        None,
        description="without a parent: begin as a bag of words weighted by rarity, which small encoders can't learn (bert)",
    )
    cloze: int = Field(
        0,
        ge=0,
        le=100,
        description="sentences of each passage that ask for the rest of it, as more pairs (inverse cloze task, arXiv 1906.00300)",
    )
    mrl: tuple[Annotated[int, Field(ge=1, le=2**20)], ...] = Field(
        (), description="Matryoshka dimensions: prefixes that are vectors too (arXiv 2205.13147)"
    )
    prompts: Prompts = Field(Prompts(), description="instructions, saved with the model")
    teacher: str | None = Field(
        None, description="embedder whose similarities are learnt as well: variant@size or stage@size"
    )
    alpha: float = Field(
        0.5, ge=0, le=1, description="weight of the teacher; the rest is the contrastive loss"
    )

    def lexical_start(self, data: Amount, hidden: int) -> LexicalStart | None:
        """The start as a bag of words, if there is one: every pair so many times, with its negatives, at each width."""
        if self.lexical is None:
            return None
        steps = math.ceil(self.lexical.epochs * self.with_cloze(data).examples / self.lexical.batch)
        return LexicalStart(steps, self.lexical.batch, self.rows_a_query(), (hidden, *self.mrl))

    def reading_seconds(self, data: Amount) -> float:
        """CPU-seconds in which all texts are read and tokenised: about 3,300 pairs a second, with one and a half texts of
        their own each (0.3 s and 23 s measured for 7,000 and 75,000 pairs)."""
        return self.with_cloze(data).examples / 3.3e3

    def reading_bytes(self, data: Amount) -> float:
        """Bytes of all texts with their tokens: about 1.7 GB more for 103,000 more texts, of 59 tokens, was measured once."""
        return TEXTS_A_PAIR * self.with_cloze(data).examples * 14e3

    def with_cloze(self, data: Amount) -> Amount:
        """With the pairs of the inverse cloze task: of each passage once, and fewer where it has not so many sentences."""
        more = CLOZE_FOUND * self.cloze * (data.distinct or data.examples)
        each = data.tokens / data.examples if data.examples else 0.0
        return Amount(data.tokens + more * each, data.examples + more, data.basis)

    def rows_a_query(self) -> int:
        """The query itself, and every passage alone."""
        return 1 + super().rows_a_query()

    def amount(self, values: Mapping[str, Any], data: Amount) -> tuple[float, float]:
        return super().amount(values, self.with_cloze(data))

    @classmethod
    def references(cls) -> dict[str, str]:
        return {"from": "stage", "data": "data", "teacher": "model"}
