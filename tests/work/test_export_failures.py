"""What goes wrong while an export is made: nothing half-written counts as made, and the reason is told."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_artifacts import make_model, make_tokenizer

from famc.job import Job
from famc.steps.exports import DEFAULT_QUANT
from famc.store import Store

ROOT = Path(__file__).resolve().parents[2]
EXPORTS = {
    "safetensors-fp32": {"format": "safetensors", "quant": "fp32"},
    "onnx-fp32": {"format": "onnx", "quant": "fp32"},
    "onnx-int4": {"format": "onnx", "quant": "int4", "block_size": 32, "algorithm": "k_quant", "symmetric": False,
                  "lm_head": "int8", "embeddings": "int8"},
    "gguf-f16": {"format": "gguf", "quant": "f16", "name": "tiny"},
}  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store that holds one model."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("store")
    tokenizer = make_tokenizer(root / "tokenizer")
    made = Store(root / "store")
    folder = made.partial("xs/sft", "a" * 64)
    folder.parent.mkdir(parents=True, exist_ok=True)
    make_model(folder, tokenizer)
    made.commit(
        "xs/sft", "a" * 64, {"name": "xs/sft", "kind": "sft", "key": "a" * 64, "inputs": {}, "metrics": {}}
    )
    return made


def job(store: Store, label: str) -> Job:
    return Job(
        name=f"xs/instruct/export.{label}", kind="export", key="b" * 64, store=str(store.root), params=EXPORTS[label],
        inputs={"model": ("xs/sft", "a" * 64)},
    )  # fmt: skip


def run(made: Job, tmp_path: Path, *, most: int | None = None) -> subprocess.CompletedProcess[str]:
    """The worker as the build starts it; no file may grow over `most` bytes, as on a disk that is full."""
    file = tmp_path / "job.json"
    file.write_text(made.to_json())

    def limit() -> None:
        if most is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "famc.work", str(file)], capture_output=True, text=True, env=env, preexec_fn=limit,
        check=False,
    )  # fmt: skip


@pytest.mark.parametrize("label", EXPORTS)
def test_no_room_on_the_disk_leaves_no_artifact_and_says_so(store, tmp_path, label):
    made = job(store, label)
    ended = run(made, tmp_path, most=100_000)  # less than any of the files takes
    assert ended.returncode == 1
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith(f"error: {made.name}: no room for it on the disk of {store.root}")
    assert "Traceback" not in ended.stderr
    assert not store.has(made.name, made.key)
    partial = store.partial(made.name, made.key)
    left = (
        [p for p in partial.rglob("*") if p.is_file() and p.stat().st_size > 100_000]
        if partial.exists()
        else []
    )
    assert left == []


@pytest.mark.parametrize("label", EXPORTS)
def test_the_same_command_works_once_there_is_room(store, tmp_path, label):
    """What the failed run left does not get into the artifact."""
    made = job(store, label)
    run(made, tmp_path, most=100_000)
    assert run(made, tmp_path).returncode == 0
    files = set(store.record(made.name, made.key)["files"])
    assert not [name for name in files if ".onnx-" in name or ".gguf-" in name or ".folded-" in name]
    shutil.rmtree(store.path(made.name, made.key))


@pytest.mark.parametrize("label", EXPORTS)
@pytest.mark.parametrize("harm", ["cut", "gone"])
def test_a_damaged_source_is_noticed_before_anything_is_written(store, tmp_path, label, harm):
    weights = store.path("xs/sft", "a" * 64) / "model.safetensors"
    whole = weights.read_bytes()
    try:
        weights.unlink()
        if harm == "cut":
            weights.write_bytes(whole[:-1000])
        made = job(store, label)
        ended = run(made, tmp_path)
        assert ended.returncode == 1
        assert "xs/sft: model.safetensors is not what its record says" in ended.stderr
        assert "famc verify" in ended.stderr and "Traceback" not in ended.stderr
        assert not store.has(made.name, made.key)
    finally:
        weights.unlink(missing_ok=True)
        weights.write_bytes(whole)


def test_every_format_with_a_worker_is_tried_here_or_needs_data(store):
    """A new format must say here what it leaves behind; gptq and awq are safetensors after a calibration."""
    tried = {params["format"] for params in EXPORTS.values()}
    assert set(DEFAULT_QUANT) - tried == {"gptq", "awq", "fp8"}
    assert json.loads(job(store, "gguf-f16").to_json())["params"]["format"] == "gguf"
