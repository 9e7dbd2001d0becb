"""Published models by name, and models given as a row of dimensions.

In: a name of `data/models.csv`, or a row with its columns (a table of measurements has them too). Out: an Anatomy. What
such columns leave out (biases, extra norms, windows) follows from the family. Bears no identity.
"""

from __future__ import annotations

import csv
import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from importlib import resources
from typing import Any

from famc.cost.anatomy import Anatomy
from famc.cost.columns import need, whole
from famc.cost.hf.text import Latent, Mixture, Text, decoder

_NORM = {"rms": 1, "ln_nobias": 1, "ln": 2, "none": 0}
_GPT: dict[str, Any] = {"bias": "all"}
_PHI: dict[str, Any] = {"bias": "all", "norms": 1, "parallel": True, "head_bias": True}
MANNERS: dict[str, dict[str, Any]] = {
    "apertus": {"qk_norm": "head", "extra": 2},
    "bloom": {"bias": "all", "embed_norm": True, "rope": False},
    "bloomberggpt": {"bias": "all", "embed_norm": True, "rope": False},
    "cerebrasgpt": _GPT,
    "codegemma": {},
    "codellama": {},
    "dclm": {"qk_norm": "all"},
    "deepseek": {},
    "deepseekv3": {"correction": True},
    "falcon": {"parallel": True},
    "falcon3": {},
    "gemma": {},
    "gemma2b": {},  # the first Gemma's 2B
    "gemma2": {"norms": 4, "window": 4096, "every": 2},
    "gemma3": {"norms": 4, "qk_norm": "head", "window": 1024, "every": 6},
    "glm": {},
    "gpt2": _GPT,
    "gpt3": _GPT,
    "gptj": {"bias": "mlp", "norms": 1, "parallel": True, "head_bias": True},
    "gptmegatron": _GPT,
    "gptneox": {"bias": "all", "parallel": True},
    "gptoss": {"bias": "all", "sinks": True, "window": 128, "every": 2},
    "granite": {},
    "kimi": {"correction": True},
    "llama": {},
    "mistral": {},
    "mistral7b": {"window": 4096},
    "mistral7bv02": {},
    "mistral7bv03": {},
    "mixtral": {},
    "mpt": {"bias": "all", "norm": 2},
    "mtnlg": _GPT,
    "nanochat": {},
    "nemotron": {},
    "olmo": {},
    "olmo2": {"qk_norm": "all"},
    "olmo3": {"qk_norm": "all", "window": 4096, "every": 4},
    "olmoe": {"qk_norm": "all"},
    "opt": _GPT,
    "palm": {"norms": 1, "parallel": True},
    "phi1": _PHI,
    "phi2": _PHI,
    "phi3": {},
    "phi4": {},
    "pythia": {"bias": "all", "parallel": True},
    "qwen": {"bias": "qkv"},
    "qwen3": {"qk_norm": "head"},
    "stablelm": {},
    "stablelmalpha": {"bias": "all", "parallel": True},
    "stablelmbasealpha": {"bias": "all", "parallel": True},
    "starcoder": _GPT,
}
"""What the columns don't say, by the beginning of a model's or family's name in small letters and digits; the longest fits.
`bias`: of all linear layers, of the feed-forward's (`mlp`), of queries, keys and values (`qkv`) or of none. `norm`: weights a channel whatever
the column says (llm-foundry's MPT has biases: only with them its published counts come out). `window`, `every`: each `every`th layer sees all tokens, the others `window`. `correction`: a number an expert that balances their load, no
gradient trains it, and published counts hold it (DeepSeek-V3, arXiv:2412.19437, section 2.1.2)."""


@dataclass(frozen=True, slots=True)
class Published:
    """A row of `data/models.csv`: the model's name there, its published number of parameters, None where there is none,
    and whether that is a count (a rounded figure else); where it and the dimensions were read, and what is not certain."""

    model: str
    parameters: int | None
    exact: bool
    source: str
    config_source: str
    from_memory: str
    note: str


def known(config_key: str) -> Anatomy:
    """The anatomy of a model by its key in `data/models.csv`. ValueError, naming the nearest, where there is no such key."""
    rows = _rows()
    if config_key not in rows:
        near = difflib.get_close_matches(config_key, rows, n=3, cutoff=0.5)
        hint = f"; near: {', '.join(near)}" if near else ""
        raise ValueError(f"no published model {config_key!r} among famc's {len(rows)}{hint}")
    return _known(config_key)


@cache
def published() -> dict[str, Published]:
    """What the table says of each key."""
    return {
        key: Published(
            row["model"],
            int(row["params_published"]) if row["params_published"] else None,
            row["exact"] == "yes",
            row["published_source"],
            row["config_source"],
            row["from_memory"],
            row["note"],
        )
        for key, row in _rows().items()
    }


COLUMNS = (
    "config_key", "model", "family", "attn", "layers", "hidden", "ffn", "mlp_type", "heads", "kv_heads", "head_dim", "vocab",
    "tied_embeddings", "learned_pos", "norm", "bias", "n_experts", "top_k", "n_shared_experts", "moe_ffn", "n_dense_layers",
    "dense_ffn", "mla_q_lora", "mla_kv_lora", "mla_nope", "mla_rope", "mla_v",
)  # fmt: skip
"""Those that say what a model is made of."""


