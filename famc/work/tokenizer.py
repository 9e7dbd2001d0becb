"""`tokenizer`: the family's byte-level BPE, trained on its sources; or an adopted one, checked.

Out: a folder that transformers, tokenizers and transformers.js load (the chat template inside
tokenizer_config.json), and `golden.json`: a conversation with the text and ids that every export of the
family has to reproduce. As Qwen does: NFC, Qwen's split, learned entries first, reserved tokens after them;
eos <|im_end|>, pad <|endoftext|>, no bos. What text can't fill of the vocabulary becomes <|reserved_0|>,
<|reserved_1|>, …
"""

from __future__ import annotations

import json
import shutil
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from famc.errors import StepFailed
from famc.job import Job
from famc.work.text import Message, draw, from_columns, joined, limit_threads, read_rows, write_json

# Qwen2 and Qwen3: contractions; words with one leading sign; single digits; signs; line ends; spaces.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
END_OF_TEXT, END_OF_TURN = "<|endoftext|>", "<|im_end|>"
FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
    "chat_template.jinja",
)  # fmt: skip

GOLDEN: list[Message] = [
    {"role": "user", "content": "What does `len([1, 2, 3])` return?"},
    {"role": "assistant", "content": "3: the number of items.\n\tfor x in y: pass  # naïve, 日本語, 🙂"},
    {"role": "user", "content": "And of  an empty one?"},
    {"role": "assistant", "content": "0."},
]
# odd on purpose: what a byte-level tokenizer has to give back unchanged (up to NFC)
ODD = (
    "", " ", "   ", "\n", "\r\n", "\t\t", "a  b   c", " lead and trail ", "line\r\nline\r\n\r\n",
    "\tif x:\n\t\treturn 1\n    # 4\n",
    "0123456789 3.14159 1e-5 ½ ²", "don't I'LL we'Ve", "naïve café Ünïcödé ñ", "e\u0301 o\u0302",
    "日本語の文章。中文，测试！한국어",
    "🙂👩‍👩‍👧‍👦🇩🇪", "עברית العربية हिन्दी ไทย",
    "\u00a0\u2003\u200b\ufeff", "\x00\x01\x1b[0m\x7f", "a\u2028b\x0bc\x0cd\x85e", "𝒳 𐍈 \U0010ffff",
)  # fmt: skip
_PIECE = 4096  # characters of a sampled piece
_HELD_BYTES = 500_000  # of held-out text that bytes per token are measured on, by source
_ROUND_TRIPS = 100  # held-out documents of each source


def run(job: Job, inputs: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """Train or copy, save, load as a user would, check."""
    limit_threads(job.threads)
    params = job.params
    metrics: dict[str, Any] = {}
    if params.get("adopt"):
        _adopt(Path(job.runtime["folder"]), params, out)
    else:
        metrics = _train(params, _by_name(inputs), out)
        job.progress(0.8, 1.0)
    return metrics | _check(params, _by_name(inputs), out)


def _by_name(inputs: Mapping[str, Path]) -> dict[str, Path]:
    return {role.partition(".")[2]: path for role, path in inputs.items() if role.startswith("source.")}


# --- training -----------------------------------------------------------------------------------------------


def _train(params: Mapping[str, Any], sources: Mapping[str, Path], out: Path) -> dict[str, Any]:
    if params["kind"] != "bbpe":
        raise StepFailed(f"no worker trains a tokenizer of kind '{params['kind']}' yet", "kind: bbpe")
    special, vocab = list(dict.fromkeys(params["special_tokens"])), params["vocab"]
    if missing := {END_OF_TEXT, END_OF_TURN} - set(special):
        raise StepFailed(f"special_tokens lack {', '.join(sorted(missing))}", "they end documents and turns")
    if vocab < 256 + len(special):
        raise StepFailed(
            f"a vocabulary of {vocab} can't hold 256 bytes and {len(special)} special tokens",
            "raise tokenizer.vocab",
        )
    tiered = [key for key in params["weights"] if "." in key]
    if tiered:
        raise StepFailed(
            f"no worker makes tiers yet: weight '{tiered[0]}'", f"write {tiered[0].partition('.')[0]}"
        )
    texts, read = _sample(params, sources)
    if not texts:
        raise StepFailed(
            "the tokenizer's sources have no training text", "look at the held-out fraction and the filters"
        )
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
        vocab_size=vocab - len(special),
        min_frequency=2,  # a pair seen once says nothing about the language
        special_tokens=[],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    reserved = vocab - len(special) - tokenizer.get_vocab_size()
    for name in (*special, *(f"<|reserved_{i}|>" for i in range(reserved))):
        # <think>, <tool_call> are words of an answer: `skip_special_tokens` must leave them (as in Qwen3)
        is_special = name.startswith("<|")
        token = AddedToken(name, special=is_special, normalized=False)
        added = tokenizer.add_special_tokens([token]) if is_special else tokenizer.add_tokens([token])
        if added != 1:
            raise StepFailed(
                f"special token '{name}' is already in the vocabulary", "give it a name that is not a word"
            )
    tokenizer.save(str(out / "tokenizer.json"))
    roles = {"image_token": "<|image_pad|>", "audio_token": "<|audio_pad|>"}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TURN,
        "pad_token": END_OF_TEXT,
        "bos_token": None,
        "unk_token": None,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**9,  # the model's positions limit, not the tokenizer
        "extra_special_tokens": {role: token for role, token in roles.items() if token in special},
        "chat_template": params["template"],
    }
    write_json(out / "tokenizer_config.json", config)
    return {
        "reserved": reserved,
        "special_tokens": len(special),
        "trained_bytes": sum(read.values()),
        "trained_bytes_by_source": read,
    }


