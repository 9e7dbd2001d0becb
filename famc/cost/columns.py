"""Columns of a table of models or setups, as numbers.

In: a row, column names to text. Out: numbers, None where a column is empty or absent. Every error names its column.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

Row = Mapping[str, str]


def number(row: Row, name: str) -> float | None:
    """A column's number, None where it is empty. ValueError, with the column, where it is none."""
    text = (row.get(name) or "").strip()
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{name} is {text!r}: it must be a number")
    return value


def whole(row: Row, name: str, *, least: int = 1) -> int | None:
    """A column's whole number of at least `least`, None where it is empty. ValueError, with the column, where it is none."""
    value = number(row, name)
    if value is None:
        return None
    if value != int(value) or value < least:
        raise ValueError(f"{name} is {row[name]!r}: it must be a positive whole number")
    return int(value)


def need(row: Row, name: str) -> int:
    """The same of a column that must not be empty."""
    value = whole(row, name)
    if value is None:
        raise ValueError(f"{name} is missing")
    return value
