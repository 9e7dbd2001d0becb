"""A decoder in ONNX Runtime, as a user of the released file runs it: prefill, and greedy with the cache."""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

Ids = list[list[int]]
Logits = np.ndarray[Any, np.dtype[np.float32]]
Cache = dict[str, Any]  # name of the graph's input -> OrtValue; stays on ONNX Runtime's side, never copied


def open_graph(path: Path, threads: int) -> ort.InferenceSession:
    """A session on the CPU for comparisons: quiet, small, and kind to what runs beside it."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the cores are shared
    # Lengths differ from call to call: an arena would keep the largest of everything.
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


class OnnxDecoder:
    """A graph with `input_ids`, `attention_mask`, maybe `position_ids`, and a `past_key_values.*` cache."""

    def __init__(self, path: Path, threads: int) -> None:
        self._session = open_graph(path, threads)
        inputs = self._session.get_inputs()
        self._names = {i.name for i in inputs}
        self._past = {i.name: i.shape for i in inputs if i.name.startswith("past_key_values.")}
        kinds = {i.type for i in inputs if i.name in self._past}
        self._dtype = np.float16 if kinds == {"tensor(float16)"} else np.float32
        if not self._past:
            raise ValueError(f"{path} has no key-value cache: its inputs are {sorted(self._names)}")
        self._present = [name.replace("past_key_values", "present") for name in self._past]

    def step(self, ids: Ids, past: Cache | None = None) -> tuple[Logits, Cache]:
        """Feed rows of equal length after `past`; the logits of these tokens, and the cache with them.

        After a past, a batch of several rows takes one token each: GroupQueryAttention on CPU asks for that.
        """
        tokens = np.asarray(ids, dtype=np.int64)
        if tokens.ndim != 2:
            raise ValueError("ids must be a batch of rows of equal length")
        batch, length = tokens.shape
        if past is None:
            # [batch, kv heads, positions, head_dim]; only heads and head_dim are numbers in the graph
            past = {
                name: _value(np.zeros((batch, shape[1], 0, shape[3]), dtype=self._dtype))
                for name, shape in self._past.items()
            }
        start = int(next(iter(past.values())).shape()[2])
        feeds = {
            "input_ids": _value(tokens),
            "attention_mask": _value(np.ones((batch, start + length), dtype=np.int64)),
            **past,
        }
        if "position_ids" in self._names:
            positions = np.tile(np.arange(start, start + length, dtype=np.int64), (batch, 1))
            feeds["position_ids"] = _value(positions)
        logits, *present = self._session.run_with_ort_values(["logits", *self._present], feeds)
        return logits.numpy().astype(np.float32, copy=False), dict(zip(self._past, present, strict=True))

    def logits(self, ids: Ids) -> Logits:
        """[batch, length, vocabulary] for rows of equal length."""
        return self.step(ids)[0]

    def generate(self, prompt_ids: list[int], max_new_tokens: int, eos: Set[int]) -> list[int]:
        """Greedy: the new ids, up to and with the first one in `eos`."""
        new: list[int] = []
        feed, past = prompt_ids, None
        while len(new) < max_new_tokens:
            logits, past = self.step([feed], past)
            new.append(int(logits[0, -1].argmax()))
            if new[-1] in eos:
                break
            feed = new[-1:]
        return new


def _value(array: np.ndarray[Any, Any]) -> Any:
    return ort.OrtValue.ortvalue_from_numpy(array)
