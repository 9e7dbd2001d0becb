"""Steps on GPUs: a training step's layout is searched for, its time is that of famc.cost.step_time, and what it does besides
(teachers, generation, a lexical start) is added.

In: a Node, a Hardware. Out: Quote, `modelled`. Raises DoesNotFit with the nearest change that would fit, or ValueError for what
cannot be. Bears no identity.
"""

from __future__ import annotations

import math
from dataclasses import replace

from famc.cost import memory
from famc.cost.fitted import band
from famc.cost.generate import generation_seconds
from famc.cost.layout import DoesNotFit, Layout
from famc.cost.search import Priced, Wanted, best
from famc.cost.search import options as layouts
from famc.cost.setup import Setup
from famc.cost.shape import Shape
from famc.cost.step_memory import limit
from famc.cost.step_time import StepTime, step_time
from famc.graph import Node
from famc.hardware import Hardware
from famc.price.quote import Quote, weaker
from famc.price.wanted import Forced, forced, found, model_of, wanted

START = 60.0
"""Seconds before the first step: imports, weights, NCCL. Assumed."""
READ_START = 20.0
"""The same of an evaluation. Assumed."""
READ_BATCH = 8
"""Texts that an evaluation reads at once. Assumed."""
LEXICAL_PAIRS = 1e6
"""Pairs a second of a bag of words, which is bound by its table's memory. Assumed."""


def training(node: Node, where: Hardware) -> Quote:
    """The fastest layout of a training step, and the time of the whole job.

    Where texts are mostly shorter than the context, which memory must hold, the layouts on different numbers of devices are
    compared by the texts' own length.
    """
    if node.work.varied:
        return min(options(node, where), key=lambda quote: quote.seconds)
    asked, fixed, why = _asked(node, where)
    return _quote(node, found(node.work, asked, lambda w: best(w, fixed)), why)


def options(node: Node, where: Hardware) -> tuple[Quote, ...]:
    """Layouts on one device, two, and so on, of which none is slower than one on fewer: devices ascending."""
    asked, fixed, why = _asked(node, where)
    quotes: list[Quote] = []
    for at in found(node.work, asked, lambda w: layouts(w, fixed)):
        made = _quote(node, at, why)
        if not quotes or made.seconds < quotes[-1].seconds:
            quotes.append(made)
    return tuple(quotes)


def inference(node: Node, where: Hardware) -> Quote:
    """Forward passes in one process, over as many devices of a node as the weights need."""
    assert node.shape is not None
    work, device = node.work, where.accelerator.device
    precision = where.accelerator.training_precision()[0]
    model = model_of(node.shape, work)
    length = max(1, math.ceil(work.length or min(work.context, 4096)))
    context = min(work.context, 4096)
    layout = Layout(micro_batch=READ_BATCH, precision=precision)
    room = limit(Setup(model, device, layout, length))
    held = memory.inference(model, layout, context)
    while held.total > room and layout.tp < where.per_node:
        tp = layout.tp * 2
        layout = replace(layout, devices=tp, tp=tp, why=(f"weights over {tp} devices",))
        held = memory.inference(model, layout, context)
    if held.total > room:
        raise DoesNotFit(held.biggest, "use a backend with more memory", held, room)
    setup = Setup(model, device, layout, length, where.per_node)
    passes = max(1, math.ceil(work.tokens / (READ_BATCH * length)))
    seconds = READ_START + passes * _forward(step_time(setup)) + work.cpu_seconds
    return Quote.of(
        seconds=seconds, memory=held, limit=room, basis=weaker("modelled", work.basis), layout=layout,
        flops=work.flops, peak=device.peak(precision) * layout.devices,
    )  # fmt: skip


# --- a training step ----------------------------------------------------------------------------------------


def _asked(node: Node, where: Hardware) -> tuple[Wanted, Forced, str]:
    """What the search is asked, what the spec fixes, and why the precision is what it is."""
    wish = str(node.params.get("precision", "auto"))
    if wish != "auto":
        precision, why = wish, "set in the spec"
    elif where.runtime == "any":  # 8 bits too, where they are faster
        precision, why = "auto", ""
    else:
        precision, why = where.accelerator.training_precision()
    return wanted(node, where, precision), forced(node), why


def _quote(node: Node, at: Priced, why: str) -> Quote:
    work, setup = node.work, _as_run(node, at)
    layout = at.layout
    own = step_time(setup)
    step = own.seconds + sum(_forward(step_time(_of_teacher(setup, t, node))) for t in work.teachers)
    steps = max(1, math.ceil(work.optimizer_steps))
    seconds = START + steps * step + work.cpu_seconds
    if work.generated:
        seconds += _written(node, at)
    if work.lexical is not None:
        seconds += work.lexical.steps * work.lexical.batch / LEXICAL_PAIRS
    return Quote.of(
        seconds=seconds, memory=at.memory, limit=at.limit, basis=weaker("modelled", work.basis), layout=layout,
        flops=work.flops, peak=setup.device.peak(layout.precision) * layout.devices, interval=band(), why=why,
    )  # fmt: skip


def _as_run(node: Node, at: Priced) -> Setup:
    """The setup with texts as long as they are, where memory was looked at with the longest; GradCache runs blocks twice."""
    work, setup = node.work, at.setup
    if not work.varied:
        return setup
    text = max(1, math.ceil(work.padded))
    if work.cached and setup.layout.grad_accum > 1:
        setup = replace(setup, layout=replace(setup.layout, recompute="full"))
    return replace(setup, seq_len=text * work.rows, document=text if work.rows > 1 else None)


def _forward(t: StepTime) -> float:
    """A forward pass: a third of what computes and moves in a step (Kaplan et al. 2020, arXiv:2001.08361, table 1)."""
    return (t.seconds - t.optimizer - t.overhead) / 3.0


def _of_teacher(setup: Setup, shape: Shape, node: Node) -> Setup:
    """A model that reads what is trained on, on the same devices, without pipelines and experts apart."""
    lay = setup.layout
    model = model_of(shape, node.work)
    layout = replace(lay, pp=1, ep=1, dp_shard=lay.dp_shard * lay.pp, recompute="none")
    return replace(setup, anatomy=model, layout=layout, vpp=1, trained=None, adapters=False)


def _written(node: Node, at: Priced) -> float:
    """Seconds in which the answers are generated, on all devices of the step."""
    work, setup = node.work, at.setup
    return generation_seconds(
        setup.anatomy,
        setup.device,
        sequences=max(1, math.ceil(work.generated / work.context)),
        new=work.context,
        precision=setup.layout.precision,
        devices=setup.layout.devices,
        per_node=setup.per_node,
    )
