"""What a model thinks of given tokens: loss and hit of every wanted token, for rows of any lengths, batched.

Rows are padded on the right and the attention is causal, so that padding touches nothing and needs no mask.
The output head is run on the wanted positions alone, a slice at a time: the logits of a long batch never
exist at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from famc.errors import StepFailed

BATCH_TOKENS = 4096  # tokens of a padded batch: the activations of a 0.6 B model stay below 1 GB
# logits that exist at once: 16 MB in fp32, near what a CPU's cache holds (a third faster than 128 MB)
HEAD_ENTRIES = {"cpu": 2**22, "cuda": 2**26}
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Row:
    """Token ids, and for each whether it is scored. The first has nothing before it and never is."""

    ids: Sequence[int]
    wanted: Sequence[bool | int]


@dataclass(frozen=True)
class RowScore:
    """For the wanted tokens of a row, in order: -log p in nats, and whether the model's first choice was
    right.
    """

    nll: Array
    hit: Array


def load_model(folder: Path, threads: int) -> Any:
    """A model folder in fp32, ready to be asked; on the accelerator if there is one."""
    torch.set_num_threads(threads)
    with without_bars():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def load_tokenizer(folder: Path) -> Any:
    """A folder's tokenizer."""
    try:
        with without_bars():
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers has many kinds, and reads config.json on the way
        raise StepFailed(f"the tokenizer of {folder} can't be loaded: {error}") from error


def score_rows(
    model: Any,
    rows: Sequence[Row],
    precision: str = "fp32",
    *,
    batch_tokens: int = BATCH_TOKENS,
    progress: Callable[[int], None] = lambda done: None,
) -> list[RowScore]:
    """Scores in the order of `rows`. The longest go first: what does not fit in memory fails at once."""
    results: list[RowScore | None] = [None] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i].ids), i))
    done = at = 0
    while at < len(order):
        members = order[at : at + max(1, batch_tokens // max(len(rows[order[at]].ids), 1))]
        at += len(members)
        for index, score in zip(
            members, _score_batch(model, [rows[i] for i in members], precision), strict=True
        ):
            results[index] = score
        done += sum(len(rows[i].ids) for i in members)
        progress(done)
    return [score for score in results if score is not None]


def _score_batch(model: Any, rows: Sequence[Row], precision: str) -> list[RowScore]:
    width = max(len(row.ids) for row in rows) - 1
    wanted = np.zeros((len(rows), max(width, 0)), dtype=bool)
    ids = np.zeros((len(rows), max(width, 0) + 1), dtype=np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = row.ids
        wanted[i, : len(row.ids) - 1] = np.asarray(row.wanted[1:], dtype=bool)
    counts = wanted.sum(axis=1)
    if not counts.sum():
        return [RowScore(np.empty(0), np.empty(0, dtype=bool)) for _ in rows]
    head = model.get_output_embeddings()
    nll: list[Array] = []
    hit: list[Array] = []
    with torch.inference_mode(), autocast(model, precision):
        tokens = torch.from_numpy(ids).to(model.device)
        hidden = model.get_decoder()(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
        mask = torch.from_numpy(wanted).to(model.device)
        hidden, targets = hidden[mask], tokens[:, 1:][mask]
        step = max(1, HEAD_ENTRIES[model.device.type] // head.weight.shape[0])
        for start in range(0, len(targets), step):
            logits = head(hidden[start : start + step]).float()
            following = targets[start : start + step]
            loss = cross_entropy(logits, following, reduction="none")
            nll.append(loss.double().cpu().numpy())
            hit.append((logits.argmax(-1) == following).cpu().numpy())
    ends = np.cumsum(counts)[:-1]
    pairs = zip(np.split(np.concatenate(nll), ends), np.split(np.concatenate(hit), ends), strict=True)
    return [RowScore(*pair) for pair in pairs]


def autocast(model: Any, precision: str) -> contextlib.AbstractContextManager[Any]:
    """bf16 matrix products under `bf16`; nothing otherwise."""
    if precision != "bf16":
        return contextlib.nullcontext()
    return torch.autocast(model.device.type, dtype=torch.bfloat16)


# --- conversations ----------------------------------------------------------------------------------------


def encode_chat(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[bool]]:
    """A conversation's ids, and which of them the assistant says (its end mark is among them)."""
    if tokenizer.chat_template is None:
        raise StepFailed(
            "the tokenizer has no chat template", "set tokenizer.chat_template, or leave it out for ChatML"
        )
    made = tokenizer.apply_chat_template(list(messages), return_dict=True, return_assistant_tokens_mask=True)
    mask = [bool(x) for x in made["assistant_masks"]]
    if not any(mask) and any(m["role"] == "assistant" and m["content"] for m in messages):
        raise StepFailed(
            "the chat template does not mark what the assistant says",
            "put the assistant's words and end mark between {% generation %} and {% endgeneration %}",
        )
    return list(made["input_ids"]), mask


def encode_prompt(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """A conversation's ids up to where the assistant starts to speak."""
    made = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True)
    return list(made["input_ids"])


def last_turn(messages: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], str] | None:
    """What stands before the last word of the assistant, and that word; None without one."""
    for at in range(len(messages) - 1, 0, -1):
        if messages[at]["role"] == "assistant":
            return list(messages[:at]), str(messages[at]["content"])
    return None


def end_ids(tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer: the tokenizer's own end, ChatML's, and the end of a document."""
    vocabulary = tokenizer.get_vocab()
    found = {vocabulary[mark] for mark in ("<|im_end|>", "<|endoftext|>") if mark in vocabulary}
    return frozenset(found | ({tokenizer.eos_token_id} - {None}))


def document_start(tokenizer: Any) -> int:
    """The token before a document's first: as in pretraining, <|endoftext|>."""
    found = tokenizer.get_vocab().get("<|endoftext|>", tokenizer.bos_token_id)
    return int(tokenizer.eos_token_id if found is None else found)


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Loading without transformers' progress bars."""
    were_on = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_on:
            transformers.utils.logging.enable_progress_bar()
