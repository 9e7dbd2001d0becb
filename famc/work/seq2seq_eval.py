"""Measurements of models that are no decoders: hidden tokens of held-out text (bert, modernbert, t5), and answers of t5.

In: a model, held-out examples. Out: units by document or conversation, and answers to be read. What is hidden is a
function of the document's id: the same for every model with the same tokenizer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from famc.cost.shape import ENCODER_DECODERS
from famc.errors import StepFailed
from famc.work.likelihood import BATCH_TOKENS, HEAD_ENTRIES, RowScore, autocast, end_ids
from famc.work.marks import Marks, marks_of, mask_of
from famc.work.mlm import Masking, hide, ordinary, score_masked
from famc.work.pieces import collated, generator
from famc.work.rows import IGNORE, Array
from famc.work.scores import Units
from famc.work.seq2seq import (
    SHORTEST,
    collate,
    corrupt,
    encode_source,
    encode_target,
    last_exchange,
    raw_length,
    score_target,
)
from famc.work.training import Batch, Score

HIDDEN = Masking(
    0.15
)  # the share that BERT was made for; the mask alone: a word that stands there tells nothing
ANSWERED = 16  # prompts that are answered at once
Progress = Callable[[float], None]


# --- hidden tokens ----------------------------------------------------------------------------------------


def fill_mask(
    model: Any, tokenizer: Any, context: int, precision: str, documents: Sequence[Mapping[str, Any]],
    progress: Progress,
) -> dict[str, Units]:  # fmt: skip
    """Loss and accuracy on hidden tokens, each by document: 15 % of them, single ones for masked LMs, spans for t5."""
    t5 = model.config.model_type in ENCODER_DECODERS
    make: Callable[[Any, np.random.Generator], Batch] = (
        partial(_spans, tokenizer) if t5 else partial(_masked, marks_of(tokenizer), ordinary(tokenizer))
    )
    longest = raw_length(context) if t5 else context - 2
    shortest = SHORTEST if t5 else 1
    items: list[Batch] = []
    owner: list[str] = []
    for document in documents:
        key = str(document["id"])
        ids = np.array(tokenizer(document["text"], add_special_tokens=False)["input_ids"], dtype=np.int64)
        seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
        for number, at in enumerate(range(0, len(ids), longest)):
            piece = ids[at : at + longest]
            if len(piece) >= shortest:
                items.append(make(piece, generator(seed, number)))
                owner.append(key)
    if not items:
        raise StepFailed("the held-out text has no token to hide", "look at the source")
    together, score = (_seq2seq(model), score_target) if t5 else (_padded(model), score_masked)
    scores = token_scores(model, items, together, score, precision, progress)
    skipped = {mask_of(tokenizer), int(tokenizer.eos_token_id)} if t5 else set()
    nll, hits, count = (dict.fromkeys(owner, 0.0) for _ in range(3))
    for key, item, found in zip(owner, items, scores, strict=True):
        labels = item["labels"].numpy()
        counted = ~np.isin(labels[labels != IGNORE], sorted(skipped))  # t5's own marks are no text
        nll[key] += float(found.nll[counted].sum())
        hits[key] += float(found.hit[counted].sum())
        count[key] += float(counted.sum())
    return {
        "masked_loss": Units.of((key, nll[key], count[key]) for key in nll),
        "masked_accuracy": Units.of((key, hits[key], count[key]) for key in nll),
    }


def _masked(marks: Marks, words: Array, ids: Array, draw: np.random.Generator) -> Batch:
    shown, labels = hide(ids, HIDDEN, draw, marks.mask, words)
    return {
        "input_ids": torch.from_numpy(np.concatenate([[marks.cls], shown, [marks.sep]])),
        "labels": torch.from_numpy(np.concatenate([[IGNORE], labels, [IGNORE]])),
    }


def _spans(tokenizer: Any, ids: Array, draw: np.random.Generator) -> Batch:
    pair = corrupt(ids, draw, mask_of(tokenizer), int(tokenizer.eos_token_id))
    return {"input_ids": torch.from_numpy(pair.source), "labels": torch.from_numpy(pair.target)}


# --- answers ----------------------------------------------------------------------------------------------


def answers(
    model: Any, tokenizer: Any, context: int, precision: str, examples: Sequence[Mapping[str, Any]], limit: int,
    progress: Progress,
) -> tuple[dict[str, Units], list[dict[str, Any]]]:  # fmt: skip
    """Loss and accuracy on the answers to what users say last, and greedy answers: (units by metric, answers)."""
    from sacrebleu.metrics import CHRF

    kept = [
        (str(e["id"]), pair) for e in examples for pair in [last_exchange(e["messages"])] if pair is not None
    ]
    if not kept:
        raise StepFailed(
            "no held-out conversation ends with a user's word and an answer", "look at the source"
        )
    items: list[Batch] = [
        {
            "input_ids": torch.tensor(encode_source(tokenizer, asked, context)),
            "labels": torch.tensor(encode_target(tokenizer, answer, context)),
        }
        for _, (asked, answer) in kept
    ]
    scores = token_scores(
        model, items, _seq2seq(model), score_target, precision, lambda share: progress(0.5 * share)
    )
    keys = [key for key, _ in kept]
    units = {
        "answer_loss": Units.of((k, s.nll.sum(), len(s.nll)) for k, s in zip(keys, scores, strict=True)),
        "token_accuracy": Units.of((k, s.hit.sum(), len(s.hit)) for k, s in zip(keys, scores, strict=True)),
    }
    eos = end_ids(tokenizer)
    sources = [item["input_ids"] for item in items]
    made = greedy(model, sources, limit, sorted(eos), lambda share: progress(0.5 + 0.5 * share))
    chrf, samples = CHRF(), []
    rated: list[tuple[str, float, float, float]] = []
    for (key, (asked, reference)), new in zip(kept, made, strict=True):
        answer, expected = tokenizer.decode(new, skip_special_tokens=True).strip(), reference.strip()
        similarity = chrf.sentence_score(answer, [expected]).score / 100
        rated.append((key, similarity, float(answer == expected), float(bool(new) and new[-1] in eos)))
        prompt = [{"role": "user", "content": asked}]
        samples.append({"id": key, "prompt": prompt, "reference": reference, "answer": answer})
    for column, name in enumerate(("chrf", "exact_match", "ended"), start=1):
        units[name] = Units.of((str(row[0]), float(row[column]), 1.0) for row in rated)
    return units, samples


def greedy(
    model: Any, sources: Sequence[torch.Tensor], limit: int, eos: Sequence[int], progress: Progress
) -> list[list[int]]:
    """For each source the answer's ids, up to and with its end."""
    results: list[list[int]] = [[] for _ in sources]
    order = sorted(range(len(sources)), key=lambda i: (-len(sources[i]), i))
    for start in range(0, len(order), ANSWERED):
        members = order[start : start + ANSWERED]
        rows = [{"input_ids": sources[i], "labels": sources[i]} for i in members]
        batch = collated(rows, int(model.config.pad_token_id))
        with torch.inference_mode():
            made = model.generate(
                input_ids=batch["input_ids"].to(model.device),
                attention_mask=batch["attention_mask"].to(model.device),
                max_new_tokens=limit, do_sample=False, num_beams=1, eos_token_id=list(eos),
            )  # fmt: skip
        for index, row in zip(members, made[:, 1:].tolist(), strict=True):
            ends = [at for at, token in enumerate(row) if token in eos]
            results[index] = row[: ends[0] + 1] if ends else row
        progress((start + len(members)) / len(order))
    return results


