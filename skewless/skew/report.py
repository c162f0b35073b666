"""The skew report for the terminal and for programs: plain-text tables and skew.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from skewless.terminal import columns


def write_json(report: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(report, indent=1, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")


def verdict(report: dict[str, Any]) -> list[str]:
    """The report in sentences: where the pipelines part, how much the probability moves, what moves it most."""
    count = report["recordings_compared"]
    first = report["first_divergence"]
    if first is None:
        if not report["edits"]:
            return [f"Same definition and same output at every stage, on all {count} recordings."]
        return [f"The definitions differ, but on these {count} recordings every stage gives the same output."]
    how = "same definition, other output" if first["definition"] == "same" else first["definition"]
    where = f"The pipelines first part at '{first['stage']}' ({how}), in {first['recordings']} of {count} recordings"
    if first["seen_at"] not in (None, first["stage"]):
        where += f"; the next stage that both have, '{first['seen_at']}', shows it"
    together = report["together"]
    lines = [
        f"{where}.",
        f"The probability changes by {probability(together['mean_abs'])} on average and by "
        f"{probability(together['max_abs'])} at most; "
        f"{together['flips']} of {count} decisions change{threshold_phrase(report)}.",
    ]
    if report["inputs_identical"]:
        lines.append(
            f"For {report['inputs_identical']} of {count} recordings the network's input is identical all the same."
        )
    ranked = sorted((e for e in report["edits"] if e["alone"]["recordings"]), key=lambda e: -e["alone"]["mean_abs"])
    if len(ranked) > 1 and ranked[0]["alone"]["mean_abs"]:
        size = probability(ranked[0]["alone"]["mean_abs"])
        lines.append(f"The edit with the largest effect alone is '{ranked[0]['edit']}': {size} on average.")
    if not report["checkpoint"]["trained_with_reference"]:
        lines.append("Note: the checkpoint was trained with another pipeline than this reference.")
    return lines


def as_text(report: dict[str, Any]) -> str:
    """The terminal report: verdict, stages, attribution, decisions, and the recordings that change most."""
    parts = [
        f"Skew report: {report['reference']['file']} (reference) against {report['candidate']['file']} (candidate)",
        "\n".join(verdict(report)),
        columns(
            ["stage", "definition", "output", "max", "mean", "p99", "affected", "unit", "shape"],
            [
                [stage_name(s), s["definition"], output(s), *difference(s), s["unit"], shapes(s)]
                for s in report["stages"]
            ],
        ),
    ]
    if report["edits"]:
        together, interaction = report["together"], report["interaction"]
        rows = [
            [
                e["edit"],
                inputs_changed(e),
                *effect_cells(e["alone"], "mean_abs", "max_abs", "flips"),
                *in_order(report, e),
            ]
            for e in report["edits"]
        ]
        rows += [
            ["all together", "", *effect_cells(together, "mean_abs", "max_abs", "flips", "mean", "mean_abs"), ""],
            ["interaction", "", *effect_cells(interaction, "mean_abs", "max_abs"), "", "", "", ""],
        ]
        head = [
            "edit",
            "inputs changed",
            "alone: mean |dp|",
            "max |dp|",
            "flips",
            "in order: mean dp",
            "mean |dp|",
            "flips",
        ]
        parts += [columns(head, rows), *cannot_run(report)]
    if report["metrics"]:
        sides = [(side, report["metrics"][side]) for side in ("reference", "candidate")]
        names = ("auc", "f1", "precision", "recall", "accuracy")
        parts.append(columns(["", *names], [[side, *(f"{m[n]:.4f}" for n in names)] for side, m in sides]))
    ranked = most_changed(report, 5)
    if ranked and ranked[0]["change"]:
        rows = [
            [
                r["name"],
                r["label"] or "-",
                f"{r['probability']['reference']:.4f}",
                f"{r['probability']['candidate']:.4f}",
                probability(r["change"], sign=True),
                decision_change(r),
            ]
            for r in ranked
        ]
        parts.append(columns(["largest changes", "label", "reference", "candidate", "change", "decision"], rows))
    if report["unreadable"]:
        parts.append("\n".join(["Left out:", *(f"  {u['name']}: {u['reason']}" for u in report["unreadable"])]))
    return "\n\n".join(parts)


def most_changed(report: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """The recordings whose probability changes most, largest first."""
    return sorted(report["recordings"], key=lambda r: -abs(r["change"]))[:count]


def probability(value: float | None, *, sign: bool = False) -> str:
    """A probability or a change of one: four decimals, or two digits and an exponent below 0.001."""
    if not value:
        return "-" if value is None else "0"
    plus = "+" if sign else ""
    return f"{value:{plus}.1e}" if 0 < abs(value) < 1e-3 else f"{value:{plus}.4f}"


def stage_name(stage: dict[str, Any]) -> str:
    if stage["reference"] and stage["candidate"] and stage["reference"] != stage["candidate"]:
        return f"{stage['reference']} → {stage['candidate']}"
    return stage["stage"]


def output(stage: dict[str, Any]) -> str:
    if not stage["same"]:
        return f"differs in {stage['recordings_differing']}"
    return "same" if stage["edit"] is None else "same output"


def shapes(stage: dict[str, Any]) -> str:
    """The most frequent pair of differing shapes, empty when no recording has one."""
    if not stage["shapes"]:
        return ""
    pair, *others = stage["shapes"]
    before, after = ("none" if s is None else "x".join(map(str, s)) for s in (pair["reference"], pair["candidate"]))
    return f"{before} → {after}" + (f" and {len(others)} other pairs" if others else "")


def difference(stage: dict[str, Any]) -> list[str]:
    found = stage["difference"]
    if found is None:
        return ["not comparable", "", "", ""]
    if not found["affected"]:
        return ["0", "0", "0", "0 %"]
    share = 100 * found["share_affected"]
    return [*(f"{found[k]:.3g}" for k in ("max", "mean", "p99")), f"{share:.3g} %"]


def effect_cells(effect: dict[str, Any], *names: str) -> list[str]:
    return [str(effect[n]) if n == "flips" else probability(effect[n], sign=n == "mean") for n in names]


def inputs_changed(edit: dict[str, Any]) -> str:
    """For how many recordings the edit alone changes the network's input."""
    return f"{edit['inputs_changed_alone']} of {edit['alone']['recordings']}"


def cannot_run(report: dict[str, Any]) -> list[str]:
    """Which mixtures of the two pipelines could not be measured, and why."""
    return [
        f"'{e['edit']}' {'alone' if way == 'alone' else 'in order'} cannot run on {count} recordings: {reason}"
        for e in report["edits"]
        for way, reasons in e["cannot_run"].items()
        for reason, count in reasons.items()
    ]


def in_order(report: dict[str, Any], edit: dict[str, Any]) -> list[str]:
    if edit["in_order"] is None:
        return [f"with '{report['edits'][edit['counted_with']]['edit']}'", "", ""]
    return effect_cells(edit["in_order"], "mean", "mean_abs", "flips")


def decision_change(entry: dict[str, Any]) -> str:
    before, after = (entry["chosen"][side] for side in ("reference", "candidate"))
    return f"{before} → {after}" if before != after else before


def threshold_phrase(report: dict[str, Any]) -> str:
    """Where decisions are made, as the end of a sentence; with more than two classes no threshold decides."""
    return f" at threshold {report['threshold']:g}" if len(report["classes"]) == 2 else ""
