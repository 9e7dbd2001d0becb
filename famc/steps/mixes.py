"""`mix`: sources by weight, to an exact number of tokens; documents of evaluations are taken out. And what a
source is.

In: clean sources, the tokenizer for text. Out, text: `tokens.npy` (one flat stream, documents ended by
<|endoftext|>); messages, preferences and pairs: `examples.parquet`. Both with `stats.json`. Identity: weights,
tokens, epochs cap, seed, what is decontaminated against and how.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from famc.spec.family import Family, Mix, Source
from famc.spec.load import Spec
from famc.steps.base import Amount
from famc.steps.corpus import FILTERS, RECIPES, recipe
from famc.steps.files import Files
from famc.steps.installed_id import absent, canonical, license_of, version
from famc.steps.pystdlib_id import fingerprint

# Generators. None has a worker yet: they are planned, and refused by `famc build` before anything starts.
# Generator -> format.
SYNTH = {"arithmetic": "prompts", "retrieval_pairs": "pairs", "shapes_vqa": "image_text"}
PYSTDLIB_FORMATS = {
    "source": "text",
    "docs": "text",
    "questions": "messages",
    "preferences": "preference",
    "sentences": "pairs",
    "names": "pairs",
    "summaries": "messages",
}


@dataclass(frozen=True, slots=True)
class Wanted:
    """Sources whose held-out part some evaluation reads."""

    eval_sources: tuple[str, ...]


def format_of(source: Source) -> str:
    """What one record of a source holds."""
    if source.pystdlib:
        return PYSTDLIB_FORMATS[source.pystdlib]
    if source.installed:
        return "pairs"
    return SYNTH.get(source.synth, source.format) if source.synth else source.format


def recipe_of(family: Family, name: str) -> tuple[Any, ...]:
    """A cleaning recipe as written: the family's own, or a built-in one."""
    return family.data.clean[name] if name in family.data.clean else RECIPES[name]


def source_params(
    spec: Spec, name: str, source: Source, files: Files
) -> tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]:
    """(parameters, runtime values, what is missing here) of a source's corpus step."""
    filters, _ = recipe(recipe_of(spec.family, source.clean))
    missing = [
        f"filter '{filter_name}' can be planned, but this version of famc has no worker for it"
        for filter_name, _ in filters
        if not FILTERS[filter_name].ready
    ]
    params: dict[str, Any] = {
        "format": format_of(source),
        "filters": [f for f in filters if f[0] != "decontaminate"],
        "heldout": source.heldout.model_dump(),
        "n": source.n,
        "seed": spec.family.family.seed,
    }
    runtime: dict[str, Any] = {}
    for filter_name, values in filters:
        if filter_name == "dedup" and values.get("minhash"):
            missing.append(
                "near-duplicate removal (dedup.minhash) can be planned, but this version of famc has no worker for it"
            )
    if source.path:
        where = spec.folder / source.path
        listing = files.listing(where)
        params |= {"origin": "path", "files": listing.digest, "bytes": listing.bytes or None}
        params |= {"text_field": source.text_field, "group_field": source.group_field}
        runtime["path"] = str(where.resolve()) if not _has_magic(source.path) else str(where.absolute())
        if not listing.count:
            missing.append(f"{source.path} is not on this machine")
    elif source.hf:
        params |= {"origin": "hf", "hf": source.hf, "revision": source.revision, "split": source.split}
        params |= {"text_field": source.text_field, "group_field": source.group_field}
    elif source.pystdlib:
        params |= {
            "origin": "pystdlib",
            "pystdlib": source.pystdlib,
            "interpreter": fingerprint(),
            "license": "PSF-2.0",
        }
    elif source.installed:
        packages = sorted(map(canonical, source.installed))
        params |= {
            "origin": "installed",
            "installed": {package: version(package) for package in packages},
            "interpreter": f"{sys.version_info.major}.{sys.version_info.minor}",  # whose syntax can be read
            "license": license_of(packages),
        }
        missing += filter(None, map(absent, packages))
    else:
        params |= {"origin": "synth", "synth": source.synth, "keep": source.keep}
        missing.append(
            f"generator '{source.synth}' can be planned, but this version of famc has no worker for it"
        )
    if source.rate:
        params["rate"] = source.rate
    return params, runtime, tuple(missing)


def _has_magic(path: str) -> bool:
    return any(c in path for c in "*?[")


def mix_params(spec: Spec, mix: Mix, fmt: str, wanted: Wanted) -> tuple[dict[str, Any], tuple[str, ...]]:
    """(parameters, what is missing here) of a mix step."""
    ngrams = []
    for source in dict.fromkeys(key.partition(".")[0] for key in mix.weights):
        filters, _ = recipe(recipe_of(spec.family, spec.family.data.sources[source].clean))
        ngrams += [int(values["ngram"]) for name, values in filters if name == "decontaminate"]
    decontaminate = (
        {"ngram": min(ngrams), "against": sorted(wanted.eval_sources)}
        if ngrams and wanted.eval_sources
        else None
    )
    missing = []
    if mix.lengths:
        missing.append(
            "mixing by length (lengths) can be planned, but this version of famc has no worker for it"
        )
    if fmt not in ("text", "messages", "preference", "pairs"):
        missing.append(
            f"data of format '{fmt}' can be planned, but this version of famc has no worker for it"
        )
    params = {
        "format": fmt,
        "weights": dict(mix.weights),
        "tokens": mix.tokens,
        "max_epochs": mix.max_epochs,
        "lengths": mix.lengths,
        "decontaminate": decontaminate,
        "seed": spec.family.family.seed,
    }
    return params, tuple(missing)


def mix_amount(family: Family, mix: Mix, fmt: str, amount_of: Callable[[str], Amount]) -> Amount:
    """Tokens and examples of a mix: what the spec says; else of one source all; of several as many as their weights give
    where every example is read at least once, or as near to that as `max_epochs` allows (famc.work.mix.proportional)."""
    weights = {name: w for name, w in weights_by_source(mix.weights).items() if w > 0}
    amounts = {name: amount_of(name) for name in weights}
    tokens = sum(a.tokens for a in amounts.values())
    examples = sum(a.examples for a in amounts.values())
    if mix.tokens:
        share = mix.tokens / tokens if tokens else 1.0
        return Amount(float(mix.tokens), examples * share, "modelled")
    basis: Any = "assumed" if any(a.basis == "assumed" for a in amounts.values()) else "modelled"
    if fmt == "text" or len(amounts) == 1 or not examples:
        return Amount(tokens, examples, basis)
    whole = max(a.examples / weights[name] for name, a in amounts.items())
    most = min(mix.max_epochs * a.examples / weights[name] for name, a in amounts.items())
    drawn = {name: min(whole, most) * weights[name] for name in amounts}
    return Amount(
        sum(drawn[name] * a.tokens / a.examples for name, a in amounts.items() if a.examples),
        sum(drawn.values()),
        basis,
        sum(min(drawn[name], a.examples) for name, a in amounts.items()),
    )


def weights_by_source(weights: Mapping[str, float]) -> dict[str, float]:
    """`{web.high: 3, web.mid: 1}` -> `{web: 4}`."""
    result: dict[str, float] = {}
    for key, weight in weights.items():
        source = key.partition(".")[0]
        result[source] = result.get(source, 0.0) + weight
    return result
