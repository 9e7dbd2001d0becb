"""A whole decoder to few bits: block after block, with the inputs that the already quantised ones give.

In: a model folder (qwen3, llama) and rows of token ids, a grid, an algorithm of `quantize`. Out: Calibrated:
every Linear of the blocks (and the head, if asked) as integers, what AWQ changed beside them, each layer's
errors, and the perplexity on the rows before and after.

With `max_drop`, units that rise the perplexity most stay at more bits, as few as keep the promise. A unit is
what a runtime fuses into one matrix product: q, k and v; o; gate and up; down.

Memory: the model in fp32 once, its integers, the rows' hidden states, one block's moments of inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open

from famc.errors import StepFailed, did_you_mean
from famc.work.blocks import EMBEDDING, HEAD, UNITS, Moment, Net
from famc.work.checkpoint import shards
from famc.work.quantize import ALGORITHMS, CALIBRATED, Grid, Quantized, energy, gptq, lost, quantize

Tensor = torch.Tensor

PROBE_TOKENS = 8192  # tokens that a unit's sensitivity is measured on
SAMPLED_ROWS = 512  # of a matrix, in AWQ's search for scales: columns are what it is about


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One quantised matrix."""

    name: str
    bits: int
    weight_error: float  # ||W - Q||² / ||W||²
    output_error: float  # ||X W' - X Q'||² / ||X W'||² on the calibration inputs


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A quantised model."""

    weights: Mapping[str, Quantized]  # by module, without ".weight": "model.layers.0.mlp.up_proj", "lm_head"
    # Float parameters that changed, by their full names, in fp32: AWQ's scales are folded into norms, biases
    # and the matrices before these were quantised. Read from the model folder when they are asked for.
    folded: Mapping[str, Tensor]
    layers: tuple[LayerReport, ...]
    perplexity: Mapping[str, float]  # "source", "quantized": on the calibration rows


def calibrate(
    model_dir: Path,
    rows: Sequence[Sequence[int]],
    *,
    algorithm: str,
    grid: Grid,
    head: Grid | None,
    max_drop: float | None = None,
    keep_bits: int = 8,
    threads: int = 1,
    progress: Callable[[float, float], None] = lambda done, total: None,
) -> Calibrated:
    """Quantise a model folder.

    `head` quantises the output head, without data; a head tied to the embedding takes the embedding with it.
    `max_drop` is how far the perplexity on `rows` may rise (0.02: by 2 %); as few units as that takes stay at
    `keep_bits`. What is returned was measured as it is; its few-bit layers were calibrated on few-bit ones
    before them. The same inputs, machine and threads give the same bytes.
    """
    if algorithm not in ALGORITHMS:
        raise StepFailed(f"no algorithm {algorithm!r} of quantisation", did_you_mean(algorithm, ALGORITHMS))
    if algorithm == "hqq" and grid.symmetric:
        raise StepFailed("hqq optimises zero points, and a symmetric grid has none", "symmetric: false")
    torch.set_num_threads(threads)
    with torch.no_grad():
        net = Net(model_dir, rows)
        fine = replace(grid, bits=keep_bits) if max_drop is not None and keep_bits > grid.bits else None
        total = net.depth * (1 + len(UNITS) if fine else 1)
        source = net.loss(net.embed())
        if not math.isfinite(source):
            raise StepFailed(f"the loss of {model_dir} is {source}", "training diverged: look at its losses")
        folds = _Folds(model_dir)
        made: dict[str, _Made] = {}
        finer: dict[str, _Made] = {}

        if head is not None:
            searched = algorithm in CALIBRATED or (algorithm == "hqq" and head.symmetric)
            matrix = quantize(net.weight(HEAD), head, "k_quant" if searched else algorithm)
            net.put(HEAD, matrix)
        states = net.embed()
        for layer in range(net.depth):
            # GPTQ: what comes later in a block sees what came before it quantised (the paper's code calls it
            # --true-sequential)
            for units in [[unit] for unit in UNITS] if algorithm == "gptq" else [list(UNITS)]:
                moments = net.moments(layer, states, units)
                if algorithm == "awq":
                    _fold(net, layer, moments, grid, folds)
                for name, moment in _named(layer, units, moments):
                    weight = net.weight(name)
                    made[name] = _make(name, weight, moment, grid, algorithm)
                    if fine is not None:
                        # what GPTQ would still gain at 8 bits is nothing beside what 4 bits lose
                        finer[name] = _make(
                            name, weight, moment, fine, "awq" if algorithm == "gptq" else algorithm
                        )
                    net.put(name, made[name].matrix)
            states = [net.block(layer, state) for state in states]
            progress(layer + 1, total)
        loss = net.loss(states, net.depth)
        if head is not None:
            weight = folds.source(HEAD if not net.tied else EMBEDDING)
            made[HEAD] = _report(HEAD, weight, matrix, net.head_moment(states))
        del states

        if max_drop is not None and not _rise(loss, source) <= max_drop:  # nan is no promise kept
            chosen, loss = _mix(net, made, finer, source, loss, max_drop, lambda done: progress(done, total))
            made |= {name: finer[name] for name in chosen}
        progress(total, total)
    return Calibrated(
        weights={name: one.matrix for name, one in made.items()},
        folded=folds,
        layers=tuple(one.report for one in made.values()),
        perplexity={"source": _exp(source), "quantized": _exp(loss)},
    )


# --- one matrix -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Made:
    matrix: Quantized
    report: LayerReport


def _make(name: str, weight: Tensor, moment: Moment, grid: Grid, algorithm: str) -> _Made:
    if algorithm == "gptq":
        matrix = gptq(weight, moment.hessian, grid)
    elif algorithm == "awq":  # the scales are in the weight by now; what remains is its search for clipping
        matrix = _clipped(weight, moment.hessian, grid)
    else:
        matrix = quantize(weight, grid, algorithm)
    return _report(name, weight, matrix, moment)


def _clipped(weight: Tensor, hessian: Tensor, grid: Grid) -> Quantized:
    """Scales that lose least where the inputs are large. Columns that no row touched count a little."""
    diagonal = hessian.diagonal()
    return quantize(weight, grid, "search", importance=diagonal + 0.01 * diagonal.mean() + 1e-12)


def _report(name: str, weight: Tensor, matrix: Quantized, moment: Moment) -> _Made:
    whole = energy(weight, moment.hessian)
    output = lost(weight, matrix, moment.hessian) / whole if whole else 0.0
    return _Made(matrix, LayerReport(name, matrix.grid.bits, matrix.error(weight), output))


def _named(
    layer: int, units: Sequence[Sequence[str]], moments: Mapping[str, Moment]
) -> Iterator[tuple[str, Moment]]:
    """The full names of units' matrices, each with its inputs: the first of a unit has those of all."""
    for unit in units:
        for part in unit:
            yield f"model.layers.{layer}.{part}", moments[unit[0]]


