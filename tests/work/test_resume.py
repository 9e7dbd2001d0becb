"""A killed job goes on where its last checkpoint is, and leaves the very bytes that an undisturbed one
leaves.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_artifacts import CHATS
from tiny_training import chat_mix, make_job, pair_mix, run, text_mix, tokenizer

from famc.errors import StepFailed
from famc.job import Job
from famc.store import Store
from famc.work import runner
from famc.work.training import last_checkpoint

KEYS = {
    name: str(index) * 64 for index, name in enumerate(("tokenizer", "text", "chat", "pairs", "parent"), 1)
}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
RUNS: dict[str, dict[str, Any]] = {
    "pretrain": {"steps": 160, "optimizer": "muon"},
    "sft": {"steps": 160, "lora": {"r": 4, "dropout": 0.1}},
    "dpo": {"steps": 60, "global_batch": 4, "context": 96},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store with all that the jobs read."""
    found = Store(tmp_path_factory.mktemp("store"))
    folders = {name: found.partial(name, key) for name, key in KEYS.items()}
    tokenizer(folders["tokenizer"])
    text_mix(folders["text"])
    chat_mix(folders["chat"], CHATS * 4)
    pair_mix(folders["pairs"])
    run(make_job("pretrain"), {"tokenizer": folders["tokenizer"], "data": folders["text"]}, folders["parent"])
    shutil.rmtree(folders["parent"] / "checkpoints")
    for name, key in KEYS.items():
        found.commit(name, key, {"name": name, "key": key})
    return found


def job_of(kind: str, store: Store, key: str) -> Job:
    data = {"pretrain": "text", "sft": "chat", "dpo": "pairs"}[kind]
    names = {"tokenizer": "tokenizer", "data": data} | ({} if kind == "pretrain" else {"model": "parent"})
    job = make_job(kind, checkpoint_steps=20, **RUNS[kind])
    read = {role: (name, KEYS[name]) for role, name in names.items()}
    return dataclasses.replace(job, key=key * 64, store=str(store.root), inputs=read)


def start(job: Job, folder: Path) -> subprocess.Popen[bytes]:
    folder.mkdir(exist_ok=True)
    file = folder / f"{job.key[:4]}.json"
    file.write_text(job.to_json())
    log = (folder / f"{job.key[:4]}.log").open("ab")
    return subprocess.Popen(
        [sys.executable, "-m", "famc.work", str(file)], env=ENVIRONMENT, stdout=log, stderr=log
    )


def kill_after_checkpoint(job: Job, store: Store, folder: Path) -> int:
    """Start a job, kill it when a checkpoint is complete; the checkpoint's step."""
    process = start(job, folder)
    checkpoints = store.partial(job.name, job.key) / "checkpoints"
    deadline = time.monotonic() + 120
    while not (done := sorted(checkpoints.glob("checkpoint-*/trainer_state.json"))):
        assert process.poll() is None, (folder / f"{job.key[:4]}.log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not store.has(job.name, job.key)
    return int(done[0].parent.name.rpartition("-")[2])


@pytest.mark.parametrize(
    "kind",
    ["pretrain", pytest.param("sft", marks=pytest.mark.slow), pytest.param("dpo", marks=pytest.mark.slow)],
)
def test_a_killed_job_leaves_the_same_bytes(store: Store, tmp_path: Path, kind: str) -> None:
    straight, killed = job_of(kind, store, "a"), job_of(kind, store, "b")
    runner.run(straight)
    assert kill_after_checkpoint(killed, store, tmp_path) < RUNS[kind]["steps"]
    assert start(killed, tmp_path).wait(180) == 0, (tmp_path / "bbbb.log").read_text()
    one, two = (store.record(job.name, job.key) for job in (straight, killed))
    assert two["metrics"]["resumed_at"] >= 20
    assert one["files"] == two["files"]
    assert one["output"] == two["output"]
    timings = {"tokens_per_second", "compute_seconds", "compute_cpu_seconds", "resumed_at"}
    kept = [{k: v for k, v in record["metrics"].items() if k not in timings} for record in (one, two)]
    assert kept[0] == kept[1]  # the curve's ends are the whole run's
    assert not any("checkpoint" in name for name in two["files"])


def test_a_job_killed_after_its_last_step_only_saves(store: Store, tmp_path: Path) -> None:
    """All steps are in the checkpoint, the artifact was not yet made."""
    job = dataclasses.replace(job_of("pretrain", store, "c"), runtime={"checkpoint_steps": 10})
    job = dataclasses.replace(job, params={**job.params, "steps": 20})
    inputs = {role: store.path(*pair) for role, pair in job.inputs.items()}
    first = run(job, inputs, tmp_path / "out")
    made = (tmp_path / "out/model.safetensors").read_bytes()
    (tmp_path / "out/model.safetensors").unlink()
    second = run(job, inputs, tmp_path / "out")
    assert second["resumed_at"] == 20
    assert (tmp_path / "out/model.safetensors").read_bytes() == made
    assert [second[k] for k in ("first_loss", "last_loss")] == [first[k] for k in ("first_loss", "last_loss")]


@pytest.mark.parametrize("lost", ["trainer_state.json", "optimizer.pt"])
def test_an_incomplete_checkpoint_is_removed_and_the_one_before_it_used(
    store: Store, tmp_path: Path, lost: str
) -> None:
    job = dataclasses.replace(job_of("pretrain", store, "d"), runtime={"checkpoint_steps": 10})
    job = dataclasses.replace(job, params={**job.params, "steps": 20})
    inputs = {role: store.path(*pair) for role, pair in job.inputs.items()}
    run(job, inputs, tmp_path / "out")
    made = (tmp_path / "out/model.safetensors").read_bytes()
    (tmp_path / "out/checkpoints/checkpoint-20" / lost).unlink()
    assert run(job, inputs, tmp_path / "out")["resumed_at"] == 10
    assert (tmp_path / "out/model.safetensors").read_bytes() == made


def test_checkpoints_are_read_by_number_not_by_name(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        folder = tmp_path / f"checkpoints/checkpoint-{step}"
        folder.mkdir(parents=True)
        for name in ("trainer_state.json", "optimizer.pt"):
            (folder / name).write_text("")
    (tmp_path / "checkpoints/checkpoint-100/trainer_state.json").unlink()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoints/checkpoint-20")
    assert not (tmp_path / "checkpoints/checkpoint-100").exists()
    assert last_checkpoint(tmp_path / "nothing") is None


def test_a_job_that_fails_leaves_no_artifact(store: Store) -> None:
    """The reason is told, nothing is in the store, and what was made of it is kept for the next try."""
    job = job_of("pretrain", store, "e")
    job = dataclasses.replace(job, params={**job.params, "context": 100_000})
    with pytest.raises(StepFailed, match="less than one row"):
        runner.run(job)
    assert not store.has(job.name, job.key)


def test_checkpoint_steps_are_no_part_of_the_key() -> None:
    assert "checkpoint_steps" not in json.dumps(make_job("pretrain", checkpoint_steps=7).params)
