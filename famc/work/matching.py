"""A cross-encoder that begins by looking up the query's words in the passage: BM25's shape, as two layers of attention.

In: an untrained BERT classifier with one head a layer, lists of queries and passages. Out: the same BERT, whose score
already ranks by words. From random weights a small cross-encoder does not learn in minutes that equal words across two
texts matter (docs/retrieval.md); one that starts here only has to refine it.

Layer 1: a token t of the query attends to the tokens j of the passage with logits beta u_t.u_j + k_j, and to the last
mark with `null`. The u are unit vectors, near for tokens that are spelt alike. What comes back, o_t = sum_j a_j u_j, is
taken off lam times. So the norm of t falls with what was found, and the layer's norm makes all that is left of t larger,
by found_t = (1 - SHARE (2 lam u_t.o_t - lam^2 o_t.o_t))^-1/2. With many e^k_j of other words in a long passage a match
counts less, and a second match less than the first: BM25's saturation and its normalisation by length.
Layer 2: [CLS] averages found_t over the query, weighted by the softmax of w_t found_t. The classifier reads that.

All is a function of the token table and a few numbers, which are trained here alone, without the layers and hundreds of
times faster; then every part may learn. A token's row holds w, k, a constant, and u, and some numbers that give every row
the same mean and norm, so that the norm below layer 1 changes nothing.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy, normalize

from famc.errors import StepFailed
from famc.work.marks import Marks
from famc.work.rank_data import Array, Lists
from famc.work.training import row_order

# what a row's numbers are; what balances them and u follow
WEIGHT, KEY, CARRIER, PASSAGE, COUNTER, MARK, BALANCE = range(7)
NARROWEST = 32  # hidden size
SHARE = 0.5  # of a row's squared norm is that of u
PLAIN_WIDTH = 384  # at which w, k and the rest stand in a row as they are; in narrower ones they are smaller
CONSTANT, SIDE, LIMIT = 3.0, 3.0, 5.0  # of the carrier, of the passage's type; w and k lie within +-LIMIT
APART = 30.0  # logits that keep the query's own tokens, or the passage's, out of a sum
GRAMS = (3, 4)  # characters: tokens that share some are near
GAIN, SLOPE, MIDDLE = 4.0, 0.6, 0.8  # of the mean in [CLS], and where the pooler's tanh is steepest
WARM = 20  # steps with a rising rate
FAST = 5.0  # the few numbers, and w and k, move so much faster than u
NEAR, FAR = 5, 2  # passages of a list in training: mined ones, and other queries' answers


def first(hidden: int) -> int:
    """Where u begins in a row. Many numbers balance a wide row, so that none of them is large: eight bits for a block of
    weights or activations leave little of what stands beside a large one."""
    return BALANCE + 2 * max(1, hidden // 32)


@dataclass(frozen=True)
class Words:
    """Texts as their distinct tokens and how often each occurs, cut as the pairs of a model are."""

    ids: list[Array]
    counts: list[Array]

    @classmethod
    def of(cls, texts: Sequence[Array], longest: int) -> Words:
        """`longest` tokens of each text count."""
        found = [np.unique(ids[:longest], return_counts=True) for ids in texts]
        return cls([ids.astype(np.int64) for ids, _ in found], [n.astype(np.float32) for _, n in found])

    def padded(self, numbers: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """[texts, longest] ids, and counts that are 0 where there is none."""
        width = max(1, *(len(self.ids[n]) for n in numbers))
        ids, counts = np.zeros((len(numbers), width), np.int64), np.zeros((len(numbers), width), np.float32)
        for row, n in enumerate(numbers):
            ids[row, : len(self.ids[n])] = self.ids[n]
            counts[row, : len(self.ids[n])] = self.counts[n]
        return torch.from_numpy(ids), torch.from_numpy(counts)


class Matcher(torch.nn.Module):
    """What the two layers compute, from the parts of the token table."""

    def __init__(self, hidden: int, spelling: torch.Tensor, rarity: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden
        self.u = torch.nn.Parameter(spelling.clone())
        self.w = torch.nn.Parameter(rarity.clone())
        self.k = torch.nn.Parameter(rarity - 1.0)
        # beta, null, lam, and the scale of the score
        self.few = torch.nn.Parameter(torch.tensor([4.0, 0.0, 0.8, 8.0]))

    def units(self) -> torch.Tensor:
        """[vocabulary, width] rows of length 1 and mean 0."""
        return normalize(self.u - self.u.mean(1, keepdim=True), dim=1)

    def levels(self) -> tuple[torch.Tensor, torch.Tensor]:
        """w and k as a row can hold them."""
        return self.w.clamp(-LIMIT, LIMIT), self.k.clamp(-LIMIT, LIMIT)

    def forward(self, words: Words, queries: Sequence[int], lists: Sequence[Sequence[int]]) -> torch.Tensor:
        """[queries, passages] scores; each query has equally many passages."""
        beta, null, lam, scale = self.few
        units, (w, k) = self.units(), self.levels()
        width = self.hidden
        rows, many = len(lists), len(lists[0])
        asked, times = words.padded(queries)
        read, often = words.padded([n for passages in lists for n in passages])
        u = units[asked]
        v = units[read].view(rows, many, read.shape[1], -1)
        key = torch.where(often > 0, k[read] + often.clamp_min(1e-9).log(), -torch.inf)
        logits = beta * torch.einsum("rqd,rmpd->rmqp", u, v) + key.view(rows, many, 1, -1)
        logits = torch.cat([logits, null.expand(*logits.shape[:3], 1)], -1)
        got = logits.softmax(-1)[..., :-1] @ v
        alike = torch.einsum("rqd,rmqd->rmq", u, got)
        found = (1 - SHARE * (2 * lam * alike - lam**2 * got.square().sum(-1))).clamp_min(1e-3).rsqrt()
        there = (times > 0)[:, None]
        weights = torch.where(there, w[asked][:, None] * found, -torch.inf)
        weights = weights + times.clamp_min(1e-9).log()[:, None]
        mean = (weights.nan_to_num(neginf=-1e4).softmax(-1) * (found - 1)).sum(-1)
        height = GAIN * mean
        # what the norm above layer 2 makes of it, in a row of mean 0 and norm sqrt(width)
        height = height * (1 - 1 / width) / (1 + height.square() * (1 / width - 1 / width**2)).sqrt()
        score: torch.Tensor = scale * torch.tanh(SLOPE * (height - MIDDLE))
        return score


def spelling(tokenizer: Any, width: int, seed: int) -> torch.Tensor:
    """[vocabulary, width] vectors of length 1: a sum of random ones for each token's characters in threes and fours,
    for the beginning of a word, and for the whole (after Bojanowski et al. 2017, arXiv:1607.04606)."""
    made: dict[str, Array] = {}

    def gram(text: str) -> Array:
        if text not in made:
            made[text] = np.random.Generator(
                np.random.PCG64([seed, zlib.crc32(text.encode())])
            ).standard_normal(width)
        return made[text]

    rows = np.zeros((len(tokenizer), width))
    for number, token in enumerate(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))):
        text = "<" + token.lower().lstrip("Ġ▁").removeprefix("##")
        rows[number] = gram("=" + text[1:])
        for size in GRAMS:
            for at in range(len(text) - size + 1):
                rows[number] += gram(text[at : at + size])
    return normalize(torch.from_numpy(rows).float(), dim=1)


def rarity(texts: Sequence[Array], rows: int) -> torch.Tensor:
    """[rows] log of BM25's idf, log(1 + (N - df + 1/2) / (df + 1/2)), over the texts."""
    seen = np.zeros(rows)
    for ids in texts:
        seen[np.unique(ids)] += 1
    idf = np.log1p((len(texts) - seen + 0.5) / (seen + 0.5))
    return torch.from_numpy(np.log(idf)).float()


