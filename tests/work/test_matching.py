"""A reranker's lexical start: the matcher is the whole BERT, it scores as BM25 would, and its training finds words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_model import tiny_tokenizer
from transformers import BertConfig, BertForSequenceClassification

from famc.errors import StepFailed
from famc.work import matching
from famc.work.marks import Marks
from famc.work.matching import Matcher, Words
from famc.work.rank_data import Lists, Query

VOCAB, CLS, SEP, PAD, FIRST = 120, 1, 2, 0, 10
MARKS = Marks(CLS, SEP, 3, PAD)
CONTEXT = 64


def bert(layers: int = 2, hidden: int = 48, heads: int = 1) -> Any:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCAB, hidden_size=hidden, intermediate_size=64, num_hidden_layers=layers, num_labels=1,
        num_attention_heads=heads, max_position_embeddings=CONTEXT, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, pad_token_id=PAD,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def matcher(hidden: int = 48, seed: int = 0, spread: float = 1.0) -> Matcher:
    """Random token vectors; weights that differ by `spread`."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(VOCAB, hidden - matching.first(hidden), generator=generator)
    return Matcher(hidden, u, spread * torch.randn(VOCAB, generator=generator))


def scored(model: Any, pairs: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    """The classifier's scores of padded pairs with the types that a BERT's tokenizer gives."""
    rows = [([CLS, *q, SEP], [*p, SEP]) for q, p in pairs]
    width = max(len(a) + len(b) for a, b in rows)
    ids, types, mask = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(3))
    for at, (a, b) in enumerate(rows):
        ids[at, : len(a) + len(b)] = torch.tensor(a + b)
        types[at, len(a) : len(a) + len(b)] = 1
        mask[at, : len(a) + len(b)] = 1
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids, token_type_ids=types, attention_mask=mask).logits[:, 0]
    return found


