"""What a built variant's exports do on this machine: speed, memory and size of each, in each runtime that
loads it.

In: a Plan whose steps have run, and which variant. Out: plain rows: tokens/s, the limit that the memory's
bandwidth sets, and what the cost model predicts. Each measurement is a process of its own (`python -m
famc.work.bench`), one after another; what can't be measured is a row with the reason.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from famc.backend import detect_cpu
from famc.cost import decode
from famc.cost.device import Device
from famc.cost.shape import Shape
from famc.errors import UsageError, did_you_mean
from famc.graph import Node
from famc.plan import Plan
from famc.steps.exports import GENAI_CONFIG, storage
from famc.store import Store

PROMPT, TOKENS, REPEATS = 512, 64, 3
TIMEOUT = 1800.0  # seconds of one measurement, loading included
RUNTIMES = ("onnxruntime", "onnxruntime-genai", "llama.cpp", "torch")

Runner = Callable[[Mapping[str, Any]], Mapping[str, Any]]


@dataclass(frozen=True)
class Request:
    """One file in one runtime. `error`: why it can't be measured, known before anything is started."""

    size: str
    variant: str
    label: str  # onnx-int4; model: the trained weights themselves
    quant: str
    runtime: str
    shape: Shape
    stored: decode.Stored | None  # None: no arithmetic for this format
    path: Path = Path()
    filename: str = ""  # of the graph, for a runtime that is given a folder
    dtype: str = ""  # that torch computes in
    file_bytes: int = 0
    threads: int = 1
    prompt: int = PROMPT
    tokens: int = TOKENS
    repeats: int = REPEATS
    seed: int = 0
    avoid: tuple[int, ...] = ()  # ids that no prompt has: special ones
    error: str = ""

    def to_dict(self) -> dict[str, Any]:
        """What the worker reads."""
        return {
            "runtime": self.runtime, "path": str(self.path), "filename": self.filename, "dtype": self.dtype,
            "threads": self.threads, "prompt": self.prompt, "tokens": self.tokens, "repeats": self.repeats,
            "vocab": self.shape.vocab, "avoid": list(self.avoid), "seed": self.seed,
        }  # fmt: skip


# --- which --------------------------------------------------------------------------------------------------


def chosen(plan: Plan, text: str) -> list[tuple[str, str]]:
    """`m/instruct`, or `instruct` at all its sizes: (size, variant) in the order of the spec."""
    nodes = plan.graph.nodes.values()
    known = [(n.size, n.variant) for n in nodes if n.kind == "release" and n.size and n.variant]
    found = [(size, variant) for size, variant in known if text in (variant, f"{size}/{variant}")]
    if not found:
        names = [v for _, v in known] + [f"{s}/{v}" for s, v in known]
        raise UsageError(f"no variant is called '{text}'", did_you_mean(text, names))
    return found


