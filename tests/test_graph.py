"""Which steps a spec comes to, what they share, who set their values, and what changes their keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from famc.errors import SpecError
from famc.graph import Graph, open_family, resolve
from famc.plan import keys
from famc.spec.load import drafts
from famc.steps import STAGES

SPECS = Path(__file__).parent.parent / "specs"
NAMES = ("tiny", "qwen3like", "pydoc")

SPEC = """\
famc: 1
family: {name: pair, seed: 3}
arch: {type: qwen3, head_dim: 32, vocab_pad: 1024, context: 64}
sizes:
  s: {layers: 2, hidden: 64, ffn: 128, heads: 2, tie: true}
  m: {layers: 4, hidden: 128, ffn: 256, heads: 4, tie: true}
  l: {layers: 6, hidden: 192, ffn: 512, heads: 6, tie: true}
groups: {small: [s, m], tiny: [s]}
tokenizer: {train_on: {mix: text, bytes: 1MB}}
data:
  sources:
    code: {pystdlib: source}
    qa: {pystdlib: questions}
    prefs: {pystdlib: preferences}
  mixes:
    text: {tokens: 50k, weights: {code: 1}}
stages:
  pretrain: {kind: pretrain, data: text, lr: 1e-3, epochs: 1}
  kd: {kind: distill, data: text, teacher: base@l, epochs: 1}
  sft: {kind: sft, from: base, data: qa, epochs: 2, lr: {peak: 1e-4, schedule: linear}, by: {small: {epochs: 3}, tiny: {epochs: 4}, box: {clip: 0.5}, m: {lr: {peak: 2e-4}}}}
  dpo: {kind: dpo, from: sft, data: prefs}
  spare: {kind: sft, from: pretrain, data: qa}
variants:
  base: {stage: {small: kd, l: pretrain}, eval: lm}
  chat: {stage: dpo, eval: talk}
evals:
  lm: [{task: bits_per_byte, data: code, n: 20}]
  talk: [{task: answers, data: qa, n: 10}]
exports:
  - {variants: [chat], sizes: small, format: onnx, quant: [fp32, int4]}
gates:
  - {match: base, across: sizes, monotonic: lm}
backends: {desk: {cpu: 2}, box: {cpu: 4, usd_per_hour: 1}}
place: {"l/*": box, default: desk}
profiles:
  quick: {stages.sft.epochs: 1, stages.pretrain.lr: 2e-3}
