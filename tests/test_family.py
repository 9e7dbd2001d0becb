"""The example family, built for real by the command line: the rehearsal (`--smoke`) in whole processes.

Slow: each build trains 2-layer models for a few steps through every kind, export, gate and release.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SPEC = ROOT / "specs" / "pydoc.yaml"
FAMC = [sys.executable, "-m", "famc.cli"]

pytestmark = pytest.mark.slow


def famc(*arguments: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*FAMC, *arguments], capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == expect, done.stdout + done.stderr
    return done


def outputs(out: Path) -> dict[str, str]:
    """Address -> digest of the artifact's files."""
    found = {}
    for path in (out / "store").rglob("famc.json"):
        record = json.loads(path.read_text())
        found[record["name"]] = record["output"]
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted rehearsal."""
    out = tmp_path_factory.mktemp("family") / "out"
    started = time.monotonic()
    famc("build", str(SPEC), "--smoke", "--out", str(out), "-q")
    assert time.monotonic() - started <= 120, "a rehearsal takes at most two minutes on two cores"
    return out


def test_every_variant_is_released_with_its_files(built: Path) -> None:
    index = json.loads((built / "release" / "family.json").read_text())
    assert {(v["size"], v["variant"]) for v in index["variants"]} == {
        *((s, v) for s in ("m", "s") for v in ("base", "instruct")),
        ("e", "embedding"),
        ("r", "reranker"),
    }
    for variant in index["variants"]:
        folder = built / "release" / variant["folder"]
        needed = {
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
            "README.md",
        }
        if variant["variant"] == "embedding":
            needed |= {"modules.json", "1_Pooling/config.json", "config_sentence_transformers.json"}
        if variant["variant"] in ("embedding", "reranker"):
            needed |= {f"onnx/model{name}.onnx" for name in ("", "_int8", "_q4")}
        else:
            needed |= {"generation_config.json"}
        if variant["repo"].endswith("-GPTQ-Int4"):
            assert set(variant["exports"]) == {"gptq-4"}
        elif variant["variant"] == "instruct":
            needed |= {f"onnx/model{name}.onnx" for name in ("", "_fp16", "_int8", "_q4")} | {
                "genai_config.json"
            }
            assert set(variant["exports"]) == {"onnx-fp32", "onnx-fp16", "onnx-int8", "onnx-int4"}
        assert needed <= {p.relative_to(folder).as_posix() for p in folder.rglob("*")}
        assert variant["scores"]


def test_a_released_model_loads_offline_in_another_process(built: Path) -> None:
    code = (
        "import sys\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "t = AutoTokenizer.from_pretrained(sys.argv[1]); m = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "ids = t.apply_chat_template([{'role': 'user', 'content': 'What does os.getcwd do?'}], add_generation_prompt=True, return_tensors='pt', return_dict=True)\n"
        "print(m.generate(**ids, max_new_tokens=4).shape)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(built / "release" / "pydoc-s-instruct")],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "torch.Size([1," in done.stdout


def test_nothing_to_do_after_a_build_and_the_store_verifies(built: Path) -> None:
    done = json.loads(famc("build", str(SPEC), "--smoke", "--out", str(built), "--json").stdout)
    assert done["done"] == [] and done["failed"] == {}
    assert (
        json.loads(famc("verify", str(SPEC), "--smoke", "--out", str(built), "--json").stdout)["faults"] == []
    )


def test_one_learning_rate_reruns_its_stage_and_what_follows(built: Path) -> None:
    plan = json.loads(
        famc(
            "plan", str(SPEC), "--smoke", "--out", str(built), "--set", "stages.dpo.lr=1e-6", "--json"
        ).stdout
    )
    status = {s["name"]: s["status"] for s in plan["steps"]}
    changed = {name for name, state in status.items() if state != "cached"}
    assert {"m/dpo", "s/dpo"} <= changed
    assert all(name.endswith("dpo") or "/instruct/" in name for name in changed), changed
    because = next(s["because"] for s in plan["steps"] if s["name"] == "m/dpo")
    assert any(line.startswith("lr.peak: 5e-05 -> 1e-06") for line in because), because


@pytest.mark.parametrize("after", [7.0, 11.0])
def test_killed_and_built_again_gives_the_same_bytes(built: Path, tmp_path: Path, after: float) -> None:
    out = tmp_path / "out"
    command = [*FAMC, "build", str(SPEC), "--smoke", "--out", str(out), "-q"]
    process = subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    time.sleep(after)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = outputs(out)
    done = json.loads(famc("build", str(SPEC), "--smoke", "--out", str(out), "--json").stdout)
    assert not set(before) & set(done["done"]), "a finished step ran again"
    expected, found = outputs(built), outputs(out)
    assert found == expected