def fast(model: Matcher, pairs: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    words = Words.of([np.array(text, np.int64) for pair in pairs for text in pair], CONTEXT)
    with torch.no_grad():
        return model(words, list(range(0, 2 * len(pairs), 2)), [[2 * at + 1] for at in range(len(pairs))])[
            :, 0
        ]


@pytest.mark.parametrize("hidden", [32, 48, 200])
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_the_matcher_is_the_whole_bert(hidden: int, spread: float) -> None:
    """Lengths, repeated words, empty texts, weights beyond what a row holds; whatever stands beside them in a batch."""
    draw = np.random.default_rng(4)
    pairs = [(draw.integers(FIRST, 60, draw.integers(1, 9)).tolist(), draw.integers(FIRST, 60, n).tolist())
             for n in (1, 2, 5, 20, 40, 50)]  # fmt: skip
    pairs += [([17, 17, 17], [17, 30, 17]), ([17], [17]), ([17], []), ([20, 21], [21, 20])]
    model, made = bert(hidden=hidden), matcher(hidden, spread=spread)
    with torch.no_grad():
        made.few += torch.tensor([0.3, -0.4, 0.1, 1.0])
    matching.write(model, made, MARKS)
    wanted = fast(made, pairs)
    assert wanted.std() > 0.3
    assert (scored(model, pairs) - wanted).abs().max() < 2e-3 * wanted.abs().max()


def test_it_counts_as_bm25_does() -> None:
    """More of the query's words are better, rare ones more so; a second occurrence adds less than the first; a match in
    a longer passage counts less."""
    made = matcher(200, spread=0.0)
    with torch.no_grad():
        made.w[50] = 2.0  # rare
    other = list(range(70, 90))

    def score(query: list[int], passage: list[int]) -> float:
        return float(fast(made, [(query, passage)]))

    none, one, both = (score([40, 41], [*found, *other][:20]) for found in ([], [40], [40, 41]))
    assert none < one < both
    assert score([40, 50], [50, *other]) > score([40, 50], [40, *other])
    once, twice, thrice = (score([40], [40] * n + other[n:]) for n in (1, 2, 3))
    assert twice - once > thrice - twice > 0
    assert score([40], [40, *other[:5]]) > score([40], [40, *other])


def lists_of(count: int, seed: int) -> tuple[Lists, list[Any]]:
    """The answer to word n is a passage with word n + 40, which is spelt otherwise: only training can tell."""
    draw = np.random.default_rng(seed)
    texts: list[Any] = []
    lists = Lists()
    for _ in range(count):
        word = int(draw.integers(FIRST, FIRST + 30))
        wrong = draw.choice([w for w in range(FIRST + 40, FIRST + 70) if w != word + 40], 4, replace=False)
        noise = [draw.integers(100, VOCAB, 3) for _ in range(5)]
        base = len(texts)
        texts += [
            np.array([word]),
            *(np.append(n, w) for n, w in zip(noise, [word + 40, *wrong], strict=True)),
        ]
        lists.queries.append(Query(base, (base + 1,), tuple(range(base + 2, base + 6))))
    return lists, texts


def test_training_finds_what_spelling_does_not_tell() -> None:
    made = matcher(64, spread=0.1)
    lists, texts = lists_of(400, 1)
    held, others = lists_of(100, 2)

    def accuracy() -> float:
        words = Words.of(others, CONTEXT)
        with torch.no_grad():
            scores = made(
                words, [q.query for q in held.queries], [[*q.positives, *q.negatives] for q in held.queries]
            )
        return float((scores.argmax(1) == 0).float().mean())

    before = accuracy()
    shares: list[float] = []
    values = {"epochs": 6.0, "batch": 16, "lr": 0.02}
    facts = matching.train(made, lists, Words.of(texts, CONTEXT), values, seed=3, progress=shares.append)
    assert before < 0.5 < 0.9 < accuracy()
    assert facts["lexical_steps"] == 150 and facts["lexical_loss_last"] < 0.5 * facts["lexical_loss_first"]
    assert shares == sorted(shares) and shares[0] >= 0 and shares[-1] < 1


def test_training_repeats() -> None:
    lists, texts = lists_of(60, 1)
    made = [matcher(48), matcher(48)]
    for one in made:
        matching.train(one, lists, Words.of(texts, CONTEXT), {"epochs": 1.0, "batch": 8, "lr": 0.01}, seed=3,
                       progress=lambda share: None)  # fmt: skip
    for left, right in zip(made[0].parameters(), made[1].parameters(), strict=True):
        assert torch.equal(left, right)


def test_tokens_that_are_spelt_alike_are_near() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["register", "registers", "banana"])
    rows = matching.spelling(tokenizer, 400, 0)
    a, b, c = (rows[tokenizer.convert_tokens_to_ids(t)] for t in ("register", "registers", "banana"))
    assert float(a @ b) > 0.6 > 0.3 > abs(float(a @ c))
    assert torch.allclose(rows.norm(dim=1), torch.ones(len(rows)))
    assert torch.equal(rows, matching.spelling(tokenizer, 400, 0))


def test_rarity_is_the_log_of_bm25s_idf() -> None:
    found = matching.rarity([np.array([4, 4, 5]), np.array([4])], 7)
    assert found[4].exp().item() == pytest.approx(np.log(1 + 0.5 / 2.5))
    assert found[5].exp().item() == pytest.approx(np.log(1 + 1.5 / 1.5))
    assert found[6].exp().item() == pytest.approx(np.log(1 + 2.5 / 0.5))


@pytest.mark.parametrize(("layers", "heads", "hidden"), [(1, 1, 48), (2, 2, 48), (2, 1, 24)])
def test_a_bert_that_can_not_begin_so_is_refused(layers: int, heads: int, hidden: int) -> None:
    with pytest.raises(StepFailed, match=f"not {layers}, {heads} and {hidden}"):
        matching.suits(bert(layers, hidden, heads))
