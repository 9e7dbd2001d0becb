"""Build the example family and print what it must show: quality against baselines, and where the time went.

    python benchmarks/build.py                       # builds generated/pydoc if needed, prints every figure
    python benchmarks/build.py --fresh               # in an empty folder: the times are those of a whole build
    python benchmarks/build.py --loop                # the training loop against a bare hand-written one, same run

Figures come from the artifacts' own records; baselines (5-gram, gzip, xz) are computed here on the very documents that the
evaluation read. Exit 1 if a line that the project promises does not hold.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import lzma
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from ngram import KneserNey, split

from famc.graph import open_family
from famc.plan import Plan, plan
from famc.store import Store

ROOT = Path(__file__).resolve().parent.parent
SPEC = ROOT / "specs" / "pydoc.yaml"


class Table:
    """Promises with their figures; remembers whether all hold."""

    def __init__(self) -> None:
        self.failed: list[str] = []

    def line(self, what: str, value: str, want: str = "", holds: bool | None = None) -> None:
        mark = "" if holds is None else ("ok  " if holds else "MISS")
        print(f"{mark:<5}{what:<58}{value:<34}{want}")
        if holds is False:
            self.failed.append(what)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "generated" / "pydoc")
    parser.add_argument("--fresh", action="store_true", help="build in an empty folder")
    parser.add_argument("--profile", help="a profile of the spec, e.g. quick")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--loop", action="store_true", help="only: the training loop against a bare one")
    parser.add_argument("--limit", type=float, help="seconds that the build may take")
    args = parser.parse_args()
    table = Table()
    if args.loop:
        loop(table, args.out)
        return 1 if table.failed else 0
    out = Path(tempfile.mkdtemp(prefix="famc-build-")) if args.fresh else args.out
    options = (["--profile", args.profile] if args.profile else []) + (["--smoke"] if args.smoke else [])
    build(table, out, options, args.limit, whole=args.fresh)
    if not args.smoke:
        made = plan(open_family(SPEC, profile=args.profile), out)
        quality(table, made, Store(out / "store"), promised=args.profile is None)
        times(made, Store(out / "store"))
    if args.fresh:
        shutil.rmtree(out)
    print(f"\n{len(table.failed)} promises missed" if table.failed else "\nevery promise above holds")
    return 1 if table.failed else 0


def build(table: Table, out: Path, options: list[str], limit: float | None, *, whole: bool) -> None:
    """`famc build`, timed from outside, with the share of CPU time spent in training and evaluation."""
    started = time.monotonic()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "famc.cli", "build", str(SPEC), "--out", str(out), "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    wall = time.monotonic() - started
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    result = json.loads(done.stdout)
    if done.returncode:
        table.line(
            "famc build",
            f"exit {done.returncode}",
            json.dumps(result.get("failed") or result.get("message"))[:300],
            False,
        )
    spent: dict[str, float] = {}
    peak = 0
    records = sorted((out / "store").rglob("famc.json"), key=lambda p: p.stat().st_mtime)
    for record in records:  # the newest artifact of a step counts
        values = json.loads(record.read_text())
        if values["name"] in result.get("done", ()):
            peak = max(peak, values["peak_rss_bytes"])
            scoring = values["cpu_seconds"] if values["kind"] in ("eval", "parity") else 0.0
            spent[values["name"]] = values["metrics"].get("compute_cpu_seconds") or scoring
    compute = sum(spent.values())
    ran = len(result.get("done", ()))
    table.line(f"famc build {' '.join(options)}", f"{wall:.0f} s, {cpu:.0f} CPU-s, {ran} steps", f"<= {limit:.0f} s" if limit else "",
               wall <= limit if limit else None)  # fmt: skip
    if ran:
        table.line(
            "share of CPU time inside training and evaluation",
            f"{compute / cpu:.0%}",
            ">= 75 %",
            compute / cpu >= 0.75
            if whole and not options
            else None,  # of what is left of a build, little trains
        )
    table.line("largest process", f"{peak / 1e9:.2f} GB", "<= 4 GB", peak <= 4e9)


def quality(table: Table, made: Plan, store: Store, *, promised: bool) -> None:
    """The models against their baselines and against each other."""

    def metrics(name: str) -> dict[str, Any]:
        return dict(store.record(name, made.steps[name].key)["metrics"])

    def results(name: str) -> dict[str, Any]:
        return dict(json.loads((store.path(name, made.steps[name].key) / "results.json").read_text()))

    def check(what: str, value: str, want: str, holds: bool) -> None:
        table.line(what, value, want, holds if promised else None)

    sizes = list(made.family.sizes_of("lm"))
    base = {size: results(f"{size}/base/eval.base")["bits_per_byte"] for size in sizes}
    chat = {
        (s, v): results(f"{s}/{v}/eval.chat")
        for s in sizes
        for v in ("base", "sft", "instruct")
        if f"{s}/{v}/eval.chat" in made.steps
    }
    gram, packed = baselines(made, store)
    for size in sizes:
        value = base[size]["value"]
        text = f"{value:.3f} ± {base[size]['stderr']:.3f} bits/byte"
        check(f"{size}/base, held-out modules' documentation", text, f"< 5-gram {gram:.3f}", value < gram)
        for name, bits in packed.items():
            check(f"{size}/base against {name} on the same text", text, f"< {bits:.3f}", value < bits)
    if "s/plain/eval.base" in made.steps:
        alone = results("s/plain/eval.base")["bits_per_byte"]["value"]
        check(
            "s/base (distilled) against s without a teacher, equal steps",
            f"{base['s']['value']:.4f}",
            f"< {alone:.4f}",
            base["s"]["value"] < alone,
        )
    for size in sizes:
        ours, before = chat[size, "instruct"], chat[size, "base"]
        check(f"{size}/instruct answer loss against base", f"{ours['answer_loss']['value']:.3f}", f"< {before['answer_loss']['value']:.3f}",
              ours["answer_loss"]["value"] < before["answer_loss"]["value"])  # fmt: skip
        check(
            f"{size}/instruct chrF against base",
            f"{ours['chrf']['value']:.3f}",
            f"> {before['chrf']['value']:.3f}",
            ours["chrf"]["value"] > before["chrf"]["value"],
        )
        accuracy = ours.get("preference_accuracy_implicit", ours["preference_accuracy"])
        check(
            f"{size}/instruct preference accuracy, held-out pairs",
            f"{accuracy['value']:.3f} ± {accuracy['stderr']:.3f}",
            ">= 0.65",
            accuracy["value"] >= 0.65,
        )
        if (size, "sft") in chat:
            sft = chat[size, "sft"]["answer_loss"]["value"]
            worse = ours["answer_loss"]["value"] / sft - 1
            check(f"{size}: answer loss after DPO against SFT", f"{worse:+.2%}", "<= +2 %", worse <= 0.02)
        for quant in ("int8", "int4"):
            ratio = metrics(f"{size}/instruct/parity.onnx-{quant}")["perplexity_ratio"] - 1
            check(
                f"{size}/instruct {quant}: perplexity against fp32", f"{ratio:+.2%}", "<= +3 %", ratio <= 0.03
            )

    if "e/embedding/eval.search" in made.steps:
        found = results("e/embedding/eval.search")
        for source, kind in (("", "questions in words"), (".names", "symbols")):
            ours, words, fused = (
                found[f"{name}{source}"] for name in ("ndcg@10", "bm25_ndcg@10", "fused_ndcg@10")
            )
            low, high = ours["interval"]
            text = f"{ours['value']:.3f} ({low:.3f} to {high:.3f})"
            bar = f"BM25 {words['value']:.3f}"
            holds = ours["value"] > words["value"]
            table.line(f"e/embedding, {kind}: nDCG@10", text, bar, holds if promised and not source else None)
            best = max(ours["value"], words["value"])
            if source:
                check(
                    f"with BM25, {kind}: nDCG@10",
                    f"{fused['value']:.3f}",
                    f"> {best:.3f}",
                    fused["value"] > best,
                )
            else:
                table.line(f"with BM25, {kind}: nDCG@10", f"{fused['value']:.3f}", f"{best:.3f} alone")
        gain = found["over_bm25"]
        low, high = gain["interval"]
        table.line("e/embedding over BM25", f"{gain['value']:+.1%} ({low:+.1%} to {high:+.1%})")
        kept = found["mrl_kept"]["value"]
        check("e/embedding at a quarter of its dimensions", f"{kept:.3f} of nDCG@10", ">= 0.95", kept >= 0.95)
        base_search = results("m/base/eval.search")["ndcg@10"]["value"]
        check("e/embedding against the un-tuned base", f"{found['ndcg@10']['value']:.3f}", f"> {base_search:.3f}",
              found["ndcg@10"]["value"] > base_search)  # fmt: skip
        for quant in ("fp32", "int8", "int4"):
            same = metrics(f"e/embedding/parity.onnx-{quant}")
            table.line(
                f"e/embedding {quant}: cosine to torch, drop of nDCG@10",
                f"{same['cosine_mean']:.5f}, {same['ndcg_drop']:+.2%}",
            )
        ranked = results("r/reranker/eval.rerank")
        both = []
        for suffix, kind in (("", "questions in words"), (".names", "symbols")):
            value, alone = ranked["ndcg@10" + suffix], ranked["retriever_ndcg@10" + suffix]
            both.append((value["value"], alone["value"]))
            table.line(f"r/reranker over the embedder's first 50, {kind}: nDCG@10",
                       f"{value['value']:.3f} against {alone['value']:.3f}, {ranked['over_retriever' + suffix]['value']:+.1%}")  # fmt: skip
        gain = sum(value for value, _ in both) / sum(alone for _, alone in both) - 1
        check("r/reranker, mean of both", f"{gain:+.1%}", ">= +5 %", gain >= 0.05)
        for quant in ("fp32", "int8", "int4"):
            drop = metrics(f"r/reranker/parity.onnx-{quant}")["ndcg_drop"]
            most = 0.05 if quant == "int8" else 0.02
            check(f"r/reranker {quant}: drop of nDCG@10", f"{drop:+.2%}", f"<= {most:.0%}", drop <= most)
        line = [step for step in made.steps if step.startswith(("e/", "r/")) or step in SEARCH]
        seconds = sum(store.record(step, made.steps[step].key)["seconds"] for step in line) / 2
        check(
            "search: all its steps' seconds, over two cores", f"{seconds:.0f} s", "<= 240 s", seconds <= 240
        )


# what the example would not build without its embedder and reranker, beside what is at sizes e and r
SEARCH = ("data/sentences", "data/names", "data/manual", "mix/search", "mix/lookup", "m/base/eval.search")


def baselines(made: Plan, store: Store) -> tuple[float, dict[str, float]]:
    """Bits per byte of a 5-gram model trained on the same tokens, and of gzip -9 and xz, on what the evaluation read."""
    from famc.work.evaluate import heldout
    from famc.work.training import load_tokenizer

    step = made.steps["m/base/eval.base"]
    task = step.node.params["tasks"][0]
    address = f"data/{task['data']}"
    texts = [d["text"] for d in heldout(store.path(address, made.steps[address].key), task["n"], ["text"])]
    size = sum(len(t.encode()) for t in texts)
    tokenizer = load_tokenizer(store.path("tokenizer", made.steps["tokenizer"].key))
    mix = store.path("mix/text", made.steps["mix/text"].key)
    end = json.loads((mix / "stats.json").read_text())["end_id"]
    model = KneserNey(split(np.load(mix / "tokens.npy"), end), len(tokenizer), start=end)
    bits = sum(model.bits(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in texts)
    whole = "\n".join(texts).encode()
    return bits / size, {
        "gzip -9": 8 * len(gzip.compress(whole, 9)) / size,
        "xz -9": 8 * len(lzma.compress(whole, preset=9 | lzma.PRESET_EXTREME)) / size,
    }


def times(made: Plan, store: Store) -> None:
    """Where the time went: planned against measured, the ten largest."""
    rows = []
    for step in made.steps.values():
        record = store.record(step.name, step.key)
        rows.append(
            (
                record["seconds"],
                step.name,
                record["metrics"].get("tokens_per_second"),
                record["peak_rss_bytes"],
            )
        )
    print("\nslowest steps (measured seconds, tokens/s, peak memory)")
    for seconds, name, speed, peak in sorted(rows, reverse=True)[:10]:
        print(
            f"  {name:<32}{seconds:7.1f} s  {f'{speed:,.0f} tokens/s' if speed else '':<20}{peak / 1e6:6.0f} MB"
        )
    print(f"  all steps: {sum(r[0] for r in rows):.0f} s of work")


def loop(table: Table, out: Path, steps: int = 30, rounds: int = 3) -> None:
    """famc's pretraining against a bare loop: same model, rows, precision, optimiser, in turn in one process."""
    import torch
    from torch.nn import functional

    from famc.work import training
    from famc.work.optim import make_optimizer
    from famc.work.rows import load_rows

    made = plan(open_family(SPEC), out)
    store = Store(out / "store")
    job = made.job("m/pretrain")
    folders = {role: store.path(name, key) for role, (name, key) in job.inputs.items()}
    tokenizer = training.load_tokenizer(folders["tokenizer"])
    rows = load_rows(folders["data"], tokenizer, job.params["context"])
    batch = job.params["batch_tokens"] // job.params["context"]
    job = type(job)(
        **{**job.__dict__, "params": {**job.params, "steps": steps}, "metrics": "", "seconds": 1e9}
    )
    bf16 = job.precision == "bf16"

    def ours(threads: int = job.threads) -> float:
        mine = type(job)(**{**job.__dict__, "threads": threads})
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            model = training.start_model(mine, {}, tokenizer)
            return float(training.train_rows(mine, model, rows, Path(folder))["tokens_per_second"])

    def bare() -> float:
        model = training.start_model(job, {}, tokenizer)
        optimizer = make_optimizer(model, job.params)
        order = training.row_order(len(rows), steps * batch, 0).reshape(steps, batch)
        started = time.perf_counter()
        for chosen in order:
            ids, labels, positions = (
                torch.from_numpy(a[chosen]) for a in (rows.input_ids, rows.labels, rows.position_ids)
            )
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
            loss = functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return steps * batch * job.params["context"] / (time.perf_counter() - started)

    if torch.get_num_threads() > 1:
        cores = torch.get_num_threads()
        many, single = ours(cores), ours(1)
        table.line(
            f"pretraining, {cores} threads against one", f"{many:,.0f} / {single:,.0f} = {many / single:.2f}"
        )
    pairs = [(ours(), bare()) for _ in range(rounds)]
    ratios = sorted(a / b for a, b in pairs)
    best = ratios[len(ratios) // 2]
    table.line(
        "pretraining tokens/s, famc / bare loop (median of 3)",
        f"{pairs[-1][0]:,.0f} / {pairs[-1][1]:,.0f} = {best:.2f}",
        ">= 0.9",
        best >= 0.9,
    )


if __name__ == "__main__":
    sys.exit(main())
