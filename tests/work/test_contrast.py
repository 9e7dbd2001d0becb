"""The contrastive loss: it is InfoNCE, what nobody knows has no part in it, and memory moves nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss
from torch.nn.functional import normalize

from famc.work import contrast
from famc.work.contrast import InfoNCE
from famc.work.pair_data import Columns, Pairs, Row

ROWS, K, WIDTH, WORDS = 7, 2, 12, 40
SCALE = 20.0


class Toy(torch.nn.Sequential):
    """What the loss asks of a SentenceTransformer: features in, vectors out."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        super().__init__(torch.nn.Embedding(WORDS, WIDTH), torch.nn.Linear(WIDTH, WIDTH))

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        mask = features["attention_mask"][..., None]
        mean = (self[0](features["input_ids"]) * mask).sum(1) / mask.sum(1)
        return {"sentence_embedding": self[1](mean)}

    def get_embedding_dimension(self) -> int:
        return WIDTH

    def vectors(self, pairs: Pairs) -> torch.Tensor:
        features = Columns(pairs, 0, False).features(pairs.ids)
        return normalize(self(features)["sentence_embedding"], dim=-1)


def made(rows: int = ROWS, k: int = K, families: dict[int, int] | None = None) -> tuple[Pairs, torch.Tensor]:
    """Pairs of texts of several lengths, all of which differ, and the numbers of their texts by row."""
    draw = np.random.default_rng(1)
    width = 2 + k
    ids = tuple(
        draw.integers(1, WORDS, size=1 + number * 3 % 5).astype(np.int32) for number in range(rows * width)
    )
    numbers = np.arange(rows * width).reshape(rows, width)
    kinds = torch.arange(rows * width)
    for number, family in (families or {}).items():
        kinds[number] = family
    found = tuple(Row(int(q), (int(p),), tuple(map(int, n))) for q, p, *n in numbers)
    return Pairs(found, ids, kinds, tuple(map(str, kinds.tolist())), 0.0), torch.from_numpy(numbers)


def batch_of(pairs: Pairs, numbers: torch.Tensor) -> dict[str, Any]:
    return Columns(pairs, 0, False)([tuple(row) for row in numbers.tolist()])


def loss_of(
    model: Toy, pairs: Pairs, *, micro: int = 64, cached: bool = False, symmetric: bool = False,
    margin: float | None = None, teacher: torch.Tensor | None = None, alpha: float = 0.0, bf16: bool = False,
) -> InfoNCE:  # fmt: skip
    loss = InfoNCE(
        model, temperature=1 / SCALE, micro_batch=micro, families=pairs.families, margin=margin,
        symmetric=symmetric, bf16=bf16, teacher=teacher, alpha=alpha,
    )  # fmt: skip
    loss.cached = cached
    return loss


def both(model: Toy, loss: Any, batch: dict[str, Any]) -> tuple[float, list[torch.Tensor]]:
    """The loss and the gradients of every weight."""
    model.zero_grad()
    value = loss(batch["columns"], batch["labels"])
    value.backward()
    return value.item(), [p.grad.clone() for p in model.parameters()]


def close(one: tuple[float, list[torch.Tensor]], other: tuple[float, list[torch.Tensor]]) -> bool:
    return one[0] == pytest.approx(other[0], rel=1e-5, abs=1e-6) and all(
        torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(one[1], other[1], strict=True)
    )


def by_hand(
    vectors: torch.Tensor, numbers: torch.Tensor, left: set[tuple[int, int]] = frozenset(), symmetric: bool = False
) -> torch.Tensor:  # fmt: skip
    """InfoNCE pair by pair. `left`: (query's text, passage's text) that have no part in it."""
    rows, passages = len(numbers), numbers[:, 1:].T.reshape(-1).tolist()
    total = torch.zeros(())
    for row in range(rows):
        query, positive = numbers[row, :2].tolist()
        own = SCALE * vectors[query] @ vectors[positive]
        seen = [
            SCALE * vectors[query] @ vectors[p]
            for at, p in enumerate(passages)
            if at == row or (query, p) not in left
        ]
        loss = torch.stack(seen).logsumexp(0) - own
        if symmetric:
            asked = [
                SCALE * vectors[q] @ vectors[positive]
                for at, q in enumerate(numbers[:, 0].tolist())
                if at == row or (q, positive) not in left
            ]
            loss = 0.5 * (loss + torch.stack(asked).logsumexp(0) - own)
        total = total + loss / rows
    return total


