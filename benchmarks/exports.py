"""Exports: how fast they run, what they lose, and what making a large one takes.

    python benchmarks/exports.py                    # speed and family
    python benchmarks/exports.py --speed --prompt 512   # with more attention in it: nothing is promised of that
    python benchmarks/exports.py --speed            # decoding at batch 1 against the other runtimes and their own files
    python benchmarks/exports.py --family [DIR]     # what the exports of a built family lost (default generated/pydoc)
    python benchmarks/exports.py --large            # int4 of a 0.6 B model: seconds, memory, and that it loads

Speed: a Qwen3 with random weights, made on the spot. The contestants take turns, a process each, several rounds, and what
is promised of two of them is the median of their ratios within a round: a busy machine is slow for both. Nothing else
should run meanwhile. Exit 1 if a line that the project promises does not hold.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from build import Table
from decoding import random_model, speed

from famc.bench import special_ids, subprocess_runner
from famc.cost import decode
from famc.cost.memory import RUNTIME
from famc.cost.parameters import count
from famc.cost.shape import PRESETS, Shape
from famc.graph import open_family
from famc.plan import Plan, plan
from famc.report.tables import columns
from famc.spec.quantity import show_bytes
from famc.steps.exports import export_memory
from famc.store import Store

ROOT = Path(__file__).resolve().parent.parent
SPEC = ROOT / "specs" / "pydoc.yaml"

LARGE = PRESETS["qwen3-0.6b"]
LARGE_MEMORY = 12e9  # bytes that exporting it may take
LOSS = 0.03  # that int4 may add to perplexity


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--family", type=Path, nargs="?", const=ROOT / "generated" / "pydoc", metavar="DIR")
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--spec", type=Path, default=SPEC, help="of the family")
    parser.add_argument("--profile", help="a profile of the spec, e.g. quick: nothing is promised of it")
    parser.add_argument(
        "--work", type=Path, help="keep models and exports here, and use those that are there"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=64, help="tokens before those that are timed")
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    everything = not (args.speed or args.family or args.large)
    table = Table()
    with contextlib.ExitStack() as stack:
        work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="famc-exports-")))
        if args.speed or everything:
            speed(table, work / "medium", args.rounds, args.threads, args.prompt, args.tokens)
        if args.family or everything:
            out = args.family or ROOT / "generated" / "pydoc"
            family(
                table, plan(open_family(args.spec, profile=args.profile), out), promised=args.profile is None
            )
        if args.large:
            large(table, work / "large", LARGE, args.threads)
    print(f"\n{len(table.failed)} promises missed" if table.failed else "\nevery promise above holds")
    return 1 if table.failed else 0


# --- b. family ----------------------------------------------------------------------------------------------


def family(table: Table, made: Plan, *, promised: bool) -> None:
    """Every export of a built family: size, and what its parity check measured."""
    store = Store(made.out / "store")
    rows = [["export", "size", "KL", "top-1", "perplexity", "+-", "greedy equal", "agreeing tokens"]]
    lost: dict[str, float] = {}
    print(f"\nExports of {made.family.family.name} ({made.out}), against the models they were made from")
    for node in made.graph.nodes.values():
        if node.kind != "parity" or not store.has(node.name, made.keys[node.name]):
            continue
        export = made.graph.nodes[node.inputs["export"]]
        found = store.record(node.name, made.keys[node.name])["metrics"]
        files = store.record(export.name, made.keys[export.name])["files"]
        if found.get("perplexity_ratio") is None:
            continue
        change = float(found["perplexity_ratio"]) - 1
        lost[export.name] = change
        rows.append([
            export.name, show_bytes(sum(f["bytes"] for f in files.values())), _number(found.get("kl"), "{:.5f}"),
            _number(found.get("top1_agreement"), "{:.3f}"), f"{change:+.2%}",
            _number(found.get("perplexity_ratio_error"), "{:.2%}"), _number(found.get("greedy_equal"), "{:.2f}"),
            _number(found.get("greedy_agree_tokens"), "{:.1f}"),
        ])  # fmt: skip
    if not lost:
        table.line(
            "exports of the family",
            "none is built",
            "famc build SPEC --out DIR makes them",
            False,
        )
        return
    print("\n".join(columns(rows, right=range(1, len(rows[0])))))
    for name, change in lost.items():
        table.line(
            f"{name}: perplexity against its model",
            f"{change:+.2%}",
            f"<= {LOSS:+.0%}",
            change <= LOSS if promised else None,
        )
    calibrated_against_rtn(table, made, store, promised=promised)


def _number(value: Any, how: str) -> str:
    return "" if value is None else how.format(float(value))


ALGORITHMS = ("rtn", "k_quant", "awq", "gptq")  # against the first, at equal bits; k_quant needs zero points


def calibrated_against_rtn(
    table: Table,
    made: Plan,
    store: Store,
    *,
    variant: str = "instruct",
    examples: int = 128,
    promised: bool = True,
) -> None:
    """How far a variant is from itself once its matrices have 4 bits, by how these were chosen.

    gptq and awq look at training examples of both mixes; k_quant at the weights alone; rtn rounds. Block, zero points
    (k_quant's alone) and the head's 8 bits are the same. The measure is KL(source || quantised) a token on held-out
    conversations and text: perplexity is no distance, it falls when a confident model is blurred.
    """
    import torch

    from famc.work.calibrate import calibrate
    from famc.work.evaluate import heldout
    from famc.work.export import calibration_rows
    from famc.work.likelihood import document_start, encode_chat, load_tokenizer
    from famc.work.quantize import Grid

    def folder(name: str) -> Path:
        return store.path(name, made.keys[name])

    torch.set_num_threads(2)
    words = load_tokenizer(folder("tokenizer"))
    for size in made.family.sizes_of("lm"):
        address = f"{size}/{variant}/export.onnx-int4"
        if address not in made.graph.nodes or not store.has(address, made.keys[address]):
            continue
        node = made.graph.nodes[address]
        context, block = int(node.params["context"]), int(node.params["block_size"])
        model = folder(node.inputs["model"])
        seen: list[list[int]] = []
        for name in node.params["calibrate"]:
            mix = folder(node.inputs[f"data.{name}"])
            seen += calibration_rows(
                mix, folder("tokenizer"), examples // len(node.params["calibrate"]), context
            )
        docs = [
            [document_start(words), *words(d["text"], add_special_tokens=False)["input_ids"]][:context]
            for d in heldout(folder("data/docs"), 60, ["text"])
        ]
        chats = [
            list(encode_chat(words, e["messages"])[0])[:context]
            for e in heldout(folder("data/qa"), 100, ["messages"])
        ]
        held = {"conversations": chats, "text": [row for row in docs if len(row) > 1]}
        source = {what: _log_probabilities(model, rows) for what, rows in held.items()}
        print(f"\n{size}/{variant} at 4 bits, block {block}, head int8; {len(seen)} calibration rows; held out: "
              + ", ".join(f"{len(rows)} of {what}" for what, rows in held.items()))  # fmt: skip
        far: dict[tuple[str, str], list[tuple[float, int]]] = {}
        for algorithm in ALGORITHMS:
            grid = Grid(4, block, algorithm != "k_quant")
            begun = time.perf_counter()
            found = calibrate(
                model, seen, algorithm=algorithm, grid=grid, head=Grid(8, block, True), threads=2
            )
            stored = decode.block_bits(4, block, symmetric=grid.symmetric)
            told = []
            for what, rows in held.items():
                candidate = _log_probabilities(model, rows, found.folded, found.weights)
                far[algorithm, what] = [
                    (float((p.exp() * (p - q)).sum()), len(p))
                    for p, q in zip(source[what], candidate, strict=True)
                ]
                told.append(f"{what} {_mean(far[algorithm, what]):.4f}")
            print(
                f"     {algorithm:<8} {stored:.2f} bits a weight: KL on {', '.join(told)}; {time.perf_counter() - begun:.0f} s"
            )
        for what in held:
            change, error = paired(far["gptq", what], far["rtn", what])
            ratio = _mean(far["gptq", what]) / _mean(far["rtn", what])
            table.line(
                f"{size}/{variant} {what}: KL of gptq against rtn",
                f"{ratio:.2f} x ({change:+.4f} +- {error:.4f})",
                "< 1 x, beyond 2 standard errors",
                change + 2 * error < 0 if promised else None,
            )


def _log_probabilities(
    model: Path, rows: Sequence[Sequence[int]], folded: Mapping[str, Any] | None = None,
    weights: Mapping[str, Any] | None = None,
) -> list[Any]:  # fmt: skip
    """[tokens, vocabulary] a row, in float64, of a model with parameters and matrices replaced."""
    import torch
    from transformers import AutoModelForCausalLM

    from famc.work.likelihood import without_bars

    with without_bars():
        net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, local_files_only=True).eval()
    with torch.inference_mode():
        for name, value in (folded or {}).items():
            net.get_parameter(name).copy_(value)
        for name, matrix in (weights or {}).items():  # a tied head is the embedding's own parameter
            net.get_submodule(name).weight.copy_(matrix.dequantize())
        found = [net(input_ids=torch.tensor([row]), use_cache=False).logits[0] for row in rows]
        return [torch.log_softmax(logits.double(), dim=-1) for logits in found]


def _mean(parts: Sequence[tuple[float, int]]) -> float:
    return sum(value for value, _ in parts) / sum(n for _, n in parts)


def paired(ours: Sequence[tuple[float, int]], theirs: Sequence[tuple[float, int]]) -> tuple[float, float]:
    """Mean difference of the loss a token, and its standard error with texts as the units."""
    tokens = sum(n for _, n in ours)
    mean = sum(a - b for (a, _), (b, _) in zip(ours, theirs, strict=True)) / tokens
    spread = sum((a - b - mean * n) ** 2 for (a, n), (b, _) in zip(ours, theirs, strict=True))
    return mean, math.sqrt(spread * len(ours) / max(1, len(ours) - 1)) / tokens


# --- c. large -----------------------------------------------------------------------------------------------

# in a process of its own: the peak is the export's alone
EXPORT = """
import json, sys
from pathlib import Path
from famc.work.bench import peak_rss
from famc.work.onnx_build import build_decoder, recipe_of
facts = build_decoder(Path(sys.argv[1]), Path(sys.argv[2]), "int4", recipe=recipe_of("int4", algorithm="k_quant"))
print(json.dumps({**facts, "peak_rss_bytes": peak_rss()}))
"""
# logits of a few tokens
LOGITS = """
import json, sys
from pathlib import Path
import numpy as np
from famc.work.onnx_session import OnnxDecoder
logits = OnnxDecoder(Path(sys.argv[1]), 2).logits([list(range(100, 116))])
print(json.dumps({"shape": list(logits.shape), "finite": bool(np.isfinite(logits).all()), "spread": float(logits.std())}))
"""


def large(table: Table, folder: Path, shape: Shape, threads: int) -> None:
    """int4 of a model whose float weights are larger than a protobuf: memory, time, size, and that it
    loads."""
    model, out = folder / "model", folder / "int4"
    out.mkdir(parents=True, exist_ok=True)
    made = random_model(model, shape)
    print(
        f"\nint4 export of a random {made / 1e9:.2f} B model ({shape.layers} layers x {shape.hidden}, vocabulary {shape.vocab:,})"
    )
    params = {"format": "onnx", "quant": "int4"}
    planned = export_memory(shape, count(shape).total, params) + RUNTIME["cpu"]
    facts = _python(EXPORT, model, out)
    if "error" in facts:
        table.line("famc int4 of 0.6 B", "failed", str(facts["error"])[:200], False)
        return
    peak = float(facts["peak_rss_bytes"])
    table.line(
        "peak memory of the export",
        f"{peak / 1e9:.2f} GB",
        f"<= {LARGE_MEMORY / 1e9:.0f} GB",
        peak <= LARGE_MEMORY,
    )
    what = f"{planned / 1e9:.2f} GB, {planned / peak:.2f} x the peak"
    table.line("  as the plan said", what, "not less than the peak", planned >= peak)
    table.line(
        "seconds",
        f"{float(facts['seconds']):.0f} s",
        f"{made / float(facts['seconds']) / 1e6:.1f} M weights/s",
    )
    bits = 8 * float(facts["bytes"]) / made
    table.line(
        "size",
        f"{show_bytes(float(facts['bytes']))}, {bits:.2f} bits a parameter",
        f"head {facts['lm_head']}",
    )
    graph = out / str(facts["file"])
    seen = _python(LOGITS, graph)
    fine = (
        seen.get("finite") is True and seen.get("shape") == [1, 16, shape.vocab] and seen.get("spread", 0) > 0
    )
    table.line(
        "loads in onnxruntime, logits are finite", str(seen.get("shape", seen.get("error")))[:60], "", fine
    )
    common = {
        "threads": threads,
        "prompt": 128,
        "tokens": 16,
        "repeats": 1,
        "vocab": shape.vocab,
        "avoid": special_ids(model),
    }
    for runtime, path in (("onnxruntime", graph), ("onnxruntime-genai", out)):
        told = subprocess_runner(
            {**common, "runtime": runtime, "path": str(path), "filename": str(facts["file"])}
        )
        text = told.get("error") or f"{told['decode']['median']:.1f} tokens/s"
        table.line(
            f"  decoding in {runtime}",
            text,
            "" if "error" in told else f"peak {show_bytes(told['peak_rss_bytes'])}",
        )


def _python(code: str, *paths: Path) -> dict[str, Any]:
    """What a script in a process of its own prints last, or its last line of error."""
    command = [sys.executable, "-c", code, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]}
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


if __name__ == "__main__":
    sys.exit(main())
