"""Release artifacts -> `<out>/release/`: one folder a variant and size, and family.json, the index of all.

In: a Plan whose steps have run. Out: folders made from the store's artifacts, swapped in whole. A variant
whose gate failed leaves no folder, and stands in family.json with the reason. What the plan is not about
stays as it is.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from famc.errors import UsageError
from famc.graph import Node
from famc.plan import Plan
from famc.store import RECORD, Store, finite, link_or_copy

MARK = ".famc-release"  # which artifact a released folder is
INDEX = "family.json"
UNPUBLISHED = frozenset({RECORD, "release.json"})  # famc's own files in a release artifact
LINKED = (
    1_000_000  # bytes from which a file is linked; smaller ones are copied, as people edit cards and configs
)


def publish(plan: Plan, failed: Mapping[str, str] | None = None) -> list[Path]:
    """Bring `<out>/release/` to what the plan's artifacts say; returns the released folders.

    Raises UsageError where a folder that famc did not make is in the way.
    """
    store = Store(plan.out / "store")
    root = plan.out / plan.family.release.path
    key = plan.keys
    scores = _metrics(plan, store, key)
    before = _before(root / INDEX)
    entries: list[dict[str, Any]] = []
    folders: list[Path] = []
    for node in (n for n in plan.graph.nodes.values() if n.kind == "release"):
        repo = node.params["repo"]
        folder = root / repo
        entry: dict[str, Any] = {"size": node.size, "variant": node.variant, "repo": repo}
        if store.has(node.name, key[node.name]) and _passed(plan, store, node.name, key):
            files = _files(store, node, key[node.name])
            _bring(store.path(node.name, key[node.name]), folder, key[node.name], files)
            folders.append(folder)
            entry |= {"folder": repo, "key": key[node.name], "files": files}
        elif node.name not in plan.steps and _is_ours(folder) and repo in before:
            entries.append(before[repo])  # not of this plan: what was released before stands
            continue
        else:
            entry["not_released"] = _reasons(plan, node.name, failed or {}) or ["not built"]
            if node.name in plan.steps and _is_ours(folder):
                shutil.rmtree(folder)  # an older build's: this family has not released it
        measured = scores.get((node.size, node.variant), {"scores": {}, "exports": {}})
        here = {role.removeprefix("export.") for role in node.inputs if role.startswith("export.")}
        exports = {label: values for label, values in measured["exports"].items() if label in here}
        entry |= {"scores": measured["scores"], "exports": exports}
        entries.append(entry)
    if plan.family.release.collection and (
        folders or any(n.node.kind == "release" for n in plan.steps.values())
    ):
        _write_index(
            root / INDEX, {"family": plan.family.family.model_dump(mode="json"), "variants": entries}
        )
    return folders


def _files(store: Store, node: Node, key: str) -> dict[str, int]:
    files = store.record(node.name, key)["files"]
    return {name: entry["bytes"] for name, entry in files.items() if name not in UNPUBLISHED}


def _passed(plan: Plan, store: Store, name: str, key: Mapping[str, str]) -> bool:
    """Whether every gate on the way holds. Order bears no identity: a gate may be stricter by now than when
    this was made.
    """
    above = plan.graph.closure([name], up=True)
    return all(store.has(n, key[n]) for n in above if plan.graph.nodes[n].kind == "gate")


def _is_ours(folder: Path) -> bool:
    return (folder / MARK).is_file()


def _bring(artifact: Path, folder: Path, key: str, files: Mapping[str, int]) -> None:
    """The folder, whole: made beside its place and swapped in."""
    if _is_ours(folder):
        sizes = {name: (folder / name).stat().st_size for name in files if (folder / name).is_file()}
        if (folder / MARK).read_text(encoding="utf-8").strip() == key and sizes == files:
            return
    elif folder.exists():
        raise UsageError(
            f"{folder} is in the way: famc did not make it", "move it, or change release.path or release.repo"
        )
    fresh, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    for left in (fresh, old):
        shutil.rmtree(left, ignore_errors=True)
    fresh.mkdir(parents=True)
    for name, size in files.items():
        if size >= LINKED:
            link_or_copy(artifact / name, fresh / name)
        else:
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(artifact / name, fresh / name)
    (fresh / MARK).write_text(key + "\n", encoding="utf-8")
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _reasons(plan: Plan, name: str, failed: Mapping[str, str]) -> list[str]:
    above = plan.graph.closure([name], up=True)
    return [f"{step}: {reason}" for step, reason in failed.items() if step in above]


def _metrics(
    plan: Plan, store: Store, key: Mapping[str, str]
) -> dict[tuple[str | None, str | None], dict[str, Any]]:
    """(size, variant) -> its scores by suite, its exports' by label."""
    found: dict[tuple[str | None, str | None], dict[str, Any]] = {}
    for node in plan.graph.nodes.values():
        entry = found.setdefault((node.size, node.variant), {"scores": {}, "exports": {}})
        group = {"eval": "scores", "parity": "exports"}.get(node.kind)
        if group and store.has(node.name, key[node.name]):
            label = node.name.rpartition(f"/{node.kind}.")[2]
            entry[group][label] = store.record(node.name, key[node.name])["metrics"]
    return found


def _before(index: Path) -> dict[str, dict[str, Any]]:
    """The last index by repository; empty where there is none that can be read."""
    try:
        return {entry["repo"]: entry for entry in json.loads(index.read_text(encoding="utf-8"))["variants"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _write_index(path: Path, index: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    text = json.dumps(finite(index), indent=1, ensure_ascii=False)
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(path)
