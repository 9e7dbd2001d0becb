"""One training setup, and what `famc calibrate` found, as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from famc.backend import Accelerator, user_dir
from famc.report.tables import columns
from famc.spec.quantity import show_bytes, show_count, show_seconds


def setup_lines(found: Mapping[str, Any]) -> list[str]:
    """What `famc estimate` found: one training setup, its parts, its reasons."""
    layout, held, params = found["layout"], found["memory"], found["params"]
    low, high = found["interval"]
    active = "" if params["active"] == params["total"] else f", {show_count(params['active'])} active"
    degrees = " x ".join(
        f"{name} {layout[key]}"
        for name, key in (
            ("replicas", "dp_replicate"), ("shards", "dp_shard"), ("tp", "tp"), ("cp", "cp"), ("pp", "pp"), ("ep", "ep"),
        )
        if layout[key] > 1
    )  # fmt: skip
    parts = ", ".join(
        f"{name.replace('_', ' ')} {show_bytes(held[name])}"
        for name in sorted(held, key=lambda name: -held[name])
        if name not in ("total", "limit") and held[name] > 0
    )
    cost = "no price known" if found["cost_usd"] is None else f"${found['cost_usd']:,.2f} ({found['price']})"
    rows = [
        ("model", f"{found['name']}: {show_count(params['total'])} parameters{active}"),
        ("on", f"{layout['devices']} x {found['backend']} in {layout['nodes']} node{'s' if layout['nodes'] > 1 else ''}"),
        ("layout", degrees or "one device holds it all"),
        ("batch", f"{layout['micro_batch']} a pass x {layout['grad_accum']} accumulated, {layout['precision']}, "
                  f"recompute {layout['recompute']}"),
        ("memory", f"{show_bytes(held['total'])} of {show_bytes(held['limit'])} a device: {parts}"),
        ("step", f"{found['step_seconds']:.4g} s, {found['tokens_per_second_per_device']:,.0f} tokens/s a device, "
                 f"MFU {found['mfu']:.1%}"),
        ("work", f"{show_count(found['tokens'])} tokens in {found['optimizer_steps']:,} "
                 f"step{'s' if found['optimizer_steps'] > 1 else ''}: {show_seconds(found['seconds'])} "
                 f"({show_seconds(low)} to {show_seconds(high)} in nine of ten)"),
        ("costs", f"{found['device_hours']:,.4g} device-hours, {cost}, {found['energy_kwh']:,.3g} kWh, "
                  f"{found['co2e_kg']:,.3g} kg CO2e"),
    ]  # fmt: skip
    if whole := found.get("whole_run"):
        low, high = whole["interval"]
        rows.append(
            (
                "whole run",
                f"{whole['device_hours']:,.4g} device-hours as published runs took them, with restarts "
                f"({low:,.4g} to {high:,.4g} in nine of ten)",
            )
        )
    rows.append(("basis", found["basis"]))
    return [*columns([[name, text] for name, text in rows]), *(f"  {why}" for why in layout["why"])]


def calibration_lines(found: Accelerator, path: Path) -> list[str]:
    """What was measured, and which plans use it."""
    measured = found.measured
    assert measured is not None  # famc.calibrate writes no other
    rows = [["threads", "precision", "products", "matrix x vector", "copy"]]
    for curve in measured.curves:
        for precision, rate in curve.matmul_gflops.items():
            vector = curve.matvec_gbs.get(precision)
            rows.append(
                [
                    str(curve.threads),
                    precision,
                    f"{rate:,.0f} GFLOP/s",
                    f"{vector:.1f} GB/s" if vector else "-",
                    f"{curve.memory_gbs:.1f} GB/s",
                ]
            )
    lines = [f"{measured.cpu_model}, {measured.cores} cores, torch {measured.torch}", ""]
    lines += [*columns(rows, right=(0, 2, 3, 4)), ""]
    lines.append(
        f"a training step costs {measured.step_overhead_ms:.1f} ms beside its model; a fresh process starts in "
        f"{measured.startup_s:.1f} s"
    )
    if measured.residual is not None:
        lines.append(f"a real training step took {measured.residual:.2f} x what these figures predict for it")
    if measured.disturbed:
        lines.append(
            "other programs ran meanwhile: there are figures of one thread only; run it again on a quiet machine"
        )
    return [*lines, "", f"written to {path}", _used_by(path)]


def _used_by(path: Path) -> str:
    folder = path.absolute().parent
    while_same = "as long as CPU, cores and instruction sets are these"
    if folder == user_dir().absolute():
        return f"used by every local plan of this user, {while_same}"
    if folder.name == "backends":
        return f"used by local plans of the specs in {folder.parent}, {while_same}"
    return f"used by no plan yet: move it to {user_dir()}, or to backends/ beside a spec"
