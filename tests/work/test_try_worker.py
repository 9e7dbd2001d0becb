"""The process behind `famc try` on tiny models: what it finds, says and fills in, and what becomes of its cache."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
from tiny_artifacts import make_model, make_tokenizer
from tiny_encoder import DOCUMENTS, QUERIES, make_tiny_encoder
from tiny_model import make_tiny_model
from tiny_seq2seq import SHAPES, marked_tokenizer

from famc.attempt import Request, Session
from famc.errors import StepFailed, UsageError
from famc.work import attempt
from famc.work.arch import auto_class, new_config
from famc.work.likelihood import load_tokenizer
from famc.work.marks import save_marked
from famc.work.onnx_encoder import build_encoder
from famc.work.search import Reranker
from famc.work.text import Writer, dumps

PAIRS = [
    ("a1", "how to join paths", ["Join paths with os.path.join."], ["Open a file."]),
    ("a2", "sum of prices", ["Sum prices with a tax.", "sum prices  with a TAX."], []),
    ("a3", "bread", ["Bread needs flour, water, salt and time."], ["Rivers carry the mountains to the sea."]),
]


def corpus(folder, rows, held=()):
    """A corpus as the `corpus` worker leaves it."""
    folder.mkdir(parents=True)
    for side, part in (("train", rows), ("heldout", held)):
        with Writer(folder / f"{side}.parquet", ("id", "group", "query", "positives", "negatives")) as writer:
            for key, query, positives, negatives in part:
                writer.add((key, key, query, dumps(positives), dumps(negatives)))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An embedder and a reranker with graphs, and two corpora."""
    root = tmp_path_factory.mktemp("try")
    for name, labels, task in (("embedder", 0, "feature-extraction"), ("reranker", 1, "text-ranking")):
        make_tiny_encoder(root / name, "bert", labels=labels, steps=20 if labels else 0)
        build_encoder(root / name, root / f"{name}-graph", "int8", task=task)
        build_encoder(root / name, root / f"{name}-graph", "fp32", task=task)
    corpus(root / "pairs", PAIRS[:2], PAIRS[2:])
    more = [(f"d{i}", QUERIES[i % 5], [text], []) for i, text in enumerate(DOCUMENTS)]
    corpus(root / "more", more)
    return root


def wanted(folders, task, **more):
    name = {"feature-extraction": "embedder", "text-ranking": "reranker"}[task]
    base = {
        "corpora": {"pairs": folders / "pairs", "more": folders / "more"}, "retriever": folders / "embedder", "k": 3,
    }  # fmt: skip
    return Request(f"e/{name}", task, folders / name, 96, **base | more)


def load(request, tell=lambda text: None):
    return attempt.SUBJECTS[request.task](request.to_dict(), tell)


# --- passages ---------------------------------------------------------------------------------------------


def test_passages_of_both_sides_once_each_under_the_pair_that_they_answer(folders, tmp_path):
    corpora = {"pairs": str(folders / "pairs")}
    found = attempt.passages_of(corpora)
    assert [(p.id, p.source) for p in found] == [(key, "pairs") for key in ("a1", "a2", "a3", "a1", "a3")]
    assert found[1].text == "Sum prices with a tax.", "as it stands first"
    assert found[3].text == "Open a file."
    answers = corpus(tmp_path / "late", [("b1", "q", ["Open a file."], [])])
    assert [p.id for p in attempt.passages_of(corpora | {"late": str(answers)})] == [
        "a1",
        "a2",
        "a3",
        "b1",
        "a3",
    ]
    empty = corpus(tmp_path / "empty", [])
    with pytest.raises(StepFailed, match="empty: no passage to search"):
        attempt.passages_of({"empty": str(empty)})


# --- the cache of vectors ---------------------------------------------------------------------------------


def unit(rows, width, seed=0):
    made = np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def test_vectors_are_kept_and_found_again(tmp_path):
    path, told = tmp_path / "cache" / "v.npy", []
    first = attempt.kept(path, (7, 16), lambda: unit(7, 16), told.append)
    again = attempt.kept(path, (7, 16), pytest.fail, told.append)
    assert first.dtype == again.dtype == np.float16
    assert np.array_equal(first, again)
    assert [p.name for p in path.parent.iterdir()] == ["v.npy"]
    assert told == []


def damages():
    yield "nothing in it", lambda path: path.write_bytes(b"")
    yield "cut", lambda path: path.write_bytes(path.read_bytes()[:-5])
    yield "text", lambda path: path.write_text("no array at all")
    yield "a zip", lambda path: path.write_bytes(b"PK\x03\x04" + bytes(60))
    yield "fewer rows", lambda path: np.save(path, unit(6, 16).astype(np.float16))
    yield "another type", lambda path: np.save(path, unit(7, 16))
    yield "not of length 1", lambda path: np.save(path, 3 * unit(7, 16).astype(np.float16))
    yield "not finite", lambda path: np.save(path, np.full((7, 16), np.nan, np.float16))
    yield "pickled", lambda path: np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    yield "gone", lambda path: path.unlink()


