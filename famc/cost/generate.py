"""Seconds in which a model writes many texts at once: token by token, on many devices.

In: an Anatomy, a Device. Out: seconds. Each token reads the weights that the batch meets and the batch's key-value cache, so
that generation is bound by memory bandwidth until the batch is large (Pope et al. 2022, arXiv:2211.05102, section 2.1).
**Modelled**. One text alone in a runtime of its own: decode.py.
"""

from __future__ import annotations

from famc.cost import memory, sums
from famc.cost.anatomy import Anatomy
from famc.cost.device import Device
from famc.cost.roofline import DECODE_EFFICIENCY, DECODE_LAYER_OVERHEAD, step_seconds
from famc.cost.step_memory import CONTEXT, MARGIN, NCCL

MOST_BATCH = 512
"""Texts that an engine has in flight on one replica. Assumed (vLLM's default is 256 to 1,024)."""


def generation_seconds(
    anatomy: Anatomy, device: Device, *, sequences: int, new: int, prompt: int = 0, precision: str = "bf16",
    devices: int = 1, per_node: int = 8,
) -> float:  # fmt: skip
    """`sequences` texts of `new` tokens after a prompt each. Replicas of as few devices as hold the weights share them.

    ValueError where not even a node holds the weights with the cache of one text.
    """
    width = memory.width(precision)
    room = (1 - MARGIN) * ((device.capacity or device.memory) - CONTEXT - NCCL)
    length = prompt + new
    one, weights = sums.kv_bytes(anatomy, length, width), float(sums.parameters(anatomy) * width)
    tp = next((t for t in _powers(min(devices, per_node)) if weights + one <= t * room), 0)
    if not tp:
        raise ValueError(
            f"{anatomy.name} needs {(weights + one) / 1e9:.3g} GB to write one text of {length} tokens: "
            f"{min(devices, per_node)} devices have {min(devices, per_node) * room / 1e9:.3g} GB"
        )
    each = -(-sequences // max(1, devices // tp))
    fit = int((tp * room - weights) / one) if one else MOST_BATCH
    batch = max(1, min(each, fit, MOST_BATCH))
    peak, share = device.peak(precision) * tp, device.efficiency(precision)
    middle = prompt + new / 2
    layers = sum(s.layers for s in anatomy.stacks)
    flops = batch * sums.forward_flops(anatomy, 1.0, 2 * middle)  # the newest token sees all before it
    moved = min(weights, batch * sums.active(anatomy) * width) + batch * sums.kv_bytes(anatomy, middle, width)
    token = step_seconds(
        flops, moved, peak, tp * device.bandwidth * DECODE_EFFICIENCY, share,
        DECODE_LAYER_OVERHEAD[device.kind] * layers,
    )  # fmt: skip
    read = batch * prompt * sums.forward_flops(anatomy, 1.0, float(max(prompt, 1))) / (peak * share)
    return -(-each // batch) * (read + new * token)


def _powers(most: int) -> list[int]:
    return [2**i for i in range(12) if 2**i <= most]