def hand(model: Toy, pairs: Pairs, numbers: torch.Tensor, **more: Any) -> tuple[float, list[torch.Tensor]]:
    model.zero_grad()
    value = by_hand(model.vectors(pairs), numbers, **more)
    value.backward()
    return value.item(), [p.grad.clone() for p in model.parameters()]


# --- InfoNCE ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("k", [0, 2])
def test_it_is_info_nce(symmetric: bool, k: int) -> None:
    model, (pairs, numbers) = Toy(), made(k=k)
    found = both(model, loss_of(model, pairs, symmetric=symmetric), batch_of(pairs, numbers))
    assert close(found, hand(model, pairs, numbers, symmetric=symmetric))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("k", [0, 2])
def test_it_is_sentence_transformers_loss(symmetric: bool, k: int) -> None:
    model, (pairs, numbers) = Toy(), made(k=k)
    columns = [Columns(pairs, 0, False).features([pairs.ids[n] for n in column]) for column in numbers.T]
    ways = ("query_to_doc", "doc_to_query") if symmetric else ("query_to_doc",)
    theirs = MultipleNegativesRankingLoss(model, scale=SCALE, directions=ways, partition_mode="per_direction")
    reference = both(model, theirs, {"columns": columns, "labels": None})
    assert close(both(model, loss_of(model, pairs, symmetric=symmetric), batch_of(pairs, numbers)), reference)


@pytest.mark.parametrize("dims", [(), (WIDTH, 8, 3)])
@pytest.mark.parametrize("teacher", [False, True])
def test_micro_batches_and_caching_change_nothing(dims: tuple[int, ...], teacher: bool) -> None:
    model, (pairs, numbers) = Toy(), made()
    theirs = normalize(torch.randn(len(pairs.ids), 5), dim=-1) if teacher else None
    batch, found = batch_of(pairs, numbers), []
    for cached, micro in ((False, 64), (False, 3), (True, 1), (True, 3), (True, 64)):
        loss: Any = loss_of(
            model, pairs, cached=cached, micro=micro, symmetric=True, margin=0.1, teacher=theirs, alpha=0.3
        )
        if dims:
            loss = MatryoshkaLoss(model, loss, matryoshka_dims=list(dims))
        found.append(both(model, loss, batch))
    assert found[0][0] > 0.1
    assert all(close(one, found[0]) for one in found[1:])


def test_matryoshka_sums_the_prefixes() -> None:
    model, (pairs, numbers) = Toy(), made()
    dims = (WIDTH, 8, 3)
    whole = MatryoshkaLoss(model, loss_of(model, pairs), matryoshka_dims=list(dims))
    found = both(model, whole, batch_of(pairs, numbers))
    model.zero_grad()
    value = sum(by_hand(normalize(model.vectors(pairs)[:, :dim], dim=-1), numbers) for dim in dims)
    assert isinstance(value, torch.Tensor)
    value.backward()
    assert close(found, (value.item(), [p.grad.clone() for p in model.parameters()]))


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("dims", [(), (WIDTH, 8)])
def test_rows_in_chunks_change_nothing(
    monkeypatch: pytest.MonkeyPatch, cached: bool, dims: tuple[int, ...]
) -> None:
    model, (pairs, numbers) = Toy(), made(families={1: 5, 0: 8})
    theirs = normalize(torch.randn(len(pairs.ids), 5), dim=-1)
    found = []
    for rows in (1024, 4, 1):
        monkeypatch.setattr(contrast, "ROWS", rows)
        loss: Any = loss_of(
            model, pairs, symmetric=True, margin=0.05, teacher=theirs, alpha=0.5, cached=cached, micro=2
        )
        if dims:
            loss = MatryoshkaLoss(model, loss, matryoshka_dims=list(dims))
        found.append(both(model, loss, batch_of(pairs, numbers)))
    assert all(close(one, found[0]) for one in found[1:])


