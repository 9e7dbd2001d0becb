"""One matrix to few bits: grids of scales and zero points, and the algorithms that choose them.

In: a weight [rows, columns] (outputs, inputs), a Grid, and for `gptq` the Hessian X^T X of its inputs.
Out: Quantized, the integers and what makes them numbers again: w = scale * (code - zero).

`block_size` neighbouring columns share a scale, the last block may be short, and zero points are integers of
the same bits: what ONNX's MatMulNBits and compressed-tensors' pack-quantized can hold. Nothing is random.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from famc.errors import did_you_mean

Tensor = torch.Tensor

ALGORITHMS = ("rtn", "k_quant", "hqq", "gptq", "awq")
CALIBRATED = frozenset({"gptq", "awq"})

ENTRIES = 2**20  # weights that are searched at once: a dozen temporaries of 4 MB
REFINED = 2  # rounds of refinement after GPTQ: the third brings a few per mille
LAZY = 128  # columns of GPTQ whose errors are passed on together (arXiv:2210.17323, section 3.3, step 2)


@dataclass(frozen=True, slots=True)
class Grid:
    """The numbers that a quantised weight can take."""

    bits: int  # 4 or 8
    block_size: int  # columns (inputs) that share a scale
    symmetric: bool  # zero point fixed at 2**(bits-1), none stored

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"weights of {self.bits} bits; they have 4 or 8")
        if self.block_size < 1:
            raise ValueError(f"a block of {self.block_size} columns; it has at least one")

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The code that is zero when symmetric."""
        return 1 << (self.bits - 1)

    def blocks(self, columns: int) -> int:
        """Scales that a row of so many columns has."""
        return math.ceil(columns / self.block_size)


