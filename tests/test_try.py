"""Which artifacts a variant needs to be tried, what is refused before anything is loaded, and how answers are shown."""

from __future__ import annotations

import io
import json
import sys

import pytest
from fake_build import toy_plan

from famc import attempt
from famc.cli import main
from famc.errors import StepFailed, UsageError
from famc.graph import Graph, Node
from famc.plan import Plan
from famc.report.attempt import answer_lines
from famc.store import Store

SHAPE = {"shape": {"arch": "bert", "hidden": 64, "context": 96}}


def search_plan(folder, *, methods=("embedder", "bm25"), miner="e/embed", evaluation=True):
    """A family with an embedder and a reranker at one size: its graph by hand, its spec the small family's."""
    plan = toy_plan(folder)
    pairs, text = {"format": "pairs"}, {"format": "text"}
    mined = {"data": "mix/pairs", **({"model": miner} if miner else {})}
    nodes = [
        Node("tokenizer", "tokenizer"),
        *(Node(f"data/{name}", "corpus", params=pairs) for name in ("names", "sentences", "asked", "other")),
        Node("data/code", "corpus", params=text),
        Node("mix/pairs", "mix", params=pairs,
             inputs={"source.names": "data/names", "source.sentences": "data/sentences", "eval.other": "data/other"}),
        Node("mix/code", "mix", params=text, inputs={"source.code": "data/code"}),
        Node("e/pretrain", "pretrain", "e", params=SHAPE, inputs={"data": "mix/code"}),
        Node("e/embed", "embed", "e", params=SHAPE, inputs={"data": "mix/pairs", "model": "e/pretrain"}),
        Node("e/mine/pairs", "mine", "e", params={"methods": list(methods)}, inputs=mined),
        Node("e/rank", "rerank", "e", params=SHAPE,
             inputs={"data": "mix/pairs", "model": "e/pretrain", "negatives": "e/mine/pairs"}),
        Node("e/embedding/export.onnx-int8", "export", "e", "embedding",
             {"format": "onnx", "quant": "int8"}, inputs={"model": "e/embed"}),
        Node("e/filling/release", "release", "e", "filling", inputs={"model": "e/pretrain"}),
        Node("e/embedding/release", "release", "e", "embedding", inputs={"model": "e/embed"}),
        Node("e/reranker/release", "release", "e", "reranker", inputs={"model": "e/rank"}),
    ]  # fmt: skip
    if evaluation:
        nodes.append(
            Node("e/embedding/eval.search", "eval", "e", "embedding", inputs={"data.asked": "data/asked"})
        )
    keys = {node.name: f"{number:064x}" for number, node in enumerate(nodes, 1)}
    return Plan(Graph({n.name: n for n in nodes}, plan.graph.spec), {}, folder / "out", keys)


def put(plan, *names):
    """Artifacts of nothing."""
    store = Store(plan.out / "store")
    for name in names:
        store.partial(name, plan.keys[name]).mkdir(parents=True)
        store.commit(name, plan.keys[name], {"name": name})


DATA = ("data/names", "data/sentences", "data/asked")


# --- what is needed ---------------------------------------------------------------------------------------


def test_an_embedder_searches_what_it_learnt_from_and_what_its_evaluation_reads(tmp_path):
    plan = search_plan(tmp_path)
    put(plan, "e/embed", *DATA)
    made = attempt.request(plan, "embedding", threads=2)
    assert (made.variant, made.task, made.by, made.k, made.threads) == (
        "e/embedding", "feature-extraction", "fused", 5, 2,
    )  # fmt: skip
    assert list(made.corpora) == ["names", "sentences", "asked"], "not what its mix is kept apart from"
    assert made.model == made.retriever == Store(plan.out / "store").path("e/embed", plan.keys["e/embed"])
    assert made.graph is None
    assert json.loads(json.dumps(made.to_dict()))["corpora"]["names"] == str(made.corpora["names"])
    alone = search_plan(tmp_path / "alone", evaluation=False)
    put(alone, "e/embed", *DATA)
    assert list(attempt.request(alone, "embedding").corpora) == ["names", "sentences"]


