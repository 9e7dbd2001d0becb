"""`corpus`: a source becomes clean documents, split once into train and held-out.

In: files, a hub dataset, the standard library, installed packages, or a generator (and what it starts from). Out:
`train.parquet`, `heldout.parquet`, `stats.json` with documents and bytes in, out and dropped by each
filter. Identity: the files' content, the recipe with every parameter, the split, the seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from famc.steps.base import Amount, Work
from famc.steps.installed_id import python_bytes


@dataclass(frozen=True, slots=True)
class Filter:
    """One filter: its parameters with defaults, whether a worker exists yet, and what it does."""

    defaults: Mapping[str, Any]
    ready: bool
    about: str


# The defaults are the named papers'; a recipe may write {name: value} or {name: {parameter: value}}.
FILTERS: dict[str, Filter] = {
    "normalize": Filter({"form": "NFC", "ftfy": True}, True, "Unicode NFC, mojibake repaired by ftfy"),
    "length": Filter({"min": 1, "max": 10_000_000}, True, "characters of a document"),
    "dedup": Filter(
        {"exact": True, "minhash": None}, True, "exact duplicates by hash; near duplicates by MinHash"
    ),
    "language": Filter(
        {"keep": [], "min": 0.65}, False, "language identification with confidence (CCNet, FineWeb)"
    ),
    "url_blocklist": Filter({"list": "default"}, False, "blocked domains and words in URLs (RefinedWeb)"),
    "extract": Filter({"by": "trafilatura"}, False, "text out of HTML"),
    "gopher_repetition": Filter({}, False, "repeated lines, paragraphs, n-grams (Gopher, table A1)"),
    "gopher_quality": Filter({}, False, "length, symbols, stop words (Gopher, A1.1)"),
    "c4": Filter({}, False, "line rules (C4)"),
    "fineweb": Filter({}, False, "line punctuation and duplication (FineWeb)"),
    "pii": Filter({"action": "redact"}, False, "personal data"),
    "toxicity": Filter({"max": 0.5}, False, "toxic text"),
    "tier": Filter(
        {"by": "edu_score", "high": 3, "mid": 2}, False, "quality tiers for weights by source.tier"
    ),
    "license": Filter({"allow": "permissive"}, False, "licence of code"),
    "code_heuristics": Filter({}, False, "line lengths, alphanumerics, generated files (StarCoder)"),
    # carried out where sources are mixed, as there all evaluations are known
    "decontaminate": Filter(
        {"against": "evals", "ngram": 13}, True, "drops training text that shares n-grams with evals"
    ),
}
_SHORT = {
    "extract": "by",
    "pii": "action",
    "license": "allow",
    "tier": "by",
}  # {extract: trafilatura} = {extract: {by: …}}

# Built-in recipes need nothing but installed packages. The corpus line will deepen web and code.
_BUILT_IN = (
    "normalize",
    {"length": {"min": 20}},
    {"dedup": {"exact": True}},
    {"decontaminate": {"ngram": 13}},
)
RECIPES: dict[str, tuple[Any, ...]] = {
    "none": ({"decontaminate": {"ngram": 13}},),
    "text": _BUILT_IN,
    "web": _BUILT_IN,
    "code": _BUILT_IN,
}


def recipe(steps: tuple[Any, ...]) -> tuple[list[list[Any]], list[tuple[int, str, str]]]:
    """A recipe as written -> [[filter, parameters], …] with all defaults, and (index, what, word) for each
    mistake.
    """
    filters: list[list[Any]] = []
    wrong: list[tuple[int, str, str]] = []
    for index, step in enumerate(steps):
        given: Mapping[str, Any]
        if isinstance(step, str):
            name, given = step, {}
        elif isinstance(step, dict) and len(step) == 1:
            name, value = next(iter(step.items()))
            given = value if isinstance(value, dict) else {_SHORT.get(name, "value"): value}
        else:
            wrong.append((index, "a filter is a name, or {name: parameters}", ""))
            continue
        if name not in FILTERS:
            wrong.append((index, f"unknown filter '{name}'", name))
            continue
        known = FILTERS[name].defaults
        for key in given:
            if key not in known:
                wrong.append((index, f"unknown key '{key}' in filter '{name}'", key))
            elif expected := _unlike(known[key], given[key]):
                wrong.append((index, f"'{key}' of filter '{name}': expected {expected}", ""))
        filters.append([name, {**known, **given}])
    return filters, wrong


def _unlike(default: Any, value: Any) -> str:
    """What a parameter should have been, judged by its default; nothing if it is that."""
    if isinstance(default, bool):
        return "" if isinstance(value, bool) else "true or false"
    number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 10**12
    if isinstance(default, int):
        least = 1 if default > 0 else 0
        return (
            ""
            if number and isinstance(value, int) and value >= least
            else f"a whole number, at least {least}"
        )
    if isinstance(default, float):
        return "" if number else "a number, at least 0"
    if isinstance(default, str):
        return "" if isinstance(value, str) else "text"
    if isinstance(default, list | tuple):
        return (
            ""
            if isinstance(value, list | tuple) and all(isinstance(v, str) for v in value)
            else "a list of text"
        )
    if value is None or (isinstance(value, dict) and all(not _unlike(1, v) for v in value.values())):
        return ""
    return "a mapping of whole numbers"  # dedup.minhash


# Characters and examples of a CPython 3.11; `famc plan` calls them assumed until the step has run.
_PYSTDLIB = {
    "source": (7.7e6, 424),
    "docs": (1.8e6, 396),
    "questions": (0.73e6, 5650),
    "preferences": (0.8e6, 4250),
    "sentences": (0.94e6, 2200),
    "names": (1.19e6, 4240),
    "summaries": (0.92e6, 2100),
}
# Of torch, transformers, scipy, scikit-learn, pandas, numpy, networkx and sympy: pairs a kB of Python source
# (0.2 to 0.8) and characters a pair; of a package that is not installed, its source.
_PAIRS_A_BYTE, _CHARACTERS_A_PAIR, _PACKAGE_BYTES = 0.44e-3, 820.0, 10e6
_CHARACTERS_A_TOKEN = 3.5
_TEMPLATE_TOKENS = 10  # of a question and its answer in ChatML: two marks, a role and two line breaks each
_HUB = {
    "text": 1e9,
    "messages": 1e5,
    "preference": 5e4,
    "prompts": 2e4,
    "pairs": 1e6,
    "image_text": 1e6,
    "audio_text": 5e5,
}


def amount(params: Mapping[str, Any]) -> Amount:
    """How much a source will give: from file sizes, from `n`, or assumed."""
    tokens_each = {"text": 800.0, "messages": 600.0, "preference": 800.0, "prompts": 200.0}.get(
        params["format"], 256.0
    )
    share = 1.0 - params["heldout"]["fraction"]
    if params["origin"] == "installed":
        sizes = [python_bytes(package) for package in params["installed"]]
        there = sum(size or _PACKAGE_BYTES for size in sizes) * _PAIRS_A_BYTE
        pairs = min(there, params.get("n") or there) * share
        tokens = pairs * _CHARACTERS_A_PAIR / _CHARACTERS_A_TOKEN
        return Amount(tokens, pairs, "modelled" if all(sizes) else "assumed")
    if params.get("n"):
        return Amount(params["n"] * tokens_each * share, params["n"] * share, "modelled")
    if params["origin"] == "pystdlib":
        characters, examples = _PYSTDLIB[params["pystdlib"]]
        tokens = characters / _CHARACTERS_A_TOKEN
        if params["format"] == "messages":
            tokens += examples * _TEMPLATE_TOKENS
        return Amount(tokens * share, examples * share, "assumed")
    if params.get("bytes"):
        tokens = params["bytes"] / _CHARACTERS_A_TOKEN
        return Amount(tokens * share, tokens / tokens_each * share, "modelled")
    usual = _HUB[params["format"]]
    return Amount(usual * tokens_each * share, usual * share, "assumed")


def held_out(params: Mapping[str, Any]) -> Amount:
    """How much of a source is kept from training, and read by evaluations."""
    trained, fraction = amount(params), params["heldout"]["fraction"]
    share = fraction / (1.0 - fraction)
    return Amount(trained.tokens * share, trained.examples * share, trained.basis)


def work(params: Mapping[str, Any]) -> Work:
    """Some 1 MB a CPU-second through the filters."""
    size = amount(params).tokens * _CHARACTERS_A_TOKEN
    return Work("cpu", cpu_seconds=2.0 + size / 2e6)
