"""An embedder's or reranker's weights under llama.cpp's names, with how its tokens become a vector or a score.

In: a folder of weights, config.json and, of an embedder, sentence-transformers' files. Out: EncoderSource, a Source whose
file llama-server reads with `--embedding` or `--rerank`; llama.cpp brings vectors to length 1 itself.

Refused, since llama.cpp would load them and answer wrongly: classifiers of more than one label, rerankers made of a
decoder that sees both ways (their score is read off the first token there), and BERT's rerankers: llama.cpp gives all
tokens the first type, and ours tell the two texts apart by it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import AutoConfig, PretrainedConfig

from famc.steps.exports import RANKING
from famc.work.checkpoint import decoder_config
from famc.work.gguf_source import Array, Source, more_wrong
from famc.work.onnx_encoder import POOLING_FLAGS, read_pooling
from famc.work.scores import read_json

# Classes whose vectors or scores equal torch's, by task, with llama.cpp's name of the architecture. An embedder is often
# saved with the head that it was pretrained with.
KNOWN: Mapping[str, Mapping[str, str]] = {
    "feature-extraction": {
        "Qwen3Model": "qwen3", "Qwen3ForCausalLM": "qwen3", "BertModel": "bert", "BertForMaskedLM": "bert",
        "BertForPreTraining": "bert", "ModernBertModel": "modern-bert", "ModernBertForMaskedLM": "modern-bert",
    },
    "text-ranking": {
        "Qwen3ForSequenceClassification": "qwen3", "ModernBertForSequenceClassification": "modern-bert",
    },
}  # fmt: skip
ROPES = ("default", "linear", "yarn")
GELUS = (
    "gelu",
    "gelu_new",
    "gelu_pytorch_tanh",
)  # llama.cpp computes the last one's, from a table
POOLING = dict(
    zip(
        POOLING_FLAGS.values(),
        (gguf.PoolingType.CLS, gguf.PoolingType.MEAN, gguf.PoolingType.LAST),
        strict=True,
    )
)
RANK = gguf.PoolingType.RANK


@dataclass(frozen=True, slots=True)
class Names:
    """llama.cpp's names of weights and Hugging Face's, without `.weight`: of the model, of each layer, of a reranker's
    head. In `biased` those with a bias; prefixes of what the vectors don't need."""

    model: Mapping[str, str]
    layers: str
    layer: Mapping[str, str]
    head: Mapping[str, str]
    biased: frozenset[str] = frozenset()
    prefix: str = "model."
    unused: tuple[str, ...] = ("lm_head.",)


