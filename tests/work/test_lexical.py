"""The lexical start: the bag of words is the whole BERT, and its training finds words."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from test_contrast import Toy
from torch.nn.functional import cosine_similarity, normalize
from transformers import BertConfig, BertModel

from famc.work import lexical
from famc.work.contrast import InfoNCE
from famc.work.pair_data import Columns, Ids, Pairs, Row

VOCAB, CLS, SEP, COMMON, FIRST, NOISE = 120, 1, 2, 5, 10, 30
CONTEXT = 64


def bert(layers: int = 1, hidden: int = 32, heads: int = 2) -> Any:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCAB, hidden_size=hidden, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=heads, max_position_embeddings=CONTEXT, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, pad_token_id=0,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False).eval()


def text(*ids: int) -> Ids:
    return np.array([CLS, *ids, SEP], np.int32)


def searches(count: int, seed: int) -> Pairs:
    """Passages of six words and six tokens of noise, no more frequent; queries of two of the words and other noise."""
    draw = np.random.default_rng(seed)
    ids: list[Ids] = []
    for _ in range(count):
        words = draw.choice(np.arange(FIRST + NOISE, VOCAB), 6, replace=False).tolist()
        asked, told = (draw.integers(FIRST, FIRST + NOISE, size).tolist() for size in (3, 6))
        ids += [text(*words[:2], *asked, COMMON), text(COMMON, *words[::-1], *told, COMMON)]
    rows = tuple(Row(2 * at, (2 * at + 1,), ()) for at in range(count))
    return Pairs(rows, tuple(ids), torch.arange(len(ids)), tuple(map(str, range(len(ids)))), 0.0)


def whole(model: Any, texts: Any) -> torch.Tensor:
    """[CLS] of the last layer, as padded batches are run."""
    with torch.no_grad():
        found: torch.Tensor = model(**Columns(None, 0, True).features(texts)).last_hidden_state[:, 0]  # type: ignore[arg-type]
    return found


def trained(model: Any, pairs: Pairs, **values: Any) -> dict[str, float]:
    loss = InfoNCE(
        Toy(), temperature=0.05, micro_batch=64, families=pairs.families, margin=0.1, symmetric=True, bf16=False
    )  # fmt: skip
    given = {"epochs": 1.0, "batch": 32, "lr": 0.02} | values
    dims = given.pop("dims", [model.config.hidden_size])
    return lexical.train(
        model, pairs, loss.calculate_loss, given, k=0, cls=CLS, dims=dims, seed=1, progress=lambda share: None
    )


def accuracy(model: Any, pairs: Pairs, width: int | None = None) -> float:
    vectors = normalize(whole(model, pairs.ids)[:, :width], dim=-1)
    near = vectors[::2] @ vectors[1::2].T
    return float((near.argmax(1) == torch.arange(len(near))).float().mean())


TEXTS = [
    text(), text(17), text(17, 17, 17), text(COMMON), text(20, 21, COMMON, 20), text(CLS, SEP, 30),
    text(*np.random.default_rng(3).integers(FIRST, VOCAB, CONTEXT - 2).tolist()),
]  # fmt: skip


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("heads", [1, 4])
def test_the_bag_is_the_whole_model(layers: int, heads: int) -> None:
    """Empty, of one token, of the same token, long; before and after the table has learnt."""
    pairs, model = searches(40, 0), bert(layers, heads=heads)
    lexical.start(model, pairs, 1)
    for _ in range(2):
        bag = lexical.Bag(model, TEXTS, CLS)
        with torch.no_grad():
            found = bag(range(len(TEXTS)))
        near = cosine_similarity(found, whole(model, TEXTS))
        assert float(near.min()) > 0.9999
        assert len({tuple(row) for row in found.round(decimals=3).tolist()}) == len(TEXTS)
        trained(model, pairs, epochs=4.0)


def test_a_bag_is_the_same_in_any_company() -> None:
    model = bert()
    lexical.start(model, searches(40, 0), 1)
    bag = lexical.Bag(model, TEXTS, CLS)
    with torch.no_grad():
        some, alone = bag([4, 1, 4]), bag([1])
    assert torch.allclose(some[0], some[2], atol=1e-6)
    assert torch.allclose(some[1], alone[0], atol=1e-6)


def test_rare_words_weigh_more() -> None:
    """What every text holds moves a vector less than what one holds."""
    model, pairs = bert(), searches(200, 0)
    lexical.start(model, pairs, 1)
    rare, with_common, with_rare = whole(model, [text(30, 31), text(30, 31, COMMON), text(30, 31, 32)])
    assert cosine_similarity(rare, with_common, dim=0) > cosine_similarity(rare, with_rare, dim=0) + 0.05


def test_training_finds_words() -> None:
    """By whole vectors, among texts it has not seen: it learns which tokens say nothing."""
    pairs, held, model = searches(600, 0), searches(150, 1), bert(2, hidden=64)
    lexical.start(model, pairs, 1)
    before = accuracy(model, held)
    metrics = trained(model, pairs, epochs=15.0, batch=64)
    after = accuracy(model, held)
    assert metrics["lexical_steps"] == 141
    assert metrics["lexical_loss_last"] < metrics["lexical_loss_first"]
    assert after > before + 0.2


def test_prefixes_are_trained_too() -> None:
    pairs, held, found = searches(600, 0), searches(150, 1), []
    for dims in ([64], [64, 16]):
        model = bert(1, hidden=64)
        lexical.start(model, pairs, 1)
        trained(model, pairs, epochs=10.0, batch=64, dims=dims)
        found.append(accuracy(model, held, 16))
    assert found[1] > found[0] + 0.03


def test_only_the_table_is_trained() -> None:
    model, pairs = bert(2), searches(40, 0)
    lexical.start(model, pairs, 1)
    before = copy.deepcopy(model.state_dict())
    trained(model, pairs)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"embeddings.word_embeddings.weight"}


def test_it_repeats_bit_for_bit_and_depends_on_the_seed() -> None:
    pairs, tables = searches(60, 0), []
    for seed in (1, 1, 2):
        model = bert()
        lexical.start(model, pairs, seed)
        trained(model, pairs, epochs=3.0)
        tables.append(model.embeddings.word_embeddings.weight.detach())
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])


def test_the_layers_can_learn_from_there() -> None:
    """A start that adds nothing is no dead end: every matrix gets a gradient, or does once its output has moved."""
    model = bert(2)
    pairs = searches(20, 0)
    lexical.start(model, pairs, 1)
    features = Columns(None, 0, True).features(pairs.ids)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        vectors = normalize(model(**features).last_hidden_state[:, 0], dim=-1)
        scores = vectors[::2] @ vectors[1::2].T * 20
        torch.nn.functional.cross_entropy(scores, torch.arange(len(scores))).backward()
        optimizer.step()
    # no softmax sees a key's bias; types and positions have one row that all share or none that is used
    still = [n for n, p in model.named_parameters() if not p.grad.any() and "key.bias" not in n]
    assert not [name for name in still if "token_type" not in name and "position" not in name]
