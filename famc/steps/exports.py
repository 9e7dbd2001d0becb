"""What can be exported to what: the capability table, and the words of an export. LIGHT: no torch.

One row says for an architecture, a task, a format and a quantisation: whether this version makes it, and which runtimes
load it. Checks refuse what no row names, before anything is spent; `famc doctor --exports` and the README print the
table; a test makes and loads every `yes` in every runtime that its row names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

from famc.cost import decode, deploy, sums
from famc.cost.of_shape import anatomy
from famc.cost.shape import Shape
from famc.spec.family import Export
from famc.steps.base import Work

TEXT, VECTORS, RANKING = "text-generation", "feature-extraction", "text-ranking"
FILLING, CONVERTING = "fill-mask", "text2text-generation"
IMAGES, SOUND = "image-text-to-text", "audio-text-to-text"
# what a variant is for, by the kind of the stage that it publishes; the hub's names of tasks
TASKS = {"embed": VECTORS, "rerank": RANKING, "vlm": IMAGES, "audio": SOUND}
# and by architecture, where the kind leaves it open. Others: text-generation
ARCH_TASKS = {"bert": FILLING, "modernbert": FILLING, "t5": CONVERTING}


def task_of(kind: str, arch: str = "") -> str:
    """What a variant is for, by the kind of the stage that it publishes, and the architecture that it has.

    >>> task_of("embed", "bert"), task_of("pretrain", "bert"), task_of("sft", "t5"), task_of("sft", "qwen3")
    ('feature-extraction', 'fill-mask', 'text2text-generation', 'text-generation')
    """
    return TASKS.get(kind) or ARCH_TASKS.get(arch, TEXT)


def task_in(config: Mapping[str, Any], modules: bool) -> str:
    """The same of a model folder, by its config.json and whether it has modules.json: where no plan tells.

    >>> task_in({"architectures": ["BertForMaskedLM"]}, True), task_in({"architectures": ["BertForMaskedLM"]}, False)
    ('feature-extraction', 'fill-mask')
    """
    name = str((config.get("architectures") or [""])[0])
    if name.endswith("ForSequenceClassification"):
        return RANKING
    if modules:
        return VECTORS
    if name.endswith("ForMaskedLM"):
        return FILLING
    return CONVERTING if name.startswith("T5") else TEXT


# what a parity check measures of an export, by task: a gate's other conditions say nothing about it
PARITY: Mapping[str, tuple[str, ...]] = {
    TEXT: ("tokenizer", "template", "kl", "perplexity", "greedy"),
    VECTORS: ("tokenizer", "cosine", "ranking", "ndcg"),
    RANKING: ("tokenizer", "ranking", "ndcg"),
    FILLING: ("tokenizer", "kl", "perplexity"),
    CONVERTING: ("tokenizer", "kl", "greedy"),
}


@dataclass(frozen=True, slots=True)
class Capability:
    """One row: `yes` is made, compared and loaded by tests; `later` can be planned and priced, and has no worker yet."""

    task: str
    format: str
    quant: str
    archs: tuple[str, ...]
    status: Literal["yes", "later"] = "yes"
    runtimes: tuple[str, ...] = ()
    note: str = ""


DENSE = ("qwen3", "llama")
EVERY = (*DENSE, "qwen3_moe")
# what reads a text in both directions, or may: an embedder or reranker is made from it
READERS = ("qwen3", "bert", "modernbert")
_ONNX = ("onnxruntime", "onnxruntime-genai", "transformers.js")
_VECTORS = ("onnxruntime", "transformers.js", "sentence-transformers")
# BERT's rerankers tell two texts apart by types of tokens, and llama.cpp has one
GGUF_READERS = {VECTORS: READERS, RANKING: ("qwen3", "modernbert")}
_GGUF = {
    VECTORS: "llama-server --embedding; with a Modelfile for Ollama, neither run here",
    RANKING: "llama-server --rerank, not run here",
}
_VLLM = "compressed-tensors, the layout that vLLM reads; vLLM itself is not tested here"


def _rows() -> Iterator[Capability]:
    for quant in ("bf16", "fp32"):
        yield Capability(TEXT, "safetensors", quant, EVERY, "yes", ("transformers",))
    for quant in ("fp32", "int8", "int4"):
        yield Capability(TEXT, "onnx", quant, DENSE, "yes", _ONNX)
    yield Capability(
        TEXT, "onnx", "fp16", DENSE, "yes", ("onnxruntime", "transformers.js"), "meant for WebGPU"
    )
    for quant in ("f16", "bf16", "q8_0", "q4_0", "q4_k_m"):
        yield Capability(
            TEXT, "gguf", quant, DENSE, "yes", ("llama.cpp",), "with a Modelfile for Ollama, not run here"
        )
    for fmt in ("gptq", "awq"):
        for bits in ("4", "8"):
            yield Capability(TEXT, fmt, bits, DENSE, "yes", ("transformers",), _VLLM)
            yield Capability(TEXT, fmt, bits, ("qwen3_moe",), "later")
    for quant in ("fp32", "int8", "int4"):
        yield Capability(TEXT, "onnx", quant, ("qwen3_moe",), "later")
    for quant in ("f16", "q8_0", "q4_0", "q4_k_m"):
        yield Capability(TEXT, "gguf", quant, ("qwen3_moe",), "later")
    yield Capability(TEXT, "fp8", "8", EVERY, "later")
    for task in (VECTORS, RANKING):
        for quant in ("bf16", "fp32"):
            yield Capability(
                task, "safetensors", quant, READERS, "yes", ("transformers", "sentence-transformers")
            )
            yield Capability(task, "safetensors", quant, ("llama", "qwen3_moe"), "later")
        for quant in ("fp32", "int8", "int4"):
            yield Capability(task, "onnx", quant, READERS, "yes", _VECTORS)
            yield Capability(task, "onnx", quant, ("llama", "qwen3_moe"), "later")
        for quant in ("f16", "q8_0", "q4_0", "q4_k_m"):
            yield Capability(task, "gguf", quant, GGUF_READERS[task], "yes", ("llama.cpp",), _GGUF[task])
            yield Capability(task, "gguf", quant, ("llama", "qwen3_moe"), "later")
    for quant in ("bf16", "fp32"):
        yield Capability(FILLING, "safetensors", quant, ("bert", "modernbert"), "yes", ("transformers",))
        yield Capability(CONVERTING, "safetensors", quant, ("t5",), "yes", ("transformers",))
    for quant in ("fp32", "int8"):
        yield Capability(FILLING, "onnx", quant, ("bert", "modernbert"), "later")
        yield Capability(CONVERTING, "onnx", quant, ("t5",), "yes", ("onnxruntime",))
    for task in (IMAGES, SOUND):
        for quant in ("bf16", "fp32"):
            yield Capability(task, "safetensors", quant, EVERY, "later")
    for task in (IMAGES, SOUND):
        yield Capability(task, "fp8", "8", EVERY, "later")
        for quant in ("fp32", "int8", "int4"):
            yield Capability(task, "onnx", quant, EVERY, "later")


CAPABILITIES: tuple[Capability, ...] = tuple(_rows())
_FOUND: Mapping[tuple[str, str, str, str], Capability] = {
    (row.task, row.format, row.quant, arch): row for row in CAPABILITIES for arch in row.archs
}


def capability(arch: str, task: str, fmt: str, quant: str) -> Capability | None:
    """The row of an export; None where there is none: it can't be made."""
    return _FOUND.get((task, fmt, quant, arch))