def test_vectors_are_kept_by_embedder_export_and_corpora(tmp_path):
    plan = search_plan(tmp_path)
    put(plan, "e/embed", "e/embedding/export.onnx-int8", *DATA)
    made = attempt.request(plan, "e/embedding")
    assert made.cache.parent == plan.out / "cache" / "vectors"
    assert made.cache.name.startswith("e.embed-")
    assert made.cache == attempt.request(plan, "e/embedding", dims=8, k=3, by="embedder").cache
    others = [attempt.request(plan, "e/embedding", export="onnx-int8").cache]
    for name in ("e/embed", "data/asked"):
        plan.keys[name] = "f" * 64
        put(plan, name)
        others.append(attempt.request(plan, "e/embedding").cache)
    assert len({made.cache, *others}) == 4
    assert attempt.request(plan, "e/embedding", by="bm25").cache is None


def test_an_export_runs_in_place_of_the_weights(tmp_path):
    plan = search_plan(tmp_path)
    put(plan, "e/embed", *DATA)
    with pytest.raises(UsageError, match=r"e/embedding/export.onnx-int8 is not built"):
        attempt.request(plan, "embedding", export="onnx-int8")
    put(plan, "e/embedding/export.onnx-int8")
    made = attempt.request(plan, "embedding", export="onnx-int8")
    assert made.graph.parts[-2:] == ("onnx", "model_int8.onnx")
    with pytest.raises(UsageError, match="no ONNX export 'onnx-int4'") as told:
        attempt.request(plan, "embedding", export="onnx-int4")
    assert told.value.hint == "did you mean 'onnx-int8'?"


@pytest.mark.parametrize(
    ("more", "retriever", "by"),
    [
        ({}, "e/embed", "fused"),
        ({"methods": ["embedder"]}, "e/embed", "embedder"),
        ({"miner": None, "methods": ["bm25"]}, None, "bm25"),
    ],
)
def test_a_reranker_stands_behind_the_retriever_that_mined_for_it(tmp_path, more, retriever, by):
    plan = search_plan(tmp_path, **more)
    put(plan, "e/rank", "e/embed", *DATA)
    made = attempt.request(plan, "reranker")
    assert (made.task, made.by, made.depth) == ("text-ranking", by, 50)
    assert list(made.corpora) == ["names", "sentences"]
    if retriever is None:
        assert made.retriever is None and made.cache is None
    else:
        assert made.retriever == Store(plan.out / "store").path(retriever, plan.keys[retriever])
        assert made.cache.name.startswith("e.embed-")


def test_a_reranker_without_its_embedder_can_be_tried_with_bm25(tmp_path):
    plan = search_plan(tmp_path)
    put(plan, "e/rank", *DATA)
    with pytest.raises(UsageError, match="e/embed is not built") as told:
        attempt.request(plan, "reranker", spec="docs.yaml")
    hint = "make it first: famc build docs.yaml --select +e/embed; or try it with --by bm25"
    assert (told.value.exit_code, told.value.hint) == (2, hint)
    assert attempt.request(plan, "reranker", by="bm25").retriever is None
    bare = search_plan(tmp_path / "bare", miner=None, methods=["bm25"])
    put(bare, "e/rank", *DATA)
    with pytest.raises(UsageError, match="no embedder in front of it"):
        attempt.request(bare, "reranker", by="embedder")


def test_what_is_not_built_is_told_with_the_command_that_makes_it(tmp_path):
    plan = search_plan(tmp_path)
    with pytest.raises(UsageError) as told:
        attempt.request(plan, "embedding", spec="docs.yaml")
    assert told.value.exit_code == 2
    assert "e/embed, data/names, data/sentences, data/asked are not built" in told.value.message
    # what comes with a step is not named again
    assert told.value.hint == "make it first: famc build docs.yaml --select +e/embed --select +data/asked"


def test_a_masked_model_needs_no_corpora(tmp_path):
    plan = search_plan(tmp_path)
    put(plan, "e/pretrain")
    made = attempt.request(plan, "filling", k=3)
    assert (made.task, made.k, made.corpora, made.context) == ("fill-mask", 3, {}, 96)


def test_a_base_goes_on_and_what_learnt_conversations_answers(tmp_path):
    plan = toy_plan(tmp_path)
    put(plan, "s/pretrain", "s/sft")
    base, chat = (attempt.request(plan, name) for name in ("s/base", "s/instruct"))
    assert (base.task, base.chat, base.max_new_tokens) == ("text-generation", False, 128)
    assert (chat.task, chat.chat) == ("text-generation", True)
    assert attempt.request(plan, "s/base", max_new_tokens=7).max_new_tokens == 7