# --- AWQ: Lin et al. 2023 (arXiv:2306.00978) --------------------------------------------------------------


def _fold(net: Net, layer: int, moments: dict[str, Moment], grid: Grid, folds: _Folds) -> None:
    """Multiply the columns of a block's matrices by scales, and divide what comes before by them; the moments
    become those of the new inputs. In the order of the paper's code, back to front where both take part."""
    into = f"model.layers.{layer}."
    before: dict[Sequence[str], str] = {
        UNITS[0]: "input_layernorm",
        UNITS[2]: "post_attention_layernorm",
        UNITS[3]: "mlp.up_proj",
    }
    if net.heads == net.kv_heads:  # else a row of v is read by several columns of o
        before[UNITS[1]] = "self_attn.v_proj"
    for unit in (UNITS[1], UNITS[3], UNITS[0], UNITS[2]):
        if unit not in before:
            continue
        names, moment = [into + part for part in unit], moments[unit[0]]
        scale = _awq_scale([net.weight(name) for name in names], moment, grid)
        if scale is None:
            continue
        for name in names:
            net.weight(name).mul_(scale)
            folds.columns[f"{name}.weight"] = scale
        for kind, tensor in net.parameters_of(into + before[unit]):
            tensor.div_(scale[:, None] if tensor.ndim == 2 else scale)
            folds.rows[f"{into}{before[unit]}.{kind}"] = 1 / scale
        moments[unit[0]] = Moment(
            moment.hessian / torch.outer(scale, scale), moment.size / scale, moment.count
        )


