"""`parity`: an export, reloaded from disk in its own runtime, against the model that it was made from.

In: model, export, tokenizer, held-out `text.<source>` and `chat.<source>`, or `pairs.<source>` for embedders and
rerankers. Out: results.json: distances of logits and greedy text, whether ids, template and end marks are the same, and
the scores of both with their paired difference; or distances of vectors and rankings. The runtime is the one that users
load the format with: ONNX Runtime, llama.cpp, transformers.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from famc.errors import StepFailed
from famc.job import Job
from famc.steps.exports import (
    CALIBRATED_FORMATS,
    CONVERTING,
    DEFAULT_QUANT,
    FILLING,
    ONNX_FILES,
    RANKING,
    TEXT,
    VECTORS,
)
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
    if params.get("task", TEXT) in OTHERS:
        return OTHERS[params["task"]](job, inputs, out)
    context, limit = int(params["context"]), int(params["max_new_tokens"])
    tokenizer = load_tokenizer(inputs["tokenizer"])
    documents = _examples(inputs, "text.", int(params["texts"]), ["text"])
    conversations = _examples(inputs, "chat.", int(params["texts"]), ["messages"])
    raw = _texts(inputs, int(params["texts"]))
    told = same_tokenizer(inputs["tokenizer"], inputs["model"], raw)

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


def _vectors(job: Job, inputs: dict[str, Path], out: Path) -> dict[str, Any]:
    """An embedder's vectors, or a reranker's logits, and the order that both sides put passages in."""
    from famc.work.compare_vectors import Pairs, compare_embedder, compare_reranker
    from famc.work.encoder_session import gguf_ids

    pairs, texts = None, _texts(inputs, int(job.params["texts"]))
    if found := _pairs(inputs):
        pairs = Pairs.of(found, int(job.params["pairs"]))
        texts = [*pairs.queries, *pairs.passages]
    fmt, task = str(job.params["format"]), str(job.params["task"])
    told = own_ids(inputs["model"], _folder(job, inputs), texts)
    export = {"onnx": graph_of, "gguf": gguf_of}.get(fmt, Path)(inputs["export"])
    if fmt == "gguf" and told["tokenizer"] == "exact":
        told = gguf_ids(inputs["model"], export, texts, task, job.threads)
    compare = compare_embedder if task == VECTORS else compare_reranker
    made = compare(inputs["model"], export, texts, load_tokenizer(inputs["model"]), job.threads, pairs=pairs)
    return _written(out, made, told)


def _filled(job: Job, inputs: dict[str, Path], out: Path) -> dict[str, Any]:
    """What a masked LM says of the tokens that are hidden from it."""
    from famc.work.compare_filled import compare_masked

    texts = _texts(inputs, int(job.params["texts"]))
    told = own_ids(inputs["model"], _folder(job, inputs), texts)
    tokenizer = load_tokenizer(inputs["model"])
    ids = [
        tokenizer(text, truncation=True, max_length=int(job.params["context"]))["input_ids"] for text in texts
    ]
    made = compare_masked(inputs["model"], inputs["export"], ids, tokenizer.mask_token_id, job.threads)
    return _written(out, made, told)


def _converted(job: Job, inputs: dict[str, Path], out: Path) -> dict[str, Any]:
    """What a T5 says of a second half when it has read the first, word by word and by itself."""
    from famc.work import compare_filled, seq2seq_session

    module: Any = seq2seq_session if job.params["format"] == "onnx" else compare_filled
    chats = _examples(inputs, "chat.", int(job.params["texts"]), ["messages"])
    asked = [pair for chat in chats for pair in [_turn(chat["messages"])] if pair is not None]
    texts = _texts(inputs, int(job.params["texts"]))
    pairs = asked or [(text[: len(text) // 2], text[len(text) // 2 :]) for text in texts]
    told = own_ids(inputs["model"], _folder(job, inputs), [text for pair in pairs for text in pair])
    made = module.compare_seq2seq(
        inputs["model"], inputs["export"], pairs, load_tokenizer(inputs["model"]), job.threads,
        context=int(job.params["context"]), max_new_tokens=int(job.params["max_new_tokens"]),
    )  # fmt: skip
    return _written(out, made, told)


OTHERS = {VECTORS: _vectors, RANKING: _vectors, FILLING: _filled, CONVERTING: _converted}


def _turn(messages: Sequence[Mapping[str, Any]]) -> tuple[str, str] | None:
    """The last answer, and the question before it."""
    found = last_turn(messages)
    return None if found is None else (str(found[0][-1]["content"]), found[1])


def _folder(job: Job, inputs: Mapping[str, Path]) -> Path:
    """Where users of the export find its tokenizer: with a folder's weights, else with the model's own files."""
    return inputs["export"] if job.params["format"] == "safetensors" else inputs["model"]


def own_ids(model: Path, folder: Path, texts: list[str]) -> dict[str, str]:
    """`exact` or `differs`, for ids: a folder's tokenizer, loaded as a user loads it, against the model's tokenizer.json
    as the tokenizers library reads it. An encoder's tokenizer is its own: it may lower-case, and marks both ends.

    transformers may rebuild a tokenizer after the class that the folder names, and then gives unknown ids.
    """
    plain = Tokenizer.from_file(str(model / "tokenizer.json"))
    plain.no_truncation()
    plain.no_padding()
    loaded = load_tokenizer(folder)
    pairs = list(itertools.pairwise(texts))
    same = all(loaded(text)["input_ids"] == plain.encode(text).ids for text in texts)
    same = same and all(loaded(*pair)["input_ids"] == plain.encode(*pair).ids for pair in pairs)
    own = load_tokenizer(model)
    marks = ("eos_token_id", "pad_token_id", "cls_token_id", "sep_token_id", "mask_token_id")
    same = same and all(getattr(loaded, name) == getattr(own, name) for name in marks)
    return {"tokenizer": "exact" if same else "differs"}


def _written(out: Path, found: Mapping[str, float], told: dict[str, str]) -> dict[str, Any]:
    """results.json without scores: the figures compare both sides already."""
    write_json(out / RESULTS, {"parity": {k: stable(v) for k, v in found.items()} | told, "scores": {}})
    return {key: metric(value) for key, value in found.items()} | told


def graph_of(export: Path) -> Path:
    """The one graph of an ONNX export."""
    names = [name for name in ONNX_FILES.values() if (export / name).is_file()]
    return export / _one(export, names, "ONNX graphs")


def gguf_of(export: Path) -> Path:
    """The one file of a GGUF export."""
    return export / _one(export, [path.name for path in sorted(export.glob("*.gguf"))], "GGUF files")


def reloaded(export: Path, fmt: str, threads: int, context: int) -> Decoder:
    """The export in the runtime that its users load it with; `context`: the longest row that it will see."""
    if fmt in ("safetensors", *CALIBRATED_FORMATS):
        return TorchDecoder(export, threads)
    if fmt == "onnx":
        from famc.work.onnx_session import OnnxDecoder

        return OnnxDecoder(graph_of(export), threads)
    if fmt == "gguf":
        from famc.work.llama_cpp import LlamaDecoder

        return LlamaDecoder(gguf_of(export), threads, context)
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


def read_list(value: Any) -> list[str]:
    """A column of lists, which a parquet file of famc holds as JSON."""
    return list(json.loads(value) if isinstance(value, str) else value)


def _examples(
    inputs: Mapping[str, Path], prefix: str, n: int | None, columns: list[str]
) -> list[dict[str, Any]]:
    found = []
    for role, folder in inputs.items():
        if role.startswith(prefix):
            found += [e for e in heldout(folder, n, columns) if e[columns[0]]]
    return found


def _texts(inputs: Mapping[str, Path], n: int) -> list[str]:
    """Held-out texts, and what is said in held-out conversations."""
    documents = _examples(inputs, "text.", n, ["text"])
    conversations = _examples(inputs, "chat.", n, ["messages"])
    return [d["text"] for d in documents] + [str(m["content"]) for c in conversations for m in c["messages"]]


def _pairs(inputs: Mapping[str, Path]) -> list[dict[str, Any]]:
    """Held-out queries with their passages."""
    found = _examples(inputs, "pairs.", None, ["query", "positives"])
    return [e | {"positives": read_list(e["positives"])} for e in found]


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
