"""A whole model quantised: its errors and perplexities are what an independent run measures, folding changes
no output, and the promise of mixed precision holds."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import TEXTS, make_tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from famc.errors import StepFailed
from famc.work.blocks import UNITS
from famc.work.calibrate import Calibrated, calibrate
from famc.work.quantize import ALGORITHMS, Grid, quantize

SYMMETRIC, ASYMMETRIC = Grid(4, 32, True), Grid(4, 32, False)
BLOCK = [part for unit in UNITS for part in unit]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def rows() -> list[list[int]]:
    """What the models have learnt, in rows of unlike length."""
    tokenizer = tiny_tokenizer()
    return [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in TEXTS]


@pytest.fixture(scope="module")
def shuffled() -> list[list[int]]:
    """The same words in other orders: 16 rows, the last eight of which no calibration sees."""
    tokenizer, order, words = tiny_tokenizer(), random.Random(0), " ".join(TEXTS).split()
    return [tokenizer(" ".join(order.choices(words, k=30)))["input_ids"] for _ in range(16)]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two query heads to a key head; the head is the embedding."""
    return make_tiny_model(tmp_path_factory.mktemp("qwen"), steps=60)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many key heads as query heads, biases everywhere, a head of its own."""
    folder = tmp_path_factory.mktemp("llama")
    shape = {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True, "intermediate_size": 144}
    return make_tiny_model(folder, "llama", tied=False, steps=60, **shape)


def load(folder: Path, made: Calibrated | None = None, *, weights: bool = True) -> Any:
    """The model with what `made` changed, as a graph's writer would put it together."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if made is not None:
        for name, tensor in made.folded.items():
            model.get_parameter(name).data.copy_(tensor)
        for name, matrix in made.weights.items() if weights else ():
            model.get_submodule(name).weight.data.copy_(matrix.dequantize())
    return model


def perplexity(model: Any, rows: Sequence[Sequence[int]]) -> float:
    total = count = 0.0
    for row in rows:
        ids = torch.tensor([row])
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=ids).loss) * (len(row) - 1)
        count += len(row) - 1
    return math.exp(total / count)


