"""Texts of a mix, cut to what a model reads at once: never two documents in one piece.

In: a mix's stream, whose documents end with its `end_id`. Out: where each piece starts and how long it is, in the
stream's order; batches of pieces of different lengths, padded on the right.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from famc.errors import StepFailed
from famc.work.rows import IGNORE, Array


@dataclass(frozen=True, slots=True)
class Pieces:
    """Runs of a stream, within documents and without their end marks."""

    stream: Array
    starts: Array
    lengths: Array

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Array:
        start = int(self.starts[index])
        return np.asarray(self.stream[start : start + int(self.lengths[index])]).astype(np.int64)


def load_pieces(data: Path, longest: int, shortest: int = 1) -> Pieces:
    """The documents of a mix of text in runs of `longest` tokens, the last of each as it comes; a run of fewer than
    `shortest` is left out."""
    if not (data / "tokens.npy").is_file():
        raise StepFailed(f"{data} is no mix of text: it has no tokens.npy", "name a mix or source of text")
    end = json.loads((data / "stats.json").read_text(encoding="utf-8"))["end_id"]
    return text_pieces(np.load(data / "tokens.npy", mmap_mode="r"), end, longest, shortest)


def text_pieces(stream: Array, end: int, longest: int, shortest: int = 1) -> Pieces:
    """`load_pieces` of a stream."""
    if longest < shortest:
        raise StepFailed(f"no text fits into {longest} tokens", "raise the context")
    ends = np.append(np.flatnonzero(np.asarray(stream) == end), len(stream))  # what follows the last end, too
    begins = np.concatenate([[0], ends[:-1] + 1])
    sizes = np.maximum(ends - begins, 0)
    counts = -(-sizes // longest)
    number = np.arange(counts.sum()) - np.repeat(
        np.cumsum(counts) - counts, counts
    )  # of a piece in its document
    starts = np.repeat(begins, counts) + number * longest
    lengths = np.minimum(np.repeat(sizes, counts) - number * longest, longest)
    kept = lengths >= shortest
    if not kept.any():
        raise StepFailed(f"the mix has no document of {shortest} tokens", "look at its sources")
    return Pieces(stream, starts[kept], lengths[kept])


def grouped(order: Array, batch: int, lengths: Array) -> Array:
    """Each global batch of an order, its members sorted by length: a micro-batch then has little padding. The loss is
    the batch's sum, so their order in it changes nothing else."""
    found = order.reshape(-1, batch)
    ranks = np.argsort(lengths[found], axis=1, kind="stable")
    made: Array = np.take_along_axis(found, ranks, axis=1).reshape(-1)
    return made


def generator(seed: int, *numbers: int) -> np.random.Generator:
    """Chance as a function of numbers alone, so that a job that resumes draws the same."""
    return np.random.Generator(np.random.PCG64([seed, *numbers]))


def padded(rows: Sequence[torch.Tensor], fill: int) -> torch.Tensor:
    """Rows as one tensor, filled up on the right."""
    made: torch.Tensor = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=fill)
    return made


def collated(items: Sequence[dict[str, torch.Tensor]], pad: int) -> dict[str, torch.Tensor]:
    """A batch of `input_ids` and `labels` of different lengths, with `attention_mask`."""
    ids = [item["input_ids"] for item in items]
    return {
        "input_ids": padded(ids, pad),
        "attention_mask": padded([torch.ones_like(row) for row in ids], 0),
        "labels": padded([item["labels"] for item in items], IGNORE),
    }