def known_quants(fmt: str) -> tuple[str, ...]:
    """The quantisations that a format has for any task and architecture."""
    return tuple(dict.fromkeys(row.quant for row in CAPABILITIES if row.format == fmt))


def nearest(arch: str, task: str, fmt: str, quant: str) -> str:
    """What to write instead of an export that can't be made: the same format first, then about as many bits."""
    able = [row for row in CAPABILITIES if row.task == task and arch in row.archs and row.status == "yes"]
    able = able or [row for row in CAPABILITIES if row.task == task and arch in row.archs]
    if not able:
        return f"nothing exports {task} models of architecture '{arch}'"
    bits = _bits(fmt, quant)
    able.sort(key=lambda row: (row.format != fmt, abs(_bits(row.format, row.quant) - bits)))
    first = f"{able[0].format} {able[0].quant}"
    rest = dict.fromkeys(f"{row.format} {row.quant}" for row in able[1:])
    more = ", ".join(name for name in rest if name != first)
    planned = " (planned only)" if able[0].status == "later" else ""
    return f"the nearest that is supported is {first}{planned}" + (f"; also {more}" if more else "")


def _bits(fmt: str, quant: str) -> float:
    """Bits of a weight in the blocks, for what is near to what."""
    return 8.0 if fmt == "fp8" else decode.stored(fmt, quant).body