def _awq_scale(weights: Sequence[Tensor], moment: Moment, grid: Grid) -> Tensor | None:
    """The scale a column that loses least of the outputs: mean |x| to a power, alone or over the weights'
    mean size to the rest of it (AutoAWQ's duo_scaling). None if no scale beats none.

    The paper rounds plainly while it searches; so does this, on every few rows of a large matrix. The last
    word has the rounding that is used in the end.
    """
    rows = torch.cat([w[:: max(1, len(w) * len(weights) // SAMPLED_ROWS)] for w in weights])
    inputs, sizes = moment.size.clamp_min(1e-8), _relative_size(rows, grid).clamp_min(1e-8)
    best: tuple[float, Tensor] | None = None
    for step in range(20):
        ratio = step / 20
        for scale in (inputs**ratio, inputs**ratio / sizes ** (1 - ratio)):
            scale = scale.clamp_min(1e-4)
            scale = scale / (scale.max() * scale.min()).sqrt()
            loss = _scaled_loss(rows, scale, moment.hessian, quantize(rows * scale, grid))
            if best is None or loss < best[0]:
                best = loss, scale
    assert best is not None
    scale, one = best[1], torch.ones_like(inputs)
    losses = [
        _scaled_loss(rows, s, moment.hessian, _clipped(rows * s, moment.hessian / torch.outer(s, s), grid))
        for s in (scale, one)
    ]
    return scale if losses[0] < losses[1] else None


def _scaled_loss(rows: Tensor, scale: Tensor, hessian: Tensor, made: Quantized) -> float:
    return energy(rows - made.dequantize() / scale, hessian)


def _relative_size(rows: Tensor, grid: Grid) -> Tensor:
    """The mean over rows of |w| / the largest |w| of its block."""
    blocks = torch.split(rows.abs(), grid.block_size, dim=1)
    return torch.cat([block / block.amax(1, keepdim=True).clamp_min(1e-12) for block in blocks], 1).mean(0)


class _Folds(Mapping[str, Tensor]):
    """The float parameters that AWQ changed: vectors in memory, the rest read from the folder when asked."""

    def __init__(self, model_dir: Path) -> None:
        self._model_dir = model_dir
        self.rows: dict[str, Tensor] = {}
        self.columns: dict[str, Tensor] = {}

    def source(self, module: str) -> Tensor:
        """A module's weight as it was, in fp32."""
        return _read(self._model_dir, f"{module}.weight")

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.rows and name not in self.columns:
            raise KeyError(name)
        tensor = _read(self._model_dir, name)
        if name in self.columns:
            tensor = tensor * self.columns[name]
        if name in self.rows:
            rows = self.rows[name]
            tensor = tensor * (rows[:, None] if tensor.ndim == 2 else rows)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.rows.keys() | self.columns.keys()))

    def __len__(self) -> int:
        return len(self.rows.keys() | self.columns.keys())


def _read(model_dir: Path, name: str) -> Tensor:
    with ExitStack() as stack:
        for shard in shards(model_dir):
            opened = stack.enter_context(safe_open(shard, framework="pt"))
            if name in opened.keys():  # noqa: SIM118  # no mapping, and no iterator either
                tensor: Tensor = opened.get_tensor(name).float()
                return tensor
    raise StepFailed(f"{model_dir} has no {name}", "its index and its files disagree: make it again")


# --- mixed precision --------------------------------------------------------------------------------------


def _mix(
    net: Net,
    made: Mapping[str, _Made],
    finer: Mapping[str, _Made],
    source: float,
    loss: float,
    max_drop: float,
    progress: Callable[[float], None],
) -> tuple[list[str], float]:
    """The matrices that stay at more bits, and the loss that is reached then.

    Every unit's sensitivity is the loss that it adds when it alone has few bits. The k most sensitive ones
    stay; k by bisection, as the loss hardly ever rises with k, and what is returned was measured.
    """
    if not finer:
        raise _unkept(loss, source, max_drop, "and no unit may have more bits")
    units = [
        tuple(f"model.layers.{layer}.{part}" for part in unit) for layer in range(net.depth) for unit in UNITS
    ]
    for name, one in finer.items():
        net.put(name, one.matrix)
    finest = net.loss(net.embed())
    if not _rise(finest, source) <= max_drop:
        bits = next(iter(finer.values())).report.bits
        raise _unkept(finest, source, max_drop, f"with every layer at {bits} bits")

    added: dict[tuple[str, ...], float] = {}
    states = net.embed(PROBE_TOKENS)
    alone = net.loss(states)
    for at, unit in enumerate(units):
        layer = at // len(UNITS)
        for name in unit:
            net.put(name, made[name].matrix)
        added[unit] = net.loss(states, layer) - alone
        for name in unit:
            net.put(name, finer[name].matrix)
        if at % len(UNITS) == len(UNITS) - 1:
            states = [net.block(layer, state) for state in states]
        progress(net.depth + at + 1)
    ranked = sorted(units, key=lambda unit: -added[unit])  # stable: the earlier layer of equals

    low, high, reached = 0, len(ranked), finest  # low breaks the promise, high keeps it
    while high - low > 1:
        k = (low + high) // 2
        for rank, unit in enumerate(ranked):
            for name in unit:
                net.put(name, (finer if rank < k else made)[name].matrix)
        tried = net.loss(net.embed())
        if _rise(tried, source) <= max_drop:
            high, reached = k, tried
        else:
            low = k
    return [name for unit in ranked[:high] for name in unit], reached


def _rise(loss: float, source: float) -> float:
    """How far the perplexity rises, relatively."""
    return math.expm1(min(loss - source, 700.0))


def _exp(loss: float) -> float:
    """The perplexity of a loss, however bad."""
    return math.exp(loss) if loss < 700 else math.inf


def _unkept(loss: float, source: float, max_drop: float, how: str) -> StepFailed:
    rise, perplexities = 100 * _rise(loss, source), f"{_exp(source):.6g} to {_exp(loss):.6g}"
    return StepFailed(
        f"quantisation raises the perplexity by {rise:.3g} % (from {perplexities}) {how}; "
        f"{100 * max_drop:.3g} % are allowed",
        "allow more, or use smaller blocks, more bits (of the head as well), or another algorithm",
    )
