"""Rerankers: every loss teaches an easy task, both forms of a yes/no head give one score, and nothing depends on
micro-batches or on a kill.
"""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder import losses
from tiny_artifacts import make_tokenizer
from tiny_encoder import make_tiny_encoder
from tiny_model import SPECIAL, make_tiny_model, tiny_tokenizer
from tiny_training import furthest, same, weights
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from famc.cost.shape import Shape
from famc.errors import StepFailed
from famc.job import Job
from famc.steps.base import RUNTIME, Amount, Setting
from famc.steps.rerank import LOSSES as BY_OBJECTIVE
from famc.steps.rerank import Rerank
from famc.steps.shapes import shape_values
from famc.work import rank_model, rerank
from famc.work.encoder_folder import encoder_tokenizer
from famc.work.rank_data import Encoder, buckets, padded, read_lists
from famc.work.rank_loss import LOSSES
from famc.work.text import Pair, Writer, to_columns

CONTEXT = 64
SHAPES = {
    "qwen3": Shape("qwen3", 387, 2, 64, 128, 4, 2, 32, True, CONTEXT),
    "untied": Shape("llama", 387, 2, 64, 128, 4, 2, 16, False, CONTEXT),
    "bert": Shape("bert", 387, 2, 64, 128, 4, 4, 16, True, CONTEXT),
    "modernbert": Shape("modernbert", 387, 4, 64, 128, 4, 4, 16, True, CONTEXT),
}
WORDS_SHAPE = dataclasses.replace(SHAPES["bert"], heads=1, kv_heads=1, head_dim=64)
OBJECTIVES = {loss: objective for objective, names in BY_OBJECTIVE.items() for loss in names}
WORDS = list("QXZJVKWUYO")  # tokens of one letter


def drawn(count: int, seed: int, negatives: int = 3) -> list[Pair]:
    """Queries of one word; the passage that answers has it among its words, the others have not."""
    draw = random.Random(seed)
    pairs = []
    for _ in range(count):
        word = draw.choice(WORDS)
        others = [w for w in WORDS if w != word]
        right = draw.sample(others, 2)
        right.insert(draw.randrange(3), word)
        wrong = ["".join(draw.sample(others, 3)) for _ in range(negatives)]
        pairs.append(Pair(word, ("".join(right),), tuple(dict.fromkeys(wrong))))
    return pairs


