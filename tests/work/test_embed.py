"""Embedders: every start learns an easy search, the folder is what training left, and nothing depends on micro-batches
or on a kill.
"""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from test_rerank import family_tokenizer, mined, mix
from tiny_encoder import make_tiny_encoder
from tiny_model import make_tiny_model
from tiny_training import furthest, same, weights
from transformers import AutoConfig, AutoTokenizer

from famc.cost.shape import Shape
from famc.errors import StepFailed
from famc.job import Job
from famc.steps.base import RUNTIME, Amount, Setting
from famc.steps.embed import Embed
from famc.steps.shapes import shape_values
from famc.store import Store
from famc.work import embed, merge, pair_data, runner
from famc.work.encoder_folder import encoder_tokenizer
from famc.work.pair_data import Columns, Ordered, read_pairs
from famc.work.text import Pair

CONTEXT = 48
SHAPES = {
    "qwen3": Shape("qwen3", 387, 2, 64, 128, 4, 2, 32, True, CONTEXT),
    "bert": Shape("bert", 387, 2, 64, 128, 4, 4, 16, True, CONTEXT),
    "modernbert": Shape("modernbert", 387, 4, 64, 128, 4, 4, 16, True, CONTEXT),
    "new": Shape("bert", 387, 1, 32, 64, 2, 2, 16, True, CONTEXT),
}
LETTERS = "QXZJVKWUYO"  # tokens of one letter, each with a digit that means the same
DIGIT = dict(zip(LETTERS, "0123456789", strict=True))


def drawn(count: int, seed: int, negatives: int = 0) -> list[Pair]:
    """A query of two letters; its passage has their digits among others, in another order."""
    draw = random.Random(seed)
    pairs = []
    for _ in range(count):
        one, two = draw.sample(LETTERS, 2)
        passage = [DIGIT[one], DIGIT[two], draw.choice("HGL")]
        draw.shuffle(passage)
        others = [DIGIT[w] for w in LETTERS if w not in (one, two)]
        wrong = [DIGIT[one] + draw.choice(others) + draw.choice("HGL") for _ in range(negatives)]
        pairs.append(Pair(one + two, ("".join(passage),), tuple(dict.fromkeys(wrong))))
    return pairs


HELD = [Pair(a + b, (DIGIT[b] + "G" + DIGIT[a],)) for i, a in enumerate(LETTERS) for b in LETTERS[i + 1 :]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What an embed job reads, with a parent of each kind."""
    folder = tmp_path_factory.mktemp("home")
    found = {"tokenizer": family_tokenizer(folder / "tokenizer"), "data": mix(folder / "data", drawn(300, 1))}
    vocab = len(AutoTokenizer.from_pretrained(found["tokenizer"]))
    make_tiny_model(folder / "qwen3", theta=1e4, vocab_size=vocab, initializer_range=0.08)
    for kind in ("bert", "modernbert"):
        make_tiny_encoder(folder / kind, kind, vocab_size=vocab)  # type: ignore[arg-type]
    return {**found, **{kind: folder / kind for kind in ("qwen3", "bert", "modernbert")}}


def job_of(kind: str = "qwen3", *, job: dict[str, Any] | None = None, **written: Any) -> Job:
    """A job with a stage's fields as a spec would write them."""
    shape = SHAPES[kind]
    needed = {"kind": "embed", "context": CONTEXT, "steps": 4, "lr": {"peak": 2e-3}, "global_batch": 8}
    stage = Embed.model_validate(needed | written)
    params: dict[str, Any] = dict(
        stage.resolve(Setting(shape, 30_000, Amount(1e4, 50)), lambda _: None).values
    )
    params |= {"seed": 3, "shape": shape_values(shape, params)}
    params = json.loads(json.dumps(params))
    runtime = {key: params.pop(key) for key in sorted(RUNTIME) if key in params}
    precision = params["precision"] if params["precision"] != "auto" else "fp32"
    return Job.for_test("t/embed", "embed", params, runtime=runtime, precision=precision, **(job or {}))


def train(home: dict[str, Path], out: Path, kind: str = "qwen3", **more: Any) -> dict[str, Any]:
    """Run the worker as the runner does."""
    out.mkdir(parents=True, exist_ok=True)
    inputs = {role: home[role] for role in ("tokenizer", "data", "negatives", "teacher") if role in home}
    if parent := home.get("model") or home.get(kind):
        inputs["model"] = parent
    return embed.run(job_of(kind, **more), inputs, out)


def loaded(folder: Path, **more: Any) -> Any:
    return SentenceTransformer(str(folder), local_files_only=True, device="cpu", **more)


def accuracy(folder: Path, pairs: Sequence[Pair] = HELD, **more: Any) -> float:
    """How often the answer is nearest, by sentence-transformers."""
    model = loaded(folder, **more)
    queries = model.encode_query([pair.query for pair in pairs])
    passages = model.encode_document([pair.positives[0] for pair in pairs])
    near = model.similarity(queries, passages)
    return float((near.argmax(1) == torch.arange(len(pairs))).float().mean())


def untrained(home: dict[str, Path], out: Path, kind: str, **more: Any) -> Path:
    train(home, out, kind, **(more | {"steps": 1, "lr": {"peak": 1e-12}}))
    return out


LONG: dict[str, Any] = {"steps": 120, "lr": {"peak": 3e-3}, "global_batch": 32}


# --- learning -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "written"),
    [
        ("qwen3", {}),
        ("qwen3", {"bidirectional": True, "pooling": "mean"}),
        ("bert", {}),
        ("modernbert", {"precision": "bf16"}),
    ],
    ids=str,
)
def test_an_easy_search_is_learnt(
    home: dict[str, Path], tmp_path: Path, kind: str, written: dict[str, Any]
) -> None:
    before = accuracy(untrained(home, tmp_path / "before", kind, **written))
    metrics = train(home, tmp_path / "after", kind, **(LONG | written))
    after = accuracy(tmp_path / "after")
    assert metrics["last_loss"] < metrics["first_loss"]
    assert after > before + 0.2
    assert after > 0.6


