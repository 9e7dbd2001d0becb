"""A mix holds exactly what was asked for, in the seed's order, and nothing of the evaluations."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from famc.errors import StepFailed
from famc.job import Job
from famc.steps.others import CHATML, SPECIAL_TOKENS
from famc.work import mix
from famc.work import tokenizer as tokenizers
from famc.work.text import Writer, dumps

Rows = list[tuple[str, str, Any]]  # id, group, body
LONG = "one two three four five six seven eight nine ten"


def corpus(folder: Path, train: Rows, heldout: Rows = [], fmt: str = "text") -> Path:  # noqa: B006 - never changed
    folder.mkdir(parents=True)
    columns = {"text": ("text",), "messages": ("messages",), "preference": ("prompt", "chosen", "rejected")}[
        fmt
    ]
    for name, rows in (("train", train), ("heldout", heldout)):
        with Writer(folder / f"{name}.parquet", ("id", "group", *columns)) as writer:
            for row_id, group, body in rows:
                values = (body,) if isinstance(body, str) else tuple(map(dumps, body))
                writer.add((row_id, group, *values))
    return folder


def texts(name: str, count: int, words: int = 30) -> Rows:
    return [
        (f"{name}{i}", f"g{i}", " ".join(f"{name}{i * words + k}" for k in range(words)))
        for i in range(count)
    ]


def chats(name: str, count: int) -> Rows:
    turns = [
        [{"role": "user", "content": f"{name} {i}?"}, {"role": "assistant", "content": f"{i}!"}]
        for i in range(count)
    ]
    return [(f"{name}{i}", f"g{i}", (t,)) for i, t in enumerate(turns)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("mix")
    params = {"template": CHATML, "kind": "bbpe", "vocab": 320, "rows": 320, "bytes": 10**6,
              "weights": {"x": 1.0},
              "special_tokens": list(SPECIAL_TOKENS), "seed": 1}  # fmt: skip
    (base / "t").mkdir()
    source = corpus(base / "x", texts("a", 20) + texts("b", 20))
    tokenizers.run(Job.for_test("tokenizer", "tokenizer", params), {"source.x": source}, base / "t")
    return base / "t"


def run(
    out: Path,
    tokenizer: Path | None,
    sources: dict[str, Path],
    weights: dict[str, float] | None = None,
    **more: Any,
) -> tuple[dict[str, Any], dict[str, Any]]:
    params = {"format": "text", "weights": weights or dict.fromkeys(sources, 1.0), "tokens": None,
              "max_epochs": 4,
              "lengths": None, "decontaminate": None, "seed": 7} | more  # fmt: skip
    inputs = {f"source.{name}": path for name, path in sources.items()}
    against = params["decontaminate"]["against"] if params["decontaminate"] else []
    inputs |= {f"eval.{name}": sources[name] for name in against}
    if tokenizer:
        inputs["tokenizer"] = tokenizer
    out.mkdir(parents=True)
    metrics = mix.run(Job.for_test("mix/x", "mix", params), inputs, out)
    return metrics, json.loads((out / "stats.json").read_text())


def documents(out: Path, tokenizer: Path) -> list[str]:
    """The stream's documents as text."""
    loaded = tokenizers.load(tokenizer)
    stream = np.load(out / "tokens.npy")
    ends = np.flatnonzero(stream == loaded.convert_tokens_to_ids("<|endoftext|>"))
    assert ends[-1] == len(stream) - 1, "the stream ends with a document's end"
    return [loaded.decode(part[:-1].tolist()) for part in np.split(stream, ends + 1)[:-1]]