# --- the words of an export ------------------------------------------------------------------------------------------

DEFAULT_QUANT: Mapping[str, tuple[str, ...]] = {
    "safetensors": ("bf16",),
    "onnx": ("fp32",),
    "gguf": ("q4_k_m",),
    "gptq": ("4",),
    "awq": ("4",),
    "fp8": ("8",),
}
# formats whose weights are quantised by a `calibrate` section of the spec, in compressed-tensors' layout
CALIBRATED_FORMATS = ("gptq", "awq")
# algorithms that look at data, and those that search for zero points
CALIBRATED = frozenset({"gptq", "awq"})
ASYMMETRIC = frozenset({"k_quant", "hqq"})

# the file that an ONNX export adds to a release, as transformers.js expects it, and the `dtype` that asks for it
ONNX_FILES = {
    "fp32": "onnx/model.onnx",
    "fp16": "onnx/model_fp16.onnx",
    "int8": "onnx/model_int8.onnx",
    "int4": "onnx/model_q4.onnx",
}
JS_DTYPES = {"fp32": "fp32", "fp16": "fp16", "int8": "int8", "int4": "q4"}
GENAI_CONFIG = "genai_config.json"
# the onnxruntime-genai of a release reads one of its graphs: the smallest
GENAI_ORDER = ("int4", "int8", "fp32")


def gguf_name(name: str, quant: str) -> str:
    """As llama.cpp's users name files, and ollama and the hub read the quantisation from them.

    >>> gguf_name("pydoc-m-instruct", "q4_k_m")
    'pydoc-m-instruct-Q4_K_M.gguf'
    """
    return f"{name}-{quant.upper()}.gguf"


def quants(export: Export) -> tuple[str, ...]:
    """The quantisations that an export makes."""
    return (*export.quant, *([str(export.bits)] if export.bits else [])) or DEFAULT_QUANT[export.format]


def folder_suffix(fmt: str, quant: str) -> str:
    """What a format of its own folder adds to a release's name, as Qwen's releases are called; "" for the others.

    >>> folder_suffix("gguf", "q4_0"), folder_suffix("gptq", "4"), folder_suffix("awq", "4"), folder_suffix("onnx", "int4")
    ('-GGUF', '-GPTQ-Int4', '-AWQ', '')
    """
    if fmt == "gguf":
        return "-GGUF"
    if fmt in CALIBRATED_FORMATS:
        return "-AWQ" if (fmt, quant) == ("awq", "4") else f"-{fmt.upper()}-Int{quant}"
    return "-FP8" if fmt == "fp8" else ""


# the Python package that a runtime comes in; the others are programs of their own
PACKAGES = {
    "transformers": "transformers", "onnxruntime": "onnxruntime", "onnxruntime-genai": "onnxruntime_genai",
    "llama.cpp": "llama_cpp", "sentence-transformers": "sentence_transformers",
}  # fmt: skip


