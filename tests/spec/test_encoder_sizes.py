"""Sizes of another architecture: what they come to, what they plan, and every mistake with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from famc.backend import load_accelerator
from famc.cost.parameters import count
from famc.cost.shape import Shape
from famc.errors import SpecError
from famc.graph import Graph, open_family
from famc.plan import plan
from famc.spec.family import Arch, Family, Size
from famc.steps.shapes import shape_of, shape_values

SPEC = """\
famc: 1
family: {name: trio, org: me, license: mit, seed: 7}
arch: {type: qwen3, head_dim: 32, vocab_pad: 2048, context: 128}
sizes:
  s: {layers: 2, hidden: 64, ffn: 128, heads: 4, kv_heads: 2, tie: true}
  b: {arch: bert, layers: 3, hidden: 96, ffn: 384, heads: 4}
  e: {arch: modernbert, layers: 4, hidden: 64, ffn: 96, heads: 4}
  t: {arch: t5, layers: 2, hidden: 64, ffn: 160, heads: 3}
groups: {readers: [b, e]}
tokenizer: {vocab: 2000, train_on: {mix: text, bytes: 200kB}}
data:
  sources:
    code: {pystdlib: source}
    qa:   {pystdlib: questions}
    prefs: {pystdlib: preferences}
  mixes:
    text: {tokens: 200k, weights: {code: 1}, max_epochs: 4}
stages:
  pretrain: {kind: pretrain, data: text, batch_tokens: 1024}
  sft:      {kind: sft, from: pretrain, data: qa}
  dpo:      {kind: dpo, from: sft, data: prefs}
  kd:       {kind: distill, data: text, teacher: pretrain@s}
variants:
  base: {stage: pretrain}
  chat: {stage: sft, sizes: [s, t]}