def test_bf16_is_near_and_the_same_in_both_ways() -> None:
    model, (pairs, numbers) = Toy(), made()
    batch = batch_of(pairs, numbers)
    exact = both(model, loss_of(model, pairs), batch)
    found = [both(model, loss_of(model, pairs, bf16=True, cached=c, micro=64), batch) for c in (False, True)]
    assert found[0][0] == pytest.approx(exact[0], rel=0.05)
    assert found[0][0] != exact[0]
    assert close(found[0], found[1])


# --- what has no part in it ---------------------------------------------------------------------------------
# text numbers of row r: query 4 r, positive 4 r + 1, negatives 4 r + 2 and 4 r + 3


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_copy_of_the_positive_is_no_negative(symmetric: bool) -> None:
    """Rows 0 and 2 have the same passage, row 3 mined it as a negative of another query."""
    model, (pairs, numbers) = Toy(), made(families={9: 1, 14: 1})
    found = both(model, loss_of(model, pairs, symmetric=symmetric), batch_of(pairs, numbers))
    left = {(0, 9), (0, 14), (8, 1), (8, 14)}
    assert close(found, hand(model, pairs, numbers, left=left, symmetric=symmetric))


@pytest.mark.parametrize("symmetric", [False, True])
def test_passages_of_the_same_query_are_no_negatives(symmetric: bool) -> None:
    """Rows 0 and 2 ask the same: the answer of one answers the other, but what was mined for either answers neither."""
    model, (pairs, numbers) = Toy(), made(families={8: 0})
    found = both(model, loss_of(model, pairs, symmetric=symmetric), batch_of(pairs, numbers))
    assert close(found, hand(model, pairs, numbers, left={(0, 9), (8, 1)}, symmetric=symmetric))


def test_a_querys_own_negatives_count_for_it() -> None:
    """One as near as its positive, where all else is at right angles."""
    pairs, numbers = made(rows=2, k=1)
    unit = torch.eye(4)
    labels = torch.cat([numbers, torch.tensor([[0] * 3, [1] * 3])], 1)
    values = []
    for own in (unit[2], unit[0]):
        reps = [[unit[:2]], [unit[:2]], [torch.stack([own, unit[3]])]]
        values.append(loss_of(Toy(), pairs).calculate_loss(reps, labels).item())
    assert values[0] == pytest.approx(0.0, abs=1e-6)
    assert values[1] == pytest.approx(np.log(2.0) / 2, rel=1e-5)


@pytest.mark.parametrize("symmetric", [False, True])
def test_what_is_nearer_by_more_than_the_margin_is_left_out(symmetric: bool) -> None:
    model, (pairs, numbers) = Toy(), made()
    with torch.no_grad():
        vectors = model.vectors(pairs)
    passages = numbers[:, 1:].reshape(-1).tolist()
    gaps = {
        (q, p): float(vectors[q] @ vectors[p] - vectors[q] @ vectors[own])
        for q, own in numbers[:, :2].tolist()
        for p in passages
    }
    for margin in (0.0, 0.2, 0.5):
        left = {pair for pair, gap in gaps.items() if gap > margin}
        assert left
        found = both(
            model, loss_of(model, pairs, margin=margin, symmetric=symmetric), batch_of(pairs, numbers)
        )
        assert close(found, hand(model, pairs, numbers, left=left, symmetric=symmetric))


