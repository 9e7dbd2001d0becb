"""The README says what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from famc.cli import COMMANDS, _parser
from famc.graph import open_family
from famc.report.reference import exports_table, kinds_table
from famc.schema import json_schema

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_tables_of_kinds_and_exports_are_the_codes_own() -> None:
    assert kinds_table() in README
    assert exports_table() in README


def test_the_example_in_the_readme_is_a_valid_family(tmp_path: Path) -> None:
    example = re.search(r"```yaml\n(famc: 1.*?)```", README, re.S)
    assert example is not None
    file = tmp_path / "family.yaml"
    file.write_text(example[1], encoding="utf-8")
    graph = open_family(file)
    assert {"m/pretrain", "s/kd", "m/instruct/export.onnx-int4", "s/instruct/gate.beats-base"} <= set(
        graph.nodes
    )


def test_every_command_is_in_the_readme_and_every_command_there_exists() -> None:
    named = set(re.findall(r"^\| `famc (\w+)", README, re.M))
    assert named == set(COMMANDS)


@pytest.mark.parametrize(
    "line",
    [
        line
        for block in re.findall(r"```sh\n(.*?)```", README, re.S)
        for line in block.splitlines()
        if "famc " in line
    ],
)
def test_commands_in_the_readme_parse(line: str) -> None:
    for words in re.findall(
        r"\bfamc ((?:validate|plan|build|status|why|show|graph|verify|gc|schema|bench|doctor|estimate|calibrate)[^&|]*)",
        line.partition(" #")[0],
    ):
        assert _parser().parse_args(words.split()).run


def test_the_committed_schema_is_current() -> None:
    import json

    committed = json.loads((ROOT / "specs" / "famc.schema.json").read_text(encoding="utf-8"))
    assert committed == json.loads(json.dumps(json_schema())), "run: famc schema > specs/famc.schema.json"


@pytest.mark.parametrize("spec", sorted((ROOT / "specs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_example_spec_resolves(spec: Path) -> None:
    assert len(open_family(spec).nodes) > 30


def test_the_exports_in_the_readme_are_valid_and_the_refusal_is_the_programs(tmp_path: Path) -> None:
    example, exports = (
        re.search(r"```yaml\n(famc: 1.*?)```", README, re.S),
        re.search(r"```yaml\n(exports:\n.*?)```", README, re.S),
    )
    assert example is not None and exports is not None
    whole = re.sub(r"^exports: .*\n", lambda _: exports[1], example[1], flags=re.M)
    file = tmp_path / "family.yaml"
    file.write_text(whole, encoding="utf-8")
    nodes = open_family(file).nodes
    assert {"m/instruct/export.onnx-fp16", "s/instruct/release.gguf", "s/instruct/release.gptq.int4"} <= set(
        nodes
    )
    from famc.steps.exports import nearest

    assert nearest("qwen3_moe", "text-generation", "onnx", "fp16") in README