def _sample(params: Mapping[str, Any], sources: Mapping[str, Path]) -> tuple[list[str], dict[str, int]]:
    """Pieces of training text: sources by weight, evenly over their documents, together at most `bytes`."""
    sizes = {name: sum(size for _, size in _pieces(sources[name])) for name in params["weights"]}
    shares = _shares(params["weights"], sizes, params["bytes"])
    texts: list[str] = []
    read = dict.fromkeys(sizes, 0)
    for name, share in shares.items():
        if not share:
            continue
        # systematic sampling: a piece is taken when the running quota, begun at random, passes it
        ratio, seen = share / sizes[name], 0
        start = draw(params["seed"], f"tokenizer:{name}") / 2**64 * _PIECE if ratio < 1 else 0.0
        for text, size in _pieces(sources[name]):
            seen += size
            if read[name] + size <= ratio * seen + start and read[name] + size <= share:
                texts.append(text)
                read[name] += size
    return texts, read


def _pieces(source: Path) -> Iterator[tuple[str, int]]:
    """Training text in pieces that end with a line where lines are short enough, and their bytes."""
    for row in read_rows(source / "train.parquet"):
        text = joined(from_columns(row))
        at = 0
        while at < len(text):
            end = min(len(text), at + _PIECE)
            if end < len(text):
                end = text.rfind("\n", at, end) + 1 or end
            piece = text[at:end]
            yield piece, len(piece.encode())
            at = end


def _shares(weights: Mapping[str, float], sizes: Mapping[str, int], total: int) -> dict[str, int]:
    """Bytes by source: by weight; what a source can't give goes to the others."""
    shares = dict.fromkeys(weights, 0)
    left, open_ = total, {name for name in weights if sizes[name] and weights[name] > 0}
    while open_ and left > 0:
        scale = left / sum(weights[name] for name in weights if name in open_)
        full = [name for name in weights if name in open_ and sizes[name] <= weights[name] * scale]
        if not full:
            for name in weights:
                if name in open_:
                    shares[name] = int(weights[name] * scale)
            break
        for name in full:
            shares[name] = sizes[name]
            left -= sizes[name]
            open_.discard(name)
    return shares


# --- adopting -----------------------------------------------------------------------------------------------


