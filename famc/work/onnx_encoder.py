"""An embedder's or reranker's Hugging Face folder to ONNX, in fp32, int8 or int4.

In: a folder of weights and config.json; an embedder's also says how its tokens become one vector, as
sentence-transformers writes it (modules.json, 1_Pooling/config.json). Out: onnx/model.onnx,
onnx/model_int8.onnx or onnx/model_q4.onnx, with `last_hidden_state` and `sentence_embedding`, or with `logits`.

transformers' exporter traces the model; famc adds the pooling, without which users of a bare graph get other
vectors than the authors measured, and puts right what would make the bytes change from run to run.
"""

from __future__ import annotations

import importlib.metadata
import logging
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PretrainedConfig

from famc.errors import StepFailed
from famc.steps.exports import ONNX_INLINE, encoder_block
from famc.work.encoder_int4 import quantize_encoder
from famc.work.likelihood import load_tokenizer, without_bars
from famc.work.onnx_build import recipe_of
from famc.work.onnx_file import quiet, save
from famc.work.onnx_quantize import Recipe
from famc.work.rank_data import template_of
from famc.work.scores import read_json

log = logging.getLogger(__name__)

EncoderQuant = Literal["fp32", "int8", "int4"]
EncoderTask = Literal["feature-extraction", "text-ranking"]
PoolingMode = Literal["cls", "mean", "lasttoken"]

# the names that transformers.js looks for, by its `dtype` option
FILES: dict[EncoderQuant, str] = {"fp32": "model.onnx", "int8": "model_int8.onnx", "int4": "model_q4.onnx"}

# What was compared with torch. An embedder is often saved with the head that it was pretrained with.
ARCHITECTURES: dict[EncoderTask, tuple[str, ...]] = {
    "feature-extraction": (
        "BertModel", "BertForMaskedLM", "BertForPreTraining",
        "ModernBertModel", "ModernBertForMaskedLM",
        "Qwen3Model", "Qwen3ForCausalLM",
    ),
    "text-ranking": (
        "BertForSequenceClassification", "ModernBertForSequenceClassification",
        "Qwen3ForSequenceClassification",
    ),
}  # fmt: skip

# The frequencies of these depend on the length of the input: a trace would keep those of its sample.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")

# sentence-transformers' flags, one of which is true, and its shorter form of the same
POOLING_FLAGS: dict[str, PoolingMode] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "lasttoken",
}

# of the graph's inputs, in this order
AXES = ("batch_size", "sequence_length")


