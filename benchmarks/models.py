"""Model folders with random weights, of any shape: what speed and memory are measured on.

In: a Shape. Out: a Hugging Face folder in bf16, written layer by layer, so that making a large model takes little memory.
Speed does not depend on what the weights are, nor on what a tokenizer has learnt.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config

from famc.cost.shape import Shape
from famc.work.tokenizer import SPLIT

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


def make_random_model(folder: Path, shape: Shape, seed: int = 0) -> int:
    """Write a Qwen3 folder and return its number of parameters."""
    if shape.arch != "qwen3":
        raise ValueError(f"random models are Qwen3, not {shape.arch}")
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    config = Qwen3Config(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.context,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=shape.tie,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        architectures=["Qwen3ForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)
    q, kv, h = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.hidden
    block: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (q, h), "self_attn.k_proj": (kv, h), "self_attn.v_proj": (kv, h), "self_attn.o_proj": (h, q),
        "self_attn.q_norm": (shape.head_dim,), "self_attn.k_norm": (shape.head_dim,), "mlp.gate_proj": (shape.ffn, h),
        "mlp.up_proj": (shape.ffn, h), "mlp.down_proj": (h, shape.ffn), "input_layernorm": (h,),
        "post_attention_layernorm": (h,),
    }  # fmt: skip
    shards = [
        {f"model.layers.{i}.{name}.weight": size for name, size in block.items()} for i in range(shape.layers)
    ]
    ends: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (shape.vocab, h),
        "model.norm.weight": (h,),
    }
    if not shape.tie:
        ends["lm_head.weight"] = (shape.vocab, h)
    where, parameters = {}, 0
    for index, names in enumerate([*shards, ends]):
        file = f"model-{index + 1:05}-of-{len(shards) + 1:05}.safetensors"
        tensors = {
            name: torch.ones(size, dtype=torch.bfloat16)
            if len(size) == 1
            else torch.randn(size, generator=generator).mul_(0.02).to(torch.bfloat16)
            for name, size in names.items()
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(names, file)
        parameters += sum(t.numel() for t in tensors.values())
    index_of = {"metadata": {"total_size": 2 * parameters}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_of, indent=1), encoding="utf-8")
    return parameters


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A small byte-level BPE with the family's splitting rule and ChatML; the rest of the vocabulary stays
    unused."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        min_frequency=2,
    )
    tokenizer.train_from_iterator([Path(argparse.__file__).read_text(encoding="utf-8")], trainer)
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE
    )
