"""Step times against published ones, and how they answer to layout, precision and software."""

from __future__ import annotations

import csv
import json
import math
import time
from dataclasses import replace
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from famc.backend import load_accelerator
from famc.cost import of_shape, shape
from famc.cost.cases.rows import case
from famc.cost.device import Device
from famc.cost.fitted import band, constants
from famc.cost.layout import Layout
from famc.cost.setup import Setup, Software
from famc.cost.step_time import StepTime, step_time

TABLE = Path(__file__).parents[2] / "benchmarks" / "data" / "calibration.csv"


def _device(name: str) -> Device:
    return load_accelerator(name).device


@lru_cache(maxsize=1)
def _rows() -> dict[str, dict[str, str]]:
    with TABLE.open(encoding="utf-8") as lines:
        return {r["id"]: r for r in csv.DictReader(lines)}


def _row(key: str) -> Setup:
    found = case(_rows()[key], _device).setup
    assert found is not None
    return found


def _with(setup: Setup, **layout: Any) -> Setup:
    return replace(setup, layout=replace(setup.layout, **layout))


# --- published ------------------------------------------------------------------------------------------------


def _megatron(
    layers: int, hidden: int, heads: int, pp: int, vpp: int, batch: int, micro: int
) -> dict[str, str]:
    devices = 8 * pp
    numbers = {
        "layers": layers, "hidden": hidden, "ffn": 4 * hidden, "heads": heads, "kv_heads": heads,
        "head_dim": hidden // heads, "vocab": 51200, "learned_pos": 2048, "n_gpus": devices, "seq_len": 2048,
        "micro_batch": micro, "grad_accum": batch // micro, "gbs_seqs": batch, "tp": 8, "pp": pp, "vpp": vpp, "cp": 1, "dp": 1,
    }  # fmt: skip
    words = {"model": "gpt", "norm": "ln", "mlp_type": "mlp", "tied_embeddings": "yes", "precision": "fp16"}
    return (
        {k: str(v) for k, v in numbers.items()}
        | words
        | {"hardware_key": "A100-SXM-80GB", "framework": "Megatron-LM"}
    )


@pytest.mark.parametrize(
    ("row", "full", "selective"),
    [
        (_megatron(48, 6144, 64, 1, 1, 4, 4), 1.42, 1.10),
        (_megatron(96, 12288, 96, 8, 3, 64, 1), 18.13, 13.75),
        (_megatron(105, 20480, 128, 35, 3, 280, 1), 49.05, 37.83),
        (_megatron(128, 25600, 160, 64, 1, 512, 1), 94.42, 71.49),
    ],
    ids=["22B", "175B", "530B", "1T"],
)
def test_a_paper_that_no_constant_was_fitted_to(row: dict[str, str], full: float, selective: float) -> None:
    """Korthikanti et al. 2022 (arXiv:2205.05198, table 5), seconds an iteration on A100: within 15 %."""
    before = case(row | {"act_ckpt": "full", "date": "2022-01"}, _device).setup
    after = case(row | {"act_ckpt": "selective", "date": "2022-05"}, _device).setup
    assert before is not None
    assert after is not None
    assert step_time(before).seconds == pytest.approx(full, rel=0.15)
    assert step_time(after).seconds == pytest.approx(selective, rel=0.15)


@pytest.mark.parametrize(
    "key",
    [
        "fms-01:thr",
        "foundry-157:thr",
        "llmc-3:thr",
        "megatron-2020-11:thr",
        "nemo24-005:thr",
        "nemo-177:thr",
        "tinyllama-1:thr",
    ],
)
def test_published_steps_are_met_within_a_fifth(key: str) -> None:
    """One row of each kind of software and chip."""
    found = case(_rows()[key], _device)
    assert found.setup is not None
    assert step_time(found.setup).seconds == pytest.approx(found.step_seconds, rel=0.2)


def test_the_table_as_a_whole_is_met() -> None:
    """Mean over sources of the mean error of 1,217 rows: below 8 %."""
    errors: dict[str, list[float]] = {}
    for row in _rows().values():
        if row["kind"] != "throughput" or row["quality"] not in "AB":
            continue
        found = case(row, _device)
        if found.setup is not None and found.step_seconds:
            error = abs(step_time(found.setup).seconds / found.step_seconds - 1)
            errors.setdefault(found.src, []).append(error)
    assert len(errors) == 13
    assert sum(sum(e) / len(e) for e in errors.values()) / len(errors) < 0.08


def test_sources_left_out_are_within_the_targets() -> None:
    """As the last fit stored them: MAPE 12 %, median 8 %, 85 % within 20 %."""
    data = json.loads((files("famc.cost") / "data" / "fitted.json").read_text(encoding="utf-8"))
    score = data["residuals"]["macro-average"]
    assert score["mape"] <= 0.12
    assert score["median"] <= 0.08
    assert score["within"] >= 0.85


