"""A Hugging Face decoder folder to ONNX: fp32, fp16, int8 or int4 weights, with the key-value cache in the graph.

In: a model folder. Out: `onnx/model*.onnx` as transformers.js names them, and genai_config.json beside onnx/, with
which the very same file loads in onnxruntime-genai.
onnxruntime-genai's model builder makes the float graph; famc takes the bits away (onnx_quantize.py) and puts right
what would keep others from loading it or make its bytes change: the names of dimensions, external data, and the
stamp of the producer.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import logging
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir

from famc.steps.exports import ASYMMETRIC, DATA_FREE_BLOCK, GENAI_CONFIG
from famc.work.checkpoint import decoder_config
from famc.work.onnx_file import quiet, save
from famc.work.onnx_quantize import Recipe, quantize_graph
from famc.work.quantize import ALGORITHMS, CALIBRATED, Grid, Quantized
from famc.work.scores import write_json

log = logging.getLogger(__name__)

Quant = Literal["fp32", "fp16", "int8", "int4"]

# the names that transformers.js looks for, by its `dtype` option
FILES: dict[Quant, str] = {
    "fp32": "model.onnx", "fp16": "model_fp16.onnx", "int8": "model_int8.onnx", "int4": "model_q4.onnx",
}  # fmt: skip

# Architectures and their kinds of RoPE whose logits equal torch's. The builder knows more: compare before
# adding one (it divides by zero on yarn's defaults, and reads a partial RoPE as a full one).
ROPE_TYPES = {
    "LlamaForCausalLM": ("default", "linear", "llama3"),
    "Qwen3ForCausalLM": ("default", "linear"),
}


def build_decoder(
    model_dir: Path,
    out: Path,
    quant: Quant,
    *,
    recipe: Recipe | None = None,
    progress: Callable[[float, float], None] = lambda done, total: None,
) -> dict[str, float | int | str]:
    """Write `out/onnx/model.onnx`, `model_fp16.onnx`, `model_int8.onnx` or `model_q4.onnx` and `out/genai_config.json`,
    and say what was made.

    `recipe` says how int8 and int4 weights lose their bits (default: `recipe_of(quant)`). ValueError for an
    architecture that can't be exported, or that would come out wrong.
    """
    if quant in ("fp32", "fp16"):
        if recipe is not None:
            raise ValueError(f"an {quant} export has no recipe: nothing is quantised")
    else:
        recipe = recipe or recipe_of(quant)
    begun = time.perf_counter()
    config = decoder_config(model_dir, "the ONNX export", ROPE_TYPES)
    target = out / "onnx" / FILES[quant]
    target.parent.mkdir(parents=True, exist_ok=True)
    errors: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix=".onnx-", dir=out) as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        _run_builder(model_dir, made, "fp16" if quant == "fp16" else "fp32")
        model = ir.load(made / "model.onnx")
        genai = json.loads((made / GENAI_CONFIG).read_text(encoding="utf-8"))
        _name_cache_dims(model, int(genai["model"]["decoder"]["head_size"]))
        if recipe is not None:
            errors = quantize_graph(model, recipe, tied=config.tie_word_embeddings, progress=progress)
        _stamp(model)
        save(model, target)  # before the scratch folder goes: the weights are still mapped from it
        write_json(out / GENAI_CONFIG, genai_config(genai, target.name))
        return _facts(model, target, errors, time.perf_counter() - begun)


def recipe_of(
    quant: str,
    *,
    block_size: int = DATA_FREE_BLOCK,
    algorithm: str = "k_quant",
    symmetric: bool | None = None,
    lm_head: str = "int8",
    embeddings: str = "int8",
    made: Mapping[str, Quantized] | None = None,
) -> Recipe:
    """A recipe from the words of a spec: `block_size` weights share a scale; `lm_head` and `embeddings` are `int4`,
    `int8` or `fp32`. Eight bits for the head of an int4 model cost little and give most of the quality back.

    `symmetric` None: as the algorithm has it (searches for zero points need zero points).
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(f"the ONNX export doesn't know the algorithm {algorithm!r}; it knows {ALGORITHMS}")
    if algorithm in CALIBRATED and not made and quant == "int4":
        raise ValueError(f"{algorithm} needs matrices that were calibrated before")
    if symmetric is None:
        symmetric = algorithm not in ASYMMETRIC
    bits = {"int4": 4, "int8": 8}
    if quant == "int8":
        lm_head = "int8" if lm_head == "int4" else lm_head
        embeddings = "int8" if embeddings == "int4" else embeddings

    def grid(word: str) -> Grid | None:
        # eight bits lie so near that a zero point gains nothing, and a head without one is read faster
        return Grid(bits[word], block_size, symmetric if bits[word] == 4 else True) if word in bits else None

    body = grid(quant)
    if body is None:
        raise ValueError(f"{quant} is no quantisation of ONNX: {', '.join(bits)}")
    return Recipe(body, algorithm, grid(lm_head), grid(embeddings), made or {})