def train(
    model: Matcher, lists: Lists, words: Words, values: Mapping[str, Any], *, seed: int,
    progress: Callable[[float], None],
) -> dict[str, float]:  # fmt: skip
    """Train for `epochs` over the queries: cross entropy over lists of a positive, NEAR of its negatives and FAR positives
    of other queries. Adam with a cosine to nothing."""
    queries, batch = len(lists.queries), min(int(values["batch"]), len(lists.queries))
    steps = max(1, math.ceil(float(values["epochs"]) * queries / batch))
    order = row_order(queries, steps * batch, seed)
    rate = float(values["lr"])
    groups = [([model.u], 1.0), ([model.w, model.k, model.few], FAST)]
    optimizer = torch.optim.Adam([{"params": p, "lr": rate * by} for p, by in groups], betas=(0.9, 0.98))
    begin = last = 0.0
    for step in range(steps):
        now = min(1.0, (step + 1) / WARM) * 0.5 * (1.0 + math.cos(math.pi * step / steps))
        for group, (_, by) in zip(optimizer.param_groups, groups, strict=True):
            group["lr"] = rate * by * now
        rows = [int(row) for row in order[step * batch : (step + 1) * batch]]
        passages, wrong = _passages(lists, rows, step, seed)
        scores = model(words, [lists.queries[row].query for row in rows], passages)
        loss = cross_entropy(scores.masked_fill(wrong, -1e4), torch.zeros(len(rows), dtype=torch.long))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        last = loss.item()
        begin = begin or last
        if step % 10 == 0:
            progress(step / steps)
    return {"lexical_steps": float(steps), "lexical_loss_first": begin, "lexical_loss_last": last}


