"""Embedders and rerankers, ready to run: a released graph in ONNX Runtime, a GGUF file in llama.cpp, a folder of weights
in torch.

In: what a tokenizer makes of some texts. Out: an embedder's vectors, or a reranker's logits.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from famc.errors import StepFailed
from famc.work.likelihood import load_tokenizer
from famc.work.onnx_encoder import EncoderTask, load_encoder
from famc.work.onnx_session import open_graph
from famc.work.scores import read_json

Array = np.ndarray[Any, np.dtype[Any]]
Batch = Mapping[str, Array]  # input_ids, attention_mask and, for BERT, token_type_ids: [rows, length] each
MAX_LENGTH = 512  # tokens of a text: cost grows with the square, and damage shows in the first page
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
OUTPUTS: dict[EncoderTask, str] = {"feature-extraction": "sentence_embedding", "text-ranking": "logits"}


class Encoder(Protocol):
    """What can be compared: an embedder or a reranker."""

    def outputs(self, batch: Batch) -> Array:
        """[rows, hidden] vectors, or [rows, labels] logits."""
        ...


class OnnxEncoder:
    """A graph with `sentence_embedding` or `logits`, as a user of the released file runs it."""

    def __init__(self, path: Path, threads: int, task: EncoderTask) -> None:
        self._session = open_graph(path, threads)
        self._names = [i.name for i in self._session.get_inputs()]
        self._output = OUTPUTS[task]
        there = [o.name for o in self._session.get_outputs()]
        if self._output not in there:
            raise StepFailed(
                f"{path} has no {self._output}: its outputs are {', '.join(there)}",
                "famc build makes it again",
            )

    def outputs(self, batch: Batch) -> Array:
        """[rows, hidden] vectors, or [rows, labels] logits."""
        found: Array = self._session.run([self._output], {name: batch[name] for name in self._names})[0]
        return found


class TorchEncoder:
    """The reference: the model folder in fp32, with the pooling that its files ask for."""

    def __init__(self, model_dir: Path, threads: int, task: EncoderTask) -> None:
        torch.set_num_threads(threads)
        self._model, self._pooling = load_encoder(model_dir, task)
        config: Any = self._model.config
        self.positions = int(config.max_position_embeddings)  # the longest input
        self._names = [n for n in INPUTS if n != "token_type_ids" or config.model_type == "bert"]

    def outputs(self, batch: Batch) -> Array:
        """[rows, hidden] vectors, or [rows, labels] logits."""
        tensors = {name: torch.from_numpy(batch[name]) for name in self._names}
        with torch.inference_mode():
            found = self._model(**tensors)
            if self._pooling is None:
                logits: Array = found.logits.numpy()
                return logits
            vectors: Array = self._pooling(found.last_hidden_state, tensors["attention_mask"]).numpy()
            return vectors


def opened(export: Path, threads: int, task: EncoderTask) -> Encoder:
    """What was made of a model: a graph, a GGUF file, or a folder of weights."""
    if export.suffix == ".gguf":
        from famc.work.llama_cpp import LlamaEncoder

        return LlamaEncoder(export, threads, MAX_LENGTH)
    return TorchEncoder(export, threads, task) if export.is_dir() else OnnxEncoder(export, threads, task)


def gguf_ids(model: Path, file: Path, texts: list[str], task: str, threads: int) -> dict[str, str]:
    """`exact` or `differs`, for ids: an embedder's or reranker's GGUF file, which brings its own tokenizer and marks,
    against the model's. Texts are normalised first, as the model does it (NFC): llama.cpp does not."""
    from famc.work.llama_cpp import LlamaEncoder

    words, candidate = load_tokenizer(model), LlamaEncoder(file, threads, MAX_LENGTH)
    normalizer = words.backend_tokenizer.normalizer
    clean = [normalizer.normalize_str(text) if normalizer else text for text in texts]
    if task == "feature-extraction":
        same = all(candidate.tokenize_marked(text) == words(text)["input_ids"] for text in clean)
    else:
        same = all(candidate.tokenize_pair(*p) == words(*p)["input_ids"] for p in itertools.pairwise(clean))
    return {"tokenizer": "exact" if same else "differs"}


def prompts_of(model_dir: Path) -> dict[str, str]:
    """What an embedder writes before a text, by what the text is (`query`, `document`); {} if it says nothing."""
    path = model_dir / "config_sentence_transformers.json"
    found = (read_json(path).get("prompts") or {}) if path.is_file() else {}
    return {str(name): str(text) for name, text in found.items()}


def encode(
    tokenizer: Any, texts: Sequence[str], others: Sequence[str] | None = None, *, max_length: int
) -> dict[str, Array]:
    """A padded batch of texts, or of pairs with `others`, cut to `max_length` tokens."""
    made = tokenizer(
        list(texts),
        None if others is None else list(others),
        padding=True,
        truncation=True,
        max_length=max_length,
        return_token_type_ids=True,
        return_attention_mask=True,
    )
    return {name: np.asarray(made[name], dtype=np.int64) for name in INPUTS}


def longest(tokenizer: Any, positions: int, wanted: int) -> int:
    """So many tokens as are wanted, or as the model and its tokenizer can do."""
    return min(wanted, positions, int(tokenizer.model_max_length))
