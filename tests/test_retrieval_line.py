"""Embedders, rerankers and the negatives mined for them: who mines, what is shared, what is stale, what is compared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from fake_build import machine

from famc.errors import SpecError
from famc.graph import Graph, Node, resolve
from famc.graph.published import ENCODER_LIMITS
from famc.plan import Plan, keys, plan
from famc.spec.load import drafts
from famc.steps import STAGES

SPEC = """\
famc: 1
family: {name: finder, seed: 7}
arch: {type: qwen3, head_dim: 32, vocab_pad: 2048, context: 128}
sizes:
  e: {arch: bert, layers: 2, hidden: 64, ffn: 128, heads: 2}
  q: {layers: 2, hidden: 64, ffn: 128, heads: 2, tie: true}
  t: {arch: t5, layers: 2, hidden: 64, ffn: 128, heads: 2}
tokenizer: {vocab: 2000, train_on: {mix: code, bytes: 1MB}}
data:
  sources:
    code:  {pystdlib: source}
    pairs: {pystdlib: sentences}
    names: {pystdlib: names}
    asked: {pystdlib: summaries}
stages:
  pretrain: {kind: pretrain, data: code, batch_tokens: 1024}
  weak: {kind: embed, data: names, text: words, lexical: {epochs: 3, batch: 64}, mrl: [16, 32], prompts: {query: "find: "}, merge: {last: 2}}
  emb:  {kind: embed, from: weak, data: pairs, text: words, pooling: cls, mrl: [16, 32], prompts: {query: "find: "}, hard_negatives: {k: 3}}
  plain: {kind: embed, from: pretrain, data: pairs}
  rank: {kind: rerank, from: pretrain, data: pairs}
  list: {kind: rerank, from: pretrain, data: pairs, objective: listwise}
  sft:  {kind: sft, from: pretrain, data: asked}
variants:
  base: {stage: pretrain, sizes: [e, q]}
  embedding: {stage: emb, sizes: [e], eval: find}
  reranker: {stage: rank, sizes: [e, q], eval: order}
  convert: {stage: sft, sizes: [t], eval: chat}
evals:
  find: [{task: retrieval, data: names, n: 20}]
  order: [{task: rerank, data: names, n: 20, top: 10}]
  chat: [{task: answers, data: asked, n: 10}]
exports:
  - {variants: [embedding, reranker], sizes: [e], format: onnx, quant: [fp32, int8, int4]}
  - {variants: [embedding], format: safetensors, quant: bf16}
backends: {desk: {cpu: 2, ram: 8GB}}
"""
BY_BM25 = "hard_negatives: {by: bm25}"


def edit(*pairs: tuple[str, str]) -> str:
    text = SPEC
    for old, new in pairs:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def graph(*edits: tuple[str, str], **options: Any) -> Graph:
    return resolve(drafts(edit(*edits), STAGES, file="finder.yaml", **options))


def planned(made: Graph, folder: Path) -> Plan:
    return plan(made, folder / "out", local=machine())


def miner(made: Graph, stage: str) -> Node:
    """The step that mines a stage's negatives."""
    return made.nodes[made.nodes[stage].inputs["negatives"]]


# --- who mines --------------------------------------------------------------------------------------------


def test_an_embedders_parent_mines_for_it_and_the_familys_embedder_for_rerankers() -> None:
    made = graph()
    mined = miner(made, "e/emb")
    assert mined.inputs == {"data": "mix/pairs", "tokenizer": "tokenizer", "model": "e/weak"}
    assert mined.params == {"k": 3, "margin": 0.0, "methods": ["embedder", "bm25"], "depth": 100}
    assert miner(made, "e/rank").inputs["model"] == "e/emb"
    assert miner(made, "e/rank").params["k"] == 7
    assert (mined.size, mined.variant, mined.shape) == ("e", None, made.nodes["e/weak"].shape)


def test_a_size_without_an_embedder_has_that_of_the_first_size_that_has_one() -> None:
    mined = miner(graph(), "q/rank")
    assert mined.inputs["model"] == "e/emb"
    assert (mined.name, mined.size) == ("q/mine/pairs.e-emb", "q")
    assert mined.shape is not None and mined.shape.arch == "bert", "it is the bert that reads the passages"
    both = graph(
        ("sizes: [e], eval: find", "sizes: [e, q], eval: find"), ("stage: emb,", "stage: {e: emb, q: plain},")
    )
    assert miner(both, "q/rank").inputs["model"] == "q/plain"


