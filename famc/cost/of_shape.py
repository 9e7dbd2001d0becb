"""The anatomy of a model that a spec describes.

In: a Shape. Out: its Anatomy, weight for weight what `parameters.count` counts. Bears no identity.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

from famc.cost.anatomy import Anatomy
from famc.cost.hf.config import anatomy as of_config
from famc.cost.shape import Shape


@lru_cache(maxsize=4096)
def anatomy(shape: Shape) -> Anatomy:
    """What a Shape is made of: decoders with their output head, encoders with the one that fills in masked tokens."""
    return of_config(config(shape))


@lru_cache(maxsize=4096)
def reader(shape: Shape) -> Anatomy:
    """The same without logits over the vocabulary: embedders and rerankers."""
    whole = anatomy(shape)
    tables = tuple(replace(t, head=False) for t in whole.tables)
    return replace(whole, tables=tables, head=None, vocab=0)


def config(shape: Shape) -> dict[str, Any]:
    """The Shape under Hugging Face's names: the keys of a config.json on which weights and FLOPs depend."""
    if shape.arch == "t5":
        return {
            "model_type": "t5",
            "vocab_size": shape.vocab,
            "num_layers": shape.layers,
            "d_model": shape.hidden,
            "d_ff": shape.ffn,
            "num_heads": shape.heads,
            "d_kv": shape.head_dim,
            "feed_forward_proj": "gated-gelu",
        }
    found = {
        "model_type": shape.arch,
        "vocab_size": shape.vocab,
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.context,
        "tie_word_embeddings": shape.tie,
    }
    if shape.moe is not None:
        found |= {
            "num_experts": shape.moe.experts,
            "num_experts_per_tok": shape.moe.active,
            "moe_intermediate_size": shape.moe.ffn,
        }
    return found
