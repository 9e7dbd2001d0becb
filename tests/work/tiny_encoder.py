"""Tiny embedders and rerankers: real folders with a tokenizer, as sentence-transformers saves and loads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from tiny_model import TEXTS, tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    ModernBertConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

Kind = Literal["bert", "modernbert", "qwen3", "qwen3-bidirectional"]
KINDS: tuple[Kind, ...] = ("bert", "modernbert", "qwen3", "qwen3-bidirectional")
POOLING = {"bert": "mean_tokens", "modernbert": "cls_token"}  # and the last token of the others
WORDS = [word for text in TEXTS for word in text.split()]
QUERIES = [" ".join(WORDS[i : i + 3]) for i in range(0, 60, 12)]
DOCUMENTS = [" ".join(WORDS[i : i + 2 + i % 9]) for i in range(0, 70, 3)]


def encoder_tokenizer(kind: Kind) -> PreTrainedTokenizerFast:
    """The family's tokenizer with the marks around a text that each kind is trained with."""
    tokenizer = tiny_tokenizer()
    # sentence-transformers renders a reranker's pairs as a chat if the tokenizer brings a template
    tokenizer.chat_template = None
    mark, end = "<|im_start|>", "<|im_end|>"
    ids = [(mark, tokenizer.convert_tokens_to_ids(mark)), (end, tokenizer.convert_tokens_to_ids(end))]
    if kind.startswith("qwen3"):
        single, pair = f"$A {end}", f"$A {mark} $B {end}"
    else:
        # a BERT is told which text a token belongs to, though transformers.js, which asks no tokenizer but BertTokenizer
        # for types, sends zeros: the graph finds out by itself
        single = f"{mark} $A {end}"
        pair = f"{mark} $A {end} $B:1 {end}:1" if kind == "bert" else f"{mark} $A {end} $B {end}"
        tokenizer.cls_token, tokenizer.sep_token = mark, end
        tokenizer.unk_token = tokenizer.mask_token = "<|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, pair=pair, special_tokens=ids
    )
    names = ["input_ids", *(["token_type_ids"] if kind == "bert" else []), "attention_mask"]
    tokenizer.model_input_names = names
    tokenizer.padding_side = "left" if kind.startswith("qwen3") else "right"
    tokenizer.model_max_length = 96
    return tokenizer


def make_tiny_encoder(
    folder: Path,
    kind: Kind,
    *,
    labels: int = 0,
    normalise: bool = True,
    pooling: str | None = None,
    steps: int = 0,
    **shape: Any,
) -> Path:
    """Write an embedder's folder, or a reranker's when it has `labels`, with random weights; a reranker may learn for
    some `steps` which documents go with which queries, so that its scores are apart as a trained one's are."""
    tokenizer = encoder_tokenizer(kind)
    common = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        # above the usual spread: attention must matter in random weights, or a lost mask goes unseen
        "initializer_range": 0.1,
        **({"num_labels": labels} if labels else {}),
    }
    if kind == "bert":
        config: Any = BertConfig(**common | shape)
    elif kind == "modernbert":
        window = {"local_attention": 16, "num_hidden_layers": 4}  # a global layer and three local ones
        marks = {"cls_token_id": tokenizer.cls_token_id, "sep_token_id": tokenizer.sep_token_id}
        config = ModernBertConfig(**common | window | marks | shape)
    else:
        config = Qwen3Config(**common | {"num_key_value_heads": 2, "head_dim": 32} | shape)
        if kind == "qwen3-bidirectional":
            config.is_causal = False  # not an argument: that one is dropped
    torch.manual_seed(0)
    auto = AutoModelForSequenceClassification if labels else AutoModel
    extra = {"add_pooling_layer": False} if kind == "bert" and not labels else {}
    model = auto.from_config(config, dtype=torch.float32, **extra)
    with torch.no_grad():  # biases and norms start at 0 and 1: an export that drops them goes unseen
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.add_(torch.randn_like(weight) * 0.1)
    if steps:
        _learn(model, tokenizer, steps)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    # A name that transformers 4, sentence-transformers' ONNX backend and transformers.js know. transformers 5 leaves the
    # others out, and who then loads the folder pads on the right and passes token types.
    settings |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": tokenizer.model_input_names,
        "padding_side": tokenizer.padding_side,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    if not labels:
        _write_modules(folder, config.hidden_size, pooling or POOLING.get(kind, "lasttoken"), normalise)
    return folder


def _learn(model: Any, tokenizer: Any, steps: int) -> None:
    """A score from -3 to 3 for each pair, by rote: 40 steps are enough for every kind."""
    pairs = [(query, document) for query in QUERIES for document in DOCUMENTS]
    made = tokenizer(*(list(side) for side in zip(*pairs, strict=True)), padding=True, return_tensors="pt")
    wanted = torch.linspace(-3, 3, len(pairs))[torch.randperm(len(pairs))]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        found = model(**made).logits[:, -1]
        torch.nn.functional.mse_loss(found, wanted).backward()
        optimizer.step()
        optimizer.zero_grad()


def _write_modules(folder: Path, width: int, pooling: str, normalise: bool) -> None:
    """sentence-transformers' files, with the names of its modules before version 6, which both read."""
    names = ["Transformer", "Pooling", *(["Normalize"] if normalise else [])]
    modules = [
        {
            "idx": i,
            "name": str(i),
            "path": f"{i}_{name}" if i else "",
            "type": f"sentence_transformers.models.{name}",
        }
        for i, name in enumerate(names)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text(
        json.dumps({"max_seq_length": 96, "do_lower_case": False})
    )
    (folder / "1_Pooling").mkdir()
    modes = (
        "cls_token",
        "mean_tokens",
        "max_tokens",
        "mean_sqrt_len_tokens",
        "weightedmean_tokens",
        "lasttoken",
    )
    flags = {f"pooling_mode_{mode}": mode == pooling for mode in modes}
    (folder / "1_Pooling/config.json").write_text(json.dumps({"word_embedding_dimension": width, **flags}))
    if normalise:
        (folder / "2_Normalize").mkdir()
