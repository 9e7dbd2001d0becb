"""A Hugging Face decoder folder to ONNX: fp32, int8 or int4 weights, with the key-value cache in the graph.

onnxruntime-genai's model builder makes the graph; famc puts right what would keep others from loading it or
make its bytes change: the names of dimensions, external data, and the stamp of the producer.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir
from transformers import AutoConfig, PretrainedConfig

log = logging.getLogger(__name__)

Quant = Literal["fp32", "int8", "int4"]

# the names that transformers.js looks for, by its `dtype` option
FILES: dict[Quant, str] = {"fp32": "model.onnx", "int8": "model_int8.onnx", "int4": "model_q4.onnx"}

# Architectures and their kinds of RoPE whose logits equal torch's. The builder knows more: compare before
# adding one (it divides by zero on yarn's defaults, and reads a partial RoPE as a full one).
ROPE_TYPES = {
    "LlamaForCausalLM": ("default", "linear", "llama3"),
    "Qwen3ForCausalLM": ("default", "linear"),
}
ARCHITECTURES = tuple(ROPE_TYPES)

# The builder's third, `default`, gives a broken graph for a tied int4 model with its head at 8 bits.
ALGORITHMS = ("rtn", "k_quant")

# A protobuf message ends at 2^31 - 1 bytes; the graph around the weights gets 16 MiB of that.
INLINE_LIMIT = 2**31 - 2**24


def build_decoder(
    model_dir: Path,
    out: Path,
    quant: Quant,
    *,
    block_size: int = 32,
    algorithm: str = "rtn",
    last_matmul_int8: bool = True,
) -> dict[str, float | int | str]:
    """Write `out/onnx/model.onnx`, `model_int8.onnx` or `model_q4.onnx`, and say what was made.

    `block_size` weights share a scale; `algorithm` is `rtn` or `k_quant`; `last_matmul_int8` keeps the output
    head of an int4 model at 8 bits, which costs little and gives most of the quality back.
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(f"the ONNX export doesn't know the algorithm {algorithm!r}; it knows {ALGORITHMS}")
    begun = time.perf_counter()
    config = _checked_config(model_dir)
    options = ["hf_token=false"]
    if quant != "fp32":
        options += [f"block_size={block_size}", f"algo_config={algorithm}"]
    if quant == "int4" and last_matmul_int8:
        options += ["matmul_mixed_precision=last_matmul:int8"]

    target = out / "onnx" / FILES[quant]
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".onnx-", dir=out) as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        _run_builder(model_dir, made, quant, options)
        model = ir.load(made / "model.onnx")
        genai = json.loads((made / "genai_config.json").read_text(encoding="utf-8"))
        _name_cache_dims(model, int(genai["model"]["decoder"]["head_size"]))
        if config.tie_word_embeddings:
            _share_embedding(model)
        _stamp(model)
        _save(model, target)  # before the scratch folder goes: the weights are still mapped from it
        return _facts(model, target, time.perf_counter() - begun)


def _checked_config(model_dir: Path) -> PretrainedConfig:
    """The folder's configuration; ValueError for what the builder can't make, or makes wrong silently."""
    raw = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    name = (raw.get("architectures") or [raw.get("model_type", "unknown")])[0]
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"the ONNX export of decoders doesn't know {name} ({model_dir}); it knows {known}")
    config = AutoConfig.from_pretrained(model_dir, local_files_only=True)
    rope = config.rope_parameters
    wrong = {
        "is_causal: false (it would become causal)": getattr(config, "is_causal", True) is False,
        "sliding-window attention": "sliding_attention" in (getattr(config, "layer_types", None) or ()),
        f"RoPE of type {rope['rope_type']}": rope["rope_type"] not in ROPE_TYPES[name],
        "a partial RoPE (it would become a full one)": rope.get("partial_rotary_factor", 1.0) != 1.0,
    }
    for what, there in wrong.items():
        if there:
            raise ValueError(f"the ONNX export can't do {name} with {what} ({model_dir})")
    return config


def _run_builder(model_dir: Path, made: Path, quant: Quant, options: list[str]) -> None:
    with _quiet():
        # Here, not above: this import appends the builder's folder to sys.path and loads every architecture.
        from onnxruntime_genai.models.builder import create_model, parse_extra_options

        where = (None, str(model_dir), str(made), quant, "cpu", str(made.parent / "cache"))
        create_model(*where, **parse_extra_options(*where, options))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Offline, and with the builder's prints and bars sent to the debug log."""
    import huggingface_hub.constants as hub

    said = io.StringIO()
    before, os.environ["HF_HUB_OFFLINE"] = os.environ.get("HF_HUB_OFFLINE"), "1"
    constant, hub.HF_HUB_OFFLINE = hub.HF_HUB_OFFLINE, True  # read from the environment at import only
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # the quantiser's logger has a level and a handler of its own
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            yield
    finally:
        hub.HF_HUB_OFFLINE = constant
        if before is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = before
        logging.disable(disabled)
        if said.getvalue():
            log.debug("onnxruntime-genai's builder said:\n%s", said.getvalue())