def test_tokens_and_shares_are_exact(tokenizer: Path, tmp_path: Path) -> None:
    sources = {"a": corpus(tmp_path / "a", texts("a", 90)), "b": corpus(tmp_path / "b", texts("b", 40))}
    metrics, _ = run(tmp_path / "m", tokenizer, sources, {"a": 2.0, "b": 1.0}, tokens=10_007)
    stream = np.load(tmp_path / "m" / "tokens.npy")
    assert stream.dtype == np.uint16 and stream.shape == (10_007,)
    assert metrics["tokens_by_source"] == {"a": 6671, "b": 3336}
    found = documents(tmp_path / "m", tokenizer)
    assert len(found) == metrics["documents"]
    spent = Counter[str]()
    for text in found:
        spent[text[0]] += len(tokenizers.load(tokenizer)(text)["input_ids"]) + 1
    assert abs(spent["a"] - 6671) <= 2 and abs(spent["b"] - 3336) <= 2, (
        "a cut document may encode a little otherwise"
    )
    half = Counter(text[0] for text in found[: len(found) // 2])
    assert 0.6 < half["a"] / sum(half.values()) < 0.73, "interleaved, not one after the other"


def test_without_tokens_every_document_is_there_once(tokenizer: Path, tmp_path: Path) -> None:
    rows = {"a": texts("a", 30), "b": texts("b", 7)}
    sources = {name: corpus(tmp_path / name, each) for name, each in rows.items()}
    metrics, _ = run(tmp_path / "m", tokenizer, sources, {"a": 1.0, "b": 50.0})
    wanted = [body for each in rows.values() for _, _, body in each]
    assert sorted(documents(tmp_path / "m", tokenizer)) == sorted(wanted)
    assert metrics["epochs"] == {"a": 1.0, "b": 1.0} and metrics["bytes"] == sum(map(len, wanted))


def test_epochs_are_whole_and_reshuffled(tokenizer: Path, tmp_path: Path) -> None:
    sources = {"a": corpus(tmp_path / "a", texts("a", 40))}
    once, _ = run(tmp_path / "once", tokenizer, sources)
    metrics, _ = run(tmp_path / "m", tokenizer, sources, tokens=3 * once["tokens"])
    found = documents(tmp_path / "m", tokenizer)
    epochs = [found[i : i + 40] for i in (0, 40, 80)]
    assert metrics["epochs"] == {"a": 3.0} and sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2]
    run(tmp_path / "other", tokenizer, sources, tokens=3 * once["tokens"], seed=8)
    assert documents(tmp_path / "other", tokenizer)[:40] != epochs[0]


@pytest.mark.parametrize("max_epochs", [2, 0.5])
def test_too_little_data_is_refused_with_a_number_that_works(
    tokenizer: Path, tmp_path: Path, max_epochs: float
) -> None:
    sources = {"a": corpus(tmp_path / "a", texts("a", 400)), "b": corpus(tmp_path / "b", texts("b", 5))}
    weights = {"a": 1.0, "b": 1.0}
    with pytest.raises(StepFailed, match=r"source 'b' has [\d,]+ tokens, 25,000 are asked for") as error:
        run(tmp_path / "m", tokenizer, sources, weights, tokens=50_000, max_epochs=max_epochs)
    works = int(error.value.hint.split()[1])
    metrics, _ = run(tmp_path / "n", tokenizer, sources, weights, tokens=works, max_epochs=max_epochs)
    assert metrics["tokens"] == works and metrics["epochs"]["b"] <= max_epochs + 0.2
    with pytest.raises(StepFailed):
        run(tmp_path / "o", tokenizer, sources, weights, tokens=works + 2, max_epochs=max_epochs)


def test_same_bytes_under_two_hash_seeds(tokenizer: Path, tmp_path: Path) -> None:
    sources = {"a": corpus(tmp_path / "a", texts("a", 30)), "b": corpus(tmp_path / "b", texts("b", 30))}
    code = (
        "import sys; from pathlib import Path; from tests.work.test_mix import run;"
        "t, a, b, out = map(Path, sys.argv[1:]);"
        "run(out, t, {'a': a, 'b': b}, tokens=5000, decontaminate={'ngram': 8, 'against': ['a', 'b']})"
    )
    for name, seed in (("m", "1"), ("n", "2")):
        env = {
            **os.environ,
            "PYTHONHASHSEED": seed,
            "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path]),
        }
        arguments = [str(p) for p in (tokenizer, sources["a"], sources["b"], tmp_path / name)]
        subprocess.run([sys.executable, "-c", code, *arguments], env=env, check=True)
    for file in ("tokens.npy", "stats.json"):
        assert (tmp_path / "m" / file).read_bytes() == (tmp_path / "n" / file).read_bytes()


def test_marks_inside_a_document_are_text(tokenizer: Path, tmp_path: Path) -> None:
    text = "a <|endoftext|> b <|im_start|> c"
    run(tmp_path / "m", tokenizer, {"a": corpus(tmp_path / "a", [("x", "g", text)])})
    assert documents(tmp_path / "m", tokenizer) == [text]


def test_planted_contamination_is_found_and_boilerplate_is_not(tokenizer: Path, tmp_path: Path) -> None:
    licence = "permission is hereby granted free of charge to any person"
    clean = [(f"c{i}", f"g{i % 5}", f"{licence} w{i} v{i} u{i}") for i in range(12)]
    rare = "this rare phrase of the exam stands in the answers alone"
    held = [("h0", "h", f"{licence} and {rare} in the end"), ("h1", "h", "Short, one!"), ("h2", "h", "…")]
    planted = [("p0", "g1", f"x y z {rare.upper()}! q"), ("p1", "g2", "short one"), ("p2", "g2", "…"),
               ("ok", "g3", "short one more"), ("ok2", "g3", rare[:30])]  # fmt: skip
    sources = {"a": corpus(tmp_path / "a", clean + planted, held)}
    rule = {"ngram": 8, "against": ["a"]}
    metrics, stats = run(tmp_path / "m", tokenizer, sources, decontaminate=rule)
    found = set(documents(tmp_path / "m", tokenizer))
    assert found == {body for _, _, body in clean} | {"short one more", rare[:30]}
    assert metrics["dropped_contaminated"] == 3
    report = stats["decontaminated"]["sources"]["a"]
    assert [e["id"] for e in report["examples"]] == ["p0", "p1", "p2"]
    assert report["examples"][0]["shared"] in rare and report["examples"][1]["shared"] == "short one"
    kept, _ = run(tmp_path / "none", tokenizer, sources)
    assert kept["documents"] == 17 and kept["dropped_contaminated"] == 0
    few = {"a": corpus(tmp_path / "few", clean[:9], held)}
    with pytest.raises(StepFailed, match="no training document left"):
        run(tmp_path / "f", tokenizer, few, decontaminate=rule)


def test_conversations_are_all_there_in_the_seeds_order(tmp_path: Path) -> None:
    rows = chats("a", 50)
    sources = {"a": corpus(tmp_path / "a", rows, [("h", "h", rows[3][2])], "messages")}
    metrics, _ = run(
        tmp_path / "m", None, sources, format="messages", decontaminate={"ngram": 13, "against": ["a"]}
    )
    made = pq.read_table(tmp_path / "m" / "examples.parquet").to_pylist()
    assert {r["id"] for r in made} == {f"a{i}" for i in range(50)} - {"a3"} and metrics["documents"] == len(
        made
    ) == 49
    assert [r["id"] for r in made] != sorted((r["id"] for r in made), key=lambda i: int(i[1:]))
    assert list(made[0]) == ["id", "group", "source", "messages"]
    assert json.loads(made[0]["messages"])[1]["role"] == "assistant"


def test_several_sources_of_examples_keep_their_proportions(tmp_path: Path) -> None:
    sources = {n: corpus(tmp_path / n, chats(n, c), fmt="messages") for n, c in (("a", 60), ("b", 10))}

    def counts(name: str, weights: dict[str, float], **more: Any) -> dict[str, int]:
        metrics, _ = run(tmp_path / name, None, sources, weights, format="messages", **more)
        return dict(metrics["documents_by_source"])

    assert counts("own", {"a": 6.0, "b": 1.0}) == {"a": 60, "b": 10}
    assert counts("two", {"a": 3.0, "b": 1.0}) == {"a": 60, "b": 20}
    assert counts("cap", {"a": 1.0, "b": 1.0}, max_epochs=2) == {"a": 20, "b": 20}


def test_a_token_budget_of_examples_is_reached_by_whole_examples(tokenizer: Path, tmp_path: Path) -> None:
    sources = {n: corpus(tmp_path / n, chats(n, 60), fmt="messages") for n in ("a", "b")}
    metrics, _ = run(tmp_path / "m", tokenizer, sources, {"a": 3.0, "b": 1.0}, format="messages", tokens=1000)
    assert 1000 <= metrics["tokens"] < 1080
    by_source = metrics["documents_by_source"]
    assert 2.5 < by_source["a"] / by_source["b"] < 3.5


def test_preferences_keep_their_three_columns(tmp_path: Path) -> None:
    def say(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    rows: Rows = [
        (f"p{i}", "g", (say("user", f"q{i}"), say("assistant", "good"), say("assistant", "bad")))
        for i in range(5)
    ]
    run(tmp_path / "m", None, {"a": corpus(tmp_path / "a", rows, fmt="preference")}, format="preference")
    made = pq.read_table(tmp_path / "m" / "examples.parquet").to_pylist()
    assert len(made) == 5 and all(json.loads(r["chosen"]) == say("assistant", "good") for r in made)


def test_what_no_worker_does_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    sources = {"a": corpus(tmp_path / "a", texts("a", 3))}
    wrong: dict[str, dict[str, Any]] = {
        "tiers": {"weights": {"a.high": 1.0}}, "image_text": {"format": "image_text"},
        "length": {"lengths": {"1k-2k": 1}},
        "not of format messages": {"format": "messages"},
    }  # fmt: skip
    for says, more in wrong.items():
        with pytest.raises(StepFailed, match=says):
            run(tmp_path / says, tokenizer, sources, **more)
