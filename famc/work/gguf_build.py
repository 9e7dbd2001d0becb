"""A Hugging Face decoder folder to one GGUF file, for llama.cpp, Ollama and LM Studio.

In: a model folder (config.json, safetensors, tokenizer). Out: one .gguf with weights, tokenizer and chat
template. f16, bf16, f32 and q8_0 are written here; what llama.cpp mixes by its own rules (q4_k_m keeps some
tensors at more bits) is made by llama.cpp itself.

Refused rather than guessed, since llama.cpp would load it and answer wrongly: other architectures and kinds
of RoPE, sliding windows, and tokenizers whose splitting rule llama.cpp has no name for. One difference
stays: llama.cpp doesn't normalise text of byte-level BPEs, so text that isn't NFC gets other ids there than
from a tokenizer with an NFC normaliser.
"""

from __future__ import annotations

import json
import logging
import math
import mmap
import re
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import gguf
import jinja2
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from famc.errors import StepFailed, did_you_mean
from famc.steps.others import CHATML
from famc.work.export import shards
from famc.work.likelihood import without_bars

Array = np.ndarray[Any, np.dtype[Any]]
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Quant:
    """A quantisation of llama.cpp: the types that its matrices have, and its number in a file's header."""

    types: tuple[Type, ...]
    file_type: int
    by_llama_cpp: bool = False


_F = gguf.LlamaFileType
QUANTS: dict[str, Quant] = {
    "f32": Quant((Type.F32,), _F.ALL_F32),
    "f16": Quant((Type.F16,), _F.MOSTLY_F16),
    "bf16": Quant((Type.BF16,), _F.MOSTLY_BF16),
    "q8_0": Quant((Type.Q8_0,), _F.MOSTLY_Q8_0),
    # the embedding or the head at q6_k, as everyone's q4_0
    "q4_0": Quant((Type.Q4_0, Type.Q6_K), _F.MOSTLY_Q4_0, by_llama_cpp=True),
    "q4_k_m": Quant((Type.Q4_K, Type.Q6_K), _F.MOSTLY_Q4_K_M, by_llama_cpp=True),
    "q5_k_m": Quant((Type.Q5_K, Type.Q6_K), _F.MOSTLY_Q5_K_M, by_llama_cpp=True),
    "q6_k": Quant((Type.Q6_K,), _F.MOSTLY_Q6_K, by_llama_cpp=True),
}

# Architectures and their kinds of RoPE whose logits equal torch's. llama.cpp's qwen3 ignores the tensor that
# llama3's kind needs.
ROPE_TYPES = {
    "LlamaForCausalLM": ("default", "linear", "llama3", "yarn"),
    "Qwen3ForCausalLM": ("default", "linear", "yarn"),
}
ARCHITECTURES = {"LlamaForCausalLM": gguf.MODEL_ARCH.LLAMA, "Qwen3ForCausalLM": gguf.MODEL_ARCH.QWEN3}

# (splitting regex of the tokenizer, whether it ignores merges for whole words) -> llama.cpp's name of it.
# Written out, not famc's own SPLIT: if that one changes, it has no name here until its ids were compared.
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
_QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = "ByteLevel"
_DIGITS = "Digits, ByteLevel"
PRE_TOKENIZERS: dict[tuple[str, bool], str] = {
    (_QWEN2, False): "qwen2",
    (_QWEN35, False): "qwen35",
    (_LLAMA3, True): "llama-bpe",
    (_LLAMA3, False): "dbrx",
    (_GPT2, False): "gpt-2",
    (_DIGITS, False): "smollm",
}

# What ends a turn, by the names that llama.cpp knows too.
TURN_ENDS = ("<|im_end|>", "<|eot_id|>")
TEXT_ENDS = ("<|endoftext|>", "<|end_of_text|>")

CHUNK = 2**22  # weights that are converted at once: 16 MB in f32

