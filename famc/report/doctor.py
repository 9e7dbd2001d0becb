"""`famc doctor`: what this machine and this installation have, and the table of exports. No heavy import: versions are
read from the packages' metadata."""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from importlib import metadata
from typing import Any

from famc.backend import detect_cpu
from famc.report.reference import export_rows
from famc.report.tables import columns
from famc.spec.quantity import show_bytes
from famc.steps.exports import CAPABILITIES, EXTRAS, installed

# what steps import; a version that differs from the one that a store was made with can change bytes
PACKAGES = ("torch", "transformers", "trl", "tokenizers", "datasets", "onnxruntime", "onnxruntime-genai", "gguf",
            "llama-cpp-python", "compressed-tensors")  # fmt: skip


def machine() -> dict[str, Any]:
    """This machine as a local plan sees it, versions of packages (None: not installed), runtimes of exports."""
    cpu = detect_cpu()
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        versions[package] = None
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    runtimes = dict.fromkeys(runtime for row in CAPABILITIES for runtime in row.runtimes)
    return {
        "cores": cpu.cores,
        "memory_bytes": cpu.memory_gb * 1e9,
        "precision": cpu.training_precision()[1],
        "packages": versions,
        "runtimes": {runtime: installed(runtime) for runtime in runtimes},
    }


def machine_lines(found: dict[str, Any]) -> list[str]:
    """The same for people."""
    head = f"{found['cores']} cores, {show_bytes(found['memory_bytes'])}; {found['precision']}"
    rows = [
        ["package", "version"],
        *([name, version or "not installed"] for name, version in found["packages"].items()),
    ]
    lines = [head, "", *columns(rows), "", "runtimes that load exports:"]
    for runtime, there in found["runtimes"].items():
        lines.append(
            f"  {runtime}: {'installed' if there else EXTRAS.get(runtime, 'not in this installation')}"
        )
    return lines


def exports() -> dict[str, Any]:
    """Every row of the capability table."""
    return {"exports": [asdict(row) for row in CAPABILITIES]}


def exports_lines() -> list[str]:
    """The table for people."""
    rows = [["task", "format", "quantisation", "architectures", "loaded by", ""]]
    rows += [list(cells) for cells in export_rows("yes")]
    rows += [[*cells[:4], "planned only", ""] for cells in export_rows("later")]
    return columns(rows)
