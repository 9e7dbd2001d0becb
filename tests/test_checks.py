"""All mistakes at once: those of single sections and those between them, and none that only follows from another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from famc.checks import check
from famc.errors import SpecError
from famc.graph import open_family, resolve
from famc.spec.load import drafts
from famc.steps import STAGES

ROOT = Path(__file__).parent.parent
PYDOC = (ROOT / "specs/pydoc.yaml").read_text(encoding="utf-8")

SPEC = """\
famc: 1
family: {name: pair}
arch: {type: llama, vocab_pad: 1024, context: 64}
sizes:
  s: {layers: 2, hidden: 64, ffn: 128, heads: 2}
  m: {layers: 4, hidden: 64, ffn: 128, heads: 2}
groups: {both: [s, m]}
tokenizer: {train_on: {mix: text}}
data:
  sources:
    code: {pystdlib: source}
    qa: {pystdlib: questions}
  mixes:
    text: {tokens: 50k, weights: {code: 1}}
stages:
  pretrain: {kind: pretrain, data: text}
  sft: {kind: sft, from: pretrain, data: qa}
variants:
  base: {stage: pretrain, eval: lm}
  chat: {stage: sft, sizes: both}
evals:
  lm: [{task: bits_per_byte, data: code}]
exports:
  - {variants: [chat], format: onnx, quant: int8, target: board}
gates:
  - {match: base, require: {bits_per_byte: {max: 9}}}
  - {match: "*/chat/export.*", parity: {kl: 0.1}}