_PROBES: tuple[Messages, ...] = (
    [{"role": "user", "content": "What is 1 + 1?"}],
    [
        {"role": "system", "content": "Be terse."},
        {"role": "user", "content": " two\nlines "},
        {"role": "assistant", "content": "<think>\nHm.\n</think>\n\n2"},
        {"role": "user", "content": "And {{ 2 }} + 2?"},
        {"role": "assistant", "content": "4"},
    ],
    [{"role": "assistant", "content": ""}, {"role": "user", "content": "Why?"}],
)


def build_gguf(
    model_dir: Path,
    target: Path,
    quant: str,
    *,
    name: str,
    threads: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float | int | str]:
    """Write `target` and say what was made; ValueError for what llama.cpp can't do as the source does.

    One tensor is in memory at a time. `fallback` counts the matrices whose rows don't divide into the blocks
    of the type that they should have had.
    """
    if quant not in QUANTS:
        raise ValueError(f"no GGUF quantisation {quant!r}; {did_you_mean(quant, QUANTS)}")
    begun = time.perf_counter()
    how = QUANTS[quant]
    config = _checked_config(model_dir)
    vocabulary = read_vocabulary(model_dir, config)
    quantize = _llama_quantizer() if how.by_llama_cpp else None  # before minutes of work
    target.parent.mkdir(parents=True, exist_ok=True)
    # a folder of its own: on failure all goes with it, and the rename stays on one disk
    with tempfile.TemporaryDirectory(prefix=".gguf-", dir=target.parent) as scratch, ExitStack() as stack:
        source = Source(model_dir, config, stack)
        made = Path(scratch) / "made.gguf"
        if quantize is None:
            source.write(made, how, vocabulary, name, progress)
        else:
            wide = Path(scratch) / "wide.gguf"
            source.write(wide, source.lossless(), vocabulary, name, progress)
            quantize(wide, made, int(how.file_type), threads)
        facts = _facts(made, how)
        made.replace(target)
    return {
        "file": target.name,
        **facts,
        "tokenizer_pre": vocabulary.pre,
        "seconds": time.perf_counter() - begun,
    }


def _llama_quantizer() -> Callable[[Path, Path, int, int], None]:
    try:
        from famc.work.llama_cpp import quantize_file
    except ImportError as error:
        raise ValueError(
            f"this quantisation needs llama.cpp ({error}): pip install 'famc[gguf]'; f16, bf16 and q8_0 don't"
        ) from None
    return quantize_file


def _facts(made: Path, how: Quant) -> dict[str, float | int | str]:
    tensors = stored_tensors(made)
    types = Counter(tensor.kind for tensor in tensors)
    fallback = sum(1 for tensor in tensors if len(tensor.shape) > 1 and tensor.kind not in how.types)
    return {
        "bytes": made.stat().st_size,
        "tensors": len(tensors),
        "parameters": sum(math.prod(t.shape) for t in tensors if t.name != _ROPE_FREQS),
        **{f"tensors_{kind.name.lower()}": types[kind] for kind in sorted(types)},
        "fallback": fallback,
    }


def _checked_config(model_dir: Path) -> PretrainedConfig:
    """The folder's configuration; ValueError for what llama.cpp can't do, or does otherwise silently."""
    raw = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    name = (raw.get("architectures") or [raw.get("model_type", "unknown")])[0]
    if name not in ARCHITECTURES:
        raise ValueError(
            f"the GGUF export doesn't know {name} ({model_dir}); it knows {', '.join(ROPE_TYPES)}"
        )
    config = AutoConfig.from_pretrained(model_dir, local_files_only=True)
    rope = config.rope_parameters
    wrong = {
        "is_causal: false (it would become causal)": getattr(config, "is_causal", True) is False,
        "sliding-window attention": "sliding_attention" in (getattr(config, "layer_types", None) or ()),
        f"RoPE of type {rope['rope_type']}": rope["rope_type"] not in ROPE_TYPES[name],
        "a partial RoPE": rope.get("partial_rotary_factor", 1.0) != 1.0,
        f"the activation {config.hidden_act}": config.hidden_act not in ("silu", "swish"),
        "YaRN with factors of its own (llama.cpp reads none but its defaults)": _odd_yarn(rope),
        "quantised weights": bool(raw.get("quantization_config")),
    }
    for what, there in wrong.items():
        if there:
            raise ValueError(f"the GGUF export can't do {name} with {what} ({model_dir})")
    return config


