"""Measurements of exports as an aligned table. In: what famc.bench.measure gives. Out: lines; the caller
prints them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from famc.report.tables import columns
from famc.spec.quantity import show_bytes

HEADING = (
    "variant", "file", "runtime", "size", "prefill t/s", "decode t/s", "min-max", "limit", "of it", "predicted",
    "pred/meas", "first token", "peak RSS",
)  # fmt: skip


def bench_lines(result: Mapping[str, Any]) -> list[str]:
    """The machine, a line a measurement, then what was not measured and why."""
    rows = [list(HEADING)]
    failed = []
    for row in result["rows"]:
        name = f"{row['size']}/{row['variant']}"
        if row["error"]:
            failed.append(
                f"  {name} {_file(row)}{' in ' if row['runtime'] else ''}{row['runtime']}: {row['error']}"
            )
        else:
            rows.append([name, *_cells(row)])
    lines = [machine_line(result), ""]
    if len(rows) > 1:
        lines += columns(rows, right=range(3, len(HEADING)))
    if failed:
        lines += ["", "not measured:", *failed]
    cache = result["bandwidth"].get("cache_bytes") or 0
    if any(row["bytes_per_token"] and row["bytes_per_token"] < cache for row in result["rows"]):
        lines += ["", f"Models that fit into the largest cache ({show_bytes(cache)}, maybe shared with other machines) "
                  "may pass the limit, which is that of main memory."]  # fmt: skip
    return lines


def machine_line(result: Mapping[str, Any]) -> str:
    """Threads, lengths and what memory gave."""
    speed = result["bandwidth"]
    told = f"bandwidth not measured: {speed.get('error', 'nothing to measure')}"
    if speed.get("read"):
        told = (
            f"memory reads {speed['read'] / 1e9:.1f} GB/s, copies {speed['copy'] / 1e9:.1f} GB/s (measured)"
        )
    planned = result["device"]["bandwidth"] / 1e9
    return (
        f"batch 1, {result['threads']} threads, prompt {result['prompt']}, {result['tokens']} new tokens, median of "
        f"{result['repeats']}; {told}; predictions take {planned:.0f} GB/s"
    )


def _file(row: Mapping[str, Any]) -> str:
    return str(row["label"]) if row["label"].endswith(row["quant"]) else f"{row['label']} {row['quant']}"


def _cells(row: Mapping[str, Any]) -> list[str]:
    decode, ratio = row["decode"], row["predicted_ratio"]
    return [
        _file(row),
        row["runtime"],
        show_bytes(row["file_bytes"]),
        show_rate(row["prefill"]["median"]),
        show_rate(decode["median"]),
        f"{show_rate(decode['min'])}-{show_rate(decode['max'])}",
        show_rate(row["limit"]) if row["limit"] else "",
        f"{row['fraction']:.0%}" if row["fraction"] else "",
        show_rate(row["predicted"]["decode"]) if row["predicted"] else "",
        f"{ratio['decode']:.2f}" if ratio else "",
        show_time(row["first_token"]["median"]),
        show_bytes(row["peak_rss_bytes"]),
    ]


def show_rate(value: float) -> str:
    """Three digits that mean something: 93.2, 1,894."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def show_time(seconds: float) -> str:
    """83 ms, 1.22 s."""
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.2f} s"
