"""`merge`: the average of a run's last checkpoints.

In: a model in training, how many steps it takes, and `{method, last}` of the stage. Out: the average, in that model.
Snapshots are the parameters alone, as safetensors under the job's checkpoints. Each is written before Trainer's
checkpoint of the same step, so a job that resumes there finds all of the steps behind it, and makes the others anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from famc.errors import StepFailed

State = dict[str, torch.Tensor]
PARALLEL = 1e-12  # 1 - |cosine| of vectors between which there is no arc to speak of


def snapshot_steps(total: int, last: int) -> list[int]:
    """`last` steps, evenly over the last half of a run and its end among them; fewer when the half has fewer."""
    half = total / 2
    return sorted({max(1, round(half + half * (at + 1) / last)) for at in range(last)})


class Merger(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Keeps the snapshots of a run; `apply` puts their average in the model."""

    def __init__(
        self, model: torch.nn.Module, steps_total: int, spec: Mapping[str, Any], folder: Path
    ) -> None:
        self.model, self.folder, self.method = model, folder, str(spec["method"])
        self.steps = snapshot_steps(steps_total, int(spec["last"]))

    def path(self, step: int) -> Path:
        """Where the snapshot of a step lies."""
        return self.folder / f"snapshot-{step}.safetensors"

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A snapshot where one is due; whole or not at all."""
        if state.global_step not in self.steps:
            return
        # named_parameters names a tied one once
        tensors = {name: p.detach().cpu().contiguous() for name, p in self.model.named_parameters()}
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.path(state.global_step)
        save_file(tensors, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    def apply(self, model: torch.nn.Module) -> int:
        """The average goes into the model and the snapshots go away; how many there were."""
        missing = [step for step in self.steps if not self.path(step).is_file()]
        if missing:
            raise StepFailed(
                f"the snapshot of step {missing[0]} is not in {self.folder}",
                "the job's checkpoints were changed: remove its partial folder and build again",
            )
        merged = merge_states((load_file(self.path(step)) for step in self.steps), self.method)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(merged[name])
        return len(
            self.steps
        )  # the snapshots go with the checkpoints: a run that is killed now averages them again


def merge_states(states: Iterable[Mapping[str, torch.Tensor]], method: str) -> State:
    """The average of states of equal names and shapes, two in memory at a time. The n-th is mixed in by 1/n: `linear`
    is their mean; `slerp` goes along the arc between a tensor's two vectors (Shoemake 1985), as Qwen3-Embedding merges.
    """
    mix = {"linear": linear, "slerp": slerp}[method]
    merged: State = {}
    for count, state in enumerate(states, 1):
        if count == 1:
            merged = dict(state)
            continue
        if state.keys() != merged.keys():
            raise ValueError(f"states differ in {sorted(state.keys() ^ merged.keys())[:3]}")
        for name, tensor in state.items():
            merged[name] = mix(merged[name], tensor, 1.0 / count) if tensor.is_floating_point() else tensor
    if not merged:
        raise ValueError("no states to merge")
    return merged


def linear(one: torch.Tensor, other: torch.Tensor, share: float) -> torch.Tensor:
    """On the straight line."""
    return torch.lerp(one, other, share)


def slerp(one: torch.Tensor, other: torch.Tensor, share: float) -> torch.Tensor:
    """On the arc: of vectors of one length every point has that length. Parallel and opposite ones have no arc."""
    a, b = one.reshape(-1).double(), other.reshape(-1).double()
    lengths = float(a.norm() * b.norm())
    cosine = float(a @ b) / lengths if lengths else 1.0
    if 1.0 - abs(cosine) < PARALLEL:
        return linear(one, other, share)
    angle = torch.arccos(torch.tensor(cosine, dtype=torch.float64))
    first, second = torch.sin((1.0 - share) * angle), torch.sin(share * angle)
    return ((first * a + second * b) / torch.sin(angle)).to(one.dtype).reshape(one.shape)
