"""Amounts as people write them: `30T` tokens, `20GB`, `16k`, `14d`. In: text or number. Out: a number. Bad text:
ValueError.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema

# tokens, examples and parameters count in powers of 1,000 …
_COUNT = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
# … and so do bytes, as disks and prices do; KiB, MiB, GiB are the powers of 1,024
_BYTES = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
}
_SECONDS = {
    "s": 1.0, "sec": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 7 * 86400.0,
}  # fmt: skip
_AMOUNT = re.compile(r"\s*(-?[0-9]+(?:\.[0-9]+)?(?:[eE][0-9]{1,3})?)\s*([a-zA-Z]*)\s*")
_MOST = 10**18


def _parse(value: Any, units: dict[str, int], example: str) -> int:
    match = _AMOUNT.fullmatch(value) if isinstance(value, str) else None
    if isinstance(value, bool) or not (match or isinstance(value, int | float)) or value != value:
        raise ValueError(f"expected an amount such as {example}, not {_short(value)}")
    unit = match[2].lower() if match else ""
    if unit and unit not in units:
        written, known = match[2] if match else unit, ", ".join(u for u in units if u)
        raise ValueError(f"unknown unit '{written}' in {_short(value)}: use {known}")
    amount = Decimal(match[1] if match else str(value)) * units.get(unit, 1)
    if amount < 0:
        raise ValueError(f"must be at least 0, not {_short(value)}")
    if amount > _MOST:
        raise ValueError(f"must be at most 10**18, not {_short(value)}")
    if amount != int(amount):
        raise ValueError(f"{_short(value)} is not a whole number")
    return int(amount)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def count(value: Any) -> int:
    """`30T`, `150M`, `16k`, 4096 -> int, in powers of 1,000."""
    return _parse(value, _COUNT, "3M")


def size_in_bytes(value: Any) -> int:
    """`20GB`, `4GiB`, 4096 -> bytes."""
    return _parse(value, _BYTES, "20GB")


def duration(text: str) -> float:
    """`14d`, `36h`, `90min`, `2w`, `30s` -> seconds, above 0. ValueError for what is none: a bare number has no unit."""
    match = _AMOUNT.fullmatch(text)
    scale = _SECONDS.get(match[2].lower()) if match else None
    seconds = float(match[1]) * scale if match and scale else 0.0
    if not 0 < seconds < _MOST:
        raise ValueError(f"expected a time such as 14d, 36h, 90min or 30s, not {_short(text)}")
    return seconds


def show_count(amount: float) -> str:
    """1234567 -> `1.23M`."""
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(amount) >= scale:
            return f"{amount / scale:.3g}{unit}"
    return f"{amount:.3g}"


def show_bytes(amount: float) -> str:
    """1234567 -> `1.23 MB`."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(amount) >= scale:
            return f"{amount / scale:.3g} {unit}"
    return f"{amount:.0f} B"


def show_seconds(seconds: float) -> str:
    """75 -> `1m 15s`."""
    if seconds < 0.95:
        return f"{seconds:.1f}s"
    if round(seconds) < 60:
        return f"{seconds:.0f}s"
    if round(seconds) < 3600:
        return "{}m {:02}s".format(*divmod(round(seconds), 60))
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f}h"
    return f"{seconds / 86400:.1f}d"


_AMOUNT_SCHEMA = {
    "anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": r"^\d+(\.\d+)?\s*[a-zA-Z]*$"}]
}
Count = Annotated[int, BeforeValidator(count), WithJsonSchema(_AMOUNT_SCHEMA)]
Bytes = Annotated[int, BeforeValidator(size_in_bytes), WithJsonSchema(_AMOUNT_SCHEMA)]