def divergence(model: Any, other: Any, rows: Sequence[Sequence[int]]) -> float:
    total = 0.0
    for row in rows:
        with torch.no_grad():
            p, q = (m(input_ids=torch.tensor([row])).logits.log_softmax(-1) for m in (model, other))
        total += float((p.exp() * (p - q)).sum())
    return total


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("which", ["qwen", "llama"])
def test_report_is_what_an_independent_run_measures(
    which: str, algorithm: str, rows: list[list[int]], request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(which)
    seen: list[tuple[float, float]] = []
    head = Grid(8, 32, False)
    made = calibrate(
        folder,
        rows,
        algorithm=algorithm,
        grid=ASYMMETRIC,
        head=head,
        progress=lambda a, b: seen.append((a, b)),
    )
    names = [f"model.layers.{layer}.{part}" for layer in range(2) for part in BLOCK] + ["lm_head"]
    assert list(made.weights) == names == [report.name for report in made.layers]
    assert all(
        r.bits == made.weights[r.name].grid.bits == (8 if r.name == "lm_head" else 4) for r in made.layers
    )
    assert made.perplexity["source"] == pytest.approx(perplexity(load(folder), rows), rel=1e-5)
    assert made.perplexity["quantized"] == pytest.approx(perplexity(load(folder, made), rows), rel=1e-5)
    assert made.perplexity["quantized"] < 1.01 * made.perplexity["source"]
    assert [a for a, _ in seen] == sorted(a for a, _ in seen) and seen[-1][0] == seen[-1][1]
    floats = load(folder, made, weights=False)
    for report in made.layers:
        weight = floats.get_submodule(report.name).weight.data
        assert report.weight_error == pytest.approx(made.weights[report.name].error(weight), rel=1e-3)


@pytest.mark.parametrize("algorithm", ["rtn", "gptq", "awq"])
def test_errors_are_on_the_inputs_that_quantised_predecessors_give(
    algorithm: str, qwen: Path, rows: list[list[int]]
) -> None:
    made = calibrate(qwen, rows, algorithm=algorithm, grid=SYMMETRIC, head=None)
    name = "model.layers.1.self_attn.k_proj"
    model, weight = load(qwen, made), load(qwen, made, weights=False).get_submodule(name).weight.data
    inputs: list[torch.Tensor] = []
    model.get_submodule(name).register_forward_pre_hook(lambda _, x: inputs.append(x[0][0]))
    for row in rows:
        with torch.no_grad():
            model(input_ids=torch.tensor([row]))
    x, quantized = torch.cat(inputs), made.weights[name].dequantize()
    expected = float((x @ (weight - quantized).T).square().sum() / (x @ weight.T).square().sum())
    report = next(r for r in made.layers if r.name == name)
    assert report.output_error == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("grid", [SYMMETRIC, ASYMMETRIC], ids=str)
@pytest.mark.parametrize("which", ["qwen", "llama"])
def test_awq_folds_scales_without_changing_the_float_model(
    which: str, grid: Grid, rows: list[list[int]], request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(which)
    made = calibrate(folder, rows, algorithm="awq", grid=grid, head=None)
    source, folded = load(folder), load(folder, made, weights=False)
    changed = {
        name for name, tensor in made.folded.items() if not torch.equal(tensor, source.get_parameter(name))
    }
    assert changed == set(made.folded) and len(made.folded) == len(list(made.folded)) > 0
    assert any("layernorm" in name for name in changed) and any("_proj.weight" in name for name in changed)
    assert any("o_proj" in name for name in changed) == (which == "llama")
    assert any("bias" in name for name in changed) == (which == "llama")
    with pytest.raises(KeyError):
        made.folded["model.norm.weight"]
    for row in rows:
        ids = torch.tensor([row])
        with torch.no_grad():
            assert torch.allclose(folded(input_ids=ids).logits, source(input_ids=ids).logits, atol=2e-4)


def test_awq_loses_less_than_rounding_and_gptq_less_than_awq(
    qwen: Path, rows: list[list[int]], shuffled: list[list[int]]
) -> None:
    output, unseen = {}, {}
    for name in ("rtn", "awq", "gptq"):
        made = calibrate(qwen, rows + shuffled[:8], algorithm=name, grid=SYMMETRIC, head=None)
        output[name] = sum(r.output_error for r in made.layers)
        unseen[name] = divergence(load(qwen), load(qwen, made), shuffled[8:])
    assert output["gptq"] < 0.5 * output["awq"] < 0.5 * output["rtn"]
    assert unseen["gptq"] < 0.6 * unseen["rtn"]  # on words in orders that calibration hasn't seen


def test_a_tied_head_takes_the_embedding_with_it(qwen: Path, llama: Path, rows: list[list[int]]) -> None:
    grid = Grid(8, 32, False)
    made = calibrate(qwen, rows, algorithm="hqq", grid=ASYMMETRIC, head=grid)
    embedding = load(qwen).model.embed_tokens.weight.data
    assert torch.equal(made.weights["lm_head"].codes, quantize(embedding, grid, "hqq").codes)
    own = calibrate(llama, rows, algorithm="gptq", grid=SYMMETRIC, head=Grid(8, 32, True))
    expected = quantize(load(llama).lm_head.weight.data, Grid(8, 32, True), "k_quant")
    assert torch.equal(own.weights["lm_head"].codes, expected.codes)
    assert 0 < own.layers[-1].output_error < 1e-3


def test_the_same_rows_give_the_same_bytes(qwen: Path, rows: list[list[int]]) -> None:
    for algorithm in ("gptq", "awq"):
        once, again = (
            calibrate(qwen, rows, algorithm=algorithm, grid=SYMMETRIC, head=None, max_drop=5e-4) for _ in "ab"
        )
        assert once.layers == again.layers and once.perplexity == again.perplexity
        for name, matrix in once.weights.items():
            assert torch.equal(matrix.codes, again.weights[name].codes), name
            assert torch.equal(matrix.scales, again.weights[name].scales), name


def test_a_short_last_block_and_rows_in_batches(
    llama: Path, rows: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = Grid(4, 40, True)  # divides neither 64 nor 144
    alike = [row[:20] for row in rows] + rows
    one = calibrate(llama, alike, algorithm="gptq", grid=grid, head=None)
    assert one.weights["model.layers.0.mlp.down_proj"].scales.shape == (64, 4)
    monkeypatch.setattr("famc.work.blocks.BATCH_TOKENS", 1)
    other = calibrate(llama, alike, algorithm="rtn", grid=grid, head=None)
    whole = perplexity(load(llama, other), alike)
    assert other.perplexity["quantized"] == pytest.approx(whole, rel=1e-5)


# --- mixed precision --------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["rtn", "gptq", "awq"])
def test_the_promise_holds_and_costs_less_the_less_it_says(
    algorithm: str, qwen: Path, rows: list[list[int]]
) -> None:
    plain = calibrate(qwen, rows, algorithm=algorithm, grid=SYMMETRIC, head=None)
    rise = plain.perplexity["quantized"] / plain.perplexity["source"] - 1
    assert rise > 1e-4
    kept = []
    for share in (1.01, 0.7, 0.4, 0.2):
        seen: list[tuple[float, float]] = []
        made = calibrate(
            qwen,
            rows,
            algorithm=algorithm,
            grid=SYMMETRIC,
            head=None,
            max_drop=share * rise,
            progress=lambda a, b, seen=seen: seen.append((a, b)),
        )
        bits = {report.name: report.bits for report in made.layers}
        assert all(made.weights[name].grid.bits == b for name, b in bits.items())
        for layer in range(2):
            for unit in UNITS:
                assert len({bits[f"model.layers.{layer}.{part}"] for part in unit}) == 1
        again = perplexity(load(qwen, made), rows) / perplexity(load(qwen), rows) - 1
        assert again <= share * rise + 2e-6
        assert made.perplexity["quantized"] / made.perplexity["source"] - 1 <= share * rise
        assert [a for a, _ in seen] == sorted(a for a, _ in seen) and seen[-1][0] == seen[-1][1]
        kept.append(sum(b == 8 for b in bits.values()))
    assert kept[0] == 0 < kept[1] <= kept[2] <= kept[3] < 14
    assert kept == sorted(kept) and len(set(kept)) > 2


def test_no_unit_is_kept_that_the_promise_does_not_need(qwen: Path, rows: list[list[int]]) -> None:
    plain = calibrate(qwen, rows, algorithm="rtn", grid=SYMMETRIC, head=None)
    made = calibrate(qwen, rows, algorithm="rtn", grid=SYMMETRIC, head=None, max_drop=5e-4)
    kept = {r.name for r in made.layers if r.bits == 8}
    source, without = perplexity(load(qwen), rows), []
    for layer in range(2):
        for unit in UNITS:
            names = [f"model.layers.{layer}.{part}" for part in unit]
            if kept.issuperset(names):
                model = load(qwen, made)
                for name in names:
                    model.get_submodule(name).weight.data.copy_(plain.weights[name].dequantize())
                without.append(perplexity(model, rows) / source - 1)
    assert max(without) > 5e-4  # one fewer, and the promise is broken


def test_an_impossible_promise_says_what_was_reached(qwen: Path, rows: list[list[int]]) -> None:
    with pytest.raises(StepFailed, match=r"with every layer at 8 bits; 1e-05 % are allowed") as caught:
        calibrate(qwen, rows, algorithm="rtn", grid=SYMMETRIC, head=None, max_drop=1e-7)
    assert "smaller blocks" in caught.value.hint
    with pytest.raises(StepFailed, match="no unit may have more bits"):
        calibrate(qwen, rows, algorithm="rtn", grid=SYMMETRIC, head=None, max_drop=1e-9, keep_bits=4)


# --- what is refused --------------------------------------------------------------------------------------


def test_what_cannot_be_done_is_said(qwen: Path, rows: list[list[int]], tmp_path: Path) -> None:
    def fails(match: str, folder: Path = qwen, some: Any = rows, algorithm: str = "rtn", **more: Any) -> None:
        with pytest.raises(StepFailed, match=match) as caught:
            calibrate(folder, some, algorithm=algorithm, **({"grid": SYMMETRIC, "head": None} | more))
        assert caught.value.hint

    fails("no algorithm 'gptk'", algorithm="gptk")
    fails("symmetric grid has none", algorithm="hqq")
    fails("at least two tokens", some=[[5], []])
    fails("a row of 300 tokens for a model of 256", some=[[5] * 300])
    config = json.loads((qwen / "config.json").read_text())
    for change, match in (
        ({"model_type": "gpt2"}, "doesn't know gpt2"),
        (
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0, "layer_types": None},
            "sliding",
        ),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        fails(match, tmp_path)