backends: {laptop: {cpu: 2, ram: 8GB}}
"""


def family(*edits: tuple[str, str]) -> str:
    text = SPEC
    for old, new in edits:
        assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times"
        text = text.replace(old, new)
    return text


def opened(folder: Path, *edits: tuple[str, str], **more: bool) -> Graph:
    path = folder / "trio.yaml"
    path.write_text(family(*edits), encoding="utf-8")
    return open_family(path, **more)


def problems(folder: Path, *edits: tuple[str, str]) -> list[str]:
    with pytest.raises(SpecError) as caught:
        opened(folder, *edits)
    return [str(p).removeprefix(str(folder / "trio.yaml") + ":") for p in caught.value.problems]


# --- shapes -------------------------------------------------------------------------------------------------


def test_a_size_has_its_own_architecture_and_the_familys_vocabulary(tmp_path):
    graph = opened(tmp_path)
    shapes = {size: graph.nodes[f"{size}/pretrain"].shape for size in "sbet"}
    assert {size: shape.arch for size, shape in shapes.items()} == {
        "s": "qwen3", "b": "bert", "e": "modernbert", "t": "t5",
    }  # fmt: skip
    assert {shape.vocab for shape in shapes.values()} == {2048}
    assert {shape.context for shape in shapes.values()} == {128}
    # arch.head_dim is of decoders and t5; encoders' heads are hidden / heads wide
    assert {size: shape.head_dim for size, shape in shapes.items()} == {"s": 32, "b": 24, "e": 16, "t": 32}
    assert {size: shape.rope_theta for size, shape in shapes.items()} == {
        "s": 1e4,
        "b": 1e4,
        "e": 1.6e5,
        "t": 1e4,
    }
    assert all(shapes[size].tie and shapes[size].kv_heads == shapes[size].heads for size in "bet")


def test_the_job_says_all_that_a_worker_needs(tmp_path):
    graph = opened(tmp_path)
    assert graph.nodes["e/pretrain"].params["shape"] == {
        "arch": "modernbert", "vocab": 2048, "layers": 4, "hidden": 64, "ffn": 96, "heads": 4, "kv_heads": 4,
        "head_dim": 16, "tie": True, "context": 128, "rope_theta": 160000.0, "moe": None,
    }  # fmt: skip
    assert graph.nodes["t/sft"].params["shape"]["arch"] == "t5"
    assert list(graph.nodes["s/pretrain"].params["shape"]) == list(graph.nodes["t/pretrain"].params["shape"])


def test_a_family_may_be_one_of_encoders(tmp_path):
    edits = [
        ("type: qwen3, head_dim: 32, ", "type: modernbert, rope_theta: 80000, "),
        ("s: {layers: 2, hidden: 64, ffn: 128, heads: 4, kv_heads: 2, tie: true}", "s: {layers: 3, hidden: 64, ffn: 96, heads: 4}"),
        ("arch: modernbert, ", ""),
        ("ffn: 160, heads: 3", "ffn: 160, heads: 2"),
        ("  chat: {stage: sft, sizes: [s, t]}\n", ""),
    ]  # fmt: skip
    graph = opened(tmp_path, *edits)
    shape = graph.nodes["s/pretrain"].shape
    assert (shape.arch, shape.rope_theta) == ("modernbert", 80000.0)
    assert graph.nodes["e/pretrain"].shape.arch == "modernbert"
    assert graph.nodes["b/pretrain"].shape.rope_theta == 1e4


@pytest.mark.parametrize("name", ["bert-base", "modernbert-large", "t5-small"])
def test_a_published_shape_keeps_the_familys_rows(tmp_path, name):
    arch = name.partition("-")[0]
    graph = opened(
        tmp_path,
        (
            "b: {arch: bert, layers: 3, hidden: 96, ffn: 384, heads: 4}",
            f"b: {{arch: {arch}, preset: {name}}}",
        ),
    )
    shape = graph.nodes["b/pretrain"].shape
    assert (shape.arch, shape.vocab, shape.context) == (arch, 2048, 128)


@pytest.mark.parametrize("arch", ["bert", "modernbert", "t5"])
def test_a_parameter_count_is_solved(tmp_path, arch):
    graph = opened(
        tmp_path,
        ("b: {arch: bert, layers: 3, hidden: 96, ffn: 384, heads: 4}", f"b: {{arch: {arch}, params: 20M}}"),
    )
    shape = graph.nodes["b/pretrain"].shape
    assert shape.arch == arch
    assert count(shape).total == pytest.approx(20e6, rel=0.01)
    assert shape.head_dim == (32 if arch == "t5" else 64)


def test_a_stage_may_change_modernberts_base_and_context(tmp_path):
    long = "long: {kind: pretrain, from: pretrain, data: text, context: 512, rope_theta: 3.2e5, batch_tokens: 1024}"
    far = "far: {stage: long, sizes: [s, e]}"
    graph = opened(tmp_path, ("  sft:  ", f"  {long}\n  sft:  "), ("  chat: ", f"  {far}\n  chat: "))
    shape = graph.nodes["e/long"].params["shape"]
    assert (shape["context"], shape["rope_theta"]) == (512, 320000.0)


def test_what_decoders_hand_on_is_as_it_was():
    """The dictionary is part of each step's key."""
    shape = Shape("qwen3", 100, 2, 64, 128, 4, 2, 32, True, 256)
    assert shape_values(shape, {"context": 512, "rope_theta": 5e5}) == {
        "arch": "qwen3", "vocab": 100, "layers": 2, "hidden": 64, "ffn": 128, "heads": 4, "kv_heads": 2,
        "head_dim": 32, "tie": True, "context": 512, "rope_theta": 5e5, "moe": None,
    }  # fmt: skip


def test_a_familys_rotary_base_moves_no_bert():
    """It has no rotary positions: its steps must keep their keys."""
    family = Family.model_construct(
        arch=Arch(type="qwen3", vocab_pad=512, rope_theta=5e5),
        sizes={"b": Size(arch="bert", layers=2, hidden=64, ffn=128, heads=2)},
    )
    assert shape_of(family, "b").rope_theta == 1e4


