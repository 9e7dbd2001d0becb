"""Rows of the calibration table become setups that mean what the table says."""

from __future__ import annotations

import csv
from functools import lru_cache
from pathlib import Path

import pytest

from famc.backend import load_accelerator
from famc.cost import sums
from famc.cost.cases.rows import Case, case
from famc.cost.device import Device
from famc.cost.setup import Setup

TABLE = Path(__file__).parents[2] / "benchmarks" / "data" / "calibration.csv"


def _device(name: str) -> Device:
    return load_accelerator(name).device


@lru_cache(maxsize=1)
def _rows() -> dict[str, dict[str, str]]:
    with TABLE.open(encoding="utf-8") as lines:
        return {r["id"]: r for r in csv.DictReader(lines)}


def _case(key: str, **changes: str) -> Case:
    return case(_rows()[key] | changes, _device)


def _setup(key: str) -> Setup:
    found = _case(key).setup
    assert found is not None
    return found


def test_every_row_of_the_table_is_read() -> None:
    """1,411 rows; no layout only where it is not published."""
    read = {k: case(r, _device) for k, r in _rows().items()}
    unknown = {(c.src, c.kind) for c in read.values() if c.setup is None}
    assert len(read) == 1411
    assert unknown == {
        ("mlperf", "throughput"),
        ("mlperf", "memory"),
        ("published_training_cost", "gpu_hours"),
        ("config", "params"),
    }


def test_parameters_are_exact() -> None:
    """All 38 published counts."""
    rows = [case(r, _device) for r in _rows().values() if r["kind"] == "params"]
    assert len(rows) == 38
    assert {c.id for c in rows if sums.parameters(c.anatomy) != c.measured} == set()


def test_deepseek_v3_has_its_published_size() -> None:
    """671,026,419,200 weights with latent attention, 256 experts and three dense layers."""
    model = _case("nemo-002:thr").anatomy
    assert sums.parameters(model) == 671_026_419_200
    assert [s.layers for s in model.stacks] == [3, 58]


def test_a_pipelined_row_keeps_its_degrees() -> None:
    """NeMo's GPT-3 175B on 512 H100."""
    s = _setup("nemo24-004:thr")
    lay = s.layout
    assert (lay.tp, lay.pp, s.vpp, lay.data, lay.micro_batch, lay.grad_accum) == (4, 8, 6, 16, 2, 64)
    assert (s.sharding, lay.precision, s.device.name, lay.global_batch) == (
        "optimizer",
        "fp8",
        "h100-80g",
        2048,
    )


def test_measured_throughput_becomes_the_time_of_a_step() -> None:
    """4,550 tokens/s on each of 128 A100, 256 sequences of 4,096."""
    c = _case("fms-01:thr")
    assert c.step_seconds == pytest.approx(256 * 4096 / (128 * 4550))
    assert (c.setup is not None) and c.setup.layout.dp_shard == 8
    assert (c.setup is not None) and c.setup.layout.dp_replicate == 16


def test_maxtext_rows_say_their_layout_in_words() -> None:
    """128B: 16 x 16 inside of each of 32 slices, a sequence a chip."""
    lay = _setup("maxtext-024:thr").layout
    assert (lay.tp, lay.dp_shard, lay.dp_replicate, lay.micro_batch, lay.global_batch) == (
        16,
        16,
        32,
        16,
        8192,
    )


def test_torchtitan_splits_a_batch_into_as_many_micro_batches_as_stages() -> None:
    """Local batch 32 over 8 stages."""
    lay = _setup("torchtitan-013:thr").layout
    assert (lay.micro_batch, lay.grad_accum) == (4, 8)


def test_adapters_are_trained_alone() -> None:
    """Rank 16 on the attention of Llama-2 70B: 44.6 M weights; what litgpt counts is taken over."""
    lora = _setup("mlperf-40-011:thr")
    assert (lora.adapters, lora.sharding) == (True, "none")
    assert lora.trained == 80 * 16 * (4 * 8192 * 2 - 2 * (8192 - 1024))
    assert _setup("litgpt-025:mem").trained == 573_888


def test_rows_without_a_layout_keep_what_is_known() -> None:
    """To be searched for."""
    c = _case("mlperf-40-025:thr")
    assert c.setup is None
    assert (c.backend, c.devices, c.batch, c.seq_len, c.precision) == ("h100-80g", 11616, 2904, 2048, "fp8")
    c = _case("fms-01:thr", tp="", micro_batch="")
    assert c.setup is None
    assert dict(c.fixed) == {"pp": 1, "cp": 1, "dp": 128, "grad_accum": 1}


def test_software_is_named_and_dated() -> None:
    """The table's dates are of three kinds."""
    assert _case("nemo-002:thr").software.year == pytest.approx(2026.58, abs=0.02)
    assert _case("nanotron-14:thr").software.name == "nanotron"
    assert _case("nanotron-14:thr").software.year == pytest.approx(2025.08, abs=0.02)
    assert _case("mlperf-40-022:thr").software.name == "deepspeed"
    assert _case("torchtitan-020:thr").software.name == "torchtitan, async tp"
    assert _case("vtrain-single-0001:thr").software.overlap is False


def test_unstated_software_and_sharding_follow_from_the_layout() -> None:
    """A pipeline is Megatron's way, with ZeRO-1 since its core; data parallelism alone is PyTorch's, fully sharded."""
    piped = _case("nemo24-004:thr", framework="", sharding="").setup
    plain = _case("fms-01:thr", framework="", sharding="").setup
    old = _case("megatron-sc21-06:thr", framework="", sharding="").setup
    assert piped is not None and plain is not None and old is not None
    assert (piped.software.name, piped.sharding) == ("megatron-lm", "optimizer")
    assert (plain.software.name, plain.sharding) == ("unknown", "full")
    assert (old.software.name, old.sharding) == ("megatron-lm", "none")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": "many"}, "layers is 'many': it must be a number"),
        ({"micro_batch": "-1"}, "micro_batch is '-1': it must be a positive whole number"),
        ({"hidden": ""}, "hidden is missing"),
        ({"dp": "64"}, "dp 64 x tp 1 x pp 1 x cp 1 is not n_gpus 128"),
        ({"gbs_seqs": "100"}, "gbs_seqs 100 cannot feed 128 data ranks"),
    ],
)
def test_a_bad_column_is_named(changes: dict[str, str], message: str) -> None:
    """Where, what, and what is allowed."""
    with pytest.raises(ValueError, match=message):
        _case("fms-01:thr", **changes)


def test_an_unknown_chip_is_named() -> None:
    """By whoever knows the backends."""
    with pytest.raises(LookupError, match="no accelerator `h101`"):
        _case("fms-01:thr", hardware_key="H101")
