"""Files, profiles, --set, and specs that chance has spoilt."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_spec import SPEC

from famc.errors import SpecError, UsageError
from famc.graph import open_family, resolve
from famc.plan import keys
from famc.spec.load import drafts, load, loads
from famc.spec.quantity import count, size_in_bytes
from famc.spec.text import parse
from famc.steps import STAGES


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfef", "1:1: byte 0xff is not UTF-8; save the file as UTF-8"),
        (b"famc: 1\nfamily: {name: caf\xe9}\n", "2:1: byte 0xe9 is not UTF-8; save the file as UTF-8"),
        (b"", "1:1: the spec is empty; it starts with 'famc: 1'; famc init writes a first one"),
    ],
)
def test_file_that_is_no_text(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "x.yaml"
    file.write_bytes(content)
    with pytest.raises(SpecError) as error:
        open_family(file)
    assert str(error.value) == f"{file}:{message}"


@pytest.mark.parametrize("mark", ["\ufeff", "# a comment\n", "---\n"])
def test_byte_order_mark_comment_and_document_start_are_harmless(tmp_path: Path, mark: str) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(mark + SPEC.replace("\n", "\r\n"), encoding="utf-8", newline="")
    assert load(file, STAGES).family.family.name == "pocket"


def test_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        open_family(tmp_path / "none.yaml")
    with pytest.raises(UsageError, match="Is a directory"):
        open_family(tmp_path)


def test_set_wins_over_profile_which_wins_over_the_file() -> None:
    spec = loads(SPEC, STAGES, file="x.yaml", profile="quick", sets=["stages.sft.epochs=3"])
    assert spec.family.data.mixes["text"].tokens == 50_000
    assert spec.origin(("data", "mixes", "text", "tokens")) == "profile quick"
    assert spec.origin(("stages", "sft", "epochs")) == "--set stages.sft.epochs"
    assert spec.origin(("stages", "dpo", "beta")) == "x.yaml:23"
    assert spec.origin(("stages", "dpo", "loss")) is None


def test_set_takes_yaml_values_names_with_dots_and_list_items() -> None:
    text = (
        SPEC.replace("  m: {layers", "  0.6b: {layers")
        .replace("[s, m]", "[s, 0.6b]")
        .replace("m: pretrain", "0.6b: pretrain")
    )
    text = text.replace("pretrain@m", "pretrain@0.6b").replace('"m/pretrain"', '"0.6b/pretrain"')
    sets = [
        "sizes.0.6b.layers=6",
        "exports.1.quant=[int8]",
        "stages.sft.lr=3e-4",
        "data.mixes.text.weights={code: 1}",
    ]
    family = loads(text, STAGES, sets=sets).family
    assert family.sizes["0.6b"].layers == 6
    assert family.exports[1].quant == ("int8",)
    assert family.stages["sft"].lr.peak == 3e-4  # type: ignore[attr-defined]
    assert dict(family.data.mixes["text"].weights) == {"code": 1.0}


def test_set_puts_a_mapping_in_the_place_of_a_number() -> None:
    family = loads(
        SPEC.replace("epochs: 2}", "lr: 1e-4}"), STAGES, sets=["stages.sft.lr.schedule=linear"]
    ).family
    assert family.stages["sft"].lr.schedule == "linear"  # type: ignore[attr-defined]


@pytest.mark.parametrize("text", ["stages.sft.lr", "=1", ""])
def test_set_without_path_or_value_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="expected path=value"):
        loads(SPEC, STAGES, sets=[text])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stage.sft.lr=1", "'stage.sft.lr': nothing is called 'stage'; did you mean 'stages'?"),
        ("stages.stf.lr=1", "'stages.stf.lr': stages has no 'stf'; did you mean 'sft'?"),
        ("data.mixes.txt.tokens=1", "'data.mixes.txt.tokens': data.mixes has no 'txt'; did you mean 'text'?"),
        ("exports.9.format=onnx", "'exports.9.format': no item 9 in a list of 2"),
        ("exports.2.format=onnx", "'exports.2.format': no item 2 in a list of 2"),
        ("exports.²=x", "'exports.²': no item '²' in a list of 2"),
        ("stages.sft.lr=[", "the file ends inside brackets or quotes; close what is open"),
        ("stages.sft.lr=1\nx: 2", "expected one value"),
        ("family.seed=-1", "family.seed: must be at least 0, not -1"),
    ],
)
def test_set_that_leads_nowhere(text: str, message: str) -> None:
    with pytest.raises(SpecError) as error:
        loads(SPEC, STAGES, sets=[text])
    assert [p.message + (f"; {p.hint}" if p.hint else "") for p in error.value.problems] == [message]
    assert str(error.value.problems[0].where) == f"--set {text}"


def test_unknown_profile_is_a_usage_error_with_a_suggestion() -> None:
    with pytest.raises(UsageError) as error:
        loads(SPEC, STAGES, file="x.yaml", profile="quik")
    assert error.value.render() == "no profile 'quik' in x.yaml\nhint: did you mean 'quick'?"


def test_mistake_in_a_profile_is_told_whether_it_is_used_or_not() -> None:
    text = SPEC.replace("stages.sft.epochs: 1", "stages.sft.epoch: 1")
    expected = "family.yaml:44:40: unknown key 'epoch' in stages.sft; did you mean 'epochs'?"
    for profile in (None, "quick"):
        with pytest.raises(SpecError) as error:
            loads(text, STAGES, profile=profile)
        assert str(error.value) == expected


@pytest.mark.parametrize(
    ("text", "amount"),
    [("30T", 30 * 10**12), ("1.2M", 1_200_000), ("2.3B", 2_300_000_000), ("16k", 16_000), ("3e6", 3_000_000), (4096, 4096), (3e6, 3_000_000), ("0.1k", 100)],
)  # fmt: skip
def test_counts(text: object, amount: int) -> None:
    assert count(text) == amount


@pytest.mark.parametrize(
    ("text", "amount"), [("20GB", 20 * 10**9), ("4GiB", 4 * 2**30), ("5 MB", 5_000_000), ("7", 7)]
)
def test_bytes(text: object, amount: int) -> None:
    assert size_in_bytes(text) == amount


@pytest.mark.parametrize(
    "text", ["", "M", "1.5", "-1", "1e400", "3 X", "٣M", True, None, [], float("nan"), float("inf"), 10**30]
)
def test_what_is_no_count(text: object) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        count(text)


# --- chance ---------------------------------------------------------------------------------------------------------

PLAIN: dict[str, Any] = parse(SPEC, "f")[0].data


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(p for key, item in inner for p in _paths(item, (*path, key)))]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**20) | st.floats() | st.text(max_size=12)
    | st.sampled_from(["base", "m", "s", "text", "qa", "sft@m", "@", "instruct@s", "*", "[", "/x", "..", "{size}", "3M"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def _flow(value: Any) -> str:
    """A value as YAML in flow style."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)}: {_flow(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if isinstance(value, float) and value - value != 0:
        return ".nan" if value != value else ".inf" if value > 0 else "-.inf"
    return json.dumps(value)


