"""`--smoke`: the same graph with 2-layer models and a few steps, to rehearse a build before money is spent.

In: a sound family. Out: (path, value) pairs to lay over its document. Sizes, budgets and samples shrink;
names, edges, kinds and formats stay. What is adopted can't shrink: a tokenizer keeps its rows, a
checkpoint the shape of its sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from famc.spec.family import Family, Size

Path = tuple[str | int, ...]
CONTEXT = 64
VOCAB = 768
TOKENS = 8_000
WIDTH = 64
EPOCHS = 1000.0  # the samples are so small that they must repeat


def shrink(family: Family) -> Iterator[tuple[Path, Any]]:
    """What `--smoke` changes."""
    adopted = _adopted_sizes(family)
    if not adopted:
        yield ("arch", "context"), CONTEXT
        yield ("arch", "head_dim"), 32
    if not adopted and family.tokenizer.adopt is None:
        yield ("arch", "vocab_pad"), VOCAB
        yield ("tokenizer", "vocab"), VOCAB
    for name, size in family.sizes.items():
        if adopted:
            break
        yield ("sizes", name), _size(family, size)
    if family.tokenizer.train_on is not None:
        yield ("tokenizer", "train_on", "bytes"), 300_000
    for name, source in family.data.sources.items():
        yield ("data", "sources", name, "n"), 200
        if source.installed:  # all that is read to draw from it
            yield ("data", "sources", name, "installed"), list(source.installed[-1:])
    for name, mix in family.data.mixes.items():
        if mix.tokens is not None:
            yield ("data", "mixes", name, "tokens"), TOKENS
        yield ("data", "mixes", name, "max_epochs"), EPOCHS
    for name, stage in family.stages.items():
        if stage.kind != "adopt":
            yield from _stage(("stages", name), stage)
    for name, suite in family.evals.items():
        for index, _ in enumerate(suite):
            yield ("evals", name, index, "n"), 4
            yield ("evals", name, index, "max_new_tokens"), 4


def _size(family: Family, size: Size) -> dict[str, Any]:
    """Two blocks of the size's own architecture."""
    arch = size.arch or family.arch.type
    small: dict[str, Any] = {"arch": size.arch} if size.arch else {}
    # a cross-encoder that begins with words has one head
    small |= {"layers": 2, "hidden": WIDTH, "heads": 1 if size.heads == 1 and arch == "bert" else 2}
    if arch in ("bert", "modernbert", "t5"):  # always as many key/value heads as heads, always tied
        return small | {"ffn": 128}
    small |= {"kv_heads": 1, "tie": True}
    moe = size.moe is not None or "-a" in (size.preset or "") or arch.endswith("_moe")
    return small | ({"moe": {"experts": 4, "active": 2, "ffn": 64}} if moe else {"ffn": 128})


def _retrieval(path: Path, said: Callable[[str], Any]) -> Iterator[tuple[Path, Any]]:
    """What embedders and rerankers say, of a stage or of its values for a group."""
    if said("mrl"):  # prefixes of the small models' vectors
        yield (*path, "mrl"), [WIDTH // 2]
    if said("lexical") is not None:
        yield (*path, "lexical"), {"epochs": 1.0, "batch": 16}
    if said("hard_negatives") is not None:
        yield (*path, "hard_negatives", "k"), 2


def _stage(path: Path, stage: Any) -> Iterator[tuple[Path, Any]]:
    yield (*path, "steps"), 3
    yield (*path, "context"), CONTEXT
    batch = {"global_batch": 4} if hasattr(stage, "global_batch") else {"batch_tokens": 8 * CONTEXT}
    for key, value in batch.items():
        yield (*path, key), value
    fixed = {"steps", "tokens", "epochs", "context", "micro_batch", "checkpoint_steps", *batch}
    for group, values in stage.by.items():
        for key in sorted(fixed & set(values)):
            yield (*path, "by", group, key), dict(steps=3, context=CONTEXT, **batch).get(key, 1)
    yield from _retrieval(path, lambda field: getattr(stage, field, None))
    for group, values in stage.by.items():
        yield from _retrieval((*path, "by", group), values.get)
    if not isinstance(stage.data, str | None):
        if stage.data.tokens is not None:
            yield (*path, "data", "tokens"), TOKENS
        yield (*path, "data", "max_epochs"), EPOCHS


def _adopted_sizes(family: Family) -> bool:
    """Whether some stage starts from a checkpoint that already has a shape."""
    return any(stage.kind == "adopt" for stage in family.stages.values())