# where a runtime comes from that famc's own installation does not bring
EXTRAS = {
    "llama.cpp": "pip install 'famc[gguf]'",
    "transformers.js": "npm install @huggingface/transformers",
    "sentence-transformers": "pip install sentence-transformers",
}


def installed(runtime: str) -> bool:
    """Whether a runtime is in this Python's installation; transformers.js, which is Node's, never is."""
    return runtime in PACKAGES and find_spec(PACKAGES[runtime]) is not None


def lacking(fmt: str) -> str:
    """Why a format can't be made in this installation; "" if it can. GGUF is written here, and packed by llama.cpp."""
    if fmt == "gguf" and not installed("llama.cpp"):
        return f"GGUF is packed and checked by llama.cpp: {EXTRAS['llama.cpp']}"
    return ""


# --- what an export's step does ---------------------------------------------------------------------------------------

# Weights that share a scale: the larger, the fewer bytes a token reads. Without data 64 is as fast as the 32 of others
# that keep their head at 4 bits, and nearer to the source; GPTQ is nearer still at 128 (docs/decisions.md).
BLOCK_SIZES = (128, 64, 32, 16)
DATA_FREE_BLOCK = 64
ENCODER_BLOCK, NARROW, NARROW_BLOCK = 32, 512, 16  # an encoder's, and that of one which is at most so wide
CALIBRATION_FORMATS = ("text", "messages", "preference")
CALIBRATION_CONTEXT = 2048  # tokens of one example at most


def export_params(export: Export, quant: str, shape: Shape, task: str = TEXT) -> dict[str, Any]:
    """The values of an export's step that bear identity: every choice made, nothing left to the worker."""
    fmt = export.format
    params: dict[str, Any] = {"format": fmt, "quant": quant}
    if task != TEXT:
        return params | (encoder_params(export, shape) if (fmt, quant) == ("onnx", "int4") else {})
    if fmt == "onnx" and quant in ("int8", "int4"):
        algorithm = (
            (export.algorithm or ("gptq" if export.calibrate else "k_quant")) if quant == "int4" else "rtn"
        )
        params["block_size"] = export.block_size or block_size(shape, algorithm)
        params["lm_head"] = export.lm_head or "int8"
        params["embeddings"] = export.embeddings or "int8"
        if quant == "int4":
            params["algorithm"] = algorithm
            params["symmetric"] = (
                algorithm not in ASYMMETRIC if export.symmetric is None else export.symmetric
            )
    if fmt in CALIBRATED_FORMATS:
        params |= {
            "block_size": export.block_size or block_size(shape, fmt),
            "algorithm": fmt,
            "symmetric": True,
        }
    looks = params.get("algorithm") in CALIBRATED or (export.mixed is not None and quant in ("int4", "4"))
    if looks and export.calibrate is not None:
        params["calibrate"] = list(export.calibrate.data)
        params["examples"] = export.calibrate.n
        params["context"] = min(shape.context, CALIBRATION_CONTEXT)
        params["max_drop"] = export.mixed.max_drop if export.mixed else None
    return params


def encoder_params(export: Export, shape: Shape) -> dict[str, Any]:
    """How an embedder's or reranker's int4 loses its bits; its table of embeddings has 8, its head stays float."""
    algorithm = export.algorithm or "k_quant"
    return {
        "block_size": export.block_size or encoder_block(shape.hidden),
        "algorithm": algorithm,
        "symmetric": algorithm not in ASYMMETRIC if export.symmetric is None else export.symmetric,
    }


def encoder_block(hidden: int) -> int:
    """Weights of an encoder that share a scale. Of one of 192, 1 - cosine was smaller by a fifth (mean pooling) to two
    fifths (last token) in blocks of 16 than of 32, for a file a sixth larger; its rankings were not measurably better."""
    return NARROW_BLOCK if hidden <= NARROW else ENCODER_BLOCK