@dataclass(frozen=True, slots=True)
class Pooling:
    """How an embedder's token vectors become one: which of them, and whether to unit length."""

    mode: PoolingMode
    normalise: bool

    def __call__(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[batch, length, hidden] and [batch, length] -> [batch, hidden], as sentence-transformers does it."""
        if self.mode == "mean":
            weight = mask.unsqueeze(-1).to(hidden.dtype)
            pooled = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1e-9)
        else:
            # The first or the last token that is not padding, whichever side the padding is on: the first of the
            # mask's largest values, or of those of the mask by place.
            if self.mode == "lasttoken":
                mask = mask * torch.arange(mask.shape[1], device=mask.device)
            chosen = mask.argmax(1)[:, None, None].expand(-1, 1, hidden.shape[-1])
            pooled = hidden.gather(1, chosen).squeeze(1)
        return torch.nn.functional.normalize(pooled, p=2.0, dim=1) if self.normalise else pooled


def build_encoder(
    model_dir: Path, out: Path, quant: EncoderQuant, *, task: EncoderTask, recipe: Recipe | None = None
) -> dict[str, float | int | str]:
    """Write `out/onnx/model.onnx`, `model_int8.onnx` or `model_q4.onnx`, and say what was made.

    `recipe` says how int4 weights lose their bits (default: `int4_recipe` in blocks that suit its width). StepFailed for what can't be exported,
    or would be wrong silently; nothing is written then.
    """
    if quant not in FILES:
        raise StepFailed(
            f"no ONNX export of embedders and rerankers in {quant}", f"known: {', '.join(FILES)}"
        )
    if task not in ARCHITECTURES:
        raise StepFailed(f"no ONNX export for the task {task!r}", f"known: {', '.join(ARCHITECTURES)}")
    begun = time.perf_counter()
    model, pooling = load_encoder(model_dir, task)
    target = out / "onnx" / FILES[quant]
    errors: dict[str, float] = {}
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".onnx-", dir=out) as scratch:
        made = Path(scratch)
        program = _trace(model, pooling, _between(model_dir, model, task))
        if quant != "fp32":
            save(program, made / "fp32.onnx")
            folded = fold(made / "fp32.onnx", made)
            if quant == "int8":
                program = ir.load(quantise(folded, made))
            else:
                program = ir.load(folded)
                width = int(model.config.hidden_size)  # type: ignore[union-attr, arg-type]
                errors = quantize_encoder(program, recipe or int4_recipe(encoder_block(width)))
        stamp(program, quant)
        ready = made / "ready"
        ready.mkdir()
        save(program, ready / FILES[quant])
        facts = graph_facts(program, ready / FILES[quant])
        target.parent.mkdir(exist_ok=True)
        # Data first, and the old graph gone before: there is never a graph beside another one's weights.
        target.unlink(missing_ok=True)
        target.with_name(target.name + "_data").unlink(missing_ok=True)
        for path in sorted(ready.iterdir(), reverse=True):
            path.replace(target.parent / path.name)
    told = {"pooling": pooling.mode, "normalised": str(pooling.normalise).lower()} if pooling else {}
    if errors:
        worst = max(errors, key=lambda name: errors[name])
        facts |= {"weight_error_worst": errors[worst], "worst": worst}
    return {**facts, **told, "seconds": time.perf_counter() - begun}


def int4_recipe(block_size: int, algorithm: str = "k_quant", symmetric: bool | None = None) -> Recipe:
    """How weights lose their bits: matrices in blocks of 4 bits, tables of embeddings in the same blocks of 8."""
    return recipe_of("int4", block_size=block_size, algorithm=algorithm, symmetric=symmetric)


def load_encoder(model_dir: Path, task: EncoderTask) -> tuple[torch.nn.Module, Pooling | None]:
    """The source in torch, in fp32, with all of its weights; and an embedder's pooling."""
    pooling = read_pooling(model_dir) if task == "feature-extraction" else None
    folder = _transformer(model_dir)
    config = _checked_config(folder, task)
    kind: Any = AutoModel if pooling else AutoModelForSequenceClassification
    # The pooler behind BERT's [CLS] serves its pretraining; a folder saved with another head has none.
    extra = {"add_pooling_layer": False} if pooling and config.model_type == "bert" else {}
    try:
        with without_bars(), quiet():
            model, info = kind.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                local_files_only=True,
                output_loading_info=True,
                attn_implementation="sdpa",
                **extra,
            )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise StepFailed(f"{folder} can't be loaded: {error}", "make the model again") from error
    missing = sorted(info["missing_keys"])
    if missing:  # transformers would fill them at random
        raise StepFailed(f"{folder} lacks the weights {', '.join(missing[:3])}", "make the model again")
    return model.eval(), pooling


