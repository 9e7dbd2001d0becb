"""The plain roofline, for what has no model of its own: prefill and decoding of exports, generation. **Modelled**; each
constant says where it comes from. Training steps: step_time (GPUs), cpu_time (CPUs).
"""

from __future__ import annotations

HALF_WIDTH = {"gpu": {"": 256.0}, "cpu": {"fp32": 16.0, "": 48.0}}
"""Width of a matrix at which half of the efficiency is lost. CPU: fitted to Qwen3 training at hidden 128, 256
and 384."""
HALF_ROWS = {"gpu": 512.0, "cpu": 16.0}
"""Rows (tokens read at once) at which half of the efficiency is lost. Assumed."""
DECODE_LAYER_OVERHEAD = {"gpu": 2e-5, "cpu": 2e-4}
"""Seconds a block and generated token to start its kernels; a GPU replays CUDA graphs. Assumed."""
DECODE_EFFICIENCY = 0.7
"""Share of the memory bandwidth that token-by-token generation reaches (0.64-0.85 measured with
llama.cpp)."""


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
