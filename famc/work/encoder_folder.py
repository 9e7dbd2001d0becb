"""The folders of embedders and rerankers, as every client reads them.

In: a trained transformer and its tokenizer. Out: an embedder's folder for sentence-transformers (modules.json, pooling,
prompts) or a reranker's (one label), with what transformers 4, sentence-transformers' ONNX backend and transformers.js
look for: see `save_tokenizer`. Nothing here decides: pooling, prompts and normalisation bear identity in the stage.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, normalizers
from tokenizers.processors import TemplateProcessing

from famc.cost.shape import ENCODERS
from famc.work.likelihood import load_tokenizer
from famc.work.marks import marked, write_tokenizer
from famc.work.scores import write_json

PREFIXES = {"query", "document"}  # the names of prompts that sentence-transformers' search functions ask for
POOLING = {"last": "lasttoken", "mean": "mean_tokens", "cls": "cls_token"}
_MODES = (
    "cls_token",
    "mean_tokens",
    "max_tokens",
    "mean_sqrt_len_tokens",
    "weightedmean_tokens",
    "lasttoken",
)
START, END = "<|im_start|>", "<|im_end|>"
EMBEDDER = "config_sentence_transformers.json"

# `text: words`. A word is found whatever its case and its neighbours are: `getHeader`, `get_header` and `Get header`
# become the same ids. Lower case loses what tells a class from a module; searching wants the word.
WORDS = normalizers.Sequence(
    [
        normalizers.NFC(),
        normalizers.Replace(Regex(r"(?<=[\p{Ll}\p{N}])(?=\p{Lu})"), " "),
        normalizers.Replace(Regex(r"[^\p{L}\p{M}\p{N}]+"), " "),
        normalizers.Lowercase(),
        normalizers.Strip(),
        normalizers.Prepend(" "),  # byte-level BPE knows words with a space in front
    ]
)


def encoder_tokenizer(folder: Path, arch: str, *, words: bool, pairs: bool = False) -> Any:
    """The family's tokenizer as an encoder of this architecture uses it: with marks around a text and between the two
    of a pair, without a chat template, and with `words` reading lower-cased words. `pairs`: for a reranker, as `marked` says."""
    family = load_tokenizer(folder)
    tokenizer = marked(family, arch, pairs=pairs) if arch in ENCODERS else _ended(family)
    if words:
        tokenizer.backend_tokenizer.normalizer = WORDS
    return tokenizer


def _ended(family: Any) -> Any:
    """A decoder's: the end of a turn stands behind a text, and the start of one between the two of a pair."""
    tokenizer = copy.deepcopy(family)
    tokenizer.chat_template = None  # sentence-transformers would render a reranker's pairs as chats
    vocabulary = tokenizer.get_vocab()
    end = END if END in vocabulary else tokenizer.eos_token
    between = START if START in vocabulary else end
    used = list(dict.fromkeys([between, end]))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {end}",
        pair=f"$A {between} $B {end}",
        special_tokens=[(t, tokenizer.convert_tokens_to_ids(t)) for t in used],
    )
    tokenizer.padding_side = "left"  # the last token is last in every row, whatever reads it
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return tokenizer


def save_tokenizer(tokenizer: Any, out: Path, context: int) -> None:
    """Its files, with the longest text that the model reads."""
    made = copy.deepcopy(tokenizer)
    made.model_max_length = context
    made.backend_tokenizer.no_truncation()  # what the last call asked for: clients ask for theirs
    made.backend_tokenizer.no_padding()
    write_tokenizer(made, out)


def save_embedder(
    model: Any,
    tokenizer: Any,
    out: Path,
    *,
    pooling: str,
    prompts: Mapping[str, str],
    mrl: Sequence[int],
    context: int,
) -> None:
    """An embedder's folder: weights of the bare transformer, pooling, unit length, prompts and Matryoshka dimensions."""
    _with_cache(model)
    model.save_pretrained(out, safe_serialization=True)
    save_tokenizer(tokenizer, out, context)
    names = ("Transformer", "Pooling", "Normalize")
    # the modules' names before sentence-transformers 6, which all of its versions read
    modules = [
        {
            "idx": i,
            "name": str(i),
            "path": f"{i}_{name}" if i else "",
            "type": f"sentence_transformers.models.{name}",
        }
        for i, name in enumerate(names)
    ]
    write_json(out / "modules.json", modules)
    write_json(out / "sentence_bert_config.json", {"max_seq_length": context, "do_lower_case": False})
    flags = {f"pooling_mode_{mode}": mode == POOLING[pooling] for mode in _MODES}
    width = int(model.config.hidden_size)
    write_json(
        out / "1_Pooling" / "config.json",
        {"word_embedding_dimension": width, **flags, "include_prompt": True},
    )
    (out / "2_Normalize").mkdir(exist_ok=True)
    write_json(out / "2_Normalize" / "config.json", {})
    write_json(
        out / EMBEDDER,
        {
            "prompts": {name: prompts.get(name, "") for name in sorted(PREFIXES | set(prompts))},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
            "matryoshka_dims": sorted({*mrl, width}, reverse=True),
        },
    )


def save_reranker(model: Any, tokenizer: Any, out: Path, *, context: int) -> None:
    """A reranker's folder: a sequence classifier with one label, whose logit is the score."""
    _with_cache(model)
    model.config.sentence_transformers = {"activation_fn": "torch.nn.modules.linear.Identity"}
    model.save_pretrained(out, safe_serialization=True)
    save_tokenizer(tokenizer, out, context)


def _with_cache(model: Any) -> None:
    """Training turns a decoder's cache off, and would write that into config.json; an encoder has none."""
    if model.config.model_type in ENCODERS:
        model.config.__dict__.pop("use_cache", None)
    else:
        model.config.use_cache = True
