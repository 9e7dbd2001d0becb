"""Embedders and rerankers in ONNX load where people load them, offline, and give torch's vectors and logits there:
transformers.js in Node, and sentence-transformers' ONNX backend. A client that is missing fails these tests.

What a folder needs for that, beside the graph, is in tiny_encoder.py: modules.json with the names before
sentence-transformers 6, and tokenizer_config.json with a class that transformers 4 knows, the side of the padding, and
no chat template.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clients import sentence_transformers, transformers_js
from tiny_encoder import DOCUMENTS, POOLING, QUERIES, encoder_tokenizer, make_tiny_encoder

from famc.work.encoder_session import TorchEncoder, encode
from famc.work.onnx_encoder import build_encoder

pytestmark = pytest.mark.slow

EMBED, RANK = "feature-extraction", "text-ranking"
ROWS = [
    (kind, task) for kind in ("bert", "modernbert", "qwen3", "qwen3-bidirectional") for task in (EMBED, RANK)
]
QUANTS = ("fp32", "int8", "int4")
TEXTS = DOCUMENTS[:9]  # lengths differ: every batch is padded
PAIRS = [[query, document] for query in QUERIES[:3] for document in DOCUMENTS[:4]]
JS_POOLING = {"mean_tokens": "mean", "cls_token": "cls", "lasttoken": "last_token"}
EXACT = 1e-5


@dataclass(frozen=True)
class Exported:
    """A folder with both graphs, their files by quantisation, and torch's vectors or logits."""

    folder: Path
    files: dict[str, str]
    wanted: np.ndarray


@pytest.fixture(scope="session")
def exported(tmp_path_factory) -> Callable[[str, str], Exported]:
    """Folders by kind and task, each made on first demand."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("encoders")
    made: dict[tuple[str, str], Exported] = {}

    def get(kind: Any, task: Any) -> Exported:
        if (kind, task) not in made:
            ranks = {"labels": 1, "steps": 40} if task == RANK else {}
            folder = make_tiny_encoder(root / f"{kind}-{task}", kind, **ranks)
            files = {quant: str(build_encoder(folder, folder, quant, task=task)["file"]) for quant in QUANTS}
            texts = (TEXTS,) if task == EMBED else tuple(list(side) for side in zip(*PAIRS, strict=True))
            batch = encode(encoder_tokenizer(kind), *texts, max_length=96)
            made[kind, task] = Exported(folder, files, TorchEncoder(folder, 1, task).outputs(batch))
        return made[kind, task]

    return get


def near(found: Any, wanted: np.ndarray, quant: str) -> None:
    """torch's numbers to rounding; in int8 and int4 nearly the same directions, or the same order."""
    got = np.asarray(found, dtype=np.float64).reshape(wanted.shape)
    if quant == "fp32":
        assert np.abs(got - wanted).max() <= EXACT
    elif wanted.shape[1] > 1:
        cosine = (got * wanted).sum(1) / np.linalg.norm(got, axis=1) / np.linalg.norm(wanted, axis=1)
        assert cosine.min() >= {"int8": 0.99, "int4": 0.93}[quant]
    else:
        assert np.corrcoef(got[:, 0], wanted[:, 0])[0, 1] >= {"int8": 0.97, "int4": 0.95}[quant]


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize(("kind", "task"), ROWS)
def test_transformers_js(exported, kind, task, quant):
    """`sentence_embedding` and raw logits; and the feature-extraction pipeline, which pools by itself."""
    made = exported(kind, task)
    asked: dict[str, Any] = {"task": task, "folder": str(made.folder), "dtype": quant}
    if task == RANK:
        answer = transformers_js(asked | {"pairs": PAIRS})
        near(answer["logits"], made.wanted, quant)
        return
    pooling = JS_POOLING[POOLING.get(kind, "lasttoken")]
    answer = transformers_js(asked | {"texts": TEXTS, "pooling": pooling, "normalize": True})
    assert answer["input_ids"] == [encoder_tokenizer(kind)(text)["input_ids"] for text in TEXTS]
    near(answer["sentence_embedding"], made.wanted, quant)
    near(answer["pooled"], made.wanted, quant)


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize(("kind", "task"), ROWS)
def test_sentence_transformers(exported, kind, task, quant):
    """Its ONNX backend on the graph, beside its torch on the weights in the same folder."""
    made = exported(kind, task)
    texts = {"texts": TEXTS} if task == EMBED else {"pairs": PAIRS}
    answer = sentence_transformers(
        {"task": task, "folder": str(made.folder), "file": made.files[quant], **texts}
    )
    near(answer["onnx"], made.wanted, quant)
    # transformers 4 has no `is_causal` for Qwen3: only the graph is bidirectional there
    if kind != "qwen3-bidirectional":
        near(answer["torch"], made.wanted, "fp32")
