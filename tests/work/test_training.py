"""The training loop: schedules, optimisers, budgets, and what a trained folder holds. Real runs at a tiny
shape.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_artifacts import CHATS
from tiny_model import tiny_tokenizer
from tiny_training import (
    CONTEXT,
    MOE,
    SHAPE,
    chat_mix,
    furthest,
    make_job,
    run,
    same,
    text_mix,
    tokenizer,
    values,
    weights,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from famc.errors import StepFailed
from famc.job import Job
from famc.work.optim import Pair, make_optimizer, schedule
from famc.work.training import arguments, new_model, row_order, step_count


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, a text mix, a mix of conversations, and a trained parent."""
    folder = tmp_path_factory.mktemp("home")
    tokenizer(folder / "tokenizer")
    text_mix(folder / "text")
    chat_mix(folder / "chat", CHATS * 4)
    run(make_job("pretrain"), {"tokenizer": folder / "tokenizer", "data": folder / "text"}, folder / "parent")
    return folder


def inputs(home: Path, *, parent: bool = False, data: str = "text") -> dict[str, Path]:
    found = {"tokenizer": home / "tokenizer", "data": home / data}
    return found | ({"model": home / "parent"} if parent else {})


def train(
    home: Path, out: Path, *, kind: str = "pretrain", parent: bool = False, data: str = "text", **more: Any
) -> Any:
    """Metrics of a run of a kind with fields as a spec writes them."""
    return run(make_job(kind, **more), inputs(home, parent=parent, data=data), out)


# --- schedules ----------------------------------------------------------------------------------------------


def shape_of(kind: str, steps: int = 100, **lr: float) -> list[float]:
    params = {"lr.schedule": kind, "lr.warmup": 0.1, "lr.min_ratio": 0.2, "lr.decay": 0.3}
    at = schedule(params | {f"lr.{k}": v for k, v in lr.items()}, steps)
    return [at(step) for step in range(steps + 1)]


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd"])
def test_every_schedule_warms_up_in_equal_steps(kind: str) -> None:
    curve = shape_of(kind)
    assert curve[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert curve[10] == pytest.approx(1.0)
    assert max(curve) == pytest.approx(1.0)


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "decay"])
def test_schedules_fall_to_the_last_ratio_and_never_rise_again(kind: str) -> None:
    curve = shape_of(kind)[10:]
    assert curve[-1] == pytest.approx(0.2)
    assert all(a >= b - 1e-12 for a, b in pairwise(curve))


def test_cosine_is_half_way_down_in_the_middle() -> None:
    assert shape_of("cosine")[55] == pytest.approx(0.6)


def test_linear_falls_evenly() -> None:
    assert shape_of("linear")[55] == pytest.approx(0.6)


def test_constant_stays_at_the_peak() -> None:
    assert set(shape_of("constant")[10:]) == {1.0}


def test_wsd_is_stable_then_decays_over_its_share() -> None:
    curve = shape_of("wsd")
    assert set(curve[10:71]) == {1.0}
    assert curve[85] == pytest.approx(0.6)


def test_decay_starts_at_the_peak_without_a_warm_up() -> None:
    curve = shape_of("decay")
    assert curve[0] == 1.0
    assert curve[50] == pytest.approx(0.6)


def test_without_warm_up_the_first_step_is_at_the_peak() -> None:
    assert shape_of("cosine", warmup=0.0)[0] == 1.0


# --- optimisers ---------------------------------------------------------------------------------------------