def requests(
    plan: Plan, size: str, variant: str, *, threads: int = 0, prompt: int = PROMPT, tokens: int = TOKENS,
    repeats: int = REPEATS, runtimes: Sequence[str] = RUNTIMES,
) -> list[Request]:  # fmt: skip
    """What to measure of a variant: its model in torch, and every export in each runtime that loads it.

    Prompt and answer are clipped to the context. UsageError if the model isn't built, or a runtime isn't
    known.
    """
    for runtime in runtimes:
        if runtime not in RUNTIMES:
            raise UsageError(f"no runtime is called '{runtime}'", did_you_mean(runtime, RUNTIMES))
    if min(prompt, tokens, repeats) < 1 or threads < 0:
        raise UsageError("prompt, tokens, repeats and threads must be at least 1")
    here = [n for n in plan.graph.nodes.values() if (n.size, n.variant) == (size, variant)]
    release = next(n for n in here if n.kind == "release")
    model = plan.graph.nodes[release.inputs["model"]]
    store = Store(plan.out / "store")
    if model.shape is None or not store.has(model.name, plan.keys[model.name]):
        raise UsageError(
            f"{size}/{variant} is not built", f"make it first: famc build SPEC --select +{size}/{variant}"
        )
    folder = store.path(model.name, plan.keys[model.name])
    tokens = min(tokens, max(1, model.shape.context // 2))
    base = Request(
        size, variant, "model", "fp32", "torch", model.shape, None, folder,
        threads=threads or detect_cpu().cores, prompt=max(1, min(prompt, model.shape.context - tokens - 1)), tokens=tokens,
        repeats=repeats, avoid=special_ids(folder),
    )  # fmt: skip
    made = list(_of_model(base, _files(store, plan, model)))
    for node in (n for n in here if n.kind == "export" and not n.missing):
        made += _of_export(base, node, plan, store)
    return [r for r in made if r.runtime in runtimes or r.error]


def _of_model(base: Request, files: Mapping[str, int]) -> Iterator[Request]:
    size = sum(n for name, n in files.items() if name.endswith(".safetensors"))
    for dtype in ("fp32", "bf16"):
        how = decode.stored("torch", dtype, tie=base.shape.tie)
        yield replace(base, quant=dtype, dtype=dtype, stored=how, file_bytes=size)


def _of_export(base: Request, node: Node, plan: Plan, store: Store) -> Iterator[Request]:
    """One request for each runtime that loads this export; a single one with the reason if there is none."""
    fmt, quant = str(node.params["format"]), str(node.params["quant"])
    base = replace(base, label=f"{fmt}-{quant}", quant=quant, runtime="")
    key = plan.keys[node.name]
    if not store.has(node.name, key):
        yield replace(base, error="not built: famc build makes it")
        return
    folder, files = store.path(node.name, key), _files(store, plan, node)
    base = replace(base, stored=_stored(node, store.record(node.name, key)["metrics"], base.shape))
    found = False
    for name, size in files.items():
        if name.endswith(".onnx"):
            found = True
            whole = size + files.get(f"{name}_data", 0)
            graph = replace(base, path=folder / name, file_bytes=whole)
            yield replace(graph, runtime="onnxruntime")
            if GENAI_CONFIG in files:
                yield replace(graph, runtime="onnxruntime-genai", path=folder, filename=name)
        elif name.endswith(".gguf"):
            found = True
            yield replace(base, runtime="llama.cpp", path=folder / name, file_bytes=size)
    weights = sum(n for name, n in files.items() if name.endswith(".safetensors"))
    if weights and "config.json" in files:
        found = True
        dtype = quant if quant in ("fp32", "fp16") else "bf16"
        yield replace(base, runtime="torch", path=folder, dtype=dtype, file_bytes=weights)
    if not found:
        yield replace(base, error="it holds no file that a runtime here loads")


def _stored(node: Node, facts: Mapping[str, Any], shape: Shape) -> decode.Stored | None:
    """How the export's weights are stored: by its parameters, and by what its record says of head and
    table."""
    found = {"lm_head": facts.get("lm_head"), "embeddings": facts.get("embedding")}
    try:
        return storage(shape, {**node.params, **{name: value for name, value in found.items() if value}})
    except ValueError:
        return None


def _files(store: Store, plan: Plan, node: Node) -> dict[str, int]:
    files = store.record(node.name, plan.keys[node.name])["files"]
    return {name: int(entry["bytes"]) for name, entry in files.items()}


def special_ids(folder: Path) -> tuple[int, ...]:
    """Ids that a text doesn't become: the tokenizer's added tokens, and the configuration's end, start and
    pad."""
    found: set[int] = set()
    for name in ("tokenizer.json", "config.json"):
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        found |= {t["id"] for t in content.get("added_tokens") or ()}
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = content.get(key)
            found |= set(value) if isinstance(value, list) else {value}
    return tuple(sorted(i for i in found if isinstance(i, int)))


# --- measuring ----------------------------------------------------------------------------------------------


def subprocess_runner(request: Mapping[str, Any], timeout: float = TIMEOUT) -> dict[str, Any]:
    """The worker's answer to a request, or `error` with why there is none. A runtime may crash its
    process."""
    with tempfile.TemporaryDirectory(prefix="famc-bench-") as folder:
        path = Path(folder) / "request.json"
        path.write_text(json.dumps(request), encoding="utf-8")
        command = [sys.executable, "-m", "famc.work.bench", str(path)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
        except subprocess.TimeoutExpired:
            return {"error": f"no answer after {timeout:.0f} s"}
    if done.returncode < 0:
        try:
            name = signal.Signals(-done.returncode).name
        except ValueError:
            name = str(-done.returncode)
        return {"error": f"its process was killed by {name}"}
    for line in reversed(done.stdout.splitlines()):  # a library may have printed before
        if line.startswith("{"):
            try:
                return dict(json.loads(line))
            except ValueError:
                break
    last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
    return {"error": last[0].strip() if last else f"its process ended with exit code {done.returncode}"}


def measure(
    wanted: Sequence[Request], run: Runner | None = None, *, device: Device | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:  # fmt: skip
    """`{"threads", "prompt", "tokens", "repeats", "bandwidth", "device", "rows"}`, measured one after
    another.

    `device` is what predictions are made for (default: this CPU as the planner sees it, with these threads).
    """
    run = run or subprocess_runner
    threads = max((r.threads for r in wanted), default=1)
    tell("memory bandwidth")
    speed = dict(run({"runtime": "bandwidth", "threads": threads})) if wanted else {}
    here = device or detect_cpu().with_cores(threads).device
    rows = []
    for request in wanted:
        answer: Mapping[str, Any] = {"error": request.error}
        if not request.error:
            tell(f"{request.size}/{request.variant} {request.label} {request.quant} in {request.runtime}")
            answer = run(request.to_dict())
        rows.append(row(request, answer, speed.get("read"), here))
    return {
        "threads": threads,
        "prompt": max((r.prompt for r in wanted), default=0),
        "tokens": max((r.tokens for r in wanted), default=0),
        "repeats": max((r.repeats for r in wanted), default=0),
        "bandwidth": speed,
        "device": {"name": here.name, "cores": here.cores, "bandwidth": here.bandwidth},
        "rows": rows,
    }


def row(
    request: Request, answer: Mapping[str, Any], bandwidth: float | None, device: Device
) -> dict[str, Any]:
    """A measurement beside its limit and its prediction. `fraction`: of the limit that the measured bandwidth
    sets; `predicted_ratio`: predicted over measured."""
    result: dict[str, Any] = {
        "size": request.size, "variant": request.variant, "label": request.label, "quant": request.quant,
        "runtime": request.runtime, "file_bytes": request.file_bytes, "prompt": request.prompt, "tokens": request.tokens,
        "error": answer.get("error"),
        **{key: answer.get(key) for key in MEASURED},
    }  # fmt: skip
    middle = request.prompt + request.tokens / 2
    result |= dict.fromkeys(("bytes_per_token", "limit", "fraction", "predicted", "predicted_ratio"))
    if request.stored is None:
        return result
    result["bytes_per_token"] = decode.token_bytes(request.shape, request.stored, middle)
    if bandwidth:
        result["limit"] = decode.limit(request.shape, request.stored, bandwidth, middle)
    if request.runtime:
        told = decode.predict(
            request.shape, request.stored, device, request.runtime, request.dtype or request.quant,
            prompt=request.prompt, tokens=request.tokens,
        )  # fmt: skip
        result["predicted"] = {
            "prefill": told.prefill, "decode": told.decode, "first_token": told.first_token, "basis": told.basis,
        }  # fmt: skip
    if result["decode"]:
        speed = result["decode"]["median"]
        if result["limit"]:
            result["fraction"] = speed / result["limit"]
        if result["predicted"]:
            result["predicted_ratio"] = {
                key: result["predicted"][key] / result[key]["median"]
                for key in ("prefill", "decode", "first_token")
            }
    return result


MEASURED = (
    "threads", "prefill", "decode", "first_token", "token_seconds", "load_seconds", "peak_rss_bytes",
    "rss_before_bytes", "versions",
)  # fmt: skip


def all_requests(plan: Plan, variants: Iterable[str], **more: Any) -> list[Request]:
    """The requests of several variants, each named as `chosen` reads it."""
    pairs = dict.fromkeys(pair for text in variants for pair in chosen(plan, text))
    return [request for size, variant in pairs for request in requests(plan, size, variant, **more)]