def mix(folder: Path, pairs: Sequence[Pair]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    columns = ("id", "group", "source", "query", "positives", "negatives")
    with Writer(folder / "examples.parquet", columns) as writer:
        for index, pair in enumerate(pairs):
            writer.add((str(index), "", "s", *to_columns(pair).values()))
    return folder


def mined(folder: Path, found: Sequence[tuple[str, Sequence[str]]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    columns = ("id", "negatives", "scores", "positive_score")
    with Writer(folder / "negatives.parquet", columns, ("positive_score",)) as writer:
        for number, texts in found:
            writer.add((number, json.dumps(list(texts)), json.dumps([0.0] * len(texts)), 1.0))
    return folder


def family_tokenizer(folder: Path) -> Path:
    """The tiny tokenizer with the tokens that the family reserves."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|yes|>", "<|no|>"], special_tokens=True)
    tokenizer.add_special_tokens({"mask_token": "<|mask|>"})
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What a rerank job reads, with a parent of each kind."""
    folder = tmp_path_factory.mktemp("home")
    found = {"tokenizer": family_tokenizer(folder / "tokenizer"), "data": mix(folder / "data", drawn(400, 1))}
    vocab = len(AutoTokenizer.from_pretrained(found["tokenizer"]))
    make_tiny_model(folder / "qwen3", theta=1e4, vocab_size=vocab, initializer_range=0.08)
    make_tiny_model(folder / "untied", "llama", tied=False, vocab_size=vocab, initializer_range=0.08)
    for kind in ("bert", "modernbert"):
        make_tiny_encoder(folder / kind, kind, vocab_size=vocab)  # type: ignore[arg-type]
    return {**found, **{kind: folder / kind for kind in SHAPES}}


def job_of(kind: str = "qwen3", *, job: dict[str, Any] | None = None, **written: Any) -> Job:
    """A job with a stage's fields as a spec would write them."""
    shape = WORDS_SHAPE if kind == "words" else SHAPES[kind]
    needed = {"kind": "rerank", "context": CONTEXT, "steps": 4, "lr": {"peak": 2e-3}, "global_batch": 8}
    stage = Rerank.model_validate(needed | written)
    params: dict[str, Any] = dict(
        stage.resolve(Setting(shape, 30_000, Amount(1e4, 50)), lambda _: None).values
    )
    params |= {"seed": 3, "shape": shape_values(shape, params)}
    params = json.loads(json.dumps(params))
    runtime = {key: params.pop(key) for key in sorted(RUNTIME) if key in params}
    precision = params["precision"] if params["precision"] != "auto" else "fp32"
    return Job.for_test("t/rank", "rerank", params, runtime=runtime, precision=precision, **(job or {}))


def train(home: dict[str, Path], out: Path, kind: str = "qwen3", **more: Any) -> dict[str, Any]:
    """Run the worker as the runner does: what a killed run left behind goes, but for its checkpoints."""
    out.mkdir(parents=True, exist_ok=True)
    roles = {"tokenizer", "data", "negatives", "teacher"} & home.keys()
    inputs = {role: home[role] for role in roles} | {"model": home.get("model") or home[kind]}
    return rerank.run(job_of(kind, **more), inputs, out)


def accuracy(folder: Path, pairs: Sequence[Pair]) -> float:
    """How often the answer is first, by sentence-transformers."""
    model = CrossEncoder(str(folder), local_files_only=True, device="cpu")
    first = 0
    for pair in pairs:
        scores = model.predict([(pair.query, text) for text in (*pair.positives, *pair.negatives)])
        first += bool(scores.argmax() == 0)
    return first / len(pairs)


# --- learning -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def taught(home: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reranker that has learnt the task."""
    out = tmp_path_factory.mktemp("taught")
    train(home, out, steps=200, lr={"peak": 2e-3})
    return out


HELD = drawn(60, 99)


def test_an_easy_task_is_learnt(taught: Path) -> None:
    """Of four passages one is right: chance is a quarter."""
    assert accuracy(taught, HELD) > 0.8


@pytest.mark.parametrize("loss", [loss for loss in OBJECTIVES if loss != "bce"])
def test_every_loss_teaches(home: dict[str, Path], taught: Path, tmp_path: Path, loss: str) -> None:
    inputs = home | ({"teacher": taught} if OBJECTIVES[loss] == "distill" else {})
    metrics = train(
        inputs, tmp_path, objective=OBJECTIVES[loss], loss=loss, steps=200, lr={"peak": 2e-3},
        **({"teacher": "t"} if OBJECTIVES[loss] == "distill" else {}),
    )  # fmt: skip
    assert metrics["last_loss"] < metrics["first_loss"]
    assert accuracy(tmp_path, HELD) > 0.7


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_encoders_learn(home: dict[str, Path], tmp_path: Path, kind: str) -> None:
    metrics = train(home, tmp_path, kind, steps=200, lr={"peak": 2e-3})
    assert metrics["last_loss"] < metrics["first_loss"]
    assert accuracy(tmp_path, HELD) > 0.7
    assert not (tmp_path / "yes_no").exists()


def test_bf16_learns(home: dict[str, Path], tmp_path: Path) -> None:
    train(home, tmp_path, steps=200, lr={"peak": 2e-3}, precision="bf16")
    assert accuracy(tmp_path, HELD) > 0.7


# --- forms of the head --------------------------------------------------------------------------------------

PAIRS = [
    ("Q", "QXZ"),
    ("bread and salt", "The oven asks only for heat."),
    ("J", "V"),
    ("ships", "seven ships " * 9),
]


def classified(folder: Path) -> torch.Tensor:
    """Scores by the classifier, as the saved folder's own tokenizer makes the pairs."""
    words = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(**_batch(words)).logits[:, 0]


def answered(folder: Path) -> torch.Tensor:
    """Scores by the language model: `yes` less `no` at the last token."""
    words = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder / "yes_no").eval()
    with torch.no_grad():
        last = model(**_batch(words)).logits[:, -1]
    return last[:, model.config.true_token_id] - last[:, model.config.false_token_id]


def _batch(words: Any) -> Any:
    queries, passages = (list(side) for side in zip(*PAIRS, strict=True))
    return words(queries, passages, padding=True, return_tensors="pt")


@pytest.mark.parametrize("kind", ["qwen3", "untied"])
@pytest.mark.parametrize("text", ["as_is", "words"])
def test_the_language_model_gives_the_classifiers_score(
    home: dict[str, Path], tmp_path: Path, kind: str, text: str
) -> None:
    train(home, tmp_path, kind, steps=20, text=text)
    scores = classified(tmp_path)
    assert scores.std() > 0.05
    assert torch.allclose(answered(tmp_path), scores, atol=1e-4)
    config = json.loads((tmp_path / "yes_no/config.json").read_text())
    assert config["tie_word_embeddings"] is (kind == "qwen3")
    assert config["architectures"][0].endswith("ForCausalLM")
    assert {path.name for path in (tmp_path / "yes_no").iterdir()} == {"config.json", "model.safetensors"}
    vocabulary = AutoTokenizer.from_pretrained(tmp_path).get_vocab()
    assert config["true_token_id"] == vocabulary["<|yes|>"]
    assert config["false_token_id"] == vocabulary["<|no|>"]


def test_sentence_transformers_reads_the_saved_scores(taught: Path) -> None:
    scores = CrossEncoder(str(taught), local_files_only=True, device="cpu").predict(PAIRS)
    assert torch.allclose(torch.from_numpy(scores), classified(taught), atol=1e-4)


def test_words_that_stand_in_texts_keep_their_embeddings(home: dict[str, Path], tmp_path: Path) -> None:
    """An adopted tokenizer's `yes` and `no`: the head is untied, its two rows alone differ."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["yes", "no"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    train(home | {"tokenizer": tmp_path / "tokenizer"}, tmp_path / "out", steps=20)
    assert torch.allclose(answered(tmp_path / "out"), classified(tmp_path / "out"), atol=1e-4)
    assert json.loads((tmp_path / "out/yes_no/config.json").read_text())["tie_word_embeddings"] is False
    whole = weights(tmp_path / "out/yes_no")
    differs = (whole["lm_head.weight"] != whole["model.embed_tokens.weight"]).any(dim=1)
    assert {int(row) for row in differs.nonzero()} == {
        tokenizer.convert_tokens_to_ids("yes"), tokenizer.convert_tokens_to_ids("no"),
    }  # fmt: skip
    assert torch.equal(
        whole["model.embed_tokens.weight"], weights(tmp_path / "out")["model.embed_tokens.weight"]
    )


def test_training_starts_at_the_language_models_own_answer(home: dict[str, Path], tmp_path: Path) -> None:
    train(home, tmp_path, steps=1, lr={"peak": 1e-12})
    words = AutoTokenizer.from_pretrained(tmp_path)
    yes, no = words.convert_tokens_to_ids(["<|yes|>", "<|no|>"])
    model = AutoModelForCausalLM.from_pretrained(home["qwen3"]).eval()
    with torch.no_grad():
        last = model(**_batch(words)).logits[:, -1]
    assert torch.allclose(classified(tmp_path), last[:, yes] - last[:, no], atol=1e-4)


def test_a_classifiers_head_is_new(home: dict[str, Path], tmp_path: Path) -> None:
    for seed in (3, 4):
        job = job_of(head="classifier", steps=1, lr={"peak": 1e-12})
        job = dataclasses.replace(job, params={**job.params, "seed": seed})
        inputs = {"tokenizer": home["tokenizer"], "data": home["data"], "model": home["qwen3"]}
        (tmp_path / str(seed)).mkdir()
        rerank.run(job, inputs, tmp_path / str(seed))
    three, four = (weights(tmp_path / name)["score.weight"] for name in ("3", "4"))
    assert not torch.allclose(three, four)
    assert float(three.std()) == pytest.approx(0.08, rel=0.5)  # the parent's initializer_range
    assert not (tmp_path / "3/yes_no").exists()


@pytest.mark.parametrize("kind", ["qwen3", "bert", "modernbert"])
def test_a_reranker_keeps_its_head(home: dict[str, Path], tmp_path: Path, kind: str) -> None:
    train(home, tmp_path / "one", kind, steps=30)
    train(home | {"model": tmp_path / "one"}, tmp_path / "two", kind, steps=1, lr={"peak": 1e-12})
    assert torch.allclose(classified(tmp_path / "one"), classified(tmp_path / "two"), atol=1e-5)


def test_a_rerankers_language_model_lives_on(home: dict[str, Path], tmp_path: Path) -> None:
    """The head of a model whose embeddings are not tied lies in the parent's `yes_no`."""
    train(home, tmp_path / "one", "untied", steps=10)
    train(home | {"model": tmp_path / "one"}, tmp_path / "two", "untied", steps=10)
    assert torch.allclose(answered(tmp_path / "two"), classified(tmp_path / "two"), atol=1e-4)
    assert "sentence_transformers" not in json.loads((tmp_path / "two/yes_no/config.json").read_text())


def test_attention_stays_what_it_was(home: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(home["qwen3"], tmp_path / "parent")
    path = tmp_path / "parent/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"is_causal": False}))
    train(home | {"model": tmp_path / "parent"}, tmp_path / "out", steps=20)
    for name in ("config.json", "yes_no/config.json"):
        assert json.loads((tmp_path / "out" / name).read_text())["is_causal"] is False
    assert torch.allclose(answered(tmp_path / "out"), classified(tmp_path / "out"), atol=1e-4)


def test_a_saved_folder_is_complete(taught: Path) -> None:
    config = json.loads((taught / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForSequenceClassification"]
    assert config["pad_token_id"] == 0
    assert config["use_cache"] is True
    assert not (taught / "chat_template.jinja").exists()


# --- nothing else changes the result ------------------------------------------------------------------------


def stretch(index: int, text: str) -> str:
    return text + " and so on" * (index % 4)


def uneven(folder: Path) -> Path:
    """Lists and passages of several lengths."""
    pairs = [dataclasses.replace(p, negatives=p.negatives[: 1 + i % 3]) for i, p in enumerate(drawn(40, 5))]
    pairs = [
        Pair(
            p.query, tuple(stretch(i, t) for t in p.positives), tuple(stretch(i + 1, t) for t in p.negatives)
        )
        for i, p in enumerate(pairs)
    ]
    return mix(folder, pairs)


@pytest.mark.parametrize("loss", OBJECTIVES)
def test_micro_batches_do_not_change_the_result(
    home: dict[str, Path], taught: Path, tmp_path: Path, loss: str
) -> None:
    inputs = home | {"data": uneven(tmp_path / "data"), "teacher": taught}
    for micro in (8, 2, 1):
        train(
            inputs, tmp_path / str(micro), objective=OBJECTIVES[loss], loss=loss, job={"micro_batch": micro}
        )
    for micro in (2, 1):
        assert 0 < furthest(tmp_path / "8", tmp_path / str(micro)) < 2e-4


def test_padding_does_not_change_a_score(home: dict[str, Path], tmp_path: Path) -> None:
    """Buckets of pairs of like length, padded on the right, give what each pair gives alone."""
    tokenizer = encoder_tokenizer(home["tokenizer"], "qwen3", words=False)
    job = job_of()
    model = rank_model.start_model(job, home["qwen3"], tokenizer, rank_model.Head((384, 385), True)).eval()
    texts = [text for pair in PAIRS for text in pair]
    encoder = Encoder(tokenizer, texts, CONTEXT)
    pairs = [encoder.pair(2 * at, 2 * at + 1) for at in range(len(PAIRS))]
    items = [{"pairs": pairs[:3], "labels": [1.0, 0.0, 0.0]}, {"pairs": pairs[3:], "labels": [1.0]}]
    batch = rerank.Collate(0, 16)(items)
    assert batch["mask"].tolist() == [[True, True, True], [True, False, False]]
    with torch.no_grad():
        alone = [float(model(input_ids=torch.from_numpy(pair.ids)[None]).logits) for pair in pairs]
        found = torch.cat([model(**bucket).logits[:, 0] for bucket in batch["buckets"]])
    scores = torch.zeros(6).index_copy(0, batch["places"], found)
    assert torch.allclose(scores, torch.tensor([*alone, 0.0, 0.0]), atol=1e-4)


def test_a_run_repeats_bit_for_bit(home: dict[str, Path], tmp_path: Path) -> None:
    for kind in ("qwen3", "bert"):
        for name in ("a", "b"):
            train(home, tmp_path / kind / name, kind)
        assert same(tmp_path / kind / "a", tmp_path / kind / "b")


class Killed(Exception):
    pass


@pytest.mark.parametrize("kind", ["qwen3", "bert"])
def test_a_killed_job_leaves_the_same_bytes(
    home: dict[str, Path], taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """It dies after a snapshot of the merge and a checkpoint; the teacher is not asked again."""
    more: dict[str, Any] = {
        "steps": 12, "merge": {"last": 3}, "objective": "distill", "loss": "kl", "checkpoint_steps": 3,
    }  # fmt: skip
    inputs = home | {"teacher": taught}
    straight = train(inputs, tmp_path / "a", kind, **more)
    plain = rerank.ListTrainer.training_step
    done = 0

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal done
        done += 1
        if done > 10:
            raise Killed
        return plain(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(rerank.ListTrainer, "training_step", step)
        with pytest.raises(Killed):
            train(inputs, tmp_path / "b", kind, **more)
    with monkeypatch.context() as patch:
        patch.setattr(rerank, "teacher_scores", lambda *args: pytest.fail("asked again"))
        resumed = train(inputs, tmp_path / "b", kind, **more)
    assert resumed["resumed_at"] == 9
    assert resumed["merged"] == 3
    assert same(tmp_path / "a", tmp_path / "b")
    assert resumed["first_loss"] == straight["first_loss"]
    assert resumed["last_loss"] == straight["last_loss"]


@pytest.fixture(scope="module")
def plain(home: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("plain")
    train(home, out)
    return out


@pytest.mark.parametrize(
    "written",
    [
        {"head": "classifier"},
        {"objective": "pairwise"},
        {"objective": "listwise"},
        {"objective": "listwise", "loss": "lambda"},
        {"objective": "listwise", "loss": "plistmle"},
        {"hard_negatives": {"k": 1}},
        {"merge": {"last": 2}},
        {"text": "words"},
        {"global_batch": 4},
        {"steps": None, "epochs": 0.5},
        {"context": 12},
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
    data = home["data"]
    if "context" in written:  # long enough to be cut
        data = uneven(tmp_path / "data")
        train(home | {"data": data}, tmp_path / "plain")
        plain = tmp_path / "plain"
    train(home | {"data": data}, tmp_path / "out", **written)
    assert not same(plain, tmp_path / "out")


def test_ways_to_merge_differ(home: dict[str, Path], tmp_path: Path) -> None:
    for method in ("slerp", "linear"):
        train(home, tmp_path / method, merge={"method": method, "last": 2}, lr={"peak": 2e-2})
    assert 0 < furthest(tmp_path / "slerp", tmp_path / "linear") < 1e-2


# --- lists --------------------------------------------------------------------------------------------------


def test_lists_are_drawn_by_seed_and_pass(tmp_path: Path) -> None:
    pair = Pair("q", ("a", "b", "c"), tuple("123456789"))
    lists = read_lists(mix(tmp_path, [pair]), None)
    names = [[lists.texts[n] for n in lists.members(0, turn, 3, seed=0)] for turn in range(20)]
    assert {one[0] for one in names} == {"a", "b", "c"}
    assert all(len(set(one)) == 4 and set(one[1:]) <= set("123456789") for one in names)
    assert len({tuple(one[1:]) for one in names}) > 10
    assert names == [[lists.texts[n] for n in lists.members(0, turn, 3, seed=0)] for turn in range(20)]
    assert names != [[lists.texts[n] for n in lists.members(0, turn, 3, seed=1)] for turn in range(20)]


def test_mined_negatives_are_taken_hardest_first(tmp_path: Path) -> None:
    data = mix(tmp_path / "data", [Pair("q", ("a",), ("own",)), Pair("r", ("b",))])
    found = mined(tmp_path / "mined", [("0", ["1", "2", "3"]), ("1", [])])
    lists = read_lists(data, found)
    assert [lists.texts[n] for n in lists.members(0, 5, 2, seed=0)] == ["a", "1", "2"]
    assert lists.without == 1  # nothing was mined for it


def test_an_answer_is_no_negative_of_the_same_query(tmp_path: Path) -> None:
    data = mix(tmp_path, [Pair("q", ("a",), ("b", "c")), Pair("q", ("b",), ("c", "c"))])
    lists = read_lists(data, None)
    assert [[lists.texts[n] for n in query.negatives] for query in lists.queries] == [["c"], ["c"]]


def test_a_pass_reads_every_query_once(home: dict[str, Path]) -> None:
    lists = read_lists(home["data"], None)
    order = rerank.Order.of(job_of(steps=None, epochs=2.0).params, lists)
    assert order.steps == 100
    assert order.epochs == 2.0
    half = len(lists.queries)
    assert sorted(order.queries[:half]) == sorted(order.queries[half:])
    assert sorted(p[0] for p in order.passages[:half]) == sorted(p[0] for p in order.passages[half:])


def test_only_the_passage_is_cut_and_a_query_takes_half(home: dict[str, Path]) -> None:
    tokenizer = encoder_tokenizer(home["tokenizer"], "qwen3", words=False)
    texts = ["Q" * 10, "X" * 50, "Z" * 50]
    encoder = Encoder(tokenizer, texts, 42)  # 40 for the texts
    assert encoder.cut(0, 1) == (10, 30)
    assert encoder.cut(1, 2) == (20, 20)
    assert encoder.truncated(0, 1)
    assert not encoder.truncated(0, 0)
    assert len(encoder.pair(1, 2).ids) == encoder.length(1, 2) == 42


@pytest.mark.parametrize("arch", ["qwen3", "bert", "modernbert"])
@pytest.mark.parametrize("words", [False, True])
def test_pairs_are_those_of_the_tokenizer(home: dict[str, Path], arch: str, words: bool) -> None:
    tokenizer = encoder_tokenizer(home["tokenizer"], arch, words=words)
    texts = ["What does bread need?", "getHeader, water & time", ""]
    encoder = Encoder(tokenizer, texts, CONTEXT)
    for query, passage in ((0, 1), (1, 0), (0, 2)):
        wanted = tokenizer([texts[query]], [texts[passage]])["input_ids"][0]
        assert encoder.pair(query, passage).ids.tolist() == wanted


def test_types_of_a_teachers_tokens_are_kept(tmp_path: Path) -> None:
    """BERT's own template gives the second text another type."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    marks = [(token, tokenizer.convert_tokens_to_ids(token)) for token in SPECIAL]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>",
        pair="<|im_start|> $A <|im_end|> $B:1 <|im_end|>:1",
        special_tokens=marks,
    )
    made = Encoder(tokenizer, ["fog and salt", "seven"], CONTEXT).pair(0, 1)
    wanted = tokenizer("fog and salt", "seven", return_token_type_ids=True)
    assert made.ids.tolist() == wanted["input_ids"]
    assert padded([made], 0)["token_type_ids"][0].tolist() == wanted["token_type_ids"]


def test_buckets_hold_little_padding() -> None:
    lengths = [5, 60, 5, 58, 6, 61, 5]
    parts = buckets(lengths, 10)
    assert parts == [[5, 1, 3], [4, 0, 2, 6]]
    assert buckets(lengths, 10**6) == [[5, 1, 3, 4, 0, 2, 6]]


def test_metrics_count_what_was_read(home: dict[str, Path], tmp_path: Path) -> None:
    metrics = train(home | {"data": uneven(tmp_path / "data")}, tmp_path / "out", steps=5, context=16)
    assert metrics["queries"] == 40
    assert metrics["steps"] == 5
    assert metrics["pairs"] == 5 * 8 + 80 - 1  # one, two or three negatives in turn
    assert metrics["mean_list"] == pytest.approx(metrics["pairs"] / 40, abs=1e-4)
    assert 0 < metrics["truncated_share"] < 1
    assert metrics["queries_without_negatives"] == 0
    assert metrics["pairs_per_second"] > 0


# --- losses -------------------------------------------------------------------------------------------------


class Given(CrossEncoder):  # type: ignore[misc]  # sentence-transformers is untyped
    """A cross-encoder that gives the scores that it is given."""

    num_labels = 1
    device = torch.device("cpu")

    def __init__(self, scores: Sequence[float]) -> None:
        torch.nn.Module.__init__(self)
        self.scores = list(scores)

    def preprocess(self, pairs: Sequence[Any], **_: Any) -> dict[str, Any]:
        return {"at": torch.tensor([float(passage) for _, passage in pairs])}

    def forward(self, features: dict[str, torch.Tensor], **_: Any) -> dict[str, torch.Tensor]:
        return {"scores": torch.tensor([self.scores[int(at)] for at in features["at"]])[:, None]}


def reference(loss: str, scores: torch.Tensor, labels: torch.Tensor) -> float:
    """The same lists, by sentence-transformers."""
    queries, width = scores.shape
    model = Given(scores.reshape(-1).tolist())
    passages = [[str(row * width + at) for at in range(width)] for row in range(queries)]
    asked = ["q"] * queries
    if loss == "bce":
        flat = [text for row in passages for text in row]
        return float(losses.BinaryCrossEntropyLoss(model)([["q"] * len(flat), flat], labels.reshape(-1)))
    if loss == "margin_mse":
        columns = [[row[at] for row in passages] for at in range(width)]
        return float(losses.MarginMSELoss(model)([asked, *columns], labels))
    made = {
        "ranknet": losses.RankNetLoss, "lambda": losses.LambdaLoss, "listnet": losses.ListNetLoss,
        "plistmle": losses.PListMLELoss,
    }[loss]  # fmt: skip
    return float(made(model)([asked, passages], list(labels)))


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss != "kl"])
@pytest.mark.parametrize("width", [2, 5, 8])
def test_losses_are_those_of_sentence_transformers(loss: str, width: int) -> None:
    draw = torch.Generator().manual_seed(width)
    scores = torch.randn(6, width, generator=draw) * 3
    labels = torch.zeros(6, width)
    labels[:, 0] = 1.0
    if loss == "margin_mse":
        labels = torch.randn(6, width, generator=draw)
    mask = torch.ones(6, width, dtype=torch.bool)
    assert float(LOSSES[loss](scores, labels, mask).mean()) == pytest.approx(
        reference(loss, scores, labels), rel=1e-5
    )


def test_kl_is_torchs() -> None:
    scores, teacher = torch.randn(4, 6), torch.randn(4, 6)
    mask = torch.ones(4, 6, dtype=torch.bool)
    wanted = torch.nn.functional.kl_div(
        scores.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert float(LOSSES["kl"](scores, teacher, mask).mean()) == pytest.approx(float(wanted), rel=1e-5)
    assert float(LOSSES["kl"](teacher, teacher, mask).max()) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_what_is_not_in_a_list_has_no_part_in_its_loss(loss: str) -> None:
    """A short list beside a long one: its loss is the one that it has alone, and its padding has no gradient."""
    scores, labels = torch.randn(2, 6), torch.rand(2, 6)
    if loss not in ("margin_mse", "kl"):
        labels = torch.zeros(2, 6)
        labels[:, 0] = 1.0
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 3:] = False
    scores, labels = scores * mask, labels * mask
    scores.requires_grad_()
    both = LOSSES[loss](scores, labels, mask)
    alone = LOSSES[loss](scores[1:, :3], labels[1:, :3], mask[1:, :3])
    assert torch.allclose(both[1:], alone, atol=1e-6)
    both.sum().backward()
    assert scores.grad is not None
    assert torch.isfinite(scores.grad).all()
    assert not scores.grad[1, 3:].any()


# --- refusals -----------------------------------------------------------------------------------------------


def test_queries_without_negatives_are_refused(home: dict[str, Path], tmp_path: Path) -> None:
    data = mix(tmp_path / "data", [Pair("q", ("a",)), Pair("r", ("b",))])
    with pytest.raises(StepFailed, match="none of 2 queries has a negative") as failed:
        train(home | {"data": data}, tmp_path / "out")
    assert "hard_negatives" in failed.value.hint


def test_negatives_of_another_mix_are_refused(home: dict[str, Path], tmp_path: Path) -> None:
    for found in ([("0", ["a"])], [(str(n + 1), ["a"]) for n in range(400)]):
        inputs = home | {"negatives": mined(tmp_path / str(len(found)), found)}
        with pytest.raises(StepFailed, match="mined for another mix"):
            train(inputs, tmp_path / "out")


def test_a_mix_without_pairs_is_refused(home: dict[str, Path], tmp_path: Path) -> None:
    with Writer(tmp_path / "examples.parquet", ("id", "messages")) as writer:
        writer.add(("0", "[]"))
    with pytest.raises(StepFailed, match="reads pairs"):
        train(home | {"data": tmp_path}, tmp_path / "out")


def test_distilling_needs_a_teacher_that_ranks(home: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(StepFailed, match="there is no teacher"):
        train(home, tmp_path / "out", objective="distill")
    with pytest.raises(StepFailed, match="no reranker"):
        train(home | {"teacher": home["qwen3"]}, tmp_path / "out", objective="distill")


def test_a_context_without_room_is_refused(home: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(StepFailed, match="a context of 8 leaves 6 tokens") as failed:
        train(home, tmp_path / "out", context=8)
    assert failed.value.hint == "set context to 10 or more"


def test_a_tokenizer_without_yes_and_no_is_refused(home: dict[str, Path], tmp_path: Path) -> None:
    plain = make_tokenizer(_made(tmp_path / "tokenizer"))
    with pytest.raises(StepFailed, match="one token each"):
        train(home | {"tokenizer": plain}, tmp_path / "out")
    train(home | {"tokenizer": plain}, tmp_path / "out", head="classifier")


def test_an_encoder_says_neither_yes_nor_no(home: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(StepFailed, match="predicts no next token"):
        train(home, tmp_path / "out", "bert", head="yes_no")


def test_an_untied_head_that_is_gone_is_refused(home: dict[str, Path], tmp_path: Path) -> None:
    """A classifier of a model whose embeddings are not tied has lost the rows of yes and no."""
    train(home, tmp_path / "one", "untied", steps=1, head="classifier")
    with pytest.raises(StepFailed, match="embeddings are not tied"):
        train(home | {"model": tmp_path / "one"}, tmp_path / "two", "untied", steps=1)


def test_a_text_is_not_padded_with_what_ends_it(home: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(home["tokenizer"])
    tokenizer.pad_token = "<|im_end|>"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    train(home | {"tokenizer": tmp_path / "tokenizer"}, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").pad_token == "<|endoftext|>"
    assert json.loads((tmp_path / "out/config.json").read_text())["pad_token_id"] == 0
    assert torch.allclose(answered(tmp_path / "out"), classified(tmp_path / "out"), atol=1e-4)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def test_a_reranker_may_begin_with_words(home: dict[str, Path], tmp_path: Path) -> None:
    """Without a parent: it answers before its layers learn, says what that took, and goes on after a kill as if there
    had been none. The folder is one of sentence-transformers."""
    inputs = {name: home[name] for name in ("tokenizer", "data")}
    job = job_of(
        "words", objective="listwise", steps=2, lr=1e-5, lexical={"epochs": 8, "batch": 16, "lr": 0.02}
    )
    out = tmp_path / "whole"
    out.mkdir()
    metrics = rerank.run(job, inputs, out)
    assert accuracy(out, drawn(60, 9)) > 0.9
    assert metrics["lexical_steps"] == 200 and metrics["lexical_loss_last"] < metrics["lexical_loss_first"]
    assert metrics["compute_cpu_seconds"] > 0
    kept = json.loads((out / "checkpoints" / rank_model.START / rank_model.FACTS).read_text())
    again = tmp_path / "again"
    shutil.copytree(out / "checkpoints" / rank_model.START, again / "checkpoints" / rank_model.START)
    resumed = rerank.run(job, {**inputs}, again)
    assert same(out, again)
    assert resumed["lexical_steps"] == kept["lexical_steps"]
