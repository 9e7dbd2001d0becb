"""A job file holds all that a worker needs, and its key follows from what can change the output, from nothing
else.
"""

from __future__ import annotations

import json

import pytest
from fake_build import toy_plan

from famc.job import Job, content, preimage
from famc.plan import keys
from famc.report.live import last_progress
from famc.store import digest


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return toy_plan(tmp_path_factory.mktemp("job"))


def test_every_job_of_a_plan_survives_its_file(plan):
    for name in plan.steps:
        job = plan.job(name)
        assert Job.from_json(job.to_json()).to_json() == job.to_json()
        json.loads(job.to_json(), parse_constant=pytest.fail)


def test_the_key_is_the_hash_of_the_jobs_identity(plan):
    for name, key in keys(plan.graph).items():
        job = Job.from_json(plan.job(name).to_json())
        assert job.key == key == digest(job.identity)


def test_means_are_not_part_of_the_identity(plan):
    job = plan.job("s/pretrain")
    moved = {
        "store": "/else",
        "threads": 64,
        "micro_batch": 1,
        "memory": 1.0,
        "because": ("for a test",),
        "log": "/log",
        "runtime": {"x": 1},
    }
    other = Job(**{**{f: getattr(job, f) for f in job.__dataclass_fields__}, **moved})
    assert other.identity == job.identity


def test_content_follows_from_the_inputs_bytes_not_from_their_keys(plan):
    job = plan.job("s/sft")
    outputs = dict.fromkeys(job.inputs, "1" * 64)
    rekeyed = Job(
        **{
            **{f: getattr(job, f) for f in job.__dataclass_fields__},
            "inputs": {r: (a, "9" * 64) for r, (a, _) in job.inputs.items()},
        }
    )
    assert content(rekeyed, outputs) == content(job, outputs)
    assert content(job, outputs | {"model": "2" * 64}) != content(job, outputs)


@pytest.mark.parametrize(
    "change",
    [
        ("sft", 1, {}, {}),
        ("pretrain", 2, {}, {}),
        ("pretrain", 1, {"a": 1}, {}),
        ("pretrain", 1, {}, {"a": "b"}),
    ],
)
def test_kind_version_parameters_and_inputs_each_change_the_key(change):
    assert digest(preimage(*change)) != digest(preimage("pretrain", 1, {}, {}))


@pytest.mark.parametrize("text", ["", "[]", '{"name": 1}', '{"inputs": {}, "because": [], "unknown": 1}'])
def test_what_is_no_job_file_is_refused(tmp_path, capsys, text):
    from famc.work.runner import main

    (tmp_path / "job.json").write_text(text)
    assert main([str(tmp_path / "job.json")]) == 2
    assert "not a job file" in capsys.readouterr().err


def test_progress_is_read_from_the_last_whole_line(tmp_path):
    file = tmp_path / "metrics.jsonl"
    assert last_progress(file) is None
    job = Job.for_test("s/sft", "sft", {}, metrics=str(file))
    job.progress(1, 10, loss=3.0)
    job.progress(2, 10, loss=2.5)
    with file.open("a") as half:
        half.write('{"time": 1, "done": 3, "to')
    assert last_progress(file)["done"] == 2
    assert last_progress(file)["loss"] == 2.5