def genai_config(made: Mapping[str, Any], file: str) -> dict[str, Any]:
    """The builder's genai_config.json for a graph below onnx/, on any provider: what is in the file decides."""
    config: dict[str, Any] = json.loads(json.dumps(made))
    decoder = config["model"]["decoder"]
    decoder["filename"] = f"onnx/{file}"
    decoder["session_options"]["provider_options"] = []
    return config


def _run_builder(model_dir: Path, made: Path, precision: str) -> None:
    # fp16 is for GPUs, but the file must run (and be compared) on a CPU as well: attention that takes the norms of
    # q and k into itself exists on GPUs only.
    provider = "webgpu" if precision == "fp16" else "cpu"
    options = ["hf_token=false", *(["fuse_qk_norm_gqa=false"] if precision == "fp16" else [])]
    with quiet():
        # Here, not above: this import appends the builder's folder to sys.path and loads every architecture.
        from onnxruntime_genai.models.builder import create_model, parse_extra_options

        where = (None, str(model_dir), str(made), precision, provider, str(made.parent / "cache"))
        create_model(*where, **parse_extra_options(*where, options))
    gc.collect()  # the builder's model is a web of cycles: torch's weights go with it


def _name_cache_dims(model: ir.Model, head_dim: int) -> None:
    """transformers.js makes the empty cache from the graph: `batch_size` by name, the head size in digits."""
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.name and value.name.startswith(("past_key_values.", "present.")) and value.shape is not None:
            value.shape = ir.Shape(["batch_size", *value.shape[1:3], head_dim])


def _stamp(model: ir.Model) -> None:
    """The builder's version alone. The builder adds the commit of whatever git repository its virtual
    environment lies in: the same model would get other bytes after every commit of the user's own."""
    model.producer_name = "onnxruntime-genai"
    model.producer_version = importlib.metadata.version("onnxruntime-genai")


def _facts(
    model: ir.Model, target: Path, errors: Mapping[str, float], seconds: float
) -> dict[str, float | int | str]:
    bits = [_integer(node, "bits") for node in model.graph if node.op_type == "MatMulNBits"]
    data = target.with_name(target.name + "_data")
    external = data.stat().st_size if data.exists() else 0
    facts: dict[str, float | int | str] = {
        "file": str(Path("onnx") / target.name),
        "bytes": target.stat().st_size + external,
        "external_bytes": external,
        "nodes": sum(1 for _ in model.graph),
        "nodes_int4": bits.count(4),
        "nodes_int8": bits.count(8),
        "nodes_float": sum(_reads_weights(node) for node in model.graph),
        "embedding": _kept_as(model, "/model/embed_tokens/"),
        "lm_head": _kept_as(model, "/lm_head/"),
        "seconds": seconds,
    }
    if errors:
        worst = max(errors, key=lambda name: errors[name])
        facts |= {"weight_error_worst": errors[worst], "worst": worst}
        facts["weight_error_mean"] = sum(errors.values()) / len(errors)
    return facts


def _reads_weights(node: ir.Node) -> bool:
    """A MatMul with a matrix of its own: one that was not quantised."""
    return node.op_type == "MatMul" and any(v is not None and v.const_value is not None for v in node.inputs)


def _kept_as(model: ir.Model, prefix: str) -> str:
    """`fp32`, `fp16`, `int8` or `int4`: the weights that the nodes under `prefix` read."""
    nodes = [node for node in model.graph if (node.name or "").startswith(prefix)]
    found = [_integer(node, "bits") for node in nodes if "bits" in node.attributes]
    if found:
        return f"int{found[0]}"
    logits = next(value for value in model.graph.outputs if value.name == "logits")
    return "fp16" if logits.dtype == ir.DataType.FLOAT16 else "fp32"


def _integer(node: ir.Node, name: str) -> int:
    return int(node.attributes[name].as_int())
