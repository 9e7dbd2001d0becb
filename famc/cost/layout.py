"""How a model is spread over devices, and what is told where it can't be. The search: search.py."""

from __future__ import annotations

from dataclasses import dataclass

from famc.cost.memory import Memory


@dataclass(frozen=True, slots=True)
class Layout:
    """`devices` counts all of them, over all `nodes`: dp_replicate x dp_shard x tp x cp x pp. Experts (`ep`)
    live on ranks of dp_shard. `micro_batch` x `grad_accum` x dp_replicate x dp_shard sequences make the
    global batch."""

    nodes: int = 1
    devices: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    tp: int = 1
    cp: int = 1
    pp: int = 1
    ep: int = 1
    micro_batch: int = 1
    grad_accum: int = 1
    recompute: str = "none"
    precision: str = "bf16"
    why: tuple[str, ...] = ()

    @property
    def data(self) -> int:
        """Ranks that read different sequences."""
        return self.dp_replicate * self.dp_shard

    @property
    def global_batch(self) -> int:
        """Sequences an optimizer step."""
        return self.micro_batch * self.grad_accum * self.data


class DoesNotFit(Exception):
    """No layout fits. `biggest` names the largest part of the leanest `memory`; `hint`: what to change."""

    def __init__(self, biggest: str, hint: str, memory: Memory, limit: float) -> None:
        self.biggest = biggest
        self.hint = hint
        self.memory = memory
        self.limit = limit
        super().__init__(f"needs {_gb(memory.total)} a device of {_gb(limit)}, most of it {biggest}; {hint}")


def _gb(value: float) -> str:
    return f"{value / 1e9:.3g} GB"
