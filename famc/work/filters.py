"""Cleaning: each filter of a recipe takes a body and gives it back changed, or None to drop it.

A filter is a function of the text alone, so that equal documents always meet equal ends; `corpus` removes
duplicates, because which copy stays depends on the split.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping
from typing import Any, Literal

import ftfy

from famc.errors import StepFailed
from famc.work.text import Body, contents, mapped

Form = Literal["NFC", "NFD", "NFKC", "NFKD"]
Filter = Callable[[Body], Body | None]

# Only damaged encodings are repaired. ftfy's other defaults would straighten quotes, narrow full-width CJK
# punctuation, split ligatures and decode HTML entities: changes of meaning in code, Chinese and Japanese.
_MOJIBAKE = ftfy.TextFixerConfig(
    unescape_html=False,
    remove_terminal_escapes=False,
    fix_latin_ligatures=False,
    fix_character_width=False,
    uncurl_quotes=False,
    fix_line_breaks=False,
    fix_surrogates=False,
    remove_control_chars=False,
    normalization=None,
)


def normalize(values: Mapping[str, Any]) -> Filter:
    """Unicode in one form; mojibake repaired."""
    form: Form = values["form"]
    if form not in ("NFC", "NFD", "NFKC", "NFKD"):
        raise StepFailed(f"filter normalize: unknown form '{form}'", "NFC, NFD, NFKC or NFKD")
    repair = bool(values["ftfy"])

    def change(text: str) -> str:
        if text.isascii():
            return text
        return unicodedata.normalize(form, ftfy.fix_text(text, _MOJIBAKE) if repair else text)

    return lambda body: mapped(body, change)


def length(values: Mapping[str, Any]) -> Filter:
    """Characters of all texts of a record, from min to max."""
    low, high = values["min"], values["max"]
    return lambda body: body if low <= sum(map(len, contents(body))) <= high else None


FILTERS: dict[str, Callable[[Mapping[str, Any]], Filter]] = {"normalize": normalize, "length": length}
