"""Artifacts as the pipeline makes them, but tiny: a tokenizer, a model that knows some chats, and data."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tiny_model import CONVERSATION, TEXTS, make_tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

CHATS = [
    [
        {"role": "user", "content": "What does bread need?"},
        {"role": "assistant", "content": "Flour and salt."},
    ],
    [{"role": "user", "content": "And the oven?"}, {"role": "assistant", "content": "Heat, and patience."}],
    [
        {"role": "system", "content": "You are terse."},
        {"role": "user", "content": "Who counts the ships before the fog comes in?"},
        {"role": "assistant", "content": "The lighthouse keeper."},
        {"role": "user", "content": "How many?"},
        {"role": "assistant", "content": "Seven."},
    ],
]
PARAMS = {"texts": 4, "prompts": 3, "max_new_tokens": 12, "context": 64}
_words = random.Random(0)
DOCUMENTS = [
    *TEXTS,
    *(" ".join(_words.choices(" ".join(TEXTS).split(), k=k)) for k in (3, 40, 90, 7)),
]


def make_tokenizer(folder: Path) -> Path:
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    rendered = tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    ids = tokenizer.apply_chat_template(CONVERSATION, return_dict=True)["input_ids"]
    golden = {"conversation": CONVERSATION, "rendered": rendered, "ids": ids}
    (folder / "golden.json").write_text(json.dumps(golden))
    return folder


def make_model(folder: Path, tokenizer: Path, *, steps: int = 0, kind: Any = "qwen3", **more: Any) -> Path:
    """A model folder that holds the tokenizer's files; after `steps` it has CHATS by heart."""
    make_tiny_model(folder, kind, **({"initializer_range": 0.02} if steps else {}), **more)
    (folder / "chat_template.jinja").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, folder / name)
    if steps:
        words = AutoTokenizer.from_pretrained(tokenizer)
        model = AutoModelForCausalLM.from_pretrained(folder)
        rows = [words.apply_chat_template(chat, return_dict=True)["input_ids"] for chat in CHATS]
        rows += [[0, *words(text)["input_ids"], 0] for text in TEXTS]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        labels = torch.tensor([row + [-100] * (width - len(row)) for row in rows])
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        for _ in range(steps):
            model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(folder)
    return folder


def make_data(folder: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """heldout.parquet; what is not text becomes JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    table = [
        {
            "id": row.get("id", f"doc-{index}"),
            "group": "g",
            **{k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items() if k != "id"},
        }
        for index, row in enumerate(rows)
    ]
    pq.write_table(pa.Table.from_pylist(table), folder / "heldout.parquet")
    return folder


def content(folder: Path) -> dict[str, bytes]:
    """Every byte of a folder."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }
