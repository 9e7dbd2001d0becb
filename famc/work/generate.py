"""Greedy text for many prompts at once, with the key-value cache.

Prompts are padded on the left, so that all rows take their next token at the same column; a finished row
leaves the batch and its cache. Weights stay in fp32: one token a step is bound by reading them, and casting
would read them twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from typing import Any

import torch

BATCH = 16


def greedy(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | Sequence[int],
    eos: Set[int],
    *,
    batch: int = BATCH,
    progress: Callable[[int], None] = lambda done: None,
) -> list[list[int]]:
    """For each prompt its new ids, up to and with the first one in `eos`. A limit for all prompts, or one
    each.
    """
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    results: list[list[int]] = [[] for _ in prompts]
    order = sorted(
        range(len(prompts)), key=lambda i: (-len(prompts[i]), i)
    )  # equal lengths together: little padding
    for start in range(0, len(order), batch):
        members = order[start : start + batch]
        made = _batch(model, [prompts[i] for i in members], [limits[i] for i in members], eos)
        for index, new in zip(members, made, strict=True):
            results[index] = new
        progress(start + len(members))
    return results


def _batch(model: Any, prompts: list[Sequence[int]], limits: list[int], eos: Set[int]) -> list[list[int]]:
    device = model.device
    width = max(len(prompt) for prompt in prompts)
    if not min(len(prompt) for prompt in prompts):
        raise ValueError("a prompt has no tokens")
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    padded = not bool(mask.all())
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    new: list[list[int]] = [[] for _ in prompts]
    alive = [row for row, limit in enumerate(limits) if limit > 0]
    if len(alive) < len(prompts):
        keep = torch.tensor(alive, device=device, dtype=torch.long)
        ids, mask, positions = ids[keep], mask[keep], positions[keep]
    past: Any = None
    with torch.inference_mode():
        while alive:
            out = model(
                input_ids=ids, attention_mask=mask if padded else None, position_ids=positions,
                past_key_values=past, use_cache=True, logits_to_keep=1,
            )  # fmt: skip
            past = out.past_key_values
            tokens = out.logits[:, -1].argmax(-1)
            staying = []
            for at, (row, token) in enumerate(zip(alive, tokens.tolist(), strict=True)):
                new[row].append(token)
                if token not in eos and len(new[row]) < limits[row]:
                    staying.append(at)
            if not staying:
                break
            positions = positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)
            if len(staying) < len(alive):
                keep = torch.tensor(staying, device=device)
                past.batch_select_indices(keep)
                tokens, mask, positions = tokens[keep], mask[keep], positions[keep]
                alive = [alive[at] for at in staying]
            ids = tokens[:, None]
    return new