# --- scores of tokens -------------------------------------------------------------------------------------


def token_scores(
    model: Any, items: Sequence[Batch], together: Callable[[list[Batch]], Batch], score: Score, precision: str,
    progress: Progress,
) -> list[RowScore]:  # fmt: skip
    """Loss and hit of every label of each item, in its order; the longest items go first."""
    results: list[RowScore | None] = [None] * len(items)
    sizes = [max(len(item["input_ids"]), len(item["labels"])) for item in items]
    order = sorted(range(len(items)), key=lambda i: (-sizes[i], i))
    at = 0
    while at < len(order):
        members = order[at : at + max(1, BATCH_TOKENS // sizes[order[at]])]
        at += len(members)
        batch = {k: v.to(model.device) for k, v in together([items[i] for i in members]).items()}
        with torch.inference_mode(), autocast(model, precision):
            found = score(model, batch)
            nll, hit = _scored(found.hidden, found.weight, found.labels)
        counts = [int((items[i]["labels"] != IGNORE).sum()) for i in members]
        ends = np.cumsum(counts)[:-1]
        for index, *pair in zip(members, np.split(nll, ends), np.split(hit, ends), strict=True):
            results[index] = RowScore(*pair)
        progress(at / len(order))
    return [found for found in results if found is not None]


def _scored(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> tuple[Any, Any]:
    nll, hit = [], []
    step = max(1, HEAD_ENTRIES[hidden.device.type] // weight.shape[0])
    for start in range(0, len(labels), step):
        logits = (hidden[start : start + step] @ weight.T).float()
        wanted = labels[start : start + step]
        nll.append(cross_entropy(logits, wanted, reduction="none").double().cpu().numpy())
        hit.append((logits.argmax(-1) == wanted).cpu().numpy())
    return np.concatenate(nll), np.concatenate(hit)


def _padded(model: Any) -> Callable[[list[Batch]], Batch]:
    return partial(collated, pad=int(model.config.pad_token_id))


def _seq2seq(model: Any) -> Callable[[list[Batch]], Batch]:
    config = model.config
    return partial(collate, pad=int(config.pad_token_id), start=int(config.decoder_start_token_id))
