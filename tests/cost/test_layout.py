"""The search for a layout."""

import time

import pytest

from famc.backend import load_accelerator
from famc.cost import memory
from famc.cost.layout import DoesNotFit, Layout, choose
from famc.cost.shape import PRESETS, Shape

H100 = load_accelerator("h100-80g").device
RTX4090 = load_accelerator("rtx4090").device
CPU = load_accelerator("cpu").device
TINY = Shape("qwen3", 4096, 6, 256, 768, 4, 2, 64, True, 256)


@pytest.mark.parametrize("batch", [1, 3, 8, 96, 100, 512])
@pytest.mark.parametrize(("nodes", "per_node"), [(1, 1), (1, 8), (4, 8)])
@pytest.mark.parametrize("name", ["qwen3-0.6b", "qwen3-8b"])
def test_a_layout_keeps_the_batch_and_fits(name: str, nodes: int, per_node: int, batch: int) -> None:
    shape = PRESETS[name]
    if name == "qwen3-8b" and nodes * per_node == 1:
        pytest.skip("does not fit one device")
    layout, held = choose(
        shape, context=4096, global_batch=batch, device=H100, nodes=nodes, per_node=per_node
    )
    assert layout.global_batch == batch
    assert layout.devices == layout.data * layout.tp * layout.cp * layout.pp <= nodes * per_node
    assert layout.nodes == -(-layout.devices // per_node)
    assert held.total <= H100.usable < H100.memory
    assert held == memory.training(shape, layout, 4096)
    assert layout.why


def test_all_devices_are_used_when_the_batch_feeds_them() -> None:
    layout, _ = choose(PRESETS["qwen3-8b"], context=4096, global_batch=256, device=H100, nodes=4, per_node=8)
    assert layout.devices == 32
    assert layout.tp == 1


def test_state_that_fits_a_node_is_sharded_inside_it() -> None:
    """Hybrid sharding: weights are gathered over the node's fast links only."""
    small, _ = choose(PRESETS["qwen3-8b"], context=4096, global_batch=256, device=H100, nodes=4, per_node=8)
    large, _ = choose(PRESETS["llama3-70b"], context=4096, global_batch=256, device=H100, nodes=4, per_node=8)
    assert (small.dp_shard, small.dp_replicate) == (8, 4)
    assert large.dp_shard * large.tp == 32


def test_a_batch_too_small_for_the_devices_turns_to_tensor_parallelism() -> None:
    layout, _ = choose(PRESETS["llama3-8b"], context=8192, global_batch=4, device=H100, per_node=8)
    assert (layout.devices, layout.tp, layout.data) == (8, 2, 4)
    assert any("tp 2" in reason for reason in layout.why)


def test_activations_that_do_not_fit_are_recomputed() -> None:
    layout, _ = choose(PRESETS["qwen3-8b"], context=16384, global_batch=8, device=H100, per_node=8)
    assert layout.recompute == "full" or layout.cp > 1 or layout.tp > 1
    assert any(word in " ".join(layout.why) for word in ("recompute", "cp", "tp"))


def test_a_long_context_is_split() -> None:
    layout, _ = choose(PRESETS["llama3-8b"], context=131072, global_batch=8, device=H100, per_node=8)
    assert layout.cp * layout.tp > 1


@pytest.mark.parametrize(
    "forced",
    [
        {"tp": 4},
        {"recompute": "full"},
        {"micro_batch": 2},
        {"devices": 4},
        {"dp_shard": 4},
        {"cp": 2},
        {"pp": 2},
        {"nodes": 1},
    ],
)
def test_forced_fields_hold(forced: dict[str, int | str]) -> None:
    layout, _ = choose(
        PRESETS["qwen3-1.7b"], context=4096, global_batch=64, device=H100, nodes=2, per_node=8, forced=forced
    )
    assert {k: getattr(layout, k) for k in forced} == forced
    assert layout.global_batch == 64


@pytest.mark.parametrize("forced", [{"tp": 3}, {"micro_batch": 7}, {"speed": 9}, {"pp": 5}, {"ep": 2}])
def test_forced_fields_that_cannot_be_are_a_value_error(forced: dict[str, int | str]) -> None:
    with pytest.raises(ValueError):
        choose(PRESETS["qwen3-1.7b"], context=4096, global_batch=64, device=H100, per_node=8, forced=forced)


def test_what_does_not_fit_is_named_with_a_way_out() -> None:
    with pytest.raises(DoesNotFit) as caught:
        choose(PRESETS["qwen3-1.7b"], context=2048, global_batch=64, device=RTX4090)
    assert caught.value.biggest == "optimizer"
    assert "devices" in caught.value.hint
    assert caught.value.memory.total > caught.value.limit == RTX4090.usable


def test_an_adapter_fits_where_full_training_does_not() -> None:
    layout, _ = choose(
        PRESETS["qwen3-1.7b"], context=2048, global_batch=64, device=RTX4090, trainable_params=17_000_000
    )
    assert layout.devices == 1


def test_the_hinted_number_of_devices_is_enough() -> None:
    with pytest.raises(DoesNotFit) as caught:
        choose(PRESETS["llama3-70b"], context=4096, global_batch=64, device=H100, per_node=8)
    need = next(int(w) for w in caught.value.hint.split() if w.isdigit())
    choose(PRESETS["llama3-70b"], context=4096, global_batch=64, device=H100, nodes=-(-need // 8), per_node=8)


def test_a_cpu_is_one_device_however_many_nodes() -> None:
    layout, held = choose(
        TINY, context=256, global_batch=96, device=CPU, nodes=4, per_node=8, precision="fp32"
    )
    assert (layout.devices, layout.nodes) == (1, 1)
    assert layout.micro_batch * layout.grad_accum == 96
    assert held.total < CPU.usable


def test_a_precision_the_device_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="bf16"):
        choose(TINY, context=256, global_batch=8, device=load_accelerator("v100-32g").device)


def test_a_mixture_spreads_over_many_nodes() -> None:
    shape = PRESETS["qwen3-235b-a22b"]
    layout, _ = choose(
        shape, context=4096, global_batch=1024, device=H100, nodes=32, per_node=8, forced={"ep": 8}
    )
    assert layout.ep == 8
    assert layout.devices == 256


def test_a_choice_takes_microseconds() -> None:
    """Plans have up to 10,000 steps; the same question is asked many times."""
    started = time.process_time()
    for repeat in range(2000):
        choose(PRESETS["qwen3-8b"], context=4096, global_batch=8 * (1 + repeat % 20), device=H100, per_node=8)
    assert (time.process_time() - started) / 2000 < 0.3e-3


def test_a_layout_is_hashable_and_equal_by_value() -> None:
    assert hash(Layout(tp=2)) == hash(Layout(tp=2))
