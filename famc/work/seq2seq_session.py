"""An encoder and decoder in ONNX Runtime, as a user of the released files runs them, and how far they are from torch.

In: the two graphs of an export; the folder that they were made from. Out: answers; distances of hidden states, logits
and greedy answers.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
import torch

from famc.errors import StepFailed
from famc.work.compare_filled import figures
from famc.work.onnx_seq2seq import SUFFIXES, cache_names, graph_names, load_t5
from famc.work.onnx_session import open_graph
from famc.work.rows import Array
from famc.work.seq2seq import encode_source, encode_target


class OnnxSeq2Seq:
    """The encoder's graph and the decoder's, with the cache that goes round."""

    def __init__(self, export: Path, threads: int) -> None:
        made = [q for q in SUFFIXES if all((export / name).is_file() for name in graph_names(q))]
        if len(made) != 1:
            raise StepFailed(
                f"{export} has {len(made)} pairs of encoder and decoder, not one", "famc build makes it again"
            )
        self._encoder, self._decoder = (open_graph(export / name, threads) for name in graph_names(made[0]))
        shapes = {i.name: i.shape for i in self._decoder.get_inputs()}
        self._cache = {name: shape for name, shape in shapes.items() if name.startswith("past_key_values.")}
        present = cache_names(len(self._cache) // 4, "present")
        self._outputs = ["logits", *present]

    def encode(self, ids: Sequence[int]) -> Array:
        """[1, length, hidden] of a text."""
        row = np.asarray([ids], dtype=np.int64)
        feeds = {"input_ids": row, "attention_mask": np.ones_like(row)}
        found: Array = self._encoder.run(["last_hidden_state"], feeds)[0]
        return found

    def step(
        self, states: Array, ids: Sequence[int], past: dict[str, Array] | None = None
    ) -> tuple[Array, dict[str, Array]]:
        """Feed tokens after `past`; [length, vocabulary], and the cache with them."""
        if past is None:
            past = {n: np.zeros((1, s[1], 0, s[3]), np.float32) for n, s in self._cache.items()}
        feeds = {
            "input_ids": np.asarray([ids], dtype=np.int64),
            "encoder_hidden_states": states,
            "encoder_attention_mask": np.ones(states.shape[:2], dtype=np.int64),
            **past,
        }
        logits, *present = self._decoder.run(self._outputs, feeds)
        names = [name.replace("present", "past_key_values") for name in self._outputs[1:]]
        return logits[0], dict(zip(names, present, strict=True))

    def generate(self, ids: Sequence[int], start: int, max_new_tokens: int, eos: Set[int]) -> list[int]:
        """Greedy: the new ids, up to and with the first one in `eos`."""
        states, past = self.encode(ids), None
        new: list[int] = []
        while len(new) < max_new_tokens:
            logits, past = self.step(states, [new[-1] if new else start], past)
            new.append(int(logits[-1].argmax()))
            if new[-1] in eos:
                break
        return new


def compare_seq2seq(
    source: Path, export: Path, pairs: Sequence[tuple[str, str]], tokenizer: Any, threads: int,
    *, context: int = 512, max_new_tokens: int = 24,
) -> dict[str, float]:  # fmt: skip
    """`figures` of the answers' tokens, given what was asked: as the decoder reads them at once, and as it says them one
    by one (`cached_max_abs`); the encoder's states; and the share of greedy answers that are equal."""
    torch.set_num_threads(threads)
    model, graphs = load_t5(source), OnnxSeq2Seq(export, threads)
    start, settings = int(model.config.decoder_start_token_id), model.generation_config
    ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    found: list[tuple[Array, Array, Array]] = []
    states, cached, equal = [0.0], [0.0], []
    for asked, answer in pairs:
        ids, target = encode_source(tokenizer, asked, context), encode_target(tokenizer, answer, context)
        said = [start, *target[:-1]]
        with torch.inference_mode():
            read = model.encoder(input_ids=torch.tensor([ids])).last_hidden_state
            wanted = model(encoder_outputs=(read,), decoder_input_ids=torch.tensor([said])).logits[0].numpy()
            limits: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1}
            ours = model.generate(input_ids=torch.tensor([ids]), **limits)[0, 1:].tolist()
        encoded = graphs.encode(ids)
        states.append(float(np.abs(encoded - read.numpy()).max()))
        logits, _ = graphs.step(encoded, said)
        found.append((wanted, logits, np.asarray(target)))
        past: dict[str, Array] | None = None
        for at, token in enumerate(said[:max_new_tokens]):
            once, past = graphs.step(encoded, [token], past)
            cached.append(float(np.abs(once[-1] - wanted[at]).max()))
        equal.append(graphs.generate(ids, start, max_new_tokens, frozenset(ends)) == ours)
    return figures(found) | {
        "states_max_abs": float(np.max(states)),
        "cached_max_abs": float(np.max(cached)),
        "greedy_equal": float(np.mean(equal)),
        "prompts": float(len(equal)),
    }
