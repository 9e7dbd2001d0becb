"""A decoder's weights under llama.cpp's names, and what its configuration says, written as one GGUF file.

In: a model folder's config.json and safetensors. Out: Source, which reads a tensor when it is asked for and writes the
file's header and data one after the other. ValueError for what llama.cpp would load and answer wrongly.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from safetensors import safe_open
from transformers import PretrainedConfig

from famc.errors import StepFailed
from famc.work.checkpoint import decoder_config, shards
from famc.work.gguf_vocabulary import Vocabulary

Array = np.ndarray[Any, np.dtype[Any]]


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

CHUNK = 2**22  # weights that are converted at once: 16 MB in f32


def source_config(model_dir: Path) -> PretrainedConfig:
    """A decoder's configuration; ValueError for what llama.cpp can't do."""
    return decoder_config(model_dir, "the GGUF export", ROPE_TYPES, more_wrong)


def more_wrong(config: PretrainedConfig, raw: Mapping[str, Any]) -> dict[str, bool]:
    """What llama.cpp can't do beside the usual, or does otherwise silently."""
    return {
        f"the activation {config.hidden_act}": config.hidden_act not in ("silu", "swish"),
        "YaRN with factors of its own (llama.cpp reads none but its defaults)": _odd_yarn(
            config.rope_parameters
        ),
        "quantised weights": bool(raw.get("quantization_config")),
    }


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

ROPE_FREQS = "rope_freqs.weight"
# Matrices that stay in F32: llama.cpp adds the first two as they are, and the last is the score itself
EXACT = frozenset({"position_embd.weight", "token_types.weight", "cls.output.weight"})


class Source:
    """A decoder folder's tensors under their GGUF names, each read when it is asked for."""

    def __init__(self, model_dir: Path, config: PretrainedConfig, stack: ExitStack) -> None:
        self._dir = model_dir
        self._config: Any = config
        self._where: dict[str, Any] = {}
        for shard in shards(model_dir):
            opened = stack.enter_context(safe_open(shard, framework="pt"))
            self._where |= dict.fromkeys(opened.keys(), opened)
        self.names = self._named()  # GGUF's -> Hugging Face's, in the file's order
        names = set(self.names.values())
        found = {n for n in self._where if not self._unused(n)}
        if found != names:
            missing, extra = sorted(names - found), sorted(found - names)
            raise ValueError(f"{model_dir}: tensors missing: {missing[:3]}, tensors unknown: {extra[:3]}")
        for n in self.names.values():
            kind = str(self._where[n].get_slice(n).get_dtype())
            if kind not in _FLOATS:
                raise ValueError(
                    f"{n} of {model_dir} is of type {kind}: famc reads unquantised checkpoints only"
                )

    @property
    def arch(self) -> str:
        """llama.cpp's name of the architecture."""
        return str(gguf.MODEL_ARCH_NAMES[self._arch])

    @property
    def _arch(self) -> gguf.MODEL_ARCH:
        return ARCHITECTURES[self._config.architectures[0]]

    def _unused(self, name: str) -> bool:
        """A tied head in the file is the embedding again; old Llama folders carry RoPE's frequencies."""
        tied = bool(self._config.tie_word_embeddings)
        return name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight")

    def _named(self) -> dict[str, str]:
        """The names that the configuration asks for: GGUF's -> Hugging Face's."""
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
        names = ["model.embed_tokens.weight", *layers, "model.norm.weight", *head]
        translate = gguf.get_tensor_name_map(self._arch, config.num_hidden_layers)
        return {str(translate.get_name(n, try_suffixes=(".weight", ".bias"))): n for n in names}

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
        if self.arch != "llama":
            return 0
        heads = {"q_proj": self._config.num_attention_heads, "k_proj": self._config.num_key_value_heads}
        return int(heads.get(source.split(".")[-2], 0))

    def lossless(self) -> Quant:
        """The narrowest float type that holds all of the source exactly."""
        kinds = {str(self._where[n].get_slice(n).get_dtype()) for n in self.names.values()}
        only = kinds.pop() if len(kinds) == 1 else ""
        return QUANTS[{"BF16": "bf16", "F16": "f16"}.get(only, "f32")]

    def type_of(self, name: str, how: Quant) -> Type:
        """A vector and what is exact stay in F32; a matrix whose rows don't divide into blocks becomes F16."""
        shape = self.shape(name)
        if len(shape) < 2 or name in EXACT:
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
        writer = gguf.GGUFWriter(path, self.arch)
        try:
            writer.add_type("model")
            writer.add_name(name)
            writer.add_file_type(int(how.file_type))
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            writer.add_custom_alignment(gguf.GGUF_DEFAULT_ALIGNMENT)
            self._add_shape(writer)
            vocabulary.add_to(writer)
            types = {n: self.type_of(n, how) for n in self.names}
            factors = self._rope_factors()
            if factors is not None:
                writer.add_tensor_info(ROPE_FREQS, factors.shape, factors.dtype, factors.nbytes)
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

    def _rope_factors(self) -> Array | None:
        return _rope_factors(self._config)

    def _add_shape(self, writer: Any) -> None:
        config = self._config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        rope = config.rope_parameters
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
