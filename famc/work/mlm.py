"""Masked language modelling: `pretrain` at bert and modernbert.

In: a mix of text. A row is `cls tokens sep`, cut from one document. A fixed share of its tokens is hidden, chosen anew
each time it is read; the loss is on these alone, and so is the output head. Which tokens are hidden is a function of
the seed and the row's number in training order: a job that resumes hides the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from famc.job import Job
from famc.work.marks import Marks, marks_of
from famc.work.pieces import Pieces, collated, generator, grouped, load_pieces
from famc.work.rows import IGNORE, Array
from famc.work.training import Batch, Order, Scored, train_examples

STREAM = 1  # sets the draws of this kind apart from others of the same seed


@dataclass(frozen=True, slots=True)
class Masking:
    """Which share of a row is hidden; of these, how many become the mask and how many a random token. What is left
    stays as it is, and has to be predicted all the same."""

    rate: float
    masked: float = 1.0
    random: float = 0.0


MASKING = {
    "bert": Masking(0.15, 0.8, 0.1),  # arXiv 1810.04805, section 3.1
    # the rate that ModernBERT's paper gives (arXiv 2412.13663). The mask alone is this project's choice, the simplest one:
    # what the authors put in the hidden places was not looked up
    "modernbert": Masking(0.30),
}


def hide(
    ids: Array, masking: Masking, draw: np.random.Generator, mask: int, words: Array
) -> tuple[Array, Array]:
    """(what the model sees, labels) of a text without marks. `words`: ids that a random token is drawn from."""
    count = max(1, round(masking.rate * len(ids)))
    chosen = draw.permutation(len(ids))[:count]
    shown, labels = ids.copy(), np.full(len(ids), IGNORE, dtype=np.int64)
    labels[chosen] = ids[chosen]
    fate = draw.random(count)
    shown[chosen[fate < masking.masked]] = mask
    other = chosen[(fate >= masking.masked) & (fate < masking.masked + masking.random)]
    shown[other] = words[draw.integers(len(words), size=len(other))]
    return shown, labels


def ordinary(tokenizer: Any) -> Array:
    """Ids of tokens that stand in texts: all but the special ones."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return np.array([i for i in range(len(tokenizer)) if i not in special], dtype=np.int64)


class MaskedRows(torch.utils.data.Dataset[Batch]):
    """Rows in training order, each with tokens hidden."""

    def __init__(
        self, pieces: Pieces, order: Order, masking: Masking, marks: Marks, words: Array, seed: int
    ) -> None:
        self.pieces, self.order, self.seed = pieces, order, seed
        self.masking, self.marks, self.words = masking, marks, words

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Batch:
        ids = self.pieces[int(self.order[index])]
        draw = generator(self.seed, STREAM, index)
        shown, labels = hide(ids, self.masking, draw, self.marks.mask, self.words)
        return {
            "input_ids": torch.from_numpy(np.concatenate([[self.marks.cls], shown, [self.marks.sep]])),
            "labels": torch.from_numpy(np.concatenate([[IGNORE], labels, [IGNORE]])),
        }


def score_masked(model: Any, inputs: Batch) -> Scored:
    """The hidden tokens alone go through the head: at 15 % that is a seventh of its work.

    The head's bias is one more column of its weight, against hidden states that end in 1.
    """
    states = model.base_model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])[0]
    labels = inputs["labels"].reshape(-1)
    kept = labels != IGNORE
    hidden, decoder = output_head(model, states.reshape(-1, states.shape[-1])[kept])
    ones = hidden.new_ones(len(hidden), 1)
    weight = torch.cat([decoder.weight, decoder.bias[:, None]], dim=1)
    return Scored(torch.cat([hidden, ones], dim=1), weight, labels[kept], kept)


def output_head(model: Any, states: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """(states before the vocabulary, the layer that makes logits of them)."""
    if model.config.model_type == "bert":
        return model.cls.predictions.transform(states), model.cls.predictions.decoder
    return model.head(states), model.decoder


def train_masked(job: Job, model: Any, data: Path, tokenizer: Any, out: Path) -> dict[str, Any]:
    """Train on a mix of text; the step's metrics."""
    params, marks, words = job.params, marks_of(tokenizer), ordinary(tokenizer)
    masking, context = MASKING[params["shape"]["arch"]], int(params["context"])
    pieces = load_pieces(data, context - 2)

    def ordered(order: Order, batch: int) -> tuple[MaskedRows, float]:
        order = grouped(order, batch, pieces.lengths)
        rows = MaskedRows(pieces, order, masking, marks, words, int(params["seed"]))
        return rows, float((pieces.lengths[order] + 2).sum())

    metrics = train_examples(
        job, model, len(pieces), ordered, out, collate=partial(collated, pad=marks.pad), score=score_masked
    )
    fill = float((pieces.lengths + 2).sum()) / (len(pieces) * context)
    return {**metrics, "rows": len(pieces), "fill": round(fill, 4), "mask_rate": masking.rate}
