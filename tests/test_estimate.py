"""One setup without a spec, and a table of them."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from famc.backend import load_accelerator
from famc.cost.cases.rows import case
from famc.cost.step_time import step_time
from famc.errors import FitError, UsageError
from famc.estimate import batch, estimate

TABLE = Path(__file__).parents[1] / "benchmarks" / "data" / "calibration.csv"
CONTRACT = (
    "name", "kind", "key", "size", "variant", "needs", "status", "because", "backend", "layout", "memory", "params", "tokens",
    "flops", "mfu", "seconds", "device_hours", "cost_usd", "energy_kwh", "co2e_kg", "basis",
)  # fmt: skip
LAYOUT = ("nodes", "devices", "dp_replicate", "dp_shard", "tp", "cp", "pp", "ep", "micro_batch", "grad_accum", "recompute", "precision")  # fmt: skip
MEMORY = ("weights", "gradients", "optimizer", "activations", "logits", "kv_cache", "overhead", "total", "limit")  # fmt: skip


@cache
def _rows() -> dict[str, dict[str, str]]:
    with TABLE.open(encoding="utf-8") as lines:
        return {r["id"]: r for r in csv.DictReader(lines)}


def _batch(tmp_path: Path, *rows: Mapping[str, str]) -> list[dict[str, Any]]:
    path = tmp_path / "cases.csv"
    with path.open("w", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, list(dict.fromkeys(k for r in rows for k in r)), restval="")
        writer.writeheader()
        writer.writerows(rows)
    return list(batch(path))


def _row(key: str, **changes: str) -> dict[str, str]:
    return _rows()[key] | changes


# --- one setup --------------------------------------------------------------------------------------------


def test_the_step_object_is_whole_and_its_numbers_agree() -> None:
    made = estimate(model="qwen3-8b", backend="h100-80g", devices=64, global_batch=1024, tokens=1e12)
    assert set(CONTRACT) <= made.keys()
    assert set(LAYOUT) <= made["layout"].keys()
    assert made["memory"].keys() == set(MEMORY)
    assert json.loads(json.dumps(made)) == made
    assert made["params"] == {"total": 8_190_735_360, "active": 8_190_735_360}
    # 1e12 / (1024 x 4096) = 238,418.6 steps
    assert made["optimizer_steps"] == 238_419
    assert made["tokens"] == 238_419 * 1024 * 4096
    assert made["seconds"] == pytest.approx(238_419 * made["step_seconds"])
    assert made["device_hours"] == pytest.approx(made["seconds"] * 64 / 3600)
    price = load_accelerator("h100-80g").usd_per_hour
    assert price is not None
    assert made["cost_usd"] == pytest.approx(made["device_hours"] * price.on_demand)
    # 64 GPUs of 700 W, servers 1.28 times as much
    assert made["energy_kwh"] == pytest.approx(made["device_hours"] * 0.7 * 1.28)
    assert made["tokens_per_second_per_device"] == pytest.approx(1024 * 4096 / made["step_seconds"] / 64)
    assert made["interval"][0] < made["seconds"] < made["interval"][1]
    assert made["whole_run"]["device_hours"] > made["device_hours"]
    total = sum(v for k, v in made["memory"].items() if k not in ("total", "limit"))
    assert made["memory"]["total"] == pytest.approx(total)
    assert made["memory"]["total"] <= made["memory"]["limit"]


def test_what_is_asked_is_what_is_priced() -> None:
    asked: dict[str, Any] = {"tp": 2, "cp": 2, "dp_shard": 4, "micro_batch": 2, "recompute": "full"}
    made = estimate(
        model="llama3.1-8b", backend="h100-80g", devices=32, global_batch=64, seq_len=8192, **asked
    )
    assert {k: made["layout"][k] for k in asked} == asked
    assert made["layout"]["devices"] == 32
    assert made["layout"]["pp"] == 1
    assert made["optimizer_steps"] == 1
    assert made["tokens"] == 64 * 8192


def test_a_batch_that_is_not_said_grows_with_the_run() -> None:
    """1e10 tokens of GPT-2: 6 x 124.4e6 x 1e10 FLOPs, 0.292 x C^0.3271 = 436 K tokens."""
    made = estimate(model="gpt2-124m", backend="a100-80g", seq_len=1024, tokens=1e10)
    assert made["optimizer_steps"] == -(-(10**10) // (512 * 1024))
    assert estimate(model="gpt2-124m", backend="a100-80g", seq_len=1024)["tokens"] == 8 * 1024


def test_pipelines_and_experts_apart_are_planned_only_where_asked() -> None:
    made = estimate(
        model="qwen3-30b-a3b", backend="h100-80g", devices=16, global_batch=64, pp=2, ep=4, precision="fp8"
    )
    assert (made["layout"]["pp"], made["layout"]["ep"], made["layout"]["precision"]) == (2, 4, "fp8")
    assert (
        estimate(model="qwen3-30b-a3b", backend="h100-80g", devices=16, global_batch=64)["layout"]["ep"] == 1
    )


def test_a_config_is_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    config = {
        "model_type": "llama", "vocab_size": 1000, "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 256,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": True,
    }  # fmt: skip
    path.write_text(json.dumps(config), encoding="utf-8")
    made = estimate(config=path, backend="a100-80g")
    # table 64,000; a block 64 x (64 + 32 + 32 + 64) + 3 x 64 x 256 + 2 x 64 norms; the last norm 64
    assert made["params"]["total"] == 64_000 + 2 * (12_288 + 49_152 + 128) + 64
    assert made["tokens"] == 8 * 512


def test_a_cpu_is_priced_by_its_own_model() -> None:
    made = estimate(model="pythia-70m", backend="cpu", global_batch=8, seq_len=512)
    assert made["layout"]["devices"] == 1
    assert made["basis"] == "assumed"
    assert made["interval"][0] < made["seconds"] < made["interval"][1]
    assert "whole_run" not in made


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ({"model": "llama3.1-8"}, "no model 'llama3.1-8'"),
        ({"backend": "h1000"}, "no accelerator `h1000`"),
        ({"backend": None}, "name a backend"),
        ({"model": None}, "name a model"),
        ({"model": None, "config": "nowhere.json"}, "nowhere.json"),
        ({"config": "config.json"}, "name a model or give"),
        ({"tokens": 0}, "tokens is 0"),
        ({"tokens": -1e9}, "tokens is -1"),
        ({"devices": 0}, "devices is 0"),
        ({"seq_len": -4}, "seq_len is -4"),
        ({"tp": 3}, "tp 3 does not divide the 32 heads"),
        ({"pp": 33, "devices": 64}, "pp 33 is more than the 32 layers"),
        ({"tp": 8, "cp": 2}, "is 16 devices"),
        ({"global_batch": 7, "tp": 1, "cp": 1, "pp": 1, "devices": 8}, "batch of 7 "),
        ({"precision": "bf17"}, "precision 'bf17'"),
        ({"backend": "a100-80g", "precision": "fp8"}, "a100-80g has no fp8"),
        ({"recompute": "some"}, "recompute 'some'"),
        ({"backend": "cpu", "devices": 2}, "is one host"),
    ],
)
def test_mistakes_are_named(asked: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        estimate(**({"model": "llama3.1-8b", "backend": "h100-80g"} | asked))


def test_what_does_not_fit_is_told_with_what_would() -> None:
    with pytest.raises(
        FitError, match=r"llama3.1-70b does not fit h100-80g: needs .* most of it optimizer; devices 8 -> "
    ):
        estimate(model="llama3.1-70b", backend="h100-80g", devices=8, global_batch=512)


# --- a table ----------------------------------------------------------------------------------------------


def test_a_row_with_its_layout_is_priced_as_it_stands(tmp_path: Path) -> None:
    row = _row("megatron-2021-gpt3:thr")
    (made,) = _batch(tmp_path, row)
    setup = case(row, lambda name: load_accelerator(name).device).setup
    assert setup is not None
    assert made["id"] == row["id"]
    assert made["fits"] is True
    assert made["step_seconds"] == step_time(setup).seconds
    assert made["tokens_per_second_per_device"] == pytest.approx(1536 * 2048 / made["step_seconds"] / 1024)
    assert made["interval"][0] < made["step_seconds"] < made["interval"][1]
    assert made["interval_of"] == "step_seconds"
    assert made["params"]["total"] == pytest.approx(174.6e9, rel=0.01)
    assert made["device_hours"] is None


def test_a_layout_that_is_left_out_is_searched_for(tmp_path: Path) -> None:
    blank = dict.fromkeys(("tp", "pp", "vpp", "dp", "micro_batch", "grad_accum", "sharding", "act_ckpt"), "")
    own, open_, partly = _batch(
        tmp_path,
        _row("megatron-2021-gpt3:thr"),
        _row("megatron-2021-gpt3:thr", **blank),
        _row("megatron-2021-gpt3:thr", **(blank | {"tp": "8", "act_ckpt": "full"})),
    )
    assert open_["layout"]["devices"] == 1024
    assert open_["step_seconds"] <= own["step_seconds"]
    assert (partly["layout"]["tp"], partly["layout"]["recompute"]) == (8, "full")
    assert open_["step_seconds"] <= partly["step_seconds"]
    # less is known, so the band is wider
    assert open_["interval"][1] / open_["step_seconds"] > own["interval"][1] / own["step_seconds"]


@pytest.mark.parametrize("key", ["cost-001:gpuh", "cost-028:gpuh", "cost-067:gpuh", "cost-089:gpuh"])
def test_whole_runs_lie_in_their_bands(key: str, tmp_path: Path) -> None:
    """LLaMA-7B 82,432 h, BLOOM 1,082,880 h, OLMo 2 32B 900,000 h, IBM's Llama 2 7B 162,000 h."""
    (made,) = _batch(tmp_path, _row(key))
    low, high = made["interval"]
    assert made["interval_of"] == "device_hours"
    assert low < float(_rows()[key]["measured"]) < high
    assert low < made["device_hours"] < high
    assert any("framework" in text for text in made["assumed"])


