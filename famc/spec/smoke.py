"""`--smoke`: the same graph with 2-layer models and a few steps, to rehearse a build before money is spent.

In: the spec's plain values. Out: (path, value) pairs to lay over them. Sizes, budgets and samples shrink; names, edges,
kinds and formats stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Path = tuple[str | int, ...]
CONTEXT = 64
VOCAB = 768


def shrink(data: dict[str, Any]) -> Iterator[tuple[Path, Any]]:
    """What `--smoke` changes."""
    arch = data.get("arch")
    if isinstance(arch, dict):
        yield ("arch", "context"), CONTEXT
        yield ("arch", "head_dim"), 32
        yield ("arch", "vocab_pad"), VOCAB
    for name, size in _items(data.get("sizes")):
        moe = isinstance(size, dict) and size.get("moe") or (isinstance(size, str) and "-a" in size)
        small: dict[str, Any] = {"layers": 2, "hidden": 64, "heads": 2, "kv_heads": 1, "tie": True}
        small |= {"moe": {"experts": 4, "active": 2, "ffn": 64}} if moe else {"ffn": 128}
        yield ("sizes", name), small
    tokenizer = data.get("tokenizer")
    if isinstance(tokenizer, dict) and "adopt" not in tokenizer:
        yield ("tokenizer", "vocab"), VOCAB
        if isinstance(tokenizer.get("train_on"), dict):
            yield ("tokenizer", "train_on", "bytes"), 300_000
    for name, source in _items((data.get("data") or {}).get("sources") if isinstance(data.get("data"), dict) else None):
        if isinstance(source, dict):
            yield ("data", "sources", name, "n"), 200
    for name, mix in _items((data.get("data") or {}).get("mixes") if isinstance(data.get("data"), dict) else None):
        if isinstance(mix, dict):
            yield ("data", "mixes", name, "tokens"), 8_000
            yield ("data", "mixes", name, "max_epochs"), 1000.0
    for name, stage in _items(data.get("stages")):
        if not isinstance(stage, dict) or stage.get("kind") == "adopt":
            continue
        yield ("stages", name, "steps"), 3
        yield ("stages", name, "context"), CONTEXT
        if stage.get("kind") == "dpo":
            yield ("stages", name, "global_batch"), 4
        else:
            yield ("stages", name, "batch_tokens"), 8 * CONTEXT
        if isinstance(stage.get("data"), dict):
            yield ("stages", name, "data", "tokens"), 8_000
            yield ("stages", name, "data", "max_epochs"), 1000.0
        for group, _ in _items(stage.get("by")):
            yield ("stages", name, "by", group), {}
    for name, suite in _items(data.get("evals")):
        for index, task in enumerate(suite if isinstance(suite, list) else ()):
            if isinstance(task, dict):
                yield ("evals", name, index, "n"), 4
                yield ("evals", name, index, "max_new_tokens"), 4


def _items(value: Any) -> list[tuple[str, Any]]:
    return list(value.items()) if isinstance(value, dict) else []
