"""A quantised decoder as a Hugging Face folder of compressed-tensors, format `pack-quantized`: what vLLM and
transformers load.

In: the float model folder and what `calibrate` made of it. Out: config.json and model.safetensors, one tensor
in memory at a time. Tokenizer and the like are the caller's to copy. Every Linear of the blocks is
`weight_packed` (32 / bits codes in an int32), `weight_scale`, `weight_shape`, and when asymmetric
`weight_zero_point`; the head, the embedding and the norms stay floats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
)
from safetensors import safe_open

from famc.errors import StepFailed
from famc.work.blocks import HEAD
from famc.work.calibrate import Calibrated
from famc.work.checkpoint import DTYPES, WEIGHTS, Piece, shards, write_safetensors
from famc.work.quantize import Grid, Quantized
from famc.work.scores import read_json, write_json

Tensor = torch.Tensor

FORMAT = "pack-quantized"


def write_compressed(
    model_dir: Path, out: Path, made: Calibrated, *, grid: Grid, dtype: str = "bf16"
) -> dict[str, Any]:
    """Write the folder and say what was made. `grid` is that of the layers that kept no more bits; scales and
    all that isn't quantised are of `dtype`: bf16, or fp32, which only tests need."""
    layers = {name: matrix for name, matrix in made.weights.items() if name != HEAD}
    for name, matrix in layers.items():
        columns = matrix.codes.shape[1]
        if columns % matrix.grid.block_size:
            raise StepFailed(
                f"{name} has {columns} inputs, and compressed-tensors has no short last block",
                f"use a block_size that divides {columns}",
            )
    if not grid.symmetric and len({matrix.grid for matrix in layers.values()}) > 1:
        # transformers 5.23 reads asymmetric weights only by `dequantize`, and that takes one group's bits for
        # all: get_dense_scheme in its integrations/compressed_tensors.py
        raise StepFailed(
            "transformers can't read asymmetric weights of mixed bits", "use a symmetric grid, or bits alike"
        )
    config = read_json(model_dir / "config.json")
    config.pop("torch_dtype", None)
    config |= {"dtype": DTYPES[dtype][2], "quantization_config": quantization_config(layers, grid)}
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        pieces = list(_pieces(model_dir, layers, made, dtype, stack))
        write_safetensors(out / WEIGHTS, pieces)
    write_json(out / "config.json", config)
    bits = [matrix.grid.bits for matrix in layers.values()]
    return {
        "file": WEIGHTS,
        "bytes": (out / WEIGHTS).stat().st_size,
        "tensors": len(pieces),
        "dtype": dtype,
        **{f"layers_int{b}": bits.count(b) for b in (4, 8)},
    }


def quantization_config(layers: dict[str, Quantized], grid: Grid) -> dict[str, Any]:
    """What config.json says: one group on every Linear; or, of mixed bits, groups that name their layers,
    since vLLM looks for `Linear` in the class of a fused layer before it looks at the names of its parts."""
    names: dict[Grid, list[str]] = {}
    for name, matrix in sorted(layers.items(), key=lambda item: item[1].grid != grid):  # stable: `grid` first
        names.setdefault(matrix.grid, []).append(name)
    groups = {
        f"group_{number}": _scheme(targets if len(names) > 1 else ["Linear"], some)
        for number, (some, targets) in enumerate(names.items())
    }
    config = QuantizationConfig(
        config_groups=groups,
        format=FORMAT,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=[HEAD],
    )
    dumped: dict[str, Any] = config.model_dump(mode="json", exclude_none=True)
    return dumped


def _scheme(targets: list[str], grid: Grid) -> QuantizationScheme:
    weights = QuantizationArgs(
        num_bits=grid.bits,
        type="int",
        symmetric=grid.symmetric,
        strategy="group",
        group_size=grid.block_size,
    )
    return QuantizationScheme(targets=targets, weights=weights, format=FORMAT)


def _pieces(
    model_dir: Path, layers: dict[str, Quantized], made: Calibrated, dtype: str, stack: ExitStack
) -> Iterator[Piece]:
    wanted, code, _ = DTYPES[dtype]
    tied = bool(read_json(model_dir / "config.json").get("tie_word_embeddings"))
    seen: set[str] = set()
    for shard in shards(model_dir):
        opened = stack.enter_context(safe_open(shard, framework="pt"))
        for name in opened.keys():  # noqa: SIM118  # no mapping, and no iterator either
            module = name.removesuffix(".weight")
            seen.add(module)
            if module in layers:
                yield from _packed(module, layers[module], wanted, code)
            elif not (tied and module == HEAD):
                read = made.folded.__getitem__ if name in made.folded else opened.get_tensor
                shape = tuple(opened.get_slice(name).get_shape())
                yield Piece(name, code, shape, partial(_float, read, name, wanted))
    if missing := sorted(layers.keys() - seen):
        raise StepFailed(f"{model_dir} has no {missing[0]}", "it isn't the model that was quantised")


def _float(read: Callable[[str], Tensor], name: str, wanted: torch.dtype) -> Tensor:
    return read(name).to(wanted)


def _packed(module: str, matrix: Quantized, wanted: torch.dtype, code: str) -> Iterator[Piece]:
    bits, middle = matrix.grid.bits, matrix.grid.middle
    (rows, columns), blocks = matrix.codes.shape, matrix.scales.shape[1]

    def signed(codes: Tensor) -> Tensor:  # the library's integers are signed, and packed with an offset
        return (codes.to(torch.int16) - middle).to(torch.int8)

    width = math.ceil(columns * bits / 32)
    yield Piece(
        f"{module}.weight_packed", "I32", (rows, width), lambda: pack_to_int32(signed(matrix.codes), bits)
    )
    yield Piece(f"{module}.weight_scale", code, (rows, blocks), lambda: matrix.scales.to(wanted))
    yield Piece(f"{module}.weight_shape", "I64", (2,), lambda: torch.tensor([rows, columns]))
    zeros = matrix.zeros
    if zeros is not None:
        yield Piece(
            f"{module}.weight_zero_point",
            "I32",
            (math.ceil(rows * bits / 32), blocks),
            lambda: pack_to_int32(signed(zeros), bits, packed_dim=0),
        )