def test_bm25_mines_alone_where_there_is_no_embedder() -> None:
    """An embedder's first stage starts from what has no vectors yet."""
    first = graph(("from: pretrain, data: pairs}\n  rank", "from: pretrain, data: pairs, hard_negatives: {}}\n  rank"),
                  ("embedding: {stage: emb", "embedding: {stage: plain"))  # fmt: skip
    mined = miner(first, "e/plain")
    assert mined.name == "e/mine/pairs.bm25"
    assert mined.params["methods"] == ["bm25"]
    assert "model" not in mined.inputs
    none = graph(("  embedding: {stage: emb, sizes: [e], eval: find}\n", ""), ("[embedding, reranker]", "[reranker]"),
                 ("  - {variants: [embedding], format: safetensors, quant: bf16}\n", ""))  # fmt: skip
    assert miner(none, "e/rank").params["methods"] == ["bm25"]


@pytest.mark.parametrize(
    ("by", "model"),
    [("weak@e", "e/weak"), ("plain", "{size}/plain"), ("embedding@e", "e/emb"), ("bm25", None)],
)
def test_by_names_who_mines(by: str, model: str | None) -> None:
    made = graph(
        ("rank: {kind: rerank, from: pretrain, data: pairs}",
         f"rank: {{kind: rerank, from: pretrain, data: pairs, hard_negatives: {{by: {by}}}}}")
    )  # fmt: skip
    for size in ("e", "q"):
        mined = miner(made, f"{size}/rank")
        assert mined.inputs.get("model") == (model and model.format(size=size))
        assert mined.params["methods"] == (["bm25"] if by == "bm25" else ["embedder", "bm25"])


def test_by_differs_by_size() -> None:
    by = f"rank: {{kind: rerank, from: pretrain, data: pairs, by: {{q: {{{BY_BM25}}}}}}}"
    made = graph(("rank: {kind: rerank, from: pretrain, data: pairs}", by))
    assert miner(made, "e/rank").inputs["model"] == "e/emb"
    assert "model" not in miner(made, "q/rank").inputs


def test_no_negatives_are_mined_where_the_datas_own_are_meant() -> None:
    made = graph(("rank: {kind: rerank, from: pretrain, data: pairs}",
                  "rank: {kind: rerank, from: pretrain, data: pairs, hard_negatives: null}"))  # fmt: skip
    assert "negatives" not in made.nodes["e/rank"].inputs
    assert made.nodes["e/rank"].params["hard_negatives"] is None
    assert [n.name for n in made.nodes.values() if n.kind == "mine"] == ["e/mine/pairs.weak"]
    assert "negatives" not in made.nodes["e/weak"].inputs, "an embedder has its batch's"


def test_a_mix_of_many_negatives_is_searched_deeper() -> None:
    made = graph(("hard_negatives: {k: 3}", "hard_negatives: {k: 40}"))
    assert miner(made, "e/emb").params["depth"] == 160


# --- what is shared, and what is stale --------------------------------------------------------------------


TWO = ("reranker: {stage: rank, sizes: [e, q], eval: order}",
       "reranker: {stage: rank, sizes: [e, q], eval: order}\n  lister: {stage: list, sizes: [e]}")  # fmt: skip


def test_stages_that_ask_for_the_same_share_what_is_mined() -> None:
    made = graph(TWO)
    assert made.nodes["e/rank"].inputs["negatives"] == made.nodes["e/list"].inputs["negatives"]
    assert sorted(n.name for n in made.nodes.values() if n.kind == "mine") == [
        "e/mine/pairs.emb", "e/mine/pairs.weak", "q/mine/pairs.e-emb",
    ]  # fmt: skip


@pytest.mark.parametrize("other", ["{k: 9}", "{margin: 0.05}"])
def test_stages_that_ask_for_another_number_or_margin_have_their_own(other: str) -> None:
    made = graph(TWO, ("objective: listwise", f"objective: listwise, hard_negatives: {other}"))
    assert miner(made, "e/rank").name == "e/mine/pairs.emb"
    assert miner(made, "e/list").name == "e/mine/pairs.emb-2"


def changed(before: Graph, after: Graph) -> set[str]:
    """Steps of both whose keys differ."""
    old, new = keys(before), keys(after)
    return {name for name in old.keys() & new.keys() if old[name] != new[name]}


def test_an_embedder_trained_anew_has_its_negatives_mined_anew() -> None:
    stale = changed(graph(), graph(("pooling: cls,", "pooling: cls, lr: 0.001,")))
    assert {
        "e/emb",
        "e/mine/pairs.emb",
        "e/rank",
        "q/mine/pairs.e-emb",
        "q/rank",
        "e/reranker/eval.order",
    } <= stale
    assert {"e/mine/pairs.weak", "e/weak", "e/pretrain", "mix/pairs"} & stale == set()


