"""T5's two ways to learn: span corruption (`pretrain`), and answers to a text (`sft`).

In: a mix of text, or of messages. Out: pairs of source and target for encoder and decoder, both without a chat
template and both ended by the tokenizer's end of turn (`<|im_end|>`), as T5's own tokenizer ends every text with its.
The decoder starts from the padding token. The loss is on the target alone.

Span corruption (arXiv 1910.10683, section 3.1.4): 15 % of a text in spans of 3 tokens on average are taken out. T5
marks each with a token of its own; here all share `<|mask|>`, as a family reserves no hundred of them: the source has
one mark for each span (BART's text infilling does that, arXiv 1910.13461), and in the target a mark stands before
each span, in the source's order, which says as clearly which is which.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from transformers import AutoModelForSeq2SeqLM

from famc.errors import StepFailed
from famc.job import Job
from famc.work.likelihood import end_ids, last_turn, without_bars
from famc.work.marks import mask_of
from famc.work.pieces import Pieces, collated, generator, grouped, load_pieces
from famc.work.rows import IGNORE, Array, examples
from famc.work.scores import read_json
from famc.work.training import Batch, Order, Scored, train_examples

STREAM = 2  # sets the draws of this kind apart from others of the same seed
NOISE, SPAN = 0.15, 3.0  # share of tokens taken out, and their mean run: T5's
SHORTEST = 4  # tokens of a piece that something can be taken out of


@dataclass(frozen=True, slots=True)
class Pair:
    """What the encoder reads, and what the decoder says."""

    source: Array
    target: Array


class Pairs(Protocol):
    """Pairs by number in training order."""

    def __getitem__(self, index: int) -> Pair: ...

    def __len__(self) -> int: ...


# --- span corruption --------------------------------------------------------------------------------------


def spans_of(length: int) -> tuple[int, int]:
    """(tokens, spans) that are taken out of a text of a length."""
    noise = min(max(round(length * NOISE), 1), length - 1)
    return noise, min(max(round(noise / SPAN), 1), noise, length - noise)


def raw_length(context: int) -> int:
    """The longest text whose source, marks and end included, fits into `context` tokens.

    >>> raw_length(512)
    568
    """
    length = context
    while length + 1 - sum(spans_of(length + 1)) + 2 * spans_of(length + 1)[1] + 1 <= context:
        length += 1
    while length > 1 and length - sum(spans_of(length)) + 2 * spans_of(length)[1] + 1 > context:
        length -= 1
    return length


def corrupt(ids: Array, draw: np.random.Generator, mask: int, end: int) -> Pair:
    """A text with spans taken out, and these spans. As in T5, it begins with what stays and ends with a span."""
    noise, spans = spans_of(len(ids))
    stays, gone = _parts(len(ids) - noise, spans, draw), _parts(noise, spans, draw)
    source: list[Array] = []
    target: list[Array] = []
    mark, at = np.array([mask]), 0
    for keep, drop in zip(stays, gone, strict=True):
        source += [ids[at : at + keep], mark]
        target += [mark, ids[at + keep : at + keep + drop]]
        at += keep + drop
    last = np.array([end])
    return Pair(np.concatenate([*source, last]), np.concatenate([*target, last]))


def _parts(total: int, parts: int, draw: np.random.Generator) -> Array:
    """`total` in so many whole parts of at least 1, every way equally likely."""
    cuts = np.sort(draw.permutation(total - 1)[: parts - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


class Corrupted:
    """Pieces of text in training order, spans taken out anew each time they are read."""

    def __init__(self, pieces: Pieces, order: Order, mask: int, end: int, seed: int) -> None:
        self.pieces, self.order, self.mask, self.end, self.seed = pieces, order, mask, end, seed

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Pair:
        draw = generator(self.seed, STREAM, index)
        return corrupt(self.pieces[int(self.order[index])], draw, self.mask, self.end)


# --- conversations ----------------------------------------------------------------------------------------


def last_exchange(messages: Sequence[Mapping[str, Any]]) -> tuple[str, str] | None:
    """What the user says last and what the assistant answers; None without either."""
    turn = last_turn(messages)
    if turn is None or not turn[0] or turn[0][-1]["role"] != "user":
        return None
    return str(turn[0][-1]["content"]), turn[1]


def encode_source(tokenizer: Any, text: str, context: int) -> list[int]:
    """A text for the encoder, cut to the context, ended."""
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return [*ids[: context - 1], tokenizer.eos_token_id]


def encode_target(tokenizer: Any, text: str, context: int) -> list[int]:
    """A text for the decoder; what is cut has no end, or the model would learn to stop in the middle."""
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id][:context]


def chat_pairs(
    records: Iterator[Mapping[str, Any]], tokenizer: Any, context: int
) -> tuple[list[Pair], dict[str, float]]:
    """The last exchange of each conversation, and facts worth reporting: what is before it, is left out."""
    pairs: list[Pair] = []
    truncated = dropped = earlier = 0
    for record in records:
        exchange = last_exchange(record["messages"])
        if exchange is None:
            dropped += 1
            continue
        earlier += len(record["messages"]) > 2
        source = encode_source(tokenizer, exchange[0], context)
        target = encode_target(tokenizer, exchange[1], context)
        truncated += len(source) == context or target[-1] != tokenizer.eos_token_id
        pairs.append(Pair(np.array(source), np.array(target)))
    if not pairs:
        raise StepFailed(
            "no conversation has a user's word and the assistant's answer to it: nothing to learn",
            "look at the data",
        )
    facts: dict[str, float] = {
        "rows": len(pairs),
        "truncated": truncated,
        "dropped": dropped,
        "longer_conversations": earlier,
    }
    return pairs, facts


class Chosen:
    """Pairs of a list in training order."""

    def __init__(self, pairs: Sequence[Pair], order: Order) -> None:
        self.pairs, self.order = pairs, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Pair:
        return self.pairs[int(self.order[index])]


# --- training ---------------------------------------------------------------------------------------------


class PairSet(torch.utils.data.Dataset[Batch]):
    """Pairs as the trainer reads them."""

    def __init__(self, pairs: Pairs) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Batch:
        pair = self.pairs[index]
        return {"input_ids": torch.from_numpy(pair.source), "labels": torch.from_numpy(pair.target)}


def collate(items: Sequence[Batch], pad: int, start: int) -> Batch:
    """A padded batch; the decoder reads the target behind its start token."""
    made = collated(items, pad)
    first = torch.full_like(made["labels"][:, :1], start)
    before = made["labels"][:, :-1]
    made["decoder_input_ids"] = torch.cat([first, before.masked_fill(before == IGNORE, pad)], dim=1)
    return made


def decoded(model: Any, inputs: Batch) -> torch.Tensor:
    """[rows, target, hidden] before the output head, as T5 scales it."""
    mask = inputs["attention_mask"]
    encoded = model.encoder(input_ids=inputs["input_ids"], attention_mask=mask)[0]
    hidden: torch.Tensor = model.decoder(
        input_ids=inputs["decoder_input_ids"],
        encoder_hidden_states=encoded,
        encoder_attention_mask=mask,
        use_cache=False,
    )[0]
    return hidden * model.model_dim**-0.5 if model.config.scale_decoder_outputs else hidden


def score_target(model: Any, inputs: Batch) -> Scored:
    """The target's tokens, its end included."""
    hidden = decoded(model, inputs)
    labels = inputs["labels"].reshape(-1)
    kept = labels != IGNORE
    flat = hidden.reshape(-1, hidden.shape[-1])
    return Scored(flat[kept], model.get_output_embeddings().weight, labels[kept], kept)


