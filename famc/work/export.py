"""`export`: a variant in another format: safetensors, ONNX, GGUF, or calibrated int4 and int8 for vLLM.

In: a model folder; for calibrated ones `data.<name>` (mixes) and the tokenizer. Out, by format: a whole Hugging Face
folder (safetensors; gptq and awq in compressed-tensors' layout), onnx/*.onnx with genai_config.json, or *.gguf. Where
weights were quantised, layers.json says how far each matrix is from its source. Parity checks the files afterwards.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from famc.errors import StepFailed, did_you_mean
from famc.job import Job
from famc.steps.exports import CONVERTING, RANKING, TEXT, VECTORS, gguf_name
from famc.store import link_or_copy
from famc.work.checkpoint import DTYPES, WEIGHTS, convert_weights, copy_files
from famc.work.likelihood import encode_chat, load_tokenizer
from famc.work.rows import examples
from famc.work.scores import read_json, stable, write_json

if TYPE_CHECKING:
    from famc.work.calibrate import Calibrated
    from famc.work.onnx_build import Quant
    from famc.work.onnx_encoder import EncoderQuant, EncoderTask
    from famc.work.onnx_seq2seq import Seq2SeqQuant
    from famc.work.quantize import Grid

LAYERS = "layers.json"


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
    copy_modules(model, out)
    config = read_json(model / "config.json")
    config.pop("torch_dtype", None)  # as transformers before 5 called it
    config["dtype"] = DTYPES[quant][2]
    write_json(out / "config.json", config)
    return {"file": WEIGHTS, **facts}


# what sentence-transformers writes beside the weights; other files of its folders are its card and its caches
MODULE_FILES = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json")


def copy_modules(model: Path, out: Path) -> list[str]:
    """sentence-transformers' files of an embedder or reranker, without which a folder gives other vectors; their names
    in the folder."""
    made = [name for name in MODULE_FILES if (model / name).is_file()]
    if "modules.json" in made:
        for module in read_json(model / "modules.json"):
            folder = str(module["path"])
            if folder:  # the transformer's own is ""
                if Path(folder).name != folder:
                    raise StepFailed(
                        f"{model}/modules.json names the folder {folder!r}", "it must lie inside"
                    )
                made += [
                    path.relative_to(model).as_posix() for path in sorted((model / folder).glob("*.json"))
                ]
    for name in made:
        link_or_copy(model / name, out / name)
    return made


def onnx(job: Job, inputs: dict[str, Path], out: Path) -> dict[str, Any]:
    """One graph: a decoder's with the cache inside, an embedder's with its pooling; of a T5 two."""
    from famc.work.onnx_build import build_decoder, recipe_of

    if (task := str(job.params.get("task", TEXT))) in (VECTORS, RANKING):
        return encoder(job, inputs["model"], out, cast("EncoderTask", task))
    if task == CONVERTING:
        from famc.work.onnx_seq2seq import build_seq2seq

        return dict(build_seq2seq(inputs["model"], out, cast("Seq2SeqQuant", str(job.params["quant"]))))
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


def encoder(job: Job, model: Path, out: Path, task: EncoderTask) -> dict[str, Any]:
    """An embedder's or reranker's graph, with how its weights lose their bits if it has few."""
    from famc.work.onnx_encoder import build_encoder, int4_recipe

    words = {k: job.params[k] for k in ("block_size", "algorithm", "symmetric") if k in job.params}
    recipe = int4_recipe(**words) if words else None
    quant = cast("EncoderQuant", str(job.params["quant"]))
    return dict(build_encoder(model, out, quant, task=task, recipe=recipe))


def gguf(job: Job, inputs: dict[str, Path], out: Path) -> dict[str, Any]:
    """One file for llama.cpp and what is built on it."""
    from famc.work.gguf_build import build_gguf

    quant, name, task = (str(job.params.get(key, TEXT)) for key in ("quant", "name", "task"))
    return dict(
        build_gguf(
            inputs["model"], out / gguf_name(name, quant), quant, name=name, task=task, threads=job.threads,
            progress=job.progress,
        )
    )  # fmt: skip


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
