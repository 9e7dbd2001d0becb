"""What every kind of step is made of. Pure: no torch, no disk.

A stage's parameters are a pydantic model (`Training` and its children). At a size they become a `Resolved`: every value
concrete, each with where it came from. `Work` says how much there is to do, from which the plan makes time and money.
Identity: all of `Resolved.values` but `RUNTIME`, which only moves work around.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from famc.cost.cpu_time import Head
from famc.cost.shape import Shape
from famc.spec.family import Mix, StageSpec, Strict
from famc.spec.quantity import Count

# fields that move work around but never change what is learnt
RUNTIME = frozenset({"micro_batch", "checkpoint_steps", "recompute"})


@dataclass(frozen=True, slots=True)
class Amount:
    """How much data there is, as far as can be known before it is read. `distinct`: examples without those that a mix repeats;
    0: all are."""

    tokens: float
    examples: float
    basis: Literal["measured", "modelled", "assumed"] = "assumed"
    distinct: float = 0.0


@dataclass(frozen=True, slots=True)
class LexicalStart:
    """An embedder's start as a bag of words: `steps` updates by `batch` queries, each with `columns` texts, at widths `dims`."""

    steps: float
    batch: int
    columns: int
    dims: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Work:
    """What a step has to do. tokens: processed by the model; flops: all of them; cpu_seconds: work outside the model;
    host_bytes: data that lies in the host's memory beside it.

    Training: `sequences` of the global batch, each of `rows` texts of at most `context` tokens. `length`: mean tokens of such
    a text (0: all rows are full). `varied`: a pass is as long as its longest text; `padding`: that length over the mean;
    `shapes`: lengths that all passes have, about.
    `head`: what becomes of the logits: `fused`: the loss takes them in slices; `logits`: one fp32 tensor; `none`: there are
    none. `teachers`: models that read the same without gradients; `follow`: the loss compares logits with theirs; `beside`:
    how many of them, from the last, stay in memory. `cached`: gradients are made in a second pass (GradCache). `generated`:
    tokens that the model writes before it learns from them.

    Inference: texts of `length` tokens.
    """

    mode: Literal["train", "infer", "cpu"] = "cpu"
    tokens: float = 0.0
    flops: float = 0.0
    optimizer_steps: float = 0.0
    sequences: float = 1.0
    context: int = 0
    rows: int = 1
    length: float = 0.0
    padding: float = 1.0
    head: Head = "fused"
    varied: bool = False
    shapes: int = 1
    teachers: tuple[Shape, ...] = ()
    beside: int = 0
    follow: bool = False
    cached: bool = False
    generated: float = 0.0
    lexical: LexicalStart | None = None
    cpu_seconds: float = 1.0
    host_bytes: float = 0.0
    basis: Literal["measured", "modelled", "assumed"] = "modelled"

    @property
    def padded(self) -> float:
        """Tokens of a text as it is run."""
        return min(float(self.context), self.length * self.padding) if self.length else float(self.context)


@dataclass(frozen=True, slots=True)
class Resolved:
    """Concrete values, and the reason of each that the user did not write."""

    values: Mapping[str, Any]
    reasons: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Setting:
    """What a default may depend on: the shape, its parameter count, and the data."""

    shape: Shape
    params: int
    data: Amount


Default = Callable[["Training", Setting], tuple[Any, str]]


class Lr(Strict):
    """Learning rate and its schedule."""

    peak: Annotated[float, Field(gt=0, le=10)] | Literal["scaling_law"] | None = Field(
        None, description="peak, or scaling_law; default: by size"
    )
    schedule: Literal["cosine", "wsd", "linear", "constant", "decay"] | None = Field(
        None, description="shape after warm-up; wsd: stable, then decay; decay: from the parent's end"
    )
    warmup: float | None = Field(None, ge=0, le=1, description="share of steps with a rising rate")
    min_ratio: float | None = Field(None, ge=0, le=1, description="last rate as a share of the peak")
    decay: float | None = Field(None, gt=0, le=1, description="share of steps that wsd decays over")


class Lora(Strict):
    """Low-rank adapters instead of full training; merged when the step ends."""

    r: int = Field(16, ge=1, le=1024, description="rank")
    alpha: float = Field(32.0, gt=0, description="scale is alpha / r")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the adapter's input")
    targets: tuple[str, ...] = Field(("all-linear",), description="modules that get adapters")


def _number_is_peak(value: Any) -> Any:
    return {"peak": value} if isinstance(value, int | float) and not isinstance(value, bool) else value


