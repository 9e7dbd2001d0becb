"""Reading a config.json: values with transformers' defaults, checked.

In: the mapping. Out: numbers, flags, or a ValueError that names the key. Bears no identity.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

_Names = dict[str, tuple[str, ...]]
_GPT2: _Names = {
    "n_embd": ("hidden_size",),
    "n_layer": ("num_hidden_layers",),
    "n_head": ("num_attention_heads",),
    "n_positions": ("max_position_embeddings",),
}
_QWEN_VISION: _Names = {"num_heads": ("num_attention_heads",), "depth": ("num_hidden_layers",)}
_EXPERTS: _Names = {"num_experts": ("num_local_experts",)}
_LOCAL_EXPERTS: _Names = {"num_local_experts": ("num_experts",)}
ALIASES: dict[str, _Names] = {
    "bloom": {
        "hidden_size": ("n_embed",),
        "n_layer": ("num_hidden_layers",),
        "n_head": ("num_attention_heads",),
    },
    "deepseek_v2": {"n_routed_experts": ("num_experts",)},
    "deepseek_v3": {"n_routed_experts": ("num_local_experts",)},
    "falcon": {"hidden_size": ("n_embed",)},
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "gpt_oss": _LOCAL_EXPERTS,
    "gptj": _GPT2,
    "mixtral": _LOCAL_EXPERTS,
    "mpt": {
        "d_model": ("hidden_size",),
        "n_layers": ("num_hidden_layers",),
        "n_heads": ("num_attention_heads",),
    },
    "qwen2_5_vl_vision": _QWEN_VISION,
    "qwen2_vl_vision": _QWEN_VISION,
    "qwen3_moe": _EXPERTS,
    "qwen3_vl_moe_text": _EXPERTS,
    "qwen3_vl_moe_vision": _QWEN_VISION,
    "qwen3_vl_vision": _QWEN_VISION,
    "t5": {
        "d_model": ("hidden_size",),
        "num_layers": ("num_hidden_layers",),
        "num_heads": ("num_attention_heads",),
        "d_kv": ("head_dim",),
    },
}
"""Other names of a key, by model type (transformers' `attribute_map`, and the names of older files)."""
_EVERYWHERE: dict[str, Any] = {
    "head_dim": None,
    "tie_word_embeddings": False,
    "global_attn_every_n_layers": 3,  # ModernBERT
    "sliding_window_pattern": 6,  # Gemma 3
}
"""Defaults of keys that classes take without declaring them."""


@cache
def defaults() -> dict[str, dict[str, Any]]:
    """By model type, what transformers' config class (5.23) has for each key that famc reads. One file, read once."""
    path = resources.files("famc.cost") / "data" / "hf_defaults.json"
    found: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["defaults"]
    return found


@dataclass(frozen=True, slots=True)
class Config:
    """A config.json, or a part of one (`text_config`), of the model type `kind`. A key that is left out has the default
    that transformers' class has; `null` is kept."""

    kind: str
    values: Mapping[str, Any]

    def get(self, key: str) -> Any:
        """The value, the value under another name of the key, or the default."""
        for name in (key, *ALIASES.get(self.kind, {}).get(key, ())):
            if name in self.values:
                return self.values[name]
        own = defaults()[self.kind]
        return own[key] if key in own else _EVERYWHERE[key]

    def number(self, key: str, least: int = 1) -> int:
        """A whole number of at least `least`."""
        value = self.get(key)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or value != int(value)
            or value < least
        ):
            raise ValueError(
                f"{self.kind}: {key} is {value!r}: it must be a whole number of at least {least}"
            )
        return int(value)

    def maybe(self, key: str) -> int | None:
        """As `number`, or None where the config says null."""
        return None if self.get(key) is None else self.number(key)

    def side(self, key: str) -> tuple[int, int]:
        """Height and width: one number, or a list of two."""
        value = self.get(key)
        if isinstance(value, list | tuple) and len(value) == 2:
            return tuple(Config(self.kind, {key: v}).number(key) for v in value)  # type: ignore[return-value]
        return self.number(key), self.number(key)

    def flag(self, key: str) -> bool:
        value = self.get(key)
        if value is None or isinstance(value, bool):
            return bool(value)
        raise ValueError(f"{self.kind}: {key} is {value!r}: it must be true or false")

    def names(self, key: str) -> list[Any] | None:
        """A list, or None."""
        value = self.get(key)
        if value is None or isinstance(value, list | tuple):
            return None if value is None else list(value)
        raise ValueError(f"{self.kind}: {key} is {value!r}: it must be a list")

    def sub(self, key: str) -> Mapping[str, Any]:
        """A config within the config; empty where there is none."""
        value = self.values.get(key)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise ValueError(f"{self.kind}: {key} is {value!r}: it must be a mapping")
        return value

    @property
    def labels(self) -> int:
        """Classes of a classifier: `id2label`'s, `num_labels`, or 2."""
        if isinstance(named := self.values.get("id2label"), Mapping):
            return len(named)
        value = self.values.get("num_labels")
        return 2 if value is None else Config(self.kind, {"num_labels": value}).number("num_labels")


def windows(config: Config, layers: int, sliding: int | None, types: list[str]) -> tuple[int | None, ...]:
    """The window of each layer by its type; empty where no layer has one. ValueError for a type that is neither full
    nor sliding attention, and for more or fewer types than layers."""
    known: dict[str, int | None] = {"full_attention": None, "sliding_attention": sliding}
    if len(types) != layers:
        raise ValueError(f"{config.kind}: layer_types names {len(types)} of {layers} layers")
    if unknown := sorted({str(t) for t in types if t not in known}):
        raise ValueError(
            f"{config.kind}: layer_types has {', '.join(unknown)}: famc counts {', '.join(known)}"
        )
    found = tuple(known[t] for t in types)
    return found if any(w is not None for w in found) else ()