def test_a_lexical_start_finds_words_before_its_layers_learn(home: dict[str, Path], tmp_path: Path) -> None:
    few = {"steps": 2, "lr": {"peak": 1e-9}}
    lexical = {"epochs": 60, "batch": 64, "lr": 0.02}
    before = train(home, tmp_path / "a", "new", lexical={"epochs": 0.01, "lr": 1e-9}, **few)
    after = train(home, tmp_path / "b", "new", lexical=lexical, **few)
    assert after["lexical_loss_last"] < after["lexical_loss_first"]
    assert after["lexical_steps"] == 282
    assert before["lexical_steps"] == 1
    assert accuracy(tmp_path / "b") > 0.9 > 0.3 > accuracy(tmp_path / "a")
    modes = json.loads((tmp_path / "b/1_Pooling/config.json").read_text())
    assert modes["pooling_mode_cls_token"] is True


def test_mined_negatives_teach(home: dict[str, Path], tmp_path: Path) -> None:
    """What no passage of another query shows: that all answers end in H, and nothing else does."""
    pairs = [Pair(p.query, (p.positives[0].replace("G", "") + "H",)) for p in HELD]
    wrong = [p.positives[0][:-1] + "G" for p in pairs]
    found = mined(tmp_path / "mined", [(str(at), [text]) for at, text in enumerate(wrong)])
    inputs = home | {"data": mix(tmp_path / "data", pairs), "negatives": found}
    gaps = {}
    for name, k in (("hard", 1), ("plain", None)):
        more: dict[str, Any] = {"hard_negatives": {"k": k} if k else None, "steps": 60, "lr": {"peak": 2e-3}}
        metrics = train(inputs, tmp_path / name, "bert", **more)
        assert metrics["texts"] == (3 if k else 2) * len(pairs)
        model = loaded(tmp_path / name)
        queries = model.encode([p.query for p in pairs])
        right, lure = (model.encode(texts) for texts in ([p.positives[0] for p in pairs], wrong))
        gaps[name] = (queries * right).sum(1) - (queries * lure).sum(1)
    assert (gaps["hard"] > 0).all()
    assert gaps["hard"].mean() > gaps["plain"].mean() + 0.2


