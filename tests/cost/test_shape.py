"""Shapes: the published ones and those found for a parameter count."""

import time
from typing import Any

import pytest

from famc.cost.parameters import count
from famc.cost.shape import PRESETS, Moe, Shape, solve


@pytest.mark.parametrize("vocab", [4096, 49152])
@pytest.mark.parametrize(
    "params", [10**7, 5 * 10**7, 3 * 10**8, 10**9, 3 * 10**9, 7 * 10**9, 7 * 10**10, 5 * 10**11]
)
@pytest.mark.parametrize("arch", ["qwen3", "llama"])
def test_solve_hits_the_count_within_one_percent(arch: str, params: int, vocab: int) -> None:
    if params == 10**7 and vocab == 49152:
        pytest.skip("the embedding alone would take nearly all of it")
    shape = solve(arch, params, vocab)
    assert count(shape).total == pytest.approx(params, rel=0.015)
    assert shape.hidden % shape.head_dim == 0
    assert shape.heads * shape.head_dim == shape.hidden
    assert shape.kv_heads < shape.heads


def test_solve_reaches_one_million_with_a_small_vocabulary() -> None:
    assert count(solve("qwen3", 10**6, 4096)).total == pytest.approx(10**6, rel=0.02)


@pytest.mark.parametrize(
    ("params", "layers", "hidden"),
    [
        (8 * 10**9, (28, 44), (3072, 5120)),
        (3 * 10**9, (26, 44), (2048, 3200)),
        (70 * 10**9, (64, 100), (7168, 9728)),
    ],
)
def test_solve_looks_like_a_published_model(
    params: int, layers: tuple[int, int], hidden: tuple[int, int]
) -> None:
    """Near Qwen3-8B, Llama-3.2-3B and Llama-3.1-70B."""
    shape = solve("qwen3", params, 151936)
    assert layers[0] <= shape.layers <= layers[1]
    assert hidden[0] <= shape.hidden <= hidden[1]
    assert 2 <= shape.ffn / shape.hidden <= 4


def test_solve_obeys_what_it_is_told() -> None:
    shape = solve("llama", 10**9, 32000, tie=False, head_dim=64, context=32768)
    assert (shape.tie, shape.head_dim, shape.context) == (False, 64, 32768)
    assert shape.rope_theta > 10000


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("qwen3", 10**6, 151936), "smaller vocabulary"),
        (("qwen3", 10**5, 4096), "1M to 500B"),
        (("qwen3_moe", 10**9, 4096), "preset"),
    ],
)
def test_solve_says_what_to_change_when_it_cannot(arguments: tuple[str, int, int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        solve(*arguments)


def test_solve_is_quick() -> None:
    started = time.process_time()
    for params in range(10**9, 10**9 + 20):
        solve("qwen3", params, 32000)
    assert (time.process_time() - started) / 20 < 0.05


@pytest.mark.parametrize(
    "change",
    [
        {"heads": 6},
        {"layers": 0},
        {"arch": "gpt9"},
        {"head_dim": 33},
        {"arch": "qwen3_moe"},
        {"moe": Moe(4, 2, 64)},
    ],
)
def test_an_impossible_shape_is_refused(change: dict[str, Any]) -> None:
    good: dict[str, Any] = {
        "arch": "qwen3", "vocab": 512, "layers": 2, "hidden": 128, "ffn": 384, "heads": 4, "kv_heads": 4,
        "head_dim": 32, "tie": True, "context": 128,
    }  # fmt: skip
    Shape(**good)
    with pytest.raises(ValueError):
        Shape(**(good | change))


@pytest.mark.parametrize("params", [2 * 10**6, 2 * 10**7, 10**8, 4 * 10**8, 10**9])
@pytest.mark.parametrize("arch", ["bert", "modernbert", "t5"])
def test_solve_finds_readers(arch: str, params: int) -> None:
    shape = solve(arch, params, 8192 if params > 10**7 else 1024, context=512)
    assert count(shape).total == pytest.approx(params, rel=0.02)
    assert (shape.arch, shape.tie, shape.kv_heads) == (arch, True, shape.heads)
    assert shape.heads * shape.head_dim == shape.hidden
    assert 0.9 <= shape.ffn / shape.hidden <= 6.4


@pytest.mark.parametrize(
    ("params", "name"),
    [(109_514_298, "bert-base"), (395_881_664, "modernbert-large"), (222_903_552, "t5-base")],
)
def test_solve_looks_like_the_published_readers(params: int, name: str) -> None:
    known = PRESETS[name]
    found = solve(known.arch, params, known.vocab, context=known.context)
    assert found.hidden == pytest.approx(known.hidden, rel=0.2)
    assert found.layers == pytest.approx(known.layers, rel=0.35)


@pytest.mark.parametrize(
    "change",
    [
        {"arch": "bert", "kv_heads": 2}, {"arch": "t5", "kv_heads": 1}, {"arch": "modernbert", "tie": False},
        {"arch": "t5", "tie": False}, {"arch": "bert", "head_dim": 16}, {"arch": "t5", "moe": Moe(4, 2, 64)},
        {"arch": "modernbert", "hidden": 132, "head_dim": 33},
    ],
)  # fmt: skip
def test_an_impossible_reader_is_refused(change: dict[str, Any]) -> None:
    good: dict[str, Any] = {
        "arch": "bert", "vocab": 512, "layers": 2, "hidden": 128, "ffn": 384, "heads": 4, "kv_heads": 4,
        "head_dim": 32, "tie": True, "context": 128,
    }  # fmt: skip
    Shape(**good)
    with pytest.raises(ValueError):
        Shape(**(good | change))


def test_only_rotary_positions_need_even_heads() -> None:
    Shape("bert", 512, 2, 132, 384, 4, 4, 33, True, 128)
    Shape("t5", 512, 2, 128, 384, 4, 4, 33, True, 128)


def test_experts_a_token_uses_cannot_exceed_those_there_are() -> None:
    with pytest.raises(ValueError, match="active"):
        Moe(4, 8, 64)


def test_presets_cover_the_published_families() -> None:
    assert {"qwen3-0.6b", "qwen3-30b-a3b", "qwen3-235b-a22b", "llama3-8b", "llama3-70b"} <= set(PRESETS)