def test_twice_the_tokens_take_about_twice_the_hours(tmp_path: Path) -> None:
    key = "cost-032:gpuh"
    one, two = _batch(tmp_path, _row(key, gbs_seqs="3520"), _row(key, gbs_seqs="3520", tokens="2e12"))
    assert two["device_hours"] == pytest.approx(2 * one["device_hours"])


def test_runs_out_of_memory_are_not_said_to_fit(tmp_path: Path) -> None:
    rows = [r for r in _rows().values() if r["unit"].startswith("OOM")]
    assert len(rows) == 10
    assert [made["fits"] for made in _batch(tmp_path, *rows)] == [False] * 10


def test_nothing_fits_is_an_answer(tmp_path: Path) -> None:
    blank = dict.fromkeys(("tp", "pp", "vpp", "dp", "micro_batch", "grad_accum", "sharding", "act_ckpt"), "")
    (made,) = _batch(tmp_path, _row("megatron-2021-gpt3:thr", **(blank | {"n_gpus": "8"})))
    assert made["fits"] is False
    assert made["step_seconds"] is None
    assert made["memory"]["total"] > made["memory"]["limit"]
    assert "devices 8 -> " in made["because"]


def test_a_model_alone_gets_its_parameters(tmp_path: Path) -> None:
    row = next(r for r in _rows().values() if r["kind"] == "params")
    (made,) = _batch(tmp_path, row)
    assert made["params"]["total"] == int(float(row["measured"]))
    assert made["fits"] is None