targets: {board: {memory: 1GB}}
backends: {box: {cpu: 2}}
place: {default: box}
"""


def problems(text: str, **options: object) -> list[str]:
    """What resolving a spec complains about, as lines."""
    try:
        resolve(drafts(text, STAGES, file="f", **options))  # type: ignore[arg-type]
    except SpecError as error:
        return [str(p) for p in error.problems]
    return []


def edit(*pairs: tuple[str, str]) -> str:
    text = SPEC
    for old, new in pairs:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def test_sound_spec_has_no_problem() -> None:
    assert problems(SPEC) == []


def test_mistakes_of_every_sort_come_together_in_the_order_of_the_file() -> None:
    text = edit(
        ("name: pair", "name: pair, nmae: x"),
        ("vocab_pad: 1024", "vocab_pad: many"),
        ("qa: {pystdlib: questions}", "qa: {pystdlib: question}"),
        ("weights: {code: 1}", "weights: {coda: 1}"),
        ("from: pretrain", "from: pretrian"),
        ("eval: lm}", "eval: lmm}"),
        ("format: onnx", "format: onxn"),
        ("match: base, require: {bits_per_byte: {max: 9}}", "match: base"),
        ("place: {default: box}", "place: {default: bix}"),
    )
    assert problems(text) == [
        "f:2:22: unknown key 'nmae' in family; did you mean 'name'?",
        "f:3:32: arch.vocab_pad: expected a whole number, not 'many'",
        "f:12:20: data.sources.qa.pystdlib: unknown value 'question'; did you mean 'questions'?",
        "f:14:35: data.mixes.text: no source is called 'coda'; did you mean 'code'?",
        "f:17:26: stages.sft.from: no stage or variant is called 'pretrian'; did you mean 'pretrain'?",
        "f:19:33: variants.base.eval: unknown suite 'lmm'; did you mean 'lm'?",
        "f:24:32: exports.0.format: unknown value 'onxn'; did you mean 'onnx'?",
        "f:26:5: gates.0 states no condition; write one of parity, max_drop, require, beats, monotonic",
        "f:30:18: place: no backend is called 'bix'; did you mean 'box'?",
    ]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "  s: {layers: 2,",
            "  s: {layers: two,",
            "f:5:15: sizes.s.layers: expected a whole number, not 'two'",
        ),
        ("groups: {both: [s, m]}", "groups: {both: s}", "f:7:16: groups.both: expected a list, not 's'"),
        ("code: {pystdlib: source}", "code: 3", "f:11:11: data.sources.code: expected a mapping, not 3"),
        (
            "text: {tokens: 50k, weights: {code: 1}}",
            "text: [code]",
            "f:14:11: data.mixes.text: expected a mapping, not a list",
        ),
        (
            "kind: pretrain",
            "kind: pretrian",
            "f:16:20: unknown kind 'pretrian' in stages.pretrain; did you mean 'pretrain'?",
        ),
        (
            "{stage: pretrain, eval: lm}",
            "{eval: lm}",
            "f:19:3: variants.base needs 'stage'; a stage, or stages by size or group",
        ),
        (
            "{stage: sft, sizes: both}",
            "{stages: sft, sizes: both}",
            "f:20:10: unknown key 'stages' in variants.chat; did you mean 'stage'?",
        ),
        (
            "lm: [{task: bits_per_byte, data: code}]",
            "lm: bits",
            "f:22:7: evals.lm: expected a list, not 'bits'",
        ),
        (
            "board: {memory: 1GB}",
            "board: {memory: much}",
            "f:28:27: targets.board.memory: expected an amount such as 20GB, not 'much'",
        ),
        ("box: {cpu: 2}", "box: 2", "f:29:17: backends.box: expected a mapping, not 2"),
        ("sizes:\n", "size:\n", "f:4:1: unknown key 'size' in the spec; did you mean 'sizes'?"),
        ("stages:\n", "stage:\n", "f:15:1: unknown key 'stage' in the spec; did you mean 'stages'?"),
        ("variants:\n", "variant:\n", "f:18:1: unknown key 'variant' in the spec; did you mean 'variants'?"),
        ("targets: {", "target: {", "f:28:1: unknown key 'target' in the spec; did you mean 'targets'?"),
        ("data:\n", "dat:\n", "f:9:1: unknown key 'dat' in the spec; did you mean 'data'?"),
        (
            "arch: {type: llama, vocab_pad: 1024, context: 64}\n",
            "",
            "f:1:1: the spec needs 'arch'; the architecture",
        ),
        ("format: onnx", "formt: onnx", "f:24:24: unknown key 'formt' in exports.0; did you mean 'format'?"),
        ("match: base,", "math: base,", "f:26:6: unknown key 'math' in gates.0; did you mean 'match'?"),
        ("quant: int8", "quant: 8", "f:24:45: exports.0.quant: expected a list, not 8"),
        (
            "from: pretrain, data: qa",
            "from: 1, data: qa",
            "f:17:26: stages.sft.from: expected text, not 1; quote it",
        ),
        ("data: qa}", "data: }", "f:17:36: stages.sft needs 'data'; known: code, qa, text"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else None,
)
def test_what_is_left_out_is_not_reported_again_where_it_is_used(old: str, new: str, expected: str) -> None:
    """Each of these names is used elsewhere: one mistake stays one line."""
    if expected.startswith("f:17:36: stages.sft needs"):
        expected = expected.replace("17:36", "17:3")  # an empty value is no value
    assert problems(SPEC.replace(old, new, 1)) == [expected]


def test_two_mistakes_in_one_entry_are_both_told() -> None:
    text = edit(
        ("{kind: sft, from: pretrain, data: qa}", "{kind: sft, from: pretain, data: qo, epoch: 2, clip: -1}")
    )
    assert problems(text) == [
        "f:17:26: stages.sft.from: no stage or variant is called 'pretain'; did you mean 'pretrain'?",
        "f:17:41: stages.sft.data: no mix or source is called 'qo'; known: code, qa, text",
        "f:17:45: unknown key 'epoch' in stages.sft; did you mean 'epochs'?",
        "f:17:61: stages.sft.clip: must be more than 0, not -1",
    ]


def test_list_members_keep_their_numbers_when_one_before_them_is_wrong() -> None:
    text = edit(
        ("  - {match: base, require: {bits_per_byte: {max: 9}}}", "  - {require: 3}"), ("export.*", "exprt.*")
    )
    assert problems(text) == [
        "f:26:5: gates.0 needs 'match'; glob over addresses: */instruct, */*/export.*, or a variant's name",
        "f:26:15: gates.0.require: expected a mapping, not 3",
        "f:27:13: gates.1: '*/chat/exprt.*' matches no export; exports are called s/chat/export.onnx-int8",
    ]


def test_mistakes_through_set_name_the_option() -> None:
    assert problems(SPEC, sets=["stages.sft.epoch=2", "stages.stf.epochs=1", "sizes.s.heads=0"]) == [
        "--set stages.stf.epochs=1: 'stages.stf.epochs': stages has no 'stf'; did you mean 'sft'?",
        "--set stages.sft.epoch=2: unknown key 'epoch' in stages.sft; did you mean 'epochs'?",
        "--set sizes.s.heads=0: sizes.s.heads: must be at least 1, not 0",
    ]


def test_rehearsal_checks_the_spec_as_it_is_written() -> None:
    """Smoke replaces sizes: a size that can't be must not pass for that."""
    wrong = edit(("  s: {layers: 2, hidden: 64, ffn: 128, heads: 2}", "  s: {layers: 2}"))
    assert problems(wrong, smoke=True) == ["f:5:3: sizes.s: needs hidden and heads as well"]