def _share_embedding(model: ir.Model) -> None:
    """Let tied embeddings read the output head's quantised weights.

    The builder does so for int4 only; an int8 file would carry the embedding matrix a second time, in fp32.
    """
    nodes = {node.name: node for node in model.graph}
    gather, head = nodes.get("/model/embed_tokens/Gather"), nodes.get("/lm_head/MatMul_Q8")
    if gather is None or head is None:
        return
    block, rows, width = (_integer(head, name) for name in ("block_size", "N", "K"))
    if width % block:  # the head's rows are padded to whole blocks: keep the fp32 matrix
        return
    shape = ir.tensor([rows, width], name="/model/embed_tokens/shape", dtype=ir.DataType.INT64)
    constant = ir.node("Constant", [], attributes={"value": shape}, name="/model/embed_tokens/Constant")
    flat = ir.node("Reshape", [head.inputs[1], constant.outputs[0]], name="/model/embed_tokens/Reshape")
    constant.outputs[0].name = "/model/embed_tokens/Constant/output_0"
    flat.outputs[0].name = "/model/embed_tokens/Reshape/output_0"
    lookup = ir.node(
        "GatherBlockQuantized",
        [flat.outputs[0], gather.inputs[1], *head.inputs[2:4]],  # weights, ids, scales, maybe zero points
        attributes={"bits": 8, "block_size": block, "gather_axis": 0, "quantize_axis": 1},
        domain="com.microsoft",
        name="/model/embed_tokens/GatherBlockQuantized",
    )
    old, new = gather.outputs[0], lookup.outputs[0]
    matrix = gather.inputs[0]
    new.type, new.shape = old.type, old.shape
    model.graph.insert_before(gather, [constant, flat, lookup])
    old.replace_all_uses_with(new)
    model.graph.remove(gather, safe=True)
    new.name = "/model/embed_tokens/GatherBlockQuantized/output_0"
    if matrix is not None and matrix.name and not matrix.uses():
        model.graph.initializers.pop(matrix.name, None)


def _name_cache_dims(model: ir.Model, head_dim: int) -> None:
    """transformers.js makes the empty cache from the graph: `batch_size` by name, the head sizein digits."""
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.name and value.name.startswith(("past_key_values.", "present.")) and value.shape is not None:
            value.shape = ir.Shape(["batch_size", *value.shape[1:3], head_dim])


def _stamp(model: ir.Model) -> None:
    """The builder's version alone. The builder adds the commit of whatever git repository its virtual
    environment lies in: the same model would get other bytes after every commit of the user's own."""
    model.producer_name = "onnxruntime-genai"
    model.producer_version = importlib.metadata.version("onnxruntime-genai")


def _save(model: ir.Model, target: Path) -> None:
    """One file if it fits into a protobuf, else the weights beside it as transformers.js names them."""
    data = target.with_name(target.name + "_data")
    for stale in (target, data):
        stale.unlink(missing_ok=True)
    weights = sum(value.const_value.nbytes for value in _initializers(model))
    with _quiet():
        if weights < INLINE_LIMIT:
            ir.save(
                ir.external_data.load_to_model(model), target
            )  # else it would point into the scratch folder
        else:
            ir.save(model, target, external_data=data.name)


def _facts(model: ir.Model, target: Path, seconds: float) -> dict[str, float | int | str]:
    bits = [_integer(node, "bits") for node in model.graph if node.op_type == "MatMulNBits"]
    data = target.with_name(target.name + "_data")
    external = data.stat().st_size if data.exists() else 0
    return {
        "file": str(Path("onnx") / target.name),
        "bytes": target.stat().st_size + external,
        "external_bytes": external,
        "nodes": sum(1 for _ in model.graph),
        "nodes_int4": bits.count(4),
        "nodes_int8": bits.count(8),
        "nodes_fp32": sum(_reads_weights(node) for node in model.graph),
        "embedding": _kept_as(model, "/model/embed_tokens/"),
        "lm_head": _kept_as(model, "/lm_head/"),
        "seconds": seconds,
    }


def _reads_weights(node: ir.Node) -> bool:
    """A MatMul with a matrix of its own: one that was not quantised."""
    return node.op_type == "MatMul" and any(v is not None and v.const_value is not None for v in node.inputs)


def _kept_as(model: ir.Model, prefix: str) -> str:
    """`fp32`, `int8` or `int4`: the weights that the nodes under `prefix` read."""
    nodes = [node for node in model.graph if (node.name or "").startswith(prefix)]
    found = [_integer(node, "bits") for node in nodes if "bits" in node.attributes]
    return f"int{found[0]}" if found else "fp32"


def _initializers(model: ir.Model) -> Iterator[Any]:
    return (value for value in model.graph.initializers.values() if value.const_value is not None)


def _integer(node: ir.Node, name: str) -> int:
    return int(node.attributes[name].as_int())
