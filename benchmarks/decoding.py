"""Decoding at batch 1: famc's int4 against the builder's own, llama.cpp and torch, in turns. Part of exports.py."""

from __future__ import annotations

import contextlib
import io
import math
import statistics
import sys
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
from famc.cost.parameters import count
from famc.cost.shape import Shape
from famc.report.bench import show_rate
from famc.report.tables import columns
from famc.spec.quantity import show_bytes
from famc.steps.exports import block_size

MEDIUM = Shape("qwen3", 32_000, 18, 768, 2304, 12, 4, 64, True, 2048, 1e6)


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
    table: Table, folder: Path, rounds: int, threads: int, prompt: int, tokens: int, shape: Shape = MEDIUM
) -> None:
    """Decoding at batch 1: famc's int4 against the builder's own, llama.cpp and torch."""
    model = folder / "model"
    made = random_model(model, shape)
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


def random_model(folder: Path, shape: Shape) -> int:
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
