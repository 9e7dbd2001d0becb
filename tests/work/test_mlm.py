"""Masked language modelling: what is hidden, what the loss is, that it learns, and that a killed job hides the same."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_artifacts import DOCUMENTS, make_data
from tiny_model import tiny_tokenizer
from tiny_seq2seq import SHAPES, marked_tokenizer
from tiny_training import CONTEXT, SHAPE, furthest, make_job, run, same, text_mix, weights
from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline

from famc.cost.parameters import count
from famc.errors import StepFailed
from famc.job import Job
from famc.work import evaluate
from famc.work.loss import head_loss
from famc.work.marks import marks_of
from famc.work.mlm import MASKING, MaskedRows, Masking, hide, ordinary, score_masked
from famc.work.pieces import collated, generator, grouped, load_pieces, text_pieces
from famc.work.rows import IGNORE
from famc.work.training import new_model, parent_model

KINDS = ("bert", "modernbert")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family's tokenizer, a mix of text, held-out documents, and a trained model of each kind."""
    folder = tmp_path_factory.mktemp("home")
    marked_tokenizer(folder / "tokenizer")
    text_mix(folder / "text", 6000)
    make_data(folder / "held", [{"text": text} for text in DOCUMENTS])
    for arch in KINDS:
        train(folder, folder / arch, arch, steps=40)
    return folder


def train(home: Path, out: Path, arch: str, *, job: dict[str, Any] | None = None, **more: Any) -> Any:
    """Metrics of a pretraining run."""
    written = {"shape": SHAPES[arch], "lr": {"peak": 1e-2}} | more
    inputs = {"tokenizer": home / "tokenizer", "data": home / "text"}
    return run(make_job("pretrain", job=job, **written), inputs, out)


# --- rows -------------------------------------------------------------------------------------------------


def test_pieces_never_hold_two_documents_and_lose_no_token() -> None:
    stream = np.array([5, 6, 7, 8, 9, 0, 0, 4, 0, 3, 3, 3, 3, 3])
    pieces = text_pieces(stream, 0, 2)
    found = [pieces[i].tolist() for i in range(len(pieces))]
    assert found == [[5, 6], [7, 8], [9], [4], [3, 3], [3, 3], [3]]


def test_short_pieces_are_left_out_and_nothing_but_them_is_an_error() -> None:
    stream = np.array([5, 6, 7, 0, 4, 0])
    assert [text_pieces(stream, 0, 2, 2)[i].tolist() for i in range(1)] == [[5, 6]]
    with pytest.raises(StepFailed, match="no document of 4 tokens"):
        text_pieces(stream, 0, 8, 4)


def test_batches_keep_their_members_sorted_by_length() -> None:
    lengths = np.array([9, 3, 5, 1])
    assert grouped(np.array([0, 1, 2, 3, 0, 1]), 2, lengths).tolist() == [1, 0, 3, 2, 1, 0]


def test_rates_are_those_of_the_papers() -> None:
    ids, words = np.arange(100, 1100), np.arange(10, 20)
    for arch, rate in (("bert", 0.15), ("modernbert", 0.30)):
        masked = other = kept = 0
        for seed in range(40):
            shown, labels = hide(ids, MASKING[arch], generator(seed), 5, words)
            chosen = labels != IGNORE
            assert chosen.sum() == round(rate * len(ids))
            assert (labels[chosen] == ids[chosen]).all()
            assert (shown[~chosen] == ids[~chosen]).all()
            masked += int((shown[chosen] == 5).sum())
            other += int(np.isin(shown[chosen], words).sum())
            kept += int((shown[chosen] == ids[chosen]).sum())
        shares = np.array([masked, other, kept]) / (masked + other + kept)
        wanted = (0.8, 0.1, 0.1) if arch == "bert" else (1.0, 0.0, 0.0)
        assert shares == pytest.approx(wanted, abs=0.02)


def test_the_shortest_text_has_one_token_hidden() -> None:
    shown, labels = hide(np.array([7]), Masking(0.15), generator(1), 5, np.array([9]))
    assert (shown.tolist(), labels.tolist()) == ([5], [7])


def test_rows_are_a_function_of_seed_and_place_and_differ_from_pass_to_pass(home: Path) -> None:
    words = AutoTokenizer.from_pretrained(home / "tokenizer")
    marks, pieces = marks_of(words), load_pieces(home / "text", CONTEXT - 2)
    order = np.array([3, 3, 1])

    def rows(seed: int) -> MaskedRows:
        return MaskedRows(pieces, order, MASKING["bert"], marks, ordinary(words), seed)

    first, again, other = rows(1), rows(1), rows(2)
    assert all(torch.equal(first[i]["input_ids"], again[i]["input_ids"]) for i in range(3))
    assert not torch.equal(first[0]["labels"], first[1]["labels"])  # the same text, read a second time
    assert not torch.equal(first[0]["labels"], other[0]["labels"])
    ids = first[2]["input_ids"].tolist()
    assert (ids[0], ids[-1]) == (marks.cls, marks.sep)
    assert first[2]["labels"][[0, -1]].tolist() == [IGNORE, IGNORE]
    assert len(ids) <= CONTEXT


