"""How long famc needs to plan, and to find nothing to do, at 60, 1,000 and 10,000 steps; doit and snakemake beside it.

    python benchmarks/graphs.py                   # famc alone
    python benchmarks/graphs.py --peers PYTHON    # beside doit and snakemake, which that interpreter has

The graph is famc's own: sizes x a chain of stages, each reading tokenizer, data and its parent (fan-in 3). The peers get the
same edges as file targets. Artifacts are stand-ins written through the store, as training 10,000 models would take a while.
Each figure is the median of five whole processes, start-up included.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIMITS = {60: 0.5, 1_000: 0.8, 10_000: 2.0}
MEMORY = 300e6
STAGES = 39


def spec_text(steps: int) -> str:
    """A family of about so many steps: chains of stages at as many sizes as needed."""
    per_size = (
        STAGES + 3 + 2
    )  # stages; an evaluation, a card, a release; one export with its parity … see count in the output
    sizes = max(1, steps // per_size)
    lines = [
        "famc: 1",
        "family: {name: wide, license: mit}",
        "arch: {type: qwen3, head_dim: 32, vocab_pad: 1024, context: 64}",
        "sizes:",
    ]
    lines += [
        f"  z{i}: {{layers: 2, hidden: {64 + 32 * (i % 8)}, ffn: {128 + 8 * i}, heads: 2, kv_heads: 1, tie: true}}"
        for i in range(sizes)
    ]
    lines += [
        "tokenizer: {vocab: 1024, train_on: {mix: docs}}",
        "data: {sources: {docs: {pystdlib: docs}, qa: {pystdlib: questions}}}",
        "stages:",
    ]
    lines += ["  t0: {kind: pretrain, data: docs, tokens: 10k}"]
    lines += [f"  t{i}: {{kind: sft, from: t{i - 1}, data: qa, steps: 10}}" for i in range(1, STAGES)]
    lines += ["variants:", f"  last: {{stage: t{STAGES - 1}, sizes: all, eval: chat}}"]
    lines += [
        "exports: [{variants: [last], format: onnx, quant: int4}]",
        "backends: {here: {use: cpu, cpu: 2, ram: 8GB}}",
    ]
    return "\n".join(lines) + "\n"


def fill(spec: Path, out: Path) -> int:
    """Commit a stand-in artifact for every step; how many there are."""
    from famc.graph import open_family
    from famc.job import base_record
    from famc.plan import plan
    from famc.store import Store

    made = plan(open_family(spec), out)
    store = Store(out / "store")
    os.fsync = lambda handle: None  # type: ignore[assignment]  # stand-ins need no durability
    outputs: dict[str, str] = {}
    for name, step in made.steps.items():
        job = made.job(name)
        folder = store.partial(name, step.key)
        folder.mkdir(parents=True)
        (folder / "model.txt").write_text(name)
        record = base_record(job, {role: outputs[a] for role, (a, _) in job.inputs.items()})
        store.commit(
            name, step.key, {**record, "metrics": {}, "seconds": 1.0, "cpu_seconds": 1.0, "peak_rss_bytes": 0}
        )
        outputs[name] = store.record(name, step.key)["output"]
    return len(made.steps)


def measure(command: list[str], cwd: Path, runs: int = 5) -> tuple[float, float, int]:
    """Median wall seconds, peak memory in bytes, exit code of the last run."""
    walls, code = [], 0
    for _ in range(runs):
        started = time.perf_counter()
        code = subprocess.run(
            command, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False
        ).returncode
        walls.append(time.perf_counter() - started)
    return statistics.median(walls), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024.0, code


def edges(spec: Path, out: Path) -> dict[str, list[str]]:
    """The same graph for the peers: step -> needs."""
    from famc.graph import open_family

    return {n.name: list(n.needs) for n in open_family(spec).nodes.values()}


def peer_files(graph: dict[str, list[str]], folder: Path) -> None:
    """A dodo.py and a Snakefile whose targets are files made by `touch`."""
    names = {name: f"a{i}.txt" for i, name in enumerate(graph)}
    rows = [(names[n], [names[d] for d in needs]) for n, needs in graph.items()]
    (folder / "dodo.py").write_text(
        f"ROWS = {rows!r}\nDOIT_CONFIG = {{'verbosity': 0}}\ndef task_make():\n    for target, needs in ROWS:\n"
        "        yield {'name': target, 'actions': ['touch ' + target], 'file_dep': needs, 'targets': [target]}\n"
    )
    rules = [f"rule all:\n    input: {sorted(names.values())!r}\n"]
    rules += [
        f"rule r{i}:\n    input: {needs!r}\n    output: {target!r}\n    shell: 'touch {{output}}'\n"
        for i, (target, needs) in enumerate(rows)
    ]
    (folder / "Snakefile").write_text("\n".join(rules))
    for target, _ in rows:
        (folder / target).write_text("")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", metavar="PYTHON", help="an interpreter that has doit and snakemake")
    parser.add_argument("--steps", type=int, nargs="*", default=list(LIMITS))
    args = parser.parse_args()
    missed = 0
    famc = [sys.executable, "-m", "famc.cli"]
    for wanted in args.steps:
        folder = Path(tempfile.mkdtemp(prefix="famc-graphs-"))
        spec, out = folder / "wide.yaml", folder / "out"
        spec.write_text(spec_text(wanted))
        plan_s, memory, code = measure([*famc, "plan", str(spec), "--out", str(out)], folder)
        assert code == 0, "famc plan failed"
        steps = fill(spec, out)
        build_s, more, code = measure([*famc, "build", str(spec), "--out", str(out)], folder)
        assert code == 0, "famc build failed"
        limit = LIMITS.get(wanted)
        holds = limit is None or (plan_s <= limit and build_s <= limit and max(memory, more) <= MEMORY)
        missed += not holds
        print(f"{'ok  ' if holds else 'MISS'} {steps:>6} steps: famc plan {plan_s:.2f} s, nothing to do {build_s:.2f} s (<= {limit} s), "
              f"{max(memory, more) / 1e6:.0f} MB (<= 300)", flush=True)  # fmt: skip
        if args.peers:
            peer = folder / "peer"
            peer.mkdir()
            peer_files(edges(spec, out), peer)
            doit = [args.peers, "-m", "doit", "run"]
            subprocess.run(doit, cwd=peer, stdout=subprocess.DEVNULL, check=True)
            seconds, _, code = measure(doit, peer, 3)
            print(f"            doit, nothing to do {seconds:.2f} s (exit {code})", flush=True)
            if steps <= 1_500:
                snake = [args.peers, "-m", "snakemake", "-c1", "--quiet", "all"]
                subprocess.run(
                    [*snake, "--touch"],
                    cwd=peer,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    check=False,
                )
                seconds, _, code = measure(snake, peer, 1)
                print(f"            snakemake, nothing to do {seconds:.2f} s (exit {code})", flush=True)
        shutil.rmtree(folder)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
