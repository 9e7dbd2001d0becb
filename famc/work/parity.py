"""`parity`: an export, reloaded from disk in its own runtime, against the model that it was made from.

In: model, export, tokenizer, held-out `text.<source>` and `chat.<source>`. Out: results.json: distances of
logits and greedy text, whether ids, template and end marks are the same, and the scores of both with their
paired difference. The runtime is the one that users load the format with: ONNX Runtime, llama.cpp, transformers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from famc.errors import StepFailed
from famc.job import Job
from famc.steps.exports import CALIBRATED_FORMATS, DEFAULT_QUANT, ONNX_FILES, RANKING, TEXT, VECTORS
from famc.work.compare import (
    Decoder,
    TorchDecoder,
    compare_greedy,
    compare_logits,
    log_softmax,
    tokenizer_report,
)
from famc.work.evaluate import heldout
from famc.work.likelihood import (
    Row,
    document_start,
    encode_chat,
    encode_prompt,
    end_ids,
    last_turn,
    load_tokenizer,
)
from famc.work.scores import RESULTS, Score, Units, difference, metric, read_json, stable, write_json

if TYPE_CHECKING:
    from famc.work.llama_cpp import LlamaDecoder

# rendered when the tokenizer brings no conversation of its own
CONVERSATION = [
    {"role": "system", "content": "You are terse."},
    {"role": "user", "content": "What does bread need?"},
    {"role": "assistant", "content": "Flour, water, salt and time."},
    {"role": "user", "content": "Et le four ?\n\n  42 °C — 不够。"},
]


def run(job: Job, inputs: dict[str, Path], out: Path) -> dict[str, Any]:
    """Compare, and write down how far the export is."""
    params = job.params
    context, limit = int(params["context"]), int(params["max_new_tokens"])
    tokenizer = load_tokenizer(inputs["tokenizer"])
    documents = _examples(inputs, "text.", int(params["texts"]), ["text"])
    conversations = _examples(inputs, "chat.", int(params["texts"]), ["messages"])
    raw = [d["text"] for d in documents] + [str(m["content"]) for c in conversations for m in c["messages"]]
    told = same_tokenizer(inputs["tokenizer"], inputs["model"], raw)

    if params.get("task", TEXT) in (VECTORS, RANKING):
        return _vectors(job, inputs, out, raw, told)
    start = document_start(tokenizer)
    texts = [
        [start, *tokenizer(d["text"], add_special_tokens=False)["input_ids"]][:context] for d in documents
    ]
    chats = _chats(tokenizer, conversations, context)
    texts = texts or [list(row.ids) for _, row in chats]
    texts = [ids for ids in texts if len(ids) > 1]
    if not texts:
        raise StepFailed(
            "parity has no held-out text", "keep some back: heldout.fraction of a source of text"
        )
    prompts = _prompts(tokenizer, conversations, context - limit) or [
        ids[: max(1, len(ids) // 2)] for ids in texts
    ]
    prompts = prompts[: int(params["prompts"])]

    source: Decoder = TorchDecoder(inputs["model"], job.threads)
    candidate = reloaded(inputs["export"], str(params["format"]), job.threads, context)
    told = {key: told[key] if told[key] == "differs" else also for key, also in
            own_tokenizer(params["format"], inputs, candidate, raw, told).items()}  # fmt: skip
    stages = 3
    found = compare_logits(source, candidate, texts)
    job.progress(1, stages)
    found |= compare_greedy(source, candidate, prompts, end_ids(tokenizer), limit)
    job.progress(2, stages)
    scores = _scores(source, candidate, chats)
    scores["perplexity"] = _perplexity(found, len(texts))
    job.progress(3, stages)

    parity: dict[str, Any] = {
        "kl": found["kl"],
        "max_abs": found["max_logit_difference"],
        "top1_agreement": found["top1_agreement"],
        "perplexity_reference": found["perplexity_reference"],
        "perplexity_candidate": found["perplexity_candidate"],
        "perplexity_ratio": found["perplexity_ratio"],
        "perplexity_ratio_error": found["perplexity_ratio"] * found["log_ratio_error"],
        "greedy_equal": found["greedy_equal"],
        "greedy_agree_tokens": found["greedy_agree_tokens"],
        "tokens": found["tokens"],
        "prompts": found["prompts"],
    }
    written = {key: stable(value) for key, value in parity.items()} | told
    write_json(out / RESULTS, {"parity": written, "scores": scores})
    flat: dict[str, Any] = {key: metric(value) for key, value in parity.items()} | told
    for name, entry in scores.items():
        for side in ("source", "export"):
            flat[f"{name}_{side}"] = metric(Score.read(entry[side]).value)
    return flat


def _vectors(
    job: Job, inputs: Mapping[str, Path], out: Path, texts: list[str], told: dict[str, str]
) -> dict[str, Any]:
    """An embedder's vectors, or a reranker's logits, and the order that both sides put the texts in."""
    from famc.work.compare_vectors import compare_embedder, compare_reranker

    names = [name for name in ONNX_FILES.values() if (inputs["export"] / name).is_file()]
    graph = inputs["export"] / _one(inputs["export"], names, "ONNX graphs")
    compare = compare_embedder if job.params["task"] == VECTORS else compare_reranker
    found = compare(inputs["model"], graph, texts, load_tokenizer(inputs["tokenizer"]), job.threads)
    write_json(out / RESULTS, {"parity": {k: stable(v) for k, v in found.items()} | told, "scores": {}})
    return {key: metric(value) for key, value in found.items()} | told


def reloaded(export: Path, fmt: str, threads: int, context: int) -> Decoder:
    """The export in the runtime that its users load it with; `context`: the longest row that it will see."""
    if fmt in ("safetensors", *CALIBRATED_FORMATS):
        return TorchDecoder(export, threads)
    if fmt == "onnx":
        from famc.work.onnx_session import OnnxDecoder

        names = [name for name in ONNX_FILES.values() if (export / name).is_file()]
        return OnnxDecoder(export / _one(export, names, "ONNX graphs"), threads)
    if fmt == "gguf":
        from famc.work.llama_cpp import LlamaDecoder

        names = [path.name for path in sorted(export.glob("*.gguf"))]
        return LlamaDecoder(export / _one(export, names, "GGUF files"), threads, context)
    raise StepFailed(f"parity can't load the format {fmt}", f"known: {', '.join(DEFAULT_QUANT)}")


def _one(export: Path, names: list[str], what: str) -> str:
    if len(names) != 1:
        raise StepFailed(f"{export} holds {len(names)} {what}, not one", "famc build makes it again")
    return names[0]


# --- tokenizer --------------------------------------------------------------------------------------------


def same_tokenizer(source: Path, candidate: Path, texts: list[str]) -> dict[str, str]:
    """`exact` or `differs`, for ids and for the chat template: the candidate folder against the family's
    tokenizer.

    Both must also reproduce the golden conversation that was written down when the tokenizer was made.
    """
    golden = read_json(source / "golden.json") if (source / "golden.json").is_file() else {}
    conversation = golden.get("conversation") or CONVERSATION
    report = tokenizer_report(source, candidate, conversation, texts)
    ids = all(report[key] for key in ("ids_equal", "eos_equal", "bos_equal", "pad_equal", "round_trip"))
    template = bool(report["template_equal"] and report["template_with_prompt_equal"])
    if golden.get("rendered") is not None:
        loaded = load_tokenizer(candidate)
        ids = ids and loaded(golden["rendered"], add_special_tokens=False)["input_ids"] == golden["ids"]
        template = template and loaded.chat_template is not None
        template = template and loaded.apply_chat_template(conversation, tokenize=False) == golden["rendered"]
    return {"tokenizer": "exact" if ids else "differs", "template": "exact" if template else "differs"}


def own_tokenizer(
    fmt: str, inputs: Mapping[str, Path], candidate: Any, texts: list[str], told: dict[str, str]
) -> dict[str, str]:
    """The same of the tokenizer that an export brings along, if it brings one; else what is known already."""
    if fmt in ("safetensors", *CALIBRATED_FORMATS):
        return same_tokenizer(inputs["tokenizer"], inputs["export"], texts)
    if fmt == "gguf":
        return gguf_tokenizer(inputs["tokenizer"], candidate, texts)
    return told  # an ONNX graph is released with the model's own files


def gguf_tokenizer(source: Path, candidate: LlamaDecoder, texts: list[str]) -> dict[str, str]:
    """llama.cpp's ids, end marks and template against the family's.

    Texts are normalised first, as the family's tokenizer does it (NFC): llama.cpp's byte-level BPE does not.
    """
    words = load_tokenizer(source)
    golden = read_json(source / "golden.json") if (source / "golden.json").is_file() else {}
    conversation = golden.get("conversation") or CONVERSATION
    normalizer = words.backend_tokenizer.normalizer
    same = all(
        candidate.tokenize(normalizer.normalize_str(text) if normalizer else text)
        == words(text, add_special_tokens=False)["input_ids"]
        for text in texts
    )
    said = candidate.metadata
    ends = tuple(said.get(f"tokenizer.ggml.{mark}_token_id") for mark in ("eos", "padding"))
    same = same and ends == (str(words.eos_token_id), str(words.pad_token_id))
    same = same and said.get("tokenizer.ggml.add_bos_token", "false") == "false"
    template = words.chat_template is None and candidate.template is None
    if words.chat_template is not None and candidate.template is not None:
        rendered = words.apply_chat_template(conversation, tokenize=False)
        own = words.apply_chat_template(conversation, tokenize=False, chat_template=candidate.template)
        template = own == rendered
        same = (
            same
            and candidate.tokenize_special(rendered) == words(rendered, add_special_tokens=False)["input_ids"]
        )
    return {"tokenizer": "exact" if same else "differs", "template": "exact" if template else "differs"}


# --- what is compared -------------------------------------------------------------------------------------


def _examples(inputs: Mapping[str, Path], prefix: str, n: int, columns: list[str]) -> list[dict[str, Any]]:
    found = []
    for role, folder in inputs.items():
        if role.startswith(prefix):
            found += [e for e in heldout(folder, n, columns) if e[columns[0]]]
    return found


def _chats(tokenizer: Any, conversations: Sequence[Mapping[str, Any]], context: int) -> list[tuple[str, Row]]:
    rows = []
    for example in conversations:
        ids, said = encode_chat(tokenizer, example["messages"])
        row = Row(ids[:context], said[:context])
        if any(row.wanted[1:]):
            rows.append((str(example["id"]), row))
    return rows


def _prompts(tokenizer: Any, conversations: Sequence[Mapping[str, Any]], longest: int) -> list[list[int]]:
    turns = [turn for c in conversations if (turn := last_turn(c["messages"])) is not None]
    prompts = [encode_prompt(tokenizer, before) for before, _ in turns]
    return [ids for ids in prompts if len(ids) <= longest]


def _scores(source: Decoder, candidate: Decoder, chats: Sequence[tuple[str, Row]]) -> dict[str, Any]:
    """answer_loss and token_accuracy of both on the same conversations, with the difference conversation by
    conversation."""
    if not chats:
        return {}
    made: dict[str, list[Units]] = {"answer_loss": [], "token_accuracy": []}
    for decoder in (source, candidate):
        loss, right = [], []
        for key, row in chats:
            at = np.flatnonzero(np.asarray(row.wanted[1:], dtype=bool))
            logits = decoder.logits([list(row.ids)])[0][at]
            following = np.asarray(row.ids)[at + 1]
            nll = -log_softmax(logits)[np.arange(len(at)), following]
            loss.append((key, float(nll.sum()), float(len(at))))
            right.append((key, float((logits.argmax(axis=-1) == following).sum()), float(len(at))))
        made["answer_loss"].append(Units.of(loss))
        made["token_accuracy"].append(Units.of(right))
    return {
        name: {
            "source": ours.score().record(),
            "export": theirs.score().record(),
            "difference": difference(theirs, ours).record(),
        }
        for name, (ours, theirs) in made.items()
    }


def _perplexity(found: Mapping[str, float], n: int) -> dict[str, Any]:
    """Perplexity on the texts as a score; its difference follows from the paired ratio."""
    before, ratio = found["perplexity_reference"], found["perplexity_ratio"]
    change = Score(before * (ratio - 1), before * ratio * found["log_ratio_error"], n)
    return {
        "source": Score(before, math.nan, n).record(),
        "export": Score(found["perplexity_candidate"], math.nan, n).record(),
        "difference": change.record(),
    }