class Training(StageSpec):
    """What every trained stage may say. A value left out is filled by the kind's table of defaults."""

    VERSION: ClassVar[int] = 1
    DEFAULTS: ClassVar[Mapping[str, Default]] = {}

    data: str | Mix | None = Field(None, description="a mix, a source, or {weights: …, tokens: …} in place")
    steps: int | None = Field(
        None, ge=1, le=10**9, description="optimizer steps; wins over tokens and epochs"
    )
    tokens: Count | None = Field(None, ge=1, description="tokens to train on; wins over epochs")
    epochs: float | None = Field(None, gt=0, le=1000, description="passes over the data")
    batch_tokens: Count | None = Field(None, ge=1, description="global batch in tokens (packed kinds)")
    context: int | None = Field(None, ge=8, le=2**24, description="tokens a row; default: the family's")
    rope_theta: float | None = Field(
        None, gt=0, description="new rotary base; needed to go beyond the parent's positions"
    )
    lr: Annotated[Lr, BeforeValidator(_number_is_peak)] = Field(
        Lr(), description="a number, or peak and schedule"
    )
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw",
        description="muon: orthogonalised momentum on the blocks' matrices (arXiv 2502.16982), AdamW on the rest",
    )
    weight_decay: float | None = Field(None, ge=0, le=10, description="decoupled, on matrices only")
    betas: tuple[float, float] | None = Field(None, description="AdamW moments")
    clip: float | None = Field(None, gt=0, description="gradient norm at most")
    lora: Lora | None = Field(None, description="train adapters only")
    precision: Literal["auto", "bf16", "fp32"] = Field("auto", description="auto: what the backend does well")
    micro_batch: int | None = Field(
        None, ge=1, le=65536, description="sequences a pass; never changes the result"
    )
    checkpoint_steps: int | None = Field(None, ge=1, description="steps between checkpoints")
    recompute: Literal["none", "full"] | None = Field(
        None, description="activation checkpointing; default: if needed"
    )

    @classmethod
    def references(cls) -> dict[str, str]:
        return {"from": "stage", "data": "data"}

    def resolve(self, setting: Setting, origin: Callable[[str], str | None]) -> Resolved:
        """All values concrete. `origin(field)` names who wrote a field, None where nobody did."""
        return self.fill(self.written(origin), setting)

    def written(self, origin: Callable[[str], str | None]) -> Resolved:
        """The values as they stand in the spec: the same at every size that nothing overrides."""
        values: dict[str, Any] = {}
        reasons: dict[str, str] = {}
        for name, info in type(self).model_fields.items():
            key = info.alias or name
            if key in ("kind", "from", "by", "data", "lr", "teacher"):
                continue
            value = getattr(self, name)
            values[key] = value.model_dump() if isinstance(value, Strict) else value
            reasons[key] = origin(key) or "default"
        for name in Lr.model_fields:
            values[f"lr.{name}"] = getattr(self.lr, name)
            reasons[f"lr.{name}"] = origin(f"lr.{name}") or "default"
        return Resolved(values, reasons)

    def fill(self, given: Resolved, setting: Setting) -> Resolved:
        """What is left out, filled for a size."""
        values, reasons = dict(given.values), dict(given.reasons)
        for key, fill in self.DEFAULTS.items():
            if values.get(key) is None or values[key] == "scaling_law":
                values[key], reasons[key] = fill(self, setting)
        return Resolved(values, reasons)

    def amount(self, values: Mapping[str, Any], data: Amount) -> tuple[float, float]:
        """(tokens, optimizer steps) that the budget comes to: steps, else tokens, else epochs of the data."""
        batch = float(values["batch_tokens"])
        if values["steps"]:
            return values["steps"] * batch, float(values["steps"])
        tokens = float(values["tokens"] or data.tokens * (values["epochs"] or 1.0))
        return tokens, float(max(1, math.ceil(tokens / batch)))


# --- defaults that an expert would choose --------------------------------------------------------------------------


def constant(value: Any, why: str) -> Default:
    """The same value at every size."""
    return lambda stage, setting: (value, f"default: {why}")


def context_of_family(stage: Training, setting: Setting) -> tuple[int, str]:
    """Rows as long as the architecture's positions."""
    return setting.shape.context, "default: arch.context"


def _compute(stage: Training, setting: Setting) -> float:
    tokens = float(stage.tokens or setting.data.tokens * (stage.epochs or 1.0))
    return 6.0 * setting.params * max(tokens, 1.0)


def pretrain_lr(stage: Training, setting: Setting) -> tuple[float, str]:
    """0.3118 C^-0.1250, C = 6 N D (DeepSeek LLM, arXiv 2401.02954, eq. 1), rounded to two figures."""
    compute = _compute(stage, setting)
    return _figures(
        0.3118 * compute**-0.125
    ), f"default: scaling law 0.3118 C^-0.125 at C = {compute:.2g} FLOPs"


def pretrain_batch(stage: Training, setting: Setting) -> tuple[int, str]:
    """0.2920 C^0.3271 tokens (DeepSeek LLM, arXiv 2401.02954, eq. 1), to the nearest power of two rows."""
    compute = _compute(stage, setting)
    rows = max(1.0, 0.2920 * compute**0.3271 / (stage.context or setting.shape.context))
    batch = 2 ** round(math.log2(rows)) * (stage.context or setting.shape.context)
    return batch, f"default: scaling law 0.292 C^0.3271 at C = {compute:.2g} FLOPs, whole rows"


def finetune_lr(scale: float, low: float, high: float, what: str) -> Default:
    """scale × sqrt(1B / parameters): published recipes for 0.5B–70B lie near 2e-5 at 1B for SFT."""

    def fill(stage: Training, setting: Setting) -> tuple[float, str]:
        value = min(high, max(low, scale * math.sqrt(1e9 / setting.params)))
        return _figures(value), f"default: {what}: {scale:g} x sqrt(1B / {setting.params / 1e6:.3g}M)"

    return fill


def batch_rows(rows: int) -> Default:
    """So many packed rows."""
    return lambda stage, setting: (
        rows * (stage.context or setting.shape.context),
        f"default: {rows} packed rows",
    )


def _figures(value: float, digits: int = 2) -> float:
    return float(f"{value:.{digits - 1}e}")


COMMON: dict[str, Default] = {
    "context": context_of_family,
    "lr.warmup": constant(0.05, "5 % of the steps"),
    "lr.min_ratio": constant(0.1, "a tenth of the peak"),
    "lr.decay": constant(0.2, "the last fifth (WSD, arXiv 2404.06395, uses 10–20 %)"),
    "weight_decay": constant(0.1, "AdamW for language models (GPT-3, Llama)"),
    "betas": constant((0.9, 0.95), "AdamW for language models (GPT-3, Llama)"),
    "clip": constant(1.0, "gradient norm 1 (GPT-3, Llama)"),
}
