"""How fast one file runs in one runtime, alone in its process: `python -m famc.work.bench REQUEST.json`.

In: a request (famc.bench.Request as JSON): runtime, path, threads, lengths. Out: one JSON line on stdout:
prefill and decode tokens/s, seconds to the first token (each median, min and max over the repeats), seconds
to load, peak resident memory, or `error` with the reason. One process a measurement, so that the peak is that
runtime's alone; nothing that a runtime doesn't need itself is imported. Greedy, at batch 1, and past an end
token.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

WARM_UP_TOKENS = 4
SMALLEST = 2**29  # bytes of the array that bandwidth is measured with, where caches are small
Spread = dict[str, float]


class Runtime(Protocol):
    """A loaded model at batch 1."""

    def first(self, ids: list[int]) -> int:
        """Forget what came before, take the prompt, give the first new token."""
        ...

    def following(self, token: int) -> int:
        """Take the token given last, give the next one."""
        ...


# --- protocol ---------------------------------------------------------------------------------------------


def measure(request: Mapping[str, Any]) -> dict[str, Any]:
    """Load, warm up, then `repeats` times: the prompt, and `tokens` more one by one."""
    if request["runtime"] == "bandwidth":
        return bandwidth(int(request["threads"]))
    ids = prompt_ids(
        int(request["prompt"]), int(request["vocab"]), request.get("avoid", ()), int(request.get("seed", 0))
    )
    tokens = int(request["tokens"])
    before = peak_rss()
    started = time.perf_counter()
    runtime = RUNTIMES[str(request["runtime"])](request)
    loaded = time.perf_counter() - started
    _once(runtime, ids, min(WARM_UP_TOKENS, tokens))  # pages the weights in, packs them, sizes the arenas
    runs = [_once(runtime, ids, tokens) for _ in range(int(request["repeats"]))]
    each = [seconds for _, steps in runs for seconds in steps]
    return {
        "runtime": request["runtime"],
        "threads": int(request["threads"]),
        "prompt": len(ids),
        "tokens": tokens,
        "repeats": len(runs),
        "load_seconds": loaded,
        "prefill": spread([len(ids) / first for first, _ in runs]),
        "first_token": spread([first for first, _ in runs]),
        "decode": spread([len(steps) / sum(steps) for _, steps in runs]),
        "token_seconds": {"median": statistics.median(each), "p95": float(np.quantile(each, 0.95))},
        "peak_rss_bytes": peak_rss(),
        "rss_before_bytes": before,  # the interpreter and numpy; the runtime's library and the weights come after
        "versions": versions(),
    }


def _once(runtime: Runtime, ids: list[int], tokens: int) -> tuple[float, list[float]]:
    """Seconds to the first new token, and of each one after it."""
    started = time.perf_counter()
    token = runtime.first(ids)
    first = time.perf_counter() - started
    steps = []
    for _ in range(tokens):
        started = time.perf_counter()
        token = runtime.following(token)
        steps.append(time.perf_counter() - started)
    return first, steps


def prompt_ids(length: int, vocab: int, avoid: Sequence[int], seed: int) -> list[int]:
    """Random ids below the vocabulary, without special ones: the same for every runtime. Speed does not
    depend on what a text says."""
    allowed = np.setdiff1d(np.arange(vocab), np.asarray(list(avoid), dtype=np.int64))
    if not len(allowed):
        raise ValueError("every id of the vocabulary is a special one")
    return [int(i) for i in np.random.default_rng(seed).choice(allowed, length)]


def spread(values: Sequence[float]) -> Spread:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def peak_rss() -> int:
    """Most bytes that were resident at once. Not getrusage: Linux hands its ru_maxrss on through exec, so
    that a small process started by a large one would seem large."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def versions() -> dict[str, str]:
    """Of the runtimes that this process has imported."""
    found = {}
    for module, package in PACKAGES.items():
        if module in sys.modules:
            found[package] = importlib.metadata.version(package)
    return found


# --- runtimes ---------------------------------------------------------------------------------------------