def test_random_words_are_never_special_tokens(home: Path) -> None:
    words = AutoTokenizer.from_pretrained(home / "tokenizer")
    special = set(words.added_tokens_decoder)
    assert len(special) == 20
    assert not special & set(ordinary(words).tolist())


def test_a_tokenizer_without_a_mask_is_refused() -> None:
    with pytest.raises(StepFailed, match="no token that hides others"):
        marks_of(tiny_tokenizer())


# --- the loss ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", KINDS)
def test_the_loss_is_transformers_own_with_its_gradients(home: Path, arch: str) -> None:
    words = AutoTokenizer.from_pretrained(home / "tokenizer")
    marks, pieces = marks_of(words), load_pieces(home / "text", CONTEXT - 2)
    params = make_job("pretrain", shape=SHAPES[arch]).params
    model = new_model(params["shape"], words, 0)
    with torch.no_grad():
        for weight in model.parameters():  # biases start at 0: one that is dropped goes unseen
            if weight.ndim == 1:
                weight.add_(torch.randn_like(weight) * 0.3)
    rows = MaskedRows(pieces, np.arange(6), MASKING[arch], marks, ordinary(words), 1)
    batch = collated([rows[i] for i in range(6)], marks.pad)
    assert len({len(rows[i]["input_ids"]) for i in range(6)}) > 1  # padding is among it
    theirs = model(**batch).loss
    theirs.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    found = score_masked(model, batch)
    ours = head_loss(found.hidden, found.weight, found.labels, bf16=False) / len(found.labels)
    ours.backward()
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)
    assert wanted.keys() == {n for n, p in model.named_parameters() if p.grad is not None}
    for name, parameter in model.named_parameters():
        if name in wanted:
            assert torch.allclose(parameter.grad, wanted[name], atol=1e-6, rtol=1e-4), name


# --- training ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", KINDS)
def test_it_learns_and_leaves_a_folder_that_fills_masks(home: Path, tmp_path: Path, arch: str) -> None:
    metrics = train(home, tmp_path / "out", arch, steps=120, optimizer="muon")
    assert metrics["last_loss"] < 0.75 * metrics["first_loss"]
    assert metrics["first_loss"] == pytest.approx(np.log(SHAPES[arch].vocab), rel=0.1)
    assert metrics["mask_rate"] == MASKING[arch].rate
    assert metrics["tokens"] <= 120 * 4 * CONTEXT
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert sum(p.numel() for p in model.parameters()) == count(SHAPES[arch]).total
    assert "use_cache" not in json.loads((tmp_path / "out/config.json").read_text()) or arch == "bert"
    words = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert words.chat_template is None
    assert words.model_max_length == CONTEXT
    ids = words("Bread needs flour")["input_ids"]
    family = AutoTokenizer.from_pretrained(home / "tokenizer")
    marks = marks_of(family)
    assert ids == [marks.cls, *family("Bread needs flour")["input_ids"], marks.sep]
    guesses = pipeline("fill-mask", model=model, tokenizer=words, device="cpu")("Bread needs <|mask|>, water")
    assert len(guesses) == 5


@pytest.mark.parametrize("arch", KINDS)
def test_the_micro_batch_changes_nothing(home: Path, tmp_path: Path, arch: str) -> None:
    for name, micro in (("whole", 4), ("single", 1)):
        train(home, tmp_path / name, arch, steps=3, micro_batch=micro)
    assert furthest(tmp_path / "whole", tmp_path / "single") < 1e-4


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_job_that_resumes_leaves_the_same_bytes(home: Path, tmp_path: Path, precision: str) -> None:
    """The run without a break against one whose later checkpoint and result are lost."""
    for name in ("straight", "broken"):
        train(home, tmp_path / name, "modernbert", steps=20, checkpoint_steps=10, precision=precision)
    (tmp_path / "broken/model.safetensors").unlink()
    shutil.rmtree(tmp_path / "broken/checkpoints/checkpoint-20")
    again = train(home, tmp_path / "broken", "modernbert", steps=20, checkpoint_steps=10, precision=precision)
    assert again["resumed_at"] == 10
    assert same(tmp_path / "straight", tmp_path / "broken")