def survive(text: str) -> None:
    """A spec resolves and has keys, or its mistakes are told with places, in words of famc's own."""
    try:
        keys(resolve(drafts(text, STAGES, file="f")))
    except SpecError as error:
        assert error.problems
        for problem in error.problems:
            line = str(problem)
            line.encode("utf-8")
            assert line.startswith("f:"), line
            assert len(line) < 900, line
            for leak in ("Input should", "pydantic", "lost", "validation error", "Traceback"):
                assert leak not in line or leak in text, line


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    path=st.sampled_from(_paths(PLAIN)[1:]),
    value=VALUES,
    how=st.sampled_from(["replace", "remove", "add", "copy"]),
    other=st.sampled_from(_paths(PLAIN)[1:]),
)
def test_any_value_anywhere_ends_in_a_graph_or_in_told_mistakes(
    path: tuple[Any, ...], value: Any, how: str, other: tuple[Any, ...]
) -> None:
    data = copy.deepcopy(PLAIN)
    parent = data
    for part in path[:-1]:
        parent = parent[part]
    if how == "remove":
        del parent[path[-1]]
    elif how == "add" and isinstance(parent, dict):
        parent[str(other[-1])] = value
    elif how == "copy":
        found: Any = PLAIN
        for part in other:
            found = found[part]
        parent[path[-1]] = copy.deepcopy(found)
    else:
        parent[path[-1]] = value
    survive(_flow(data))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    at=st.integers(0, len(SPEC) - 1),
    length=st.integers(0, 20),
    new=st.text(max_size=4) | st.sampled_from(list("{}[]:,#&*!|>'\"%@`\t\n -?~")),
)
def test_any_change_of_the_text_ends_in_a_graph_or_in_told_mistakes(at: int, length: int, new: str) -> None:
    text = SPEC[:at] + new + SPEC[at + length :]
    survive(text)