def _adopt(folder: Path, params: Mapping[str, Any], out: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise StepFailed(
                f"{folder}: no {name}",
                "adopt a folder that transformers' save_pretrained wrote for a fast tokenizer",
            )
    for name in FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
    try:
        config = json.loads((out / "tokenizer_config.json").read_text(encoding="utf-8"))
        Tokenizer.from_file(str(out / "tokenizer.json"))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise StepFailed(f"{folder}: not a tokenizer that can be read: {error}") from error
    # one place for the template, where transformers.js looks too
    template = out / "chat_template.jinja"
    if template.is_file():
        config["chat_template"] = template.read_text(encoding="utf-8")
        template.unlink()
    if params["template"]:
        config["chat_template"] = params["template"]
    write_json(out / "tokenizer_config.json", config)


# --- checks -------------------------------------------------------------------------------------------------


def _check(params: Mapping[str, Any], sources: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """Load the folder as a user does; raise StepFailed where it isn't what the family needs."""
    adopted = bool(params.get("adopt"))
    tokenizer = load(out)
    if len(tokenizer) > params["rows"]:
        raise StepFailed(
            f"the tokenizer has {len(tokenizer)} entries, the models' embedding {params['rows']} rows",
            "raise arch.vocab_pad",
        )
    if not adopted and len(tokenizer) != params["vocab"]:
        raise StepFailed(f"the tokenizer has {len(tokenizer)} entries instead of {params['vocab']}")
    if tokenizer.eos_token_id is None or tokenizer.pad_token_id is None:
        raise StepFailed(
            "the tokenizer has no eos_token or no pad_token", "set both in its tokenizer_config.json"
        )
    backend = Tokenizer.from_file(str(out / "tokenizer.json"))
    held = {name: _held_out(folder) for name, folder in sources.items()}
    lossy = [
        text
        for text in (*ODD, *(t for texts in held.values() for t in texts[:_ROUND_TRIPS]))
        if not _round_trips(backend, text)
    ]
    if lossy and not adopted:
        raise StepFailed(
            f"encoding and decoding changes {len(lossy)} texts, first {lossy[0][:80]!r}",
            "report this as a bug of famc",
        )
    golden = _golden(tokenizer, strict=bool(params["template"]))
    write_json(out / "golden.json", golden)
    bytes_per_token, tokens, size = {}, 0, 0
    for name, texts in held.items():
        source_tokens = sum(len(e) for e in backend.encode_batch_fast(texts, add_special_tokens=False))
        source_size = sum(len(text.encode()) for text in texts)
        bytes_per_token[name] = round(source_size / max(1, source_tokens), 4)
        tokens, size = tokens + source_tokens, size + source_size
    metrics: dict[str, Any] = {"vocab": len(tokenizer), "rows": params["rows"], "lossy_texts": len(lossy)}
    if tokens:
        metrics |= {"bytes_per_token": round(size / tokens, 4), "bytes_per_token_by_source": bytes_per_token}
    if adopted:
        metrics["chat_template"] = "none" if golden["rendered"] is None else "yes"
        metrics["assistant_mask"] = "none" if golden["assistant_mask"] is None else "yes"
    return metrics


def load(folder: Path) -> Any:
    """A tokenizer as transformers loads it; never with code from the folder."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StepFailed(f"transformers can't load the tokenizer: {error}") from error


def _held_out(source: Path) -> list[str]:
    """Held-out text of a source, or training text where nothing is held out."""
    for name in ("heldout.parquet", "train.parquet"):
        texts, size = [], 0
        for row in read_rows(source / name):
            texts.append(joined(from_columns(row)))
            size += len(texts[-1])
            if size >= _HELD_BYTES:
                break
        if texts:
            return texts
    return []


def _round_trips(tokenizer: Any, text: str) -> bool:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return bool(tokenizer.decode(ids, skip_special_tokens=False) == unicodedata.normalize("NFC", text))


def _golden(tokenizer: Any, *, strict: bool) -> dict[str, Any]:
    """The golden conversation, rendered and encoded. strict: the template is the family's own."""
    golden: dict[str, Any] = {"conversation": GOLDEN, "rendered": None, "ids": None, "assistant_mask": None}
    if tokenizer.chat_template is None:
        return golden
    import jinja2

    marked = "{% generation" in tokenizer.chat_template or "{%- generation" in tokenizer.chat_template
    if strict and not marked:
        raise StepFailed(
            "the chat template does not mark the assistant's words",
            "put {% generation %} … {% endgeneration %} around each answer with its end of turn",
        )
    try:
        golden["rendered"] = tokenizer.apply_chat_template(GOLDEN, tokenize=False)
        golden["prompt"] = tokenizer.apply_chat_template(
            GOLDEN[:1], tokenize=False, add_generation_prompt=True
        )
        encoded = tokenizer.apply_chat_template(GOLDEN, return_dict=True, return_assistant_tokens_mask=marked)
    except (jinja2.TemplateError, ValueError, TypeError, KeyError) as error:
        raise StepFailed(
            f"the chat template fails on a conversation of two turns: {error}", f"the conversation: {GOLDEN}"
        ) from error
    golden["ids"] = list(encoded["input_ids"])
    if marked:
        golden["assistant_mask"] = list(encoded["assistant_masks"])
        wrong = _mask_mistake(tokenizer, golden["ids"], golden["assistant_mask"])
        if wrong:
            raise StepFailed(
                f"the chat template marks the wrong words: {wrong}",
                "{% generation %} encloses each answer and its end of turn",
            )
    return golden


def _mask_mistake(tokenizer: Any, ids: list[int], mask: list[int]) -> str:
    """What is wrong with the assistant's mask of the golden conversation; empty if nothing is."""
    spans: list[list[int]] = []
    for index, (token, marked) in enumerate(zip(ids, mask, strict=True)):
        if marked and (index == 0 or not mask[index - 1]):
            spans.append([])
        if marked:
            spans[-1].append(token)
    answers = [message["content"] for message in GOLDEN if message["role"] == "assistant"]
    others = [message["content"] for message in GOLDEN if message["role"] != "assistant"]
    if len(spans) != len(answers):
        return f"{len(spans)} spans for {len(answers)} answers"
    for span, answer in zip(spans, answers, strict=True):
        text = tokenizer.decode(span, skip_special_tokens=False)
        if not text.endswith(answer + tokenizer.eos_token):
            return f"{text!r} instead of {answer + tokenizer.eos_token!r}"
        # a template may begin an answer with an empty <think></think>, never with another's words
        before = text[: -len(answer + tokenizer.eos_token)]
        if "assistant" in before or tokenizer.eos_token in before or any(other in before for other in others):
            return f"{before!r} before {answer!r}"
    return ""
