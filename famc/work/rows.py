"""Training rows: what a mix holds -> arrays of input_ids, labels (already shifted) and position_ids.

Text: the flat token stream cut into rows; an <|endoftext|> ends a document and begins the next: positions
start again there. Messages: whole conversations, best fit into rows; positions start again at each, the rest
is padding without labels.
Document isolation comes from position_ids alone (transformers makes the block-diagonal mask from them).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from famc.errors import StepFailed

IGNORE = -100  # the label that cross-entropy leaves out
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Rows:
    """[rows, context] arrays. `facts` are worth reporting: fill, truncated, dropped."""

    input_ids: Array
    labels: Array
    position_ids: Array
    facts: Mapping[str, float]

    def __len__(self) -> int:
        return len(self.input_ids)


def load_rows(data: Path, tokenizer: Any, context: int, *, loss_on: str = "assistant") -> Rows:
    """The rows of a mix artifact, whichever format it has."""
    if (data / "tokens.npy").is_file():
        end = json.loads((data / "stats.json").read_text(encoding="utf-8"))["end_id"]
        return text_rows(np.load(data / "tokens.npy", mmap_mode="r"), end, context)
    return chat_rows(examples(data), tokenizer, context, loss_on=loss_on)


def examples(data: Path) -> Iterator[dict[str, Any]]:
    """Records of a mix of messages or preferences, their JSON columns read."""
    table = pq.read_table(data / "examples.parquet")
    for record in table.to_pylist():
        yield {
            k: json.loads(v) if k in ("messages", "prompt", "chosen", "rejected") else v
            for k, v in record.items()
        }


def text_rows(stream: Array, eot: int, context: int) -> Rows:
    """A flat stream -> rows of `context` tokens, each predicting the next; every token is seen once."""
    count = (len(stream) - 1) // context
    if count < 1:
        raise StepFailed(
            f"the mix has {len(stream)} tokens: less than one row of {context}",
            "raise its tokens, or lower the context",
        )
    used = np.asarray(stream[: count * context + 1]).astype(np.int64)
    ids = used[:-1].reshape(count, context)
    labels = used[1:].reshape(count, context)
    column = np.arange(context)
    starts = np.where(ids == eot, column, 0)
    positions = column - np.maximum.accumulate(starts, axis=1)
    return Rows(ids, labels, positions, {"rows": count, "fill": 1.0})


def chat_rows(records: Iterator[Mapping[str, Any]], tokenizer: Any, context: int, *, loss_on: str) -> Rows:
    """Conversations -> packed rows. What is longer than a row is cut; with no assistant's token left,
    dropped.
    """
    encoded: list[tuple[list[int], list[int]]] = []
    truncated = dropped = 0
    for record in records:
        ids, mask = encode_chat(tokenizer, record["messages"])
        if loss_on == "all":
            mask = [1] * len(ids)
        if len(ids) > context:
            truncated += 1
            ids, mask = ids[:context], mask[:context]
        if not any(mask[1:]):
            dropped += 1
            continue
        encoded.append((ids, mask))
    if not encoded:
        raise StepFailed(
            "no conversation has an assistant's word within the context: nothing to learn",
            "raise the context, or look at the data",
        )
    bins = _best_fit([len(ids) for ids, _ in encoded], context)
    pad = tokenizer.pad_token_id
    ids_out = np.full((len(bins), context), pad, dtype=np.int64)
    labels_out = np.full((len(bins), context), IGNORE, dtype=np.int64)
    positions_out = np.zeros((len(bins), context), dtype=np.int64)
    for row, members in enumerate(bins):
        at = 0
        for index in members:
            ids, mask = encoded[index]
            end = at + len(ids)
            ids_out[row, at:end] = ids
            positions_out[row, at:end] = np.arange(len(ids))
            # labels are shifted: position t predicts t + 1, never into the next conversation
            kept = [token if m else IGNORE for token, m in zip(ids[1:], mask[1:], strict=True)]
            labels_out[row, at : end - 1] = kept
            at = end
        positions_out[row, at:] = np.arange(context - at)
    fill = float((sum(len(ids) for ids, _ in encoded)) / (len(bins) * context))
    facts = {
        "rows": len(bins),
        "fill": round(fill, 4),
        "conversations": len(encoded),
        "truncated": truncated,
        "dropped": dropped,
    }
    return Rows(ids_out, labels_out, positions_out, facts)


def encode_chat(tokenizer: Any, messages: list[Mapping[str, str]]) -> tuple[list[int], list[int]]:
    """(ids, 1 for each token that is the assistant's) of a conversation."""
    out = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = out["input_ids"], out["assistant_masks"]
    return list(ids), list(mask)


def _best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: each conversation, longest first, into the fullest row that still takes it."""
    by_space: dict[int, list[int]] = {}
    bins: list[list[int]] = []
    space: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        need = lengths[index]
        fit = min((s for s, rows in by_space.items() if s >= need and rows), default=None)
        if fit is None:
            bins.append([])
            space.append(capacity)
            row = len(bins) - 1
        else:
            row = by_space[fit].pop()
            if not by_space[fit]:
                del by_space[fit]
        bins[row].append(index)
        space[row] -= need
        by_space.setdefault(space[row], []).append(row)
    return bins