def read_pooling(model_dir: Path) -> Pooling:
    """The modules after the transformer, from sentence-transformers' files; StepFailed if a vector can't be
    made from them in the graph."""
    if not (model_dir / "modules.json").is_file():
        raise StepFailed(
            f"{model_dir} doesn't say how its tokens become one vector: it has no modules.json",
            "save the embedder with sentence-transformers, which writes modules.json and 1_Pooling/config.json",
        )
    modules = _modules(model_dir)
    kinds = [kind for kind, _ in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise StepFailed(
            f"the export can't do the modules {', '.join(kinds)} of {model_dir}",
            "it knows Transformer, Pooling and, after them, Normalize",
        )
    path = model_dir / modules[1][1] / "config.json"
    config = _read(path)
    chosen = sorted(name for name, on in config.items() if name.startswith("pooling_mode_") and on is True)
    if isinstance(config.get("pooling_mode"), str):
        chosen = [config["pooling_mode"]]
    if len(chosen) != 1 or (mode := POOLING_FLAGS.get(chosen[0], chosen[0])) not in POOLING_FLAGS.values():
        raise StepFailed(
            f"the export can't pool by {', '.join(chosen) or 'nothing'} ({path})",
            f"it knows one of {', '.join(POOLING_FLAGS)}",
        )
    if config.get("include_prompt", True) is False:
        raise StepFailed(
            f"the export can't leave prompts out of the pooling ({path})",
            "train with include_prompt: true",
        )
    return Pooling(mode, "Normalize" in kinds)


def _transformer(model_dir: Path) -> Path:
    """Where the weights are: the folder itself, or the one that an older sentence-transformers made inside."""
    if (model_dir / "modules.json").is_file():
        return model_dir / _modules(model_dir)[0][1]
    return model_dir


def _modules(model_dir: Path) -> list[tuple[str, str]]:
    """(class, folder) of each of sentence-transformers' modules."""
    path = model_dir / "modules.json"
    found = _read(path)
    try:
        made = [(str(module["type"]).rpartition(".")[2], str(module["path"])) for module in found]
    except (KeyError, TypeError):
        made = []
    if not made:
        raise StepFailed(f"{path} is not a list of modules", "save the embedder with sentence-transformers")
    return made


def _read(path: Path) -> Any:
    """A JSON file of the source."""
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise StepFailed(f"{path} can't be read: {error}", "make the model again") from error


def _checked_config(folder: Path, task: EncoderTask) -> PretrainedConfig:
    """The folder's configuration; StepFailed for what the exporter can't make, or makes wrong silently."""
    if not (folder / "config.json").is_file():
        raise StepFailed(f"{folder} has no config.json", "give a Hugging Face model folder")
    raw = _read(folder / "config.json")
    name = (raw.get("architectures") or [raw.get("model_type", "unknown")])[0]
    known = ARCHITECTURES[task]
    if name not in known:
        raise StepFailed(
            f"the ONNX export for {task} doesn't know {name} ({folder})", f"it knows {', '.join(known)}"
        )
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    config.use_cache = False  # the cache of an encoder built on a decoder would become outputs
    for kind in _rope_types(getattr(config, "rope_parameters", None)):
        if kind in LENGTH_DEPENDENT_ROPE:
            raise StepFailed(
                f"the ONNX export can't do {name} with RoPE of type {kind} ({folder})",
                "use default, linear or yarn",
            )
    if name == "Qwen3ForSequenceClassification" and config.pad_token_id is None:
        raise StepFailed(
            f"{folder} names no pad_token_id in config.json", "it finds the end of each text by its padding"
        )
    return config


def _rope_types(parameters: Any) -> list[str]:
    """All kinds of RoPE of a configuration: ModernBERT keeps one a kind of layer."""
    if not isinstance(parameters, dict):
        return []
    own = [str(parameters["rope_type"])] if "rope_type" in parameters else []
    return own + [kind for value in parameters.values() for kind in _rope_types(value)]


class _Traced(torch.nn.Module):
    """What the graph holds: the model, its pooling, and named outputs. `between`: the id after which a pair's second text
    begins, where its tokens have a type of their own: the graph finds that out, as transformers.js passes zeros."""

    def __init__(self, model: Any, pooling: Pooling | None, between: int | None) -> None:
        super().__init__()
        self.between = between
        self.model = model
        self.config = model.config
        self.pooling = pooling

    def forward(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.between is not None:
            marks = (inputs["input_ids"] == self.between).long()
            inputs = {**inputs, "token_type_ids": (marks.cumsum(1) - marks).clamp(max=1)}
        found = self.model(**inputs)
        if self.pooling is None:
            return {"logits": found.logits}
        hidden = found.last_hidden_state
        pooled = self.pooling(hidden, inputs["attention_mask"])
        return {"last_hidden_state": hidden, "sentence_embedding": pooled}


def _between(model_dir: Path, model: Any, task: EncoderTask) -> int | None:
    """The id between the two texts of a pair, if a BERT's tokenizer gives the second one types of its own."""
    if task != "text-ranking" or model.config.model_type != "bert":
        return None
    template = template_of(load_tokenizer(model_dir))
    return int(template.between[-1]) if template.typed and template.between else None


def _trace(model: Any, pooling: Pooling | None, between: int | None = None) -> ir.Model:
    """The graph, from a sample with padding: without it the tracer finds the mask to be of no effect."""
    # Each model's own way with ids: real ones, and its padding where the mask is 0.
    pad = model.config.pad_token_id or 0
    ids = torch.full((2, 7), 1 if pad != 1 else 2)
    mask = torch.ones_like(ids)
    ids[1, 4:], mask[1, 4:] = pad, 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if model.config.model_type == "bert" and between is None:
        inputs["token_type_ids"] = torch.zeros_like(ids)
    # Not Dim.AUTO, which would make a number of an axis without a word.
    longest = model.config.max_position_embeddings
    axes = {0: torch.export.Dim(AXES[0]), 1: torch.export.Dim(AXES[1], max=longest)}
    with quiet():
        # Here, not above: this import registers patches for every architecture.
        from transformers.exporters import OnnxConfig, OnnxExporter

        config = OnnxConfig(dynamic=True, dynamic_shapes=dict.fromkeys(inputs, axes))
        program: ir.Model = OnnxExporter().export(_Traced(model, pooling, between), inputs, config).program
    _name_axes(program)
    return program


def _name_axes(program: ir.Model) -> None:
    """Names that a reader understands for the axes, in place of the tracer's own numbering; and no notes of the
    tracer about the nodes, which quote source lines and the paths of this machine."""
    sizes = [dim for dim in program.graph.inputs[0].shape or () if isinstance(dim, ir.SymbolicDim)]
    names = dict(zip((dim.value for dim in sizes), AXES, strict=True))
    outside = {*program.graph.inputs, *program.graph.outputs}
    for value in outside:
        value.shape = ir.Shape(
            [names[dim.value] if isinstance(dim, ir.SymbolicDim) else dim for dim in value.shape or ()]
        )
    for node in ir.traversal.RecursiveGraphIterator(program.graph):
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            if value not in outside:  # shapes in the tracer's numbers; every runtime infers its own
                value.shape = value.type = None


def fold(graph: Path, scratch: Path) -> Path:
    """The graph with its constants folded: without it the quantisers pass over weights that stand behind a
    Transpose."""
    folded = scratch / "folded.onnx"
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3  # errors only
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(folded)
    if _is_large(graph):
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", folded.name + "_data"
        )
    ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return folded


def quantise(folded: Path, scratch: Path) -> Path:
    """The graph with int8 weights, and activations that are quantised as they come.

    7 of the 8 bits are used: with all of them, x86 processors without VNNI overflow and give other vectors than
    those that parity was measured on.
    """
    quantised, large = scratch / "quantised.onnx", _is_large(folded)
    with quiet():
        from onnxruntime.quantization import QuantType, quantize_dynamic

        model = onnx.load(folded)
        # The quantiser replaces weights by name, and a type that was written down for the old one contradicts.
        kept = {i.name for i in model.graph.initializer}
        values = [v for v in model.graph.value_info if v.name not in kept]
        del model.graph.value_info[:]
        model.graph.value_info.extend(values)
        quantize_dynamic(
            model,
            quantised,
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=large,
        )
    return quantised


def _is_large(graph: Path) -> bool:
    """Whether the weights lie beside the graph, and must."""
    return sum(path.stat().st_size for path in graph.parent.glob(f"{graph.name}*")) >= ONNX_INLINE


def stamp(program: ir.Model, quant: EncoderQuant) -> None:
    """Versions alone: what else the tools write differs from machine to machine."""
    program.producer_name = "transformers" if quant == "fp32" else "transformers, onnxruntime"
    used = ("transformers",) if quant == "fp32" else ("transformers", "onnxruntime")
    program.producer_version = ", ".join(importlib.metadata.version(name) for name in used)
    program.doc_string = None
    program.graph.doc_string = None
    program.graph.name = "encoder"
    program.metadata_props.clear()
    program.graph.metadata_props.clear()


def graph_facts(program: ir.Model, made: Path) -> dict[str, float | int | str]:
    data = made.with_name(made.name + "_data")
    external = data.stat().st_size if data.exists() else 0
    operators = [node.op_type for node in program.graph]
    return {
        "file": str(Path("onnx") / made.name),
        "bytes": made.stat().st_size + external,
        "external_bytes": external,
        "nodes": len(operators),
        "nodes_int8": operators.count("MatMulInteger"),
        "nodes_int4": operators.count("MatMulNBits"),
        "nodes_fp32": sum(_reads_weights(node) for node in program.graph),
    }


def _reads_weights(node: ir.Node) -> bool:
    """A MatMul with a matrix of its own: one that was not quantised."""
    return node.op_type in ("MatMul", "Gemm") and any(
        value is not None and value.const_value is not None for value in node.inputs
    )
