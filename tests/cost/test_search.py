"""The layout that is found: fits, is what the runtime can run, is not beaten, and says why."""

from __future__ import annotations

import csv
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

from famc.backend import load_accelerator
from famc.cost import search
from famc.cost.cases.rows import case
from famc.cost.device import Device
from famc.cost.layout import DoesNotFit, Layout
from famc.cost.models import known
from famc.cost.priced import layout_of, priced, setup_of
from famc.cost.search import Priced, TooSlow, Wanted, best, options
from famc.cost.setup import Software
from famc.cost.spreads import spreads
from famc.cost.step_time import step_time

TABLE = Path(__file__).parents[2] / "benchmarks" / "data" / "calibration.csv"


@cache
def _device(name: str = "h100-80g") -> Device:
    return load_accelerator(name).device


def _wanted(model: str = "llama3.1-8b", batch: int = 64, nodes: int = 1, **more: object) -> Wanted:
    given: dict[str, object] = {"seq_len": 4096, "per_node": 8} | more
    return Wanted(known(model), _device(), global_batch=batch, nodes=nodes, **given)  # type: ignore[arg-type]


def _whole(p: Priced) -> None:
    lay = p.layout
    assert lay.dp_replicate * lay.dp_shard * lay.tp * lay.cp * lay.pp == lay.devices
    assert p.memory.total <= p.limit


@pytest.mark.parametrize("runtime", ["accelerate", "any"])
@pytest.mark.parametrize(
    ("model", "batch", "nodes"),
    [("llama3.2-1b", 64, 1), ("llama3.1-8b", 96, 3), ("llama3.1-70b", 128, 8), ("qwen3-30b-a3b", 64, 4)],
)
def test_a_found_layout_fits_and_keeps_the_batch(model: str, batch: int, nodes: int, runtime: str) -> None:
    p = best(_wanted(model, batch, nodes, runtime=runtime))
    _whole(p)
    assert p.layout.global_batch == batch
    assert p.layout.devices <= 8 * nodes
    assert p.time == step_time(p.setup)


def test_accelerate_gets_no_pipeline_and_no_experts_apart() -> None:
    """405B fits 16 nodes only with much parallelism; any may use pipelines."""
    wanted = _wanted("llama3.1-405b", 512, 32)
    p = best(wanted)
    assert (p.layout.pp, p.layout.ep, p.setup.vpp) == (1, 1, 1)
    assert best(replace(wanted, runtime="any")).time.seconds < p.time.seconds
    assert best(_wanted("qwen3-235b-a22b", 512, 32)).layout.ep == 1


