"""One step, ready to run: the JSON that a worker reads. Local runs, sbatch scripts and pods all run the same
job file.

In: what the plan decided. Out: `python -m famc.work JOB.json`. Nothing here decides; a worker obeys. Of
its fields `kind`, `version`, `params` and the inputs' keys bear identity (they are the key); all else
moves work around.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from famc.store import digest


@dataclass(frozen=True)
class Job:
    """A step with its inputs' folders, its place in the store, and the means that the plan gives it."""

    name: str
    kind: str
    key: str
    store: str
    params: Mapping[str, Any] = field(default_factory=dict)
    runtime: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # role -> (address, key)
    version: int = 1
    seed: int = 0
    threads: int = 1
    precision: str = "fp32"
    micro_batch: int | None = None
    recompute: str = "none"
    memory: float = 0.0  # bytes that the plan expects
    seconds: float = 0.0  # that the plan expects
    because: tuple[str, ...] = ()
    log: str = ""
    metrics: str = ""  # JSON lines, one a training step: what trackers and the live view read
    offline: bool = True

    @property
    def identity(self) -> dict[str, Any]:
        """What the key is the hash of."""
        return preimage(
            self.kind, self.version, self.params, {role: key for role, (_, key) in self.inputs.items()}
        )

    def to_json(self) -> str:
        """The job file's text, stable from run to run."""
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Job:
        """Read a job file."""
        values = json.loads(text)
        values["inputs"] = {role: tuple(pair) for role, pair in values["inputs"].items()}
        values["because"] = tuple(values["because"])
        return cls(**values)

    def progress(self, done: float, total: float, **numbers: float) -> None:
        """Append a line to the job's metrics file: the live view, trackers and `famc report` read it."""
        if self.metrics:
            line = {"time": round(time.time(), 3), "done": done, "total": total, **numbers}
            with Path(self.metrics).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    @classmethod
    def for_test(cls, name: str, kind: str, params: Mapping[str, Any], **more: Any) -> Job:
        """A job that belongs to no plan, for trying a worker on a folder."""
        return cls(name=name, kind=kind, key="0" * 64, store="", params=params, **more)


def preimage(kind: str, version: int, params: Mapping[str, Any], inputs: Mapping[str, str]) -> dict[str, Any]:
    """All that bears a step's identity. `schema` is the version of this very composition."""
    return {"schema": KEY_SCHEMA, "kind": kind, "version": version, "params": params, "inputs": inputs}


def content(job: Job, outputs: Mapping[str, str]) -> str:
    """Like the key, but from the inputs' bytes: equal content gives equal output whatever their keys are.

    `outputs`: role -> digest of the input's files."""
    return digest(preimage(job.kind, job.version, job.params, outputs))


def base_record(job: Job, outputs: Mapping[str, str]) -> dict[str, Any]:
    """The part of an artifact's record that follows from the job alone."""
    return {
        "name": job.name,
        "kind": job.kind,
        "key": job.key,
        "inputs": dict(job.inputs.values()),
        "seed": job.seed,
        "identity": job.identity,
        "content": content(job, outputs),
    }


KEY_SCHEMA = 1