def test_a_name_of_several_sizes_needs_one(tmp_path):
    with pytest.raises(UsageError, match="instruct is made at several sizes") as told:
        attempt.request(toy_plan(tmp_path), "instruct")
    assert told.value.hint == "name one of them: m/instruct, s/instruct"
    with pytest.raises(UsageError) as told:
        attempt.request(toy_plan(tmp_path), "s/instuct")
    assert "s/instruct" in told.value.hint


@pytest.mark.parametrize(
    ("variant", "options", "message"),
    [
        (
            "filling",
            {"by": "bm25"},
            "--by is for embedders and rerankers; e/filling is a masked language model",
        ),
        ("reranker", {"dims": 8}, "--dims is for embedders; e/reranker is a reranker"),
        (
            "embedding",
            {"max_new_tokens": 8},
            "--max-new-tokens is for language models and encoder and decoders",
        ),
        ("filling", {"export": "onnx-int8"}, "--export is for embedders and rerankers"),
        ("embedding", {"k": 0}, "-k must be at least 1"),
        ("embedding", {"dims": -1}, "--dims must be at least 1"),
        ("embedding", {"threads": -1}, "--threads must be at least 1"),
        ("embedding", {"dims": 65}, "--dims 65: vectors of e/embedding have 64"),
        ("embedding", {"dims": 8, "by": "bm25"}, "says nothing to --by bm25"),
        ("embedding", {"by": "fusd"}, "--by fusd: no such way to search"),
    ],
)
def test_options_that_say_nothing(tmp_path, variant, options, message):
    plan = search_plan(tmp_path)
    put(plan, "e/embed", "e/rank", "e/pretrain", *DATA)
    with pytest.raises(UsageError) as told:
        attempt.request(plan, f"e/{variant}", **options)
    assert message in told.value.message
    assert told.value.exit_code == 2


# --- asking -----------------------------------------------------------------------------------------------

WORKER = """
import json, sys, time
print("noise on the way", file=sys.stderr)
def say(value): print(json.dumps(value), flush=True)
say({"doing": "loading"})
say({"ready": True})
for line in sys.stdin:
    text = json.loads(line)["text"]
    if text == "die":
        raise SystemExit("no memory is left")
    if text == "kill":
        import os; os.kill(os.getpid(), 11)
    if text == "bad":
        say({"refused": "bad text", "hint": "write another"})
    elif text == "break":
        say({"failed": "it broke", "hint": ""})
    elif text == "wait":
        time.sleep(60)
    else:
        say({"answer": text.upper(), "tokens": 1, "ended": True})
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A worker that knows capitals, and s/instruct built."""
    worker = tmp_path / "python"
    worker.write_text(f"#!{sys.executable}\n{WORKER}")
    worker.chmod(0o755)
    monkeypatch.setattr(attempt.sys, "executable", str(worker))
    monkeypatch.chdir(tmp_path)
    plan = toy_plan(tmp_path)
    put(plan, "s/pretrain", "s/sft")
    return plan


def call(capsys, *arguments):
    code = main(["try", "toy.yaml", "s/instruct", *arguments, "--out", "out"])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_session_answers_and_ends(fake):
    told = []
    with attempt.Session(attempt.request(fake, "s/instruct"), told.append) as session:
        answer = session.ask("hello")
        assert (answer["variant"], answer["query"], answer["answer"]) == ("s/instruct", "hello", "HELLO")
        assert session.ask("bytes \udcff")["query"] == "bytes ?"
        with pytest.raises(UsageError, match="bad text"):
            session.ask("bad")
        with pytest.raises(StepFailed, match="it broke"):
            session.ask("break")
        assert session.ask("again")["answer"] == "AGAIN"
    assert told == ["loading"]
    assert session._process.returncode is not None


@pytest.mark.parametrize(
    ("text", "says"), [("die", "no memory is left"), ("kill", "its process was killed by SIGSEGV")]
)
def test_a_worker_that_ends_is_told(fake, text, says):
    with attempt.Session(attempt.request(fake, "s/instruct")) as session:
        for _ in range(2):
            with pytest.raises(StepFailed, match=f"s/instruct gave no answer: {says}"):
                session.ask(text)