@pytest.mark.parametrize(
    ("wanted", "devices"),
    [
        (_wanted("llama3.1-8b", 32, 2), 16),
        (_wanted("llama3.1-70b", 32, 4, software=Software("nemo"), runtime="any", precision="bf16"), 32),
        (_wanted("qwen3-30b-a3b", 32, 2, runtime="any", precision="bf16"), 16),
    ],
)
def test_nothing_on_as_many_devices_is_faster(wanted: Wanted, devices: int) -> None:
    """Against all spreads, micro-batches, recomputations and divisions of the state, priced one by one."""
    least = min(
        p.time.seconds
        for spread in spreads(wanted, {}, devices)
        for shard in spread.shards
        for recompute in ("none", "selective", "full")
        for micro in (1, 2, 4, 8)
        for each in [wanted.global_batch // spread.data]
        if each % micro == 0 and (spread.vpp == 1 or each // micro % spread.pp == 0)
        for p in [
            priced(
                setup_of(
                    wanted,
                    layout_of(wanted, spread, shard, micro, each // micro, recompute, "bf16"),
                    spread.vpp,
                )
            )
        ]
        if p.fits
    )
    assert best(wanted, {"devices": devices}).time.seconds <= 1.005 * least


@pytest.mark.parametrize(
    "row",
    ["megatron-2021-gpt3:thr", "torchtitan-015:thr", "nanotron-01:thr", "foundry-079:thr", "fms-03:thr", "llmc-4:thr",
     "mlperf-40-040:thr", "mlperf-50-114:thr"],
)  # fmt: skip
def test_no_published_layout_is_faster(row: str) -> None:
    with TABLE.open(encoding="utf-8") as lines:
        found = next(r for r in csv.DictReader(lines) if r["id"] == row)
    own = case(found, _device).setup
    assert own is not None
    lay = own.layout
    wanted = Wanted(
        own.anatomy, own.device, own.seq_len, lay.global_batch, lay.nodes, own.per_node, lay.precision, "any", own.software,
        own.sharding, trained=own.trained, adapters=own.adapters, gradient_bytes=own.gradient_bytes, master=own.master,
    )  # fmt: skip
    assert best(wanted, {"devices": lay.devices}).time.seconds <= 1.01 * priced(own).time.seconds


def test_few_setups_are_priced() -> None:
    """A plan asks for hundreds of layouts: microseconds count. 5 ms are about 70 prices."""
    calls = 0

    def counted(setup: object) -> object:
        nonlocal calls
        calls += 1
        return step_time(setup)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(search, "step_time", counted)
        best(_wanted("llama3.1-8b", 1024, 31))
    assert 0 < calls < 30


# --- objectives -------------------------------------------------------------------------------------------


def test_options_trade_devices_for_time() -> None:
    found = options(_wanted("llama3.1-8b", 256, 8))
    assert len(found) >= 4
    for a, b in pairwise(found):
        assert a.layout.devices < b.layout.devices
        assert a.time.seconds > b.time.seconds
    assert found[-1].time.seconds == best(_wanted("llama3.1-8b", 256, 8)).time.seconds
    for p in found:
        _whole(p)


def test_the_cheapest_costs_the_least_and_a_deadline_makes_it_dearer() -> None:
    wanted = _wanted("llama3.1-8b", 256, 8)
    found = options(wanted)
    cheap, fast = best(wanted, objective="cost"), best(wanted)
    assert cheap.device_seconds <= 1.005 * min(p.device_seconds for p in found)
    assert cheap.layout.devices < fast.layout.devices
    limit = found[-2].time.seconds
    late = best(wanted, deadline=limit)
    assert late.time.seconds <= limit
    assert late.device_seconds >= cheap.device_seconds
    with pytest.raises(TooSlow, match=rf"fastest takes {fast.time.seconds:.3g} s on 64 devices"):
        best(wanted, deadline=fast.time.seconds / 2)


def test_devices_that_do_not_help_are_left_idle() -> None:
    """Two sequences keep no 256 devices busy, whatever the layout."""
    assert best(_wanted("llama3.2-1b", 2, 32)).layout.devices <= 16


# --- what is asked ----------------------------------------------------------------------------------------


def test_forced_fields_are_kept() -> None:
    forced: dict[str, int | str] = {
        "tp": 4,
        "cp": 2,
        "dp_shard": 2,
        "micro_batch": 2,
        "recompute": "full",
        "devices": 32,
    }
    lay = best(_wanted("llama3.1-70b", 64, 4), forced).layout
    assert {k: getattr(lay, k) for k in forced} == forced
    assert lay.dp_replicate == 2
    assert "set: cp 2, devices 32" in lay.why[0]


@pytest.mark.parametrize(
    ("forced", "more", "text"),
    [
        ({"tp": 3}, {}, "tp 3 does not divide the 32 heads"),
        ({"tp": 16}, {"nodes": 2}, "tp 16 does not divide the 8 key/value heads"),
        ({"pp": 33}, {"runtime": "any", "nodes": 8}, "pp 33 is more than the 32 layers"),
        ({"pp": 2}, {}, "pp 2: the runtime accelerate has none"),
        ({"ep": 2}, {"runtime": "any"}, "ep 2 does not divide the 0 experts"),
        ({"cp": 3}, {}, "cp 3 does not divide sequences of 4096"),
        ({"micro_batch": 3}, {}, "batch of 64 is not divisible by 1 data ranks x micro-batch 3"),
        ({"devices": 16}, {}, "devices 16: there are 1 x 8"),
        ({"devices": 8, "tp": 8, "cp": 1, "pp": 1, "dp_shard": 1, "micro_batch": 5}, {}, "micro-batch 5"),
        ({"micro_batch": 0}, {}, "micro_batch is 0"),
        ({"recompute": "some"}, {}, "recompute 'some': choose none, selective, full"),
        ({"threads": 2}, {}, "no settable 'threads'"),
        ({}, {"precision": "fp4"}, "precision 'fp4': choose auto"),
        ({}, {"seq_len": 0}, "seq_len is 0"),
        ({}, {"batch": -1}, "global_batch is -1"),
        ({}, {"nodes": 0}, "nodes is 0"),
    ],
)
def test_what_cannot_be_is_told_with_its_numbers(
    forced: dict[str, int | str], more: dict[str, int | str], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        best(_wanted(**more), forced)  # type: ignore[arg-type]


def test_a_precision_that_the_chip_lacks_is_told() -> None:
    with pytest.raises(ValueError, match="a100-80g has no fp8"):
        best(replace(_wanted(), device=_device("a100-80g"), precision="fp8"))


def test_8_bits_are_taken_where_any_runtime_may_and_the_chip_has_them() -> None:
    assert best(_wanted(nodes=2, runtime="any")).layout.precision == "fp8"
    assert best(_wanted(nodes=2)).layout.precision == "bf16"
    assert (
        best(replace(_wanted(nodes=2, runtime="any"), device=_device("a100-80g"))).layout.precision == "bf16"
    )


def test_pairs_attend_within_themselves_and_stay_together() -> None:
    """64 pairs of 2,048 tokens: the work and memory of 64 sequences of 4,096 whose documents are half as long."""
    pairs = best(_wanted(seq_len=2048, rows=2), {"tp": 1, "cp": 1})
    whole = best(_wanted(seq_len=4096, document=2048), {"tp": 1, "cp": 1})
    assert pairs.layout.global_batch == 64
    assert pairs.time.seconds == pytest.approx(whole.time.seconds)
    assert pairs.memory.total == pytest.approx(whole.memory.total)


def test_a_reference_model_takes_its_share_of_memory() -> None:
    forced: dict[str, int | str] = {"tp": 1, "cp": 1, "dp_shard": 8, "micro_batch": 1, "recompute": "full"}
    alone = best(_wanted(), forced)
    beside = best(_wanted(beside=8_000_000_000), forced)
    assert beside.memory.weights - alone.memory.weights == pytest.approx(2.0e9)  # 8e9 x 2 bytes / 8


def test_a_cpu_runs_one_process() -> None:
    wanted = Wanted(known("pythia-70m"), load_accelerator("cpu").device, 512, 32, nodes=4)
    p = best(wanted)
    assert (p.layout.devices, p.layout.nodes, p.layout.tp, p.layout.global_batch) == (1, 1, 1, 32)
    assert p.memory.total <= p.limit
    assert options(wanted) == (replace(p, setup=options(wanted)[0].setup),)
    assert "one process on" in p.layout.why[0]
    with pytest.raises(ValueError, match="tp 2: cpu is one host"):
        best(wanted, {"tp": 2})


# --- what does not fit ------------------------------------------------------------------------------------


def test_8b_needs_more_than_one_h100() -> None:
    """16 bytes x 8.03e9 = 128 GB of state."""
    with pytest.raises(DoesNotFit) as told:
        best(_wanted(per_node=1))
    assert told.value.biggest == "optimizer"
    assert told.value.memory.total > 128e9
    _whole(best(_wanted()))


def test_the_nodes_that_are_said_to_be_enough_are_the_fewest() -> None:
    wanted = _wanted("llama3.1-405b", 64, 4)
    with pytest.raises(DoesNotFit) as told:
        best(wanted)
    more = int(told.value.hint.split()[0])
    assert told.value.hint.startswith(f"{more} node")
    _whole(best(replace(wanted, nodes=4 + more)))
    assert "devices with" in told.value.hint


@pytest.mark.parametrize(
    ("forced", "hint"),
    [
        ({"recompute": "none", "micro_batch": 4, "tp": 4}, "recompute none -> "),
        ({"tp": 1, "cp": 1, "dp_shard": 8, "devices": 64, "micro_batch": 1}, "dp_shard 8 -> "),
        ({"micro_batch": 64, "tp": 8, "devices": 64}, "micro_batch 64 -> "),
        ({"tp": 1, "cp": 1, "dp_replicate": 64, "dp_shard": 1, "nodes": 8}, "dp_shard 1 -> "),
    ],
)
def test_the_change_that_is_told_fits(forced: dict[str, int | str], hint: str) -> None:
    wanted = _wanted("llama3.1-70b", 512, 16)
    with pytest.raises(DoesNotFit) as told:
        best(wanted, forced)
    assert told.value.hint.startswith(hint)
    name, _, _, value = told.value.hint.split(" would fit")[0].split(" ")
    kept = {k: v for k, v in forced.items() if k != "dp_replicate"}
    _whole(best(wanted, {**kept, name: value if name == "recompute" else int(value)}))


def test_where_no_cluster_would_do_it_is_said() -> None:
    """One sequence a step gives no work to data ranks, and 8 devices of 24 GB hold no 405B."""
    with pytest.raises(DoesNotFit, match="no number of them would fit"):
        best(replace(_wanted("llama3.1-405b", 1), device=_device("rtx3090")))


def test_memory_that_is_said_to_be_enough_is_enough() -> None:
    with pytest.raises(DoesNotFit) as told:
        best(_wanted(per_node=1))
    need = float(told.value.hint.split("devices with ")[1].split(" GB")[0])
    bigger = replace(_device(), memory=need * 1e9 + 1e9, capacity=None)
    _whole(best(replace(_wanted(per_node=1), device=bigger)))


# --- reasons ----------------------------------------------------------------------------------------------


def test_reasons_say_what_would_not_fit() -> None:
    p = best(_wanted("llama3.1-70b", 64, 8))
    text = "\n".join(p.layout.why)
    assert "64 devices on 8 nodes: all there are" in text
    assert f"dp_shard {p.layout.dp_shard}" in text
    assert p.layout.recompute != "none"
    assert f"recompute {p.layout.recompute}: with " in text
    assert "GB usable" in p.layout.why[-1]


def test_reasons_say_when_a_batch_is_too_small() -> None:
    p = best(_wanted("llama3.1-8b", 8, 2))
    assert p.layout.tp == 2
    assert any("a batch of 8 does not feed 16 data ranks" in line for line in p.layout.why)


def test_layouts_are_found_once() -> None:
    assert best(_wanted()) is best(_wanted())
    assert isinstance(best(_wanted()).layout, Layout)
