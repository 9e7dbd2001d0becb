"""A small family, a machine that is the same everywhere, and a worker that trains nothing: what the tests of
a build share.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from famc.backend import Accelerator, load_accelerator
from famc.graph import open_family
from famc.job import Job, base_record
from famc.plan import Plan, plan
from famc.store import Store, digest

SPEC = """\
famc: 1
family: {name: toy, org: me, license: mit, seed: 7, languages: [en]}
arch: {type: qwen3, head_dim: 32, vocab_pad: 512, context: 64}
sizes:
  m: {layers: 3, hidden: 64, ffn: 192, heads: 2, kv_heads: 1, tie: true}
  s: {layers: 2, hidden: 64, ffn: 128, heads: 2, kv_heads: 1, tie: true}
tokenizer: {vocab: 500, train_on: {mix: text, bytes: 100kB}}
data:
  sources:
    code: {path: data/code.jsonl, format: text, license: mit}
    qa:   {path: data/qa.jsonl, format: messages, license: mit}
  mixes:
    text: {tokens: 20k, weights: {code: 1}, max_epochs: 100}
stages:
  pretrain: {kind: pretrain, data: text, batch_tokens: 512, lr: 1e-3}
  sft:      {kind: sft, from: base, data: qa, epochs: 1}
variants:
  base:     {stage: pretrain, sizes: all, eval: lm}
  instruct: {stage: sft, sizes: all, eval: chat}
evals:
  lm:   [{task: bits_per_byte, data: code, n: 10}]
  chat: [{task: answers, data: qa, n: 10, max_new_tokens: 8}]
exports:
  - {variants: [instruct], format: onnx, quant: [fp32, int4], target: cpu}
gates:
  - {match: base, require: {bits_per_byte: {max: 9.0}}}
  - {match: "*/instruct", beats: base, suite: chat, metrics: [answer_loss]}
  - {match: "*/*/export.onnx-*", parity: {tokenizer: exact, kl: 0.05}}
backends: {laptop: {cpu: 2, ram: 8GB}}
profiles:
  quick: {data.mixes.text.tokens: 10k}
"""
TEXT = '{{"text": "document number {0} says that {0} is less than {1}"}}\n'
CHAT = (
    '{{"messages": [{{"role": "user", "content": "What follows {0}?"}},'
    ' {{"role": "assistant", "content": "{1}"}}]}}\n'
)


def write_spec(folder: Path, *edits: tuple[str, str], text: str = SPEC) -> Path:
    """The family's file with its data beside it; each edit replaces the only place of a text."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for name, line in (("code", TEXT), ("qa", CHAT)):
        lines = "".join(line.format(i, i + 1) for i in range(40))
        (folder / "data" / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    for old, new in edits:
        assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times"
        text = text.replace(old, new)
    path = folder / "toy.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def machine(cores: int = 2, memory_gb: float = 8.0) -> Accelerator:
    """A CPU that every test machine can be taken for."""
    return load_accelerator("cpu").with_cores(cores).model_copy(update={"memory_gb": memory_gb})


def toy_plan(folder: Path, *edits: tuple[str, str], names: Iterable[str] | None = None, **more: Any) -> Plan:
    """The plan of the small family below a folder; its store is `<folder>/out/store`."""
    graph = open_family(write_spec(folder, *edits), **more)
    return plan(graph, folder / "out", names=names, local=machine())


class Fake:
    """Stands for the processes of a build. Bytes follow from a step's parameters and its inputs' bytes.

    `fail`: steps that exit 1 with a reason. `same`: steps whose bytes do not depend on their parameters.
    `during`: called inside each job. `spans`: when each ran; `most`: threads and bytes planned at once.
    """

    def __init__(
        self, plan: Plan | None, *, fail: Iterable[str] = (), same: Iterable[str] = (), seconds: float = 0.0,
        during: Callable[[Job], None] = lambda job: None, metrics: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.plan, self.fail, self.same, self.seconds = plan, set(fail), set(same), seconds
        self.during, self.metrics = during, dict(metrics or {})
        self.ran: list[str] = []
        self.spans: dict[str, tuple[float, float]] = {}
        self.running: set[str] = set()
        self.most = {"threads": 0, "memory": 0.0, "jobs": 0}
        self.lock = threading.Lock()

    def __call__(self, job: Job) -> int:
        started = time.monotonic()
        with self.lock:
            self.ran.append(job.name)
            self.running.add(job.name)
            busy = [self.plan.steps[name] for name in self.running] if self.plan else []
            now = {
                "threads": sum(s.threads for s in busy),
                "memory": sum(s.memory.total for s in busy),
                "jobs": len(busy),
            }
            self.most = {key: max(self.most[key], now[key]) for key in now}
        try:
            self.during(job)
            time.sleep(self.seconds)
            return self._work(job)
        finally:
            with self.lock:
                self.running.discard(job.name)
                self.spans[job.name] = (started, time.monotonic())

    def _work(self, job: Job) -> int:
        Path(job.log).write_text("", encoding="utf-8")
        if job.name in self.fail:
            Path(job.log).write_text(f"error: {job.name}: it was told to fail\n", encoding="utf-8")
            return 1
        store = Store(Path(job.store))
        outputs = {role: store.record(address, key)["output"] for role, (address, key) in job.inputs.items()}
        folder = store.partial(job.name, job.key)
        folder.mkdir(parents=True, exist_ok=True)
        params = {} if job.name in self.same else job.params
        (folder / "output.txt").write_text(digest([job.name, params, outputs]), encoding="utf-8")
        if job.kind == "release":
            (folder / "release.json").write_text("{}", encoding="utf-8")
            (folder / "onnx").mkdir(exist_ok=True)
            (folder / "onnx" / "model.onnx").write_bytes(b"\0" * 1_200_000)
        record = {
            "metrics": {"score": 1.0, **self.metrics},
            "seconds": 0.5,
            "cpu_seconds": 0.5,
            "versions": {},
            "host": {},
        }
        store.commit(job.name, job.key, {**base_record(job, outputs), **record})
        return 0
