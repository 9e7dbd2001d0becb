"""`export`: a variant in another format: safetensors, ONNX, GGUF, or calibrated int4 and int8 for vLLM.

In: a model folder; for calibrated ones `data.<name>` (mixes) and the tokenizer. Out, by format: a whole Hugging Face
folder (safetensors; gptq and awq in compressed-tensors' layout), onnx/*.onnx with genai_config.json, or *.gguf. Where
weights were quantised, layers.json says how far each matrix is from its source. Parity checks the files afterwards.
"""

from __future__ import annotations

import itertools
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from safetensors import safe_open

from famc.errors import StepFailed, did_you_mean
from famc.job import Job
from famc.store import link_or_copy
from famc.work.likelihood import encode_chat, load_tokenizer
from famc.work.rows import examples
from famc.work.scores import read_json, stable, write_json

if TYPE_CHECKING:
    from famc.work.calibrate import Calibrated
    from famc.work.onnx_build import Quant
    from famc.work.quantize import Grid

# safetensors' name of a type, and transformers' (config.json: dtype)
DTYPES: dict[str, tuple[torch.dtype, str, str]] = {
    "fp32": (torch.float32, "F32", "float32"),
    "bf16": (torch.bfloat16, "BF16", "bfloat16"),
}
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
LAYERS = "layers.json"
# All of a model folder that is for its users, but for weights and card. Nothing else of a folder is passed
# on.
HF_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
    "preprocessor_config.json", "processor_config.json", )  # fmt: skip


def run(job: Job, inputs: dict[str, Path], out: Path) -> dict[str, Any]:
    """Write the format that the step asks for."""
    torch.set_num_threads(job.threads)
    worker = FORMATS.get(str(job.params["format"]))
    if worker is None:
        wanted = f"{job.params['format']} {job.params['quant']}"
        raise StepFailed(f"no worker for the format {wanted}", did_you_mean(wanted, FORMATS))
    try:
        return worker(job, inputs, out)
    except ValueError as error:  # an architecture that a format can't express: nothing was written
        raise StepFailed(f"{job.name}: {error}", "famc doctor --exports shows what can be made") from None


def safetensors(job: Job, inputs: dict[str, Path], out: Path) -> dict[str, Any]:
    """The same folder with weights of another precision."""
    model, quant = inputs["model"], str(job.params["quant"])
    if quant not in DTYPES:
        raise ValueError(f"safetensors has no {quant}: {', '.join(DTYPES)}")
    facts = convert_weights(model, out / WEIGHTS, quant, job.progress)
    copy_files(model, out)
    config = read_json(model / "config.json")
    config.pop("torch_dtype", None)  # as transformers before 5 called it
    config["dtype"] = DTYPES[quant][2]
    write_json(out / "config.json", config)
    return {"file": WEIGHTS, **facts}


def onnx(job: Job, inputs: dict[str, Path], out: Path) -> dict[str, Any]:
    """One graph with the cache inside, for onnxruntime, onnxruntime-genai and transformers.js."""
    from famc.work.onnx_build import build_decoder, recipe_of

    params, quant = job.params, cast("Quant", str(job.params["quant"]))
    if quant in ("fp32", "fp16"):
        return dict(build_decoder(inputs["model"], out, quant))
    words = {
        k: params[k] for k in ("block_size", "algorithm", "symmetric", "lm_head", "embeddings") if k in params
    }
    if "examples" not in params:
        return dict(
            build_decoder(
                inputs["model"], out, quant, recipe=recipe_of(quant, **words), progress=job.progress
            )
        )
    plain = recipe_of(quant, **(words | {"algorithm": "rtn"}))  # for its grids
    made = calibrated(job, inputs, plain.grid, plain.head)
    recipe = recipe_of(quant, **words, made=made.weights)
    with tempfile.TemporaryDirectory(prefix=".folded-", dir=out) as scratch:
        model = inputs["model"]
        if made.folded:
            model = folded(inputs["model"], Path(scratch), made.folded)
        facts = build_decoder(model, out, quant, recipe=recipe)
    return {**facts, **layer_facts(out, made)}


def gguf(job: Job, inputs: dict[str, Path], out: Path) -> dict[str, Any]:
    """One file for llama.cpp and what is built on it."""
    from famc.work.gguf_build import build_gguf

    quant, name = str(job.params["quant"]), str(job.params["name"])
    target = out / gguf_name(name, quant)
    return dict(
        build_gguf(inputs["model"], target, quant, name=name, threads=job.threads, progress=job.progress)
    )


def gguf_name(name: str, quant: str) -> str:
    """As llama.cpp's users name files, and ollama and the hub read the quantisation from them.

    >>> gguf_name("pydoc-m-instruct", "q4_k_m")
    'pydoc-m-instruct-Q4_K_M.gguf'
    """
    return f"{name}-{quant.upper()}.gguf"


