"""Is a converted model still the same? Its logits, its greedy text and its tokenizer against the source's.

A gate on these numbers should ask for `value <= limit`: a broken candidate may give nan, which then fails.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence, Set
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from famc.work.likelihood import without_bars

Ids = list[list[int]]
Array = np.ndarray[Any, np.dtype[Any]]
Message = dict[str, Any]

# Rows of logits that go through a softmax in float64 at once: 64 rows of 150k entries are 77 MB an array.
ROWS = 64


class Decoder(Protocol):
    """What can be compared: a model that gives logits for rows of equal length, and greedy text."""

    def logits(self, ids: Ids) -> Array:
        """[batch, length, vocabulary]."""
        ...

    def generate(self, prompt_ids: list[int], max_new_tokens: int, eos: Set[int]) -> list[int]:
        """The new ids, up to and with the first one in `eos`."""
        ...


class TorchDecoder:
    """The reference: the model folder in fp32, whatever it was saved in."""

    def __init__(self, model_dir: Path, threads: int) -> None:
        torch.set_num_threads(threads)
        with without_bars():
            self._model = AutoModelForCausalLM.from_pretrained(
                model_dir, dtype=torch.float32, local_files_only=True
            ).eval()

    def logits(self, ids: Ids) -> Array:
        with torch.inference_mode():
            logits: Array = self._model(input_ids=torch.tensor(ids), use_cache=False).logits.numpy()
        return logits

    def generate(self, prompt_ids: list[int], max_new_tokens: int, eos: Set[int]) -> list[int]:
        # Not model.generate: a folder's generation_config may sample, or punish repetition.
        new: list[int] = []
        feed, past = prompt_ids, None
        with torch.inference_mode():
            while len(new) < max_new_tokens:
                out = self._model(
                    input_ids=torch.tensor([feed]), past_key_values=past, use_cache=True, logits_to_keep=1
                )
                past = out.past_key_values
                new.append(int(out.logits[0, -1].argmax()))
                if new[-1] in eos:
                    break
                feed = new[-1:]
        return new


def compare(
    reference: Decoder,
    candidate: Decoder,
    texts_ids: Ids,
    prompts_ids: Ids,
    eos: Set[int],
    max_new_tokens: int,
) -> dict[str, float]:
    """How far the candidate is from the reference: teacher-forced on the texts, greedy on the prompts."""
    return compare_logits(reference, candidate, texts_ids) | compare_greedy(
        reference, candidate, prompts_ids, eos, max_new_tokens
    )


def compare_logits(reference: Decoder, candidate: Decoder, texts_ids: Ids) -> dict[str, float]:
    """KL(reference || candidate) per token in nats, largest logit difference, top-1 agreement, perplexities.

    `log_ratio` is the mean of log p_reference - log p_candidate of the next tokens, so exp of it is
    `perplexity_ratio`: above 1, the candidate is worse. Its standard error takes texts as the independent
    units, since the tokens of one text are not.
    """
    texts = [ids for ids in texts_ids if len(ids) > 1]  # one token has no next token
    if not texts:
        raise ValueError("comparing logits needs a text of at least two tokens")
    kl: list[Array] = []
    same: list[Array] = []
    losses: list[Array] = []  # one [2, length - 1] a text: the reference's, the candidate's
    largest: list[float] = []
    for ids in texts:
        ours, theirs = reference.logits([ids])[0], candidate.logits([ids])[0]
        if ours.shape != theirs.shape:
            raise ValueError(f"the logits differ in shape: {ours.shape} and {theirs.shape}")
        loss = np.empty((2, len(ids) - 1))
        for start in range(0, len(ids), ROWS):
            rows = slice(start, start + ROWS)
            p, q = log_softmax(ours[rows]), log_softmax(theirs[rows])
            kl.append((np.exp(p) * (p - q)).sum(axis=-1))
            same.append(p.argmax(axis=-1) == q.argmax(axis=-1))
            following = np.asarray(ids[start + 1 : start + ROWS + 1])
            at = np.arange(len(following))
            loss[:, start : start + len(following)] = -p[at, following], -q[at, following]
            largest.append(float(np.abs(ours[rows] - theirs[rows]).max()))
        losses.append(loss)
    reference_loss, candidate_loss = np.concatenate(losses, axis=1).mean(axis=1)
    mean, error = mean_and_error([loss[1] - loss[0] for loss in losses])
    return {
        "tokens": float(sum(len(rows) for rows in kl)),
        "kl": float(np.concatenate(kl).mean()),
        "max_logit_difference": float(np.max(largest)),  # not max(): it would lose a nan
        "top1_agreement": float(np.concatenate(same).mean()),
        "perplexity_reference": _exp(reference_loss),
        "perplexity_candidate": _exp(candidate_loss),
        "perplexity_ratio": _exp(mean),
        "log_ratio": mean,
        "log_ratio_error": error,
    }


def compare_greedy(
    reference: Decoder, candidate: Decoder, prompts_ids: Ids, eos: Set[int], max_new_tokens: int
) -> dict[str, float]:
    """The share of prompts with the same continuation, and the median number of tokens before the first
    difference (a prompt without a difference counts with its whole length)."""
    if not prompts_ids:
        raise ValueError("comparing greedy text needs a prompt")
    pairs = [
        (reference.generate(ids, max_new_tokens, eos), candidate.generate(ids, max_new_tokens, eos))
        for ids in prompts_ids
    ]
    return {
        "prompts": float(len(pairs)),
        "greedy_equal": sum(a == b for a, b in pairs) / len(pairs),
        "greedy_agree_tokens": float(statistics.median(common_prefix(a, b) for a, b in pairs)),
    }


def log_softmax(logits: Array) -> Array:
    """In float64, over the last axis."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def mean_and_error(groups: Sequence[Array]) -> tuple[float, float]:
    """The mean over all values and its standard error, with whole groups as the units of sampling; within one
    group alone, with its values as the units."""
    values = np.concatenate(groups)
    mean = float(values.mean())
    units = list(groups) if len(groups) > 1 else [values[i : i + 1] for i in range(len(values))]
    if len(units) < 2:
        return mean, math.inf
    # each group's sum less what the mean says it should be: the linearised ratio estimator
    excess = np.array([unit.sum() - mean * len(unit) for unit in units])
    spread = math.sqrt(float((excess**2).sum()) * len(units) / (len(units) - 1))
    return mean, spread / len(values)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many elements are equal before the first difference."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def tokenizer_report(
    source_dir: Path, released_dir: Path, conversation: list[Message], texts: list[str]
) -> dict[str, bool | int]:
    """Does the released folder's tokenizer do what the source's does? Both are loaded as a user loads them.

    `equal` is the conjunction of the booleans. `round_trip` asks that ids decode to the text as the
    tokenizer's own normaliser (NFC, say) leaves it.
    """
    with without_bars():
        source = AutoTokenizer.from_pretrained(source_dir, local_files_only=True)
        released = AutoTokenizer.from_pretrained(released_dir, local_files_only=True)

    def both(what: Callable[[Any], Any]) -> bool:
        return bool(what(source) == what(released))

    different = sum(source(text)["input_ids"] != released(text)["input_ids"] for text in texts)
    lossy = sum(not _round_trips(released, text) for text in texts)
    verdicts = {
        "ids_equal": different == 0,
        "template_equal": both(lambda t: _render(t, conversation, False)),
        "template_with_prompt_equal": both(lambda t: _render(t, conversation, True)),
        "eos_equal": both(lambda t: t.eos_token_id),
        "bos_equal": both(lambda t: t.bos_token_id),
        "pad_equal": both(lambda t: t.pad_token_id),
        "round_trip": lossy == 0,
    }
    return {
        "equal": all(verdicts.values()),
        **verdicts,
        "texts": len(texts),
        "texts_with_other_ids": different,
        "texts_lossy": lossy,
    }


def _render(tokenizer: Any, conversation: list[Message], add_generation_prompt: bool) -> str | None:
    """The conversation as the model would see it; None for a tokenizer without a template (a base model)."""
    if tokenizer.chat_template is None:
        return None
    text: str = tokenizer.apply_chat_template(
        conversation, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    return text


def _round_trips(tokenizer: Any, text: str) -> bool:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    expected = text if normalizer is None else normalizer.normalize_str(text)
    back: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return back == expected


def _exp(x: float) -> float:
    """exp that ends at infinity instead of raising."""
    return math.inf if x > 709 else math.exp(x)
