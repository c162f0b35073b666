"""From what a soak saw to its report, a Markdown text and a picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.figures import percentiles
from benchmarks.soak.crowd import ALONE, COMPANY, CROWD, WARM_UP, Crowd, Phase, Sent
from benchmarks.soak.messages import LEFT, NO_ANSWER
from benchmarks.soak.workers import Worker, slope

ALL = "all"
# Of that phase, when a worker still grows into its work.
WARMING = 0.2
POINTS = 1000  # of one curve in the report
OUTCOMES = ("right", "wrong", "unanswered", "busy")


def summarize(crowd: Crowd) -> dict[str, Any]:
    """The whole report, in plain JSON types; times in seconds of the soak."""
    sent = [each for phase in crowd.phases for each in phase.sent]
    return {
        "archives": [
            {"model": a.name, "version": a.version, "reads": a.reads, "tiers": a.references.tiers}
            for a in crowd.archives
        ],
        "elapsed_s": round(crowd.now(), 1),
        "planned": len(crowd.plan) or None,
        "phases": [{"name": p.name, "began_s": p.began, "ended_s": p.ended, "sent": len(p.sent)} for p in crowd.phases],
        "canaries": [row for phase in crowd.phases for row in _canary_rows(phase)],
        "groups": _statuses(sent, "group"),
        "kinds": _statuses(sent, "kind"),
        "workers": [_worker_row(worker, _crowd_phase(crowd.phases), crowd.bounds) for worker in crowd.watch.workers],
        "deaths": sum(worker.died_s is not None for worker in crowd.watch.workers),
        "defect_counts": dict(crowd.defects.counts),
        "defects": [asdict(defect) for defect in crowd.defects.listed],
        "latency": [_latency_curve(phase) for phase in crowd.phases if phase.canaries],
    }


def _crowd_phase(phases: Sequence[Phase]) -> Phase | None:
    return next((phase for phase in phases if phase.name == CROWD), None)


def _canary_rows(phase: Phase) -> list[dict[str, Any]]:
    rows = []
    models = sorted({canary.model for canary in phase.canaries})
    for model in [*models, *([ALL] if len(models) > 1 else [])]:
        mine = [canary for canary in phase.canaries if model in (ALL, canary.model)]
        right = [canary.seconds for canary in mine if canary.outcome == "right"]
        rows.append(
            {
                "phase": phase.name,
                "model": model,
                "asked": len(mine),
                **{outcome: sum(canary.outcome == outcome for canary in mine) for outcome in OUTCOMES},
                "max_apart": max((canary.apart for canary in mine), default=0.0),
                **({**percentiles(right), "max_s": max(right)} if right else {}),
            }
        )
    return rows


def _statuses(sent: Sequence[Sent], by: str) -> dict[str, dict[str, Any]]:
    """By group or by kind: how many, of which status, and the longest wait."""
    found: dict[str, dict[str, Any]] = {}
    for each in sent:
        row = found.setdefault(getattr(each, by), {"sent": 0, "statuses": Counter(), "max_s": 0.0})
        row["sent"] += 1
        row["statuses"][_said(each.status)] += 1
        row["max_s"] = max(row["max_s"], each.seconds)
    return {name: {**row, "statuses": dict(sorted(row["statuses"].items()))} for name, row in sorted(found.items())}


def _said(status: int) -> str:
    return {NO_ANSWER: "none", LEFT: "left"}.get(status, str(status))


def _worker_row(worker: Worker, crowd: Phase | None, bounds: Mapping[str, float]) -> dict[str, Any]:
    samples = [(at, size / 1e6) for at, size in worker.samples]
    row = {
        "model": worker.model,
        "pid": worker.pid,
        "idle_mb": worker.idle / 1e6,
        "peak_mb": worker.peak / 1e6,
        "bound_mb": bounds.get(worker.model),
        "died_s": worker.died_s,
        "memory_mb": _thinned(samples),
    }
    if crowd is not None:
        warm = crowd.began + WARMING * (crowd.ended - crowd.began)
        if fit := slope([sample for sample in samples if warm <= sample[0] <= crowd.ended]):
            row |= {"slope_mb_per_h": 3600 * fit[0], "slope_error_mb_per_h": 3600 * fit[1]}
    return row


def _thinned(samples: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    step = max(1, -(-len(samples) // POINTS))
    return [(round(at, 1), round(value, 3)) for at, value in samples[::step]]


def _latency_curve(phase: Phase) -> dict[str, Any]:
    """Percentiles of the canaries of each fortieth of a phase."""
    edges = np.linspace(phase.began, max(phase.ended, phase.began + 1e-3), 41)
    points = []
    for begin, end in pairwise(edges):
        inside = [c.seconds for c in phase.canaries if c.outcome == "right" and begin <= c.ended < end]
        if inside:
            found = percentiles(inside)
            points.append((round(float(begin + end) / 2, 1), round(found["p50_s"], 4), round(found["p99_s"], 4)))
    return {"phase": phase.name, "points": points}


def as_markdown(report: Mapping[str, Any]) -> str:
    """The tables, and the defects."""
    about = report["machine"]
    count = sum(report["defect_counts"].values())
    sent = sum(row["sent"] for row in report["groups"].values())
    asked = sum(row["asked"] for row in report["canaries"] if row["model"] != ALL)
    verdict = "no defect" if not count else f"{count:,} defects: " + ", ".join(
        f"{number:,} {what}" for what, number in sorted(report["defect_counts"].items())
    )  # fmt: skip
    planned = "" if report["planned"] in (None, sent) else f" (of {report['planned']:,} planned)"
    archives = ", ".join(f"{each['model']} {each['version']}" for each in report["archives"])
    lines = [
        f"{about['cpu']}, {about['cores']} cores, {about['memory_mb']:,} MB. Archives: {archives}. {sent:,} hostile "
        f"requests{planned} and {asked:,} canaries in {report['elapsed_s']:,.0f} s, {report['arguments']['concurrency']} at once, seed "
        f"{report['arguments']['seed']}: **{verdict}**.",
        "",
        *_canary_table(report["canaries"]),
        "",
        "| hostile requests | sent | status: how many | longest wait, s |",
        "|---|---|---|---|",
    ]
    for name, row in report["groups"].items():
        statuses = ", ".join(f"{status}: {number:,}" for status, number in row["statuses"].items())
        lines.append(f"| {name} | {row['sent']:,} | {statuses} | {row['max_s']:.1f} |")
    lines += [
        "",
        "| worker | idle MB | largest MB | stated MB | MB per hour | died after s |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["workers"]:
        fit = f"{row['slope_mb_per_h']:+.0f} ± {row['slope_error_mb_per_h']:.0f}" if "slope_mb_per_h" in row else ""
        bound = "" if row["bound_mb"] is None else f"{row['bound_mb']:,.0f}"
        died = "" if row["died_s"] is None else f"{row['died_s']:.0f}"
        lines.append(
            f"| {row['model']}, {row['pid']} | {row['idle_mb']:,.0f} | {row['peak_mb']:,.0f} | {bound} | {fit} | {died} |"
        )
    if report["defects"]:
        lines += ["", "| defect | request | model | how often | first said | kept in |", "|---|---|---|---|---|---|"]
        sorts: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
        for defect in report["defects"]:
            sorts.setdefault((defect["what"], defect["kind"], defect["model"]), []).append(defect)
        for (what, kind, model), same in sorts.items():
            kept = next((defect["kept"] for defect in same if defect["kept"]), None) or ""
            said = " ".join(same[0]["reason"].split()).replace("|", "/")[:160]
            lines.append(f"| {what} | {kind} | {model} | {len(same):,} | {said} | {kept} |")
    return "\n".join(lines) + "\n"


def _canary_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "Beside the seconds of the crowd's canaries: as a multiple of those of canaries alone, and of those in as much company "
        "of their own.",
        "",
        "| canaries | model | asked | wrong | unanswered | 503 | max abs dp | p50 s | p99 s | longest s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    found = {(row["phase"], row["model"]): row for row in rows}
    for row in rows:
        if row["phase"] == WARM_UP:
            continue
        base = [found.get((name, row["model"]), {}) for name in (ALONE, COMPANY)]
        bases = base if row["phase"] == CROWD else []
        times = [_with_multiples(row, name, bases) for name in ("p50_s", "p99_s", "max_s")]
        counts = " | ".join(f"{row[name]:,}" for name in ("asked", "wrong", "unanswered", "busy"))
        lines.append(f"| {row['phase']} | {row['model']} | {counts} | {row['max_apart']:.1e} | {' | '.join(times)} |")
    return lines


def _with_multiples(row: Mapping[str, Any], name: str, bases: Sequence[Mapping[str, Any]]) -> str:
    if name not in row:
        return ""
    multiples = ", ".join(f"{row[name] / base[name]:.1f}" for base in bases if base.get(name))
    return f"{row[name]:.2f}" + (f" ({multiples})" if multiples else "")


def picture(report: Mapping[str, Any], path: Path) -> None:
    """Canaries' latency and the workers' memory over time."""
    figure = Figure(figsize=(12, 7), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for number, curve in enumerate(report["latency"]):
        if curve["points"]:
            times, middle, high = zip(*curve["points"], strict=True)
            above.plot(times, middle, color=f"C{number}", label=f"{curve['phase']}: p50")
            above.plot(times, high, color=f"C{number}", linestyle=":", label="p99")
    above.set_yscale("log")
    above.set_ylabel("seconds to a canary's answer")
    above.legend(fontsize=8, ncols=max(1, len(report["latency"])))
    for number, worker in enumerate(report["workers"]):
        if worker["memory_mb"]:
            times, sizes = zip(*worker["memory_mb"], strict=True)
            below.plot(times, sizes, color=f"C{number}", label=f"{worker['model']}, process {worker['pid']}")
            if worker["died_s"] is not None:
                below.plot([worker["died_s"]], [sizes[-1]], "kx", markersize=9)
    below.set_ylabel("resident memory of a worker, MB")
    below.set_ylim(bottom=0)
    below.set_xlabel("seconds")
    below.legend(fontsize=8)
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        for phase in report["phases"]:
            axes.axvline(phase["began_s"], color="0.8", linewidth=0.8, zorder=0)
    figure.savefig(path, dpi=110, metadata={"Software": None})