def _passages(
    lists: Lists, rows: Sequence[int], step: int, seed: int
) -> tuple[list[list[int]], torch.Tensor]:
    """Of each row: a positive, then what is none, and where that is a positive all the same."""
    made, wrong = [], torch.zeros(len(rows), 1 + NEAR + FAR, dtype=torch.bool)
    for at, row in enumerate(rows):
        query = lists.queries[row]
        chance = np.random.Generator(np.random.PCG64([seed, step, row]))
        positive = query.positives[int(chance.integers(len(query.positives)))]
        near = [query.negatives[i] for i in chance.permutation(len(query.negatives))[:NEAR]]
        others = [rows[(at + 1 + more) % len(rows)] for more in range(NEAR + FAR - len(near))]
        one = [positive, *near, *(lists.queries[other].positives[0] for other in others)]
        made.append(one)
        wrong[at, 1:] = torch.tensor([n in query.positives for n in one[1:]])
    return made, wrong


# --- the same function as a BERT ----------------------------------------------------------------------------


def suits(model: Any) -> None:
    """StepFailed for a BERT that can't begin so."""
    config = model.config
    if config.num_hidden_layers < 2 or config.num_attention_heads != 1 or config.hidden_size < NARROWEST:
        raise StepFailed(
            f"a lexical start of a reranker needs 2 layers, 1 head and {NARROWEST} or more hidden, not "
            f"{config.num_hidden_layers}, {config.num_attention_heads} and {config.hidden_size}",
            "give the size layers: 2 and heads: 1",
        )