def test_a_text_is_answered(fake, capsys):
    assert call(capsys, "hello") == (0, "HELLO\n", "")
    assert call(capsys, "hello", "-q") == (0, "", "")
    code, out, err = call(capsys, "hello", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == {
        "variant": "s/instruct", "query": "hello", "answer": "HELLO", "tokens": 1, "ended": True,
    }  # fmt: skip


def test_a_text_that_can_not_be_asked_ends_with_two_and_a_failure_with_one(fake, capsys):
    assert call(capsys, "bad") == (2, "", "error: bad text\nhint: write another\n")
    assert json.loads(call(capsys, "bad", "--json")[1])["exit_code"] == 2
    code, out, err = call(capsys, "die")
    assert (code, out) == (1, "")
    assert err == "error: s/instruct gave no answer: no memory is left\n"


def test_lines_of_stdin_are_answered_one_by_one(fake, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\nbad\ntwo"))
    assert call(capsys) == (2, "ONE\nTWO\n", "error: bad text\nhint: write another\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\nbad\n"))
    code, out, err = call(capsys, "--json")
    assert (code, err) == (2, "")
    assert [a.get("answer") for a in json.loads(out)] == ["ONE", None]
    assert json.loads(out)[1]["error"] == "bad text\nhint: write another"
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert call(capsys, "--json") == (0, "[]\n", "")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_prompt_goes_on_until_it_is_ended(fake, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Terminal("one\nbad\n :q\ntwo\n"))
    assert call(capsys) == (0, "> ONE\n> > ", "error: bad text\nhint: write another\n")
    monkeypatch.setattr(sys, "stdin", Terminal("one\n"))
    assert call(capsys) == (0, "> ONE\n> \n", "")


def test_ctrl_c_ends_with_130(fake, capsys, monkeypatch):
    def interrupt(prompt):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupt)
    monkeypatch.setattr(sys, "stdin", Terminal(""))
    assert call(capsys) == (130, "", "\n")


def test_a_family_that_is_not_built_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    toy_plan(tmp_path)
    code, out, err = call(capsys, "hello")
    assert (code, out) == (2, "")
    assert err.endswith("s/sft is not built\nhint: make it first: famc build toy.yaml --select +s/sft\n")


# --- how it is shown --------------------------------------------------------------------------------------


def result(rank, text, **more):
    return {"rank": rank, "score": 1.0 / rank, "id": f"p{rank}", "source": "names", "text": text, **more}


def test_results_are_shown_with_their_first_lines():
    found = {
        "passages": 9,
        "results": [result(1, "Join paths.\n\n    one\n    two\nthree"), result(2, "x" * 99)],
    }
    assert answer_lines(found, 40) == [
        "1  1.0000  names  p1", "   Join paths.", "       one", "       two",
        "2  0.5000  names  p2", "   " + "x" * 36 + "…",
    ]  # fmt: skip
    reranked = {"passages": 9, "results": [result(1, "a", before=12), result(2, "b", before=1)]}
    assert answer_lines(reranked)[::2] == ["12 -> 1  1.0000  names  p1", " 1 -> 2  0.5000  names  p2"]
    assert answer_lines({"passages": 1200, "results": []}) == [
        "nothing found in 1,200 passages: none shares a word with it"
    ]


def test_answers_and_gaps_are_shown():
    assert answer_lines({"answer": "a\nb", "ended": True, "tokens": 3}) == ["a", "b"]
    assert answer_lines({"answer": "", "ended": True, "tokens": 1}) == ["(nothing)"]
    assert answer_lines({"answer": "a", "ended": False, "tokens": 8})[1].startswith("… cut after 8 tokens")
    gaps = [{"gap": 1, "rank": 1, "score": 0.5, "text": " held"}]
    assert answer_lines({"results": gaps}) == ["1  0.5000  ' held'"]
    gaps.append({"gap": 2, "rank": 1, "score": 0.25, "text": "a"})
    assert answer_lines({"results": gaps})[1] == "gap 2  1  0.2500  'a'"


def test_a_terminal_obeys_no_data():
    assert answer_lines({"answer": "red \x1b[31m\rgone", "ended": True, "tokens": 1}) == [
        "red \ufffd[31m\ufffdgone"
    ]
