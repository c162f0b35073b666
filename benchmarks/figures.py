"""From the serving benchmark's cells to figures, ratios, a Markdown table and a picture."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from benchmarks.load import Cell
from benchmarks.uploads import SHORT

PERCENTILES = (50, 95, 99)
REST, GRPC, IN_PROCESS = "REST", "gRPC", "in process"

Key = tuple[str, str, str, int]  # server, protocol, load, concurrency


def key_of(cell: Cell) -> Key:
    return cell.server, cell.protocol, cell.load, cell.concurrency


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """The 50th, 95th and 99th percentile, interpolated linearly between the two nearest values."""
    return {f"p{q}_s": float(np.percentile(seconds, q)) for q in PERCENTILES}


def measures(cell: Cell) -> dict[str, float]:
    """One cell's figures by name."""
    latencies = [each for kind in cell.latencies_s.values() for each in kind]
    found = {
        "requests_per_s": cell.requests / cell.elapsed_s,
        "segments_per_s": cell.segments / cell.elapsed_s,
        "cpu_s_per_request": cell.cpu_s / cell.requests,
        **percentiles(latencies),
    }
    if cell.peak_bytes is not None:
        found["peak_mb"] = cell.peak_bytes / 1e6
    if SHORT in cell.latencies_s:
        found["short_p99_s"] = percentiles(cell.latencies_s[SHORT])["p99_s"]
    return found


def ratios(cells: Sequence[Cell], reference: str) -> dict[Key, dict[str, float]]:
    """Of every measure, a lane's value divided by the reference's under the same load, within each round; then the median
    over the rounds. The reference is asked by REST, which all servers speak. Failed cells give no ratio."""
    good = [cell for cell in cells if not cell.failure]
    base = {
        (cell.round, cell.load, cell.concurrency): measures(cell)
        for cell in good
        if cell.server == reference and cell.protocol in (REST, IN_PROCESS)
    }
    found: dict[Key, dict[str, list[float]]] = {}
    for cell in good:
        theirs = base.get((cell.round, cell.load, cell.concurrency), {})
        for name, value in measures(cell).items():
            if theirs.get(name):
                found.setdefault(key_of(cell), {}).setdefault(name, []).append(value / theirs[name])
    return {key: {name: statistics.median(r) for name, r in named.items()} for key, named in found.items()}


def summarize(cells: Sequence[Cell], reference: str) -> list[dict[str, Any]]:
    """One row per lane and load, in the order of the cells.

    Rates and CPU seconds: median over the rounds. Latencies: percentiles of all rounds' requests together. Memory: the
    highest. A lane that failed in any round has its failure and no figures.
    """
    compared = ratios(cells, reference)
    rows = []
    for key in dict.fromkeys(map(key_of, cells)):
        mine = [cell for cell in cells if key_of(cell) == key]
        row: dict[str, Any] = dict(zip(("server", "protocol", "load", "concurrency"), key, strict=True))
        rows.append(row)
        row["failure"] = next((cell.failure for cell in mine if cell.failure), None)
        if row["failure"]:
            continue
        by_kind: dict[str, list[float]] = {}
        for cell in mine:
            for kind, seconds in cell.latencies_s.items():
                by_kind.setdefault(kind, []).extend(seconds)
        each_round = [measures(cell) for cell in mine]
        row |= {
            "rounds": len(mine),
            "requests": sum(cell.requests for cell in mine),
            **{
                name: statistics.median(found[name] for found in each_round)
                for name in ("requests_per_s", "segments_per_s", "cpu_s_per_request")
            },
            **percentiles([seconds for kind in by_kind.values() for seconds in kind]),
            "by_kind": {kind: {"requests": len(s), **percentiles(s)} for kind, s in by_kind.items()},
            "peak_mb": max((found["peak_mb"] for found in each_round if "peak_mb" in found), default=None),
            "max_deviation": max(cell.max_deviation for cell in mine),
            "ratios": compared.get(key, {}),
        }
    return rows


def title_of(load: str, concurrency: int) -> str:
    return f"{load}, {concurrency} at once" if concurrency > 1 else f"{load}, one at a time"