class OnnxRuntime:
    """The graph in a session as ONNX Runtime makes it: arenas, and threads that spin while they wait. The
    parity check's session (onnx_session.py) has neither, since it shares its cores."""

    def __init__(self, request: Mapping[str, Any]) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = int(request["threads"])
        options.log_severity_level = 3  # errors only
        self._value = ort.OrtValue.ortvalue_from_numpy
        self._session = ort.InferenceSession(
            str(request["path"]), options, providers=["CPUExecutionProvider"]
        )
        inputs = {i.name: i for i in self._session.get_inputs()}
        self._positions = "position_ids" in inputs
        kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        self._empty = {
            name: (kinds[i.type], (1, i.shape[1], 0, i.shape[3]))
            for name, i in inputs.items()
            if name.startswith("past_key_values.")
        }
        if not self._empty:
            raise ValueError(f"{request['path']} has no key-value cache: its inputs are {sorted(inputs)}")
        if not all(isinstance(size, int) for _, shape in self._empty.values() for size in shape):
            raise ValueError(f"{request['path']}: the heads and head_dim of its cache aren't numbers")
        self._outputs = ["logits", *(name.replace("past_key_values", "present") for name in self._empty)]
        self._past: dict[str, Any] = {}
        self._at = 0

    def first(self, ids: list[int]) -> int:
        self._past = {
            name: self._value(np.zeros(shape, dtype=kind)) for name, (kind, shape) in self._empty.items()
        }
        self._at = 0
        return self._run(ids)

    def following(self, token: int) -> int:
        return self._run([token])

    def _run(self, ids: list[int]) -> int:
        end = self._at + len(ids)
        feeds = {
            "input_ids": self._value(np.array([ids], dtype=np.int64)),
            "attention_mask": self._value(np.ones((1, end), dtype=np.int64)),
            **self._past,
        }
        if self._positions:
            feeds["position_ids"] = self._value(np.arange(self._at, end, dtype=np.int64)[None])
        logits, *present = self._session.run_with_ort_values(self._outputs, feeds)
        self._past, self._at = dict(zip(self._empty, present, strict=True)), end
        return int(logits.numpy()[0, -1].argmax())


class Genai:
    """A folder with genai_config.json. Its cache is as long as prompt and answer, and written in place."""

    def __init__(self, request: Mapping[str, Any]) -> None:
        import onnxruntime_genai as og

        og.disable_telemetry_events()
        self._og = og
        decoder: dict[str, Any] = {"session_options": {"intra_op_num_threads": int(request["threads"])}}
        if request.get("filename"):
            decoder["filename"] = request["filename"]
        config = og.Config(str(request["path"]))
        config.overlay(json.dumps({"model": {"decoder": decoder}}))
        self._model = og.Model(config)
        self._length = int(request["prompt"]) + int(request["tokens"]) + 1
        self._generator: Any = None

    def first(self, ids: list[int]) -> int:
        self._generator = None  # its cache goes before the next one comes
        params = self._og.GeneratorParams(self._model)
        # the least length keeps the end token out: every run gives the same number of tokens
        params.set_search_options(do_sample=False, max_length=self._length, min_length=self._length)
        self._generator = self._og.Generator(self._model, params)
        self._generator.append_tokens(np.array([ids], dtype=np.int32))  # runs the model on the prompt
        return self._next()

    def following(self, token: int) -> int:
        return self._next()

    def _next(self) -> int:
        self._generator.generate_next_token()  # runs the model on the last token, if that wasn't done yet
        return int(self._generator.get_next_tokens()[0])


class LlamaCpp:
    """A GGUF in llama.cpp, through llama-cpp-python."""

    def __init__(self, request: Mapping[str, Any]) -> None:
        llama_cpp = importlib.import_module("llama_cpp")
        threads = int(request["threads"])
        self._logits = llama_cpp.llama_get_logits_ith
        self._llama = llama_cpp.Llama(
            str(request["path"]),
            n_ctx=int(request["prompt"]) + int(request["tokens"]) + 1,
            n_threads=threads,
            n_threads_batch=threads,
            logits_all=False,
            verbose=False,
        )
        self._vocab = self._llama.n_vocab()

    def first(self, ids: list[int]) -> int:
        self._llama.reset()
        return self._run(ids)

    def following(self, token: int) -> int:
        return self._run([token])

    def _run(self, ids: list[int]) -> int:
        self._llama.eval(ids)
        # straight from llama.cpp's buffer: the wrapper's own copy is of every row, and its sampler sorts
        logits = np.ctypeslib.as_array(self._logits(self._llama.ctx, -1), shape=(self._vocab,))
        return int(logits.argmax())


