"""Amounts as people write them: `30T` tokens, `20GB`, `16k`. In: text or number. Out: int. Bad text: ValueError."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema

# tokens, examples and parameters count in powers of 1,000 …
_COUNT = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
# … and so do bytes, as disks and prices do; KiB, MiB, GiB are the powers of 1,024
_BYTES = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*([a-zA-Z]*)\s*")


def _parse(value: Any, units: dict[str, int], example: str) -> int:
    if isinstance(value, bool):
        raise ValueError(f"expected an amount such as {example}, not {value}")
    if isinstance(value, int | float):
        if value != value or value in (float("inf"), float("-inf")):
            raise ValueError(f"expected an amount such as {example}, not {value}")
        number, unit = float(value), ""
        if float(value).is_integer():
            return _bounded(int(value))
    elif isinstance(value, str) and (match := _AMOUNT.fullmatch(value)):
        number, unit = float(match[1]), match[2].lower()
    else:
        raise ValueError(f"expected an amount such as {example}, not {value!r}")
    if unit and unit not in units:
        raise ValueError(f"unknown unit {unit!r} in {value!r}: use one of {', '.join(u for u in units if u)}")
    if not number < 1e30:
        raise ValueError(f"{value!r} is beyond any model's reach")
    amount = number * units.get(unit, 1)
    if amount != int(amount):
        raise ValueError(f"{value!r} is not a whole number")
    return _bounded(int(amount))


def _bounded(amount: int) -> int:
    if not 0 <= amount <= 10**18:
        raise ValueError(f"{amount} is out of range: 0 to 10**18")
    return amount


def count(value: Any) -> int:
    """`30T`, `150M`, `16k`, 4096 -> int, in powers of 1,000."""
    return _parse(value, _COUNT, "3M")


def size_in_bytes(value: Any) -> int:
    """`20GB`, `4GiB`, 4096 -> bytes."""
    return _parse(value, _BYTES, "20GB")


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


_AMOUNT_SCHEMA = {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": r"^\d+(\.\d+)?\s*[a-zA-Z]*$"}]}
Count = Annotated[int, BeforeValidator(count), WithJsonSchema(_AMOUNT_SCHEMA)]
Bytes = Annotated[int, BeforeValidator(size_in_bytes), WithJsonSchema(_AMOUNT_SCHEMA)]
