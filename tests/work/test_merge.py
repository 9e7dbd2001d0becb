"""Averages of checkpoints: equal states stay as they are, arcs keep lengths, and snapshots outlive a kill."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from famc.errors import StepFailed
from famc.work.merge import Merger, merge_states, slerp, snapshot_steps


@pytest.mark.parametrize("method", ["slerp", "linear"])
def test_equal_states_are_their_own_average(method: str) -> None:
    state = {"a": torch.randn(7, 3), "b": torch.zeros(4), "n": torch.tensor(3)}
    merged = merge_states([state] * 5, method)
    assert all(torch.equal(merged[name], tensor) for name, tensor in state.items())


def test_linear_is_the_mean() -> None:
    states = [{"a": torch.randn(5, 4)} for _ in range(4)]
    mean = torch.stack([state["a"] for state in states]).mean(dim=0)
    assert torch.allclose(merge_states(states, "linear")["a"], mean, atol=1e-6)


def test_slerp_keeps_the_length() -> None:
    one, other = (torch.nn.functional.normalize(torch.randn(9, 2).flatten(), dim=0).view(9, 2) for _ in "ab")
    for share in (0.0, 0.25, 0.5, 1.0):
        assert float(slerp(one, other, share).norm()) == pytest.approx(1.0, abs=1e-6)
    assert torch.allclose(slerp(one, other, 0.0), one, atol=1e-6)
    assert torch.allclose(slerp(one, other, 1.0), other, atol=1e-6)
    assert float((one + other).norm()) / 2 < 0.999


def test_slerp_of_right_angles_is_half_way() -> None:
    found = slerp(torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0]), 0.5)
    assert torch.allclose(found, torch.full((2,), 2.0**0.5))


def test_vectors_without_an_arc_are_mixed_straight() -> None:
    one = torch.tensor([1.0, 2.0])
    for other in (one * 3, -one, torch.zeros(2)):
        assert torch.allclose(slerp(one, other, 0.25), one * 0.75 + other * 0.25)


def test_states_must_have_equal_names() -> None:
    with pytest.raises(ValueError, match="differ"):
        merge_states([{"a": torch.ones(1)}, {"b": torch.ones(1)}], "linear")


@pytest.mark.parametrize(
    ("total", "last", "steps"),
    [(100, 4, [62, 75, 88, 100]), (8, 2, [6, 8]), (3, 4, [2, 3]), (1, 4, [1])],
)
def test_snapshots_are_even_over_the_last_half(total: int, last: int, steps: list[int]) -> None:
    assert snapshot_steps(total, last) == steps


def test_a_model_becomes_the_average_of_its_snapshots(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[1].weight = model[0].weight  # tied
    merger = Merger(model, 10, {"method": "linear", "last": 2}, tmp_path)
    for step in range(1, 11):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float(step))
        merger.on_step_end(None, SimpleNamespace(global_step=step), None)
    assert {path.name for path in tmp_path.iterdir()} == {"snapshot-8.safetensors", "snapshot-10.safetensors"}
    assert merger.apply(model) == 2
    assert all(torch.equal(p, torch.full_like(p, 9.0)) for p in model.parameters())
    assert model[1].weight is model[0].weight
    assert merger.apply(model) == 2, "a run that was killed behind it averages again"


def test_a_lost_snapshot_is_noticed(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    merger = Merger(model, 4, {"method": "slerp", "last": 2}, tmp_path)
    merger.on_step_end(None, SimpleNamespace(global_step=4), None)
    with pytest.raises(StepFailed, match="snapshot of step 3"):
        merger.apply(model)
