"""Mined negatives are near and no answers; the data's own come first; the bytes repeat."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from sentence_transformers import SentenceTransformer
from tiny_encoder import make_tiny_encoder
from tiny_model import TEXTS

from famc.cost.shape import Shape
from famc.errors import StepFailed
from famc.job import Job
from famc.steps.base import Amount
from famc.steps.mine import mine_params, mine_work
from famc.work import mine
from famc.work.bm25 import Bm25, highest, words
from famc.work.text import Pair, Writer, to_columns

WORDS = [word for text in TEXTS for word in text.split()]
SOME = [
    Pair(" ".join(WORDS[i : i + 3]), (" ".join(WORDS[i : i + 5 + i % 7]) + f" {i}",))
    for i in range(0, 120, 4)
]


def mix(folder: Path, pairs: list[Pair]) -> Path:
    folder.mkdir(parents=True)
    with Writer(
        folder / "examples.parquet", ("id", "group", "source", "query", "positives", "negatives")
    ) as writer:
        for index, pair in enumerate(pairs):
            writer.add((f"p{index}", "g", "s", *to_columns(pair).values()))
    return folder


def run(tmp_path: Path, pairs: list[Pair], model: Path | None = None, **more: Any) -> tuple[Any, ...]:
    """(rows, metrics, folder) of what is mined."""
    name = f"m{len(list(tmp_path.iterdir()))}"
    params = mine_params({"k": 3, "margin": 0.0}, model is not None) | more
    inputs = {"data": mix(tmp_path / f"{name}-data", pairs)} | ({"model": model} if model else {})
    out = tmp_path / name
    out.mkdir()
    job = Job.for_test("mine", "mine", params, metrics=str(tmp_path / f"{name}.jsonl"))
    metrics = mine.run(job, inputs, out)
    rows = pq.read_table(out / "negatives.parquet").to_pylist()
    return (
        [
            {**row, "negatives": json.loads(row["negatives"]), "scores": json.loads(row["scores"])}
            for row in rows
        ],
        metrics,
        out,
    )


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_tiny_encoder(tmp_path_factory.mktemp("mine") / "m", "bert")
    settings = {"prompts": {"query": "alpha beta ", "document": ""}, "similarity_fn_name": "cosine"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
    return folder


# --- BM25 ---------------------------------------------------------------------------------------------------


def test_words_are_cut_in_code_and_prose() -> None:
    assert words("json.JSONDecoder.raw_decode2 readLines()") == [
        *("json", "json", "decoder", "raw", "decode", "2", "read", "lines")
    ]
    assert words("Größe élan 中文 x") == ["größe", "élan", "中", "文", "x"]
    assert words(" _.- ") == []


def test_scores_are_those_of_the_formula() -> None:
    """Lucene's BM25: idf ln(1 + (N - n + 0.5) / (n + 0.5)), saturation tf / (tf + k1 (1 - b + b l / mean))."""
    passages = ["join paths join", "split a path", "nothing of it here"]
    found = Bm25(passages).scores("join the pathsJoin")  # join twice, `the` in none
    mean = (3 + 3 + 4) / 3
    norm = 1.2 * (0.25 + 0.75 * 3 / mean)
    idf = np.log(1 + 2.5 / 1.5)
    assert found == pytest.approx([2 * idf * 2 / (2 + norm) + idf * 1 / (1 + norm), 0, 0], rel=1e-5)


def test_equal_scores_stand_in_the_passages_order() -> None:
    index = Bm25(["b a", "a b", "c", "a b"])
    best, scores = index.top("a", 2)
    assert best.tolist() == [0, 1] and scores[0] == scores[1] > 0
    assert index.top("unknown", 3)[0].tolist() == [0, 1, 2] and index.top("", 9)[0].tolist() == [0, 1, 2, 3]
    assert Bm25([]).top("a", 3)[0].tolist() == [] and Bm25(["", "?"]).scores("a").tolist() == [0, 0]
    scores = np.random.default_rng(0).integers(0, 6, 200).astype(np.float32)
    wanted = sorted(range(200), key=lambda i: (-scores[i], i))
    assert all(highest(scores, k).tolist() == wanted[:k] for k in (0, 1, 7, 60, 199, 200, 300))


def test_indexing_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    Bm25(["some words"] * 5000).top("words", 3)
    assert capfd.readouterr() == ("", "")


# --- mining -------------------------------------------------------------------------------------------------