@pytest.mark.parametrize("damage", [pytest.param(work, id=name) for name, work in damages()])
def test_a_damaged_cache_is_made_again(tmp_path, damage):
    path = tmp_path / "v.npy"
    first = attempt.kept(path, (7, 16), lambda: unit(7, 16), pytest.fail)
    damage(path)
    assert np.array_equal(attempt.kept(path, (7, 16), lambda: unit(7, 16), pytest.fail), first)
    assert np.array_equal(attempt.kept(path, (7, 16), pytest.fail, pytest.fail), first)


def test_a_cache_that_can_not_be_written_is_told(tmp_path):
    (tmp_path / "cache").write_text("a file is in the way")
    told = []
    made = attempt.kept(tmp_path / "cache" / "v.npy", (7, 16), lambda: unit(7, 16), told.append)
    assert made.shape == (7, 16)
    assert len(told) == 1 and "vectors are not kept" in told[0]


# --- search -----------------------------------------------------------------------------------------------


def test_a_passage_finds_itself(folders, tmp_path):
    """by cosine with the vectors of sentence-transformers, whether they are made or found."""
    request = wanted(folders, "feature-extraction", by="embedder", cache=tmp_path / "v.npy")
    told = []
    first = load(request, told.append)
    text = "Bread needs flour, water, salt and time."
    answer = first(text)
    assert [r["rank"] for r in answer["results"]] == [1, 2, 3]
    best = answer["results"][0]
    assert (best["id"], best["source"], best["text"]) == ("a3", "pairs", text)
    assert best["score"] == pytest.approx(1.0, abs=1e-3)
    assert any("encoding" in text for text in told)
    told.clear()
    assert load(request, told.append)(text) == answer
    assert not any("encoding" in text for text in told)


def test_dims_cut_the_vectors(folders, tmp_path):
    request = wanted(folders, "feature-extraction", by="embedder", cache=tmp_path / "v.npy", dims=4)
    subject = load(request)
    assert subject.find.vectors.shape[1] == 4
    assert np.allclose(np.linalg.norm(subject.find.vectors, axis=1), 1, atol=1e-5)
    assert np.load(tmp_path / "v.npy").shape[1] == 64, "kept whole"
    query = "sum of prices"
    assert subject(query) != load(wanted(folders, "feature-extraction", by="embedder"))(query)


def test_bm25_finds_words_and_needs_no_embedder(folders):
    subject = load(wanted(folders, "feature-extraction", by="bm25", retriever=None))
    found = subject("os.path.join")["results"]
    assert found[0]["id"] == "a1" and found[0]["score"] > 0
    assert subject("zzz") == {"results": [], "passages": subject("zzz")["passages"]}


def test_fused_adds_standardised_scores(folders):
    query = "join paths"
    expected: dict[str, float] = {}
    for by in ("embedder", "bm25"):
        rows = load(wanted(folders, "feature-extraction", by=by, k=50))(query)["results"]
        scores = np.array([row["score"] for row in rows])
        standard = (scores - scores.mean()) / (scores.std() or 1.0)
        held = {row["text"]: float(z) for row, z in zip(rows, standard, strict=True)}
        for text in {**expected, **held}:
            expected.setdefault(text, 0.0)
            expected[text] += held.get(text, float(standard.min()))
    rows = load(wanted(folders, "feature-extraction", k=50))(query)["results"]
    assert {r["text"]: r["score"] for r in rows} == pytest.approx(expected, abs=1e-4)
    assert [r["score"] for r in rows] == sorted((r["score"] for r in rows), reverse=True)


def test_a_reranker_reads_what_was_found(folders):
    """ranks before and after, and scores that are its own of query and passage."""
    request = wanted(folders, "text-ranking", by="embedder", k=4, depth=6)
    query = QUERIES[0]
    found = load(request)(query)["results"]
    before = load(wanted(folders, "feature-extraction", by="embedder", k=6))(query)["results"]
    assert {r["before"] for r in found} <= set(range(1, 7)), "of the depth alone"
    assert all(before[r["before"] - 1]["text"] == r["text"] for r in found)
    assert [r["rank"] for r in found] == [1, 2, 3, 4]
    scores = Reranker(folders / "reranker", 1).scores(query, [r["text"] for r in before])
    assert [r["score"] for r in found] == pytest.approx(
        sorted(map(float, scores), reverse=True)[:4], abs=1e-4
    )


