"""Exports on devices: which fit, how fast they answer, and what a plan shows of that."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fake_build import SPEC, write_spec

from famc.cli import main
from famc.cost.deploy import Target
from famc.deployment import deployments
from famc.errors import SpecError, UsageError
from famc.graph import Graph, open_family

TARGETS = SPEC.replace(
    "gates:\n", "targets: {board: {device: raspberry-pi-4, context: 64}, box: {memory: 1GB}}\ngates:\n"
)
BOUND = ("quant: [fp32, int4], target: cpu}", "quant: [fp32, int4], target: [cpu, board]}\n"
         "  - {variants: [base], format: safetensors, quant: bf16}")  # fmt: skip


def family(folder: Path, *edits: tuple[str, str], text: str = TARGETS) -> Graph:
    return open_family(write_spec(folder, *edits, text=text))


def test_a_target_shows_the_exports_that_must_run_on_it_else_all(tmp_path: Path) -> None:
    made = family(tmp_path, BOUND)
    rows = deployments(made, made.nodes)
    by = {target: {r.export for r in rows if r.fit.target == target} for target in ("board", "box")}
    assert by["board"] == {f"{s}/instruct/export.onnx-{q}" for s in "ms" for q in ("fp32", "int4")}
    assert by["box"] == by["board"] | {f"{s}/base/export.safetensors-bf16" for s in "ms"}
    assert all(r.required == (r.fit.target == "board") for r in rows)


def test_only_what_has_a_device_has_a_speed(tmp_path: Path) -> None:
    made = family(tmp_path)
    for row in deployments(made, made.nodes):
        told = row.to_dict()
        assert (told["decode_tokens_per_second"] is None) == (row.fit.target == "box")
        assert json.dumps(told, allow_nan=False)
        if row.fit.speed is not None:
            assert row.fit.speed.prefill > 0
            low, high = told["decode_interval"]
            assert low < told["decode_tokens_per_second"] < high


def test_devices_of_the_command_line_come_instead_of_the_specs(tmp_path: Path) -> None:
    made = family(tmp_path)
    rows = deployments(made, made.nodes, ["rtx4090", "oneplus-12"])
    assert {r.fit.target for r in rows} == {"rtx4090", "oneplus-12"}
    assert (
        deployments(made, ["m/instruct/export.onnx-int4"], ["rtx4090"])[0].export
        == "m/instruct/export.onnx-int4"
    )
    assert deployments(made, [], ["rtx4090"]) == ()
    with pytest.raises(UsageError, match="no device is called 'rtx4009'") as error:
        deployments(made, made.nodes, ["rtx4009"])
    assert "rtx4090" in error.value.hint


def test_what_is_too_large_names_the_largest_size_that_is_not(tmp_path: Path) -> None:
    made = open_family(Path(__file__).parents[1] / "specs" / "qwen3like.yaml")
    rows = {(r.export, r.fit.target): r.fit for r in deployments(made, made.nodes, ["rtx4090", "h100-80g"])}
    # 30.5 B parameters at 8.5 bits are 32.4 GB: more than 24 GB, less than 80
    assert not rows["30b-a3b/instruct/export.gguf-q8_0", "rtx4090"].fits
    assert rows["30b-a3b/instruct/export.gguf-q8_0", "h100-80g"].fits
    assert rows["30b-a3b/instruct/export.gguf-q8_0", "rtx4090"].largest == "14b"
    assert rows["30b-a3b/instruct/export.gguf-q8_0", "rtx4090"].weights == pytest.approx(32.4e9, rel=0.01)


def test_the_check_and_the_table_have_one_verdict(tmp_path: Path) -> None:
    """The largest memory that the check refuses is just below what the table says is needed."""
    edit = ("quant: [fp32, int4], target: cpu}", "quant: [fp32, int4], target: box}")
    made = family(tmp_path, edit)
    need = max(r.fit.total for r in deployments(made, made.nodes) if r.fit.target == "box")
    fits = TARGETS.replace("memory: 1GB", f"memory: {int(need) + 1}")
    assert all(r.fit.fits for r in deployments(family(tmp_path, edit, text=fits), made.nodes))
    with pytest.raises(
        SpecError,
        match=r"toy\.yaml:\d+:\d+: exports\.0: m as onnx fp32 needs .* the largest size that fits is s",
    ):
        family(tmp_path, edit, text=TARGETS.replace("memory: 1GB", f"memory: {int(need) - 1}"))


def test_a_plan_shows_the_specs_targets_and_others_on_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(write_spec(tmp_path, text=TARGETS))
    out = ["--out", str(tmp_path / "out")]
    assert main(["plan", file, *out]) == 0
    text = capsys.readouterr().out
    assert "on board: " in text and "on box: 1 GB usable" in text
    assert "tok/s" in text
    assert main(["plan", file, *out, "--targets", "rtx4090", "--json"]) == 0
    assert {row["target"] for row in json.loads(capsys.readouterr().out)["targets"]} == {"rtx4090"}
    assert main(["plan", file, *out, "--targets"]) == 0
    assert "on h100-80g: " in capsys.readouterr().out
    plain = str(write_spec(tmp_path))
    assert main(["plan", plain, *out]) == 0
    assert "usable" not in capsys.readouterr().out


def test_a_target_needs_something_to_be() -> None:
    with pytest.raises(ValueError, match="neither a device nor its memory"):
        Target("nothing")