# --- plans --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hardware", ["cpu", "h100-80g"])
def test_a_family_of_three_kinds_plans(tmp_path, hardware):
    edits = [] if hardware == "cpu" else [("{cpu: 2, ram: 8GB}", "{gpu: h100-80g, per_node: 8}")]
    graph = opened(tmp_path, *edits)
    local = load_accelerator("cpu").with_cores(2).model_copy(update={"memory_gb": 8.0})
    made = plan(graph, tmp_path / "out", local=local)
    for name in ("s/pretrain", "b/pretrain", "e/pretrain", "t/pretrain", "s/sft", "t/sft"):
        step = made.steps[name]
        assert step.status == "new"
        assert step.to_dict()["params"]["total"] == count(step.node.shape).total
        assert step.node.work.flops > 0
        assert 0 < step.memory.total < step.limit
        assert step.seconds > 0


def test_a_rehearsal_keeps_the_architectures(tmp_path):
    graph = opened(tmp_path, smoke=True)
    shapes = {size: graph.nodes[f"{size}/pretrain"].shape for size in "sbet"}
    assert [shapes[size].arch for size in "sbet"] == ["qwen3", "bert", "modernbert", "t5"]
    assert all((shape.layers, shape.hidden, shape.head_dim) == (2, 64, 32) for shape in shapes.values())


# --- mistakes -----------------------------------------------------------------------------------------------