def _odd_yarn(rope: Mapping[str, Any]) -> bool:
    """llama.cpp ignores a file's `yarn_beta_*` for these architectures: the logits would drift, silently."""
    if rope["rope_type"] != "yarn":
        return False
    usual: dict[str, Any] = {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "attention_factor": 0.1 * math.log(rope["factor"]) + 1.0,
    }
    usual |= {"mscale": None, "mscale_all_dim": None, "truncate": True}
    return any(rope.get(key) not in (None, value) for key, value in usual.items())


# --- weights ------------------------------------------------------------------------------------------------

_ROPE_FREQS = "rope_freqs.weight"


class Source:
    """A model folder's tensors under their GGUF names, each read when it is asked for."""

    def __init__(self, model_dir: Path, config: PretrainedConfig, stack: ExitStack) -> None:
        self._dir = model_dir
        self._config = config
        self._arch = ARCHITECTURES[config.architectures[0]]
        self._where: dict[str, Any] = {}
        for shard in shards(model_dir):
            opened = stack.enter_context(safe_open(shard, framework="pt"))
            self._where |= dict.fromkeys(opened.keys(), opened)
        names = self._expected()
        # a tied head in the file is the embedding again; old Llama folders carry RoPE's frequencies
        ignored = {"lm_head.weight"} if config.tie_word_embeddings else set()
        found = {n for n in self._where if not n.endswith("rotary_emb.inv_freq")} - ignored
        if found != set(names):
            missing, extra = sorted(set(names) - found), sorted(found - set(names))
            raise ValueError(f"{model_dir}: tensors missing: {missing[:3]}, tensors unknown: {extra[:3]}")
        translate = gguf.get_tensor_name_map(self._arch, config.num_hidden_layers)
        self.names: dict[str, str] = {  # GGUF's -> Hugging Face's, in the file's order
            str(translate.get_name(n, try_suffixes=(".weight", ".bias"))): n for n in names
        }
        for n in names:
            kind = str(self._where[n].get_slice(n).get_dtype())
            if kind not in _FLOATS:
                raise ValueError(
                    f"{n} of {model_dir} is of type {kind}: famc reads unquantised checkpoints only"
                )

    def _expected(self) -> list[str]:
        """The names that the configuration asks for."""
        config = self._config
        matrices = [
            *(f"self_attn.{p}_proj" for p in "qkvo"),
            *(f"mlp.{p}_proj" for p in ("gate", "up", "down")),
        ]
        norms = ["input_layernorm", "post_attention_layernorm"]
        if self._arch is gguf.MODEL_ARCH.QWEN3:
            norms += ["self_attn.q_norm", "self_attn.k_norm"]
        biased = [
            m for m in matrices if m.startswith("self_attn") and getattr(config, "attention_bias", False)
        ]
        biased += [m for m in matrices if m.startswith("mlp") and getattr(config, "mlp_bias", False)]
        if biased and self._arch is gguf.MODEL_ARCH.QWEN3:
            raise ValueError("llama.cpp's qwen3 has no biases")
        one = [*(f"{m}.weight" for m in (*norms, *matrices)), *(f"{m}.bias" for m in biased)]
        layers = [f"model.layers.{i}.{n}" for i in range(config.num_hidden_layers) for n in one]
        head = [] if config.tie_word_embeddings else ["lm_head.weight"]
        return ["model.embed_tokens.weight", *layers, "model.norm.weight", *head]

    def shape(self, name: str) -> tuple[int, ...]:
        """By GGUF name; rows first, as torch has it."""
        source = self.names[name]
        return tuple(self._where[source].get_slice(source).get_shape())

    def chunks(self, name: str) -> Iterator[torch.Tensor]:
        """A tensor by GGUF name, some rows at a time, in its own type."""
        source, shape = self.names[name], self.shape(name)
        if heads := self._permuted(source):
            yield _interleave(self._where[source].get_tensor(source), heads)
            return
        view = self._where[source].get_slice(source)
        step = max(1, CHUNK // math.prod(shape[1:]))
        for start in range(0, shape[0], step):
            yield view[start : start + step]

    def _permuted(self, source: str) -> int:
        """The heads of a projection whose rows llama.cpp wants in RoPE's original order; 0 for others.

        Its llama rotates neighbours, as Meta's own code; transformers (and llama.cpp's qwen3) rotate halves.
        """
        if self._arch is not gguf.MODEL_ARCH.LLAMA:
            return 0
        heads = {"q_proj": self._config.num_attention_heads, "k_proj": self._config.num_key_value_heads}
        return int(heads.get(source.split(".")[-2], 0))

    def lossless(self) -> Quant:
        """The narrowest float type that holds all of the source exactly."""
        kinds = {str(self._where[n].get_slice(n).get_dtype()) for n in self.names.values()}
        only = kinds.pop() if len(kinds) == 1 else ""
        return QUANTS[{"BF16": "bf16", "F16": "f16"}.get(only, "f32")]

    def type_of(self, name: str, how: Quant) -> Type:
        """A vector stays in F32; a matrix whose rows don't divide into blocks becomes F16."""
        shape = self.shape(name)
        if len(shape) < 2:
            return Type.F32
        wanted = how.types[0]
        return wanted if shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0] == 0 else Type.F16

    def write(
        self,
        path: Path,
        how: Quant,
        vocabulary: Vocabulary,
        name: str,
        progress: Callable[[int, int], None],
    ) -> None:
        """One GGUF file: header, then tensor after tensor."""
        logging.getLogger("gguf").setLevel(logging.ERROR)
        writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[self._arch])
        try:
            self._add_metadata(writer, how, name)
            vocabulary.add_to(writer)
            types = {n: self.type_of(n, how) for n in self.names}
            factors = _rope_factors(self._config)
            if factors is not None:
                writer.add_tensor_info(_ROPE_FREQS, factors.shape, factors.dtype, factors.nbytes)
            for n, kind in types.items():
                shape = self.shape(n)
                block, size = gguf.GGML_QUANT_SIZES[kind]
                nbytes = math.prod(shape) // block * size
                writer.add_tensor_info(n, shape, np.dtype(np.float32), nbytes, raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            # Not writer.write_tensor_data: it takes whole tensors, and an embedding is the largest of them.
            file = writer.fout[0]
            writer.write_padding(file, file.tell())
            if factors is not None:
                file.write(factors.tobytes())
                writer.write_padding(file, factors.nbytes)
            for done, (n, kind) in enumerate(types.items()):
                written = 0
                for chunk in self.chunks(n):
                    data = _pack(chunk, kind, f"{self.names[n]} of {self._dir}")
                    written += file.write(data.tobytes())
                writer.write_padding(file, written)
                progress(done + 1, len(types))
        finally:
            writer.close()

    def _add_metadata(self, writer: Any, how: Quant, name: str) -> None:
        config = self._config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        rope = config.rope_parameters
        writer.add_type("model")
        writer.add_name(name)
        writer.add_file_type(int(how.file_type))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_custom_alignment(gguf.GGUF_DEFAULT_ALIGNMENT)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(config.vocab_size)
        writer.add_rope_dimension_count(head_dim)
        writer.add_rope_freq_base(rope["rope_theta"])
        if rope["rope_type"] in ("linear", "yarn"):
            writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
            writer.add_rope_scaling_factor(rope["factor"])
        if rope["rope_type"] == "yarn":
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


def _interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Within each head, row i of the first half and row i of the second become neighbours."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape).contiguous()


def _pack(chunk: torch.Tensor, kind: Type, what: str) -> Array:
    """Rows of weights as bytes of a GGUF type."""
    narrow = {Type.F32: torch.float32, Type.F16: torch.float16, Type.BF16: torch.bfloat16}.get(kind)
    weights = chunk.to(narrow or torch.float32).contiguous()
    if not bool(torch.isfinite(chunk).all()):
        raise StepFailed(f"{what} holds numbers that are not finite", "training diverged: look at its losses")
    # a block's scale is in f16, and q8_0's is the largest weight by 127
    if not bool(torch.isfinite(weights).all()) or (narrow is None and weights.abs().max() > 127 * 65504):
        raise StepFailed(f"{what} holds numbers too large for {kind.name.lower()}", "export it in bf16")
    if narrow is None:
        packed: Array = gguf.quants.quantize(weights.numpy(), kind)
        return np.ascontiguousarray(packed)
    return weights.view(torch.uint8).numpy()


def _rope_factors(config: PretrainedConfig) -> Array | None:
    """What llama.cpp divides each frequency by, for llama3's kind of RoPE.

    From transformers' own frequencies, not from the formula once more: the two can't drift apart.
    """
    if config.rope_parameters["rope_type"] != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    plain = 1.0 / (config.rope_parameters["rope_theta"] ** exponents)
    factors: Array = (plain / scaled).to(torch.float32).numpy()
    return factors


def tensor_errors(gguf_file: Path, model_dir: Path) -> dict[str, float]:
    """Relative squared error of every tensor against the source's weights, by GGUF name, worst first."""
    errors: dict[str, float] = {}
    with ExitStack() as stack:
        source = Source(model_dir, _checked_config(model_dir), stack)
        data = np.memmap(gguf_file, mode="r")
        for tensor in stored_tensors(gguf_file):
            if tensor.name not in source.names:
                continue
            width = tensor.shape[-1] if len(tensor.shape) > 1 else 1
            block, size = gguf.GGML_QUANT_SIZES[tensor.kind]
            at, wrong, total = tensor.offset, 0.0, 0.0
            for chunk in source.chunks(tensor.name):
                weights = chunk.to(torch.float64).numpy().reshape(-1, width)
                nbytes = weights.size // block * size
                packed = np.asarray(data[at : at + nbytes]).reshape(len(weights), -1)
                kept = gguf.quants.dequantize(packed, tensor.kind)
                wrong += float(np.square(kept - weights).sum())
                total += float(np.square(weights).sum())
                at += nbytes
            errors[tensor.name] = wrong / total if total else 0.0
    return dict(sorted(errors.items(), key=lambda item: (-item[1], item[0])))


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies in a GGUF file."""

    name: str
    kind: Type
    shape: tuple[int, ...]  # rows first, as torch has it
    offset: int


def stored_tensors(path: Path) -> list[Stored]:
    """The tensors of a little-endian GGUF file, by its header.

    Not by gguf.GGUFReader: for a vocabulary of 150k it takes 17 s and 600 MB for what is skipped here.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        header = _Header(data, 8)  # after the magic and the version
        count, pairs = header.number("Q"), header.number("Q")
        alignment = gguf.GGUF_DEFAULT_ALIGNMENT
        for _ in range(pairs):
            key = header.text()
            value = header.value(header.number("I"))
            alignment = value if key == "general.alignment" else alignment
        found: list[Stored] = []
        for _ in range(count):
            name, dimensions = header.text(), header.number("I")
            shape = tuple(header.number("Q") for _ in range(dimensions))[::-1]
            found.append(Stored(name, Type(header.number("I")), shape, header.number("Q")))
        start = -(-header.at // alignment) * alignment
    return [replace(tensor, offset=start + tensor.offset) for tensor in found]


class _Header:
    """A place in a GGUF header that moves on with every value read."""

    # struct's codes of GGUF's types of numbers
    CODES: ClassVar[dict[int, str]] = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}

    def __init__(self, data: mmap.mmap, at: int) -> None:
        self._data = data
        self.at = at

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self._data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def text(self) -> str:
        start = self._skip_text()
        return self._data[start : self.at].decode("utf-8", "replace")

    def _skip_text(self) -> int:
        size = self.number("Q")
        start, self.at = self.at, self.at + size
        return start

    def value(self, kind: int) -> Any:
        """A number; texts and arrays are passed over."""
        if kind == gguf.GGUFValueType.STRING:
            return self._skip_text()
        if kind == gguf.GGUFValueType.ARRAY:
            inner, count = self.number("I"), self.number("Q")
            for _ in range(count):
                self.value(inner)
            return None
        return self.number(self.CODES[kind])


# --- tokenizer ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Vocabulary:
    """A byte-level BPE as GGUF holds it."""

    pre: str  # llama.cpp's name of the splitting rule
    tokens: Sequence[str]
    types: Sequence[int]
    merges: Sequence[str]
    ids: Mapping[str, int]  # bos, eos, ...: llama.cpp's roles
    add_bos: bool
    add_eos: bool
    template: str | None

    def add_to(self, writer: Any) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(list(self.tokens))
        writer.add_token_types(list(self.types))
        writer.add_token_merges(list(self.merges))
        for role, token in self.ids.items():
            getattr(writer, f"add_{role}_token_id")(token)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        if self.template:
            writer.add_chat_template(self.template)


def read_vocabulary(model_dir: Path, config: PretrainedConfig) -> Vocabulary:
    """The folder's tokenizer as transformers loads it; ValueError if llama.cpp would give other ids."""
    with without_bars():
        tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"{model_dir}: the GGUF export needs a fast tokenizer (tokenizer.json)")
    spec = json.loads(backend.to_str())
    pre = pre_tokenizer_name(spec)
    vocab: dict[str, int] = dict(spec["model"]["vocab"])
    added = {t["content"]: t for t in spec["added_tokens"]}
    by_id = {i: token for token, i in vocab.items()} | {t["id"]: t["content"] for t in added.values()}
    rows = int(config.vocab_size)
    if max(by_id) >= rows:
        raise ValueError(f"{model_dir}: the tokenizer has id {max(by_id)}, the embedding {rows} rows")
    tokens: list[str] = []
    types: list[int] = []
    kinds = gguf.TokenType
    for i in range(rows):
        token = by_id.get(i)
        if token is None:
            tokens.append(f"[PAD{i}]")
            types.append(kinds.UNUSED)
        else:
            tokens.append(token)
            special = token in added and added[token]["special"]
            types.append(kinds.CONTROL if special else kinds.USER_DEFINED if token in added else kinds.NORMAL)
    if len(set(tokens)) != rows:  # llama.cpp would abort the process
        twice = [token for token, count in Counter(tokens).items() if count > 1]
        raise ValueError(f"{model_dir}: tokens that are there twice: {twice[:3]}")
    merges = [m if isinstance(m, str) else " ".join(m) for m in spec["model"]["merges"]]
    if not merges:
        raise ValueError(f"{model_dir}: a tokenizer without merges; llama.cpp can't load one")
    add_bos, add_eos = _added_around(tokenizer)
    return Vocabulary(
        pre=pre,
        tokens=tokens,
        types=[int(t) for t in types],
        merges=merges,
        ids=_roles(model_dir, tokenizer, config, by_id),
        add_bos=add_bos,
        add_eos=add_eos,
        template=_template(tokenizer),
    )


