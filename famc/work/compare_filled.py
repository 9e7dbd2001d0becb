"""Is a converted masked LM or T5 still the same? What it says of hidden tokens, or of an answer, against the source's.

In: two folders of weights, and held-out rows or pairs of texts. Out: figures by name, as `compare` has them for decoders.
A gate should ask for `value <= limit`: a broken candidate gives nan, which fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from famc.errors import StepFailed
from famc.work.compare import log_softmax
from famc.work.encoder_session import Array
from famc.work.likelihood import without_bars
from famc.work.seq2seq import encode_source, encode_target

HIDDEN_EVERY = (
    7  # of a row's tokens, one in so many is hidden: about the 15 % that masked LMs are trained with
)


def compare_masked(
    source: Path, export: Path, rows: Sequence[Sequence[int]], mask_id: int, threads: int
) -> dict[str, float]:
    """`figures` of the hidden tokens of all rows; their first and last token, which are marks, are never hidden."""
    ours, theirs = (_load(AutoModelForMaskedLM, folder, threads) for folder in (source, export))
    found: list[tuple[Array, Array, Array]] = []
    for row in rows:
        at = np.arange(HIDDEN_EVERY // 2, len(row) - 1, HIDDEN_EVERY)
        if not len(at):
            continue
        ids = np.asarray(row)
        shown = ids.copy()
        shown[at] = mask_id
        with torch.inference_mode():
            logits = [
                m(input_ids=torch.from_numpy(shown)[None]).logits[0, at].numpy() for m in (ours, theirs)
            ]
        found.append((*logits, ids[at]))
    return figures(found)


def compare_seq2seq(
    source: Path, export: Path, pairs: Sequence[tuple[str, str]], tokenizer: Any, threads: int,
    *, context: int, max_new_tokens: int,
) -> dict[str, float]:  # fmt: skip
    """`figures` of the answers' tokens, given what was asked; and the share of greedy answers that are equal."""
    ours, theirs = (_load(AutoModelForSeq2SeqLM, folder, threads) for folder in (source, export))
    found, equal = [], []
    for asked, answer in pairs:
        ids, labels = (
            torch.tensor([row])
            for row in (encode_source(tokenizer, asked, context), encode_target(tokenizer, answer, context))
        )
        with torch.inference_mode():
            logits = [model(input_ids=ids, labels=labels).logits[0].numpy() for model in (ours, theirs)]
            greedy = {"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1}
            said = [model.generate(input_ids=ids, **greedy).tolist() for model in (ours, theirs)]
        found.append((*logits, labels[0].numpy()))
        equal.append(said[0] == said[1])
    return figures(found) | {"greedy_equal": float(np.mean(equal)), "prompts": float(len(equal))}


def figures(found: Sequence[tuple[Array, Array, Array]]) -> dict[str, float]:
    """From logits of both sides, [tokens, vocabulary] each, and the tokens that stood there: KL per token in nats, first
    choices in common, and perplexities."""
    if not found:
        raise StepFailed("parity has no held-out text of a few tokens", "raise heldout.fraction of a source")
    kl, same, losses, largest = [], [], [], []
    for ours, theirs, wanted in found:
        p, q, at = log_softmax(ours), log_softmax(theirs), np.arange(len(wanted))
        kl.append((np.exp(p) * (p - q)).sum(axis=-1))
        same.append(p.argmax(axis=-1) == q.argmax(axis=-1))
        losses.append(np.stack([-p[at, wanted], -q[at, wanted]]))
        largest.append(np.abs(ours - theirs).max())
    before, after = np.concatenate(losses, axis=1).mean(axis=1)
    return {
        "tokens": float(sum(map(len, kl))),
        "kl": float(np.concatenate(kl).mean()),
        "max_abs": float(np.max(largest)),  # not max(): it would lose a nan
        "top1_agreement": float(np.concatenate(same).mean()),
        "perplexity_reference": float(np.exp(before)),
        "perplexity_candidate": float(np.exp(after)),
        "perplexity_ratio": float(np.exp(after - before)),
    }


def _load(kind: Any, folder: Path, threads: int) -> Any:
    """A folder's weights in fp32, whatever they were saved in."""
    torch.set_num_threads(threads)
    with without_bars():
        return kind.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
