"""A shape -> transformers' configuration of its architecture, and the class that is pretrained and saved.

In: a step's `shape` and the family's tokenizer. Out: a configuration with the tokenizer's ids. Decoders predict the
next token; bert and modernbert fill in masked ones; t5 reads one text and writes another. Dropout is 0 everywhere:
data is seen once or a few times (T5 v1.1 and Llama pretrain without; Geiping & Goldstein, arXiv 2212.14034, for BERT).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from famc.cost.shape import ENCODER_DECODERS, ENCODERS
from famc.errors import StepFailed
from famc.work.likelihood import load_model, without_bars
from famc.work.marks import Marks, marks_of
from famc.work.scores import read_json

LOCAL_THETA = (
    10_000.0  # ModernBERT's local layers see 128 tokens: their base is never raised (arXiv 2412.13663)
)


def auto_class(arch: str) -> Any:
    """transformers' class of an architecture with the head that it is pretrained with."""
    if arch in ENCODERS:
        return AutoModelForMaskedLM
    return AutoModelForSeq2SeqLM if arch in ENCODER_DECODERS else AutoModelForCausalLM


def load_fitting(folder: Path, threads: int) -> Any:
    """A model folder in fp32 with the head that it was trained with, on the accelerator if there is one."""
    arch = str(read_json(folder / "config.json").get("model_type", ""))
    if arch not in (*ENCODERS, *ENCODER_DECODERS):
        return load_model(folder, threads)
    torch.set_num_threads(threads)
    with without_bars():
        model = auto_class(arch).from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


DROPOUTS = (
    "hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "attention_dropout",
    "embedding_dropout", "mlp_dropout",
)  # fmt: skip


def without_dropout(config: Any) -> None:
    """Turn a parent's dropout off where the result must not depend on the micro-batch: it is drawn by pass."""
    for name in DROPOUTS:
        if getattr(config, name, None):
            setattr(config, name, 0.0)


NEXT_TOKEN = ("bits_per_byte", "preference", "lm_eval")  # what only decoders are asked


def fits(model: Any, task: str) -> None:
    """StepFailed for a task that the model can't do."""
    arch = model.config.model_type
    encoder, both = arch in ENCODERS, arch in ENCODER_DECODERS
    if ((encoder or both) and task in NEXT_TOKEN) or (encoder and task == "answers"):
        raise StepFailed(
            f"the task '{task}' asks what follows: {arch} was not trained to say it",
            "tasks of bert and modernbert: fill_mask; of t5: answers and fill_mask",
        )
    if not (encoder or both) and task == "fill_mask":
        raise StepFailed(
            f"the task 'fill_mask' hides tokens: {arch} was not trained to see behind them",
            "use bits_per_byte",
        )


def new_config(shape: Mapping[str, Any], tokenizer: Any) -> Any:
    """The configuration of a new model."""
    arch = str(shape["arch"])
    common = {"vocab_size": shape["vocab"], "bos_token_id": None, "pad_token_id": tokenizer.pad_token_id}
    if arch in ENCODERS:
        marks = marks_of(tokenizer)
        return AutoConfig.for_model(arch, **common, **_encoder(shape, marks))
    if arch in ENCODER_DECODERS:
        if not shape["tie"]:
            raise StepFailed(
                "transformers ties t5's output head to its embedding", "set tie: true on the size"
            )
        return AutoConfig.for_model(arch, **common, **_t5(shape, tokenizer))
    return AutoConfig.for_model(arch, **common, **_decoder(shape, tokenizer))


def inherit(config: Any, shape: Mapping[str, Any]) -> None:
    """Give a parent's configuration the step's own positions and rotary base."""
    arch, context = str(shape["arch"]), int(shape["context"])
    if arch == "bert":
        if context > config.max_position_embeddings:
            raise StepFailed(
                f"the parent has learnt {config.max_position_embeddings} positions, the step asks for {context}: "
                "BERT's are a table, which can't be extended",
                f"set context to {config.max_position_embeddings} at most, or use modernbert",
            )
        return
    if arch in ENCODER_DECODERS:
        config.n_positions = max(context, getattr(config, "n_positions", None) or 0)
        return
    config.max_position_embeddings = max(context, config.max_position_embeddings)
    if arch == "modernbert":
        config.rope_parameters = {
            **config.rope_parameters,
            "full_attention": {**config.rope_parameters["full_attention"], "rope_theta": shape["rope_theta"]},
        }
        return
    rope = config.rope_parameters or {"rope_type": "default"}
    config.rope_parameters = {**rope, "rope_theta": shape["rope_theta"]}


def _decoder(shape: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "hidden_size": shape["hidden"],
        "intermediate_size": shape["ffn"],
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv_heads"],
        "head_dim": shape["head_dim"],
        "max_position_embeddings": shape["context"],
        "rope_parameters": {"rope_type": "default", "rope_theta": shape["rope_theta"]},
        "tie_word_embeddings": shape["tie"],
        "eos_token_id": tokenizer.eos_token_id,
        "use_cache": False,
    }
    if moe := shape["moe"]:
        values |= {
            "num_experts": moe["experts"],
            "num_experts_per_tok": moe["active"],
            "moe_intermediate_size": moe["ffn"],
            "norm_topk_prob": True,
        }
    return values


def _encoder(shape: Mapping[str, Any], marks: Marks) -> dict[str, Any]:
    values: dict[str, Any] = {
        "hidden_size": shape["hidden"],
        "intermediate_size": shape["ffn"],
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "max_position_embeddings": shape["context"],
        "tie_word_embeddings": shape["tie"],
        "eos_token_id": marks.sep,
    }
    if shape["arch"] == "bert":
        return values | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return values | {
        "cls_token_id": marks.cls,
        "sep_token_id": marks.sep,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": shape["rope_theta"]},
            "sliding_attention": {"rope_type": "default", "rope_theta": LOCAL_THETA},
        },
    }


def _t5(shape: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """T5 v1.1 (gated GELU), with the tied and scaled head of the first T5: transformers 5 builds no other."""
    return {
        "d_model": shape["hidden"],
        "d_ff": shape["ffn"],
        "d_kv": shape["head_dim"],
        "num_layers": shape["layers"],
        "num_decoder_layers": shape["layers"],
        "num_heads": shape["heads"],
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.0,
        "tie_word_embeddings": True,
        "eos_token_id": tokenizer.eos_token_id,
        "decoder_start_token_id": tokenizer.pad_token_id,
        "n_positions": shape["context"],  # of no effect: distances have no end; what it was trained on
        "use_cache": False,
    }