def _by(text: str) -> str:
    return SPEC.replace("data: qa}", f"data: qa, by: {{s: {text}}}}}")


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: _by("{data: qo}"), "f:17:61: stages.sft.by.s.data: no mix or source is called 'qo'; known: code, qa, text"),
        (lambda: _by("{data: text}"), "f:17:61: stages.sft.by.s.data: 'text' is of format 'text', kind 'sft' reads messages; for example qa"),
        (lambda: _by("{batch_tokens: 100}"), "f:17:69: stages.sft.by.s: 100 batch tokens are not a whole number of rows of 64 tokens; make one a multiple of the other"),
        (lambda: _by("{lr: {peak: 99}}"), "f:17:66: stages.sft.by.s.lr.peak: must be at most 10, not 99"),
    ],
    ids=["unknown data", "wrong format", "uneven rows", "too fast"],
)  # fmt: skip
def test_overrides_are_checked_like_the_stage_itself(make: Callable[[], str], expected: str) -> None:
    assert problems(make()) == [expected]


def test_gate_that_compares_nothing_is_told() -> None:
    lonely = edit(
        ("{match: base, require: {bits_per_byte: {max: 9}}}", "{match: base, across: sizes, monotonic: lm}")
    )
    one_size = lonely.replace("{stage: pretrain, eval: lm}", "{stage: pretrain, sizes: [s], eval: lm}")
    assert problems(lonely) == []
    assert problems(one_size) == ["f:26:13: gates.0: 'base' compares nothing: it has no two sizes to compare"]


def test_generated_evaluation_data_may_not_need_the_model_it_scores() -> None:
    """Training text is cleaned of evaluation text: data that a model makes can't also score what trains it."""
    text = edit(
        (
            "    qa: {pystdlib: questions}",
            "    qa: {pystdlib: questions}\n    made: {synth: arithmetic, by: base@s}",
        ),
        ("{task: bits_per_byte, data: code}", "{task: answers, data: made}"),
    )
    assert [p for p in problems(text) if "needed before" in p] == [
        "f:13:35: data is needed before the step that makes it: s/pretrain <- s/pretrain; cut it at 'by'"
    ]


def test_local_files_that_are_too_many_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("famc.steps.files.MOST", 3)
    for index in range(20):
        (tmp_path / f"{index}.txt").write_text("x")
    text = edit(("{pystdlib: source}", "{path: .}"))
    assert problems(text, folder=tmp_path) == [
        "f:11:18: data.sources.code.path: more than 3 files are there: name a smaller folder"
    ]


def test_check_alone_tells_the_problems_of_the_reading_too() -> None:
    spec = drafts(edit(("heads: 2}\n  m", "head: 2}\n  m")), STAGES, file="f")
    assert [str(p) for p in check(spec)] == ["f:5:40: unknown key 'head' in sizes.s; did you mean 'heads'?"]


def test_every_shipped_spec_is_sound() -> None:
    for file in sorted((ROOT / "specs").glob("*.yaml")):
        open_family(file)