def test_exactly_at_the_margin_is_kept() -> None:
    """Vectors whose similarities are exact: 1/2 and 1."""
    pairs, numbers = made(rows=2, k=0)
    unit = torch.eye(4)
    reps = [[torch.stack([unit[0], unit[1]])], [torch.stack([unit.new_tensor([0.5] * 4), unit[0]])]]
    labels = torch.cat([numbers, torch.tensor([[0, 0], [1, 1]])], 1)
    model = Toy()
    # query 0: its positive at .5, the other passage at 1; query 1: at 0 and at .5
    values = [float(loss_of(model, pairs, margin=m).calculate_loss(reps, labels)) for m in (0.5, 0.499)]
    kept = torch.tensor([0.5, 1.0]).mul(SCALE).logsumexp(0) - 0.5 * SCALE
    other = torch.tensor([0.0, 0.5]).mul(SCALE).logsumexp(0) - 0.0
    assert values[0] == pytest.approx(float(kept + other) / 2, rel=1e-6)
    assert values[1] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("cached", [False, True])
def test_padding_for_missing_negatives_does_not_count(cached: bool) -> None:
    """Rows that mined one negative or none: for them, and for all other rows."""
    model, (pairs, numbers) = Toy(), made()
    numbers = numbers.clone()
    numbers[0, 2:] = 1
    numbers[1, 3] = 5
    found = both(model, loss_of(model, pairs, cached=cached, micro=2), batch_of(pairs, numbers))
    model.zero_grad()
    vectors = model.vectors(pairs)
    passages = [*numbers[:, 1].tolist(), *numbers[1:, 2].tolist(), *numbers[2:, 3].tolist()]
    value = torch.stack(
        [
            (SCALE * vectors[passages] @ vectors[q]).logsumexp(0) - SCALE * vectors[q] @ vectors[p]
            for q, p in numbers[:, :2].tolist()
        ]
    ).mean()
    value.backward()
    assert close(found, (value.item(), [p.grad.clone() for p in model.parameters()]))


def test_a_batch_that_can_tell_nothing_apart_teaches_nothing() -> None:
    model, (pairs, numbers) = Toy(), made(rows=3, k=0, families={1: 1, 3: 1, 5: 1})
    value, gradients = both(model, loss_of(model, pairs, symmetric=True), batch_of(pairs, numbers))
    assert value == 0.0
    assert not any(g.any() for g in gradients)


# --- the teacher --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [False, True])
def test_who_is_like_the_teacher_learns_nothing(symmetric: bool) -> None:
    model, (pairs, numbers) = Toy(), made(families={9: 1})
    with torch.no_grad():
        theirs = model.vectors(pairs)
    loss = loss_of(model, pairs, teacher=theirs, alpha=1.0, margin=0.3, symmetric=symmetric)
    value, gradients = both(model, loss, batch_of(pairs, numbers))
    assert value == pytest.approx(0.0, abs=1e-6)
    assert all(float(g.abs().max()) < 1e-6 for g in gradients)


def test_the_teachers_part_is_kl() -> None:
    model, (pairs, numbers) = Toy(), made()
    theirs = normalize(torch.randn(len(pairs.ids), 5, generator=torch.Generator().manual_seed(2)), dim=-1)
    batch, passages = batch_of(pairs, numbers), numbers[:, 1:].T.reshape(-1)
    for alpha in (1.0, 0.25):
        found = both(model, loss_of(model, pairs, teacher=theirs, alpha=alpha), batch)
        model.zero_grad()
        vectors, queries = model.vectors(pairs), numbers[:, 0]
        wanted, ours = (SCALE * v[queries] @ v[passages].T for v in (theirs, vectors))
        gap = torch.nn.functional.kl_div(
            ours.log_softmax(1), wanted.log_softmax(1), log_target=True, reduction="batchmean"
        )
        value = alpha * gap + (1 - alpha) * by_hand(vectors, numbers)
        value.backward()
        assert close(found, (value.item(), [p.grad.clone() for p in model.parameters()]))