def test_how_a_miner_is_named_is_no_part_of_who_learns() -> None:
    """`by` names an input; the learner's key has the input's key in it."""
    named = graph(("rank: {kind: rerank, from: pretrain, data: pairs}",
                   "rank: {kind: rerank, from: pretrain, data: pairs, hard_negatives: {by: embedding@e}}"))  # fmt: skip
    assert changed(graph(), named) == set()
    assert named.nodes["e/rank"].params["hard_negatives"] == {"k": 7}


def test_a_margin_changes_what_is_mined_and_all_that_learns_from_it() -> None:
    stale = changed(graph(), graph(("hard_negatives: {k: 3}", "hard_negatives: {k: 3, margin: 0.1}")))
    assert {"e/mine/pairs.weak", "e/emb", "e/mine/pairs.emb"} <= stale
    assert "e/weak" not in stale


# --- defaults ---------------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_architecture() -> None:
    made = graph(
        ("embedding: {stage: emb, sizes: [e]", "embedding: {stage: {e: emb, q: plain}, sizes: [e, q]")
    )
    nodes = made.nodes
    assert [nodes[name].params["pooling"] for name in ("e/weak", "q/plain")] == ["cls", "last"]
    assert nodes["q/plain"].origins["pooling"].startswith("default: only a decoder's last token")
    assert [nodes[f"{size}/rank"].params["head"] for size in "eq"] == ["classifier", "yes_no"]
    assert nodes["e/rank"].params["loss"] == "bce"
    assert [nodes[name].params["global_batch"] for name in ("e/weak", "e/rank")] == [128, 16]
    assert nodes["e/rank"].params["lexical"] is None
    mean = graph(("embedding: {stage: emb", "embedding: {stage: plain"))
    assert mean.nodes["e/plain"].params["pooling"] == "mean"


def test_a_teacher_is_an_input_and_no_value() -> None:
    made = graph(("pooling: cls,", "pooling: cls, teacher: plain@q,"))
    assert made.nodes["e/emb"].inputs["teacher"] == "q/plain"
    assert "teacher" not in made.nodes["e/emb"].params
    assert made.nodes["e/emb"].work.flops > graph().nodes["e/emb"].work.flops


# --- scores, exports, gates -------------------------------------------------------------------------------


def test_a_reranker_is_scored_on_what_the_familys_embedder_finds() -> None:
    made = graph()
    for size in ("e", "q"):
        scored = made.nodes[f"{size}/reranker/eval.order"]
        assert scored.inputs["retriever"] == "e/emb"
        assert [(task["task"], task["top"]) for task in scored.params["tasks"]] == [("rerank", 10)]
        assert scored.missing == ()
    found = made.nodes["e/embedding/eval.find"]
    assert "retriever" not in found.inputs
    assert "top" not in found.params["tasks"][0], (
        "a field that says nothing to a task is no part of its identity"
    )
    none = graph(("  embedding: {stage: emb, sizes: [e], eval: find}\n", ""), ("[embedding, reranker]", "[reranker]"),
                 ("  - {variants: [embedding], format: safetensors, quant: bf16}\n", ""))  # fmt: skip
    assert "retriever" not in none.nodes["e/reranker/eval.order"].inputs, "BM25 finds what it reads"


def test_exports_of_both_are_compared_on_held_out_pairs() -> None:
    made = graph()
    for variant, many in (("embedding", 400), ("reranker", 64)):
        for label in ("onnx-fp32", "onnx-int8", "onnx-int4"):
            parity = made.nodes[f"e/{variant}/parity.{label}"]
            assert parity.inputs["pairs.names"] == "data/names", "the evaluation's"
            assert not any(role.startswith(("text.", "chat.")) for role in parity.inputs)
            assert parity.params["pairs"] == many
            assert parity.missing == ()
    assert made.nodes["e/embedding/parity.safetensors-bf16"].params["task"] == "feature-extraction"
    smoke = graph(smoke=True)
    assert smoke.nodes["e/embedding/parity.onnx-int8"].params["pairs"] == 16


def test_the_first_suite_that_has_such_a_task_says_which_pairs() -> None:
    """Not a suite before it, whose variants learnt from pairs as well."""
    second = "order: [{task: rerank, data: asked2, n: 20, top: 10}]"
    made = graph(("order: [{task: rerank, data: names, n: 20, top: 10}]", second),
                 ("    asked: {", "    asked2: {pystdlib: names}\n    asked: {"))  # fmt: skip
    assert "pairs.names" in made.nodes["e/embedding/parity.onnx-int8"].inputs
    assert "pairs.asked2" in made.nodes["e/reranker/parity.onnx-int8"].inputs


