"""Steps on a CPU: the largest micro-batch that memory allows, and seconds by what the CPU was measured to do.

In: a Node, a Hardware. Out: Quote. With a `famc calibrate` of the machine its basis is `measured`, else `assumed` curves of a
CPU with such instructions are used (famc.cost.cpu_assumed). Bears no identity.
"""

from __future__ import annotations

import math
from dataclasses import replace

from famc.cost import memory, sums
from famc.cost.anatomy import Anatomy
from famc.cost.cpu_assumed import rates
from famc.cost.cpu_time import Step, forward_seconds, lexical_seconds, step_seconds
from famc.cost.layout import DoesNotFit, Layout
from famc.cost.parameters import count
from famc.cost.search import best
from famc.graph import Node
from famc.hardware import Hardware
from famc.price.quote import Quote
from famc.price.wanted import adapted, forced, found, model_of, wanted
from famc.steps.base import Work

START = {"pretrain": 0.2, "distill": 0.3, "sft": 1.5, "dpo": 7.0, "embed": 2.0, "rerank": 1.2, "eval": 1.0, "mine": 2.0, "parity": 1.0}  # fmt: skip
"""Seconds of a job before its first step, in the pool of workers that have torch and the trainers loaded: building the model,
reading and tokenising. Measured on two cores; in DPO also importing trl. Embedding's texts are counted by the stage."""
PASS_TEXTS = 64
"""Texts that GradCache embeds at once at most (famc.work.embed)."""
SCORED_TOKENS = 2048
"""Tokens that an evaluation reads at once (famc.work.search, famc.work.likelihood)."""
BUCKETS = 0.7
"""Passes that a reranker's n pairs are cut into (famc.work.rank_data.buckets), over the square root of n: 2.0 of 8, 3.9 of 32 and
7.4 of 128 pairs whose lengths are drawn log-normally (sigma 0.6) about 95 tokens."""
PARAMETERS_A_THREAD = 10_000_000
"""Parameters that keep one more CPU thread busy in training. A second thread made the example's 2.5 M model 1.1 to 1.2 times as
fast (benchmarks/build.py --loop prints it): below, two jobs side by side do more."""


def threads_of(node: Node, cores: int) -> int:
    """Cores of a job: small matrices gain little from more than one, and other jobs run beside it."""
    if node.work.mode != "train" or node.shape is None:
        return 1
    return max(1, min(cores, round(count(node.shape).total / PARAMETERS_A_THREAD)))


def training(node: Node, where: Hardware, threads: int | None = None) -> Quote:
    """A training step's job with `threads` threads (default: by the model's size)."""
    assert node.shape is not None
    work, device = node.work, where.accelerator.device
    threads = threads_of(node, device.cores) if threads is None else threads
    precision, why = precision_of(node, where)
    model = model_of(node.shape, work)
    fixed = forced(node)
    at = found(work, wanted(node, where, precision), lambda asked: best(asked, fixed))
    held = replace(at.memory, overhead=at.memory.overhead + work.host_bytes)
    if held.total > at.limit:
        raise DoesNotFit("the texts", "use fewer pairs, or a host with more memory", held, at.limit)
    known, basis = rates(device)
    step = _step(node, at.layout, model, precision)
    seconds = max(1, math.ceil(work.optimizer_steps)) * step_seconds(step, known, threads=threads).seconds
    if work.lexical is not None:
        start = work.lexical
        seconds += lexical_seconds(start.steps, start.batch, start.columns, node.shape, start.dims, known)
    seconds += START.get(node.kind, 1.0) + work.cpu_seconds
    return Quote.of(
        seconds=seconds, memory=held, limit=at.limit, basis=_basis(basis, work), layout=replace(at.layout, why=(*at.layout.why, *_told(where))),
        flops=work.flops, peak=where.accelerator.with_cores(threads).device.peak(precision), why=why, threads=threads,
    )  # fmt: skip


def options(node: Node, where: Hardware) -> tuple[Quote, ...]:
    """With one thread, two, four and so on, as long as more are faster."""
    quotes: list[Quote] = []
    threads = 1
    while threads <= where.accelerator.device.cores:
        made = training(node, where, threads)
        if not quotes or made.seconds < quotes[-1].seconds:
            quotes.append(made)
        threads *= 2
    return tuple(quotes)


def inference(node: Node, where: Hardware) -> Quote:
    """Forward passes over texts of like length, in fp32 as the workers score."""
    assert node.shape is not None
    work, device = node.work, where.accelerator.device
    length = max(1.0, work.length or float(work.context))
    rows = max(1, round(SCORED_TOKENS / length))
    model = model_of(node.shape, work)
    layout = Layout(micro_batch=rows, precision="fp32")
    held = memory.inference(model, layout, work.context, kind="cpu")
    if held.total > device.usable:
        raise DoesNotFit(held.biggest, "use a backend with more memory", held, device.usable)
    known, basis = rates(device)
    step = Step(
        model, rows, math.ceil(length), precision="fp32", head="none" if work.head == "none" else "logits",
        passes=max(1, math.ceil(work.tokens / (rows * length))),
    )  # fmt: skip
    seconds = START.get(node.kind, 1.0) + forward_seconds(step, known) + work.cpu_seconds
    return Quote.of(
        seconds=seconds, memory=held, limit=device.usable, basis=_basis(basis, work), layout=layout,
        flops=work.flops, peak=where.accelerator.with_cores(1).device.peak("fp32"),
    )  # fmt: skip


def precision_of(node: Node, where: Hardware) -> tuple[str, str]:
    """The precision to train in, and why."""
    wish = str(node.params.get("precision", "auto"))
    if wish != "auto":
        return wish, "set in the spec"
    precision, why = where.accelerator.training_precision()
    if precision == "bf16":
        why = "bf16 autocast: this CPU multiplies bf16 in hardware"
    return precision, why


def _basis(known: str, work: Work) -> str:
    """That of the CPU's figures, unless the amount of data is a guess."""
    return "assumed" if work.basis == "assumed" else known


def _told(where: Hardware) -> tuple[str, ...]:
    """Where the CPU's figures are from, and why not from a nearer file."""
    measured = where.accelerator.measured
    if measured is None:
        return (*where.notes, "the CPU's speed is assumed: `famc calibrate` measures it")
    return (*where.notes, f"the CPU's speed was measured by `famc calibrate` on {measured.date}")


# --- one step -----------------------------------------------------------------------------------------------


def _step(node: Node, layout: Layout, model: Anatomy, precision: str) -> Step:
    """What the trainer runs: micro-batches of rows, and for kinds that sort their texts smaller passes of like length."""
    work = node.work
    texts = round(work.sequences) * work.rows
    rows = layout.micro_batch * work.rows
    context = max(1, math.ceil(work.padded))
    if work.cached:
        rows = min(layout.micro_batch, PASS_TEXTS)
    elif work.varied and work.head == "none":
        rows = max(1, round(rows / max(1.0, BUCKETS * math.sqrt(rows))))
    adapters = adapted(node, model)
    return Step(
        model,
        rows,
        context,
        passes=max(1, math.ceil(texts / rows)),
        precision=precision,
        optimizer="muon" if node.params.get("optimizer") == "muon" else "adamw",
        head=work.head,
        trained=adapters / sums.parameters(model) if adapters else 1.0,
        teachers=tuple(model_of(t, work) for t in work.teachers),
        follow=work.follow,
        recompute=layout.recompute == "full" or (work.cached and layout.grad_accum > 1),
        varied=work.varied,
    )