B, E = "b: {arch: bert, ", "e: {arch: modernbert, "
MISTAKES = [
    ("unknown architecture of a size", [("arch: bert", "arch: berta")],
     ["6:13: sizes.b.arch: unknown architecture 'berta'; did you mean 'bert'?"]),
    ("nothing like an architecture", [("arch: bert", "arch: xyz")],
     ["6:13: sizes.b.arch: unknown architecture 'xyz'; known: bert, llama, modernbert, qwen3, qwen3_moe, t5"]),
    ("unknown architecture of the family", [("type: qwen3", "type: xyz")],
     ["3:14: arch.type: unknown architecture 'xyz'; known: bert, llama, modernbert, qwen3, qwen3_moe, t5"]),
    ("grouped heads", [("hidden: 96, ffn: 384, heads: 4", "hidden: 96, ffn: 384, heads: 4, kv_heads: 2")],
     ["6:72: sizes.b.kv_heads: bert has a key/value head for each head; leave kv_heads out"]),
    ("untied", [(E, E + "tie: false, ")],
     ["7:30: sizes.e.tie: modernbert shares the embedding with its output head; leave tie out"]),
    ("experts", [("ffn: 160", "moe: {experts: 4, active: 2, ffn: 32}")],
     ["8:45: sizes.t.moe: t5 takes no experts"]),
    ("heads that do not divide", [("hidden: 96", "hidden: 98")],
     ["6:3: sizes.b: hidden 98 does not divide into 4 heads: choose other numbers"]),
    ("odd heads", [("hidden: 64, ffn: 96", "hidden: 60, ffn: 96")],
     ["7:3: sizes.e: heads of 15 (hidden / heads): rotary positions need an even number"]),
    ("another architecture's preset", [("b: {arch: bert, layers: 3, hidden: 96, ffn: 384, heads: 4}", "b: {preset: bert-base}")],
     ["6:3: sizes.b: preset 'bert-base' is bert, the family is qwen3; write arch: bert beside it"]),
    ("head_dim of a family of encoders",
     [("type: qwen3, head_dim: 32", "type: bert, head_dim: 16"), ("heads: 4, kv_heads: 2, tie: true", "heads: 2"),
      ("sizes: [s, t]", "sizes: [t]")],
     ["3:30: arch.head_dim is 16: heads of bert are hidden / heads wide, here 32"]),
    ("conversations for an encoder", [("sizes: [s, t]", "sizes: [s, e, t]")],
     ["25:29: variants.chat.sizes: kind 'sft' (sft) is not for modernbert, the architecture of size 'e'; "
      "modernbert knows pretrain or embed or rerank; sizes for sft: s, t"]),
    ("conversations for all", [("sft, sizes: [s, t]", "sft")],
     ["25:3: variants.chat: kind 'sft' (sft) is not for bert, the architecture of size 'b'; "
      "bert knows pretrain or embed or rerank; sizes for sft: s, t",
      "25:3: variants.chat: kind 'sft' (sft) is not for modernbert, the architecture of size 'e'; "
      "modernbert knows pretrain or embed or rerank; sizes for sft: s, t"]),
    ("preferences for t5", [("stage: sft, sizes: [s, t]", "stage: {s: dpo, t: dpo}, sizes: [s, t]")],
     ["25:29: variants.chat.stage.t: kind 'dpo' (dpo) is not for t5, the architecture of size 't'; "
      "t5 knows pretrain or sft; sizes for dpo: s"]),
    ("distilled encoder by its group", [("base: {stage: pretrain}", "base: {stage: {s: pretrain, t: pretrain, readers: kd}}")],
     ["24:53: variants.base.stage.readers: kind 'distill' (kd) is not for bert, the architecture of size 'b'; "
      "bert knows pretrain or embed or rerank; sizes for distill: s",
      "24:53: variants.base.stage.readers: kind 'distill' (kd) is not for modernbert, the architecture of size 'e'; "
      "modernbert knows pretrain or embed or rerank; sizes for distill: s"]),
    ("teacher without a next token", [("base: {stage: pretrain}", "base: {stage: {s: kd, t: pretrain}, sizes: [s, t]}"),
                                      ("teacher: pretrain@s", "teacher: pretrain@e")],
     ["22:50: stages.kd.teacher: 'pretrain@e' is a modernbert (size e), which gives no probability to the next token; "
      "known: s"]),
    ("start from another architecture", [("from: pretrain, data: qa", "from: pretrain@s, data: qa")],
     ["20:31: stages.sft.from: 'pretrain@s' is a qwen3 (size s), and size 't' is a t5: weights of one are none of the "
      "other's; start from a model of the same size"]),
    ("generator without words", [("qa:   {pystdlib: questions}", "qa:   {synth: arithmetic, from: code, by: pretrain@e}"),
                                 ("  dpo:      {kind: dpo, from: sft, data: prefs}\n", ""), ("kind: sft, from", "kind: grpo, rewards: [exact], from"),
                                 ("sizes: [s, t]", "sizes: [s]")],
     ["14:47: data.sources.qa.by: 'pretrain@e' is a modernbert (size e), which generates no text; known: s"]),
    ("longer than the learnt positions", [("batch_tokens: 1024}", "batch_tokens: 1024, by: {readers: {context: 256}}}")],
     ["19:86: stages.pretrain.by.readers.context: 256 is beyond the 128 positions that bert learns (size b); "
      "raise arch.context"]),
    ("rotary base of bert", [("batch_tokens: 1024}", "batch_tokens: 1024, context: 256, rope_theta: 1e5}")],
     ["19:88: stages.pretrain.rope_theta: bert has no rotary positions (size b); raise arch.context"]),
    ("fill-in-the-middle of an encoder", [("batch_tokens: 1024}", "batch_tokens: 1024, fim: 0.5}")],
     ["19:67: stages.pretrain.fim: bert has no use for it (size b); set it under 'by', for decoder sizes"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("edits", "told"), [case[1:] for case in MISTAKES], ids=[case[0] for case in MISTAKES]
)
def test_a_mistake_is_told_with_its_place(tmp_path, edits, told):
    assert problems(tmp_path, *edits) == told


def test_what_is_of_decoders_may_be_said_by_their_sizes(tmp_path):
    opened(tmp_path, ("batch_tokens: 1024}", "batch_tokens: 1024, by: {s: {fim: 0.5, rope_theta: 1e5}}}"))