def test_a_teacher_of_another_width_is_followed(home: dict[str, Path], tmp_path: Path) -> None:
    """With alpha 1 nothing else is learnt: similarities become the teacher's."""
    train(home, tmp_path / "teacher", "new", lexical={"epochs": 60, "batch": 64, "lr": 0.02}, steps=2)
    more = {**LONG, "teacher": "t", "alpha": 1.0, "temperature": 0.1}
    metrics = train(home | {"teacher": tmp_path / "teacher"}, tmp_path / "out", "bert", **more)
    assert metrics["last_loss"] < 0.5 * metrics["first_loss"]

    def near(folder: Path) -> torch.Tensor:
        model = loaded(folder)
        return model.similarity(
            model.encode([p.query for p in HELD]), model.encode([p.positives[0] for p in HELD])
        ).flatten()

    one, other = near(tmp_path / "teacher"), near(tmp_path / "out")
    assert float(torch.corrcoef(torch.stack([one, other]))[0, 1]) > 0.7


def test_prefixes_are_vectors_too(home: dict[str, Path], tmp_path: Path) -> None:
    metrics = train(home, tmp_path / "mrl", "bert", mrl=(8,), **LONG)
    plain = train(home, tmp_path / "plain", "bert", **LONG)
    assert metrics["first_loss"] > 1.3 * plain["first_loss"]  # two of them
    config = json.loads((tmp_path / "mrl/config_sentence_transformers.json").read_text())
    assert config["matryoshka_dims"] == [64, 8]
    assert accuracy(tmp_path / "mrl", truncate_dim=8) > accuracy(tmp_path / "plain", truncate_dim=8)


def test_an_embedder_goes_on(home: dict[str, Path], tmp_path: Path) -> None:
    train(home, tmp_path / "one", "bert", **LONG)
    train(home | {"model": tmp_path / "one"}, tmp_path / "two", "bert", steps=1, lr={"peak": 1e-12})
    texts = [pair.query for pair in HELD]
    one, two = (loaded(tmp_path / name).encode(texts) for name in ("one", "two"))
    assert np.allclose(one, two, atol=1e-5)


# --- the folder ---------------------------------------------------------------------------------------------

TEXTS = ["Q", "bread and salt", "getHeader, water & time " * 9, "", "JV", "你好，世界"]