def pre_tokenizer_name(spec: Mapping[str, Any]) -> str:
    """llama.cpp's name of how a tokenizer.json splits text; ValueError if it has none, or for another model."""
    model = spec["model"]
    normalizers = [n["type"] for n in _flat(spec.get("normalizer"), "normalizers")]
    unlike = {
        f"a model of type {model['type']}": model["type"] != "BPE",
        "byte fallback": bool(model.get("byte_fallback")),
        "marks inside words": bool(model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")),
        f"the normaliser {'+'.join(normalizers)}": set(normalizers) - {"NFC"},
        "added tokens that strip space or match whole words": any(
            t["lstrip"] or t["rstrip"] or t["single_word"] for t in spec["added_tokens"]
        ),
    }
    for what, there in unlike.items():
        if there:
            raise ValueError(f"the GGUF export knows byte-level BPE tokenizers; this one has {what}")
    steps = _flat(spec.get("pre_tokenizer"), "pretokenizers")
    rule = _splitting_rule(steps)
    ignore_merges = bool(model.get("ignore_merges"))
    name = PRE_TOKENIZERS.get((rule, ignore_merges))
    if name is None:
        merges = " with ignore_merges" if ignore_merges else ""
        raise ValueError(
            f"llama.cpp has no name that famc knows for a tokenizer that splits by {rule}{merges};"
            f" known: {', '.join(PRE_TOKENIZERS.values())}"
        )
    return name


def _flat(part: Mapping[str, Any] | None, inner: str) -> list[Mapping[str, Any]]:
    """The steps of a part of tokenizer.json, out of their sequences."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [step for each in part[inner] for step in _flat(each, inner)]
    return [part]


def _splitting_rule(steps: Sequence[Mapping[str, Any]]) -> str:
    """The regex, or the names of the steps; what follows it is the conversion of bytes."""
    kinds = [step["type"] for step in steps]
    if kinds and kinds[-1] == "ByteLevel" and not steps[-1]["add_prefix_space"]:
        splits_too = steps[-1].get("use_regex", True)
        first = steps[0]
        if kinds == ["Split", "ByteLevel"] and not splits_too:
            # "removed, inverted" keeps the matches alone: the same, for a regex that matches everything
            how = (first["behavior"], first["invert"])
            if how in (("Isolated", False), ("Removed", True)) and "Regex" in first["pattern"]:
                return str(first["pattern"]["Regex"])
        if kinds == ["ByteLevel"] and splits_too:
            return _GPT2
        if kinds == ["Digits", "ByteLevel"] and splits_too and first["individual_digits"]:
            return _DIGITS
    return json.dumps(list(steps), ensure_ascii=False)


def _added_around(tokenizer: Any) -> tuple[bool, bool]:
    """Does the tokenizer put a BOS before the text, an EOS after it?"""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    ids = tokenizer("a")["input_ids"]
    at = next((i for i in range(len(ids)) if ids[i : i + len(bare)] == bare), -1)
    before, after = ids[: max(at, 0)], ids[max(at, 0) + len(bare) :]
    strange = before not in ([], [tokenizer.bos_token_id]) or after not in ([], [tokenizer.eos_token_id])
    if at < 0 or strange:
        raise ValueError(f"the tokenizer adds {before} before a text and {after} after it; llama.cpp can't")
    return bool(before), bool(after)


def _roles(
    model_dir: Path, tokenizer: Any, config: PretrainedConfig, by_id: Mapping[int, str]
) -> dict[str, int]:
    """llama.cpp's special ids. All that end a text in generation_config.json must end it there too."""
    path = model_dir / "generation_config.json"
    generation = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    ends: list[int] = []
    for value in (tokenizer.eos_token_id, config.eos_token_id, generation.get("eos_token_id")):
        ends += value if isinstance(value, list) else [] if value is None else [value]
    if not ends:
        raise ValueError(f"{model_dir}: nothing says which token ends a text (eos_token)")
    ids = {"eos": ends[0]}
    names = {name: i for i, name in by_id.items()}
    turn_end = next((names[name] for name in TURN_ENDS if name in names), None)
    if turn_end is not None:
        ids["eot"] = turn_end
    # these it ends at by their names
    left = [e for e in dict.fromkeys(ends) if e not in ids.values() and by_id.get(e) not in TEXT_ENDS]
    if len(left) > 1:
        raise ValueError(f"{model_dir}: llama.cpp can't end a text at all of {ends}")
    if left:
        ids["eom"] = left[0]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else config.pad_token_id
    if pad is not None:
        ids["pad"] = pad
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else config.bos_token_id
    # Never added unless add_bos_token says so; but without one llama.cpp calls id 11 the BOS, a word of text.
    ids["bos"] = bos if bos is not None else names.get(TEXT_ENDS[0], ids["eos"])
    return ids


# --- chat template ------------------------------------------------------------------------------------------

_GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")


def without_generation_marks(template: str) -> str:
    """The template without `{% generation %}`, a tag of transformers for training that llama.cpp doesn't know.

    It renders the same. A tag also eats white space around it; where that matters, it becomes `{% if true %}`.
    """
    if not _GENERATION.search(template):
        return template
    plain = _GENERATION.sub("", template)
    if _lexed(plain) == _lexed(template):
        return plain
    return _GENERATION.sub(lambda m: f"{{%{m[1]} {'endif' if m[2] else 'if true'} {m[3]}%}}", template)


def _lexed(template: str) -> list[tuple[str, str]]:
    """What Jinja reads, after its control of white space, less the generation tags."""
    tokens: list[tuple[str, str]] = []
    for _, kind, value in _environment().lex(template):
        if kind == "whitespace":
            continue
        if kind.endswith(("_begin", "_end")):
            value = ""
        if kind == "data" and tokens and tokens[-1][0] == "data":
            tokens[-1] = ("data", tokens[-1][1] + value)
        else:
            tokens.append((kind, value))
        if kind == "block_end" and tokens[-2] in (("name", "generation"), ("name", "endgeneration")):
            del tokens[-3:]
    return tokens


def _environment() -> jinja2.Environment:
    """Jinja as transformers and llama.cpp set it up, without transformers' tag."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = raise_exception
    environment.filters["tojson"] = lambda value, **more: json.dumps(value, ensure_ascii=False, **more)
    return environment


def _template(tokenizer: Any) -> str | None:
    """The chat template for the file; ValueError if the change that llama.cpp needs would change its text."""
    templates = tokenizer.chat_template
    template = templates.get("default") if isinstance(templates, dict) else templates
    if template is None:
        return None
    stripped = without_generation_marks(template)
    for messages in _PROBES if stripped != template else ():
        for prompt in (False, True):
            texts = [_rendered(tokenizer, each, messages, prompt) for each in (template, stripped)]
            if texts[0] != texts[1]:
                raise ValueError("the chat template renders another text without its generation marks")
    return stripped


def _rendered(tokenizer: Any, template: str, messages: Messages, prompt: bool) -> str | None:
    """None: the template refuses such a conversation."""
    try:
        return str(
            tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=prompt
            )
        )
    except (jinja2.TemplateError, TypeError, ValueError):
        return None


# --- Ollama -------------------------------------------------------------------------------------------------

_OLLAMA_CHATML = """{{- range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""


def modelfile(gguf_name: str, template: str | None, stops: Sequence[str], context: int) -> str:
    """An Ollama Modelfile for a .gguf beside it. `template`: the chat template in Jinja, or None."""
    lines = [f"FROM ./{gguf_name}"]
    if template is not None and is_chatml(template):
        lines += [f'TEMPLATE """{_OLLAMA_CHATML}"""']
    elif template is None:
        lines += [
            "# A base model without a chat template: the prompt goes to it as it is.",
            'TEMPLATE "{{ .Prompt }}"',
        ]
    else:
        lines += [
            "# Ollama doesn't run the Jinja chat template inside the GGUF. It looks for one of its own that is",
            "# like it, and else sends the bare prompt: compare `ollama show --template`, or write TEMPLATE here.",
        ]
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    lines += [f"PARAMETER num_ctx {context}", "PARAMETER temperature 0"]
    return "\n".join(lines) + "\n"


def is_chatml(template: str) -> bool:
    """Does the template write what the family's ChatML writes? One that knows tools does more than that."""
    if "tools" in template:
        return False
    ours, theirs = (_environment().from_string(without_generation_marks(t)) for t in (CHATML, template))
    try:
        return all(
            ours.render(messages=messages, add_generation_prompt=prompt)
            == theirs.render(messages=messages, add_generation_prompt=prompt)
            for messages in _PROBES
            for prompt in (False, True)
        )
    except (jinja2.TemplateError, TypeError, ValueError):
        return False
