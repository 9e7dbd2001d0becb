"""The measuring process on a tiny model: its figures are there and positive, and the runtimes do the same
work."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
from tiny_model import make_tiny_model

from famc.bench import subprocess_runner
from famc.work import bench
from famc.work.onnx_build import build_decoder

LENGTHS = {"threads": 1, "prompt": 24, "tokens": 6, "repeats": 2, "vocab": 384, "avoid": [0, 1, 2], "seed": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Qwen3 with its ONNX graph and genai_config.json."""
    made = make_tiny_model(tmp_path_factory.mktemp("bench"))
    build_decoder(made, made, "fp32")
    return made


def request(folder, runtime):
    paths = {"onnxruntime": folder / "onnx/model.onnx", "llama.cpp": folder / "model.gguf"}
    return {**LENGTHS, "runtime": runtime, "path": str(paths.get(runtime, folder)), "filename": "onnx/model.onnx",
            "dtype": "fp32"}  # fmt: skip


@pytest.mark.parametrize("runtime", ["onnxruntime", "onnxruntime-genai", "torch"])
def test_figures_of_a_process(folder, runtime):
    """every figure, positive, ordered; the peak holds more than the interpreter alone."""
    made = subprocess_runner(request(folder, runtime), timeout=300)
    assert "error" not in made
    assert (made["threads"], made["prompt"], made["tokens"], made["repeats"]) == (1, 24, 6, 2)
    for key in ("prefill", "decode", "first_token"):
        assert 0 < made[key]["min"] <= made[key]["median"] <= made[key]["max"]
    assert made["prefill"]["max"] == pytest.approx(24 / made["first_token"]["min"])
    assert made["peak_rss_bytes"] > made["rss_before_bytes"] > 1e6
    assert made["load_seconds"] > 0 and runtime in made["versions"]
    assert ("torch" in made["versions"]) == (runtime == "torch")  # a peak that is that runtime's alone


def test_runtimes_give_the_same_tokens(folder):
    """greedy in all three, so that the same work is timed; a second prompt forgets the first."""
    ids = bench.prompt_ids(24, 384, LENGTHS["avoid"], 3)
    given = {}
    for name in ("torch", "onnxruntime", "onnxruntime-genai"):
        runtime = bench.RUNTIMES[name](request(folder, name))
        runs = []
        for _ in range(2):
            tokens = [runtime.first(ids)]
            while len(tokens) < 6:
                tokens.append(runtime.following(tokens[-1]))
            runs.append(tokens)
        assert runs[0] == runs[1]
        given[name] = runs[0]
    assert given["onnxruntime"] == given["torch"] == given["onnxruntime-genai"]


def test_prompts_are_seeded_and_without_special_ids():
    ids = bench.prompt_ids(2000, 50, [0, 7], 1)
    assert ids == bench.prompt_ids(2000, 50, [0, 7], 1) != bench.prompt_ids(2000, 50, [0, 7], 2)
    assert set(ids) == set(range(50)) - {0, 7}
    with pytest.raises(ValueError, match="special"):
        bench.prompt_ids(1, 2, [0, 1], 0)


def test_a_runtime_that_is_not_installed_is_told(folder, tmp_path, monkeypatch, capsys):
    """one JSON line with the package's name, and exit 0: the other runtimes go on."""
    monkeypatch.setitem(__import__("sys").modules, "llama_cpp", None)
    file = tmp_path / "request.json"
    file.write_text(json.dumps(request(folder, "llama.cpp")))
    assert bench.main([str(file)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {"error": "llama-cpp-python is not installed", "missing": "llama-cpp-python"}


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
def test_a_file_that_does_not_load_is_told(folder):
    (folder / "model.gguf").write_bytes(b"GGUF" + b"\0" * 64)
    assert "error" in subprocess_runner(request(folder, "llama.cpp"), timeout=120)


def test_bandwidth(monkeypatch):
    """bytes a second of a sum and of a copy; a copy moves its bytes twice."""
    monkeypatch.setattr(bench, "SMALLEST", 2**24)
    monkeypatch.setattr(bench, "cache_bytes", lambda: 2**20)
    made = bench.measure({"runtime": "bandwidth", "threads": 1})
    assert made["array_bytes"] == 2**24
    assert 1e8 < made["read"] < 1e13 and 1e8 < made["copy"] < 1e13


def test_cache_sizes_are_read(tmp_path):
    for index, size in enumerate(("48K", "2048K", "480M")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size + "\n")
    assert bench.cache_bytes(tmp_path) == 480 * 2**20
    assert bench.cache_bytes(tmp_path / "none") == 0


def test_peak_never_falls():
    """bytes, not pages or kilobytes: an array that was here and went is still in the peak."""
    before = bench.peak_rss()
    size = np.ones(2**24).nbytes
    assert bench.peak_rss() >= max(before, size)
