"""A real but tiny model folder: a byte-level BPE with a ChatML template, and a Qwen3 or Llama that learnt a
few sentences by heart, so that its logits are peaked as a trained model's are."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen3Config

CHATML = (
    "{%- for m in messages -%}"
    "{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{%- if m['role'] == 'assistant' -%}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{%- else -%}{{ m['content'] + '<|im_end|>\n' }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXTS = [
    "The lighthouse keeper counted seven ships before the fog came in, and wrote each name down.",
    "def total(prices, tax):\n    return sum(price * (1 + tax) for price in prices)\n",
    "Bread needs flour, water, salt and time; the oven asks only for heat and a little patience.",
    "Rivers carry the mountains to the sea, one grain after another, and never hurry at all.",
    "for name in sorted(names):\n    print(name.upper(), len(name), end='; ')\n",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. Ça va? 你好，世界!",
]
CONVERSATION = [
    {"role": "system", "content": "You are terse."},
    {"role": "user", "content": "What does bread need?"},
    {"role": "assistant", "content": "Flour, water, salt and time."},
    {"role": "user", "content": "And the oven?"},
]


def tiny_tokenizer(vocab: int = 384) -> PreTrainedTokenizerFast:
    """A byte-level BPE, lossless up to NFC, with ChatML's marks."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = CHATML
    return fast


def make_tiny_model(
    folder: Path,
    kind: Literal["qwen3", "llama"] = "qwen3",
    *,
    tied: bool = True,
    theta: float = 1e6,
    steps: int = 0,
    seed: int = 0,
    **shape: Any,
) -> Path:
    """Write a model folder and return it. `steps` of AdamW on TEXTS, 0 for random weights; `shape` overrides
    the configuration."""
    tokenizer = tiny_tokenizer()
    config_class = {"qwen3": Qwen3Config, "llama": LlamaConfig}[kind]
    config = config_class(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32 if kind == "qwen3" else 16,
            "max_position_embeddings": 256,
            "rope_parameters": {"rope_type": "default", "rope_theta": theta},
            "tie_word_embeddings": tied,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            # ten times the usual spread: attention must matter in random weights, or a wrong RoPE goes unseen
            "initializer_range": 0.02 if steps else 0.2,
            **shape,
        }
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if steps:
        ids = [tokenizer(t)["input_ids"] + [tokenizer.eos_token_id] for t in TEXTS]
        longest = max(map(len, ids))
        batch = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in ids])
        labels = torch.tensor([row + [-100] * (longest - len(row)) for row in ids])
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        for _ in range(steps):
            model(input_ids=batch, labels=labels, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