def model_and(
    optimizer: str, shape: Any = SHAPE, **more: Any
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    params, _ = values("pretrain", shape, optimizer=optimizer, **more)
    model = new_model(params["shape"], tiny_tokenizer(), 0)
    return model, make_optimizer(model, params)


@pytest.mark.parametrize("shape", [SHAPE, MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_weight_is_trained_once_and_vectors_do_not_decay(optimizer: str, shape: Any) -> None:
    model, made = model_and(optimizer, shape, weight_decay=0.3)
    members = [p for group in made.param_groups for p in group["params"]]
    assert {id(p) for p in members} == {id(p) for p in model.parameters()}
    assert len(members) == len({id(p) for p in members})
    for group in made.param_groups:
        for parameter in group["params"]:
            assert group["weight_decay"] in (0.0, 0.3)
            if parameter.dim() < 2:
                assert group["weight_decay"] == 0.0
    blocks = [p for name, p in model.named_parameters() if p.dim() >= 2 and "embed" not in name]
    decayed = {id(p) for group in made.param_groups if group["weight_decay"] for p in group["params"]}
    assert {id(p) for p in blocks} <= decayed


def test_muon_takes_the_matrices_of_the_blocks_only() -> None:
    model, made = model_and("muon")
    assert isinstance(made, Pair)
    muon = {id(p) for group in made.both[0].param_groups for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in muon}
    assert names == {name for name, p in model.named_parameters() if "layers." in name and p.dim() == 2}


def test_one_schedule_rules_both_optimisers() -> None:
    _, made = model_and("muon")
    assert isinstance(made, Pair)
    scheduler = torch.optim.lr_scheduler.LambdaLR(made, lambda step: 1 / (1 + step))
    rates = []
    for _ in range(3):
        rates.append({group["lr"] for one in made.both for group in one.param_groups})
        made.step()
        scheduler.step()
    assert rates == [{3e-3}, {3e-3 / 2}, {3e-3 / 3}]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_saved_optimiser_goes_on_bit_for_bit(optimizer: str, tmp_path: Path) -> None:
    """Three steps, saved, loaded into a new one, and two more: the weights of five steps."""

    def steps(model: torch.nn.Module, made: Any, scheduler: Any, numbers: range) -> None:
        for number in numbers:
            ids = torch.randint(0, 384, (2, 16), generator=torch.Generator().manual_seed(number))
            model(input_ids=ids, labels=ids).loss.backward()
            made.step()
            scheduler.step()
            made.zero_grad()

    def follow(made: Any) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(made, lambda step: 0.9**step)

    straight, one = model_and(optimizer)
    steps(straight, one, follow(one), range(5))
    broken, two = model_and(optimizer)
    scheduler = follow(two)
    steps(broken, two, scheduler, range(3))
    torch.save([broken.state_dict(), two.state_dict(), scheduler.state_dict()], tmp_path / "state")
    state = torch.load(tmp_path / "state", weights_only=True)
    resumed, three = model_and(optimizer)
    scheduler = follow(three)
    for part, saved in zip((resumed, three, scheduler), state, strict=True):
        part.load_state_dict(saved)
    steps(resumed, three, scheduler, range(3, 5))
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [g["lr"] for g in one.param_groups] == [g["lr"] for g in three.param_groups]


# --- budget and order ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "steps"),
    [
        ({"steps": 7, "tokens": 10_000, "epochs": 9.0}, 7),
        ({"steps": None, "tokens": 1000, "epochs": 9.0}, 4),  # 1000 / (4 x 64), rounded up
        ({"steps": None, "tokens": None, "epochs": 2.5}, 13),  # 20 rows, 4 a step
        ({"steps": None, "tokens": None, "epochs": None}, 5),
    ],
)
def test_steps_win_over_tokens_and_tokens_over_epochs(written: dict[str, Any], steps: int) -> None:
    assert step_count(written | {"context": 64}, 20, 4) == steps


def test_row_order_is_pass_after_pass_and_follows_from_the_seed() -> None:
    order = row_order(10, 35, 7)
    assert all(sorted(order[i : i + 10]) == list(range(10)) for i in (0, 10, 20))
    assert max(Counter(order.tolist()).values()) == 4
    assert not np.array_equal(order[:10], order[10:20])
    assert np.array_equal(order, row_order(10, 35, 7))
    assert np.array_equal(order[:20], row_order(10, 20, 7))  # a longer budget begins alike
    assert not np.array_equal(order, row_order(10, 35, 8))


@pytest.mark.parametrize(
    ("batch", "micro", "expected"), [(8, 4, (4, 2)), (6, 4, (2, 3)), (5, 4, (1, 5)), (4, None, (4, 1))]
)
def test_a_micro_batch_divides_the_global_one(
    tmp_path: Path, batch: int, micro: int | None, expected: tuple[int, int]
) -> None:
    made = arguments(make_job("pretrain", job={"micro_batch": micro}), tmp_path, steps=10, batch=batch)
    assert (made["per_device_train_batch_size"], made["gradient_accumulation_steps"]) == expected


# --- runs ---------------------------------------------------------------------------------------------------


def losses(log: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in log.read_text().splitlines()]


@pytest.mark.parametrize("kind", ["pretrain", "sft"])
def test_micro_batches_do_not_change_the_result(home: Path, tmp_path: Path, kind: str) -> None:
    """The global batch's counted tokens are divided by once, though rows of conversations count different
    numbers.
    """
    seen = {}
    data = {"pretrain": "text", "sft": "chat"}[kind]
    for micro in (4, 2, 1):
        job = {"micro_batch": micro, "metrics": str(tmp_path / f"{micro}.jsonl")}
        train(home, tmp_path / str(micro), kind=kind, data=data, parent=kind == "sft", job=job)
        seen[micro] = losses(tmp_path / f"{micro}.jsonl")
        assert len(seen[micro]) == 4
    for micro in (2, 1):
        assert seen[micro] == pytest.approx(seen[4], rel=1e-5)
        assert furthest(tmp_path / "4", tmp_path / str(micro)) < 1e-4  # Adam divides by near-nothing at first


def test_the_first_loss_is_cross_entropy_over_the_batch(home: Path, tmp_path: Path) -> None:
    """An untrained model knows nothing: ln(vocabulary), whatever the accumulation."""
    metrics = train(home, tmp_path / "m", job={"micro_batch": 1})
    assert metrics["first_loss"] == pytest.approx(math.log(384), abs=0.1)
    assert metrics["last_loss"] < metrics["first_loss"]


def test_a_run_repeats_bit_for_bit_and_a_seed_changes_it(home: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        train(home, tmp_path / name)
    assert same(tmp_path / "one", tmp_path / "two")
    job = make_job("pretrain")
    other = dataclasses.replace(job, params={**job.params, "seed": 4})
    run(other, inputs(home), tmp_path / "other")
    assert not same(tmp_path / "one", tmp_path / "other")


CHANGES: list[tuple[str, dict[str, Any]]] = [
    ("peak", {"lr": {"peak": 1e-3}}),
    ("schedule", {"lr": {"peak": 3e-3, "schedule": "constant"}}),
    ("warmup", {"lr": {"peak": 3e-3, "warmup": 0.5}}),
    ("min_ratio", {"lr": {"peak": 3e-3, "min_ratio": 0.9}}),
    ("optimizer", {"optimizer": "muon"}),
    ("weight_decay", {"weight_decay": 1.0}),
    ("betas", {"betas": (0.5, 0.6)}),
    ("clip", {"clip": 0.001}),
    ("z_loss", {"z_loss": 0.01}),
    ("precision", {"precision": "bf16"}),
    ("batch_tokens", {"batch_tokens": 2 * CONTEXT}),
    ("context", {"context": 32}),
    ("rope_theta", {"rope_theta": 500.0}),
    ("lora", {"lora": {"r": 4}}),
    ("steps", {"steps": 3}),
]


@pytest.fixture(scope="module")
def plain(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that each change is compared with."""
    out = tmp_path_factory.mktemp("plain")
    train(home, out, parent=True)
    return out


@pytest.mark.parametrize(("what", "written"), CHANGES, ids=[name for name, _ in CHANGES])
def test_each_parameter_reaches_the_weights(
    home: Path, plain: Path, tmp_path: Path, what: str, written: dict[str, Any]
) -> None:
    """No parameter is hashed but never obeyed."""
    train(home, tmp_path, parent=True, **written)
    assert not same(plain, tmp_path), what


def test_wsd_obeys_its_decay(home: Path, tmp_path: Path) -> None:
    for share in (0.3, 1.0):
        train(home, tmp_path / str(share), lr={"peak": 3e-3, "schedule": "wsd", "decay": share})
    assert not same(tmp_path / "0.3", tmp_path / "1.0")


@pytest.mark.parametrize("recompute", ["full"])
def test_recomputing_activations_changes_nothing(
    home: Path, plain: Path, tmp_path: Path, recompute: str
) -> None:
    train(home, tmp_path, parent=True, job={"recompute": recompute})
    assert furthest(plain, tmp_path) < 1e-6


def test_z_loss_raises_the_loss_by_its_weight(home: Path, tmp_path: Path) -> None:
    """At the first step log(Z) is about ln(vocabulary)."""
    without = train(home, tmp_path / "a", steps=1)["first_loss"]
    with_it = train(home, tmp_path / "b", steps=1, z_loss=0.1)["first_loss"]
    assert with_it - without == pytest.approx(0.1 * math.log(384) ** 2, rel=0.05)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_mixture_of_experts_trains(home: Path, tmp_path: Path, optimizer: str) -> None:
    metrics = train(home, tmp_path, shape=MOE, optimizer=optimizer, steps=8)
    assert metrics["last_loss"] < metrics["first_loss"]
    assert json.loads((tmp_path / "config.json").read_text())["num_local_experts"] == 4


@pytest.mark.parametrize("path", [{}, {"z_loss": 1e-4}, {"lora": {"r": 4}}], ids=["plain", "z_loss", "lora"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_blocks_multiply_in_the_precision_of_the_job(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, path: dict[str, Any]
) -> None:
    """Whichever way the loss is taken, bf16 reaches the matrices inside the model."""
    from transformers.models.qwen3 import modeling_qwen3

    seen: set[torch.dtype] = set()
    original = modeling_qwen3.Qwen3MLP.forward

    def forward(self: Any, given: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = original(self, given)
        seen.add(out.dtype)
        return out

    monkeypatch.setattr(modeling_qwen3.Qwen3MLP, "forward", forward)
    train(home, tmp_path, precision=precision, steps=1, **path)
    assert seen == {{"fp32": torch.float32, "bf16": torch.bfloat16}[precision]}


# --- what is saved ------------------------------------------------------------------------------------------


def test_a_trained_folder_is_complete(home: Path) -> None:
    """It loads as any Hugging Face folder does, generates with a cache, and knows its end of turn."""
    config = json.loads((home / "parent/config.json").read_text())
    generation = json.loads((home / "parent/generation_config.json").read_text())
    words = AutoTokenizer.from_pretrained(home / "parent")
    assert config["use_cache"] is True
    assert config["dtype"] == "float32"
    assert config["tie_word_embeddings"] is True
    assert generation["eos_token_id"] == words.convert_tokens_to_ids("<|im_end|>")
    assert generation["pad_token_id"] == words.convert_tokens_to_ids("<|endoftext|>")
    assert "lm_head.weight" not in weights(home / "parent")
    model = AutoModelForCausalLM.from_pretrained(home / "parent")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = words.apply_chat_template(CHATS[0][:1], add_generation_prompt=True, return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=3).shape[1] > ids["input_ids"].shape[1]


def test_untied_weights_stay_apart(home: Path, tmp_path: Path) -> None:
    train(home, tmp_path, shape=dataclasses.replace(SHAPE, tie=False))
    saved = weights(tmp_path)
    assert not torch.equal(saved["lm_head.weight"], saved["model.embed_tokens.weight"])


def test_nothing_of_the_trainer_is_left_beside_the_model(home: Path) -> None:
    found = {p.name for p in (home / "parent").iterdir()} - {"checkpoints"}
    assert found == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    } | (found & {"chat_template.jinja", "special_tokens_map.json"})


def test_continued_pretraining_extends_positions(home: Path, tmp_path: Path) -> None:
    """Longer context and a new rotary base are in config.json, and what starts from it keeps them."""
    train(home, tmp_path / "long", parent=True, context=128, rope_theta=50_000.0)
    config = json.loads((tmp_path / "long/config.json").read_text())
    assert config["max_position_embeddings"] == 128
    assert config["rope_parameters"]["rope_theta"] == 50_000.0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "long").config.max_position_embeddings == 128


def test_adapters_are_merged_and_touch_their_targets_only(home: Path, tmp_path: Path) -> None:
    train(home, tmp_path, parent=True, lora={"r": 4, "alpha": 8.0, "targets": ("q_proj", "v_proj")})
    assert not list(tmp_path.glob("adapter*"))
    before, after = weights(home / "parent"), weights(tmp_path)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "q_proj" in name or "v_proj" in name}


@pytest.mark.parametrize(
    "field", [{"r": 8}, {"alpha": 64.0}, {"dropout": 0.5}, {"targets": ("q_proj",)}], ids=str
)
def test_each_parameter_of_adapters_is_obeyed(home: Path, tmp_path: Path, field: dict[str, Any]) -> None:
    train(home, tmp_path / "a", parent=True, lora={"r": 4})
    train(home, tmp_path / "b", parent=True, lora={"r": 4} | field)
    assert not same(tmp_path / "a", tmp_path / "b")


def test_adapters_recompute_and_use_muon(home: Path, tmp_path: Path) -> None:
    train(home, tmp_path / "a", parent=True, lora={"r": 4}, optimizer="muon")
    train(home, tmp_path / "b", parent=True, lora={"r": 4}, optimizer="muon", job={"recompute": "full"})
    assert furthest(tmp_path / "a", tmp_path / "b") < 1e-6
    assert not same(home / "parent", tmp_path / "a")


# --- what goes wrong ----------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_names_its_step(home: Path, tmp_path: Path) -> None:
    with pytest.raises(StepFailed, match=r"t/pretrain: .* at step \d+ of 20"):
        train(
            home,
            tmp_path,
            steps=20,
            lr={"peak": 10.0},
            clip=1e9,
            weight_decay=10.0,
            betas=(0.0, 0.0),
            optimizer="muon",
            z_loss=1.0,
        )
    assert not (tmp_path / "model.safetensors").exists()


def test_weights_that_end_as_no_numbers_are_refused(home: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """The last steps may stand after the last logged loss: what is saved is looked at as well."""
    from famc.work import training

    original = training.PackedTrainer.train

    def spoil(self: Any, *args: Any, **more: Any) -> Any:
        original(self, *args, **more)
        next(self.model.parameters()).data[0, 0] = math.nan

    monkeypatch.setattr(training.PackedTrainer, "train", spoil)
    with pytest.raises(StepFailed, match="not finite after step 4"):
        train(home, tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


# --- sft ----------------------------------------------------------------------------------------------------


def test_sft_learns_the_answers_and_to_stop(home: Path, tmp_path: Path) -> None:
    """Conversations learnt by heart: greedy generation gives each answer and ends itself."""
    chats = [
        *CHATS,
        [{"role": "user", "content": "How many ships?"}, {"role": "assistant", "content": "Seven ships."}],
    ]
    chat_mix(tmp_path / "chat", chats)
    given = {"tokenizer": home / "tokenizer", "data": tmp_path / "chat", "model": home / "parent"}
    job = make_job("sft", steps=150, context=128, batch_tokens=256, lr={"peak": 1e-2}, weight_decay=0.0)
    metrics = run(job, given, tmp_path / "out")
    assert metrics["last_loss"] < 0.05
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    words = AutoTokenizer.from_pretrained(tmp_path / "out")
    for chat in chats:
        for turn in (i for i, m in enumerate(chat) if m["role"] == "assistant"):
            ids = words.apply_chat_template(chat[:turn], add_generation_prompt=True, return_tensors="pt")
            out = model.generate(**ids, max_new_tokens=40)[0, ids["input_ids"].shape[1] :]
            assert words.decode(out) == chat[turn]["content"] + "<|im_end|>"


def test_loss_on_all_trains_on_the_questions_too(home: Path, tmp_path: Path) -> None:
    for wanted in ("assistant", "all"):
        train(home, tmp_path / wanted, kind="sft", parent=True, data="chat", loss_on=wanted)
    assert not same(tmp_path / "assistant", tmp_path / "all")


def test_parameters_of_a_test_job_are_those_of_a_spec() -> None:
    """make_job resolves a stage as the graph does: nothing here tests parameters that no spec could give."""
    job = make_job("sft")
    assert isinstance(job, Job)
    assert job.params["epochs"] == 2.0
    assert job.runtime == {"checkpoint_steps": None, "micro_batch": None, "recompute": None}
