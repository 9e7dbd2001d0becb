"""DPO: margins rise against a frozen reference, in its own loss or IPO's, with or without a loss on the
chosen answer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_artifacts import content
from tiny_training import furthest, make_job, pair_mix, run, same, text_mix, tokenizer, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from famc.errors import StepFailed
from famc.work.dpo import length_bias
from famc.work.rows import examples


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What a dpo job reads: a tokenizer, pairs, and the parent."""
    folder = tmp_path_factory.mktemp("home")
    found = {"tokenizer": tokenizer(folder / "tokenizer"), "data": text_mix(folder / "text")}
    run(make_job("pretrain", steps=8), found, folder / "parent")
    return {**found, "data": pair_mix(folder / "pairs"), "model": folder / "parent"}


def train(home: dict[str, Path], out: Path, **more: Any) -> dict[str, Any]:
    written = {"steps": 4, "global_batch": 4, "context": 128, "lr": {"peak": 3e-3}}
    return run(make_job("dpo", **(written | more)), home, out)


def preferred(model: Path, reference: Path, pairs: Path, beta: float = 0.1) -> list[float]:
    """The margin of each pair, from log-probabilities taken plainly."""
    words = AutoTokenizer.from_pretrained(model)
    sums: dict[Path, list[list[float]]] = {}
    for folder in (model, reference):
        net = AutoModelForCausalLM.from_pretrained(folder).eval()
        sums[folder] = []
        for pair in examples(pairs):
            both = []
            for side in ("chosen", "rejected"):
                start = words.apply_chat_template(
                    pair["prompt"], add_generation_prompt=True, return_dict=True
                )["input_ids"]
                ids = words.apply_chat_template(pair["prompt"] + pair[side], return_dict=True)["input_ids"]
                with torch.no_grad():
                    logp = net(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
                both.append(float(sum(logp[at - 1, ids[at]] for at in range(len(start), len(ids)))))
            sums[folder].append(both)
    return [beta * ((a[0] - b[0]) - (a[1] - b[1])) for a, b in zip(sums[model], sums[reference], strict=True)]


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_margins_rise_until_every_pair_is_right(home: dict[str, Path], tmp_path: Path, loss: str) -> None:
    """The reported accuracy and margin are those that the saved folders give."""
    before = content(home["model"])
    metrics = train(home, tmp_path, loss=loss, steps=30)
    margins = preferred(tmp_path, home["model"], home["data"])
    assert min(margins) > 0
    assert metrics["reward_accuracy"] == 1.0
    assert metrics["reward_margin"] == pytest.approx(sum(margins) / len(margins), rel=0.3)
    assert metrics["last_loss"] < metrics["first_loss"]
    assert content(home["model"]) == before  # the reference is frozen


def test_the_first_loss_is_that_of_equal_models(home: dict[str, Path], tmp_path: Path) -> None:
    """Policy and reference are one at first: -log sigmoid(0), and nothing else without sft_weight."""
    metrics = train(home, tmp_path, steps=1, sft_weight=0.0)
    assert metrics["first_loss"] == pytest.approx(0.6931, abs=1e-3)


def test_the_loss_on_the_chosen_answer_is_its_mean_a_token(home: dict[str, Path], tmp_path: Path) -> None:
    """sft_weight x mean over pairs of -log p(chosen) / tokens, added to DPO's own."""
    without = train(home, tmp_path / "a", steps=1, global_batch=8, sft_weight=0.0)["first_loss"]
    with_it = train(home, tmp_path / "b", steps=1, global_batch=8, sft_weight=0.5)["first_loss"]
    words = AutoTokenizer.from_pretrained(home["model"])
    net = AutoModelForCausalLM.from_pretrained(home["model"]).eval()
    means = []
    for pair in examples(home["data"]):
        start = words.apply_chat_template(pair["prompt"], add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        ids = words.apply_chat_template(pair["prompt"] + pair["chosen"], return_dict=True)["input_ids"]
        with torch.no_grad():
            logp = net(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        tokens = [float(logp[at - 1, ids[at]]) for at in range(len(start), len(ids))]
        means.append(-sum(tokens) / len(tokens))
    assert with_it - without == pytest.approx(0.5 * sum(means) / len(means), rel=1e-3)


@pytest.mark.parametrize("sft_weight", [0.0, 0.5])
def test_micro_batches_do_not_change_the_result(
    home: dict[str, Path], tmp_path: Path, sft_weight: float
) -> None:
    for micro in (4, 2, 1):
        train(home, tmp_path / str(micro), sft_weight=sft_weight, job={"micro_batch": micro})
    for micro in (2, 1):
        assert furthest(tmp_path / "4", tmp_path / str(micro)) < 1e-4


@pytest.mark.parametrize(
    "written",
    [
        {"beta": 0.5},
        {"loss": "ipo"},
        {"sft_weight": 0.0},
        {"global_batch": 2},
        {"steps": None, "epochs": 1.0},
        {"context": 48},
        {"lora": {"r": 4}},
        {"optimizer": "muon"},
        {"precision": "bf16"},
        {"weight_decay": 1.0},
        {"betas": (0.5, 0.6)},
        {"clip": 0.01},
        {"rope_theta": 500.0},
        {"lr": {"peak": 3e-3, "schedule": "constant"}},
        {"lr": {"peak": 3e-3, "warmup": 0.9}},
        {"lr": {"peak": 3e-3, "min_ratio": 0.5}},
    ],
    ids=str,
)
def test_each_parameter_reaches_the_weights(
    home: dict[str, Path], plain: Path, tmp_path: Path, written: dict[str, Any]
) -> None:
    train(home, tmp_path, **written)
    assert not same(plain, tmp_path)


@pytest.fixture(scope="module")
def plain(home: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("plain")
    train(home, out)
    return out


def test_a_run_repeats_bit_for_bit(home: dict[str, Path], plain: Path, tmp_path: Path) -> None:
    train(home, tmp_path)
    assert same(plain, tmp_path)


def test_adapters_are_merged(home: dict[str, Path], tmp_path: Path) -> None:
    """Against the model without its adapters: the loss begins where equal models are."""
    metrics = train(home, tmp_path, lora={"r": 4}, sft_weight=0.0)
    assert metrics["first_loss"] == pytest.approx(0.6931, abs=1e-3)
    assert not list(tmp_path.glob("adapter*"))
    assert weights(tmp_path).keys() == weights(home["model"]).keys()


def test_a_trained_folder_is_complete(plain: Path) -> None:
    config = json.loads((plain / "config.json").read_text())
    assert config["use_cache"] is True
    assert (
        json.loads((plain / "generation_config.json").read_text())["eos_token_id"] == config["eos_token_id"]
    )


def test_metrics_tell_margins_and_length_bias(home: dict[str, Path], tmp_path: Path) -> None:
    metrics = train(home, tmp_path)
    assert {"reward_margin", "reward_accuracy", "logp_chosen", "logp_rejected", "beta"} <= metrics.keys()
    assert metrics["pairs"] == 8
    assert metrics["longer_is_chosen"] == 0.0  # the toy's rejected answers are all longer
    assert metrics["characters_rejected"] > metrics["characters_chosen"]


def test_length_bias_by_hand() -> None:
    say = [[{"role": "assistant", "content": "x" * n}] for n in (4, 2, 3, 3)]
    pairs = [{"chosen": say[0], "rejected": say[1]}, {"chosen": say[2], "rejected": say[3]}]
    assert length_bias(pairs) == {
        "longer_is_chosen": 0.5,
        "characters_chosen": 3.5,
        "characters_rejected": 2.5,
    }


def test_a_mix_without_pairs_is_refused(home: dict[str, Path], tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    (tmp_path / "none").mkdir()
    pq.write_table(
        pq.read_table(home["data"] / "examples.parquet").slice(0, 0), tmp_path / "none/examples.parquet"
    )
    with pytest.raises(StepFailed, match="no preference pairs"):
        train(home | {"data": tmp_path / "none"}, tmp_path / "out")
