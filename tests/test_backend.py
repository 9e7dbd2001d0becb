"""Accelerator files, and what this machine is found to be."""

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from famc.backend import (
    Accelerator,
    UnknownAccelerator,
    cpu_precision,
    detect_cpu,
    load_accelerator,
    packaged_dir,
)

NAMES = sorted(p.stem for p in packaged_dir().glob("*.yaml"))
SHIPPED = {
    "v100-32g", "a100-40g", "a100-80g", "a10g", "l4", "l40s", "rtx3090", "rtx4090", "rtx5090",
    "h100-80g", "h100-pcie", "h200-141g", "b200", "mi300x", "cpu",
}  # fmt: skip
MINIMAL = """
name: {name}
kind: gpu
peak_tflops: {{ bf16: 10 }}
efficiency: {{ bf16: 0.5 }}
memory_gb: {memory}
bandwidth_gbs: 100
tdp_w: 100
sources: {{ memory_gb: here }}
"""


def test_the_promised_accelerators_are_shipped() -> None:
    assert set(NAMES) >= SHIPPED


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_of_a_shipped_accelerator_has_its_source(name: str) -> None:
    accelerator = load_accelerator(name)
    figures = {"peak_tflops", "efficiency", "memory_gb", "bandwidth_gbs", "tdp_w"}
    if accelerator.kind == "gpu":
        figures |= {"intranode_gbs", "internode_gbs"}
    assert figures <= set(accelerator.sources)
    assert set(accelerator.efficiency) <= set(accelerator.peak_tflops)
    if accelerator.usd_per_hour is not None:
        assert accelerator.usd_per_hour.date.startswith("20")


def test_names_and_aliases_are_unique() -> None:
    taken = [n for name in NAMES for n in (name, *load_accelerator(name).aliases)]
    assert len(taken) == len(set(taken))


def test_an_alias_is_the_same_accelerator() -> None:
    assert load_accelerator("h100") == load_accelerator("h100-80g")


@pytest.mark.parametrize("wrong", ["h100-80gb", "H100-80G", "a100-90g"])
def test_an_unknown_name_gets_near_ones(wrong: str) -> None:
    with pytest.raises(UnknownAccelerator) as caught:
        load_accelerator(wrong)
    assert caught.value.name == wrong
    assert caught.value.candidates[0][:4] == wrong[:4].lower()


def test_a_name_is_never_a_path(tmp_path: Path) -> None:
    (tmp_path / "secret.yaml").write_text(MINIMAL.format(name="secret", memory=1))
    (tmp_path / "backends").mkdir()
    with pytest.raises(UnknownAccelerator):
        load_accelerator("../secret", tmp_path)


def test_the_users_folder_wins_and_adds(tmp_path: Path) -> None:
    folder = tmp_path / "backends"
    folder.mkdir()
    (folder / "mine.yaml").write_text(MINIMAL.format(name="mine", memory=7))
    (folder / "h100-80g.yaml").write_text(MINIMAL.format(name="h100-80g", memory=96))
    spec = tmp_path / "family.yaml"
    spec.write_text("")
    for beside in (tmp_path, spec):
        assert load_accelerator("mine", beside).memory_gb == 7
        assert load_accelerator("h100-80g", beside).memory_gb == 96
        assert load_accelerator("l4", beside).name == "l4"
    assert load_accelerator("h100-80g").memory_gb == 80


@pytest.mark.parametrize(
    "line",
    ["colour: red", "memory_gb: -1", "sources: { colour: x }", "efficiency: { bf16: 2 }", "kind: fpga"],
)
def test_a_wrong_file_is_refused(line: str) -> None:
    from ruamel.yaml import YAML

    data = YAML(typ="safe").load(MINIMAL.format(name="x", memory=1))
    Accelerator.model_validate(data)
    with pytest.raises(ValidationError):
        Accelerator.model_validate(data | YAML(typ="safe").load(line))


def test_training_precision_follows_the_hardware() -> None:
    assert load_accelerator("h100-80g").training_precision()[0] == "bf16"
    assert load_accelerator("v100-32g").training_precision()[0] == "fp16"
    assert load_accelerator("cpu").training_precision()[0] == "fp32"


def machine(
    root: Path, *, flags: str, mem_kb: int, cgroup: str = "/", limits: dict[str, dict[str, str]]
) -> Path:
    for name, text in {
        "proc/cpuinfo": f"processor\t: 0\nflags\t\t: {flags}\n",
        "proc/meminfo": f"MemTotal:  {mem_kb} kB\nMemFree: 1 kB\n",
        "proc/self/cgroup": f"0::{cgroup}\n",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    for folder, files in limits.items():
        for name, text in files.items():
            path = root / "sys/fs/cgroup" / folder.lstrip("/") / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return root


def test_a_bare_machine_is_its_affinity_and_memory(tmp_path: Path) -> None:
    root = machine(tmp_path, flags="fpu avx2 avx512f avx512_bf16", mem_kb=32_000_000, limits={})
    cpu = detect_cpu(root, affinity=6)
    assert cpu.cores == 6
    assert cpu.memory_gb == pytest.approx(32_000_000 * 1024 / 1e9)
    assert cpu.basis == "assumed"
    assert cpu.training_precision()[0] == "bf16"


def test_the_tightest_cgroup_of_the_chain_holds(tmp_path: Path) -> None:
    limits = {
        "/": {"cpu.max": "max 100000\n", "memory.max": "max\n"},
        "/pod": {"cpu.max": "250000 100000\n", "memory.max": "8000000000\n"},
        "/pod/job": {"cpu.max": "max 100000\n", "memory.max": "9000000000\n"},
    }
    root = machine(tmp_path, flags="avx2", mem_kb=64_000_000, cgroup="/pod/job", limits=limits)
    cpu = detect_cpu(root, affinity=16)
    assert cpu.cores == 2
    assert cpu.memory_gb == pytest.approx(8.0)
    assert "bf16" not in cpu.peak_tflops


def test_a_machine_that_says_nothing_still_gets_an_answer(tmp_path: Path) -> None:
    cpu = detect_cpu(tmp_path, affinity=1)
    assert cpu.cores == 1
    assert cpu.memory_gb > 0


@pytest.mark.parametrize(
    ("flags", "precision", "names"),
    [
        ({"amx_bf16", "avx512_bf16"}, "bf16", "AMX"),
        ({"avx512_bf16"}, "bf16", "AVX512"),
        ({"avx2"}, "fp32", "neither"),
    ],
)
def test_cpu_precision_follows_the_instruction_set(flags: set[str], precision: str, names: str) -> None:
    chosen, reason = cpu_precision(frozenset(flags))
    assert chosen == precision
    assert names in reason


def test_fewer_cores_are_slower_and_keep_the_memory() -> None:
    cpu = load_accelerator("cpu")
    one = cpu.with_cores(1)
    assert one.device.peak("fp32") < cpu.device.peak("fp32")
    assert one.memory_gb == cpu.memory_gb


def test_planning_imports_no_heavy_library() -> None:
    code = (
        "import sys, famc.backend, famc.cost.roofline, famc.cost.money;"
        "famc.backend.load_accelerator('h100');"
        "bad = {'torch', 'transformers', 'numpy', 'datasets', 'trl'} & set(sys.modules);"
        "sys.exit(f'imported {bad}' if bad else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
