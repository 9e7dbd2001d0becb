"""Light side of the kinds that are not stages: how much work they are, and the vocabulary of evaluations.

Their parameters are composed in graph.py from the sections of the spec. Each worker is in famc/work under its name:
tokenizer, mix, export, parity, eval, gate, card, release. What can be exported to what: exports.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from famc.cost import flops
from famc.cost.shape import Shape
from famc.steps.base import Work

# --- tokenizer ------------------------------------------------------------------------------------------------------

# Reserved once for the whole family: no later line has to resize an embedding.
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<|mask|>",
    "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|audio_start|>", "<|audio_end|>", "<|audio_pad|>",
    "<tool_call>", "</tool_call>", "<|yes|>", "<|no|>",
)  # fmt: skip

# ChatML. The generation marks tell training which tokens are the assistant's; <|im_end|> is among them: EOS is learnt.
CHATML = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['role'] == 'assistant' %}"
    "{% generation %}{{- message['content'] + '<|im_end|>' }}{% endgeneration %}{{- '\\n' }}"
    "{%- else %}{{- message['content'] + '<|im_end|>\\n' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def tokenizer_work(params: Mapping[str, Any]) -> Work:
    """BPE training: about 2 MB a CPU-second."""
    return Work("cpu", cpu_seconds=2.0 + params["bytes"] / 2e6)


def mix_work(tokens: float) -> Work:
    """Tokenising: about 0.5 M tokens a CPU-second."""
    return Work("cpu", tokens=0.0, cpu_seconds=2.0 + tokens / 5e5)


# --- evaluations ----------------------------------------------------------------------------------------------------

# suites that a spec may name without declaring them; tasks without a worker here are planned only
SUITES: dict[str, tuple[str, ...]] = {
    "base": ("bits_per_byte",),
    "chat": ("answers", "preference"),
    "code": ("code",),
    "math": ("math",),
    "mteb": ("retrieval",),
    "retrieval": ("retrieval",),
    "rerank": ("rerank",),
    "vqa": ("vqa",),
    "asr": ("asr",),
    "fill_mask": ("fill_mask",),
}
TASKS_READY = frozenset(
    {"bits_per_byte", "answers", "preference", "lm_eval", "fill_mask", "retrieval", "rerank", "mteb"}
)
# what a task measures: the metric that gates compare first, and whether more is better
MAIN_METRIC = {
    "bits_per_byte": "bits_per_byte",
    "answers": "answer_loss",
    "preference": "preference_accuracy",
    "fill_mask": "masked_loss",
    "retrieval": "ndcg@10",
    "rerank": "ndcg@10",
}
HIGHER_IS_BETTER = {
    "bits_per_byte": False, "perplexity": False, "answer_loss": False, "token_accuracy": True, "chrf": True,
    "exact_match": True, "preference_accuracy": True, "preference_accuracy_implicit": True, "ended": True,
    "masked_loss": False, "masked_accuracy": True,
    "ndcg@10": True, "mrr@10": True, "recall@10": True, "recall@100": True, "bm25_ndcg@10": True, "over_bm25": True,
    "fused_ndcg@10": True, "fused_over_bm25": True, "fused_over_embedder": True, "mrl_kept": True,
    "retriever_ndcg@10": True, "retriever_recall": True, "over_retriever": True,
}  # fmt: skip
# all that a task measures; lm_eval measures what its harness names
METRICS = {
    "bits_per_byte": ("bits_per_byte", "perplexity"),
    "answers": ("answer_loss", "token_accuracy", "chrf", "exact_match", "ended"),
    "preference": ("preference_accuracy", "preference_accuracy_implicit"),
    "fill_mask": ("masked_loss", "masked_accuracy"),
    "retrieval": (
        "ndcg@10",
        "mrr@10",
        "recall@10",
        "recall@100",
        "bm25_ndcg@10",
        "over_bm25",
        "fused_ndcg@10",
        "fused_over_bm25",
        "fused_over_embedder",
        "mrl_kept",
    ),
    "rerank": (
        "ndcg@10",
        "mrr@10",
        "retriever_ndcg@10",
        "retriever_recall",
        "bm25_ndcg@10",
        "over_retriever",
        "over_bm25",
    ),
}
# examples that an evaluation reads unless told otherwise, and tokens of one
EVAL_EXAMPLES = {
    "bits_per_byte": 400, "answers": 100, "preference": 200, "fill_mask": 400, "retrieval": 2000, "rerank": 500,
}  # fmt: skip
FORMATS = {
    "bits_per_byte": "text", "answers": "messages", "preference": "preference", "fill_mask": "text",
    "retrieval": "pairs", "rerank": "pairs",
}  # fmt: skip
RERANKED = 50  # passages of the first stage that a reranker reads for a query


def eval_work(shape: Shape, tasks: list[Mapping[str, Any]]) -> Work:
    """Forward passes over held-out text, and greedy generation of answers."""
    tokens = 0.0
    for task in tasks:
        examples = task.get("n") or EVAL_EXAMPLES.get(task["task"], 500)
        tokens += examples * 256
        if task["task"] == "answers":
            tokens += examples * task["max_new_tokens"]
        if task["task"] == "rerank":  # every query with each of its candidates
            tokens += examples * (task.get("top") or RERANKED) * min(shape.context, 256)
    return Work(
        "infer",
        tokens=tokens,
        flops=flops.forward(shape, tokens, min(shape.context, 1024)),
        context=shape.context,
    )


def parity_work(shape: Shape) -> Work:
    """Two forward passes over a sample, and a few greedy answers."""
    return Work(
        "infer",
        tokens=16_000,
        flops=2 * flops.forward(shape, 16_000, min(shape.context, 1024)),
        context=shape.context,
    )


SMALL = Work("cpu", cpu_seconds=0.2)