def test_seeds_make_other_models(home: Path, tmp_path: Path) -> None:
    job = make_job("pretrain", shape=SHAPES["bert"], lr={"peak": 1e-2}, steps=2)
    inputs = {"tokenizer": home / "tokenizer", "data": home / "text"}
    for name, seed in (("one", 1), ("two", 2)):
        run(dataclasses.replace(job, params={**job.params, "seed": seed}), inputs, tmp_path / name)
    assert furthest(tmp_path / "one", tmp_path / "two") > 1e-3


@pytest.mark.parametrize("arch", KINDS)
def test_training_goes_on_from_a_parent(home: Path, tmp_path: Path, arch: str) -> None:
    inputs = {"tokenizer": home / "tokenizer", "data": home / "text", "model": home / arch}
    metrics = run(
        make_job("pretrain", shape=SHAPES[arch], steps=2, lr={"peak": 1e-5}), inputs, tmp_path / "out"
    )
    assert metrics["first_loss"] < 0.9 * np.log(SHAPES[arch].vocab)
    assert 0 < furthest(home / arch, tmp_path / "out") < 1e-3


def test_positions_of_modernbert_grow_and_its_local_base_stays(home: Path) -> None:
    shape = make_job("pretrain", shape=SHAPES["modernbert"]).params["shape"]
    config = parent_model(home / "modernbert", {**shape, "context": 128, "rope_theta": 160000.0}).config
    assert config.max_position_embeddings == 128
    assert config.rope_parameters["full_attention"]["rope_theta"] == 160000.0
    assert config.rope_parameters["sliding_attention"]["rope_theta"] == 10000.0


def test_positions_of_bert_can_not_grow(home: Path) -> None:
    shape = make_job("pretrain", shape=SHAPES["bert"]).params["shape"]
    with pytest.raises(StepFailed, match=f"has learnt {CONTEXT} positions"):
        parent_model(home / "bert", {**shape, "context": 128})


def test_examples_are_no_text(home: Path, tmp_path: Path) -> None:
    (tmp_path / "mix").mkdir()
    inputs = {"tokenizer": home / "tokenizer", "data": tmp_path / "mix"}
    with pytest.raises(StepFailed, match="no mix of text"):
        run(make_job("pretrain", shape=SHAPES["bert"]), inputs, tmp_path / "out")


# --- evaluation -------------------------------------------------------------------------------------------


def measure(home: Path, out: Path, model: str, task: str = "fill_mask") -> dict[str, Any]:
    tasks = [{"task": task, "data": "held", "n": None, "max_new_tokens": 8}]
    job = Job.for_test("t/eval", "eval", {"tasks": tasks, "context": CONTEXT})
    inputs = {"model": home / model, "tokenizer": home / "tokenizer", "data.held": home / "held"}
    out.mkdir()
    return evaluate.run(job, inputs, out)


@pytest.mark.parametrize("arch", KINDS)
def test_hidden_tokens_of_held_out_text_are_scored_by_document(home: Path, tmp_path: Path, arch: str) -> None:
    found = measure(home, tmp_path / "one", arch)
    assert 0 < found["masked_loss"] < 2 * np.log(SHAPES[arch].vocab)
    assert 0 <= found["masked_accuracy"] <= 1
    results = json.loads((tmp_path / "one/results.json").read_text())
    assert results["masked_loss"]["n"] == len(DOCUMENTS)
    assert results["masked_loss"]["higher_is_better"] is False
    assert found == measure(home, tmp_path / "two", arch)
    words, lines = AutoTokenizer.from_pretrained(home / "tokenizer"), 0
    for text in DOCUMENTS:
        ids = words(text)["input_ids"]
        pieces = [ids[at : at + CONTEXT - 2] for at in range(0, len(ids), CONTEXT - 2)]
        lines += sum(max(1, round(0.15 * len(piece))) for piece in pieces)
    units = json.loads((tmp_path / "one/units.json").read_text())
    assert sum(units["masked_loss"]["den"]) == lines


@pytest.mark.parametrize("task", ["bits_per_byte", "answers", "preference"])
def test_what_an_encoder_can_not_be_asked_is_refused(home: Path, tmp_path: Path, task: str) -> None:
    with pytest.raises(StepFailed, match="asks what follows"):
        measure(home, tmp_path / "out", "bert", task)


def test_a_decoder_is_not_asked_for_hidden_tokens(home: Path, tmp_path: Path) -> None:
    inputs = {"tokenizer": home / "tokenizer", "data": home / "text"}
    run(make_job("pretrain", shape=dataclasses.replace(SHAPE, vocab=448)), inputs, tmp_path / "decoder")
    assert len(weights(tmp_path / "decoder"))
    (tmp_path / "home").mkdir()
    for name, source in (("tokenizer", home), ("held", home), ("decoder", tmp_path)):
        (tmp_path / "home" / name).symlink_to(source / name)
    with pytest.raises(StepFailed, match="not trained to see behind them"):
        measure(tmp_path / "home", tmp_path / "out", "decoder")
