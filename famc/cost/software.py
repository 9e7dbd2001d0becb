"""What a training stack does, as facts: which attention kernel, what is fused, what moves behind compute.

In: a Software. Out: its Practice. A stack that is not in the table is taken for PyTorch of its year; `guess` names one by
the layout it ran. Bears no identity.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from famc.cost.layout import Layout
from famc.cost.setup import Sharding, Software

Kernel = Literal["scores", "flash1", "flash2", "vendor"]

COMPILED = 0.8
"""Share of element-wise work that torch.compile fuses. Assumed."""
RING = 1.35
"""PyTorch's context parallelism: attention in pieces that are merged in fp32. Read off torchtitan's own rows (1.0 to 1.5 at 2
to 8 ranks), the only published ones: in the score of that source it is not left out."""
FLASH_YEAR, FLASH2_YEAR = 2022.5, 2023.55
"""Since when PyTorch stacks use FlashAttention (arXiv:2205.14135), and its second version (arXiv:2307.08691, July 2023)."""

CORE_YEAR = 2023.5
"""Since when Megatron-LM is Megatron Core with Transformer Engine, as in NeMo."""
SEQUENCE_YEAR = 2022.3
"""Since when it has sequence parallelism and recomputes selectively (arXiv:2205.05198)."""


@dataclass(frozen=True, slots=True)
class Practice:
    """How a stack runs a step.

    `launch`: kernels that Python starts one by one (eager), from a recorded or compiled graph, or from C++ (native).
    `fused`: share of the element-wise work that is fused into few passes. `attention`: scores written to memory,
    FlashAttention 1 or 2, or the chip maker's kernel. `overlap_data`, `overlap_tensor`: whether gradients and weights, or
    activations of tensor parallelism, move behind compute. `selective`: what a selective recomputation runs again,
    attention's core or half of the block. `reduce_each`: gradients are reduced for every micro-batch (FSDP), or once a step.
    `ring`: attention's time in a context ring for the same work on one device.
    """

    launch: Literal["eager", "graph", "native"]
    fused: float
    attention: Kernel
    overlap_data: bool
    overlap_tensor: bool
    selective: Literal["core", "half"]
    reduce_each: bool
    ring: float = 1.0


_FSDP = Practice("eager", 0.0, "flash2", True, False, "half", True, ring=RING)
_MEGATRON_2020 = Practice("eager", 0.5, "scores", True, False, "core", False)
_NVIDIA = Practice("graph", 1.0, "vendor", True, True, "core", False)

PRACTICES: dict[str, Practice] = {
    "accelerate": _FSDP,
    "torchtitan": _FSDP,
    "torchtitan, async tp": replace(_FSDP, overlap_tensor=True),
    "fms-fsdp": _FSDP,
    "llm-foundry": replace(_FSDP, attention="flash1"),  # its tables are of 2023, before FlashAttention-2
    "litgpt": _FSDP,
    "tinyllama": replace(_FSDP, fused=0.3),  # its fork of lit-gpt fuses norm, rotation and loss
    "deepspeed": replace(_FSDP, overlap_data=False),
    "nanotron": Practice("eager", 0.6, "flash2", False, False, "core", False),
    "megatron-lm": _MEGATRON_2020,
    "megatron-deepspeed": replace(_MEGATRON_2020, overlap_data=False),
    "nemo": _NVIDIA,
    "megatron-bridge": _NVIDIA,
    "mlperf": _NVIDIA,
    "rocm": Practice("eager", 0.6, "vendor", True, False, "core", False),
    "maxtext": replace(_NVIDIA, reduce_each=True),
    "habana": replace(_NVIDIA, fused=0.8, overlap_tensor=False),
    "llm.c": replace(_NVIDIA, launch="native", overlap_data=False, overlap_tensor=False),
}
"""By Software.name, after the stacks' own sources and documentation; `fused` is a rough reading of them. `megatron-lm` is
that before Megatron Core."""


@lru_cache(maxsize=1024)
def practice(software: Software) -> Practice:
    """The facts of a stack."""
    found = PRACTICES.get(software.name)
    if software.name == "megatron-lm" and software.year >= CORE_YEAR:
        found = _NVIDIA
    if found is None:
        flash: Kernel = "flash2" if software.year >= FLASH2_YEAR else "flash1"
        found = replace(_FSDP, attention=flash if software.year >= FLASH_YEAR else "scores")
    if software.compiled and found.launch == "eager":
        found = replace(found, launch="graph", fused=max(found.fused, COMPILED))
    if not software.overlap:
        found = replace(found, overlap_data=False, overlap_tensor=False)
    return found


def guess(layout: Layout, sharding: Sharding) -> str:
    """The stack that a run of unstated software most likely used: a pipeline, or tensor parallelism or 8 bits without
    sharded weights, are Megatron's ways; all else is taken for PyTorch."""
    whole = sharding in ("none", "optimizer")
    if layout.pp > 1 or (whole and (layout.tp > 1 or layout.precision not in ("bf16", "fp16", "fp32"))):
        return "megatron-lm"
    return "unknown"
