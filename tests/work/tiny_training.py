"""Jobs of the trained kinds at a tiny shape: the parameters a spec resolves to, mixes on disk, and runs of a
worker.
"""

from __future__ import annotations

import importlib
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file
from tiny_artifacts import CHATS, make_tokenizer

from famc.cost.shape import Moe, Shape
from famc.job import Job
from famc.steps import STAGES
from famc.steps.base import RUNTIME, Amount, Setting, Training
from famc.steps.shapes import shape_values

CONTEXT = 64
SHAPE = Shape("qwen3", 384, 2, 32, 64, 2, 1, 16, True, CONTEXT)
MOE = Shape("qwen3_moe", 384, 2, 32, 64, 2, 1, 16, True, CONTEXT, moe=Moe(4, 2, 32))


def values(kind: str, shape: Shape = SHAPE, **written: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(params, runtime) of a stage, as the graph makes them."""
    needed: dict[str, Any] = {"kind": kind, "context": CONTEXT, "steps": 4, "lr": {"peak": 3e-3}}
    if kind != "dpo":
        needed["batch_tokens"] = 4 * CONTEXT
    if kind == "distill":
        needed["teacher"] = "t"
    stage = STAGES[kind].model_validate(needed | written)
    assert isinstance(stage, Training)
    resolved = dict(stage.resolve(Setting(shape, 30_000, Amount(1e4, 50)), lambda _: None).values)
    resolved["seed"] = 3
    resolved["shape"] = shape_values(shape, resolved)
    resolved = json.loads(json.dumps(resolved))
    return resolved, {key: resolved.pop(key) for key in sorted(RUNTIME) if key in resolved}


def make_job(kind: str, *, shape: Shape = SHAPE, job: Mapping[str, Any] | None = None, **written: Any) -> Job:
    """A job of a kind, with a stage's fields as a spec would write them."""
    params, runtime = values(kind, shape, **written)
    precision = params["precision"] if params["precision"] != "auto" else "fp32"
    return Job.for_test(f"t/{kind}", kind, params, runtime=runtime, precision=precision, **(job or {}))


def run(job: Job, inputs: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """The worker's metrics; its files lie in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = importlib.import_module(f"famc.work.{job.kind}").run(job, dict(inputs), out)
    return result


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    """Bit for bit the same weights."""
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def furthest(one: Path, other: Path) -> float:
    """The largest difference of any weight."""
    a, b = weights(one), weights(other)
    return max(float((a[k] - b[k]).abs().max()) for k in a)


def text_mix(folder: Path, tokens: int = 3000, vocab: int = 384, seed: int = 0) -> Path:
    """A stream of documents that repeat short phrases: something to learn."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    phrases = [[draw.randrange(3, vocab) for _ in range(draw.randrange(3, 9))] for _ in range(12)]
    stream: list[int] = []
    while len(stream) < tokens:
        for _ in range(draw.randrange(2, 8)):
            stream += draw.choice(phrases)
        stream.append(0)
    np.save(folder / "tokens.npy", np.array(stream[:tokens], dtype=np.uint16))
    (folder / "stats.json").write_text(json.dumps({"end_id": 0}))
    return folder


def chat_mix(folder: Path, chats: Sequence[Any] = CHATS) -> Path:
    return _parquet(folder, [{"messages": json.dumps(chat)} for chat in chats])


def pair_mix(folder: Path, count: int = 8) -> Path:
    """Preferences that follow one rule: `Yes.` before `No …`."""
    rows = []
    for index in range(count):
        prompt = [{"role": "user", "content": f"What does bread need, and who counted {index}?"}]
        chosen = [{"role": "assistant", "content": "Flour and salt." if index % 2 else "Heat."}]
        rejected = [{"role": "assistant", "content": "No ships before the fog" + " and no" * (index % 3)}]
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return _parquet(folder, [{k: json.dumps(v) for k, v in row.items()} for row in rows])


def _parquet(folder: Path, rows: list[dict[str, str]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"id": str(index), "source": "s", **row} for index, row in enumerate(rows)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "examples.parquet")
    return folder


def tokenizer(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return make_tokenizer(folder)