def test_mistakes_stay_in_their_rows(tmp_path: Path) -> None:
    good = "megatron-2021-gpt3:thr"
    made = _batch(
        tmp_path,
        _row(good, id="a", hardware_key="H1000"),
        _row(good, id="b", n_gpus="0"),
        _row(good, id="c", layers=""),
        _row(good, id="d", tp="7"),
        _row("cost-001:gpuh", id="e", tokens=""),
        _row("cost-001:gpuh", id="f", tokens="-5", n_gpus="8"),
        _row(good, id="g", hidden="inf"),
        _row(good, id="h", seq_len="1e300"),
        _row(good, id=""),
    )
    texts = [m.get("error", "") for m in made]
    assert [bool(t) for t in texts] == [True] * 8 + [False]
    for text, part in zip(
        texts,
        ("h1000", "n_gpus", "layers", "7", "n_gpus is missing", "tokens", "hidden", "too large"),
        strict=False,
    ):
        assert part in text
    assert [m["id"] for m in made] == ["a", "b", "c", "d", "e", "f", "g", "h", "row 9"]
    assert all(m.keys() == {"id", "error"} for m in made[:8])


def test_rows_come_one_by_one_and_remarks_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "cases.csv"
    row = _row("llmc-4:thr")
    path.write_text(
        "# of llm.c\n" + ",".join(row) + "\n" + ",".join(f'"{v}"' for v in row.values()) + "\n",
        encoding="utf-8-sig",
    )
    assert next(batch(path))["id"] == "llmc-4:thr"
