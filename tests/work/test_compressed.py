"""A compressed-tensors folder loads, and is the model that its integers say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors import safe_open
from tiny_model import TEXTS, make_tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from famc.errors import StepFailed
from famc.work.calibrate import Calibrated, calibrate
from famc.work.compressed import write_compressed
from famc.work.quantize import Grid, quantize

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def rows() -> list[list[int]]:
    tokenizer = tiny_tokenizer()
    return [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in TEXTS]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("qwen"), steps=60)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With biases and a head of its own."""
    folder = tmp_path_factory.mktemp("llama")
    return make_tiny_model(
        folder, "llama", tied=False, steps=60, num_key_value_heads=4, attention_bias=True, mlp_bias=True
    )


def expected(folder: Path, made: Calibrated, dtype: torch.dtype) -> Any:
    """The dequantised weights in the float model: scales and products in the folder's type."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    for name, tensor in made.folded.items():
        model.get_parameter(name).data.copy_(tensor)
    for name, matrix in made.weights.items():
        rounded = replace(matrix, scales=matrix.scales.to(dtype).float())
        model.get_submodule(name).weight.data.copy_(rounded.dequantize())
    return model


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("which", "algorithm"), [("qwen", "gptq"), ("llama", "awq")])
def test_folder_loads_and_equals_the_dequantised_weights(
    which: str,
    algorithm: str,
    symmetric: bool,
    bits: int,
    dtype: str,
    rows: list[list[int]],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    folder, grid = request.getfixturevalue(which), Grid(bits, 32, symmetric)
    made = calibrate(folder, rows[:3], algorithm=algorithm, grid=grid, head=None)
    facts = write_compressed(folder, tmp_path, made, grid=grid, dtype=dtype)
    assert facts["bytes"] == (tmp_path / facts["file"]).stat().st_size
    assert facts[f"layers_int{bits}"] == 14 and facts[f"layers_int{12 - bits}"] == 0
    wanted = expected(folder, made, DTYPES[dtype])
    ways: list[dict[str, Any]] = [{"quantization_config": CompressedTensorsConfig(dequantize=True)}]
    if symmetric:  # else transformers expects zero points that are not packed, and refuses the folder
        ways.append({})
    for way in ways:
        model = AutoModelForCausalLM.from_pretrained(tmp_path, **way).eval()
        assert model.dtype == DTYPES[dtype]
        for row in rows:
            with torch.no_grad():
                found, right = (m(input_ids=torch.tensor([row])).logits for m in (model, wanted))
            assert torch.allclose(found, right, rtol=1e-5, atol=1e-4 if dtype == "fp32" else 0)


def test_layers_of_more_bits_are_a_group_of_their_own(
    qwen: Path, rows: list[list[int]], tmp_path: Path
) -> None:
    grid = Grid(4, 32, True)
    made = calibrate(qwen, rows, algorithm="gptq", grid=grid, head=None, max_drop=2e-4)
    finer = [report.name for report in made.layers if report.bits == 8]
    facts = write_compressed(qwen, tmp_path, made, grid=grid, dtype="fp32")
    assert 0 < facts["layers_int8"] == len(finer) < 14
    config = json.loads((tmp_path / "config.json").read_text())
    said = config["quantization_config"]
    coarse = [report.name for report in made.layers if report.bits == 4]
    groups = said["config_groups"]  # by name: vLLM would find "Linear" in "QKVParallelLinear" before a name
    assert groups["group_0"]["targets"] == coarse and groups["group_1"]["targets"] == finer
    assert groups["group_0"]["weights"]["num_bits"] == 4 and groups["group_1"]["weights"]["num_bits"] == 8
    assert said["format"] == "pack-quantized" and said["ignore"] == ["lm_head"]
    assert said["quantization_status"] == "compressed" and config["dtype"] == "float32"
    model, wanted = AutoModelForCausalLM.from_pretrained(tmp_path), expected(qwen, made, torch.float32)
    for row in rows:
        with torch.no_grad():
            found, right = (m(input_ids=torch.tensor([row])).logits for m in (model, wanted))
        assert torch.allclose(found, right, atol=1e-4)


@pytest.mark.parametrize("symmetric", [True, False])
def test_tensors_are_what_the_library_unpacks(
    symmetric: bool, qwen: Path, rows: list[list[int]], tmp_path: Path
) -> None:
    grid = Grid(4, 32, symmetric)
    made = calibrate(qwen, rows, algorithm="rtn", grid=grid, head=Grid(8, 32, symmetric))
    write_compressed(qwen, tmp_path, made, grid=grid)
    said = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(said).config_groups["group_0"]
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
        assert "lm_head.weight" not in names  # tied, and kept in floats as the embedding
        assert file.get_tensor("model.embed_tokens.weight").dtype == torch.bfloat16
        for name in made.weights.keys() - {"lm_head"}:
            assert f"{name}.weight" not in names
            assert (f"{name}.weight_zero_point" in names) == (not symmetric)
            parts = {n.rsplit(".", 1)[1]: file.get_tensor(n) for n in names if n.startswith(f"{name}.")}
            weight = BaseCompressor.get_value_from_registry(said["format"]).decompress(parts, scheme)[
                "weight"
            ]
            rounded = replace(made.weights[name], scales=made.weights[name].scales.bfloat16().float())
            assert torch.equal(weight, rounded.dequantize().bfloat16()), name


def test_the_same_weights_give_the_same_bytes(qwen: Path, rows: list[list[int]], tmp_path: Path) -> None:
    grid = Grid(4, 32, True)
    for name in "ab":
        made = calibrate(qwen, rows, algorithm="awq", grid=grid, head=None)
        write_compressed(qwen, tmp_path / name, made, grid=grid)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_what_the_format_or_its_readers_cannot_hold_is_refused(
    qwen: Path, rows: list[list[int]], tmp_path: Path
) -> None:
    short, grid = Grid(4, 48, True), Grid(4, 32, False)
    made = calibrate(qwen, rows, algorithm="rtn", grid=short, head=None)
    with pytest.raises(StepFailed, match="no short last block"):
        write_compressed(qwen, tmp_path, made, grid=short)
    made = calibrate(qwen, rows, algorithm="rtn", grid=grid, head=None)
    finer = {"model.layers.0.mlp.down_proj": quantize(torch.ones(64, 128), Grid(8, 32, False))}
    with pytest.raises(StepFailed, match="asymmetric weights of mixed bits"):
        write_compressed(qwen, tmp_path, replace(made, weights={**made.weights, **finer}), grid=grid)
    with pytest.raises(StepFailed, match=r"has no model\.layers\.9"):
        other = {"model.layers.9.mlp.down_proj": made.weights["model.layers.0.mlp.down_proj"]}
        write_compressed(qwen, tmp_path, replace(made, weights=other), grid=grid)
    assert not list(tmp_path.iterdir())
