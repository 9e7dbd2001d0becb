"""What a training stack does with memory, as facts: what it reports, what it keeps beside what the model needs.

In: a Software. Out: Habits. A stack that is not in the table is taken for plain PyTorch. Bears no identity.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from famc.cost.setup import Software


@dataclass(frozen=True, slots=True)
class Habits:
    """`reports`: what its published peaks count: bytes that the allocator took from the device, fragments included, or bytes
    that tensors held. `stage`: the pipeline stage whose peak it prints.

    `logit`: bytes a logit at the loss; `logit_split`: the same where tensor ranks divide the vocabulary. `keeps_logits`:
    whether the last pipeline stage keeps the logits of all micro-batches until the step ends. `copies`: whether 16-bit
    gradients stay beside their fp32 sums. `engine`: whether 8-bit steps keep 8-bit inputs and copies of matrices
    (Transformer Engine); `low_weights`: whether the 8-bit copy is the only one. `base`: whether q, k and v are parts of one
    product that stays whole beside the rotated copies. `balanced`: whether pipeline stages are cut so that the head counts
    as the blocks that it costs. `loads_whole`: whether sharded weights are gathered whole to load a checkpoint.
    `quantised_head`: whether 4-bit storage takes in the output head. `norms`: whether a norm is one kernel though other
    element-wise work is not fused. `sums`: whether FSDP makes fp32 copies of a block's gradients before it scatters them.
    """

    reports: Literal["reserved", "allocated"] = "reserved"
    stage: Literal["fullest", "first", "last"] = "fullest"
    logit: float = 14.0
    logit_split: float = 14.0
    keeps_logits: bool = False
    copies: bool = False
    engine: bool = False
    low_weights: bool = False
    base: bool = False
    balanced: bool = False
    loads_whole: bool = False
    quantised_head: bool = False
    norms: bool = False
    sums: bool = True


PLAIN = Habits()
"""PyTorch: 16-bit logits, their fp32 log-softmax, its gradient, the logits' gradient: 2 + 3 x 4 bytes."""
_MEGATRON = Habits(logit=10.0, logit_split=10.0, base=True)
"""Its vocabulary-parallel loss works in place: 16-bit logits, one fp32 softmax, that is its gradient too, and 4 bytes of
work (megatron/core/tensor_parallel/cross_entropy.py)."""
_NVIDIA = replace(_MEGATRON, base=False, engine=True)

HABITS: dict[str, Habits] = {
    # max_reserved_gib of the first rank of the last stage (torchtitan/metrics.py). A loss over a divided vocabulary is
    # DTensor's, of single operations: two more fp32 tensors. PyTorch's schedules return the joined outputs.
    # norm_type is fused_rmsnorm in its 2024 configurations.
    "torchtitan": Habits(stage="last", logit_split=22.0, keeps_logits=True, norms=True),
    # loss_fn fused_crossentropy (flash-attn), which overwrites 16-bit logits with their gradient; and as much in work
    "llm-foundry": Habits(logit=4.0),
    # one kernel overwrites the logits with their gradient; memory is allotted once, before the first step
    "llm.c": Habits("allocated", logit=2.0, logit_split=2.0, norms=True),
    # XLA plans memory ahead, and scatters gradients as they are summed
    "maxtext": Habits("allocated", logit=10.0, logit_split=10.0, sums=False),
    # max_memory_reserved; load_raw loads a full state dict into FSDP, all weights gathered (finetune/lora.py, lit-gpt 2023)
    "litgpt": Habits(base=True, loads_whole=True, quantised_head=True),
    # the reserved peak of rank 0; FP32GradientAccumulator; blocks are dealt out by their matrices' cost (nanotron/models)
    "nanotron": Habits(stage="first", copies=True, base=True, balanced=True),
    "megatron-lm": _MEGATRON,
    "megatron-deepspeed": _MEGATRON,
    "nemo": _NVIDIA,
    "megatron-bridge": _NVIDIA,
    "rocm": _NVIDIA,
    # torch.cuda.max_memory_allocated of NVIDIA's submissions, which keep weights in 8 bits
    "mlperf": replace(_NVIDIA, reports="allocated", low_weights=True),
}
"""By Software.name up to a comma. Read in the sources: lit-gpt's load_raw and its FSDP checkpointing. Known of the stacks, not
looked up again: what each reports, the losses, the fused norms, that PyTorch's schedules join outputs. Inferred from the
published peaks, which they therefore fit better than those of a stack not seen: nanotron's rank 0, balanced stages and
gradient copies, torchtitan's last stage, MLPerf's 8-bit weights."""


def habits(software: Software) -> Habits:
    """The facts of a stack."""
    return HABITS.get(software.name.partition(",")[0], PLAIN)