@dataclass(frozen=True, slots=True)
class Quantized:
    """A quantised matrix."""

    grid: Grid
    codes: Tensor  # uint8 [rows, columns], 0 .. 2**bits-1
    scales: Tensor  # float32 [rows, blocks]; may be negative, as llama.cpp's q4_0
    zeros: Tensor | None  # uint8 [rows, blocks]; None when symmetric

    def dequantize(self, rows: slice = slice(None)) -> Tensor:
        """float32 [rows, columns]."""
        made = self.steps(rows)
        for part, scales in self._blocks(made, self.scales[rows]):
            part.mul_(scales)
        return made

    def steps(self, rows: slice = slice(None)) -> Tensor:
        """float32 [rows, columns]: how many scales each weight is."""
        made = self.codes[rows].float()
        if self.zeros is None:
            return made.sub_(self.grid.middle)
        for part, zeros in self._blocks(made, self.zeros[rows]):
            part.sub_(zeros)
        return made

    def error(self, weight: Tensor) -> float:
        """||W - Q||² / ||W||²; 0 for a matrix of zeros."""
        whole = wrong = 0.0
        for part in _parts(*weight.shape):
            some = weight[part].float()
            whole += float(some.square().sum(dtype=torch.float64))
            wrong += float((some - self.dequantize(part)).square_().sum(dtype=torch.float64))
        return wrong / whole if whole else 0.0

    def _blocks(self, made: Tensor, values: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Views of whole blocks and of the short last one, with what belongs to each."""
        size, whole = self.grid.block_size, made.shape[1] // self.grid.block_size
        yield torch.unflatten(made[:, : whole * size], 1, (whole, size)), values[:, :whole, None]
        yield made[:, whole * size :], values[:, whole:]


def quantize(
    weight: Tensor, grid: Grid, algorithm: str = "rtn", importance: Tensor | None = None
) -> Quantized:
    """Without data: `rtn`, `k_quant` or `hqq`.

    `search` is the search for clipped scales that `gptq` and `awq` use; there, `importance` (one number a
    column: the inputs' mean square) weighs the errors.
    """
    if algorithm not in _FITS:
        known = did_you_mean(algorithm, _FITS)
        raise ValueError(f"no data-free algorithm {algorithm!r}; {known}")
    if algorithm == "hqq" and grid.symmetric:
        raise ValueError("hqq optimises zero points, and a symmetric grid has none; use rtn or k_quant")
    rows, columns = weight.shape
    blocks = grid.blocks(columns)
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    scales, zeros = torch.empty(rows, blocks), torch.empty(rows, blocks)
    matter = _padded((torch.ones(columns) if importance is None else importance.float())[None], grid)
    for part in _parts(rows, columns):
        x = _padded(weight[part].float(), grid)
        scale, zero = _FITS[algorithm](x, matter, grid)
        codes[part] = _encode(x, scale, zero, grid).flatten(1)[:, :columns].to(torch.uint8)
        scales[part], zeros[part] = scale.squeeze(-1), zero.squeeze(-1)
    return Quantized(grid, codes, scales, None if grid.symmetric else zeros.to(torch.uint8))


def gptq(weight: Tensor, hessian: Tensor, grid: Grid, *, damp: float = 0.01) -> Quantized:
    """Column after column, each one's rounding error made good by the columns still to come: GPTQ, Frantar et
    al. 2022 (arXiv:2210.17323), with inputs' second moments H = X^T X.

    In the matrix's own order (scales found when a block is reached) and in the order of falling diag(H)
    (scales found beforehand, so that blocks stay neighbours); the one that loses less on H goes on. Then its
    scales are fitted to its codes, and its codes changed one by one where that loses less (QuantEase, Behdin
    et al. 2023, arXiv:2309.01885): a tenth less is lost of the outputs, of unseen ones as well.
    """
    weight = weight.float()
    made = [_gptq(weight, hessian, grid, damp, by_size) for by_size in (False, True)]
    best = min(made, key=lambda q: lost(weight, q, hessian))  # the first of equals
    damped = hessian.float() + torch.eye(len(hessian)) * _ridge(hessian, damp)
    refined = best
    for _ in range(REFINED):
        refined = _descend(weight, _refit(weight, refined, damped), damped)
    return min(best, refined, key=lambda q: lost(weight, q, hessian))


def lost(weight: Tensor, made: Quantized, hessian: Tensor) -> float:
    """||X W' - X Q'||², from H = X^T X alone: the trace of (W - Q) H (W - Q)'. By slices, for a head has as
    many rows as the vocabulary."""
    parts = _parts(*weight.shape)
    return sum(_energy(weight[part].float() - made.dequantize(part), hessian) for part in parts)


def energy(weight: Tensor, hessian: Tensor) -> float:
    """||X W'||², from H = X^T X."""
    return sum(_energy(weight[part], hessian) for part in _parts(*weight.shape))


def _energy(weight: Tensor, hessian: Tensor) -> float:
    return float(((weight @ hessian) * weight).sum(dtype=torch.float64))


# --- scales and zero points of blocks: x [rows, blocks, block_size] -> scale, zero [rows, blocks, 1] --------


def _rtn(x: Tensor, matter: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Rounding to nearest between the smallest and the largest weight, zero included.

    Symmetric: the weight of largest size is exact, at the end that has a code more (scale = w / -2**(bits-1),
    llama.cpp's quantize_row_q4_0_ref), or both ends are within reach; whichever loses less, block by block.
    """
    if not grid.symmetric:
        return _span(x, grid, torch.ones(()))
    middle = torch.full_like(x[..., :1], grid.middle)
    peak = _peak(x)
    full, even = _safe(peak / -grid.middle), _safe(peak.abs() / (grid.middle - 1))
    better = _loss(x, matter, full, middle, grid) <= _loss(x, matter, even, middle, grid)
    return torch.where(better, full, even), middle


def _search(x: Tensor, matter: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The range that loses least: clipped, or wider, in steps, then the scale by least squares for its codes.

    As llama.cpp's make_qx_quants and make_qkx2_quants (ggml-quants.c), but with integer zero points inside
    the search. Never worse than `rtn`.
    """
    best = _Best(x, matter, grid, *_rtn(x, matter, grid))
    middle = torch.full_like(x[..., :1], grid.middle)
    peak = _peak(x)
    for step in _STEPS:
        if grid.symmetric:
            best.offer_fitted(_safe(peak / -(grid.middle * step)), middle)
        else:
            scale, zero = _span(x, grid, torch.tensor(1 / step))
            for shift in (0, -1, 1):
                best.offer_fitted(scale, (zero + shift).clamp_(0, grid.top))
    return best.scale, best.zero


_STEPS = tuple(0.95 + 0.05 * i for i in range(14))


def _k_quant(x: Tensor, matter: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """llama.cpp's k-quants, by onnxruntime's version of make_qkx2_quants; symmetric, by make_qx_quants.

    onnxruntime rounds the zero points when the search is over, and gives a block of equal weights the scale
    1: a block that plain rounding keeps better is rounded plainly.
    """
    best = _Best(x, matter, grid, *_rtn(x, matter, grid))
    if grid.symmetric:
        # errors weighed by the weights' squares (rmse_type 1), steps of a tenth of a code
        sized, peak = matter * x.square(), _peak(x)
        middle = torch.full_like(peak, grid.middle)
        found = _Best(x, sized, grid, best.scale, best.zero)
        for step in range(-9, 10):
            found.offer_fitted(_safe(peak / -(grid.middle + 0.1 * step)), middle)
        best.offer(found.scale, middle)
        return best.scale, best.zero
    from onnxruntime.quantization.neural_compressor.weight_only import quant_tensor_k_quant_cpu

    with np.errstate(all="ignore"):  # it divides by zero for constant blocks, and then keeps what it had
        _, scale, zero = quant_tensor_k_quant_cpu(x.numpy(), grid.bits, grid.block_size)
    shape = (*x.shape[:2], 1)
    scale = torch.from_numpy(np.nan_to_num(scale.astype(np.float32))).view(shape)
    best.offer(_safe(scale), torch.from_numpy(zero.astype(np.float32)).view(shape))
    return best.scale, best.zero


def _hqq(x: Tensor, matter: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Half-quadratic quantisation (Badri & Shaji 2023, mobiusml.github.io/hqq_blog): errors are split into a
    sparse part, found by the shrinkage of an l_p norm (p = 0.7), and a rest that the zero point takes.

    The paper's zero points are real numbers. Integer ones leave little to move, so the scale is fitted
    as well (least squares for the same codes); a step is kept, block by block, where the rounded one loses less.
    """
    scale, zero = _span(x, grid, torch.ones(()))
    best = _Best(x, matter, grid, scale, zero)
    kappa, p = 1.01, 0.7
    # the paper's beta of 10, in units of the block's weights: else its meaning would hang on their size
    beta = 10 / x.abs().mean(-1, keepdim=True).clamp_min(1e-12).pow(2 - p)
    inside = (matter > 0).float()  # not the filling of a short block
    count = inside.sum(-1, keepdim=True)
    for _ in range(20):
        codes = (x / scale + zero).round_().clamp_(0, grid.top)
        error = x - scale * (codes - zero)
        shrunk = (error.abs() - error.abs().add(1e-8).pow(p - 1) / beta).clamp_min_(0) * error.sign()
        aim = x - shrunk
        zero = ((codes - aim / scale) * inside).sum(-1, keepdim=True) / count
        centred = codes - zero
        square = (centred.square() * inside).sum(-1, keepdim=True)
        scale = _safe((aim * centred * inside).sum(-1, keepdim=True) / square)
        beta = beta * kappa
        best.offer_fitted(scale, zero.round().clamp_(0, grid.top))
    return best.scale, best.zero


_Fit = Callable[[Tensor, Tensor, Grid], tuple[Tensor, Tensor]]
_FITS: dict[str, _Fit] = {"rtn": _rtn, "k_quant": _k_quant, "hqq": _hqq, "search": _search}


class _Best:
    """The scale and the zero point that lost least so far, block by block."""

    def __init__(self, x: Tensor, matter: Tensor, grid: Grid, scale: Tensor, zero: Tensor) -> None:
        self._x, self._matter, self._grid = x, matter, grid
        self.scale, self.zero = scale, zero
        self.loss = _loss(x, matter, scale, zero, grid)

    def offer(self, scale: Tensor, zero: Tensor) -> None:
        """Take these where they lose less."""
        loss = _loss(self._x, self._matter, scale, zero, self._grid)
        better = loss < self.loss  # never for nan
        self.loss = torch.where(better, loss, self.loss)
        self.scale = torch.where(better, scale, self.scale)
        self.zero = torch.where(better, zero, self.zero)

    def offer_fitted(self, scale: Tensor, zero: Tensor) -> None:
        """The same, the scale replaced by the least-squares one for the codes that it gives."""
        centred = _encode(self._x, scale, zero, self._grid).sub_(zero)
        weighed = self._matter * centred
        square = (weighed * centred).sum(-1, keepdim=True)
        fitted = (weighed * self._x).sum(-1, keepdim=True) / square
        self.offer(_safe(torch.where(square > 0, fitted, scale)), zero)


def _span(x: Tensor, grid: Grid, factor: Tensor) -> tuple[Tensor, Tensor]:
    """From `factor` times the smallest weight to `factor` times the largest, zero included."""
    low, high = x.amin(-1, keepdim=True).clamp_max_(0), x.amax(-1, keepdim=True).clamp_min_(0)
    scale = _safe((high - low) * factor / grid.top)
    return scale, (-low * factor / scale).round_().clamp_(0, grid.top)


def _peak(x: Tensor) -> Tensor:
    """The weight of largest size, with its sign."""
    return x.gather(-1, x.abs().argmax(-1, keepdim=True))


def _safe(scale: Tensor) -> Tensor:
    """A block of zeros needs some scale that is no zero to be divided by."""
    return torch.where((scale == 0) | ~scale.isfinite(), torch.ones_like(scale), scale)


def _encode(x: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    return (x / scale).round_().add_(zero).clamp_(0, grid.top)


def _loss(x: Tensor, matter: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    error = _encode(x, scale, zero, grid).sub_(zero).mul_(scale).sub_(x)
    return (error.square_() * matter).sum(-1, keepdim=True)


def _padded(rows: Tensor, grid: Grid) -> Tensor:
    """[rows, columns] -> [rows, blocks, block_size]; the last block filled with zeros."""
    short = -rows.shape[1] % grid.block_size
    return torch.nn.functional.pad(rows, (0, short)).view(len(rows), -1, grid.block_size)


def _parts(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, ENTRIES // max(1, columns))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


# --- GPTQ -------------------------------------------------------------------------------------------------


def _gptq(weight: Tensor, hessian: Tensor, grid: Grid, damp: float, by_size: bool) -> Quantized:
    rows, columns = weight.shape
    size = grid.block_size
    diagonal = hessian.diagonal().double()
    # Columns whose input was always zero have no say in H. The paper sets their weights to zero; other inputs
    # than the calibration's may need them, so they are rounded like the rest.
    importance = (diagonal + damp * diagonal.mean()).float()
    order = torch.argsort(diagonal, descending=True, stable=True) if by_size else torch.arange(columns)
    block_of = order // size
    work = weight.float()[:, order].clone()
    factor = _inverse_factor(hessian.double()[order][:, order], damp)

    codes = torch.empty(rows, columns)
    scales, zeros = torch.empty(rows, grid.blocks(columns)), torch.empty(rows, grid.blocks(columns))
    if by_size:
        fixed = quantize(weight, grid, "search", importance)
        scales = fixed.scales
        zeros = torch.full_like(scales, grid.middle) if fixed.zeros is None else fixed.zeros.float()
    stride = size * max(1, LAZY // size)
    for start in range(0, columns, stride):
        end = min(start + stride, columns)
        errors = torch.empty(rows, end - start)
        for at in range(start, end):
            block = int(block_of[at])
            if not by_size and at % size == 0:
                here = slice(at, min(at + size, columns))
                found = quantize(work[:, here], grid, "search", importance[here])
                scales[:, block] = found.scales[:, 0]
                zeros[:, block] = grid.middle if found.zeros is None else found.zeros[:, 0].float()
            scale, zero = scales[:, block], zeros[:, block]
            code = (work[:, at] / scale).round_().add_(zero).clamp_(0, grid.top)
            error = (work[:, at] - scale * (code - zero)) / factor[at, at]
            work[:, at:end] -= torch.outer(error, factor[at, at:end])
            errors[:, at - start], codes[:, at] = error, code
        work[:, end:] -= errors @ factor[start:end, end:]
    back = torch.empty_like(codes)
    back[:, order] = codes
    return Quantized(grid, back.to(torch.uint8), scales, None if grid.symmetric else zeros.to(torch.uint8))


def _inverse_factor(hessian: Tensor, damp: float) -> Tensor:
    """The upper Cholesky factor of H^-1, in float64 until it is done; H with `damp` of its mean diagonal, and
    ten times more as long as it isn't positive definite."""
    while True:
        lower, failed = torch.linalg.cholesky_ex(
            hessian + torch.eye(len(hessian), dtype=hessian.dtype) * _ridge(hessian, damp)
        )
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                factor: Tensor = upper.float()
                return factor
        damp *= 10


def _ridge(hessian: Tensor, damp: float) -> float:
    """What is added to the diagonal; something, even if all inputs were zero."""
    return damp * max(float(hessian.diagonal().mean()), 1e-12)


def _refit(weight: Tensor, made: Quantized, hessian: Tensor) -> Quantized:
    """The scales that lose least with these codes: for each row, least squares in its blocks' scales."""
    size, blocks = made.grid.block_size, made.scales.shape[1]
    scales = made.scales.clone()
    step = max(1, ENTRIES // max(blocks**2, weight.shape[1]))
    for start in range(0, len(weight), step):
        part = slice(start, start + step)
        steps = made.steps(part)
        normal = torch.empty(len(steps), blocks, blocks)
        for block in range(blocks):
            here = slice(block * size, (block + 1) * size)
            normal[:, block] = _padded((steps[:, here] @ hessian[here]) * steps, made.grid).sum(-1)
        right = _padded((weight[part] @ hessian) * steps, made.grid).sum(-1)
        # a block whose codes are all zero points has no say in any output: its row of the system is empty
        mean = normal.diagonal(dim1=1, dim2=2).mean(-1).clamp_min(1e-30)
        ridge = 1e-6 * mean[:, None, None] * torch.eye(blocks)
        found = torch.linalg.solve((normal + ridge).double(), right.double()[..., None]).squeeze(-1).float()
        scales[part] = torch.where((found == 0) | ~found.isfinite(), scales[part], found)
    return Quantized(made.grid, made.codes, scales, made.zeros)


def _descend(weight: Tensor, made: Quantized, hessian: Tensor) -> Quantized:
    """Once over all columns: the best code of each, the others held (coordinate descent on the outputs)."""
    columns, top = weight.shape[1], made.grid.top
    codes = made.codes.float()
    gradient = (weight - made.dequantize()) @ hessian
    diagonal = hessian.diagonal()
    for start in range(0, columns, LAZY):
        end = min(start + LAZY, columns)
        local = gradient[:, start:end].clone()
        moved = torch.empty_like(local)
        for at in range(start, end):
            scale = made.scales[:, at // made.grid.block_size]
            # the zero point cancels: the code moves by a whole number of steps
            code = (codes[:, at] + local[:, at - start] / (diagonal[at] * scale)).round_().clamp_(0, top)
            change = scale * (code - codes[:, at])
            local -= torch.outer(change, hessian[at, start:end])
            codes[:, at], moved[:, at - start] = code, change
        gradient -= moved @ hessian[start:end]
    return Quantized(made.grid, codes.to(torch.uint8), made.scales, made.zeros)