UNSCORED = [(", eval: find}", "}"), (", eval: order}", "}")]


def test_without_an_evaluation_the_pairs_are_those_that_it_learnt_from() -> None:
    made = graph(*UNSCORED)
    parity = made.nodes["e/embedding/parity.onnx-int8"]
    assert [role for role in parity.inputs if role.startswith("pairs.")] == ["pairs.pairs"], (
        "the first of the spec"
    )
    assert made.nodes["e/embedding/gate.onnx-int8"].params["parity"]["ndcg"] == 0.05


@pytest.mark.parametrize("variant", ["embedding", "reranker"])
@pytest.mark.parametrize("label", ["onnx-fp32", "onnx-int8", "onnx-int4"])
def test_an_export_of_which_the_spec_says_nothing_has_a_gate(variant: str, label: str) -> None:
    gate = graph().nodes[f"e/{variant}/gate.{label}"]
    cosine, ranking, drop = ENCODER_LIMITS[label]
    wanted = {"tokenizer": "exact", "ranking": ranking, "ndcg": drop}
    wanted |= {"cosine": cosine} if variant == "embedding" else {}
    said = {key: value for key, value in gate.params["parity"].items() if value is not None}
    assert said == wanted, "no template: they have none"
    assert gate.inputs == {"parity": f"e/{variant}/parity.{label}"}


def test_few_bits_are_found_as_an_encoder_bears_them() -> None:
    exported = graph().nodes["e/embedding/export.onnx-int4"].params
    assert exported == {
        "task": "feature-extraction", "format": "onnx", "quant": "int4", "block_size": 16,
        "algorithm": "k_quant", "symmetric": False,
    }  # fmt: skip
    assert set(graph().nodes["e/embedding/export.onnx-int8"].params) == {"task", "format", "quant"}


# --- plans ------------------------------------------------------------------------------------------------


def test_every_step_has_a_worker_memory_and_time(tmp_path: Path) -> None:
    made = graph()
    assert {node.name: node.missing for node in made.nodes.values() if node.missing} == {}
    steps = planned(made, tmp_path).steps
    for name in (
        "e/weak",
        "e/mine/pairs.weak",
        "e/emb",
        "e/rank",
        "q/rank",
        "e/reranker/eval.order",
        "t/sft",
    ):
        step = steps[name]
        assert step.status == "new"
        assert step.node.work.flops > 0
        assert 0 < step.memory.total < step.limit
        assert step.seconds > 0


def with_negatives(stage: str, k: int) -> Graph:
    """The family whose stage has k negatives a query, two queries a pass."""
    whole = next(line for line in SPEC.splitlines() if line.startswith(f"  {stage}:"))
    plain = whole.replace(", hard_negatives: {k: 3}", "").removesuffix("}")
    return graph((whole, f"{plain}, micro_batch: 2, hard_negatives: {{k: {k}}}}}"))


@pytest.mark.parametrize(("stage", "rows"), [("emb", (5, 32)), ("rank", (4, 31))])
def test_more_negatives_need_more_memory_and_work(tmp_path: Path, stage: str, rows: tuple[int, int]) -> None:
    """All passages of a reranker's query are in one pass. An embedder's query is a row of its own, and GradCache embeds one
    text of each query at a time: negatives cost it time."""
    few, many = (planned(with_negatives(stage, k), tmp_path).steps[f"e/{stage}"] for k in (3, 30))
    assert (few.node.work.rows, many.node.work.rows) == rows
    if stage == "emb":
        assert many.memory.activations == few.memory.activations
    else:
        assert many.memory.activations > 5 * few.memory.activations
    assert few.memory.total <= many.memory.total < many.limit
    assert many.node.work.flops > 5 * few.node.work.flops
    assert many.seconds > 3 * few.seconds


