"""Kinds that can be planned but not yet run: their parameters, so that specs load, resolve and are priced.

`famc build` refuses them before anything starts. Each moves to a file of its own when its worker comes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from famc.spec.family import Strict
from famc.steps.base import COMMON, Default, Training, batch_rows, constant, finetune_lr

_FINETUNE: dict[str, Default] = {
    **COMMON,
    "lr.peak": finetune_lr(2e-5, 5e-6, 2e-3, "fine-tuning"),
    "lr.schedule": constant("cosine", "cosine to a tenth"),
    "epochs": constant(1.0, "one pass"),
    "batch_tokens": batch_rows(64),
}


class Grpo(Training):
    """Group relative policy optimisation (arXiv 2402.03300)."""

    DEFAULTS: ClassVar[Mapping[str, Default]] = _FINETUNE
    rewards: tuple[str, ...] = Field(min_length=1, description="rewards by name")
    group: int = Field(8, ge=2, le=1024, description="answers a prompt")


class Vit(Strict):
    """A vision transformer trained from scratch."""

    layers: int = Field(ge=1, le=1024, description="blocks")
    hidden: int = Field(ge=8, le=65536, description="width")
    patch: int = Field(ge=1, le=1024, description="pixels a side of a patch")
    image: int = Field(ge=1, le=8192, description="pixels a side of the image")


class Tower(Strict):
    """A vision or audio encoder of one's own."""

    vit: Vit | None = Field(None, description="vision transformer")


class Vlm(Training):
    """Vision-language model: tower, projector, language model."""

    DEFAULTS: ClassVar[Mapping[str, Default]] = _FINETUNE
    tower: str | Tower | None = Field(
        None, description="an adopted tower, or {vit: …}; default: the parent's"
    )
    projector: Literal["mlp2x", "linear"] = Field("mlp2x", description="from tower to language model")
    train: tuple[str, ...] = Field(("projector", "lm"), description="parts that learn: projector, tower, lm")


class Audio(Vlm):
    """Audio-language model."""


LATER: Mapping[str, type[Training]] = {
    "grpo": Grpo,
    "vlm": Vlm,
    "audio": Audio,
}
