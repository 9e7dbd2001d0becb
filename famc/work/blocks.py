"""A decoder in fp32 whose blocks run one at a time, as calibration needs it.

In: a model folder and rows of token ids. Out: hidden states block by block, the second moments of each matrix's inputs,
the loss on the rows. One block's moments are in memory, and the hidden states of all rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from famc.errors import StepFailed
from famc.work.likelihood import HEAD_ENTRIES, without_bars
from famc.work.quantize import Quantized

Tensor = torch.Tensor

MODELS = ("llama", "qwen3")
UNITS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
HEAD = "lm_head"
EMBEDDING = "model.embed_tokens"

BATCH_TOKENS = 4096  # tokens that go through a block at once


@dataclass(frozen=True, slots=True)
class Moment:
    """What is kept of a matrix's inputs X: X^T X, the mean of |X| in each column, and how many rows X has."""

    hessian: Tensor
    size: Tensor
    count: int


class Net:
    """A decoder in fp32 whose blocks are run one at a time, on rows of equal length without padding."""

    def __init__(self, model_dir: Path, rows: Sequence[Sequence[int]]) -> None:
        config = AutoConfig.from_pretrained(model_dir, local_files_only=True)
        if config.model_type not in MODELS:
            known = ", ".join(MODELS)
            raise StepFailed(
                f"quantisation doesn't know {config.model_type} ({model_dir})", f"it knows {known}"
            )
        if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
            raise StepFailed(
                f"quantisation can't run sliding-window attention ({model_dir})", "use full attention"
            )
        self._rows = [list(row) for row in rows if len(row) > 1]  # a single token has no next one
        if not self._rows:
            raise StepFailed("quantisation needs rows of at least two tokens", "give it text to calibrate on")
        longest = max(map(len, self._rows))
        if longest > config.max_position_embeddings:
            raise StepFailed(
                f"a row of {longest} tokens for a model of {config.max_position_embeddings}", "cut the rows"
            )
        with without_bars():
            self._model = AutoModelForCausalLM.from_pretrained(
                model_dir, dtype=torch.float32, local_files_only=True, attn_implementation="sdpa"
            ).eval()
        self.tied = bool(config.tie_word_embeddings)
        self.depth = int(config.num_hidden_layers)
        self.heads, self.kv_heads = int(config.num_attention_heads), int(config.num_key_value_heads)
        self.batches = equal_lengths(self._rows)

    def weight(self, module: str) -> Tensor:
        """The live weight of a module."""
        weight: Tensor = self._model.get_submodule(module).weight.data
        return weight

    def parameters_of(self, module: str) -> Iterator[tuple[str, Tensor]]:
        """Its weight, and maybe its bias."""
        for kind, parameter in self._model.get_submodule(module).named_parameters():
            yield kind, parameter.data

    def put(self, module: str, made: Quantized) -> None:
        """Run with the quantised weight from now on."""
        self.weight(module).copy_(made.dequantize())

    def embed(self, tokens: int | None = None) -> list[State]:
        """What the first block reads: of all rows, or of the first ones that have `tokens`."""
        batches = self.batches if tokens is None else equal_lengths(first_rows(self._rows, tokens))
        return [State(ids, self._model.model.embed_tokens(ids)) for ids in batches]

    def block(self, layer: int, state: State) -> State:
        """What the next block reads."""
        positions = torch.arange(state.ids.shape[1])[None]
        # Without a mask, scaled-dot-product attention is causal: rows have no padding that it should hide.
        hidden = self._model.model.layers[layer](
            state.hidden,
            attention_mask=None,
            position_ids=positions,
            position_embeddings=self._model.model.rotary_emb(state.hidden, positions),
            use_cache=False,
        )
        return State(state.ids, hidden)

    def moments(
        self, layer: int, states: Sequence[State], units: Sequence[Sequence[str]]
    ) -> dict[str, Moment]:
        """The inputs of units of a block, by the first name of each."""
        block = self._model.model.layers[layer]
        sums = {unit[0]: _Sum(block.get_submodule(unit[0]).in_features) for unit in units}
        hooks = [block.get_submodule(name).register_forward_pre_hook(one) for name, one in sums.items()]
        try:
            for state in states:
                self.block(layer, state)
        finally:
            for hook in hooks:
                hook.remove()
        return {name: one.moment() for name, one in sums.items()}

    def head_moment(self, states: Sequence[State]) -> Moment:
        """The inputs of the output head."""
        one = _Sum(states[0].hidden.shape[-1])
        for state in states:
            one(None, (self._model.model.norm(state.hidden),))
        return one.moment()

    def loss(self, states: Sequence[State], layer: int = 0) -> float:
        """Mean -log p of the next tokens, from what `layer` reads on. Logits exist a slice at a time."""
        head = self._model.lm_head
        step = max(1, HEAD_ENTRIES["cpu"] // head.weight.shape[0])
        total, count = 0.0, 0
        for state in states:
            for at in range(layer, self.depth):
                state = self.block(at, state)
            hidden = self._model.model.norm(state.hidden[:, :-1]).flatten(0, 1)
            targets = state.ids[:, 1:].flatten()
            for start in range(0, len(targets), step):
                logits = head(hidden[start : start + step])
                nll = cross_entropy(logits, targets[start : start + step], reduction="none")
                total += float(nll.sum(dtype=torch.float64))
            count += len(targets)
        return total / count


@dataclass(frozen=True, slots=True)
class State:
    ids: Tensor  # [rows, length]
    hidden: Tensor  # [rows, length, width]


class _Sum:
    """A forward hook that adds up what a module reads."""

    def __init__(self, columns: int) -> None:
        self._hessian, self._size, self._count = torch.zeros(columns, columns), torch.zeros(columns), 0

    def __call__(self, module: Any, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].flatten(0, -2)
        self._hessian.addmm_(x.T, x)
        self._size += x.abs().sum(0)
        self._count += len(x)

    def moment(self) -> Moment:
        return Moment(self._hessian, self._size / self._count, self._count)


def equal_lengths(rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Rows of equal length together, the longest first: what doesn't fit in memory fails at once."""
    by_length: dict[int, list[Sequence[int]]] = {}
    for row in rows:
        by_length.setdefault(len(row), []).append(row)
    made = []
    for length, members in sorted(by_length.items(), reverse=True):
        step = max(1, BATCH_TOKENS // length)
        made += [torch.tensor(members[at : at + step]) for at in range(0, len(members), step)]
    return made


def first_rows(rows: Sequence[Sequence[int]], tokens: int) -> list[Sequence[int]]:
    """The first rows that have `tokens` together; at least one."""
    chosen: list[Sequence[int]] = []
    for row in rows:
        chosen.append(row)
        tokens -= len(row)
        if tokens <= 0:
            break
    return chosen
