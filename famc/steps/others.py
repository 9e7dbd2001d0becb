"""Light side of the kinds that are not stages: how much work they are, and the vocabulary of exports and evaluations.

Their parameters are composed in graph.py from the sections of the spec. Each worker is in famc/work under its name:
tokenizer, mix, export, parity, eval, gate, card, release.
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
    "<tool_call>", "</tool_call>",
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


# --- exports --------------------------------------------------------------------------------------------------------

# (format, quant) -> architectures that its worker builds and its parity check has loaded. Checked at plan time.
# An empty set: the format can be planned and priced, and has no worker yet.
DECODERS = frozenset({"qwen3", "llama"})
EXPORTS: dict[tuple[str, str], frozenset[str]] = {
    ("safetensors", "bf16"): DECODERS | {"qwen3_moe"},
    ("safetensors", "fp32"): DECODERS | {"qwen3_moe"},
    ("onnx", "fp32"): DECODERS,
    ("onnx", "int8"): DECODERS,
    ("onnx", "int4"): DECODERS,
    ("gguf", "*"): frozenset(),
    ("gptq", "*"): frozenset(),
    ("awq", "*"): frozenset(),
    ("fp8", "*"): frozenset(),
}
DEFAULT_QUANT = {
    "safetensors": ("bf16",),
    "onnx": ("fp32",),
    "gguf": ("q4_k_m",),
    "gptq": ("4",),
    "awq": ("4",),
    "fp8": ("8",),
}
_BYTES = {
    "fp32": 4.0,
    "bf16": 2.0,
    "int8": 1.0,
    "int4": 0.56,
    "q8_0": 1.06,
    "q4_k_m": 0.6,
    "q4_0": 0.56,
    "8": 1.0,
    "4": 0.56,
}
# file that an export adds to a release, as transformers.js expects them
ONNX_FILES = {"fp32": "onnx/model.onnx", "int8": "onnx/model_int8.onnx", "int4": "onnx/model_q4.onnx"}


def export_bytes(parameters: int, quant: str) -> float:
    """Bytes of the weights in an export."""
    return parameters * _BYTES.get(quant, 2.0)


def export_work(parameters: int) -> Work:
    """Reading, packing and writing every weight: about 50 M parameters a CPU-second, and 2 s to trace the graph."""
    return Work("cpu", cpu_seconds=2.0 + parameters / 5e7)


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
}
TASKS_READY = frozenset({"bits_per_byte", "answers", "preference", "lm_eval"})
# what a task measures: the metric that gates compare first, and whether more is better
MAIN_METRIC = {
    "bits_per_byte": "bits_per_byte",
    "answers": "answer_loss",
    "preference": "preference_accuracy",
}
HIGHER_IS_BETTER = {
    "bits_per_byte": False, "perplexity": False, "answer_loss": False, "token_accuracy": True, "chrf": True,
    "exact_match": True, "preference_accuracy": True, "preference_accuracy_implicit": True, "ended": True,
}  # fmt: skip
# all that a task measures; lm_eval measures what its harness names
METRICS = {
    "bits_per_byte": ("bits_per_byte", "perplexity"),
    "answers": ("answer_loss", "token_accuracy", "chrf", "exact_match", "ended"),
    "preference": ("preference_accuracy", "preference_accuracy_implicit"),
}
# examples that an evaluation reads unless told otherwise, and tokens of one
EVAL_EXAMPLES = {"bits_per_byte": 400, "answers": 100, "preference": 200}
FORMATS = {"bits_per_byte": "text", "answers": "messages", "preference": "preference"}


def eval_work(shape: Shape, tasks: list[Mapping[str, Any]]) -> Work:
    """Forward passes over held-out text, and greedy generation of answers."""
    tokens = 0.0
    for task in tasks:
        examples = task.get("n") or EVAL_EXAMPLES.get(task["task"], 500)
        tokens += examples * 256 + (examples * task["max_new_tokens"] if task["task"] == "answers" else 0)
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