def as_markdown(rows: Sequence[Mapping[str, Any]], reference: str) -> str:
    """One table per load; in brackets each figure as a multiple of the reference's."""
    lines = [f"In brackets: as a multiple of `{reference}` over REST, within a round, median over the rounds."]
    for load, concurrency in dict.fromkeys((row["load"], row["concurrency"]) for row in rows):
        lines += [
            "",
            f"**{title_of(load, concurrency)}**",
            "",
            f"| server | requests/s | segments/s | p50 s | p95 s | p99 s | {SHORT} p99 s | CPU s/request | peak MB "
            "| max abs dp |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for row in rows:
            if (row["load"], row["concurrency"]) != (load, concurrency):
                continue
            name = f"{row['server']}, {row['protocol']}"
            if row["failure"]:
                lines.append(f"| {name} | failed: {' '.join(str(row['failure']).split())[:200]} | | | | | | | | |")
                continue
            short = row["by_kind"].get(SHORT, {}).get("p99_s")
            cells = [
                _with_ratio(f"{row['requests_per_s']:.2f}", row, "requests_per_s"),
                f"{row['segments_per_s']:.1f}",
                *(_with_ratio(f"{row[f'p{q}_s']:.2f}", row, f"p{q}_s") for q in PERCENTILES),
                "" if short is None else _with_ratio(f"{short:.2f}", row, "short_p99_s"),
                _with_ratio(f"{row['cpu_s_per_request']:.2f}", row, "cpu_s_per_request"),
                "" if row["peak_mb"] is None else _with_ratio(f"{row['peak_mb']:.0f}", row, "peak_mb"),
                f"{row['max_deviation']:.1e}",
            ]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _with_ratio(text: str, row: Mapping[str, Any], name: str) -> str:
    ratio = row["ratios"].get(name)
    return text if ratio is None else f"{text} ({ratio:.2f})"


def picture(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Requests per second, 99th percentile of latency and CPU seconds per request under every load, and peak memory."""
    loads = list(dict.fromkeys((row["load"], row["concurrency"]) for row in rows))
    lanes = list(dict.fromkeys((row["server"], row["protocol"]) for row in rows))
    found = {(row["server"], row["protocol"], row["load"], row["concurrency"]): row for row in rows}
    panels = (
        ("requests_per_s", "requests per second\n(more is better)", "{:.2f}"),
        ("p99_s", "99th percentile of latency, s\n(less is better)", "{:.2f}"),
        ("cpu_s_per_request", "CPU seconds per request\n(less is better)", "{:.2f}"),
        ("peak_mb", "peak memory of the server, MB\n(less is better)", "{:.0f}"),
    )
    figure = Figure(figsize=(16, 1.6 + len(lanes) * (0.15 + 0.17 * len(loads))), layout="constrained")
    all_axes = figure.subplots(1, len(panels), sharey=True)
    height = 0.84 / len(loads)
    for axes, (name, title, form) in zip(all_axes, panels, strict=True):
        for at, lane in enumerate(lanes):
            mine = [(number, found[*lane, *load]) for number, load in enumerate(loads) if (*lane, *load) in found]
            if name == "peak_mb":
                # No load lowers it again: the whole run has one.
                value = max((row["peak_mb"] or 0 for _, row in mine if not row["failure"]), default=0)
                if value:
                    _bar(axes, at, value, 0.4, "0.6", form)
                continue
            for number, row in mine:
                where = at + (number - (len(loads) - 1) / 2) * height
                if row["failure"]:
                    axes.annotate("failed", (0, where), (3, 0), textcoords="offset points", va="center", fontsize=7)
                else:
                    _bar(axes, where, row[name], height * 0.92, f"C{number}", form)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_yticks(range(len(lanes)), [f"{server}\n{protocol}" for server, protocol in lanes], fontsize=9)
        axes.margins(x=0.14, y=0.01)
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[0].invert_yaxis()
    handles = [Patch(color=f"C{number}", label=title_of(*load)) for number, load in enumerate(loads)]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(loads), frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _bar(axes: Axes, where: float, value: float, height: float, colour: str, form: str) -> None:
    axes.barh(where, value, height, color=colour)
    axes.annotate(form.format(value), (value, where), (3, 0), textcoords="offset points", va="center", fontsize=7)