def test_bm25_alone_takes_the_nearest_below_the_positive(tmp_path: Path) -> None:
    pairs = [
        Pair("open a file", ("open a file now",)),
        Pair("close a door", ("close a door now",)),
        Pair("paint walls", ("paint walls with a brush",)),
        Pair("sleep", ("sleep all night",)),
    ]
    rows, metrics, _ = run(tmp_path, pairs, k=2)
    assert [row["id"] for row in rows] == ["p0", "p1", "p2", "p3"]
    assert rows[0]["negatives"] == ["close a door now", "paint walls with a brush"], "`a` is all they share"
    assert rows[2]["negatives"] == ["open a file now", "close a door now"][: len(rows[2]["negatives"])]
    assert rows[3]["negatives"] == [] and metrics["queries_with_fewer"] >= 1
    index = Bm25([p.positives[0] for p in pairs])
    scores = index.scores("open a file")
    assert rows[0]["scores"] == pytest.approx([scores[1], scores[2]], abs=1e-6)
    assert rows[0]["positive_score"] == pytest.approx(scores[0], abs=1e-6)
    assert metrics["queries"] == metrics["passages"] == 4 and metrics["negatives"] == sum(
        len(row["negatives"]) for row in rows
    )


def test_what_scores_like_the_positive_is_taken_for_an_answer(tmp_path: Path) -> None:
    pairs = [
        Pair("red round apple", ("red apple",)),
        Pair("x", ("red round apple",)),  # better than the positive
        Pair("y", ("round apple pie with much red cream",)),
        Pair("z", ("one apple",), ("its own",)),
    ]
    strict, metrics, _ = run(tmp_path, pairs, methods=["bm25"])
    assert "red round apple" not in strict[0]["negatives"] and "one apple" in strict[0]["negatives"]
    assert 0 < metrics["dropped_suspects_share"] < 1
    share = strict[0]["scores"][0] / strict[0]["positive_score"]  # of the positive's score, by the hardest
    assert 0 < share < 1
    for margin, kept in ((1 - share - 0.01, strict[0]["negatives"]), (1 - share + 0.01, [])):
        rows, _, _ = run(tmp_path, pairs, methods=["bm25"], margin=margin)
        assert rows[0]["negatives"][:1] == kept[:1]


def test_answers_of_the_same_query_are_no_negatives(tmp_path: Path) -> None:
    """Not the pair's own, not another record's, not a copy with other white space; nor does a mined one repeat."""
    pairs = [
        Pair("wait for it", ("wait for it here please now",)),
        Pair("wait  for it", ("for it",)),  # a worse answer: below the first one's score
        Pair("other", ("wait   for it here please\nnow", "it is something else")),
        Pair("more", ("for one",), ("it stands for nothing", "for  it")),
    ]
    rows, _, _ = run(tmp_path, pairs, k=9, methods=["bm25"])
    assert set(rows[0]["negatives"]) == {"it is something else", "for one", "it stands for nothing"}
    assert rows[3]["negatives"][:2] == ["it stands for nothing", "for it"], "the data's own come first"
    assert len(rows[3]["negatives"]) == len(set(rows[3]["negatives"]))


def test_a_piece_of_an_answer_is_no_negative(tmp_path: Path) -> None:
    """Two sources may cut the same document in other ways: nor is what holds the answer."""
    pairs = [
        Pair("open file", ("Open a file. It must  exist.",)),
        Pair("exist", ("It must exist.",)),
        Pair("all", ("Before. Open a file.\nIt must exist. After.",)),
        Pair("else", ("Open another file if one exists here today.",)),
    ]
    rows, _, _ = run(tmp_path, pairs, k=9, methods=["bm25"])
    assert rows[0]["negatives"] == ["Open another file if one exists here today."]


def test_a_query_gets_k_its_own_first(tmp_path: Path, embedder: Path) -> None:
    own = ("own negative", "another one")
    pairs = [Pair(SOME[0].query, SOME[0].positives, own), *SOME[1:]]
    rows, metrics, _ = run(tmp_path, pairs, embedder, margin=0.0)
    assert rows[0]["negatives"][:2] == list(own)
    assert all(len(row["negatives"]) <= 3 for row in rows) and metrics["mean_negatives"] > 0
    short, _, _ = run(tmp_path, pairs, embedder, k=1)
    assert short[0]["negatives"] == [own[0]]


def test_the_embedder_ranks_with_its_prompts(tmp_path: Path, embedder: Path) -> None:
    """Scores are cosines of what sentence-transformers gives, with the folder's prompt before queries."""
    rows, metrics, _ = run(tmp_path, SOME, embedder, methods=["embedder"], depth=30)
    model = SentenceTransformer(str(embedder), local_files_only=True, device="cpu")
    queries = model.encode([f"alpha beta {p.query}" for p in SOME], normalize_embeddings=True)
    passages = model.encode([p.positives[0] for p in SOME], normalize_embeddings=True)
    cosines = queries @ passages.T
    found = 0
    for index, row in enumerate(rows):
        assert row["positive_score"] == pytest.approx(cosines[index, index], abs=1e-4)
        below = np.where(cosines[index] < cosines[index, index] - 1e-5, cosines[index], -2)
        wanted = np.sort(below[below > -2])[::-1][: len(row["scores"])]
        assert (
            row["scores"] == pytest.approx(wanted, abs=1e-4) and row["scores"] == sorted(row["scores"])[::-1]
        )
        found += len(row["scores"])
    assert found == metrics["negatives"] > 30
    assert metrics["mean_positive_score"] == pytest.approx(np.diagonal(cosines).mean(), abs=1e-3)


