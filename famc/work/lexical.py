"""A BERT that begins as a bag of words: its first attention weighs tokens by rarity and adds up their vectors.

In: an untrained BERT, pairs, the loss. Out: the same BERT, whose vectors already find by words. A small encoder trained
from random weights forgets exact words before it learns meaning; one that starts here only has to add to them.

Layer 1: key channel 0 of every head reads coordinate 0 of a token's embedding, its log weight; values and output are
multiples of the identity on the other coordinates. Feed-forwards and later attentions add nothing yet. So [CLS] holds
LN(x_cls + GAIN * sum_t softmax(weight)_t x_t), which needs no layer to be computed: the token table is trained by
embedding_bag, some twenty times faster than through the layers, and then every part learns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import embedding_bag, layer_norm

from famc.work.pair_data import Ids, Order, Ordered, Pairs
from famc.work.training import row_order

GAIN = 32.0  # of the summed tokens over [CLS]'s own vector, which is the same for all texts
WARM = 20  # steps with a rising rate

Loss = Callable[[list[list[torch.Tensor]], torch.Tensor], torch.Tensor]


def start(bert: Any, pairs: Pairs, seed: int) -> None:
    """Set the weights: random token vectors, weighted by log(1 + N / (1 + df)) over the texts of the pairs."""
    generator = torch.Generator().manual_seed(seed)
    rows, width = bert.embeddings.word_embeddings.weight.shape
    with torch.no_grad():
        table = torch.randn(rows, width, generator=generator)
        table[:, 0] = _rarity(pairs, rows)
        bert.embeddings.word_embeddings.weight.copy_(table)
        bert.embeddings.position_embeddings.weight.zero_()
        bert.embeddings.token_type_embeddings.weight.zero_()
        eye = torch.eye(width) * math.sqrt(GAIN)
        for number, layer in enumerate(bert.encoder.layer):
            attention, output = layer.attention.self, layer.attention.output.dense
            layer.output.dense.weight.zero_()
            if number:  # adds nothing until it has learnt to
                output.weight.zero_()
                continue
            heads, size = attention.num_attention_heads, attention.attention_head_size
            firsts = torch.arange(heads) * size
            attention.query.weight.zero_()
            attention.query.bias.zero_()
            attention.query.bias[firsts] = math.sqrt(size)  # the softmax divides by it
            attention.key.weight.zero_()
            attention.key.weight[firsts, 0] = 1.0
            values = eye.clone()
            values[0, 0] = 0.0  # the weight is no part of the meaning
            attention.value.weight.copy_(values)
            output.weight.copy_(eye)


def _rarity(pairs: Pairs, rows: int) -> torch.Tensor:
    seen = np.zeros(rows)
    for ids in pairs.ids:
        seen[np.unique(ids)] += 1
    weights = np.log(1.0 + len(pairs.ids) / (1.0 + seen))
    return torch.from_numpy(np.log(weights)).float()


class Bag:
    """The same function as the whole model in its first state, from the token table alone."""

    def __init__(self, bert: Any, texts: Sequence[Ids], cls: int) -> None:
        self.table = bert.embeddings.word_embeddings.weight
        self.norm = bert.embeddings.LayerNorm
        self.texts = [
            np.unique(ids, return_counts=True) for ids in texts
        ]  # a token that occurs twice is read once
        self.cls = cls

    def __call__(self, which: Sequence[int] | Order) -> torch.Tensor:
        """[texts, hidden] of the texts with these numbers."""
        chosen = [self.texts[n] for n in which]
        ids = torch.from_numpy(np.concatenate([one for one, _ in chosen]).astype(np.int64))
        times = torch.from_numpy(np.concatenate([n for _, n in chosen]).astype(np.float32))
        starts = torch.from_numpy(np.cumsum([0, *(len(one) for one, _ in chosen[:-1])]))
        # only the rows that occur: a table for a large vocabulary is long
        used, ids = torch.unique(ids, return_inverse=True)
        width = self.table.shape[1]
        normed = layer_norm(self.table[used], (width,), self.norm.weight, self.norm.bias, self.norm.eps)
        weights = normed[:, 0].exp()
        vectors = torch.cat([torch.zeros_like(normed[:, :1]), normed[:, 1:]], dim=1)
        counted = weights[ids] * times
        summed = embedding_bag(ids, vectors, starts, mode="sum", per_sample_weights=counted)
        mass = torch.zeros(len(chosen)).index_add(
            0, torch.bucketize(torch.arange(len(ids)), starts, right=True) - 1, counted
        )
        own = layer_norm(self.table[self.cls], (width,), self.norm.weight, self.norm.bias, self.norm.eps)
        return layer_norm(own + GAIN * summed / mass[:, None], (width,))


def train(
    bert: Any, pairs: Pairs, loss: Loss, values: Mapping[str, Any], *, k: int, cls: int, dims: Sequence[int],
    seed: int, progress: Callable[[float], None],
) -> dict[str, float]:  # fmt: skip
    """Train the token table for `epochs` over the pairs; the layers stay as they are. Adam with a cosine to nothing."""
    batch, rows = min(int(values["batch"]), len(pairs.rows)), len(pairs.rows)
    steps = max(1, math.ceil(float(values["epochs"]) * rows / batch))
    order = row_order(rows, steps * batch, seed)
    data = Ordered(pairs, order, k)
    bag = Bag(bert, pairs.ids, cls)
    optimizer = torch.optim.Adam([bag.table], lr=float(values["lr"]), betas=(0.9, 0.98))
    first = last = 0.0
    for step in range(steps):
        rate = min(1.0, (step + 1) / WARM) * 0.5 * (1.0 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = float(values["lr"]) * rate
        numbers = np.array([data[i] for i in range(step * batch, (step + 1) * batch)], np.int64)
        reps = [bag(column) for column in numbers.T]
        places = np.broadcast_to(np.arange(batch)[:, None], numbers.shape)
        labels = torch.from_numpy(np.concatenate([numbers, places], 1))
        found = torch.stack([loss([[one[:, :dim]] for one in reps], labels) for dim in dims]).sum()
        optimizer.zero_grad()
        found.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        last = found.item() / len(dims)
        first = first or last
        if step % 10 == 0:
            progress(step / steps)
    return {"lexical_steps": float(steps), "lexical_loss_first": first, "lexical_loss_last": last}
