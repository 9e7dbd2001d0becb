"""A model folder as Hugging Face lays it out: which files it has, its weights read and written tensor by tensor, and
whether its configuration says anything that a format can't express.

In: a folder with config.json and safetensors, sharded or not. Out: one safetensors file; never two copies of a model in
memory, and nothing unpickled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, PretrainedConfig

from famc.errors import StepFailed
from famc.store import link_or_copy
from famc.work.scores import read_json

# safetensors' name of a type, and transformers' (config.json: dtype)
DTYPES: dict[str, tuple[torch.dtype, str, str]] = {
    "fp32": (torch.float32, "F32", "float32"),
    "bf16": (torch.bfloat16, "BF16", "bfloat16"),
}
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# All of a model folder that is for its users, but for weights and card. Nothing else of a folder is passed
# on.
HF_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
    "preprocessor_config.json", "processor_config.json", )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor of a safetensors file: its place in the header, and how to make it once its turn has come."""

    name: str
    code: str  # safetensors' name of the type
    shape: Sequence[int]
    make: Callable[[], torch.Tensor]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * ITEM[self.code]


def write_safetensors(
    target: Path, pieces: Iterable[Piece], progress: Callable[[float, float], None] = lambda done, total: None
) -> int:
    """Write the file, sorted by name, one tensor in memory at a time (the library's own writer wants all of them at
    once); returns how many numbers it holds."""
    ordered = sorted(pieces, key=lambda piece: piece.name)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = numbers = 0
    for piece in ordered:
        place = [at, at + piece.bytes]
        header[piece.name] = {"dtype": piece.code, "shape": list(piece.shape), "data_offsets": place}
        at += piece.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for done, piece in enumerate(ordered):
            tensor = piece.make().contiguous()
            if list(tensor.shape) != list(piece.shape):
                raise StepFailed(
                    f"{piece.name} is {list(tensor.shape)}, not {list(piece.shape)}", "a bug of famc"
                )
            numbers += tensor.numel()
            file.write(tensor.view(-1).view(torch.uint8).numpy().data)
            progress(done + 1, len(ordered))
    return numbers


def convert_weights(
    model: Path,
    target: Path,
    quant: str,
    progress: Callable[[float, float], None] = lambda done, total: None,
    *,
    replaced: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, Any]:
    """All tensors of a model folder, sharded or not, into one file; those in `replaced` instead of the folder's own.

    Floating-point tensors take the new type; a head that is tied to the embedding is not written a second time.
    """
    code = DTYPES[quant][1]
    tied = bool(read_json(model / "config.json").get("tie_word_embeddings"))

    def made(name: str, opened: Any) -> torch.Tensor:
        given = (replaced or {}).get(name)
        tensor: torch.Tensor = opened.get_tensor(name) if given is None else given
        return _finite(tensor, name, model, quant)

    with ExitStack() as stack:
        where: dict[str, Any] = {}
        for shard in shards(model):
            opened = stack.enter_context(safe_open(shard, framework="pt"))
            where |= dict.fromkeys(opened.keys(), opened)
        if tied and "model.embed_tokens.weight" in where:
            where.pop("lm_head.weight", None)
        pieces = []
        for name, opened in where.items():
            view = opened.get_slice(name)
            shape, kind = list(view.get_shape()), str(view.get_dtype())
            if kind not in ITEM:
                raise StepFailed(
                    f"{name} of {model} is of type {kind}", "famc reads unquantised checkpoints only"
                )
            pieces.append(Piece(name, code if kind in _FLOATS else kind, shape, partial(made, name, opened)))
        parameters = write_safetensors(target, pieces, progress)
    return {"bytes": target.stat().st_size, "tensors": len(pieces), "parameters": parameters, "dtype": quant}


def _finite(tensor: torch.Tensor, name: str, model: Path, quant: str) -> torch.Tensor:
    """The tensor in the new type, if it is of floats; they must be finite there."""
    if tensor.is_floating_point():
        tensor = tensor.to(DTYPES[quant][0])
        if not bool(torch.isfinite(tensor).all()):
            hint = "training diverged: look at its losses"
            raise StepFailed(f"{name} of {model} holds numbers that are not finite in {quant}", hint)
    return tensor


def shards(model: Path) -> Iterator[Path]:
    """The safetensors files of a model folder."""
    sharded = (model / INDEX).is_file()
    for name in sorted(set(read_json(model / INDEX)["weight_map"].values())) if sharded else [WEIGHTS]:
        if Path(name).name != name or not (model / name).is_file():
            raise StepFailed(f"{model} has no {name}", "famc reads safetensors only")
        yield model / name


_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
ITEM = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "U64": 8,
    "I32": 4,
    "U32": 4,
    "I16": 2,
    "U16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}


def copy_files(model: Path, out: Path) -> None:
    """All of a model folder that is for its users, but for weights, card and config.json."""
    for name in HF_FILES:
        if (model / name).is_file() and name != "config.json":
            link_or_copy(model / name, out / name)


def decoder_config(
    model_dir: Path, what: str, rope_types: Mapping[str, Sequence[str]],
    wrong: Callable[[PretrainedConfig, Mapping[str, Any]], Mapping[str, bool]] = lambda config, raw: {},
    *, both_ways: bool = False,
) -> PretrainedConfig:  # fmt: skip
    """The configuration of a decoder that a format can express; ValueError for what it can't make, or makes wrong
    silently.

    `rope_types`: kinds of RoPE by architecture whose logits were compared with torch's. `wrong`: more that the format
    can't do, from the configuration and config.json as it stands. `both_ways`: whether it can do without a causal mask.
    """
    raw = read_json(model_dir / "config.json")
    name = (raw.get("architectures") or [raw.get("model_type", "unknown")])[0]
    if name not in rope_types:
        raise ValueError(f"{what} doesn't know {name} ({model_dir}); it knows {', '.join(rope_types)}")
    config = AutoConfig.from_pretrained(model_dir, local_files_only=True)
    rope = config.rope_parameters
    found = {
        "is_causal: false (it would become causal)": not both_ways
        and getattr(config, "is_causal", True) is False,
        "sliding-window attention": "sliding_attention" in (getattr(config, "layer_types", None) or ()),
        f"RoPE of type {rope['rope_type']}": rope["rope_type"] not in rope_types[name],
        "a partial RoPE (it would become a full one)": rope.get("partial_rotary_factor", 1.0) != 1.0,
        **wrong(config, raw),
    }
    for fault, there in found.items():
        if there:
            raise ValueError(f"{what} can't do {name} with {fault} ({model_dir})")
    return config