def test_both_methods_are_joined_by_their_scores(tmp_path: Path, embedder: Path) -> None:
    both, _, _ = run(tmp_path, SOME, embedder)
    one, _, _ = run(tmp_path, SOME, embedder, methods=["embedder"])
    lexical, _, _ = run(tmp_path, SOME)
    assert [r["positive_score"] for r in both] == [r["positive_score"] for r in one], (
        "cosines where there are"
    )
    assert [r["negatives"] for r in both] != [r["negatives"] for r in one]
    assert [r["negatives"] for r in both] != [r["negatives"] for r in lexical]


def test_a_margin_leaves_out_what_is_too_near(tmp_path: Path, embedder: Path) -> None:
    none, loose, _ = run(tmp_path, SOME, embedder, depth=30)
    some, strict, _ = run(tmp_path, SOME, embedder, depth=30, margin=0.05)
    assert strict["dropped_suspects_share"] > loose["dropped_suspects_share"]
    for row, margin in [*((r, 0.0) for r in none), *((r, 0.05) for r in some)]:
        assert all(score < row["positive_score"] - margin + 2e-6 for score in row["scores"])


def test_the_bytes_repeat_and_do_not_depend_on_blocks(
    tmp_path: Path, embedder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a mix repeats its examples."""
    pairs = [*SOME, *SOME[:7]]
    rows, _, first = run(tmp_path, pairs, embedder)
    assert [row["negatives"] for row in rows[-7:]] == [row["negatives"] for row in rows[:7]]
    _, _, second = run(tmp_path, pairs, embedder)
    for name in ("negatives.parquet", "stats.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    monkeypatch.setattr(mine, "_MOST_ROWS", 5)
    blocks, _, _ = run(tmp_path, pairs, embedder)
    assert [row["negatives"] for row in blocks] == [row["negatives"] for row in rows]


def test_files_progress_and_stats(tmp_path: Path, embedder: Path) -> None:
    _, metrics, out = run(tmp_path, SOME, embedder)
    schema = pq.read_schema(out / "negatives.parquet")
    assert {f.name: str(f.type) for f in schema} == {
        "id": "string", "negatives": "string", "scores": "string", "positive_score": "double",
    }  # fmt: skip
    stats = json.loads((out / "stats.json").read_text())
    assert {key: stats[key] for key in metrics} == metrics and len(stats["examples"]) == 5
    assert set(stats["examples"][0]) == {"query", "positive", "negative"}
    lines = [json.loads(line) for line in Path(f"{out}.jsonl").read_text().splitlines()]
    texts = {p.query for p in SOME} | {p.positives[0] for p in SOME}
    assert lines[-1]["done"] == lines[-1]["total"] == len(texts) + len(SOME)
    assert [line["done"] for line in lines] == sorted(line["done"] for line in lines)


def test_what_cannot_be_mined_is_said(tmp_path: Path, embedder: Path) -> None:
    with pytest.raises(StepFailed, match="need one"):
        run(tmp_path, SOME, methods=["embedder"])
    with pytest.raises(StepFailed, match="no embedder's folder"):
        run(tmp_path, SOME, tmp_path)
    with pytest.raises(StepFailed, match="no negative is left for any of 1 queries among 1 passages"):
        run(tmp_path, SOME[:1])
    with pytest.raises(StepFailed, match="no negative is left") as error:
        run(tmp_path, SOME, embedder, margin=2.0)
    assert "a smaller margin (it is 2)" in error.value.hint


# --- the light side -----------------------------------------------------------------------------------------


def test_parameters_and_work() -> None:
    assert mine_params({"k": 7, "margin": 0.05}, True) == {
        "k": 7, "margin": 0.05, "methods": ["embedder", "bm25"], "depth": 100,
    }  # fmt: skip
    assert mine_params({"k": 50, "margin": 0}, False)["methods"] == ["bm25"]
    assert mine_params({"k": 50, "margin": 0}, False)["depth"] == 200
    given = {"k": 2, "margin": 0, "methods": ("bm25",), "depth": 9}
    assert (mine_params(given, True)["methods"], mine_params(given, True)["depth"]) == (["bm25"], 9)
    pairs = Amount(1e6, 4000.0, "measured")
    alone = mine_work(None, pairs)
    assert alone.mode == "cpu" and alone.basis == "measured" and 1 < alone.cpu_seconds < 5
    shape = Shape("qwen3", 4096, 4, 128, 256, 4, 2, 32, True, 2048, 10_000.0)
    work = mine_work(shape, pairs)
    assert (work.mode, work.tokens, work.context) == ("infer", 1e6, 512)
    assert work.flops > 2e6 * 4096 * 128 and mine_work(shape, Amount(2e6, 4000.0)).flops > 1.9 * work.flops
