"""Seconds of a job: a plain roofline, **modelled**. Each constant says where it comes from."""

from __future__ import annotations

from dataclasses import dataclass

from famc.cost import flops as work
from famc.cost import memory
from famc.cost.device import Device
from famc.cost.layout import Layout
from famc.cost.parameters import count
from famc.cost.shape import Shape

STARTUP = {"gpu": 60.0, "cpu": 6.0}
"""Seconds before the first step. CPU: imports of torch, transformers and a trainer (5-6 s measured). GPU:
assumed."""
STEP_OVERHEAD = {"gpu": 0.010, "cpu": 0.010}
"""Seconds a step outside the model: data, scheduler, logging (Hugging Face Trainer on CPU: 5-8 ms
measured)."""
LAYER_OVERHEAD = {"gpu": 0.0005, "cpu": 0.0005}
"""Seconds a block and micro-batch to start its kernels, forward and backward. Assumed."""
HALF_WIDTH = {"gpu": {"": 256.0}, "cpu": {"fp32": 16.0, "": 48.0}}
"""Width of a matrix at which half of the efficiency is lost. CPU: fitted to Qwen3 training at hidden 128, 256
and 384."""
HALF_ROWS = {"gpu": 512.0, "cpu": 16.0}
"""Rows (tokens of a micro-batch) at which half of the efficiency is lost. Assumed."""
OVERLAP = 0.8
"""Share of the compute time behind which sharded data parallelism can hide its communication. Assumed."""
EXPOSED = 0.1
"""Share of that communication that no overlap hides (the first gather, the last scatter). Assumed."""
OPTIMIZER_TRAFFIC = 28
"""Bytes a parameter an AdamW update moves: reads gradient, weight, two moments (16), writes the last three
(12)."""
DECODE_LAYER_OVERHEAD = {"gpu": 2e-5, "cpu": 2e-4}
"""Seconds a block and generated token to start its kernels; a GPU replays CUDA graphs. Assumed."""
DECODE_EFFICIENCY = 0.7
"""Share of the memory bandwidth that token-by-token generation reaches (0.64-0.85 measured with
llama.cpp)."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """`seconds` of the whole job with its start; `mfu`: model FLOPs (without recomputation) over the peak."""

    seconds: float
    mfu: float
    basis: str
    steps: int
    step_seconds: float
    flops: float


def step_seconds(
    flops: float,
    bytes_moved: float,
    peak: float,
    bandwidth: float,
    efficiency: float,
    overhead: float = 0.0,
) -> float:
    """max(flops / (peak x efficiency), bytes / bandwidth) + overhead (doi:10.1145/1498765.1498785)."""
    return max(flops / (peak * efficiency), bytes_moved / bandwidth) + overhead


def efficiency(shape: Shape, device: Device, precision: str, rows: float, tp: int = 1) -> float:
    """The device's share of peak for large matmuls x width / (width + half) x rows / (rows + half)."""
    table = HALF_WIDTH[device.kind]
    half = table.get(precision, table[""])
    wide = shape.hidden / tp
    return device.efficiency(precision) * wide / (wide + half) * rows / (rows + HALF_ROWS[device.kind])


def job(
    shape: Shape,
    layout: Layout,
    device: Device,
    *,
    steps: int,
    context: int,
    per_node: int = 1,
    flops: float | None = None,
    trainable_params: int | None = None,
    causal: bool = True,
) -> Estimate:
    """A training job of `steps` optimizer steps of `layout.global_batch` sequences of `context` tokens.

    `flops` is the model work of the whole job where it is not plain training (a reference model, a teacher).
    """
    params = count(shape)
    tokens = float(layout.global_batch * context)
    share = 1.0 if trainable_params is None else min(1.0, trainable_params / params.total)
    model = (
        work.training(shape, tokens, context, causal, trainable=share)
        if flops is None
        else flops / max(1, steps)
    )
    hardware = model + work.recomputed(shape, tokens, context, causal, layout.recompute)

    rows = layout.micro_batch * context / layout.cp
    eff = efficiency(shape, device, layout.precision, rows, layout.tp)
    peak = device.peak(layout.precision)
    trained = params.total if trainable_params is None else trainable_params
    update = (
        OPTIMIZER_TRAFFIC * trained / (layout.dp_shard * layout.cp * layout.tp * layout.pp) / device.bandwidth
    )
    launches = LAYER_OVERHEAD[device.kind] * shape.layers / layout.pp * layout.grad_accum
    compute = step_seconds(hardware / layout.devices, 0.0, peak, device.bandwidth, eff, launches)
    compute *= 1 + (layout.pp - 1) / layout.grad_accum  # 1F1B bubble (Narayanan et al. 2021, section 2.2)
    data, tensor = _communication(shape, layout, device, context, per_node, trained)
    exposed = max(data - OVERLAP * compute, EXPOSED * data) + tensor
    step = compute + exposed + update + STEP_OVERHEAD[device.kind]

    seconds = STARTUP[device.kind] + steps * step
    mfu = model * steps / (seconds * layout.devices * peak) if steps else 0.0
    return Estimate(seconds, mfu, "modelled", steps, step, model * steps)