def test_constants_lie_inside_of_their_bounds() -> None:
    """A value at its bound is no fit."""
    data = json.loads((files("famc.cost") / "data" / "fitted.json").read_text(encoding="utf-8"))["constants"]
    assert {
        n for n, e in data.items() if not e["bounds"][0] * 1.001 < e["value"] < e["bounds"][1] * 0.999
    } == set()
    assert len(data) <= 25


# --- parts ----------------------------------------------------------------------------------------------------


def _sum(t: StepTime) -> float:
    own = t.matmul + t.attention + t.vector + t.launch + t.bubble + t.optimizer + t.overhead
    return own + sum(v for _, v in t.communication)


@pytest.mark.parametrize(
    "key",
    ["nemo24-004:thr", "nemo-002:thr", "torchtitan-018:thr", "mlperf-50-113:thr", "vtrain-single-0001:thr"],
)
def test_parts_add_up_and_none_is_negative(key: str) -> None:
    """Pipeline, experts, context, adapters, a step that Python bounds."""
    t = step_time(_row(key))
    assert _sum(t) == pytest.approx(t.seconds, rel=1e-9)
    own = (
        t.matmul,
        t.attention,
        t.vector,
        t.launch,
        t.bubble,
        t.optimizer,
        t.overhead,
        *(v for _, v in t.communication),
    )
    assert min(own) >= 0.0
    assert t.interval[0] < t.seconds < t.interval[1]
    assert t.interval == tuple(pytest.approx(t.seconds * x) for x in band())


def test_model_flops_are_six_for_each_weight_and_token_and_causal_attention() -> None:
    """Llama-2 7B by hand: 6 x (6.738 G - 131 M of the table) + 6 x 32 layers x 4096 x 4096 each token."""
    t = step_time(_row("fms-01:thr"))
    tokens = 256 * 4096
    norms = 65 * 4096
    by_hand = tokens * 6 * ((6_738_415_616 - 131_072_000 - norms) + 32 * 4096 * 4096)
    assert t.model_flops == pytest.approx(by_hand, rel=1e-6)
    assert t.mfu == pytest.approx(by_hand / t.seconds / 128 / 312e12)
    assert t.hardware_flops == t.model_flops


BASE = Setup(
    of_shape.anatomy(shape.PRESETS["llama3-8b"]),
    _device("h100-80g"),
    Layout(nodes=1, devices=8, dp_shard=8, micro_batch=2, grad_accum=4),
    seq_len=4096,
    software=Software("nemo", 2025.0),
)


def _seconds(setup: Setup) -> float:
    return step_time(setup).seconds


def test_full_recomputation_costs_up_to_a_third() -> None:
    """One more forward for three."""
    ratio = _seconds(_with(BASE, recompute="full")) / _seconds(BASE)
    assert 1.2 < ratio < 1.34


def test_eight_bits_help_less_than_twofold() -> None:
    """Products alone gain; casts cost."""
    ratio = _seconds(BASE) / _seconds(_with(BASE, precision="fp8"))
    assert 1.15 < ratio < 1.8
    assert _seconds(_with(BASE, precision="fp8-rowwise")) > _seconds(_with(BASE, precision="fp8"))


def test_frozen_weights_need_no_gradients() -> None:
    """LoRA takes about two thirds of a full step, and no state to update."""
    ratio = _seconds(replace(BASE, trained=20_000_000, adapters=True, sharding="none")) / _seconds(BASE)
    assert 0.6 < ratio < 0.85


def test_frozen_weights_of_four_bits_are_unpacked_first() -> None:
    """QLoRA saves memory, not time."""
    lora = replace(BASE, trained=20_000_000, adapters=True, sharding="none")
    assert 1.02 < _seconds(replace(lora, frozen_bytes=0.5)) / _seconds(lora) < 1.5


def test_a_fused_loss_never_takes_longer() -> None:
    """Fewer passes over logits of 128k, where the stack makes them eagerly."""
    eager = replace(BASE, software=Software("accelerate", 2025.0))
    assert 0.93 < _seconds(replace(eager, fused_loss=True)) / _seconds(eager) < 1.0


def test_half_of_the_weights_trained_lies_between() -> None:
    """A frozen tower, say."""
    half = replace(BASE, trained=4_000_000_000)
    assert _seconds(replace(BASE, trained=0)) < _seconds(half) < _seconds(BASE)


def test_packed_documents_pay_attention_to_themselves_alone() -> None:
    """At 64k tokens attention is most of the time."""
    long = _with(replace(BASE, seq_len=65536), micro_batch=1, grad_accum=1)
    assert _seconds(replace(long, document=1024)) < 0.6 * _seconds(long)


