"""Rerankers by objective and embedders by negatives, each compared at equal compute, on held-out modules.

    python benchmarks/retrieval.py             # builds what is missing of `--profile compare` in generated/pydoc, prints the tables

Every figure comes from an evaluation's results.json: nDCG@10 with its standard error and a 95 % bootstrap interval over queries.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from famc.graph import open_family
from famc.plan import plan
from famc.store import Store

ROOT = Path(__file__).resolve().parent.parent
SPEC = ROOT / "specs" / "pydoc.yaml"
RERANKERS = {
    "reranker": "its lexical start",
    "pointwise": "BCE",
    "pairwise": "RankNet",
    "listwise": "ListNet",
    "distilled": "KL to the listwise one",
}
EMBEDDERS = {
    "in-batch": "the batch's own",
    "hard": "and two by BM25",
    "embedding": "the example's: cloze, installed packages",
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "generated" / "pydoc")
    args = parser.parse_args()
    wanted = [f"+r/{name}/eval.rerank" for name in RERANKERS] + [
        f"+e/{name}/eval.search" for name in EMBEDDERS
    ]
    command = [
        sys.executable,
        "-m",
        "famc.cli",
        "build",
        str(SPEC),
        "--profile",
        "compare",
        "--out",
        str(args.out),
    ]
    subprocess.run([*command, "--select", " ".join(wanted)], check=True)
    made = plan(open_family(SPEC, profile="compare"), args.out)
    store = Store(args.out / "store")

    def record(step: str) -> dict[str, Any]:
        return dict(store.record(step, made.steps[step].key))

    def scores(step: str) -> dict[str, Any]:
        return json.loads(
            (store.path(step, made.steps[step].key) / "results.json").read_text(encoding="utf-8")
        )

    def shown(entry: dict[str, Any]) -> str:
        low, high = entry["interval"]
        return f"{entry['value']:.3f} ± {entry['stderr']:.3f} ({low:.3f} to {high:.3f})"

    print(
        "\n| reranker r, behind e/embedding | 40 more steps by | sentences, nDCG@10 | over the embedder | names, nDCG@10 | over the embedder | CPU s |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, loss in RERANKERS.items():
        found = scores(f"r/{name}/eval.rerank")
        cpu = record(made.steps[f"r/{name}/eval.rerank"].node.inputs["model"])["metrics"][
            "compute_cpu_seconds"
        ]
        cells = " | ".join(
            f"{shown(found['ndcg@10' + suffix])} | {found['over_retriever' + suffix]['value']:+.1%}"
            for suffix in ("", ".names")
        )
        print(f"| {name} | {loss} | {cells} | {cpu:.0f} |")
    first = scores("r/reranker/eval.rerank")
    for label, key in (("none: the embedder's order", "retriever_ndcg@10"), ("none: BM25", "bm25_ndcg@10")):
        print(f"| {label} | | {shown(first[key])} | | {shown(first[key + '.names'])} | | |")

    print(
        "\n| embedder e | negatives | sentences, nDCG@10 | over BM25 | names, nDCG@10 | fused, over BM25 | 1/4 of the dimensions |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, negatives in EMBEDDERS.items():
        found = scores(f"e/{name}/eval.search")
        print(
            f"| {name} | {negatives} | {shown(found['ndcg@10'])} | {found['over_bm25']['value']:+.1%} "
            f"| {shown(found['ndcg@10.names'])} | {found['fused_over_bm25.names']['value']:+.1%} | {found['mrl_kept']['value']:.3f} |"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
