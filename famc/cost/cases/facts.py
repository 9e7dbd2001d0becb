"""What rows of the calibration table say in words, or leave to their software's defaults, and memory depends on.

In: a row and the Setup that `cases` made of its columns. Out: the Setup as it ran. Bears no identity.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from famc.cost.setup import Setup

_TRAINED = re.compile(r"\b(q?)(lora|adapter) trainable params ([\d,]+)")


def stated(row: Mapping[str, str], setup: Setup) -> Setup:
    """The setup with what the row's note, source and software add to its columns.

    - torchtitan up to 2024 cuts a rank's batch into as many micro-batches as pipeline stages where nothing else is set
      (parallelisms/pipelining_utils.py); rows whose note calls a micro-batch of 1 assumed ran that.
    - lit-gpt checkpoints activations as soon as FSDP is in play (finetune/lora.py), and trains in 16 bits throughout.
    - runs that went out of memory name their mode in the note alone.
    - NeMo's MLPerf submissions sum gradients in 16 bits (inferred from their peaks).
    """
    note, software = row.get("note", ""), setup.software.name.partition(",")[0]
    lay = setup.layout
    if software == "torchtitan" and lay.pp > 1 and "microbatch size 1 assumed" in note:
        each = lay.micro_batch * lay.grad_accum
        count = min(each, lay.pp)
        setup = replace(setup, layout=replace(lay, micro_batch=each // count, grad_accum=count))
    if software == "litgpt":
        setup = replace(setup, gradient_bytes=2, master=False)
        if lay.devices > 1:
            setup = replace(setup, layout=replace(lay, recompute="full"))
        if found := _TRAINED.search(note):
            setup = replace(
                setup,
                trained=int(found[3].replace(",", "")),
                adapters=True,
                adapted=_adapted(found[2], row.get("source", "")),
            )
    elif setup.adapters:
        setup = replace(setup, adapted="attention")
    if software == "mlperf":
        setup = replace(setup, gradient_bytes=2)
    return setup


def _adapted(kind: str, source: str) -> Literal["attention", "prefix", "outputs"]:
    """LLaMA-Adapter learns a prefix, its second version a scale and a bias of each matrix's output (arXiv:2304.15010)."""
    if kind == "lora":
        return "attention"
    return "outputs" if "Adapter v2" in source else "prefix"
