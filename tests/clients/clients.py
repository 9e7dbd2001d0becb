"""The programs that people load released folders with, each installed once into a cache folder of its own.

    transformers_js({"task": …, "folder": …}) -> what transformers_js/run.mjs prints
    sentence_transformers({…})                -> what sentence_transformers_client.py prints
    clean_transformers({…}, "5" or "4")       -> what transformers_client.py prints in that major version

Installing needs npm, Python and a package index; running is offline. What is missing is an error, not a skip: a
release that no client was shown is not checked.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
# Nothing newer fits together: sentence-transformers 6.2's extra `onnx` can't be installed, and optimum-onnx 0.1
# needs transformers before 4.58.
SENTENCE_TRANSFORMERS = (
    "torch==2.13.0", "sentence-transformers==5.7.*", "transformers==4.57.6", "optimum-onnx==0.1.*", "onnxruntime>=1.22",
)  # fmt: skip
TRANSFORMERS = ("torch==2.13.0", "transformers>=5.20,<6", "compressed-tensors>=0.15,<1")


def transformers_js(request: dict[str, Any]) -> dict[str, Any]:
    """Ask transformers.js in Node."""
    node, npm = _program("node"), _program("npm")
    folder = _cache() / "transformers_js"
    package = (HERE / "transformers_js/package.json").read_bytes()
    with _once(folder, package) as missing:
        if missing:
            (folder / "package.json").write_bytes(package)
            _run([npm, "install", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=folder)
    # a script finds its packages beside itself
    script = folder / "run.mjs"
    text = (HERE / "transformers_js/run.mjs").read_bytes()
    if not script.is_file() or script.read_bytes() != text:
        fresh = script.with_suffix(f".{os.getpid()}")
        fresh.write_bytes(text)
        fresh.replace(script)
    return _ask([node, str(script)], request)


def clean_transformers(request: dict[str, Any], major: str) -> dict[str, Any]:
    """Ask a transformers that has never seen famc: today's, or the last 4, which is that of sentence-transformers'."""
    python = (
        _environment("st-venv", SENTENCE_TRANSFORMERS)
        if major == "4"
        else _environment("tf-venv", TRANSFORMERS)
    )
    return _ask([python, str(HERE / "transformers_client.py")], request)


def sentence_transformers(request: dict[str, Any]) -> dict[str, Any]:
    """Ask sentence-transformers' ONNX backend, and torch in the same process."""
    python = _environment("st-venv", SENTENCE_TRANSFORMERS)
    return _ask([python, str(HERE / "sentence_transformers_client.py")], request)


def _environment(name: str, packages: tuple[str, ...]) -> str:
    """The Python of a virtual environment with just these packages, made once."""
    folder = _cache() / name
    python = folder / "bin/python"
    with _once(folder, "\n".join(packages).encode()) as missing:
        if missing:
            _run([sys.executable, "-m", "venv", "--clear", str(folder)])
            _run([str(python), "-m", "pip", "install", "-q", *packages])
    return str(python)


def _cache() -> Path:
    return Path(os.environ.get("FAMC_CACHE") or Path.home() / ".cache/famc")


def _program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise RuntimeError(
            f"{name} is not installed: the test of transformers.js needs Node 20 or later with npm"
        )
    return found


@contextlib.contextmanager
def _once(folder: Path, content: bytes) -> Iterator[bool]:
    """Whether the folder lacks an installation of just this content; noted as done if the block ends well. Another
    process waits meanwhile."""
    folder.mkdir(parents=True, exist_ok=True)
    mark, digest = folder / ".installed", hashlib.sha256(content).hexdigest()
    with folder.with_name(f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        missing = not mark.is_file() or mark.read_text() != digest
        yield missing
        if missing:
            mark.write_text(digest)


def _ask(command: list[str], request: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(_run(command, given=json.dumps(request)))
    return answer


def _run(command: list[str], *, given: str = "", cwd: Path | None = None) -> str:
    settings = {
        "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    done = subprocess.run(
        command, input=given, cwd=cwd, env=os.environ | settings, capture_output=True, text=True, timeout=1800
    )
    if done.returncode:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done.stdout
