"""Collectives against published nccl-tests, and how links follow from where ranks lie."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from famc.backend import load_accelerator
from famc.cost import comm

A100 = load_accelerator("a100-80g").device
H100 = load_accelerator("h100-80g").device
TABLE = Path(__file__).parents[2] / "benchmarks" / "data" / "nccl_allreduce.csv"


def _measured(gpu: str, ranks: int) -> dict[int, float]:
    """Size in bytes -> seconds."""
    with TABLE.open(encoding="utf-8") as lines:
        return {
            int(r["size_bytes"]): float(r["time_us_out_of_place"]) * 1e-6
            for r in csv.DictReader(lines)
            if (r["gpu"], int(r["n_gpus"])) == (gpu, ranks)
        }


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("mib", [8, 64, 256, 1024])
def test_all_reduce_on_nvlink_takes_what_nccl_tests_measured(ranks: int, mib: int) -> None:
    """Within 25 % at each size of A100, 2 to 8 GPUs."""
    over = comm.link(A100, ranks, 1, 8)
    assert comm.all_reduce(mib * 2.0**20, over) == pytest.approx(
        _measured("A100", ranks)[mib * 2**20], rel=0.25
    )


def test_all_reduce_on_v100_nvswitch_scales_with_its_links() -> None:
    """An untouched chip: half of A100's bandwidth, 1 GiB on 8."""
    over = comm.link(load_accelerator("v100-32g").device, 8, 1, 8)
    assert comm.all_reduce(2.0**30, over) == pytest.approx(_measured("V100", 8)[2**30], rel=0.25)


def test_one_rank_moves_nothing() -> None:
    """No group, no time."""
    alone = comm.link(A100, 1, 8, 8)
    assert (
        comm.all_reduce(1e9, alone)
        == comm.all_gather(1e9, alone)
        == comm.all_to_all(1e9, A100, alone, 1)
        == 0.0
    )


def test_gather_moves_half_of_what_a_reduction_does() -> None:
    """Ring algorithms: (n - 1) / n against 2 (n - 1) / n."""
    over = comm.link(A100, 8, 1, 8)
    gather, reduce = (f(1e9, over) - over.latency for f in (comm.all_gather, comm.all_reduce))
    assert reduce == pytest.approx(2 * gather)


def test_groups_inside_a_node_use_fast_links_and_others_the_network() -> None:
    """Eight ranks side by side stay inside; the same eight at a distance of 8 each have one network card."""
    inside, outside = comm.link(H100, 8, 1, 8), comm.link(H100, 8, 8, 8)
    assert (inside.spans, outside.spans) == (False, True)
    assert inside.rate / outside.rate == pytest.approx(450 * 0.77 / (50 * 0.8))


def test_a_group_of_whole_nodes_uses_all_their_cards() -> None:
    """16 ranks on 2 nodes: 8 cards together, up to what one rank's fast link carries."""
    assert comm.link(H100, 16, 1, 8).rate == pytest.approx(50e9 * 8 * 0.8)
    assert comm.link(replace(H100, internode=100e9), 16, 1, 8).rate == pytest.approx(450e9 * 0.77)
    assert comm.link(A100, 16, 1, 8).rate == pytest.approx(25e9 * 8 * 0.8)


def test_more_nodes_cost_latency() -> None:
    """Rings grow by a hop a node."""
    assert comm.link(H100, 1024, 1, 8).latency > 3 * comm.link(H100, 64, 1, 8).latency


def test_exchanges_over_nodes_are_bound_by_the_network() -> None:
    """Half of 1 GB leaves the node over one card."""
    over = comm.link(H100, 16, 1, 8)
    assert comm.all_to_all(1e9, H100, over, 8) == pytest.approx(0.5e9 / 40e9, rel=0.02)


def test_a_token_goes_once_to_a_node_for_all_its_experts() -> None:
    """8 draws: of one node, one; of many nodes, almost 8."""
    assert comm.distinct(8, 1) == 1.0
    assert comm.distinct(8, 4) == pytest.approx(4 * (1 - 0.75**8))
    assert 7.9 < comm.distinct(8, 1000) < 8.0


def test_part_of_a_torus_has_one_axis_of_links() -> None:
    """16 of a slice's 256 chips lie along one of two axes."""
    v5e = load_accelerator("tpu-v5e").device
    assert comm.link(v5e, 16, 1, 256).rate == pytest.approx(comm.link(v5e, 256, 1, 256).rate / 2)
