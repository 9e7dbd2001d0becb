"""A Hugging Face tokenizer as GGUF knows it: tokens and merges, what each is for, the name of its splitting rule, and
the chat template without transformers' own tags, or of a reranker how two texts stand beside each other.

In: a model folder's tokenizer files. Out: Vocabulary. ValueError where llama.cpp would give other ids in silence: a
splitting rule that it has no name for, or a tokenizer that is no byte-level BPE.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import AutoTokenizer, PretrainedConfig

from famc.steps.exports import RANKING, TEXT
from famc.work.likelihood import without_bars
from famc.work.rank_data import template_of

Messages = list[dict[str, str]]

# (splitting regex of the tokenizer, whether it ignores merges for whole words) -> llama.cpp's name of it.
# Written out, not famc's own SPLIT: if that one changes, it has no name here until its ids were compared.
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
_QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = "ByteLevel"
_DIGITS = "Digits, ByteLevel"
PRE_TOKENIZERS: dict[tuple[str, bool], str] = {
    (_QWEN2, False): "qwen2",
    (_QWEN35, False): "qwen35",
    (_LLAMA3, True): "llama-bpe",
    (_LLAMA3, False): "dbrx",
    (_GPT2, False): "gpt-2",
    (_DIGITS, False): "smollm",
}

# What ends a turn, by the names that llama.cpp knows too.
TURN_ENDS = ("<|im_end|>", "<|eot_id|>")
TEXT_ENDS = ("<|endoftext|>", "<|end_of_text|>")

PROBES: tuple[Messages, ...] = (
    [{"role": "user", "content": "What is 1 + 1?"}],
    [
        {"role": "system", "content": "Be terse."},
        {"role": "user", "content": " two\nlines "},
        {"role": "assistant", "content": "<think>\nHm.\n</think>\n\n2"},
        {"role": "user", "content": "And {{ 2 }} + 2?"},
        {"role": "assistant", "content": "4"},
    ],
    [{"role": "assistant", "content": ""}, {"role": "user", "content": "Why?"}],
)


# --- tokenizer ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Vocabulary:
    """A byte-level BPE as GGUF holds it."""

    pre: str  # llama.cpp's name of the splitting rule
    tokens: Sequence[str]
    types: Sequence[int]
    merges: Sequence[str]
    ids: Mapping[str, int]  # bos, eos, ...: llama.cpp's roles
    add_bos: bool
    add_eos: bool
    template: str | None
    pair: str | None = None  # a reranker's two texts at {query} and {document}, with its marks

    def add_to(self, writer: Any) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(list(self.tokens))
        writer.add_token_types(list(self.types))
        writer.add_token_merges(list(self.merges))
        for role, token in self.ids.items():
            getattr(writer, f"add_{role}_token_id")(token)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        if self.template:
            writer.add_chat_template(self.template)
        if self.pair:  # as llama-server looks for it
            writer.add_string("tokenizer.chat_template.rerank", self.pair)


def read_vocabulary(model_dir: Path, config: PretrainedConfig, task: str = TEXT) -> Vocabulary:
    """The folder's tokenizer as transformers loads it; ValueError if llama.cpp would give other ids. An embedder's or
    reranker's has no chat template, and its own marks around a text."""
    with without_bars():
        tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"{model_dir}: the GGUF export needs a fast tokenizer (tokenizer.json)")
    spec = json.loads(backend.to_str())
    pre = pre_tokenizer_name(spec)
    vocab: dict[str, int] = dict(spec["model"]["vocab"])
    added = {t["content"]: t for t in spec["added_tokens"]}
    by_id = {i: token for token, i in vocab.items()} | {t["id"]: t["content"] for t in added.values()}
    rows = int(config.vocab_size)
    if max(by_id) >= rows:
        raise ValueError(f"{model_dir}: the tokenizer has id {max(by_id)}, the embedding {rows} rows")
    tokens: list[str] = []
    types: list[int] = []
    kinds = gguf.TokenType
    for i in range(rows):
        token = by_id.get(i)
        if token is None:
            tokens.append(f"[PAD{i}]")
            types.append(kinds.UNUSED)
        else:
            tokens.append(token)
            special = token in added and added[token]["special"]
            types.append(kinds.CONTROL if special else kinds.USER_DEFINED if token in added else kinds.NORMAL)
    if len(set(tokens)) != rows:  # llama.cpp would abort the process
        twice = [token for token, count in Counter(tokens).items() if count > 1]
        raise ValueError(f"{model_dir}: tokens that are there twice: {twice[:3]}")
    merges = [m if isinstance(m, str) else " ".join(m) for m in spec["model"]["merges"]]
    if not merges:
        raise ValueError(f"{model_dir}: a tokenizer without merges; llama.cpp can't load one")
    before, after = _added_around(tokenizer)
    if task == TEXT:
        strange = before not in ([], [tokenizer.bos_token_id]) or after not in ([], [tokenizer.eos_token_id])
        ids = _roles(model_dir, tokenizer, config, by_id)
    else:
        strange = len(before) > 1 or len(after) > 1
        ids = _marks(tokenizer, before, after)
    if strange:
        raise ValueError(f"the tokenizer adds {before} before a text and {after} after it; llama.cpp can't")
    return Vocabulary(
        pre=pre,
        tokens=tokens,
        types=[int(t) for t in types],
        merges=merges,
        ids=ids,
        add_bos=bool(before),
        add_eos=bool(after),
        template=_template(tokenizer) if task == TEXT else None,
        pair=_pair(tokenizer, added) if task == RANKING else None,
    )


