"""`export`: a variant in another format: safetensors in bf16 or fp32, or ONNX with a key-value cache.

In: a model folder. Out: a whole Hugging Face folder (safetensors), or onnx/*.onnx. Parity checks it
afterwards.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from famc.errors import StepFailed, did_you_mean
from famc.job import Job
from famc.steps.others import EXPORTS
from famc.store import link_or_copy
from famc.work.scores import read_json, write_json

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


def run(job: Job, inputs: dict[str, Path], out: Path) -> dict[str, Any]:
    """Write the format that the step asks for."""
    fmt, quant = str(job.params["format"]), str(job.params["quant"])
    torch.set_num_threads(job.threads)
    if fmt == "safetensors" and quant in DTYPES:
        return safetensors(job, inputs["model"], out, quant)
    if fmt == "onnx":
        return onnx(job, inputs["model"], out, quant)
    known = [f"{f} {q}" for (f, q), archs in EXPORTS.items() if archs]
    raise StepFailed(f"no worker for the format {fmt} {quant}", did_you_mean(f"{fmt} {quant}", known))


def safetensors(job: Job, model: Path, out: Path, quant: str) -> dict[str, Any]:
    """The same folder with weights of another precision."""
    facts = convert_weights(model, out / WEIGHTS, quant, lambda done, total: job.progress(done, total))
    for name in HF_FILES:
        if (model / name).is_file() and name != "config.json":
            link_or_copy(model / name, out / name)
    config = read_json(model / "config.json")
    config.pop("torch_dtype", None)  # as transformers before 5 called it
    config["dtype"] = DTYPES[quant][2]
    write_json(out / "config.json", config)
    return {"file": WEIGHTS, **facts}


def onnx(job: Job, model: Path, out: Path, quant: str) -> dict[str, Any]:
    """One graph with the cache inside, for onnxruntime, onnxruntime-genai and transformers.js."""
    from famc.work.onnx_build import FILES, build_decoder

    if quant not in FILES:
        raise StepFailed(f"no ONNX export in {quant}", did_you_mean(quant, FILES))
    try:
        facts = build_decoder(
            model,
            out,
            quant,
            block_size=int(job.params.get("block_size", 32)),
            algorithm=str(job.params.get("algorithm", "rtn")),
        )
    except ValueError as error:
        raise StepFailed(str(error), "export it as safetensors, or change the architecture") from None
    return dict(facts)


def convert_weights(
    model: Path, target: Path, quant: str, progress: Any = lambda done, total: None
) -> dict[str, Any]:
    """All tensors of a model folder, sharded or not, into one file, one tensor in memory at a time.

    Floating-point tensors take the new type; a head that is tied to the embedding is not written a second
    time.
    """
    wanted, code, _ = DTYPES[quant]
    tied = bool(read_json(model / "config.json").get("tie_word_embeddings"))
    with ExitStack() as stack:
        where: dict[str, Any] = {}
        for shard in shards(model):
            opened = stack.enter_context(safe_open(shard, framework="pt"))
            where |= dict.fromkeys(opened.keys(), opened)
        if tied and "model.embed_tokens.weight" in where:
            where.pop("lm_head.weight", None)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name in sorted(where):
            view = where[name].get_slice(name)
            shape, kind = list(view.get_shape()), str(view.get_dtype())
            floating = kind in _FLOATS
            if not floating and kind not in _ITEM:
                raise StepFailed(
                    f"{name} of {model} is of type {kind}", "famc reads unquantised checkpoints only"
                )
            size = math.prod(shape) * (wanted.itemsize if floating else _ITEM[kind])
            header[name] = {
                "dtype": code if floating else kind, "shape": shape, "data_offsets": [at, at + size],
            }  # fmt: skip
            at += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        target.parent.mkdir(parents=True, exist_ok=True)
        parameters = 0
        with target.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for done, name in enumerate(sorted(where)):
                tensor = where[name].get_tensor(name)
                if tensor.is_floating_point():
                    tensor = tensor.to(wanted)
                    if not bool(torch.isfinite(tensor).all()):
                        hint = "training diverged: look at its losses"
                        raise StepFailed(
                            f"{name} of {model} holds numbers that are not finite in {quant}", hint
                        )
                parameters += tensor.numel()
                file.write(memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy()))
                progress(done + 1, len(where))
    return {"bytes": target.stat().st_size, "tensors": len(where), "parameters": parameters, "dtype": quant}


def shards(model: Path) -> Iterator[Path]:
    """The safetensors files of a model folder."""
    sharded = (model / INDEX).is_file()
    for name in sorted(set(read_json(model / INDEX)["weight_map"].values())) if sharded else [WEIGHTS]:
        if Path(name).name != name or not (model / name).is_file():
            raise StepFailed(f"{model} has no {name}", "famc reads safetensors only")
        yield model / name


_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_ITEM = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}