"""


def graph(text: str = SPEC, **options: object) -> Graph:
    return resolve(drafts(text, STAGES, file="pair.yaml", **options))  # type: ignore[arg-type]


def edit(*pairs: tuple[str, str]) -> str:
    text = SPEC
    for old, new in pairs:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("smoke", [False, True])
def test_shipped_specs_resolve_in_an_order_in_which_needs_come_first(name: str, smoke: bool) -> None:
    nodes = open_family(SPECS / f"{name}.yaml", smoke=smoke).nodes
    seen: set[str] = set()
    for node in nodes.values():
        assert set(node.needs) <= seen, node.name
        seen.add(node.name)


@pytest.mark.parametrize("name", NAMES)
def test_rehearsal_is_the_same_graph(name: str) -> None:
    """Steps, edges, kinds and backends are those of the family; only the numbers are small."""
    full, small = (open_family(SPECS / f"{name}.yaml", smoke=s) for s in (False, True))
    assert set(small.nodes) == set(full.nodes)
    for node in full.nodes.values():
        other = small.nodes[node.name]
        assert (other.kind, other.inputs, other.after, other.backend) == (
            node.kind,
            node.inputs,
            node.after,
            node.backend,
        )
    trained = [n for n in small.nodes.values() if n.work.mode == "train"]
    assert trained
    assert all(n.params["steps"] == 3 and n.shape is not None and n.shape.layers == 2 for n in trained)


@pytest.mark.parametrize("name", NAMES)
def test_order_has_no_circle_by_networkx(name: str) -> None:
    import networkx

    assert networkx.is_directed_acyclic_graph(open_family(SPECS / f"{name}.yaml").networkx())


def test_only_what_is_published_needed_or_compared_becomes_a_step() -> None:
    names = set(graph().nodes)
    assert {"l/pretrain", "s/kd", "m/kd", "s/sft", "m/dpo", "l/dpo"} <= names
    assert not {n for n in names if n.endswith("/spare")}, "no variant uses it"
    assert not {"s/pretrain", "m/pretrain", "l/kd"} & names, "each size has one way to its base"


def test_dropping_a_variant_drops_its_steps_and_keeps_what_is_shared() -> None:
    before = set(graph().nodes)
    after = set(
        graph(
            edit(
                ("  chat: {stage: dpo, eval: talk}\n", ""),
                ("  - {variants: [chat], sizes: small, format: onnx, quant: [fp32, int4]}\n", ""),
                ("exports:\n", ""),
            )
        ).nodes
    )
    assert after < before
    gone = before - after
    assert {"s/sft", "s/dpo", "data/qa", "data/prefs", "mix/qa", "s/chat/release"} <= gone
    assert {"data/code", "mix/text", "tokenizer", "s/kd", "l/pretrain", "s/base/release"} <= after


def test_data_mixes_and_tokenizer_are_made_once_for_all_sizes() -> None:
    nodes = graph().nodes
    assert {n for n in nodes if n.startswith(("data/", "mix/", "tokenizer"))} == {
        "data/code", "data/qa", "data/prefs", "mix/text", "mix/qa", "mix/prefs", "tokenizer",
    }  # fmt: skip
    assert {nodes[f"{size}/sft"].inputs["data"] for size in "sml"} == {"mix/qa"}
    assert {nodes[f"{size}/dpo"].inputs["tokenizer"] for size in "sml"} == {"tokenizer"}
    assert {nodes[f"{size}/kd"].inputs["teacher"] for size in "sm"} == {"l/pretrain"}


def test_evaluation_data_is_taken_out_of_every_mix() -> None:
    for mix in ("mix/text", "mix/qa", "mix/prefs"):
        assert graph().nodes[mix].params["decontaminate"]["against"] == ["code", "qa"]


def test_override_by_group_size_and_backend_with_the_strongest_last() -> None:
    nodes = graph().nodes
    values = {size: nodes[f"{size}/sft"] for size in "sml"}
    assert [values[s].params["epochs"] for s in "sml"] == [4, 3, 2], "groups in their order, then nothing"
    assert [values[s].params["clip"] for s in "sml"] == [1.0, 1.0, 0.5], "only l is placed on box"
    assert [values[s].params["lr.peak"] for s in "sml"] == [1e-4, 2e-4, 1e-4]
    assert {values[s].params["lr.schedule"] for s in "sml"} == {"linear"}, "a mapping is merged, not replaced"
    assert values["s"].origins["epochs"] == "by tiny, pair.yaml:20"
    assert values["m"].origins["epochs"] == "by small, pair.yaml:20"
    assert values["l"].origins["epochs"] == "pair.yaml:20"
    assert values["l"].origins["clip"] == "by box, pair.yaml:20"
    assert values["m"].origins["lr.peak"] == "by m, pair.yaml:20"
    assert values["m"].origins["lr.schedule"] == "pair.yaml:20"
    assert values["s"].origins["lr.warmup"].startswith("default")


def test_data_that_differs_by_size_is_a_mix_of_its_own() -> None:
    text = edit(
        ("m: {lr: {peak: 2e-4}}", "m: {data: {weights: {qa: 1}, max_epochs: 9}}"),
        ("data: qa, epochs: 2", "data: {weights: {qa: 2}}, epochs: 2"),
    )
    nodes = graph(text).nodes
    assert (nodes["s/sft"].inputs["data"], nodes["m/sft"].inputs["data"]) == (
        "mix/sft.data",
        "mix/sft.m.data",
    )
    assert nodes["mix/sft.m.data"].params["max_epochs"] == 9


def test_profile_and_set_with_their_origins() -> None:
    plain, quick = graph(), graph(profile="quick", sets=["stages.sft.epochs=7", "stages.dpo.beta=0.3"])
    assert plain.nodes["l/sft"].params["epochs"] == 2
    assert (quick.nodes["l/sft"].params["epochs"], quick.nodes["l/sft"].origins["epochs"]) == (
        7,
        "--set stages.sft.epochs",
    )
    assert (quick.nodes["l/pretrain"].params["lr.peak"], quick.nodes["l/pretrain"].origins["lr.peak"]) == (
        2e-3,
        "profile quick",
    )
    assert quick.nodes["m/dpo"].origins["beta"] == "--set stages.dpo.beta"
    assert quick.nodes["s/sft"].params["epochs"] == 4, "by is nearer than --set on the stage"


def test_place_gives_the_first_glob_that_matches() -> None:
    nodes = graph().nodes
    assert {nodes[n].backend for n in ("l/pretrain", "l/chat/release")} == {"box"}
    assert {nodes[n].backend for n in ("s/kd", "tokenizer", "mix/text")} == {"desk"}


def test_smaller_sizes_are_what_a_size_is_compared_with() -> None:
    nodes = graph().nodes
    assert "s/base/gate.monotonic-lm" not in nodes
    assert nodes["m/base/gate.monotonic-lm"].inputs["beats"] == "s/base/eval.lm"
    assert nodes["l/base/gate.monotonic-lm"].inputs["beats"] == "m/base/eval.lm"


def changed(before: Graph, after: Graph) -> set[str]:
    """Steps whose key differs."""
    old, new = keys(before), keys(after)
    assert set(old) == set(new)
    return {name for name in old if old[name] != new[name]}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("famc: 1\n", "famc: 1  # a comment\n"),
        ("family: {name: pair, seed: 3}", "family:\n  seed: 3\n  name: pair"),
        ("usd_per_hour: 1", "usd_per_hour: 2"),
        ("desk: {cpu: 2}", "desk: {cpu: 1, ram: 4GB}"),
        ("data: text, lr: 1e-3, epochs: 1", "data: text, lr: 1e-3, epochs: 1, micro_batch: 2"),
        ("data: text, lr: 1e-3, epochs: 1", "data: text, lr: 1e-3, epochs: 1, checkpoint_steps: 5"),
        ("data: text, lr: 1e-3, epochs: 1", "data: text, lr: 1e-3, epochs: 1, recompute: full"),
        ("lr: 1e-3", "lr: {peak: 0.001}"),
        ("tokens: 50k", "tokens: 50000"),
        ("default: desk", "default: box"),
        ("quick: {stages.sft.epochs: 1,", "quick: {stages.sft.epochs: 9,"),
        ("  spare: {kind: sft, from: pretrain, data: qa}\n", ""),
    ],
)
def test_what_cannot_change_a_byte_changes_no_key(old: str, new: str) -> None:
    text = edit((old, new))
    if "default: box" in new:  # `by: box` would rightly hold everywhere
        text = text.replace(", box: {clip: 0.5}", ", box: {clip: 1.0}")
        assert changed(graph(SPEC.replace(", box: {clip: 0.5}", ", box: {clip: 1.0}")), graph(text)) == set()
        return
    assert changed(graph(), graph(text)) == set()


@pytest.mark.parametrize(
    ("old", "new", "stages"),
    [
        ("lr: 1e-3", "lr: 1.1e-3", ["l/pretrain"]),
        ("teacher: base@l, epochs: 1", "teacher: base@l, epochs: 2", ["s/kd", "m/kd"]),
        ("data: prefs}", "data: prefs, beta: 0.2}", ["s/dpo", "m/dpo", "l/dpo"]),
        ("tiny: {epochs: 4}", "tiny: {epochs: 5}", ["s/sft"]),
        ("weights: {code: 1}", "weights: {code: 2}", ["mix/text", "tokenizer"]),
        ("code: {pystdlib: source}", "code: {pystdlib: source, heldout: {fraction: 0.2}}", ["data/code"]),
        ("  m: {layers: 4,", "  m: {layers: 5,", ["m/kd"]),
    ],
)  # fmt: skip
def test_a_value_changes_its_step_and_all_that_follows_and_nothing_else(
    old: str, new: str, stages: list[str]
) -> None:
    before, after = graph(), graph(edit((old, new)))
    assert changed(before, after) == {n for n in before.nodes if _reached(before, n, set(stages))}


def _reached(graph: Graph, name: str, roots: set[str]) -> bool:
    """Whether a step reads, through any number of others, what one of the roots makes; order alone does not count."""
    todo, seen = [name], set()
    while todo:
        current = todo.pop()
        if current in roots:
            return True
        if current not in seen:
            seen.add(current)
            todo += graph.nodes[current].inputs.values()
    return False


def test_seed_changes_every_trained_step() -> None:
    before = graph()
    different = changed(before, graph(edit(("seed: 3", "seed: 4"))))
    assert {n.name for n in before.nodes.values() if n.work.mode == "train"} <= different


def test_closure_follows_needs_up_and_followers_down() -> None:
    g = graph()
    assert g.closure(["tokenizer"], up=True) == {"tokenizer", "data/code"}
    assert {"s/kd", "m/kd", "s/chat/release"} <= g.closure(["l/pretrain"], up=False)
    assert "data/code" not in g.closure(["l/pretrain"], up=False)


def test_place_that_matches_nothing_is_told_with_what_there_is() -> None:
    with pytest.raises(SpecError) as error:
        graph(edit(('"l/*": box', '"x/*": box')))
    assert str(error.value) == "pair.yaml:34:9: place: 'x/*' matches no step; steps are called data/code"


def test_rehearsal_leaves_what_is_adopted_as_it_is(tmp_path: Path) -> None:
    """A tokenizer or checkpoint from elsewhere can't shrink with the family."""
    text = edit(
        ("tokenizer: {train_on: {mix: text, bytes: 1MB}}", "tokenizer: {adopt: tok, chat_template: t.jinja}")
    )
    g = graph(text, folder=tmp_path, smoke=True)
    shape = g.nodes["s/kd"].shape
    assert shape is not None
    assert (shape.vocab, shape.layers) == (1024, 2)


def test_rehearsal_makes_small_what_groups_and_sizes_say() -> None:
    """Nothing of the whole family's values is left where `by` has its own."""
    text = edit(("tiny: {epochs: 4}", "tiny: {steps: 5000, context: 32, micro_batch: 64}"))
    for name in ("s/sft", "m/sft", "l/sft"):
        node = graph(text, smoke=True).nodes[name]
        assert (node.params["steps"], node.params["context"]) == (3, 64)
        assert node.params["clip"] == (0.5 if name == "l/sft" else 1.0), "what is no budget stays"
    assert graph(text).nodes["s/sft"].params["steps"] == 5000