def test_bubble_is_stages_less_one_over_micro_batches() -> None:
    """Narayanan et al. 2021, section 2.2: (p - 1) / m of the time of the stages, a v-th of it interleaved."""
    piped = replace(_with(BASE, dp_shard=1, pp=8, grad_accum=32, micro_batch=1), vpp=1)
    twice = replace(piped, vpp=2)
    t, u = step_time(piped), step_time(twice)
    running = (t.matmul + t.attention + t.vector + t.launch) / 32
    assert t.bubble > 7 * running
    assert t.bubble - u.bubble == pytest.approx(3.5 * running, rel=0.2)


def test_layers_that_do_not_divide_wait_for_the_fullest_stage() -> None:
    """32 layers on 5 stages: 7 on the fullest, 6.4 on average."""
    headless = replace(BASE, anatomy=replace(BASE.anatomy, head=None, vocab=0))
    even, odd = (
        step_time(_with(headless, dp_shard=1, devices=pp, pp=pp, grad_accum=64, micro_batch=1))
        for pp in (4, 5)
    )
    waits = [
        (t.bubble - (pp - 1) / 64 * (t.matmul + t.attention + t.vector)) / t.seconds
        for t, pp in ((even, 4), (odd, 5))
    ]
    assert waits[0] < 0.02
    assert waits[1] == pytest.approx(0.6 / 7, abs=0.02)


def test_tensor_parallelism_shows_and_overlap_hides_some_of_it() -> None:
    """Half of the exchanges at least remain."""
    tp = _with(BASE, dp_shard=1, tp=8)
    plain = replace(tp, software=Software("nemo", 2025.0, overlap=False))
    shown, all_of_it = (dict(step_time(s).communication)["tensor"] for s in (tp, plain))
    assert 0.2 * all_of_it < shown < 0.9 * all_of_it


def test_a_slow_network_shows_in_data_parallelism() -> None:
    """Gathers over a tenth of the bandwidth no longer hide."""
    wide = _with(BASE, nodes=8, devices=64, dp_shard=64, grad_accum=1, micro_batch=1)
    slow = replace(wide, device=replace(wide.device, internode=1e9))
    assert _seconds(slow) > 2 * _seconds(wide)


def test_experts_cost_what_a_token_meets() -> None:
    """DeepSeek-V3 has 18 times the weights it uses; a step costs nearer to the used ones, with the exchange on top."""
    t = step_time(_row("nemo-002:thr"))
    assert 0.25 < t.mfu < 0.6
    assert dict(t.communication)["expert"] > 0.03 * t.seconds


def test_experts_on_many_nodes_wait_for_the_network() -> None:
    """64 ranks in one NVLink rack against 8 nodes."""
    rack = _row("nemo-002:thr")
    nodes = replace(rack, per_node=8)
    assert dict(step_time(nodes).communication)["expert"] > 2 * dict(step_time(rack).communication)["expert"]


def test_python_bounds_small_work_and_graphs_do_not() -> None:
    """Hidden 1024 over 8 GPUs, 1,024 tokens: a layer is over before the next kernel is started."""
    small = _row("vtrain-single-0284:thr")
    compiled = replace(small, software=replace(small.software, name="llm.c"))
    t = step_time(small)
    assert t.launch > 0.3 * t.seconds
    assert step_time(compiled).launch < 0.05 * t.launch


def test_software_gets_faster_by_the_year() -> None:
    """A few percent, not a multiple."""
    old, new = (replace(BASE, software=Software("nemo", y)) for y in (2023.0, 2026.0))
    assert 1.01 < _seconds(old) / _seconds(new) < 1.2


def test_unknown_software_is_pytorch_of_its_year() -> None:
    """Before FlashAttention, scores are written to memory."""
    now, then = (replace(BASE, software=Software("mine", y)) for y in (2026.0, 2021.0))
    assert step_time(then).attention > 2 * step_time(now).attention


def test_an_impossible_setup_is_named() -> None:
    """More stages than layers; a precision that the chip lacks."""
    with pytest.raises(ValueError, match="pp 64 is more than the 32 layers"):
        step_time(_with(BASE, pp=64))
    with pytest.raises(ValueError, match="a100-80g has no fp8"):
        step_time(replace(_with(BASE, precision="fp8"), device=_device("a100-80g")))


def test_nothing_is_infinite_for_any_packaged_chip() -> None:
    """Every backend that multiplies at 16 bits prices a step."""
    from famc.backend import packaged_dir

    for path in sorted(packaged_dir().glob("*.yaml")):
        chip = _device(path.stem)
        if chip.kind == "cpu" or not {"bf16", "fp16"} & set(dict(chip.peaks)):
            continue
        t = step_time(replace(BASE, device=chip))
        assert math.isfinite(t.seconds), path.stem
        assert 0.01 < t.mfu < 0.95, (path.stem, t.mfu)


def test_a_step_is_priced_in_microseconds() -> None:
    """A plan prices thousands of layouts: 0.2 ms each at most, on a busy machine."""
    constants()
    setups = [_with(BASE, micro_batch=m) for m in range(1, 201)]
    start = time.process_time()
    for s in setups:
        step_time(s)
    assert (time.process_time() - start) / len(setups) < 2e-4