def of_row(row: Mapping[str, str]) -> Anatomy:
    """The anatomy of a decoder given by columns: layers, hidden, ffn, mlp_type (glu, mlp), heads, kv_heads, head_dim, vocab,
    tied_embeddings (yes, no), learned_pos (rows), norm (rms, ln, ln_nobias, none), n_experts, top_k, n_shared_experts,
    moe_ffn, n_dense_layers, dense_ffn, attn (mla) with mla_*; `bias` (all, qkv) where there is such a column. Empty: none, as
    many key/value heads as heads, hidden / heads a head. `model` and `family` say the rest: `MANNERS`.

    ValueError that names the column for a missing dimension, a word that is none of these, a number below 1.
    """
    return _of_values(tuple((row.get(name) or "").strip() for name in COLUMNS))


@lru_cache(maxsize=4096)
def _of_values(values: tuple[str, ...]) -> Anatomy:
    row = dict(zip(COLUMNS, values, strict=True))
    found = _manner(row)
    manner = found or {}
    hidden, layers, heads = need(row, "hidden"), need(row, "layers"), need(row, "heads")
    bias, kv_heads = _bias(row, found), _maybe(row, "kv_heads") or heads
    moe, dense = _mixture(row, manner), frozenset(range(_maybe(row, "n_dense_layers") or 0))
    norm = manner.get("norm", _NORM[_word(row, "norm", tuple(_NORM), "rms")])
    norms = manner.get("norms", 2)
    if "falcon" in _plain(row, "family") and kv_heads == 1:
        norms = 1  # 7B has one norm before both halves, 40B and 180B one before each
    window, every = manner.get("window"), manner.get("every", 0)
    windows = (
        tuple(None if every and (i + 1) % every == 0 else window for i in range(layers)) if window else ()
    )
    extra = manner.get("extra", 0) + (heads if manner.get("sinks") else 0)
    positions = _maybe(row, "learned_pos") or 0
    text = Text(
        row["model"] or row["config_key"] or "row",
        vocab=need(row, "vocab"),
        layers=layers,
        hidden=hidden,
        ffn=_maybe(row, "dense_ffn") or _maybe(row, "ffn") or need(row, "moe_ffn"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=_maybe(row, "head_dim") or hidden // heads,
        tie=_word(row, "tied_embeddings", ("yes", "no"), "no") == "yes",
        gated=_word(row, "mlp_type", ("glu", "mlp"), "glu") == "glu",
        norm=norm,
        norms=norms,
        embed_norm=manner.get("embed_norm", False),
        qk_norm=manner.get("qk_norm", ""),
        qkv_bias=bias in ("all", "qkv"),
        o_bias=bias == "all",
        mlp_bias=bias in ("all", "mlp"),
        head_bias=manner.get("head_bias", False),
        rope=manner.get("rope", not positions),
        parallel=manner.get("parallel", False),
        extra=extra,
        positions=positions,
        windows=windows,
        moe=moe,
        dense=dense if moe else frozenset(),
        mla=_latent(row),
    )
    made = decoder(text)
    if not manner.get("correction") or moe is None:
        return made
    numbers = moe.experts * (layers - len(dense))
    (part, total), *_ = made.parts
    return replace(made, vectors=made.vectors + numbers, parts=((part, total + numbers),))


# --- columns ------------------------------------------------------------------------------------------------


@cache
def _rows() -> dict[str, dict[str, str]]:
    path = resources.files("famc.cost") / "data" / "models.csv"
    return {row["config_key"]: row for row in csv.DictReader(path.read_text(encoding="utf-8").splitlines())}


@lru_cache(maxsize=1024)
def _known(config_key: str) -> Anatomy:
    """Called as who asked for it did."""
    return replace(of_row(_rows()[config_key]), name=config_key)


def _plain(row: Mapping[str, str], column: str) -> str:
    return re.sub(r"[^a-z0-9]", "", (row.get(column) or "").lower())


def _manner(row: Mapping[str, str]) -> dict[str, Any] | None:
    """By the model's name, or by the family's; None where neither is known."""
    for name in (_plain(row, "model"), _plain(row, "family")):
        fits = [key for key in MANNERS if name.startswith(key)]
        if fits:
            return MANNERS[max(fits, key=len)]
    return None


def _bias(row: Mapping[str, str], manner: Mapping[str, Any] | None) -> str:
    """Which linear layers have biases: as the column says; else as the family has it; of an unknown family those of GPT-2's
    make (LayerNorm with bias, no gate) have them all."""
    default = "all" if row.get("norm") == "ln" and row.get("mlp_type") == "mlp" else "none"
    if manner is not None:
        default = str(manner.get("bias", "none"))
    return _word(row, "bias", ("all", "qkv", "mlp", "none"), default)


def _mixture(row: Mapping[str, str], manner: Mapping[str, Any]) -> Mixture | None:
    experts = _maybe(row, "n_experts")
    if experts is None:
        return None
    ffn = _maybe(row, "moe_ffn") or need(row, "ffn")
    shared = (_maybe(row, "n_shared_experts") or 0) * ffn
    return Mixture(experts, need(row, "top_k"), ffn, shared, bias=manner.get("bias") == "all")


def _latent(row: Mapping[str, str]) -> Latent | None:
    if _word(row, "attn", ("mla", "mha", "gqa", "mqa"), "mha") != "mla":
        return None
    return Latent(
        _maybe(row, "mla_q_lora"),
        need(row, "mla_kv_lora"),
        need(row, "mla_nope"),
        need(row, "mla_rope"),
        need(row, "mla_v"),
    )


def _word(row: Mapping[str, str], column: str, words: tuple[str, ...], default: str) -> str:
    value = (row.get(column) or default).strip().lower()
    if value not in words:
        raise ValueError(f"{column} is {row.get(column)!r}: it must be {', '.join(words)} or empty")
    return value


def _maybe(row: Mapping[str, str], column: str) -> int | None:
    """A whole number of at least 1; None where the column is empty, absent or 0."""
    return whole(row, column, least=0) or None