@pytest.mark.parametrize(("file", "near"), [("model.onnx", 1e-3), ("model_int8.onnx", 0.2)])
@pytest.mark.parametrize("task", ["feature-extraction", "text-ranking"])
def test_an_export_gives_what_its_model_gives(folders, task, file, near):
    more = {"by": "embedder", "k": 50}
    graph = folders / ("embedder-graph" if task == "feature-extraction" else "reranker-graph") / "onnx" / file
    query = QUERIES[1]
    ours = {r["text"]: r["score"] for r in load(wanted(folders, task, **more))(query)["results"]}
    made = {r["text"]: r["score"] for r in load(wanted(folders, task, graph=graph, **more))(query)["results"]}
    assert made == pytest.approx(ours, abs=near)
    assert file == "model.onnx" or made != ours


# --- text -------------------------------------------------------------------------------------------------


def test_a_chat_answers_and_a_base_goes_on(tmp_path):
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    folder = make_model(tmp_path / "model", tokenizer, steps=120)
    chat = load(Request("s/instruct", "text-generation", folder, 256, chat=True, max_new_tokens=40))
    answer = chat("What does bread need?")
    assert (answer["answer"], answer["ended"]) == ("Flour and salt.", True)
    assert 1 < answer["tokens"] <= 40 and "continues" not in answer
    base = load(Request("s/base", "text-generation", folder, 256, max_new_tokens=60))
    found = base("Rivers carry the mountains")
    assert found["answer"] == " to the sea, one grain after another, and never hurry at all."
    assert found["continues"] and found["ended"]


def test_a_limit_and_the_context_end_an_answer(tmp_path):
    folder = make_tiny_model(tmp_path)
    short = load(Request("s/base", "text-generation", folder, 256, max_new_tokens=3))("The lighthouse")
    assert short["tokens"] == 3 and not short["ended"]
    tight = load(Request("s/base", "text-generation", folder, 8, max_new_tokens=99))
    assert tight("The sea")["tokens"] <= 6
    with pytest.raises(UsageError, match=r"the text has .* tokens; the model reads 8 and says at least 1"):
        tight("The lighthouse keeper counted seven ships before the fog came in")


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    return marked_tokenizer(tmp_path_factory.mktemp("marked"))


def encoder(tokenizer_folder, out, arch):
    """A random model with its marks, as training saves it."""
    tokenizer = load_tokenizer(tokenizer_folder)
    model = auto_class(arch).from_config(new_config(asdict(SHAPES[arch]), tokenizer))
    model.save_pretrained(out)
    save_marked(tokenizer, arch, out)
    return out


@pytest.mark.parametrize("arch", ["bert", "modernbert"])
def test_gaps_are_filled(tokenizer_folder, tmp_path, arch):
    subject = load(Request("e/base", "fill-mask", encoder(tokenizer_folder, tmp_path, arch), 64, k=4))
    found = subject("Mars is <|mask|>")["results"]
    assert [(r["gap"], r["rank"]) for r in found] == [(1, 1), (1, 2), (1, 3), (1, 4)]
    scores = [r["score"] for r in found]
    assert scores == sorted(scores, reverse=True) and 0 < sum(scores) <= 1
    both = subject("<|mask|> is <|mask|>")["results"]
    assert [r["gap"] for r in both] == [1] * 4 + [2] * 4
    with pytest.raises(UsageError, match=r"no gap to fill: write <\|mask\|> where a word is missing"):
        subject("Mars is hot")
    with pytest.raises(UsageError, match="the model reads 64"):
        subject("Mars is <|mask|> " * 60)


def test_t5_says_one_text_for_another(tokenizer_folder, tmp_path):
    folder = encoder(tokenizer_folder, tmp_path, "t5")
    subject = load(Request("t/base", "text2text-generation", folder, 64, max_new_tokens=5))
    found = subject("Mars is hot")
    assert isinstance(found["answer"], str) and 0 < found["tokens"] <= 5
    assert subject("Mars is hot") == found
    with pytest.raises(UsageError, match="the model reads 64"):
        subject("Mars is hot " * 60)


# --- the process ------------------------------------------------------------------------------------------


def test_the_process_answers_line_by_line(folders, tmp_path):
    told = []
    request = wanted(folders, "feature-extraction", cache=tmp_path / "v.npy")
    with Session(request, told.append) as session:
        first = session.ask("how to join paths")
        assert first["results"][0]["id"]
        assert set(first["results"][0]) == {"rank", "score", "id", "source", "text"}
        with pytest.raises(UsageError, match="the text is empty"):
            session.ask("  ")
        assert session.ask("how to join paths") == first
    json.dumps(first)
    assert told[0].startswith("indexing")


def test_what_can_not_be_loaded_is_told(folders, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    wrong = [
        (
            wanted(folders, "feature-extraction", retriever=folders / "reranker"),
            "has no vectors to search by",
        ),
        (wanted(folders, "feature-extraction", corpora={"gone": tmp_path}), "FileNotFoundError"),
    ]
    for request, message in wrong:
        with pytest.raises(StepFailed, match=message), Session(request):
            pass