def block_size(shape: Shape, algorithm: str) -> int:
    """The largest block that divides the inputs of every matrix, up to what the algorithm bears."""
    largest = BLOCK_SIZES[0] if algorithm in CALIBRATED else DATA_FREE_BLOCK
    widths = (shape.hidden, shape.ffn, shape.heads * shape.head_dim)
    if shape.moe is not None:
        widths = (shape.hidden, shape.moe.ffn, shape.heads * shape.head_dim)
    fits = (size for size in BLOCK_SIZES if size <= largest and all(width % size == 0 for width in widths))
    return next(fits, BLOCK_SIZES[-1])


def shown(params: Mapping[str, Any]) -> dict[str, Any]:
    """What a card says of an export's recipe: of calibrated formats, how they were made."""
    names = ("format", "quant", "algorithm", "block_size")
    return {name: params[name] for name in names[: 4 if params["format"] in CALIBRATED_FORMATS else 2]}


def convert_work(parameters: int) -> Work:
    """Reading, converting and writing every weight: about 50 M parameters a CPU-second, and 2 s to start."""
    return Work("cpu", cpu_seconds=2.0 + parameters / 5e7)


# Parameters that an algorithm quantises in a second of one core; measured once on an AVX-512 machine (docs/decisions.md)
QUANTISED_A_SECOND = {"rtn": 3e7, "k_quant": 4e6, "hqq": 2e6, "awq": 1.2e6, "gptq": 7e5}


def export_work(shape: Shape, parameters: int, params: Mapping[str, Any]) -> Work:
    """Conversion, the algorithm's search, and with calibration three passes over the data (probes of bits: five more)."""
    seconds = convert_work(parameters).cpu_seconds
    if "algorithm" in params:
        seconds += parameters / QUANTISED_A_SECOND[params["algorithm"]]
    if "examples" in params:
        tokens = params["examples"] * params["context"]
        passes = 8 if params["max_drop"] else 3
        seconds += passes * sums.forward_flops(anatomy(shape), tokens, params["context"]) / CPU_FLOPS
    return Work("cpu", cpu_seconds=seconds)


CPU_FLOPS = 5e10  # fp32 matrix products of one core: assumed


def export_memory(shape: Shape, parameters: int, params: Mapping[str, Any]) -> float:
    """Bytes of weights that an export holds at once.

    safetensors and gguf go tensor by tensor: the largest one, in fp32 and as it is written. An ONNX graph is made while
    torch holds the float model, and streams to disk matrix by matrix; a file that is one protobuf is in memory three
    times while it is written. Calibration holds the model in fp32, the hidden states of the examples, and the Hessians
    of one block.
    """
    largest = 4.0 * max(shape.vocab * shape.hidden, shape.hidden * shape.ffn)
    held = 3 * largest
    if params["format"] == "onnx":
        protobuf = min(decode.file_bytes(shape, storage(shape, params)), ONNX_INLINE)
        held = max(4.0 * parameters + 2 * largest, 3 * protobuf)
    if "examples" in params:
        states = 8.0 * params["examples"] * params["context"] * shape.hidden
        hessians = 4.0 * (shape.ffn**2 + 2 * shape.hidden**2) * 2
        held = max(held, 4.0 * parameters + states + hessians + largest)
    return held


# Weights up to here are inside the ONNX file, larger ones beside it: a protobuf is read and written whole
ONNX_INLINE = 2**29


def storage(shape: Shape, params: Mapping[str, Any]) -> decode.Stored:
    """How an export keeps its weights, by the parameters of its step. ValueError for a format that famc doesn't know."""

    def kept(name: str) -> str:
        found = str(params.get(name))
        return found if found in ("int4", "int8", "fp32") else "int8"

    fmt, quant = str(params["format"]), str(params["quant"])
    if fmt == "fp8":
        return deploy.stored(fmt, quant, tie=shape.tie)
    return decode.stored(
        fmt, quant, tie=shape.tie, block_size=int(params.get("block_size") or 32),
        symmetric=params.get("symmetric", True) is not False, head=kept("lm_head"), table=kept("embeddings"),
    )  # fmt: skip
