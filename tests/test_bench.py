"""Which measurements a variant asks for, what stands beside them, and what happens to those that fail."""

from __future__ import annotations

import json
import sys

import pytest
from fake_build import toy_plan

from famc import bench
from famc.backend import load_accelerator
from famc.cost import decode
from famc.errors import UsageError
from famc.report.bench import bench_lines, show_rate, show_time
from famc.store import Store

FILES = {
    "model": {"model.safetensors": 900, "config.json": 0, "tokenizer.json": 0},
    "onnx-fp32": {"onnx/model.onnx": 400, "onnx/model.onnx_data": 600, "genai_config.json": 10},
    "onnx-int4": {"onnx/model_q4.onnx": 150},
}
DEVICE = load_accelerator("cpu").with_cores(2).device


def put(plan, name, files, metrics=None):
    """An artifact of zeros."""
    store = Store(plan.out / "store")
    folder = store.partial(name, plan.keys[name])
    for file, size in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(b"\0" * size)
        if file == "config.json":
            (folder / file).write_text('{"eos_token_id": [2, 5], "pad_token_id": null}')
        if file == "tokenizer.json":
            (folder / file).write_text('{"added_tokens": [{"id": 0}, {"id": 2}]}')
    return store.commit(name, plan.keys[name], {"name": name, "metrics": metrics or {}})


@pytest.fixture
def built(tmp_path):
    """The small family with m/instruct and its exports built."""
    plan = toy_plan(tmp_path)
    put(plan, plan.graph.nodes["m/instruct/release"].inputs["model"], FILES["model"])
    put(plan, "m/instruct/export.onnx-fp32", FILES["onnx-fp32"])
    put(plan, "m/instruct/export.onnx-int4", FILES["onnx-int4"], {"lm_head": "fp32", "embedding": "fp32"})
    return plan


def answer(request):
    """A worker that is as fast as its threads."""
    if request["runtime"] == "bandwidth":
        return {"read": 2e10, "copy": 1e10, "threads": request["threads"], "cache_bytes": 0}
    if request["runtime"] == "onnxruntime-genai":
        return {"error": "onnxruntime-genai is not installed"}
    spread = {"median": 100.0, "min": 90.0, "max": 110.0}
    return {
        "threads": request["threads"], "prefill": spread, "decode": spread, "first_token": spread, "load_seconds": 0.1,
        "peak_rss_bytes": 5_000_000,
    }  # fmt: skip


def test_variants_are_chosen_by_name_with_or_without_a_size(tmp_path):
    plan = toy_plan(tmp_path)
    assert bench.chosen(plan, "instruct") == [("m", "instruct"), ("s", "instruct")]
    assert bench.chosen(plan, "s/instruct") == [("s", "instruct")]
    with pytest.raises(UsageError) as told:
        bench.chosen(plan, "m/instuct")
    assert "m/instruct" in told.value.hint and told.value.exit_code == 2


def test_what_is_not_built_is_told(tmp_path):
    with pytest.raises(UsageError, match="m/instruct is not built") as told:
        bench.requests(toy_plan(tmp_path), "m", "instruct")
    assert "famc build" in told.value.hint


def test_requests(built):
    """the model in two precisions, each graph in each runtime that loads it; lengths within the context of
    64."""
    made = bench.requests(built, "m", "instruct", threads=2)
    told = [(r.label, r.quant, r.runtime, r.file_bytes) for r in made]
    assert told == [
        ("model", "fp32", "torch", 900),
        ("model", "bf16", "torch", 900),
        ("onnx-fp32", "fp32", "onnxruntime", 1000),
        ("onnx-fp32", "fp32", "onnxruntime-genai", 1000),
        ("onnx-int4", "int4", "onnxruntime", 150),
    ]
    for request in made:
        assert request.avoid == (0, 2, 5)
        assert (request.threads, request.tokens, request.prompt) == (2, 32, 31)
        assert request.prompt + request.tokens < request.shape.context
    genai = made[3].to_dict()
    assert genai["filename"] == "onnx/model.onnx"
    assert genai["path"] == str(
        Store(built.out / "store").path(
            "m/instruct/export.onnx-fp32", built.keys["m/instruct/export.onnx-fp32"]
        )
    )
    assert json.loads(json.dumps(genai)) == genai
    assert made[4].stored.head == 32.0  # by the record, not by the default
    assert {r.runtime for r in bench.requests(built, "m", "instruct", runtimes=["torch"])} == {"torch"}


@pytest.mark.parametrize(
    ("options", "message"),
    [({"runtimes": ["onnx"]}, "no runtime is called 'onnx'"), ({"tokens": 0}, "at least 1")],
)
def test_wrong_options(built, options, message):
    with pytest.raises(UsageError, match=message):
        bench.requests(built, "m", "instruct", **options)


