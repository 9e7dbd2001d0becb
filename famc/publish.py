"""Release artifacts -> `<out>/release/`: one folder a variant and size, and family.json, the index of all.

In: a Plan whose steps have run. Out: folders linked from the store, swapped in whole. A variant whose gate failed leaves
no folder, and stands in family.json with the reason.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from famc.plan import Plan
from famc.store import Store, link_or_copy

MARK = ".famc-release"  # which artifact a released folder is


def publish(plan: Plan, failed: Mapping[str, str] | None = None) -> list[Path]:
    """Bring `<out>/release/` to what the plan's artifacts say; returns the released folders."""
    store = Store(plan.out / "store")
    spec = plan.family.release
    root = plan.out / spec.path
    releases = [s for s in plan.steps.values() if s.node.kind == "release"]
    entries: list[dict[str, Any]] = []
    folders: list[Path] = []
    for step in releases:
        repo = step.node.params["repo"]
        folder = root / repo
        entry: dict[str, Any] = {"size": step.node.size, "variant": step.node.variant, "repo": repo}
        if store.has(step.name, step.key):
            _link(store.path(step.name, step.key), folder, step.key)
            folders.append(folder)
            record = store.record(step.name, step.key)
            entry |= {"folder": repo, "key": step.key, "files": {n: f["bytes"] for n, f in record["files"].items()}}
        else:
            reasons = _reasons(plan, step.name, failed or {})
            entry["not_released"] = reasons or "not built"
            if folder.is_dir() and (folder / MARK).is_file():
                shutil.rmtree(folder)  # an older build's: this family has not released it
        entry["scores"] = _metrics(plan, store, step.node.size, step.node.variant, "eval")
        entry["exports"] = _metrics(plan, store, step.node.size, step.node.variant, "parity")
        entries.append(entry)
    if spec.collection and releases:
        index = {"family": plan.family.family.model_dump(mode="json"), "variants": entries}
        root.mkdir(parents=True, exist_ok=True)
        temporary = root / "family.json.tmp"
        temporary.write_text(json.dumps(index, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, root / "family.json")
    return folders


def _link(artifact: Path, folder: Path, key: str) -> None:
    mark = folder / MARK
    if mark.is_file() and mark.read_text().strip() == key:
        return
    fresh = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    for path in sorted(artifact.rglob("*")):
        relative = path.relative_to(artifact)
        if path.is_file() and relative.as_posix() not in ("famc.json", "release.json"):
            link_or_copy(path, fresh / relative)
    (fresh / MARK).write_text(key + "\n")
    if folder.exists():
        shutil.rmtree(folder)
    fresh.rename(folder)


def _reasons(plan: Plan, name: str, failed: Mapping[str, str]) -> list[str]:
    above = plan.graph.closure([name], up=True)
    return [f"{step}: {reason}" for step, reason in failed.items() if step in above]


def _metrics(plan: Plan, store: Store, size: str | None, variant: str | None, kind: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for step in plan.steps.values():
        node = step.node
        if node.kind == kind and node.size == size and node.variant == variant and store.has(step.name, step.key):
            found[node.name.rpartition(f"{kind}.")[2]] = store.record(step.name, step.key)["metrics"]
    return found