def generation(
    shape: Shape,
    device: Device,
    *,
    sequences: int,
    prompt: int,
    new: int,
    precision: str = "bf16",
    batch: int = 32,
    devices: int = 1,
    tp: int = 1,
) -> Estimate:
    """Prompts once through (compute-bound), then `new` tokens each, for which the weights and the KV cache
    are read once a token and batch (bandwidth-bound; Pope et al. 2022, arXiv:2211.05102). `devices / tp`
    replicas share the work."""
    replicas = max(1, devices // tp)
    per_replica = -(-sequences // replicas)
    batch = max(1, min(batch, per_replica))
    rounds = -(-per_replica // batch)
    peak = device.peak(precision)
    b = memory.width(precision)
    length = prompt + new // 2
    weights = count(shape).active if batch == 1 else count(shape).total
    cache = 2 * shape.layers * shape.kv_heads * shape.head_dim * length * batch
    prefill = step_seconds(
        work.forward(shape, batch * prompt, prompt) / tp,
        0.0,
        peak,
        device.bandwidth,
        efficiency(shape, device, precision, batch * prompt, tp),
    )
    token = step_seconds(
        work.forward(shape, batch, length, causal=False) / tp,
        (weights + cache) * b / tp,
        peak,
        device.bandwidth * DECODE_EFFICIENCY,
        efficiency(shape, device, precision, HALF_ROWS[device.kind], tp),
        DECODE_LAYER_OVERHEAD[device.kind] * shape.layers,
    )
    one = prefill + new * token
    seconds = STARTUP[device.kind] + rounds * one
    flops = work.forward(shape, sequences * prompt, prompt) + work.forward(
        shape, sequences * new, length, causal=False
    )
    return Estimate(seconds, flops / (seconds * devices * peak), "modelled", rounds, one, flops)


def _communication(
    shape: Shape, layout: Layout, device: Device, context: int, per_node: int, trained: int
) -> tuple[float, float]:
    """(data-parallel, tensor-parallel) seconds a step.

    Sharded: 16-bit weights gathered for forward and backward of each micro-batch, fp32 gradients scattered
    once a step. Replicated: a ring all-reduce, 2 (n - 1) / n of the fp32 gradients. A ring over nodes is as
    fast as all links of a node together. tp: four all-reduces of a micro-batch's activations a block (Shoeybi
    et al. 2019, arXiv:1909.08053).
    """
    held = count(shape).total / (layout.tp * layout.pp)
    grads = trained / (layout.tp * layout.pp)
    between = min(device.intranode, device.internode * per_node) or 1e9
    inside = device.intranode or between
    data = 0.0
    if (s := layout.dp_shard * layout.cp) > 1:
        link = between if s * layout.tp * layout.pp > per_node else inside
        data += (s - 1) / s * (2 * 2 * held * layout.grad_accum + 4 * grads) / link
    if (r := layout.dp_replicate) > 1:
        link = between if layout.nodes > 1 else inside
        data += 2 * (r - 1) / r * 4 * grads / s / link
    tensor = 0.0
    if (t := layout.tp) > 1:
        rows = layout.micro_batch * layout.grad_accum * context / layout.cp
        size = rows * shape.hidden * memory.width(layout.precision)
        tensor += 4 * 2 * (t - 1) / t * size * shape.layers / layout.pp / inside
    if (c := layout.cp) > 1:
        rows = layout.micro_batch * layout.grad_accum * context
        kv = 2 * shape.kv_heads * shape.head_dim / layout.tp * memory.width(layout.precision)
        tensor += 3 * (c - 1) / c * rows * kv * shape.layers / layout.pp / inside
    return data, tensor