def pre_tokenizer_name(spec: Mapping[str, Any]) -> str:
    """llama.cpp's name of how a tokenizer.json splits text; ValueError if it has none, or for another model."""
    model = spec["model"]
    normalizers = [n["type"] for n in _flat(spec.get("normalizer"), "normalizers")]
    unlike = {
        f"a model of type {model['type']}": model["type"] != "BPE",
        "byte fallback": bool(model.get("byte_fallback")),
        "marks inside words": bool(model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")),
        f"the normaliser {'+'.join(normalizers)}": set(normalizers) - {"NFC"},
        "added tokens that strip space or match whole words": any(
            t["lstrip"] or t["rstrip"] or t["single_word"] for t in spec["added_tokens"]
        ),
    }
    for what, there in unlike.items():
        if there:
            raise ValueError(f"the GGUF export knows byte-level BPE tokenizers; this one has {what}")
    steps = _flat(spec.get("pre_tokenizer"), "pretokenizers")
    rule = _splitting_rule(steps)
    ignore_merges = bool(model.get("ignore_merges"))
    name = PRE_TOKENIZERS.get((rule, ignore_merges))
    if name is None:
        merges = " with ignore_merges" if ignore_merges else ""
        raise ValueError(
            f"llama.cpp has no name that famc knows for a tokenizer that splits by {rule}{merges};"
            f" known: {', '.join(PRE_TOKENIZERS.values())}"
        )
    return name


def _flat(part: Mapping[str, Any] | None, inner: str) -> list[Mapping[str, Any]]:
    """The steps of a part of tokenizer.json, out of their sequences."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [step for each in part[inner] for step in _flat(each, inner)]
    return [part]


def _splitting_rule(steps: Sequence[Mapping[str, Any]]) -> str:
    """The regex, or the names of the steps; what follows it is the conversion of bytes."""
    kinds = [step["type"] for step in steps]
    if kinds and kinds[-1] == "ByteLevel" and not steps[-1]["add_prefix_space"]:
        splits_too = steps[-1].get("use_regex", True)
        first = steps[0]
        if kinds == ["Split", "ByteLevel"] and not splits_too:
            # "removed, inverted" keeps the matches alone: the same, for a regex that matches everything
            how = (first["behavior"], first["invert"])
            if how in (("Isolated", False), ("Removed", True)) and "Regex" in first["pattern"]:
                return str(first["pattern"]["Regex"])
        if kinds == ["ByteLevel"] and splits_too:
            return _GPT2
        if kinds == ["Digits", "ByteLevel"] and splits_too and first["individual_digits"]:
            return _DIGITS
    return json.dumps(list(steps), ensure_ascii=False)


def _added_around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before a text, and after it."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    ids = tokenizer("a")["input_ids"]
    at = next((i for i in range(len(ids)) if ids[i : i + len(bare)] == bare), -1)
    if at < 0:
        raise ValueError(f"the tokenizer reads a text otherwise between its marks: {ids}, alone {bare}")
    return ids[:at], ids[at + len(bare) :]


def _marks(tokenizer: Any, before: list[int], after: list[int]) -> dict[str, int]:
    """The special ids of an encoder: llama.cpp calls what it puts around a text BOS and EOS, whatever they are."""
    ends = [i for i in (*after, tokenizer.eos_token_id, tokenizer.pad_token_id) if i is not None]
    if not ends:
        raise ValueError("the tokenizer has no mark behind a text, no eos_token and no pad_token")
    # without a BOS llama.cpp calls id 11 one, a word of text
    ids = {"eos": ends[0], "bos": before[0] if before else ends[0]}
    for role in ("pad", "sep", "mask"):
        own = getattr(tokenizer, f"{role}_token_id")
        if own is not None:
            ids[role] = own
    return ids


def _pair(tokenizer: Any, added: Mapping[str, Any]) -> str:
    """How a reranker's tokenizer writes two texts; ValueError if llama.cpp would not read its marks as such."""
    parts = template_of(tokenizer)
    marks = [
        [tokenizer.convert_ids_to_tokens(i) for i in ids]
        for ids in (parts.before, parts.between, parts.after)
    ]
    plain = [mark for some in marks for mark in some if mark not in added]
    if plain:
        raise ValueError(f"the tokenizer puts {plain} around texts, which are no tokens that were added")
    before, between, after = ("".join(some) for some in marks)
    return f"{before}{{query}}{between}{{document}}{after}"


def _roles(
    model_dir: Path, tokenizer: Any, config: PretrainedConfig, by_id: Mapping[int, str]
) -> dict[str, int]:
    """llama.cpp's special ids. All that end a text in generation_config.json must end it there too."""
    path = model_dir / "generation_config.json"
    generation = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    ends: list[int] = []
    for value in (tokenizer.eos_token_id, config.eos_token_id, generation.get("eos_token_id")):
        ends += value if isinstance(value, list) else [] if value is None else [value]
    if not ends:
        raise ValueError(f"{model_dir}: nothing says which token ends a text (eos_token)")
    ids = {"eos": ends[0]}
    names = {name: i for i, name in by_id.items()}
    turn_end = next((names[name] for name in TURN_ENDS if name in names), None)
    if turn_end is not None:
        ids["eot"] = turn_end
    # these it ends at by their names
    left = [e for e in dict.fromkeys(ends) if e not in ids.values() and by_id.get(e) not in TEXT_ENDS]
    if len(left) > 1:
        raise ValueError(f"{model_dir}: llama.cpp can't end a text at all of {ends}")
    if left:
        ids["eom"] = left[0]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else config.pad_token_id
    if pad is not None:
        ids["pad"] = pad
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else config.bos_token_id
    # Never added unless add_bos_token says so; but without one llama.cpp calls id 11 the BOS, a word of text.
    ids["bos"] = bos if bos is not None else names.get(TEXT_ENDS[0], ids["eos"])
    return ids


# --- chat template ------------------------------------------------------------------------------------------

_GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")


def without_generation_marks(template: str) -> str:
    """The template without `{% generation %}`, a tag of transformers for training that llama.cpp doesn't know.

    It renders the same. A tag also eats white space around it; where that matters, it becomes `{% if true %}`.
    """
    if not _GENERATION.search(template):
        return template
    plain = _GENERATION.sub("", template)
    if _lexed(plain) == _lexed(template):
        return plain
    return _GENERATION.sub(lambda m: f"{{%{m[1]} {'endif' if m[2] else 'if true'} {m[3]}%}}", template)


def _lexed(template: str) -> list[tuple[str, str]]:
    """What Jinja reads, after its control of white space, less the generation tags."""
    tokens: list[tuple[str, str]] = []
    for _, kind, value in environment().lex(template):
        if kind == "whitespace":
            continue
        if kind.endswith(("_begin", "_end")):
            value = ""
        if kind == "data" and tokens and tokens[-1][0] == "data":
            tokens[-1] = ("data", tokens[-1][1] + value)
        else:
            tokens.append((kind, value))
        if kind == "block_end" and tokens[-2] in (("name", "generation"), ("name", "endgeneration")):
            del tokens[-3:]
    return tokens


def environment() -> jinja2.Environment:
    """Jinja as transformers and llama.cpp set it up, without transformers' tag."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = raise_exception
    environment.filters["tojson"] = lambda value, **more: json.dumps(value, ensure_ascii=False, **more)
    return environment


def _template(tokenizer: Any) -> str | None:
    """The chat template for the file; ValueError if the change that llama.cpp needs would change its text."""
    templates = tokenizer.chat_template
    template = templates.get("default") if isinstance(templates, dict) else templates
    if template is None:
        return None
    stripped = without_generation_marks(template)
    for messages in PROBES if stripped != template else ():
        for prompt in (False, True):
            texts = [_rendered(tokenizer, each, messages, prompt) for each in (template, stripped)]
            if texts[0] != texts[1]:
                raise ValueError("the chat template renders another text without its generation marks")
    return stripped


def _rendered(tokenizer: Any, template: str, messages: Messages, prompt: bool) -> str | None:
    """None: the template refuses such a conversation."""
    try:
        return str(
            tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=prompt
            )
        )
    except (jinja2.TemplateError, TypeError, ValueError):
        return None
