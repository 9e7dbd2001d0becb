"""Grids hold what they say, each algorithm earns its name, and nothing is random."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from famc.work.quantize import ALGORITHMS, CALIBRATED, Grid, Quantized, energy, gptq, lost, quantize

GRIDS = [Grid(*g) for g in product((4, 8), (16, 32), (True, False))]
FREE = [name for name in ALGORITHMS if name not in CALIBRATED] + ["search"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    """With outliers, a row and a block of zeros, a block of equal weights, and a short last block."""
    torch.manual_seed(0)
    made = torch.randn(48, 72) * 0.05
    made[torch.rand(48, 72) < 0.01] *= 6
    made[3], made[5, :32], made[7, :32], made[9, :32] = 0, 0, 0.3, -0.3
    return made


@pytest.fixture(scope="module")
def hessian() -> torch.Tensor:
    """Of correlated inputs of unlike size; one is always zero."""
    torch.manual_seed(1)
    inputs = torch.randn(500, 20) @ torch.randn(20, 72) / 5 + 0.3 * torch.randn(500, 72)
    inputs *= torch.randn(72).exp()
    inputs[:, 11] = 0
    return inputs.T @ inputs


def every(weight: torch.Tensor, hessian: torch.Tensor, grid: Grid) -> dict[str, Quantized]:
    free = [name for name in FREE if name != "hqq" or not grid.symmetric]
    return {name: quantize(weight, grid, name) for name in free} | {"gptq": gptq(weight, hessian, grid)}


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_algorithm_fills_the_grid(grid: Grid, weight: torch.Tensor, hessian: torch.Tensor) -> None:
    for name, made in every(weight, hessian, grid).items():
        blocks = -(-72 // grid.block_size)
        assert made.codes.dtype == torch.uint8 and made.codes.shape == weight.shape, name
        assert int(made.codes.max()) <= 2**grid.bits - 1, name
        assert made.scales.dtype == torch.float32 and made.scales.shape == (48, blocks), name
        assert bool(made.scales.isfinite().all()) and bool((made.scales != 0).all()), name
        assert (made.zeros is None) == grid.symmetric, name
        if made.zeros is not None:
            assert made.zeros.dtype == torch.uint8 and made.zeros.shape == (48, blocks), name
            assert int(made.zeros.max()) <= 2**grid.bits - 1, name
        assert bool((made.dequantize()[3] == 0).all()), name
        limit = {4: 0.06, 8: 4e-4}[grid.bits]
        assert made.error(weight) < limit, name


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_what_lies_on_a_grid_is_exact(grid: Grid) -> None:
    torch.manual_seed(2)
    codes = torch.randint(0, 2**grid.bits, (20, 72))
    codes[:, 0::16], codes[:, 1::16] = 0, 2**grid.bits - 1  # every block, the short one too, spans the grid
    zeros = torch.full((20, 1), 2 ** (grid.bits - 1)) if grid.symmetric else torch.randint(3, 12, (20, 1))
    weight = 2.0**-7 * (codes - zeros).float()
    for name in FREE:
        if name == "hqq" and grid.symmetric:
            continue
        made = quantize(weight, grid, name)
        assert torch.allclose(made.dequantize(), weight, rtol=1e-5, atol=0), name
        assert torch.equal(made.codes, codes.to(torch.uint8)), name
    assert quantize(weight, grid).error(weight) == 0


def test_dequantize_is_scale_times_distance_from_zero_point() -> None:
    codes = torch.tensor([[0, 15, 8, 3, 9]], dtype=torch.uint8)
    scales, zeros = torch.tensor([[0.5, -2.0, 1.0]]), torch.tensor([[3, 0, 9]], dtype=torch.uint8)
    asymmetric = Quantized(Grid(4, 2, False), codes, scales, zeros)
    assert asymmetric.dequantize().tolist() == [[-1.5, 6.0, -16.0, -6.0, 0.0]]
    symmetric = Quantized(Grid(4, 2, True), codes, scales, None)
    assert symmetric.dequantize().tolist() == [[-4.0, 3.5, 0.0, 10.0, 1.0]]
    wide = torch.tensor([[-4.0, 3.5, 0.0, 10.0, 3.0]])
    assert symmetric.error(wide) == pytest.approx(4 / float(wide.square().sum()))
    assert symmetric.error(torch.zeros(1, 5)) == 0


def test_largest_weight_of_a_symmetric_block_uses_the_longer_end() -> None:
    made = quantize(torch.tensor([[0.1, 0.8, -0.3, 0.2]]), Grid(4, 4, True))
    assert made.codes[0, 1] == 0 and float(made.scales) == pytest.approx(-0.1)
    both = quantize(torch.tensor([[0.7, -0.7, 0.1, 0.0]]), Grid(4, 4, True))  # here both ends must be reached
    assert both.error(torch.tensor([[0.7, -0.7, 0.1, 0.0]])) < 1e-12


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_searches_lose_no_more_than_plain_rounding(grid: Grid, weight: torch.Tensor) -> None:
    plain = quantize(weight, grid).error(weight)
    assert quantize(weight, grid, "search").error(weight) < plain
    assert quantize(weight, grid, "k_quant").error(weight) <= plain * (1 + 1e-6)
    if not grid.symmetric:
        assert quantize(weight, grid, "hqq").error(weight) < plain


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_gptq_loses_less_of_the_outputs(grid: Grid, weight: torch.Tensor, hessian: torch.Tensor) -> None:
    found = lost(weight, gptq(weight, hessian, grid), hessian)
    best_free = min(lost(weight, quantize(weight, grid, name), hessian) for name in ("rtn", "search"))
    assert found < 0.6 * best_free


def test_lost_is_the_outputs_error(weight: torch.Tensor) -> None:
    torch.manual_seed(3)
    inputs = torch.randn(300, 72)
    made = quantize(weight, Grid(4, 32, True))
    error = (inputs @ weight.T - inputs @ made.dequantize().T).square().sum()
    assert lost(weight, made, inputs.T @ inputs) == pytest.approx(float(error), rel=1e-4)
    assert energy(weight, inputs.T @ inputs) == pytest.approx(
        float((inputs @ weight.T).square().sum()), rel=1e-4
    )


def test_gptq_keeps_weights_whose_input_was_never_seen(weight: torch.Tensor, hessian: torch.Tensor) -> None:
    made = gptq(weight, hessian, Grid(8, 32, False))
    kept = [row for row in range(48) if row not in (3, 5, 7, 9)]
    assert torch.allclose(made.dequantize()[kept, 11], weight[kept, 11], atol=5e-3)


@pytest.mark.parametrize("rank", [0, 1, 5])
def test_gptq_takes_a_hessian_of_few_inputs(rank: int, weight: torch.Tensor) -> None:
    torch.manual_seed(4)
    inputs = torch.randn(rank, 72) * 100
    made = gptq(weight, inputs.T @ inputs, Grid(4, 32, True), damp=1e-9)
    assert bool(made.dequantize().isfinite().all())


def test_the_same_input_gives_the_same_bytes(weight: torch.Tensor, hessian: torch.Tensor) -> None:
    for grid in (Grid(4, 32, True), Grid(4, 32, False)):
        once, again = every(weight, hessian, grid), every(weight, hessian, grid)
        for name, made in once.items():
            assert torch.equal(made.codes, again[name].codes) and torch.equal(made.scales, again[name].scales)


def test_slices_of_rows_make_no_difference(weight: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {name: quantize(weight, Grid(4, 32, False), name) for name in FREE}
    monkeypatch.setattr("famc.work.quantize.ENTRIES", 72 * 5)
    for name, made in whole.items():
        assert torch.equal(quantize(weight, Grid(4, 32, False), name).codes, made.codes), name


def test_weights_of_any_float_type_are_taken(weight: torch.Tensor) -> None:
    half = weight.bfloat16()
    assert torch.equal(
        quantize(half, Grid(4, 32, True)).codes, quantize(half.float(), Grid(4, 32, True)).codes
    )


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="symmetric grid has none"):
        quantize(torch.zeros(2, 4), Grid(4, 4, True), "hqq")
    with pytest.raises(ValueError, match="no data-free algorithm 'gptq'"):
        quantize(torch.zeros(2, 4), Grid(4, 4, True), "gptq")
    with pytest.raises(ValueError, match="3 bits"):
        Grid(3, 32, True)
    with pytest.raises(ValueError, match="at least one"):
        Grid(4, 0, True)