@pytest.mark.parametrize("kind", ["qwen3", "bert", "modernbert"])
@pytest.mark.parametrize("text", ["as_is", "words"])
def test_the_folder_gives_what_training_left(
    home: dict[str, Path], tmp_path: Path, kind: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = []
    plain = embed.fit

    def fit(job: Any, inputs: Any, model: Any, *more: Any) -> Any:
        kept.append(model)
        return plain(job, inputs, model, *more)

    monkeypatch.setattr(embed, "fit", fit)
    train(home, tmp_path, kind, steps=10, text=text, prompts={"query": "find: "})
    words = encoder_tokenizer(home["tokenizer"], kind, words=text == "words")
    ids = words(["find: " + one for one in TEXTS], truncation=True, max_length=CONTEXT)["input_ids"]
    columns = Columns(None, int(words.pad_token_id), kind == "bert")  # type: ignore[arg-type]
    with torch.no_grad():  # right-padded, as in training; sentence-transformers pads a decoder's on the left
        wanted = kept[0].eval()(columns.features(ids))["sentence_embedding"].float()
    found = torch.from_numpy(loaded(tmp_path).encode_query(TEXTS))
    assert torch.allclose(found.norm(dim=1), torch.ones(len(TEXTS)), atol=1e-5)
    assert float((found - wanted).abs().max()) < 1e-5


def test_a_decoder_sees_what_follows_only_if_told(home: dict[str, Path], tmp_path: Path) -> None:
    """The mean's vector of a text's first token, which depends on later ones or does not."""
    for both in (False, True):
        folder = tmp_path / str(both)
        train(home, folder, bidirectional=both, pooling="mean")
        assert getattr(AutoConfig.from_pretrained(folder), "is_causal", True) is not both
        model = loaded(folder)
        first = [
            model.encode(text, output_value="token_embeddings")[0] for text in ("QXZJ", "QVKW")
        ]  # the first token's state
        assert torch.allclose(*first, atol=1e-6) is not both


@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
def test_pooling_is_saved(home: dict[str, Path], tmp_path: Path, pooling: str) -> None:
    train(home, tmp_path, "bert", pooling=pooling)
    assert loaded(tmp_path)[1].pooling_mode == {"last": "lasttoken"}.get(pooling, pooling)


def test_prompts_are_saved_and_used(home: dict[str, Path], tmp_path: Path) -> None:
    train(home, tmp_path / "with", prompts={"query": "find: "}, steps=6)
    train(home, tmp_path / "without", steps=6)
    model = loaded(tmp_path / "with")
    assert model.prompts == {"query": "find: ", "document": ""}
    asked, plain = model.encode_query("QX"), model.encode_document("QX")
    assert not np.allclose(asked, plain, atol=1e-3)
    assert np.allclose(asked, model.encode("find: QX"), atol=1e-6)
    assert not same(tmp_path / "with", tmp_path / "without")


def test_words_are_read_whatever_their_case(home: dict[str, Path], tmp_path: Path) -> None:
    train(home, tmp_path, text="words")
    model = loaded(tmp_path)
    one, *others = model.encode(["getHeader", "get_header", "Get header!"])
    assert all(np.allclose(one, other, atol=1e-6) for other in others)


def test_the_folder_holds_nothing_else(home: dict[str, Path], tmp_path: Path) -> None:
    """As committed by the runner; it neither names a path nor a training's own settings."""
    store = Store(tmp_path / "store")
    keys = {role: str(index) * 64 for index, role in enumerate(("tokenizer", "data", "model"), 1)}
    for role, source in (("tokenizer", "tokenizer"), ("data", "data"), ("model", "qwen3")):
        shutil.copytree(home[source], store.partial(role, keys[role]))
        store.commit(role, keys[role], {"name": role, "key": keys[role]})
    job = job_of(merge={"last": 2}, checkpoint_steps=2, job={"seconds": 1.0})
    read = {role: (role, key) for role, key in keys.items()}
    job = dataclasses.replace(job, key="a" * 64, store=str(store.root), inputs=read)
    runner.run(job)
    assert set(store.record(job.name, job.key)["files"]) == {
        "config.json", "model.safetensors", "modules.json", "sentence_bert_config.json", "1_Pooling/config.json",
        "2_Normalize/config.json", "config_sentence_transformers.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    folder = store.path(job.name, job.key)
    config = json.loads((folder / "config.json").read_text())
    assert config["use_cache"] is True
    assert config["architectures"] == ["Qwen3Model"]
    for path in folder.rglob("*.json"):
        assert "checkpoints" not in path.read_text()
        assert str(tmp_path) not in path.read_text()
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    assert (tokenizer["padding"], tokenizer["truncation"]) == (None, None)


def test_a_bert_has_no_pooler(home: dict[str, Path], tmp_path: Path) -> None:
    """Which nobody reads, and which is drawn anew where it is missing."""
    train(home, tmp_path, "bert")
    assert not [name for name in weights(tmp_path) if name.startswith("pooler")]


# --- nothing else changes the result ------------------------------------------------------------------------


def uneven(folder: Path) -> dict[str, Path]:
    """Pairs and negatives of several lengths, some copies, and mined lists of several lengths."""
    pairs = drawn(24, 5, negatives=3)
    pairs = [
        Pair(p.query + " so" * (i % 4), tuple(t + " and on" * (i % 5) for t in p.positives))
        for i, p in enumerate(pairs)
    ]
    pairs += pairs[:3]
    found = [(str(i), [f"{p.query} no {n}" for n in range(i % 3)]) for i, p in enumerate(pairs)]
    return {"data": mix(folder / "data", pairs), "negatives": mined(folder / "mined", found)}


@pytest.mark.parametrize(
    ("kind", "written"),
    [("qwen3", {}), ("bert", {"mrl": (8, 16)}), ("modernbert", {"temperature": 0.1})],
    ids=str,
)
def test_micro_batches_do_not_change_the_result(
    home: dict[str, Path], tmp_path: Path, kind: str, written: dict[str, Any]
) -> None:
    inputs, vectors = home | uneven(tmp_path), []
    more = {"hard_negatives": {"k": 2}, **written}
    for micro in (8, 3, 1):
        train(inputs, tmp_path / str(micro), kind, job={"micro_batch": micro}, **more)
        vectors.append(loaded(tmp_path / str(micro)).encode([p.query for p in HELD]))
    for micro, found in zip((3, 1), vectors[1:], strict=True):
        # not a bound on weights: AdamW makes steps of noise where a gradient is none, as of BERT's key biases
        assert furthest(tmp_path / "8", tmp_path / str(micro)) > 0
        assert float(np.abs(found - vectors[0]).max()) < 1e-4


def test_micro_batches_of_bf16_are_near(home: dict[str, Path], tmp_path: Path) -> None:
    """Rounding differs; what is learnt does not."""
    vectors = []
    for micro in (32, 5):
        more = LONG | {"precision": "bf16", "steps": 50}
        train(home, tmp_path / str(micro), "bert", job={"micro_batch": micro}, **more)
        assert accuracy(tmp_path / str(micro)) > 0.6
        vectors.append(loaded(tmp_path / str(micro)).encode([p.query for p in HELD]))
    assert float((vectors[0] * vectors[1]).sum(1).mean()) > 0.95
    assert {tensor.dtype for tensor in weights(tmp_path / "5").values()} == {torch.float32}


def test_recomputing_changes_nothing(home: dict[str, Path], tmp_path: Path) -> None:
    for recompute in ("none", "full"):
        train(home, tmp_path / recompute, job={"recompute": recompute})
    assert furthest(tmp_path / "none", tmp_path / "full") < 1e-5


def test_a_parents_dropout_is_turned_off(home: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(home["bert"], tmp_path / "parent")
    path = tmp_path / "parent/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_dropout_prob": 0.5}))
    train(home | {"model": tmp_path / "parent"}, tmp_path / "out", "bert")
    assert AutoConfig.from_pretrained(tmp_path / "out").hidden_dropout_prob == 0.0


