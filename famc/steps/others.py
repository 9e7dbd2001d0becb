"""Light side of the kinds that are not stages: how much work they are, and the vocabulary of evaluations.

Their parameters are composed in graph.py from the sections of the spec. Each worker is in famc/work under its name:
tokenizer, mix, export, parity, eval, gate, card, release. What can be exported to what: exports.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from famc.cost import sums
from famc.cost.of_shape import anatomy, reader
from famc.cost.shape import Shape
from famc.steps.base import Amount, Work

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


TEXT_TOKENS = 256
"""Of an example whose source says nothing. Assumed."""


def eval_work(shape: Shape, tasks: list[Mapping[str, Any]], held: Mapping[str, Amount]) -> Work:
    """Forward passes over held-out text, and greedy generation of answers. `held`: what each source keeps for it."""
    tokens = read = 0.0
    logits = False
    for task in tasks:
        amount = held.get(task["data"] or "", Amount(math.inf, math.inf))
        examples = min(task.get("n") or EVAL_EXAMPLES.get(task["task"], 500), amount.examples)
        known = math.isfinite(amount.tokens) and amount.examples > 0
        each = amount.tokens / amount.examples if known else float(TEXT_TOKENS)
        pairs = examples
        if task["task"] == "answers":
            each = min(each, shape.context) + task["max_new_tokens"]
        elif task["task"] == "rerank":  # every query with each of its candidates
            pairs, each = examples * (task.get("top") or RERANKED), min(each, float(shape.context))
        elif task["task"] in ("retrieval", "mteb"):  # queries and all passages, each alone
            pairs, each = 2.0 * (amount.examples if known else examples), min(each / 2, float(shape.context))
        logits |= task["task"] not in ("retrieval", "rerank", "mteb")
        tokens += pairs * each
        read += pairs * each * min(each, float(shape.context))
    length = max(1.0, read / tokens) if tokens else float(shape.context)
    made = anatomy(shape) if logits else reader(shape)
    return Work(
        "infer",
        tokens=tokens,
        flops=sums.forward_flops(made, tokens, length),
        context=shape.context,
        length=length,
        head="logits" if logits else "none",
        cpu_seconds=0.0,
    )


def parity_work(shape: Shape) -> Work:
    """Two forward passes over a sample, and a few greedy answers."""
    length = float(min(shape.context, 1024))
    return Work(
        "infer",
        tokens=32_000,
        flops=sums.forward_flops(anatomy(shape), 32_000, length),
        context=shape.context,
        length=length,
        head="logits",
        cpu_seconds=0.0,
    )


SMALL = Work("cpu", cpu_seconds=0.2)