_BERT = {
    **{f"attn_{x[0]}": f"attention.self.{x}" for x in ("query", "key", "value")},
    "attn_output": "attention.output.dense", "attn_output_norm": "attention.output.LayerNorm",
    "ffn_up": "intermediate.dense", "ffn_down": "output.dense", "layer_output_norm": "output.LayerNorm",
}  # fmt: skip
NAMES: Mapping[str, Names] = {
    "qwen3": Names(
        {"token_embd": "embed_tokens", "output_norm": "norm"},
        "layers",
        {
            "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
            **{f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"}, "attn_output": "self_attn.o_proj",
            "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
            **{f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
        },
        {"cls.output": "score"},
    ),
    "bert": Names(
        {
            "token_embd": "embeddings.word_embeddings", "position_embd": "embeddings.position_embeddings",
            "token_types": "embeddings.token_type_embeddings", "token_embd_norm": "embeddings.LayerNorm",
        },
        "encoder.layer",
        _BERT,
        {},
        biased=frozenset({*_BERT, "token_embd_norm"}),
        prefix="bert.",
        unused=("cls.", "pooler.", "embeddings.position_ids"),
    ),
    "modern-bert": Names(
        {"token_embd": "embeddings.tok_embeddings", "token_embd_norm": "embeddings.norm", "output_norm": "final_norm"},
        "layers",
        {
            "attn_norm": "attn_norm", "attn_qkv": "attn.Wqkv", "attn_output": "attn.Wo", "ffn_norm": "mlp_norm",
            "ffn_up": "mlp.Wi", "ffn_down": "mlp.Wo",
        },
        {"cls": "head.dense", "cls.norm": "head.norm", "cls.output": "classifier"},
        biased=frozenset({"cls.output"}),
        unused=("head.", "decoder."),
    ),
}  # fmt: skip


def encoder_config(model_dir: Path, task: str) -> PretrainedConfig:
    """The configuration of an embedder or reranker; ValueError for what llama.cpp can't do, or does otherwise."""
    raw = read_json(model_dir / "config.json")
    name = str((raw.get("architectures") or [raw.get("model_type", "unknown")])[0])
    what = f"the GGUF export for {task}"
    if name not in KNOWN[task]:
        raise ValueError(f"{what} doesn't know {name} ({model_dir}); it knows {', '.join(KNOWN[task])}")
    arch = KNOWN[task][name]
    if arch == "qwen3":
        ropes = dict.fromkeys(KNOWN[task], ROPES)
        config = decoder_config(model_dir, what, ropes, more_wrong, both_ways=task != RANKING)
    else:
        config = AutoConfig.from_pretrained(model_dir, local_files_only=True)
    for fault, there in _wrong(config, arch, task).items():
        if there:
            raise ValueError(f"{what} can't do {name} with {fault} ({model_dir})")
    return config


def _wrong(config: Any, arch: str, task: str) -> dict[str, bool]:
    """What llama.cpp does otherwise, silently."""
    found: dict[str, bool] = {}
    if task == RANKING:
        found[f"{config.num_labels} labels"] = config.num_labels != 1
    if arch == "bert":
        found[f"the activation {config.hidden_act}"] = config.hidden_act not in GELUS
        found["a causal mask"] = bool(config.is_decoder)
    if arch == "modern-bert":
        found[f"the activation {config.hidden_activation}"] = config.hidden_activation not in GELUS
        found["biases"] = config.norm_bias or config.attention_bias or config.mlp_bias
        scaled = [rope for rope in config.rope_parameters.values() if rope["rope_type"] != "default"]
        found["a scaled RoPE"] = bool(scaled)
    if arch == "qwen3":
        found["biases"] = bool(config.attention_bias)
    return found


class EncoderSource(Source):
    """An embedder's or reranker's tensors under their GGUF names. The score of a Qwen3 has two rows in the file, its own
    and zeros: llama.cpp takes a softmax of them, which of one row would be 1 for every pair, and of two is the
    sigmoid of the score."""

    def __init__(self, model_dir: Path, config: PretrainedConfig, stack: ExitStack, task: str) -> None:
        self._task = task
        self._kind = NAMES[KNOWN[task][config.architectures[0]]]
        self._pooling = None if task == RANKING else read_pooling(model_dir)
        super().__init__(model_dir, config, stack)

    @property
    def arch(self) -> str:
        """llama.cpp's name of the architecture."""
        return KNOWN[self._task][self._config.architectures[0]]

    @property
    def _prefix(self) -> str:
        prefix = self._kind.prefix
        return prefix if any(name.startswith(prefix) for name in self._where) else ""

    def _unused(self, name: str) -> bool:
        if self._task == RANKING and any(name.startswith(own) for own in self._kind.head.values()):
            return False
        return name.removeprefix(self._prefix).startswith(self._kind.unused)

    def _named(self) -> dict[str, str]:
        kind, prefix = self._kind, self._prefix
        made: dict[str, str] = {}

        def add(names: Mapping[str, str], ours: str, theirs: str) -> None:
            for one, other in names.items():
                for part in ("weight", "bias") if one in kind.biased else ("weight",):
                    made[f"{ours}{one}.{part}"] = f"{theirs}{other}.{part}"

        add(kind.model, "", prefix)
        for i in range(self._config.num_hidden_layers):
            # in ModernBERT's first layer the embedding's norm stands for this one
            here = {
                n: t for n, t in kind.layer.items() if i or (self.arch, n) != ("modern-bert", "attn_norm")
            }
            add(here, f"blk.{i}.", f"{prefix}{kind.layers}.{i}.")
        if self._task == RANKING:
            add(kind.head, "", "")
        return made

    def shape(self, name: str) -> tuple[int, ...]:
        """By GGUF name; rows first, as torch has it."""
        found = super().shape(name)
        return (2, *found[1:]) if self._doubled(name) else found

    def chunks(self, name: str) -> Iterator[torch.Tensor]:
        """A tensor by GGUF name, some rows at a time, in its own type."""
        for chunk in super().chunks(name):
            yield torch.cat([chunk, torch.zeros_like(chunk)]) if self._doubled(name) else chunk

    def _doubled(self, name: str) -> bool:
        return self.arch == "qwen3" and name == "cls.output.weight"

    def _rope_factors(self) -> Array | None:
        return None  # of llama3's kind of RoPE alone, which none of these may have

    def _add_shape(self, writer: Any) -> None:
        config = self._config
        if self.arch == "qwen3":
            super()._add_shape(writer)
            both_ways = getattr(config, "is_causal", True) is False
            if both_ways:
                writer.add_causal_attention(False)
            if self._task == RANKING:
                writer.add_array(f"{self.arch}.classifier.output_labels", ["relevant", "other"])
        else:
            self._add_encoder(writer)
        writer.add_pooling_type(POOLING[self._pooling.mode] if self._pooling else RANK)

    def _add_encoder(self, writer: Any) -> None:
        config = self._config
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_vocab_size(config.vocab_size)
        writer.add_causal_attention(False)
        if self.arch == "bert":
            writer.add_layer_norm_eps(config.layer_norm_eps)
            writer.add_token_type_count(config.type_vocab_size)
            return
        ropes = config.rope_parameters
        writer.add_layer_norm_eps(config.norm_eps)
        writer.add_rope_freq_base(ropes["full_attention"]["rope_theta"])
        writer.add_float32(f"{self.arch}.rope.freq_base_swa", ropes["sliding_attention"]["rope_theta"])
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
        writer.add_sliding_window(config.local_attention)
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
        if self._task == RANKING:
            pooling = POOLING[config.classifier_pooling]
            writer.add_uint32(f"{self.arch}.classifier.pooling_type", int(pooling))
