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
import io
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from build import Table

from famc.backend import detect_cpu
from famc.bench import special_ids, subprocess_runner
from famc.cost import decode
from famc.cost.memory import RUNTIME
from famc.cost.parameters import count
from famc.cost.shape import PRESETS, Shape
from famc.graph import open_family
from famc.plan import Plan, plan
from famc.report.bench import show_rate
from famc.report.tables import columns
from famc.spec.quantity import show_bytes
from famc.steps.exports import block_size, export_memory
from famc.store import Store

ROOT = Path(__file__).resolve().parent.parent
SPEC = ROOT / "specs" / "pydoc.yaml"

MEDIUM = Shape("qwen3", 32_000, 18, 768, 2304, 12, 4, 64, True, 2048, 1e6)
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
            speed(table, work / "medium", MEDIUM, args.rounds, args.threads, args.prompt, args.tokens)
        if args.family or everything:
            out = args.family or ROOT / "generated" / "pydoc"
            family(
                table, plan(open_family(args.spec, profile=args.profile), out), promised=args.profile is None
            )
        if args.large:
            large(table, work / "large", LARGE, args.threads)
    print(f"\n{len(table.failed)} promises missed" if table.failed else "\nevery promise above holds")
    return 1 if table.failed else 0


# --- a. speed -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contestant:
    """One file in one runtime."""

    name: str
    runtime: str
    path: Path
    file_bytes: int
    stored: decode.Stored
    quant: str
    filename: str = ""
    dtype: str = ""


OURS = "famc int4, genai"
BUILDER = "genai's own int4, genai"
PROMISED_PROMPT = (
    64  # the promises are about weights: behind a long prompt the runtime's attention counts as well
)
PROMISED = ((BUILDER, 1.0), ("llama.cpp q4_0", 1.2), ("torch fp32", 4.0))


def speed(
    table: Table, folder: Path, shape: Shape, rounds: int, threads: int, prompt: int, tokens: int
) -> None:
    """Decoding at batch 1: famc's int4 against the builder's own, llama.cpp and torch."""
    model = folder / "model"
    made = _random_model(model, shape)
    print(f"\nDecoding at batch 1: Qwen3-shaped, {made / 1e6:.0f} M parameters ({shape.layers} layers x {shape.hidden}, vocabulary "
          f"{shape.vocab}), {threads} threads, prompt {prompt}, {tokens} new tokens, {rounds} rounds")  # fmt: skip
    table.line("parameters, as planned", f"{made:,}", f"= {count(shape).total:,}", made == count(shape).total)
    field = list(contestants(table, model, folder, shape))
    common = {"threads": threads, "prompt": prompt, "tokens": tokens, "repeats": 1, "vocab": shape.vocab,
              "avoid": special_ids(model), "seed": 0}  # fmt: skip
    memory = [subprocess_runner({"runtime": "bandwidth", "threads": threads})]
    runs: dict[str, list[Mapping[str, Any]]] = {c.name: [] for c in field}
    for _ in range(rounds):
        for c in field:
            request = {"runtime": c.runtime, "path": str(c.path), "filename": c.filename, "dtype": c.dtype}
            answer = subprocess_runner({**common, **request})
            runs[c.name].append(answer)
            if "error" in answer and len(runs[c.name]) == 1:
                table.line(c.name, "not measured", answer["error"][:120])
    memory.append(subprocess_runner({"runtime": "bandwidth", "threads": threads}))
    told = max((m for m in memory if "read" in m), key=lambda m: float(m["read"]), default=None)
    if told:
        print(f"memory reads {told['read'] / 1e9:.1f} GB/s, copies {told['copy'] / 1e9:.1f} GB/s; largest cache "
              f"{show_bytes(told['cache_bytes'])}")  # fmt: skip
    _speed_table(field, runs, shape, told, threads, prompt, tokens)
    for other, want in PROMISED:
        found = ratios(runs, OURS, other)
        value = (
            f"{statistics.median(found):.2f} x ({min(found):.2f}-{max(found):.2f})"
            if found
            else "not measured"
        )
        holds = bool(found) and statistics.median(found) >= want if prompt <= PROMISED_PROMPT else None
        table.line(f"{OURS}: decode against {other}", value, f">= {want:.1f} x", holds)


def ratios(runs: Mapping[str, Sequence[Mapping[str, Any]]], ours: str, other: str) -> list[float]:
    """Decode speed of one over another, round by round."""
    pairs = zip(runs.get(ours, ()), runs.get(other, ()), strict=False)
    return [
        a["decode"]["median"] / b["decode"]["median"]
        for a, b in pairs
        if "error" not in a and "error" not in b
    ]


