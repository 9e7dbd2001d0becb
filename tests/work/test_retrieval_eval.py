"""Searching is measured as it is defined: by hand, beside BM25, with honest intervals, for any model that has vectors."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from tiny_artifacts import make_data, make_model, make_tokenizer
from tiny_encoder import make_tiny_encoder
from tiny_model import TEXTS
from transformers import AutoModel

from famc.errors import StepFailed
from famc.job import Job
from famc.work import evaluate, retrieval_eval
from famc.work.bm25 import Bm25
from famc.work.encoder_folder import encoder_tokenizer, save_embedder
from famc.work.scores import RESAMPLES, Units, interval
from famc.work.search import Corpus, Embedder, Reranker, by_words, cut, fuse, fused, nearest, suits

WORDS = sorted({word for text in TEXTS for word in text.split() if word.isalpha()})
PAIRS = [
    {
        "id": f"p{i}",
        "query": f"{WORDS[i]} {WORDS[-1 - i]}",
        "positives": [f"{WORDS[i]} {WORDS[(7 * i) % len(WORDS)]} {WORDS[-1 - i]} {i}"],
        "negatives": [],
    }
    for i in range(24)
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models by name; data of 24 pairs."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("models")
    tokenizer = make_tokenizer(root / "tokenizer")
    return {
        "tokenizer": tokenizer,
        "embedder": make_tiny_encoder(root / "embedder", "bert"),
        "qwen3": make_tiny_encoder(root / "qwen3", "qwen3"),
        "reranker": make_tiny_encoder(root / "reranker", "bert", labels=1),
        "base": make_model(root / "base", tokenizer),
        "data": make_data(root / "data", PAIRS),
    }


def measure(out: Path, folders: Any, model: str, *names: str, **more: Any) -> tuple[dict, dict, list]:
    """(metrics, results, samples) of a suite on the pairs."""
    tasks = [{"task": name, "data": "pairs", "n": None, "tasks": [], "max_new_tokens": 4} for name in names]
    job = Job.for_test("m/emb/eval.s", "eval", {"suite": "s", "tasks": tasks, "context": 64}, **more)
    inputs = {"model": folders[model], "tokenizer": folders["tokenizer"], "data.pairs": folders["data"]}
    if "retriever" in folders:
        inputs["retriever"] = folders["retriever"]
    out.mkdir(parents=True, exist_ok=True)
    metrics = evaluate.run(job, inputs, out)
    lines = (out / "samples.jsonl").read_text().splitlines()
    return metrics, json.loads((out / "results.json").read_text()), [json.loads(line) for line in lines]


def questions(tmp_path: Path, rows: list[dict[str, Any]], n: int | None = None) -> retrieval_eval.Questions:
    return retrieval_eval.Questions.read(make_data(tmp_path / "some", rows), n)


class Told:
    """An embedder that finds what it is told: the right passage at the place `places` says, or anywhere."""

    def __init__(self, right: dict[str, str] | None) -> None:
        self.right, self.dims = right, (64, 16)
        self.generator = np.random.default_rng(3)

    def __call__(self, *_: Any, **__: Any) -> Told:
        return self

    def queries(self, texts: Any, progress: Any) -> np.ndarray:
        return self.passages([self.right[text] if self.right else text for text in texts], progress)

    def passages(self, texts: Any, progress: Any) -> np.ndarray:
        if self.right is None:
            rows = [self.generator.standard_normal(64) for _ in texts]
        else:  # the same text has the same vector
            rows = [np.random.default_rng(sum(map(ord, t)) * 997 + len(t)).standard_normal(64) for t in texts]
        return cut(np.array(rows, np.float32), 63) @ np.eye(63, 64, dtype=np.float32)


# --- by hand ------------------------------------------------------------------------------------------------


def test_measures_are_those_of_their_definitions(tmp_path):
    rows = [
        {"id": "a", "query": "one", "positives": ["p0"], "negatives": []},
        {"id": "b", "query": "two", "positives": ["p1", "p2"], "negatives": [f"n{i}" for i in range(12)]},
        {"id": "c", "query": "three", "positives": ["p3"], "negatives": []},
    ]
    asked = questions(tmp_path, rows)
    number = asked.corpus.number
    other = [number(f"n{i}") for i in range(12)]
    rankings = {
        "one": [other[0], other[1], number("p0")],  # third
        "two": [number("p2"), *other[:9], number("p1")],  # first and eleventh
        "three": [],  # nothing found
    }
    found = asked.measure(
        [np.array(rankings[query], np.int64) for query in asked.queries], retrieval_eval.MEASURES
    )
    by_query = {q: {name: found[name][i] for name in found} for i, q in enumerate(asked.queries)}
    gain = [1 / math.log2(place + 1) for place in range(1, 11)]
    assert by_query["one"] == pytest.approx(
        {"ndcg@10": gain[2], "mrr@10": 1 / 3, "recall@10": 1, "recall@100": 1}
    )
    assert by_query["two"] == pytest.approx(
        {"ndcg@10": gain[0] / (gain[0] + gain[1]), "mrr@10": 1, "recall@10": 0.5, "recall@100": 1}
    )
    assert by_query["three"] == {"ndcg@10": 0, "mrr@10": 0, "recall@10": 0, "recall@100": 0}


def test_a_place_beyond_the_tenth_counts_for_recall_at_100_alone(tmp_path):
    rows = [{"id": "a", "query": "q", "positives": ["p"], "negatives": [f"n{i}" for i in range(120)]}]
    asked = questions(tmp_path, rows)
    others = np.array([asked.corpus.number(f"n{i}") for i in range(120)])
    for before, expected in ((10, 1.0), (100, 0.0)):
        ranking = np.concatenate([others[:before], [asked.corpus.number("p")], others[before:]])
        found = asked.measure([ranking], retrieval_eval.MEASURES)
        assert found == {"ndcg@10": [0], "mrr@10": [0], "recall@10": [0], "recall@100": [expected]}
        assert asked.place(0, ranking) == before + 1


def test_copies_of_a_passage_are_one_and_rows_of_one_query_too(tmp_path):
    rows = [
        {"id": "a", "query": "q", "positives": ["The  answer"], "negatives": ["Other"]},
        {"id": "b", "query": "q ", "positives": ["second"], "negatives": ["other", " "]},
        {"id": "c", "query": "Q", "positives": ["the answer", "THE ANSWER"], "negatives": []},
    ]
    asked = questions(tmp_path, rows)
    assert len(asked.corpus) == 3
    right = dict(zip(asked.queries, asked.right, strict=True))
    assert set(map(str.strip, right)) == {"q", "Q"}
    passages = {
        query.strip(): {asked.corpus.passages[p].lower() for p in some} for query, some in right.items()
    }
    assert {" ".join(p.split()) for p in passages["q"]} == {"the answer", "second"}
    assert len(right["Q"]) == 1
    assert len(questions(tmp_path, rows, 1).queries) == 1
    assert len(questions(tmp_path, rows, 1).corpus) == 3  # fewer queries, the same haystack


def found(numbers, scores):
    return np.array(numbers, np.int64), np.array(scores, np.float64)


def test_fusion_by_hand():
    # standardised: 1 and -1 of two; a single score is no better than any
    scores = fuse([found([3, 1], [0.9, 0.7]), found([1, 3, 0], [8.0, 5.0, 2.0])], 5)
    step = 3 / np.std([8, 5, 2])
    assert scores.tolist() == pytest.approx([-1 - step, -1 + step, -np.inf, 1.0, -np.inf])
    assert fused([found([3, 1], [0.9, 0.7]), found([1], [4.0])], 5, 10).tolist() == [3, 1]
    assert fused([found([2], [1.0]), found([0], [3.0])], 3, 10).tolist() == [0, 2]  # equals: the lower number
    assert fuse([], 2).tolist() == [-np.inf, -np.inf]
    far = fuse([found([0, 1, 2], [9.0, 1.0, 0.9]), found([1, 0, 2], [2.0, 1.9, 1.8])], 3)
    assert far.argmax() == 0, "by how much a passage is better counts, which ranks would hide"


def test_equal_cosines_stand_in_the_corpus_order():
    vectors = np.tile(np.float32([[0.6, 0.8]]), (37, 1))
    ((best, scores),) = nearest(vectors[:1], vectors, 5)
    assert best.tolist() == [0, 1, 2, 3, 4]
    assert scores.tolist() == pytest.approx([1.0] * 5)


def test_cut_vectors_have_length_one_again():
    vectors = np.float32([[3, 4, 12], [0, 0, 1]])
    assert cut(vectors, 2).tolist() == [pytest.approx([0.6, 0.8]), [0, 0]]
    assert cut(vectors, 3) is vectors


def test_bm25_does_not_find_what_shares_no_word():
    index = Bm25(["alpha beta", "gamma", "alpha"])
    assert by_words(index, "alpha", 10)[0].tolist() == [2, 0]
    assert by_words(index, "delta", 10)[0].tolist() == []


# --- intervals ----------------------------------------------------------------------------------------------


def test_an_interval_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        values = generator.random(80) < 0.3
        low, high = interval(Units.of((str(i), float(v), 1.0) for i, v in enumerate(values)), f"m{trial}")
        covered += low <= 0.3 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_an_interval_repeats_and_agrees_with_the_standard_error():
    generator = np.random.default_rng(1)
    den = generator.random(400) + 0.5
    units = Units.of(
        (str(i), d * 0.5 + e, d)
        for i, (d, e) in enumerate(zip(den, generator.normal(0, 0.2, 400), strict=True))
    )
    low, high = interval(units, "ndcg@10")
    assert [low, high] == interval(units, "ndcg@10")
    assert [low, high] != interval(units, "mrr@10")
    score = units.score()
    assert low < score.value < high
    assert (high - low) / 2 == pytest.approx(1.96 * score.stderr, rel=0.1)


@pytest.mark.parametrize(
    "rows", [[], [("a", 1, 1)], [("a", math.nan, 1), ("b", 1, 1)], [("a", 0, 0), ("b", 0, 0)]]
)
def test_what_has_no_interval_says_so(rows):
    units = Units.of(rows)
    assert interval(units, "m") == [None, None]
    assert math.isnan(units.score().stderr)


def test_units_without_a_denominator_are_no_obstacle():
    low, high = interval(Units.of([("a", 0, 0), ("b", 1, 2), ("c", 1, 2)]), "m")
    assert (low, high) == (0.5, 0.5)


def test_an_interval_of_many_units_is_drawn_in_parts(monkeypatch):
    monkeypatch.setattr("famc.work.scores._DRAWS", 1000)
    units = Units.of((str(i), i % 2, 1) for i in range(300))
    low, high = interval(units, "m")
    assert RESAMPLES % 3 and 0.42 < low < 0.46 and 0.54 < high < 0.58


# --- embedders ----------------------------------------------------------------------------------------------


def test_a_perfect_embedder_has_one_and_a_random_one_little(tmp_path, folders, monkeypatch):
    right = {pair["query"]: pair["positives"][0] for pair in PAIRS}
    monkeypatch.setattr(retrieval_eval, "Embedder", Told(right))
    metrics, results, samples = measure(tmp_path / "perfect", folders, "embedder", "retrieval")
    assert metrics["ndcg@10"] == metrics["mrr@10"] == metrics["recall@10"] == metrics["recall@100"] == 1
    assert results["ndcg@10"] == {"value": 1.0, "stderr": 0.0, "n": 24, "interval": [1.0, 1.0]}
    bm25 = metrics["bm25_ndcg@10"]
    assert 0 < bm25 <= 1
    assert metrics["over_bm25"] == pytest.approx((1 - bm25) / bm25)
    assert metrics["fused_over_embedder"] == pytest.approx(metrics["fused_ndcg@10"] - 1)
    assert metrics["fused_over_bm25"] == pytest.approx((metrics["fused_ndcg@10"] - bm25) / bm25)
    assert metrics["mrl_kept"] == 1
    assert [sample["rank"] for sample in samples] == [1] * 10
    first = samples[0]
    assert first["found"][0] == first["right"] == right[first["query"]]
    assert len(first["found"]) == 3 and first["task"] == "retrieval"

    monkeypatch.setattr(retrieval_eval, "Embedder", Told(None))
    metrics, results, _ = measure(tmp_path / "random", folders, "embedder", "retrieval")
    assert metrics["ndcg@10"] < 0.45  # 10 of 24 places: 0.19 is expected
    assert metrics["over_bm25"] < 0
    low, high = results["ndcg@10"]["interval"]
    assert low < results["ndcg@10"]["value"] < high


def test_an_embedder_is_asked_with_its_prompts_and_measured_as_sentence_transformers_says(tmp_path, folders):
    folder = folders["embedder"]
    (tmp_path / "prompted").mkdir()
    for path in folder.iterdir():
        (tmp_path / "prompted" / path.name).symlink_to(path)
    settings = {"prompts": {"query": "Rivers: ", "document": ""}, "matryoshka_dims": [64, 32, 8]}
    (tmp_path / "prompted" / "config_sentence_transformers.json").write_text(json.dumps(settings))
    embedder = Embedder(tmp_path / "prompted", None, 1)
    assert embedder.dims == (64, 32, 8)
    texts = [pair["query"] for pair in PAIRS] + ["the"]
    plain = SentenceTransformer(str(folder), device="cpu")
    assert embedder.queries(texts) == pytest.approx(
        plain.encode(["Rivers: " + text for text in texts], normalize_embeddings=True), abs=1e-5
    )
    assert embedder.passages(texts) == pytest.approx(plain.encode(texts, normalize_embeddings=True), abs=1e-5)
    assert embedder.passages([]).shape == (0, 64)
    close = Embedder(tmp_path / "prompted", None, 1, "bf16").passages(texts)
    assert (close * embedder.passages(texts)).sum(axis=1).min() > 0.99

    metrics, _, _ = measure(
        tmp_path / "out", {**folders, "prompted": tmp_path / "prompted"}, "prompted", "retrieval"
    )
    asked = retrieval_eval.Questions.read(folders["data"], None)
    queries, passages = embedder.queries(asked.queries), embedder.passages(asked.corpus.passages)
    order = np.argsort(-(queries @ passages.T), axis=1)
    places = [asked.place(i, row) for i, row in enumerate(order)]
    assert metrics["mrr@10"] == pytest.approx(np.mean([1 / p if p <= 10 else 0 for p in places]), abs=1e-3)
    assert metrics["mrl_kept"] > 0


@pytest.mark.parametrize("kind", ["base", "masked"])
def test_a_model_that_is_no_embedder_yet_gives_the_mean_of_its_tokens(tmp_path, folders, kind):
    if kind == "masked":
        from transformers import AutoModelForMaskedLM, BertConfig

        from famc.work.likelihood import load_tokenizer

        config = BertConfig(
            vocab_size=len(load_tokenizer(folders["tokenizer"])), hidden_size=32, num_hidden_layers=1,
            num_attention_heads=2, intermediate_size=64, max_position_embeddings=64, pad_token_id=0,
        )  # fmt: skip
        tokenizer = load_tokenizer(folders["tokenizer"])
        tokenizer.mask_token = "<|endoftext|>"
        tokenizer.save_pretrained(tmp_path / "words")
        AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path / "model")
        model, words, arch = tmp_path / "model", tmp_path / "words", "bert"
    else:
        model, words, arch = folders["base"], folders["tokenizer"], "qwen3"
    embedder = Embedder(model, words, 1, context=48)
    assert not embedder.tuned and len(embedder.dims) == 1
    tokenizer = encoder_tokenizer(words, arch, words=False)
    plain = AutoModel.from_pretrained(model).eval()
    for text in ("Rivers carry the mountains", "Bread needs flour " * 30):
        batch = tokenizer(text, truncation=True, max_length=48, return_tensors="pt")
        with torch.inference_mode():
            mean = plain(**batch).last_hidden_state[0].mean(0).numpy()
        assert embedder.passages([text, "a"])[0] == pytest.approx(mean / np.linalg.norm(mean), abs=1e-4)
    metrics, _, _ = measure(
        tmp_path / "out", {**folders, "model": model, "tokenizer": words}, "model", "retrieval"
    )
    assert 0 <= metrics["ndcg@10"] <= 1 and "mrl_kept" not in metrics


def test_a_suite_of_a_base_may_hold_text_and_search(tmp_path, folders):
    rows = [{**pair, "text": pair["query"]} for pair in PAIRS]
    both = {**folders, "data": make_data(tmp_path / "both", rows)}
    metrics, results, _ = measure(tmp_path / "out", both, "base", "bits_per_byte", "retrieval")
    assert metrics["bits_per_byte"] > 0 and metrics["bm25_ndcg@10"] > 0
    assert all(len(results[name]["interval"]) == 2 for name in ("bits_per_byte", "ndcg@10"))


@pytest.mark.skipif(importlib.util.find_spec("mteb") is None, reason="famc[mteb] is not installed")
def test_mteb_counts_the_held_out_pairs_as_we_do(tmp_path, folders):
    metrics, results, _ = measure(tmp_path / "out", folders, "embedder", "retrieval", "mteb")
    for ours, theirs in (("ndcg@10", "ndcg_at_10"), ("mrr@10", "mrr_at_10"), ("recall@100", "recall_at_100")):
        assert metrics[f"held_out.{theirs}"] == pytest.approx(metrics[ours], abs=1e-4)
        entry = {"value": metrics[f"held_out.{theirs}"], "stderr": None, "n": 24, "higher_is_better": True}
        assert results[f"held_out.{theirs}"] == entry
    unknown = {"task": "mteb", "data": None, "n": None, "tasks": ["SciFac"]}
    job = Job.for_test("m", "eval", {"suite": "s", "tasks": [unknown], "context": 64})
    with pytest.raises(StepFailed, match="SciFac") as error:
        evaluate.run(job, {"model": folders["embedder"], "tokenizer": folders["tokenizer"]}, tmp_path)
    assert "SciFact" in error.value.hint


def test_mteb_without_its_package_says_what_to_install(tmp_path, folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "mteb", None)
    with pytest.raises(StepFailed, match="needs the package mteb") as error:
        measure(tmp_path / "out", folders, "embedder", "mteb")
    assert "pip install" in error.value.hint


# --- rerankers ----------------------------------------------------------------------------------------------


class Judge:
    """A reranker that knows the answers."""

    def __init__(self, right: dict[str, str], sign: float = 1.0) -> None:
        self.right, self.sign = right, sign
        self.read = 0

    def __call__(self, *_: Any, **__: Any) -> Judge:
        return self

    def pairs(self, asked: Any, passages: Any, progress: Any) -> np.ndarray:
        self.read += len(passages)
        return np.array([self.sign * (self.right[q] == p) for q, p in zip(asked, passages, strict=True)])


@pytest.mark.parametrize("stage", ["bm25", "embedder"])
def test_a_perfect_reranker_is_as_good_as_what_it_is_given(tmp_path, folders, monkeypatch, stage):
    right = {pair["query"]: pair["positives"][0] for pair in PAIRS}
    judge = Judge(right)
    monkeypatch.setattr(retrieval_eval, "Reranker", judge)
    monkeypatch.setattr(retrieval_eval, "TOP", 4)
    some = folders | ({"retriever": folders["qwen3"]} if stage == "embedder" else {})
    metrics, _, samples = measure(tmp_path / "out", some, "reranker", "rerank")
    asked = retrieval_eval.Questions.read(folders["data"], None)
    assert judge.read <= 4 * 24
    assert metrics["retriever_ndcg@10"] <= metrics["ndcg@10"]
    assert metrics["retriever_recall"] <= metrics["mrr@10"]  # behind the top the right one keeps its place
    assert metrics["over_retriever"] == pytest.approx(metrics["ndcg@10"] / metrics["retriever_ndcg@10"] - 1)
    assert metrics["over_bm25"] == pytest.approx(metrics["ndcg@10"] / metrics["bm25_ndcg@10"] - 1)
    assert {sample["retriever"] for sample in samples} == {stage} and len(samples) == 10
    assert all(s["rank"] == 1 for s in samples if s["retriever_rank"] and s["retriever_rank"] <= 4)
    if stage == "bm25":
        assert metrics["retriever_ndcg@10"] == metrics["bm25_ndcg@10"]
    assert len(asked.queries) == 24


def test_passages_behind_the_top_keep_their_places_and_equals_the_first_order(tmp_path):
    asked = questions(tmp_path, [{"id": "a", "query": "q", "positives": list("wxyz"), "negatives": ["v"]}])
    numbers = {text: asked.corpus.number(text) for text in "vwxyz"}
    first = np.array([numbers[text] for text in "vwxyz"])
    (made,) = retrieval_eval.again(Judge({"q": "x"}), asked, [first], 3)
    assert [asked.corpus.passages[p] for p in made] == ["x", "v", "w", "y", "z"]
    (made,) = retrieval_eval.again(Judge({"q": "x"}, 0.0), asked, [first], 3)
    assert made.tolist() == first.tolist()
    (made,) = retrieval_eval.again(Judge({"q": "x"}), asked, [first[:0]], 3)
    assert made.tolist() == []


@pytest.mark.parametrize("kind", ["bert", "qwen3", "modernbert"])
def test_scores_are_those_of_sentence_transformers_whatever_the_batch(tmp_path, kind):
    folder = make_tiny_encoder(tmp_path / "r", kind, labels=1)
    reranker = Reranker(folder, 1)
    passages = [pair["positives"][0] * (1 + i % 9) for i, pair in enumerate(PAIRS)]
    found = reranker.scores("Rivers carry", passages)
    plain = CrossEncoder(str(folder), device="cpu")
    expected = plain.predict([("Rivers carry", p) for p in passages], activation_fn=torch.nn.Identity())
    assert found == pytest.approx(np.asarray(expected).reshape(-1), abs=1e-4)
    assert Reranker(folder, 1, "bf16").scores("Rivers carry", passages) == pytest.approx(found, abs=0.3)
    long = reranker.scores("Rivers carry the mountains to the sea " * 40, passages[:2])
    assert np.isfinite(long).all()
    assert reranker.scores("Rivers", []).shape == (0,)
    # a long query leaves room for its passage
    assert len(set(reranker.scores("sea " * 500, ["Bread", "names", "a"]).tolist())) == 3


def test_a_real_reranker_behind_a_real_embedder(tmp_path, folders):
    some = {**folders, "retriever": folders["embedder"]}
    metrics, results, samples = measure(tmp_path / "a", some, "reranker", "rerank")
    again, same, _ = measure(tmp_path / "b", some, "reranker", "rerank")
    assert metrics == again and results == same
    assert set(metrics) == {
        "ndcg@10", "mrr@10", "retriever_ndcg@10", "retriever_recall", "bm25_ndcg@10", "over_retriever", "over_bm25",
    }  # fmt: skip
    assert metrics["retriever_recall"] == 1  # 50 of 24 passages
    assert all(sample["rank"] for sample in samples)


# --- what does not fit --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "task", "words"),
    [
        ("reranker", "retrieval", "a reranker"),
        ("embedder", "rerank", "an embedder"),
        ("reranker", "mteb", "compares vectors"),
        ("base", "rerank", "a language model"),
        ("embedder", "bits_per_byte", "asks a language model"),
        ("reranker", "answers", "asks a language model"),
    ],
)
def test_a_task_that_a_model_is_not_for_is_refused(tmp_path, folders, model, task, words):
    with pytest.raises(StepFailed, match=words) as error:
        measure(tmp_path / "out", folders, model, task)
    assert task in error.value.message and error.value.hint


def test_folders_of_the_wrong_kind_are_refused_with_a_sentence(tmp_path, folders):
    with pytest.raises(StepFailed, match="no vectors"):
        Embedder(folders["reranker"], None, 1)
    with pytest.raises(StepFailed, match="does not score pairs"):
        Reranker(folders["embedder"], 1)
    with pytest.raises(StepFailed, match=r"config\.json"):
        suits(tmp_path, "retrieval")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((folders["embedder"] / "config.json").read_text())
    (broken / "modules.json").write_text((folders["embedder"] / "modules.json").read_text())
    with pytest.raises(StepFailed, match="can't be loaded"):
        Embedder(broken, None, 1)


def test_an_embedder_that_diverged_is_refused(tmp_path, folders):
    model = AutoModel.from_pretrained(folders["embedder"], add_pooling_layer=False)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight.fill_(math.nan)
    tokenizer = encoder_tokenizer(folders["embedder"], "bert", words=False)
    save_embedder(model, tokenizer, tmp_path / "nan", pooling="cls", prompts={}, mrl=(), context=32)
    with pytest.raises(StepFailed, match="not finite"):
        Embedder(tmp_path / "nan", None, 1).queries(["a"])


def test_too_little_held_out_is_refused(tmp_path):
    with pytest.raises(StepFailed, match="two passages"):
        questions(tmp_path, [{"id": "a", "query": "q", "positives": ["p"], "negatives": []}])


def test_a_corpus_says_which_passage_a_text_is():
    corpus = Corpus.of(["B  a", "", "c", "b A"])
    assert corpus.passages == ("B  a", "c") and corpus.number(" b a ") == 0 and len(corpus) == 2