def train_spans(job: Job, model: Any, data: Path, tokenizer: Any, out: Path) -> dict[str, Any]:
    """Pretrain on a mix of text by span corruption; the step's metrics."""
    params, context = job.params, int(job.params["context"])
    pieces = load_pieces(data, raw_length(context), SHORTEST)
    mask, end = mask_of(tokenizer), int(tokenizer.eos_token_id)

    def ordered(order: Order, batch: int) -> tuple[PairSet, float]:
        order = grouped(order, batch, pieces.lengths)
        read = pieces.lengths[order]
        marks = np.array([spans_of(int(n))[1] for n in range(SHORTEST, int(read.max()) + 1)])
        tokens = float((read + 2 * marks[read - SHORTEST] + 2).sum())
        return PairSet(Corrupted(pieces, order, mask, end, int(params["seed"]))), tokens

    metrics = _train(job, model, len(pieces), ordered, out)
    fill = float(pieces.lengths.sum()) / (len(pieces) * raw_length(context))
    return {**metrics, "rows": len(pieces), "fill": round(fill, 4), "noise": NOISE, "mean_span": SPAN}


def train_answers(job: Job, model: Any, data: Path, tokenizer: Any, out: Path) -> dict[str, Any]:
    """Learn the last exchanges of a mix of messages; the step's metrics."""
    if job.params["loss_on"] != "assistant":
        raise StepFailed(
            f"{job.name}: loss_on: {job.params['loss_on']} has no meaning for t5, whose loss is on the answer",
            "leave loss_on out",
        )
    pairs, facts = chat_pairs(examples(data), tokenizer, int(job.params["context"]))
    lengths = np.array([len(pair.source) + len(pair.target) for pair in pairs])

    def ordered(order: Order, batch: int) -> tuple[PairSet, float]:
        order = grouped(order, batch, lengths)
        return PairSet(Chosen(pairs, order)), float(lengths[order].sum())

    return {**_train(job, model, len(pairs), ordered, out), **facts}


def _train(job: Job, model: Any, count: int, ordered: Any, out: Path) -> dict[str, Any]:
    config = model.config
    together = partial(collate, pad=int(config.pad_token_id), start=int(config.decoder_start_token_id))
    return train_examples(job, model, count, ordered, out, collate=together, score=score_target)


# --- a finished folder ------------------------------------------------------------------------------------


def load_seq2seq(folder: Path, threads: int) -> Any:
    """A folder's weights in fp32, whatever they were saved in; on the accelerator if there is one."""
    torch.set_num_threads(threads)
    with without_bars():
        model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def try_out_seq2seq(folder: Path, tokenizer: Any) -> None:
    """Whether a t5 folder's files say what it was trained with, beyond its weights: where the decoder starts, where
    answers end, and that its tokenizer ends a text by itself. StepFailed if they don't."""
    path = folder / "generation_config.json"
    settings = read_json(path) if path.is_file() else {}
    if settings.get("decoder_start_token_id") is None:
        raise StepFailed(
            f"{folder.name}: generation_config.json has no decoder_start_token_id",
            "famc build makes it again",
        )
    ends = settings.get("eos_token_id")
    if not set(ends if isinstance(ends, list) else [ends]) <= end_ids(tokenizer):
        raise StepFailed(
            f"generation_config.json ends answers at {ends}", f"the tokenizer: {sorted(end_ids(tokenizer))}"
        )
    made, wanted = tokenizer("Hello")["input_ids"], encode_source(tokenizer, "Hello", 512)
    if made != wanted:
        raise StepFailed(
            f"{folder.name}: its tokenizer makes {made} of 'Hello', training made {wanted}",
            "famc build makes the model again",
        )
