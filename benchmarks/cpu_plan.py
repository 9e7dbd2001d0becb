"""What `famc plan` says of each training step of the example family, against what the build took: steps over 5 s within 25 %.

    python benchmarks/cpu_plan.py --store generated/pydoc/store              # with this machine's `famc calibrate`
    python benchmarks/cpu_plan.py --store … --rates benchmarks/data/cpu_steps.json   # with a CPU's stored figures
    python benchmarks/cpu_plan.py --store … --all                            # evaluations and mining too

A step counts where the store has an artifact with the same parameters, of whatever inputs. CPU-seconds are compared: jobs that share a machine wait for
each other; with one thread they are the wall time of a job that is alone (shown too). Exit 1 if a training step of over 5 s is
further off than 25 %, or none was found.

Of the example's own jobs this is no score on unseen data: how much text there is (templates, inverse cloze), how pairs are cut into
passes and how long a job takes to start were looked at in such records.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from famc.backend import Accelerator, detect_cpu, local_cpu
from famc.calibrate import accelerator
from famc.graph import open_family
from famc.plan import plan
from famc.store import Store, read_record

PROMISE, LEAST = 0.25, 5.0
SPEC = Path(__file__).parents[1] / "specs" / "pydoc.yaml"
PROFILES = (None, "compare", "others")


@dataclass(frozen=True)
class Row:
    """A step: what was said of it, what it took."""

    name: str
    kind: str
    training: bool
    basis: str
    said: float
    cpu: float
    wall: float

    @property
    def error(self) -> float:
        return self.said / self.cpu - 1


def stored_cpu(file: Path) -> Accelerator:
    """The backend that a stored measurement makes."""
    rates = json.loads(file.read_text(encoding="utf-8"))
    return accelerator({"residual": rates["job_residual"], **rates["rates"]}, detect_cpu())


def score(
    store: Path, spec: Path, cpu: Accelerator, profiles: Sequence[str | None] = PROFILES
) -> Iterator[Row]:
    """Every step of the spec's profiles whose artifact lies in the store, once."""
    kept, seen = Store(store), set()
    for profile in profiles:
        made = plan(open_family(spec, profile=profile), store.parent, local=cpu)
        for name, step in made.steps.items():
            if step.node.shape is None or step.node.work.mode == "cpu":
                continue
            for folder in kept.scan().get(name, []):
                record = read_record(folder)
                alike = _plain(record.get("identity", {}).get("params")) == _plain(step.node.params)
                if not alike or folder in seen or not record.get("cpu_seconds"):
                    continue
                seen.add(folder)
                yield Row(
                    name, step.node.kind, step.node.work.mode == "train", step.basis, step.seconds,
                    float(record["cpu_seconds"]), float(record["seconds"]),
                )  # fmt: skip


def _plain(value: Any) -> Any:
    """As JSON keeps it."""
    return json.loads(json.dumps(value))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--spec", type=Path, default=SPEC)
    parser.add_argument("--rates", type=Path)
    parser.add_argument("--all", action="store_true")
    asked = parser.parse_args()
    cpu, why = (stored_cpu(asked.rates), ()) if asked.rates else local_cpu(asked.spec)
    for line in why:
        print(line)
    held, worst, found = True, 0.0, 0
    for row in score(asked.store.resolve(), asked.spec, cpu):
        if not (row.training or asked.all):
            continue
        counts = row.training and row.cpu > LEAST
        found += counts
        if counts:
            worst = max(worst, abs(row.error))
            held &= abs(row.error) <= PROMISE
        print(
            f"{row.name:28} {row.kind:9} said {row.said:6.1f} s ({row.basis}), took {row.cpu:6.1f} s of CPU, "
            f"{row.wall:6.1f} s  {row.error:+5.0%}{'' if counts else '  not counted'}"
        )
    print(
        f"{found} training steps over {LEAST:g} s, worst {worst:.0%}: {'held' if held and found else 'not held'}"
    )
    return 0 if held and found else 1


if __name__ == "__main__":
    sys.exit(main())