def write(model: Any, matcher: Matcher, marks: Marks) -> None:
    """Set a classifier's weights so that its score is the matcher's, before and after which every part may learn."""
    bert, n = model.bert, int(model.config.hidden_size)
    unit = math.sqrt(n / PLAIN_WIDTH)  # of w, k and the rest
    side = SIDE * unit
    passage = math.sqrt(n / (n + 2 * side**2))  # what the norm below layer 1 makes of a row of the passage
    root = math.sqrt(n)  # attention divides by it
    with torch.no_grad():
        beta, null, lam, scale = (float(value) for value in matcher.few)
        _table(bert.embeddings, matcher, marks, unit, null)
        lower, upper = bert.encoder.layer[0], bert.encoder.layer[1]
        for layer in bert.encoder.layer:
            for part in (layer.attention.self.query, layer.attention.self.key, layer.attention.self.value):
                part.weight.zero_()
                part.bias.zero_()
            for part in (layer.attention.output.dense, layer.output.dense):
                part.weight.zero_()
                part.bias.zero_()
        spans = torch.arange(first(n), n)
        size = math.sqrt(SHARE * n)  # of u in a row
        seen, out = lower.attention.self, lower.attention.output.dense
        seen.query.weight[spans, spans] = math.sqrt(abs(beta) * root) / size
        seen.key.weight[spans, spans] = math.copysign(math.sqrt(abs(beta) * root) / size, beta) / passage
        seen.query.bias[KEY] = root
        seen.key.weight[KEY, KEY] = 1 / (unit * passage)
        seen.query.bias[PASSAGE] = APART * root  # of the query's tokens; of the passage's the opposite
        seen.query.weight[PASSAGE, PASSAGE] = -2 * APART * root / (side * passage)
        seen.key.weight[PASSAGE, PASSAGE] = 1 / (side * passage)
        seen.query.weight[MARK, MARK] = 4 * APART * root / side  # marks see only marks, which hold no u
        seen.key.weight[MARK, MARK] = 1 / side
        seen.value.weight[spans, spans] = 1 / passage
        out.weight[spans, spans] = -lam
        seen, out = upper.attention.self, upper.attention.output.dense
        seen.query.bias[WEIGHT] = root
        seen.key.weight[WEIGHT, WEIGHT] = 1 / unit
        seen.query.bias[PASSAGE] = seen.query.bias[MARK] = -APART * root
        seen.key.weight[PASSAGE, PASSAGE] = 1 / (side * passage)
        seen.key.weight[MARK, MARK] = 1 / side
        seen.value.weight[CARRIER, CARRIER] = 1 / (CONSTANT * unit)
        seen.value.bias[CARRIER] = -1.0
        out.weight[CARRIER, CARRIER] = GAIN
        pooler = bert.pooler.dense
        pooler.bias.zero_()
        pooler.weight[0] = 0.0  # the other rows are as they were drawn: nothing reads them yet
        pooler.weight[0, CARRIER], pooler.bias[0] = SLOPE, -SLOPE * MIDDLE
        model.classifier.weight.zero_()
        model.classifier.bias.zero_()
        model.classifier.weight[0, 0] = scale


def _table(embeddings: Any, matcher: Matcher, marks: Marks, unit: float, null: float) -> None:
    table = embeddings.word_embeddings.weight
    n = table.shape[1]
    w, k = matcher.levels()
    units = matcher.units()
    known = len(units)  # the table may be padded
    rows = torch.zeros_like(table)
    rows[:known, first(n) :] = units * math.sqrt(SHARE * n)
    rows[:known, WEIGHT], rows[:known, KEY] = w * unit, k * unit
    rows[:, CARRIER] = CONSTANT * unit
    for mark in {marks.cls, marks.sep}:
        rows[mark] = 0.0
        rows[mark, MARK] = SIDE * unit
        rows[mark, KEY] = max(-LIMIT, min(LIMIT, null)) * unit
    # half of them are x and half are y: x + y = -sum / half, x^2 + y^2 = (n - sum of squares) / half
    half = (first(n) - BALANCE) // 2
    total, room = rows.sum(1, keepdim=True) / half, (n - rows.square().sum(1, keepdim=True)) / half
    apart = (room / 2 - (total / 2).square()).sqrt()
    rows[:, BALANCE : BALANCE + half] = -total / 2 + apart
    rows[:, BALANCE + half : first(n)] = -total / 2 - apart
    table.copy_(rows)
    embeddings.position_embeddings.weight.zero_()
    types = embeddings.token_type_embeddings.weight
    types.zero_()
    types[1, PASSAGE], types[1, COUNTER] = SIDE * unit, -SIDE * unit