def test_a_rehearsal_is_the_same_family_made_small(tmp_path: Path) -> None:
    full, small = graph(), graph(smoke=True)
    assert set(small.nodes) == set(full.nodes)
    nodes = small.nodes
    assert {name: nodes[name].shape.arch for name in ("e/emb", "q/rank", "t/sft")} == {  # type: ignore[union-attr]
        "e/emb": "bert", "q/rank": "qwen3", "t/sft": "t5",
    }  # fmt: skip
    weak = nodes["e/weak"].params
    assert (weak["steps"], weak["global_batch"], weak["mrl"]) == (3, 4, (32,))
    assert weak["lexical"] == {"epochs": 1.0, "batch": 16, "lr": 0.01}
    assert weak["prompts"] == {"query": "find: ", "document": ""}
    assert weak["merge"] == {"method": "slerp", "last": 2}
    assert nodes["e/emb"].params["hard_negatives"] == {"k": 2}
    assert nodes["e/mine/pairs.weak"].params["k"] == 2
    assert nodes["t/sft"].params["steps"] == 3
    steps = planned(small, tmp_path).steps
    assert set(steps) == set(nodes)
    assert all(step.memory.total < step.limit for step in steps.values())


def test_a_reranker_may_begin_with_words(tmp_path: Path) -> None:
    """Without a parent; at a size of one head, which a rehearsal keeps."""
    edits = (
        (
            "layers: 2, hidden: 64, ffn: 128, heads: 2}\n  q",
            "layers: 3, hidden: 128, ffn: 128, heads: 1}\n  q",
        ),
        ("rank: {kind: rerank, from: pretrain,", "rank: {kind: rerank, lexical: {epochs: 3},"),
        ("reranker: {stage: rank, sizes: [e, q]", "reranker: {stage: rank, sizes: [e]"),
    )
    node = graph(*edits).nodes["e/rank"]
    assert "model" not in node.inputs and "e/pretrain" not in {*node.inputs.values()}
    assert node.inputs["negatives"] == "e/mine/pairs.emb"
    assert node.params["lexical"] == {"epochs": 3.0, "batch": 32, "lr": 0.002}
    assert node.work.cpu_seconds > graph(edits[0], edits[2]).nodes["e/rank"].work.cpu_seconds == 0
    small = graph(*edits, smoke=True).nodes["e/rank"].params
    assert small["lexical"] == {"epochs": 1.0, "batch": 16, "lr": 0.002}
    assert (small["shape"]["layers"], small["shape"]["heads"]) == (2, 1)


def test_a_rehearsal_makes_small_what_groups_say(tmp_path: Path) -> None:
    """A small model has no 4,096 dimensions, wherever they are written."""
    by = "by: {e: {mrl: [4096, 512], hard_negatives: {k: 50}}}"
    made = graph(("  e: {arch: bert, layers: 2, hidden: 64,", "  e: {arch: bert, layers: 2, hidden: 4096,"),
                 ("heads: 2}\n  q:", "heads: 64}\n  q:"),
                 ("hard_negatives: {k: 3}}", f"hard_negatives: {{k: 3}}, {by}}}"), smoke=True)  # fmt: skip
    assert made.nodes["e/emb"].params["mrl"] == (32,)
    assert made.nodes["e/emb"].params["hard_negatives"] == {"k": 2}
    assert planned(made, tmp_path).steps["e/emb"].status == "new"


# --- gates that mean exports of every kind ------------------------------------------------------------------

BACKENDS = "backends: {desk: {cpu: 2, ram: 8GB}}"


def gated(line: str) -> tuple[str, str]:
    return BACKENDS, f"gates: [{line}]\n{BACKENDS}"


def limits(params: Mapping[str, Any]) -> dict[str, Any]:
    return {name: limit for name, limit in params["parity"].items() if limit is not None}


def test_a_gate_on_every_export_asks_of_each_what_is_measured_of_it() -> None:
    line = '{match: "*/*/export.onnx-*", parity: {tokenizer: exact, template: exact, kl: 0.1, ranking: 0.5}, max_drop: {points: 2}}'
    made = graph(gated(line)).nodes
    params = made["e/embedding/gate.onnx-int4"].params
    cosine, _, drop = ENCODER_LIMITS["onnx-int4"]
    assert limits(params) == {"tokenizer": "exact", "cosine": cosine, "ranking": 0.5, "ndcg": drop}
    assert "max_drop" not in params
    assert "cosine" not in limits(made["e/reranker/gate.onnx-int4"].params)


def test_a_gate_whose_every_limit_is_measured_stands_as_it_is_written() -> None:
    made = graph(gated('{match: "e/embedding/export.onnx-int4", parity: {cosine: 0.8}}')).nodes
    assert limits(made["e/embedding/gate.onnx-int4"].params) == {"cosine": 0.8}


def test_a_gate_of_which_nothing_can_be_measured_is_refused() -> None:
    with pytest.raises(SpecError) as caught:
        graph(gated('{match: "e/embedding/export.*", parity: {kl: 0.1}}'))
    (problem,) = caught.value.problems
    assert "gates.0" in problem.message and "none of its limits is measured" in problem.message
