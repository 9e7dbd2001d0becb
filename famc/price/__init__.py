"""What one step of a plan is spread over, holds, takes and costs, on the hardware that the spec gives it.

In: a Node, whose Work says how much there is to do, and a Hardware. Out: Quote: layout, bytes by what holds them, seconds, how
sure they are, and why. Raises DoesNotFit or ValueError where no layout does it. Pure: reads no disk, bears no identity.

wanted.py: the question to the layout search. gpu.py: training by the layout search (famc.cost.search), inference. cpu.py: this machine, or one like it.
"""

from __future__ import annotations

from collections.abc import Hashable

from famc.cost.memory import RUNTIME, Memory
from famc.cost.parameters import count
from famc.graph import Node
from famc.hardware import Hardware
from famc.price import cpu, gpu
from famc.price.quote import Quote
from famc.price.wanted import forced
from famc.steps.exports import export_memory

__all__ = ["Quote", "options", "price", "question"]

# A worker without a model still holds Python, the tokenizer, and a few chunks of text (measured: 150–350 MB).
PLAIN_MEMORY = Memory(overhead=4.0e8)
HANDLING = 0.5  # seconds of a local job beside its work


def price(node: Node, where: Hardware) -> Quote:
    """The fastest way to do a step on its hardware."""
    if node.shape is None or node.work.mode == "cpu":
        return _plain(node, where)
    if where.accelerator.kind == "cpu":
        return cpu.training(node, where) if node.work.mode == "train" else cpu.inference(node, where)
    return gpu.training(node, where) if node.work.mode == "train" else gpu.inference(node, where)


def question(node: Node) -> Hashable:
    """All that pricing reads of a training step: steps that agree in it, on the same hardware, have one price."""
    lora = node.params.get("lora")
    return (
        node.kind, node.shape, node.work, node.params.get("precision"), node.params.get("optimizer"),
        repr(lora) if lora else None, tuple(sorted(forced(node).items())),
    )  # fmt: skip


def options(node: Node, where: Hardware) -> tuple[Quote, ...]:
    """The ways to do a step of which none is slower and on as many devices (or threads) as another: devices ascending,
    seconds descending. One for steps that are not spread."""
    if node.shape is None or node.work.mode != "train":
        return (price(node, where),)
    if where.accelerator.kind == "cpu":
        return cpu.options(node, where)
    return gpu.options(node, where)


def _plain(node: Node, where: Hardware) -> Quote:
    """A job without a model on a device: text, tables, files."""
    held = PLAIN_MEMORY
    if node.kind == "export" and node.shape is not None:
        held = Memory(
            weights=export_memory(node.shape, count(node.shape).total, node.params), overhead=RUNTIME["cpu"]
        )
    device, work = where.accelerator.device, node.work
    precision = "fp32" if device.kind == "cpu" else where.accelerator.training_precision()[0]
    return Quote.of(
        seconds=HANDLING + work.cpu_seconds, memory=held, limit=device.usable, precision=precision, basis=work.basis
    )  # fmt: skip