class Torch:
    """A Hugging Face folder in transformers, with its cache; compressed-tensors folders too."""

    def __init__(self, request: Mapping[str, Any]) -> None:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        torch.set_num_threads(int(request["threads"]))
        self._torch = torch
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[str(request["dtype"])]
        self._model = AutoModelForCausalLM.from_pretrained(
            str(request["path"]), dtype=dtype, local_files_only=True
        ).eval()
        self._past: Any = None

    def first(self, ids: list[int]) -> int:
        self._past = None
        return self._run(ids)

    def following(self, token: int) -> int:
        return self._run([token])

    def _run(self, ids: list[int]) -> int:
        with self._torch.inference_mode():
            out = self._model(
                input_ids=self._torch.tensor([ids]),
                past_key_values=self._past,
                use_cache=True,
                logits_to_keep=1,
            )
        self._past = out.past_key_values
        return int(out.logits[0, -1].argmax())


RUNTIMES: dict[str, Callable[[Mapping[str, Any]], Runtime]] = {
    "onnxruntime": OnnxRuntime,
    "onnxruntime-genai": Genai,
    "llama.cpp": LlamaCpp,
    "torch": Torch,
}
PACKAGES = {  # module -> the package that brings it
    "onnxruntime": "onnxruntime",
    "onnxruntime_genai": "onnxruntime-genai",
    "llama_cpp": "llama-cpp-python",
    "torch": "torch",
    "transformers": "transformers",
    "compressed_tensors": "compressed-tensors",
}


# --- memory bandwidth -------------------------------------------------------------------------------------


def bandwidth(threads: int) -> dict[str, Any]:
    """Bytes/s that this machine reads (a sum) and copies (read and written counted), best of several passes.

    The array is three times the largest cache, so that little of it is still there at the next pass; a shared
    host may have a cache of which this process gets only a part, so `cache_bytes` stands beside it.
    """
    import torch

    torch.set_num_threads(threads)
    cache = cache_bytes()
    size = max(SMALLEST, min(3 * cache, 3 * 2**30, _available() // 6))
    source = torch.ones(size // 4, dtype=torch.float32)
    target = torch.empty_like(source).fill_(0)  # filled: the first touch of a page is not what is measured
    read = _best(lambda: source.sum(), 7)
    copy = _best(lambda: target.copy_(source), 5)
    return {
        "runtime": "bandwidth",
        "threads": threads,
        "read": size / read,
        "copy": 2 * size / copy,
        "array_bytes": size,
        "cache_bytes": cache,
        "peak_rss_bytes": peak_rss(),
        "versions": versions(),
    }


def cache_bytes(root: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """The largest cache that the first core says it has; 0 where the system doesn't say."""
    found = [0]
    for file in root.glob("index*/size"):
        text = file.read_text(encoding="ascii").strip()
        unit = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:], 1)
        found.append(int(text.rstrip("KMG") or 0) * unit)
    return max(found)


def _available() -> int:
    """Bytes that may be taken without swapping; 4 GiB where the system doesn't say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 2**32


def _best(work: Callable[[], Any], passes: int) -> float:
    seconds = []
    for _ in range(passes):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


# --- process ----------------------------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    """Measure the request file that is the only argument."""
    if len(argv) != 1:
        print("usage: python -m famc.work.bench REQUEST.json", file=sys.stderr)
        return 2
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        result = measure(json.loads(Path(argv[0]).read_text(encoding="utf-8")))
    except ImportError as error:
        name = (error.name or str(error)).partition(".")[0]
        result = {
            "error": f"{PACKAGES.get(name, name)} is not installed",
            "missing": PACKAGES.get(name, name),
        }
    except Exception as error:  # whatever a runtime raises is this measurement's result
        lines = f"{type(error).__name__}: {error}".strip().splitlines()
        result = {"error": lines[0] if lines else type(error).__name__}
    print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
