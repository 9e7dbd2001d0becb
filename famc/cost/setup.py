"""One training step to be priced: a model, a device, a layout and what the software does with them.

In: an Anatomy, a Device, a Layout. Out: frozen data that `step_time` and `step_memory` read. Bears no identity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from famc.cost.anatomy import Anatomy
from famc.cost.device import Device
from famc.cost.layout import Layout

Sharding = Literal["none", "optimizer", "gradients", "full"]


@dataclass(frozen=True, slots=True)
class Software:
    """What runs the step. `name` as in the calibration's table of frameworks; `year`: with decimals, 2024.5 is July 2024.
    `overlap`: whether communication runs behind compute; `compiled`: torch.compile or hand-fused kernels."""

    name: str = "accelerate"
    year: float = 2026.0
    compiled: bool = False
    overlap: bool = True


@dataclass(frozen=True, slots=True)
class Setup:
    """`layout.micro_batch` x `layout.grad_accum` x data ranks sequences of `seq_len` tokens make a step.

    `sharding`: what is divided over dp_shard (ZeRO-0, 1, 2, 3/FSDP). `vpp`: model chunks a pipeline rank holds (interleaved
    1F1B). `per_node`: devices that share the fast links. `trained`: weights with gradients and moments, None for all;
    `adapters`: whether they are low-rank ones beside frozen weights. `frozen_bytes`: bytes of a frozen weight (QLoRA 0.5).
    """

    anatomy: Anatomy
    device: Device
    layout: Layout
    seq_len: int
    per_node: int = 8
    sharding: Sharding = "full"
    vpp: int = 1
    sequence_parallel: bool = True
    trained: int | None = None
    adapters: bool = False
    frozen_bytes: float = 2.0
    optimizer: Literal["adamw", "adamw_8bit", "muon", "sgd"] = "adamw"
    gradient_bytes: int = 4
    master: bool = True  # an fp32 copy beside 16-bit weights, or fp32 weights cast for each pass
    fused_loss: bool = False  # logits made in pieces, never all at once
    software: Software = Software()
    # what adapters lie beside: attention's matrices (LoRA), all, none but a learnt prefix, all outputs (LLaMA-Adapter 1, 2)
    adapted: Literal["attention", "all", "prefix", "outputs"] = "all"
    shapes: int = 1  # lengths that a step's batches have, where each is padded to its own longest
    document: int | None = None  # mean length of what is packed into a sequence and attends only to itself
