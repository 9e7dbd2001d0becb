"""Distillation: the three distances by hand, their gradients, and what alpha, temperature and the teacher
do.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_artifacts import CHATS
from tiny_training import SHAPE, chat_mix, furthest, make_job, run, same, text_mix, tokenizer
from transformers import AutoModelForCausalLM

from famc.errors import StepFailed
from famc.work.distill import follow
from famc.work.loss import DISTANCES

LOSSES = ("forward_kl", "reverse_kl", "jsd")
P = [0.7, 0.2, 0.1]  # the teacher
Q = [0.3, 0.3, 0.4]  # the student
M = [(p + q) / 2 for p, q in zip(P, Q, strict=True)]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


BY_HAND = {"forward_kl": kl(P, Q), "reverse_kl": kl(Q, P), "jsd": (kl(P, M) + kl(Q, M)) / 2}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("home")
    found = {"tokenizer": tokenizer(folder / "tokenizer"), "data": text_mix(folder / "text")}
    big = dataclasses.replace(SHAPE, hidden=48, layers=3)
    run(make_job("pretrain", shape=big, steps=40), found, folder / "teacher")
    return {**found, "teacher": folder / "teacher"}


def train(home: dict[str, Path], out: Path, **more: Any) -> dict[str, Any]:
    return run(make_job("distill", **more), home, out)


# --- the distance -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LOSSES)
def test_distances_by_hand(kind: str) -> None:
    """Over three tokens; tests/work/test_loss.py holds values and gradients to autograd's."""
    value, _ = DISTANCES[kind](torch.tensor([Q]).log(), torch.tensor([P]).log())
    assert float(value) == pytest.approx(BY_HAND[kind], rel=1e-5)


def test_the_distances_hold_where_probabilities_vanish() -> None:
    student = torch.log_softmax(torch.tensor([[80.0, -80.0, 0.0]]), -1)
    teacher = torch.log_softmax(torch.tensor([[-80.0, 80.0, 0.0]]), -1)
    for kind in LOSSES:
        value, gradient = DISTANCES[kind](student, teacher)
        assert torch.isfinite(value) and torch.isfinite(gradient).all()
    assert float(DISTANCES["jsd"](student, teacher)[0]) == pytest.approx(math.log(2), rel=1e-4)  # its bound


def test_the_teacher_is_asked_at_the_tokens_that_count(home: dict[str, Path]) -> None:
    teacher = AutoModelForCausalLM.from_pretrained(home["teacher"], local_files_only=True).eval()
    job = make_job("distill", alpha=0.75, temperature=2.0, loss="jsd")
    given = {"input_ids": torch.arange(6)[None], "position_ids": torch.arange(6)[None]}
    said = follow(teacher, job)(given, torch.tensor([True, False, True, True, False, False]))
    expected = teacher(input_ids=given["input_ids"]).logits[0, [0, 2, 3]]
    assert torch.allclose(said.hidden @ said.weight.T, expected, atol=1e-5)
    assert (said.kind, said.alpha, said.temperature) == ("jsd", 0.75, 2.0)


# --- runs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LOSSES)
def test_the_student_nears_the_teacher(home: dict[str, Path], tmp_path: Path, kind: str) -> None:
    metrics = train(home, tmp_path, loss=kind, alpha=1.0, steps=40, lr={"peak": 1e-2})
    assert metrics["last_loss"] < 0.6 * metrics["first_loss"]


def test_alpha_zero_is_plain_training(home: dict[str, Path], tmp_path: Path) -> None:
    """The teacher's weight is nothing: the model is the one that pretraining makes, but for rounding on the
    two ways to the loss; and bit for bit the same whatever the distance is."""
    for loss in ("forward_kl", "jsd"):
        train(home, tmp_path / loss, alpha=0.0, loss=loss)
    assert same(tmp_path / "forward_kl", tmp_path / "jsd")
    params = make_job("distill", alpha=0.0).params
    job = make_job("pretrain")
    plain = dataclasses.replace(job, params={**params, "fim": None, "z_loss": 0.0})
    run(plain, {k: v for k, v in home.items() if k != "teacher"}, tmp_path / "plain")
    assert furthest(tmp_path / "forward_kl", tmp_path / "plain") < 1e-4


@pytest.mark.parametrize(
    "written",
    [{"alpha": 0.9}, {"temperature": 4.0}, {"loss": "reverse_kl"}, {"loss": "jsd"}, {"precision": "bf16"}],
    ids=str,
)
def test_each_parameter_reaches_the_weights(
    home: dict[str, Path], tmp_path: Path, written: dict[str, Any]
) -> None:
    train(home, tmp_path / "plain")
    train(home, tmp_path / "changed", **written)
    assert not same(tmp_path / "plain", tmp_path / "changed")


def test_micro_batches_do_not_change_the_result(home: dict[str, Path], tmp_path: Path) -> None:
    for micro in (4, 1):
        train(home, tmp_path / str(micro), job={"micro_batch": micro})
    assert furthest(tmp_path / "4", tmp_path / "1") < 1e-4


def test_on_conversations_only_the_assistants_tokens_count(home: dict[str, Path], tmp_path: Path) -> None:
    chats = home | {"data": chat_mix(tmp_path / "chat", CHATS * 2)}
    metrics = train(chats, tmp_path / "out", alpha=1.0, steps=30, lr={"peak": 1e-2})
    assert metrics["conversations"] == 6
    assert metrics["last_loss"] < metrics["first_loss"]


def test_the_teacher_is_left_as_it_is(home: dict[str, Path], tmp_path: Path) -> None:
    from tiny_artifacts import content

    before = content(home["teacher"])
    train(home, tmp_path)
    assert content(home["teacher"]) == before


def test_a_teacher_with_another_vocabulary_is_refused(home: dict[str, Path], tmp_path: Path) -> None:
    stranger = dataclasses.replace(SHAPE, vocab=400)
    run(make_job("pretrain", shape=stranger, steps=1), home, tmp_path / "stranger")
    with pytest.raises(StepFailed, match="the teacher has 400 rows of vocabulary, the student 384"):
        train(home | {"teacher": tmp_path / "stranger"}, tmp_path / "out")


def test_on_policy_is_refused(home: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(StepFailed, match="on-policy"):
        train(home, tmp_path, mode="on_policy")