@pytest.mark.parametrize("kind", ["qwen3", "bert", "new"])
def test_a_run_repeats_bit_for_bit(home: dict[str, Path], tmp_path: Path, kind: str) -> None:
    lexical = {"lexical": {"epochs": 3, "batch": 64}} if kind == "new" else {}
    for name in ("a", "b"):
        train(home, tmp_path / name, kind, **lexical)
    assert same(tmp_path / "a", tmp_path / "b")


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    ("kind", "written"),
    [
        ("qwen3", {"merge": {"last": 3}}),
        ("bert", {"mrl": (8,), "precision": "bf16", "job": {"micro_batch": 4}}),
        ("new", {"lexical": {"epochs": 3, "batch": 64}, "merge": {"last": 3}}),
    ],
    ids=str,
)
def test_a_killed_job_leaves_the_same_bytes(
    home: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, written: dict[str, Any]
) -> None:
    """It dies after a checkpoint; its lexical start is not made again, but told in the metrics."""
    more = {"steps": 12, "checkpoint_steps": 3, "teacher": "t", **written}
    train(home, tmp_path / "teacher", "bert")
    inputs = home | {"teacher": tmp_path / "teacher"}
    straight = train(inputs, tmp_path / "a", kind, **more)
    plain = embed.ContrastiveTrainer.training_step
    done = 0

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal done
        done += 1
        if done > 10:
            raise Killed
        return plain(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(embed.ContrastiveTrainer, "training_step", step)
        with pytest.raises(Killed):
            train(inputs, tmp_path / "b", kind, **more)
    with monkeypatch.context() as patch:
        patch.setattr(embed, "start_model", lambda *args: pytest.fail("started again"))
        resumed = train(inputs, tmp_path / "b", kind, **more)
    assert resumed["resumed_at"] == 9
    assert same(tmp_path / "a", tmp_path / "b")
    timings = {"tokens_per_second", "compute_seconds", "compute_cpu_seconds", "resumed_at"}
    kept = [{k: v for k, v in one.items() if k not in timings} for one in (straight, resumed)]
    assert kept[0] == kept[1]


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_a_job_killed_before_a_checkpoint_leaves_the_same_bytes(
    home: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """It goes on from its start, in a process that drew other numbers before."""
    train(home, tmp_path / "a", kind)
    with monkeypatch.context() as patch:
        patch.setattr(embed, "fit", lambda *args: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            train(home, tmp_path / "b", kind)
    torch.manual_seed(99)
    assert train(home, tmp_path / "b", kind)["resumed_at"] == 0
    assert same(tmp_path / "a", tmp_path / "b")


def test_a_job_killed_after_its_last_step_only_saves(home: dict[str, Path], tmp_path: Path) -> None:
    first = train(home, tmp_path, "bert", checkpoint_steps=2)
    made = weights(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    second = train(home, tmp_path, "bert", checkpoint_steps=2)
    assert second["resumed_at"] == 4
    assert all(torch.equal(tensor, made[name]) for name, tensor in weights(tmp_path).items())
    assert (first["first_loss"], first["last_loss"]) == (second["first_loss"], second["last_loss"])


@pytest.mark.parametrize("last", ["model.safetensors", "modules.json", "config_sentence_transformers.json"])
def test_a_start_that_was_killed_is_made_anew(
    home: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    """Half of its folder is no start."""
    straight = train(home, tmp_path / "a", "bert")
    plain = embed.save_embedder

    def save(*args: Any, **kwargs: Any) -> None:
        plain(*args, **kwargs)
        (args[2] / last).unlink()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(embed, "save_embedder", save)
        with pytest.raises(Killed):
            train(home, tmp_path / "b", "bert")
    assert train(home, tmp_path / "b", "bert")["first_loss"] == straight["first_loss"]
    assert same(tmp_path / "a", tmp_path / "b")


@pytest.fixture(scope="module")
def plain(home: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("plain")
    train(home, out)
    return out


@pytest.mark.parametrize(
    "written",
    [
        {"temperature": 0.1},
        {"symmetric": False},
        {"false_negatives": 0.0},
        {"false_negatives": None},
        {"pooling": "mean"},
        {"bidirectional": True},
        {"mrl": (8,)},
        {"prompts": {"document": "passage: "}},
        {"hard_negatives": {"k": 1}},
        {"merge": {"last": 2}},
        {"text": "words"},
        {"global_batch": 4},
        {"steps": None, "epochs": 0.5},
        {"optimizer": "muon"},
        {"precision": "bf16"},
        {"weight_decay": 1.0},
        {"betas": (0.5, 0.6)},
        {"clip": 0.01},
        {"lr": {"peak": 2e-3, "schedule": "constant"}},
        {"lr": {"peak": 2e-3, "warmup": 0.9}},
        {"lr": {"peak": 2e-3, "min_ratio": 0.5}},
    ],
    ids=str,
)
def test_each_parameter_reaches_the_weights(
    home: dict[str, Path], plain: Path, tmp_path: Path, written: dict[str, Any]
) -> None:
    data = mix(tmp_path / "data", drawn(300, 1, negatives=2))  # which are read if asked for
    train(home | {"data": data}, tmp_path / "out", **written)
    assert not same(plain, tmp_path / "out")


def test_ways_to_merge_differ(home: dict[str, Path], tmp_path: Path) -> None:
    for method in ("slerp", "linear"):
        metrics = train(home, tmp_path / method, merge={"method": method, "last": 2}, lr={"peak": 2e-2})
        assert metrics["merged"] == 2
    assert 0 < furthest(tmp_path / "slerp", tmp_path / "linear") < 1e-2
    assert merge.snapshot_steps(4, 2) == [3, 4]


def test_metrics_count_what_was_read(home: dict[str, Path], tmp_path: Path) -> None:
    inputs = home | uneven(tmp_path)
    metrics = train(inputs, tmp_path / "out", "bert", steps=None, epochs=1.0, global_batch=9, context=16)
    assert (metrics["pairs"], metrics["steps"], metrics["epochs"]) == (27, 3, 1.0)
    words = encoder_tokenizer(home["tokenizer"], "bert", words=False)
    pairs = read_pairs(inputs["data"], None, words, context=16, k=0, prompts={})
    read = sum(len(pairs.ids[row.query]) + len(pairs.ids[row.positives[0]]) for row in pairs.rows)
    assert metrics["tokens"] == read  # each pair once
    assert metrics["texts"] == len(pairs.ids)
    assert metrics["dimensions"] == 64
    assert 0 < metrics["cut"] < 1


# --- pairs --------------------------------------------------------------------------------------------------


def words_of(home: dict[str, Path]) -> Any:
    return encoder_tokenizer(home["tokenizer"], "bert", words=False)


def pairs_of(home: dict[str, Path], folder: Path, pairs: Sequence[Pair], **more: Any) -> pair_data.Pairs:
    given: dict[str, Any] = {"mined": None, "context": 32, "k": 2, "prompts": {}} | more
    return read_pairs(mix(folder, pairs), tokenizer=words_of(home), **given)


def test_a_text_is_read_once_on_each_side(home: dict[str, Path], tmp_path: Path) -> None:
    pairs = pairs_of(home, tmp_path, [Pair("a", ("b", "c")), Pair("a", ("b",)), Pair("b", ("a",), ("c",))])
    assert pairs.texts == ("a", "b", "c", "b", "a")
    assert [(row.query, row.positives, row.negatives) for row in pairs.rows] == [
        (0, (1, 2), ()), (0, (1,), ()), (3, (4,), (2,)),
    ]  # fmt: skip


def test_prompts_stand_before_their_side(home: dict[str, Path], tmp_path: Path) -> None:
    pairs = pairs_of(home, tmp_path, [Pair("a", ("b",), ("c",))], prompts={"query": "Q ", "document": "D "})
    wanted = words_of(home)(["Q a", "D b", "D c"])["input_ids"]
    assert [one.tolist() for one in pairs.ids] == wanted


def test_what_ends_alike_is_one_family(home: dict[str, Path], tmp_path: Path) -> None:
    """Pieces of one document, copies in other case or spacing; a query is never of a passage's family."""
    tail = "the same long ending of two pieces that were cut out of one document, " * 2
    pairs = pairs_of(
        home, tmp_path,
        [Pair("Ask me", ("One. " + tail,)), Pair("ask  ME", ("Two. " + tail,)), Pair("c", ("Ask me",))],
    )  # fmt: skip
    ask, one, again, two, c, other = pairs.families.tolist()
    assert ask == again
    assert one == two
    assert len({ask, one, c, other}) == 4


def test_each_pass_takes_another_answer(home: dict[str, Path], tmp_path: Path) -> None:
    pairs = pairs_of(home, tmp_path, [Pair("a", ("b", "c")), Pair("d", ("e",), ("f", "g", "h"))])
    ordered = Ordered(pairs, [0, 1, 1, 0, 0, 1], 2)
    shown = [[pairs.texts[n] for n in ordered[at]] for at in range(len(ordered))]
    assert shown[0] == ["a", "b", "b", "b"]  # what is missing is the positive
    assert shown[3] == ["a", "c", "c", "c"]
    assert shown[4] == ["a", "b", "b", "b"]
    assert shown[1] == shown[2] == shown[5] == ["d", "e", "f", "g"]  # no more than k


def test_columns_are_sorted_and_their_places_restore_the_rows(home: dict[str, Path], tmp_path: Path) -> None:
    given = [Pair("a" * (5 - n), ("b " * (n * 7 % 5 + 1),), ("c " * (n + 1),)) for n in range(5)]
    pairs = pairs_of(home, tmp_path, given, k=1)
    items = [Ordered(pairs, range(5), 1)[at] for at in range(5)]
    batch = Columns(pairs, 0, True)(items)
    assert batch["labels"][:, :3].tolist() == [list(item) for item in items]
    for at, column in enumerate(batch["columns"]):
        lengths = column["attention_mask"].sum(1)
        assert lengths.tolist() == sorted(lengths.tolist())
        assert not column["token_type_ids"].any()
        for row, place in enumerate(batch["labels"][:, 3 + at].tolist()):
            kept = column["input_ids"][place][column["attention_mask"][place].bool()]
            assert kept.tolist() == pairs.ids[items[row][at]].tolist()
    assert "token_type_ids" not in Columns(pairs, 0, False)(items)["columns"][0]


def test_the_share_of_cut_texts(home: dict[str, Path], tmp_path: Path) -> None:
    """A text that fills the context is whole."""
    pairs = pairs_of(home, tmp_path, [Pair("Q" * 6, ("X" * 7,)), Pair("J", ("V",))], context=8)
    assert [len(one) for one in pairs.ids] == [8, 8, 3, 3]
    assert pairs.cut == 0.25
    end = words_of(home).convert_tokens_to_ids("<|im_end|>")
    assert all(one[-1] == end for one in pairs.ids)


def test_mined_negatives_go_before_the_datas_own(home: dict[str, Path], tmp_path: Path) -> None:
    given = [Pair("q", ("a",), ("own",)), Pair("r", ("b",), ("own",))]
    found = mined(tmp_path / "mined", [("0", ["1", "2", "3"]), ("1", [])])
    pairs = pairs_of(home, tmp_path / "data", given, mined=found)
    assert [[pairs.texts[n] for n in row.negatives] for row in pairs.rows] == [["1", "2"], []]


def test_an_answer_is_no_negative_of_the_same_query(home: dict[str, Path], tmp_path: Path) -> None:
    pairs = pairs_of(home, tmp_path, [Pair("q", ("a",), ("b", "c")), Pair("q", ("b",), ("c", "c", "d"))])
    assert [[pairs.texts[n] for n in row.negatives] for row in pairs.rows] == [["c"], ["c", "d"]]


def test_a_sentence_asks_for_the_rest_of_its_passage(home: dict[str, Path], tmp_path: Path) -> None:
    """Inverse cloze: more rows behind those of the mix; what is left of a passage is of its family."""
    passage = (
        "The first one is long enough. So is the second of them!\n\nShort.\n\nAnd this one as well, it is."
    )
    given = [Pair("q", (passage,), ("Only one sentence that is long enough.",)), Pair("r", ("b",))]
    pairs = pairs_of(home, tmp_path, given, cloze=2, seed=1)
    assert pairs.rows[:2] == pairs_of(home, tmp_path, given).rows
    first, second = pairs.rows[2:]
    for row in (first, second):
        query, rest = pairs.texts[row.query], pairs.texts[row.positives[0]]
        assert query in passage
        assert query not in rest
        assert sorted(rest.split() + query.split()) == sorted(passage.split())
        assert row.negatives == ()
        assert pairs.families[row.positives[0]] == pairs.families[1]
    assert pairs.texts[first.query] != pairs.texts[second.query]
    assert pairs_of(home, tmp_path, given, cloze=2, seed=1).texts == pairs.texts
    drawn_by_seed = {pairs_of(home, tmp_path, given, cloze=1, seed=seed).texts for seed in range(9)}
    assert len(drawn_by_seed) == 3


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1])
def test_a_mix_with_nothing_to_tell_apart_is_refused(
    home: dict[str, Path], tmp_path: Path, count: int
) -> None:
    data = mix(tmp_path / "data", drawn(count, 1))
    with pytest.raises(StepFailed, match=f"mix: {count}; nothing to tell apart"):
        train(home | {"data": data}, tmp_path / "out")


def test_a_mix_without_pairs_is_refused(home: dict[str, Path], tmp_path: Path) -> None:
    from famc.work.text import Writer

    with Writer(tmp_path / "examples.parquet", ("id", "messages")) as writer:
        writer.add(("0", "[]"))
    with pytest.raises(StepFailed, match="reads pairs") as failed:
        train(home | {"data": tmp_path}, tmp_path / "out")
    assert "format pairs" in failed.value.hint


def test_negatives_of_another_mix_are_refused(home: dict[str, Path], tmp_path: Path) -> None:
    for found in (
        [("0", ["a"])],
        [(str(n + 1), ["a"]) for n in range(300)],
        [(str(n), []) for n in range(301)],
    ):
        inputs = home | {"negatives": mined(tmp_path / str(len(found)), found)}
        with pytest.raises(StepFailed, match="mined for another mix") as failed:
            train(inputs, tmp_path / "out", hard_negatives={"k": 1})
        assert "mining step" in failed.value.hint


def test_positions_that_a_parent_lacks_are_refused(home: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(StepFailed, match="128 positions"):
        train(home, tmp_path / "out", "bert", context=200)