def compressed(job: Job, inputs: dict[str, Path], out: Path) -> dict[str, Any]:
    """GPTQ or AWQ weights in compressed-tensors' layout: a folder that vLLM and transformers load."""
    from famc.work.compressed import write_compressed
    from famc.work.quantize import Grid

    params = job.params
    grid = Grid(int(params["quant"]), int(params["block_size"]), bool(params["symmetric"]))
    made = calibrated(job, inputs, grid, None)
    facts = write_compressed(inputs["model"], out, made, grid=grid)
    copy_files(inputs["model"], out)
    return {**facts, **layer_facts(out, made)}


FORMATS: Mapping[str, Callable[[Job, dict[str, Path], Path], dict[str, Any]]] = {
    "safetensors": safetensors,
    "onnx": onnx,
    "gguf": gguf,
    "gptq": compressed,
    "awq": compressed,
}


def calibrated(job: Job, inputs: dict[str, Path], grid: Grid, head: Grid | None) -> Calibrated:
    """The model's matrices, quantised with an eye on the family's own data."""
    from famc.work.calibrate import calibrate

    params = job.params
    each = math.ceil(int(params["examples"]) / len(params["calibrate"]))
    rows: list[list[int]] = []
    for name in params["calibrate"]:
        rows += calibration_rows(inputs[f"data.{name}"], inputs["tokenizer"], each, int(params["context"]))
    return calibrate(
        inputs["model"],
        rows,
        algorithm=str(params["algorithm"]),
        grid=grid,
        head=head,
        max_drop=params["max_drop"],
        threads=job.threads,
        progress=job.progress,
    )


def calibration_rows(data: Path, tokenizer: Path, n: int, context: int) -> list[list[int]]:
    """Token rows of a mix: whole conversations (a preference's chosen one), or rows of text."""
    words = load_tokenizer(tokenizer)
    if (data / "tokens.npy").is_file():
        stream = np.load(data / "tokens.npy", mmap_mode="r")
        starts = range(0, max(1, len(stream) - 1), context)
        rows = [[int(token) for token in stream[at : at + context]] for at in list(starts)[:n]]
    else:
        rows = []
        for example in itertools.islice(examples(data), n):
            messages = example["messages"] if "messages" in example else example["prompt"] + example["chosen"]
            if messages:
                rows.append(list(encode_chat(words, messages)[0])[:context])
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise StepFailed("the calibration data has no example", "name another source under calibrate.data")
    return rows


def folded(model: Path, out: Path, replaced: Mapping[str, torch.Tensor]) -> Path:
    """The same model with some parameters changed: what AWQ's scales were folded into."""
    convert_weights(model, out / WEIGHTS, "fp32", replaced=replaced)
    copy_files(model, out)
    link_or_copy(model / "config.json", out / "config.json")
    return out


def layer_facts(out: Path, made: Calibrated) -> dict[str, Any]:
    """layers.json: every matrix with its bits and errors, worst first; and the sum of it as metrics."""
    layers = sorted(made.layers, key=lambda layer: (-layer.output_error, layer.name))
    rows = [
        {
            "name": layer.name,
            "bits": layer.bits,
            "weight_error": stable(layer.weight_error),
            "output_error": stable(layer.output_error),
        }
        for layer in layers
    ]
    write_json(
        out / LAYERS, {"layers": rows, "perplexity": {k: stable(v) for k, v in made.perplexity.items()}}
    )
    kept = [layer.name for layer in layers if layer.bits == 8 and layer.name != "lm_head"]
    return {
        "output_error_worst": layers[0].output_error,
        "worst": layers[0].name,
        "kept_at_8_bits": len(kept),
        "calibration_perplexity_source": made.perplexity["source"],
        "calibration_perplexity": made.perplexity["quantized"],
    }


def copy_files(model: Path, out: Path) -> None:
    """All of a model folder that is for its users, but for weights, card and config.json."""
    for name in HF_FILES:
        if (model / name).is_file() and name != "config.json":
            link_or_copy(model / name, out / name)


def convert_weights(
    model: Path,
    target: Path,
    quant: str,
    progress: Any = lambda done, total: None,
    *,
    replaced: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, Any]:
    """All tensors of a model folder, sharded or not, into one file, one tensor in memory at a time; those in
    `replaced` instead of the folder's own.

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
                given = (replaced or {}).get(name)
                tensor: torch.Tensor = where[name].get_tensor(name) if given is None else given
                if tensor.is_floating_point():
                    tensor = tensor.to(wanted)
                    if not bool(torch.isfinite(tensor).all()):
                        hint = "training diverged: look at its losses"
                        raise StepFailed(
                            f"{name} of {model} holds numbers that are not finite in {quant}", hint
                        )
                parameters += tensor.numel()
                file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
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