def test_an_export_that_is_not_built_is_a_row(tmp_path):
    plan = toy_plan(tmp_path)
    put(plan, plan.graph.nodes["m/instruct/release"].inputs["model"], FILES["model"])
    put(plan, "m/instruct/export.onnx-fp32", {"readme.txt": 3})
    asked = []
    result = bench.measure(
        bench.requests(plan, "m", "instruct", threads=1, runtimes=["onnxruntime"]),
        lambda r: asked.append(r) or answer(r),
    )
    assert [row["error"] for row in result["rows"]] == [
        "it holds no file that a runtime here loads", "not built: famc build makes it",
    ]  # fmt: skip
    assert [r["runtime"] for r in asked] == ["bandwidth"]


def test_rows(built):
    """measured figures beside the limit of the measured bandwidth and the prediction of the planner's."""
    wanted = bench.requests(built, "m", "instruct", threads=2)
    told = []
    result = bench.measure(wanted, answer, device=DEVICE, tell=told.append)
    assert len(told) == 6 and told[0] == "memory bandwidth"
    assert [row["error"] for row in result["rows"]].count(None) == 4
    json.dumps(result)
    row, request = result["rows"][-1], wanted[-1]
    moved = decode.token_bytes(request.shape, request.stored, 31 + 16)
    assert row["bytes_per_token"] == moved
    assert row["limit"] == pytest.approx(2e10 / moved)
    assert row["fraction"] == pytest.approx(100 / (2e10 / moved))
    ahead = decode.predict(request.shape, request.stored, DEVICE, "onnxruntime", "int4", prompt=31, tokens=32)
    assert row["predicted"]["decode"] == ahead.decode and row["predicted"]["basis"] == "measured"
    assert row["predicted_ratio"]["decode"] == pytest.approx(ahead.decode / 100)
    failed = result["rows"][3]
    assert failed["error"] == "onnxruntime-genai is not installed"
    assert failed["decode"] is None and failed["fraction"] is None and failed["limit"] > 0


def test_rows_without_a_bandwidth(built):
    """if it can't be measured, speeds are told without a limit."""

    def run(request):
        return {"error": "torch is not installed"} if request["runtime"] == "bandwidth" else answer(request)

    result = bench.measure(bench.requests(built, "m", "instruct", threads=2), run, device=DEVICE)
    assert all(row["limit"] is None for row in result["rows"])
    assert "bandwidth not measured: torch is not installed" in bench_lines(result)[0]


def test_table(built):
    lines = bench_lines(
        bench.measure(bench.requests(built, "m", "instruct", threads=2), answer, device=DEVICE)
    )
    assert "2 threads, prompt 31, 32 new tokens, median of 3" in lines[0]
    assert "reads 20.0 GB/s, copies 10.0 GB/s (measured)" in lines[0]
    row = next(line for line in lines if "onnx-int4" in line)
    assert "90.0-110" in row and "150" in row and "onnxruntime" in row
    assert (
        lines[-1].strip() == "m/instruct onnx-fp32 in onnxruntime-genai: onnxruntime-genai is not installed"
    )
    assert max(map(len, lines[2:8])) < 160
    assert [show_rate(12.34), show_rate(1894.2), show_time(0.0832), show_time(1.222)] == [
        "12.3",
        "1,894",
        "83.2 ms",
        "1.22 s",
    ]


def test_all_requests_of_a_variant_named_twice(built):
    """a name and a size of it are measured once."""
    once = bench.all_requests(built, ["m/instruct"])
    assert bench.all_requests(built, ["m/instruct", "m/instruct"]) == once
    with pytest.raises(UsageError, match="s/instruct is not built"):
        bench.all_requests(built, ["instruct"])


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("print('noise'); print('{\"decode\": 1}')", {"decode": 1}),
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
            {"error": "its process was killed by SIGSEGV"},
        ),
        ("raise SystemExit('no memory')", {"error": "no memory"}),
        ("raise SystemExit(3)", {"error": "its process ended with exit code 3"}),
        ("import time; time.sleep(30)", {"error": "no answer after 1 s"}),
    ],
)
def test_a_worker_that_ends_badly_is_told(tmp_path, monkeypatch, body, expected):
    """a crash, an exit, silence: each is an answer with a reason."""
    fake = tmp_path / "python"
    fake.write_text(f"#!{sys.executable}\n{body}\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    assert bench.subprocess_runner({"runtime": "torch"}, timeout=1.0 if "sleep" in body else 60.0) == expected