def contestants(table: Table, model: Path, folder: Path, shape: Shape) -> Iterator[Contestant]:
    """Every file in every runtime; one that can't be made is told, and left out."""
    files = sum(f.stat().st_size for f in model.glob("*.safetensors"))
    # speed depends on where the bits lie, not on what they are: the calibrated recipe's layout, filled by rounding
    recipes = {
        OURS: {"algorithm": "rtn", "block_size": block_size(shape, "gptq")},
        f"{OURS}, without data": {"algorithm": "k_quant", "block_size": block_size(shape, "k_quant")},
        BUILDER: {},
    }
    for name, words in recipes.items():
        out = folder / ("builder" if name == BUILDER else f"famc-{words['algorithm']}")
        make = _builder_int4 if name == BUILDER else _famc_int4
        graph = _made(table, name, out, lambda make=make, out=out, words=words: make(model, out, words))
        if graph is None:
            continue
        size = sum(f.stat().st_size for f in graph.parent.glob(f"{graph.name}*"))
        how = decode.stored(
            "onnx",
            "int4",
            tie=shape.tie,
            block_size=int(words.get("block_size", 32)),
            symmetric=words.get("algorithm") != "k_quant",
            head="int4" if name == BUILDER else "int8",
        )
        made = Contestant(
            name, "onnxruntime-genai", out, size, how, "int4", filename=graph.relative_to(out).as_posix()
        )
        yield made
        if name == OURS:
            yield replace(made, name="famc int4, onnxruntime", runtime="onnxruntime", path=graph, filename="")
    for quant in ("q4_0", "q4_k_m"):
        target = folder / f"{quant}.gguf"
        name = f"llama.cpp {quant}"
        if (
            _made(table, name, target, lambda quant=quant, target=target: _gguf(model, target, quant))
            is not None
        ):
            how = decode.stored("gguf", quant, tie=shape.tie)
            yield Contestant(name, "llama.cpp", target, target.stat().st_size, how, quant)
    for dtype in ("fp32", "bf16"):
        how = decode.stored("torch", dtype, tie=shape.tie)
        yield Contestant(f"torch {dtype}", "torch", model, files, how, dtype, dtype=dtype)


def _random_model(folder: Path, shape: Shape) -> int:
    """The model's parameters; its folder is made if it isn't there."""
    from models import make_random_model

    mark = folder / "parameters.txt"
    if not mark.is_file():
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text(str(make_random_model(folder, shape)))
    return int(mark.read_text())


def _made(table: Table, name: str, target: Path, make: Any) -> Path | None:
    """What `make` gives, or what a mark says that it gave before."""
    mark = target.with_name(f"{target.name}.made")
    if not mark.is_file():
        started = time.perf_counter()
        try:
            path = make()
        except Exception as error:  # a tool that is not installed, or refuses: its line says so
            table.line(name, "not made", f"{type(error).__name__}: {error}"[:120])
            return None
        print(f"     {name}: made in {time.perf_counter() - started:.0f} s")
        mark.write_text(str(path))
    return Path(mark.read_text())


def _famc_int4(model: Path, out: Path, words: Mapping[str, Any]) -> Path:
    from famc.work.onnx_build import build_decoder, recipe_of

    facts = build_decoder(model, out, "int4", recipe=recipe_of("int4", **words))
    return out / str(facts["file"])


def _builder_int4(model: Path, out: Path, _: Mapping[str, Any]) -> Path:
    """onnxruntime-genai's own export, with its default options."""
    import logging
    import os

    os.environ["HF_HUB_OFFLINE"] = "1"
    logging.disable(logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        from onnxruntime_genai.models.builder import create_model, parse_extra_options

        where = (None, str(model), str(out), "int4", "cpu", str(out.parent / "cache"))
        create_model(*where, **parse_extra_options(*where, ["hf_token=false"]))
    logging.disable(logging.NOTSET)
    return out / "model.onnx"


def _gguf(model: Path, target: Path, quant: str) -> Path:
    from famc.work.gguf_build import build_gguf

    build_gguf(model, target, quant, name="random")
    return target


def _speed_table(
    field: Sequence[Contestant], runs: Mapping[str, Sequence[Mapping[str, Any]]], shape: Shape,
    memory: Mapping[str, Any] | None, threads: int, prompt: int, tokens: int,
) -> None:  # fmt: skip
    device = detect_cpu().with_cores(threads).device
    rows = [
        [
            "contestant",
            "size",
            "prefill t/s",
            "decode t/s",
            "min-max",
            "limit",
            "of it",
            "predicted",
            "first token",
            "peak RSS",
        ]
    ]
    for c in field:
        good = [r for r in runs[c.name] if "error" not in r]
        if not good:
            continue
        speeds = [r["decode"]["median"] for r in good]
        middle = statistics.median(speeds)
        top = decode.limit(shape, c.stored, memory["read"], prompt + tokens / 2) if memory else math.nan
        told = decode.predict(shape, c.stored, device, c.runtime, c.quant, prompt=prompt, tokens=tokens)
        rows.append([
            c.name, show_bytes(c.file_bytes), show_rate(statistics.median(r["prefill"]["median"] for r in good)),
            show_rate(middle), f"{show_rate(min(speeds))}-{show_rate(max(speeds))}", show_rate(top), f"{middle / top:.0%}",
            show_rate(told.decode), f"{statistics.median(r['first_token']['median'] for r in good):.2f} s",
            show_bytes(statistics.median(r["peak_rss_bytes"] for r in good)),
        ])  # fmt: skip
    print("\n".join(columns(rows, right=range(1, len(rows[0])))))


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
    for size in made.family.sizes:
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
    made = _random_model(model, shape)
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
