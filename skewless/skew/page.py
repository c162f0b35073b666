"""The skew report as one HTML page: styles and pictures inside, no scripts, nothing fetched."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from skewless.html_page import badge, document, row, table
from skewless.skew import pictures
from skewless.skew.pictures import Example, Picture
from skewless.skew.report import (
    cannot_run,
    decision_change,
    difference,
    effect_cells,
    in_order,
    inputs_changed,
    output,
    probability,
    shapes,
    stage_name,
    threshold_phrase,
    verdict,
)


def write_html(report: dict[str, Any], examples: Sequence[Example], path: Path) -> None:
    """Write the page. examples: the recordings to show in pictures, the worst first."""
    title = f"Skew: {report['reference']['file']} against {report['candidate']['file']}"
    sections = [
        _summary(report),
        _stages(report),
        _attribution(report) if report["edits"] else "",
        _decisions(report),
        _examples(report, examples),
        _recordings(report),
        _provenance(report),
    ]
    path.write_text(document(title, sections), encoding="utf-8")


def _image(picture: Picture) -> str:
    return f'<img src="{picture.uri}" width="{picture.width}" alt="{escape(picture.alt, quote=True)}">'


def _summary(report: dict[str, Any]) -> str:
    first, together, metrics = report["first_divergence"], report["together"], report["metrics"]
    count = report["recordings_compared"]
    kind = "good" if first is None else "bad" if together["flips"] else "warn"
    headline = {
        "good": "Same output, stage by stage",
        "warn": "The numbers differ; no decision does",
        "bad": "The numbers differ, and so do decisions",
    }[kind]
    tiles = [
        ("First difference", escape(first["stage"]) if first else "none", escape(first["definition"]) if first else ""),
        (
            "Change of the probability",
            probability(together["mean_abs"]),
            f"on average; at most {probability(together['max_abs'])}",
        ),
        ("Decisions that change", f"{together['flips']} of {count}", threshold_phrase(report).strip()),
    ]
    if metrics:
        a, b = metrics["reference"], metrics["candidate"]
        tiles.append(("AUC", f"{a['auc']:.3f} → {b['auc']:.3f}", f"F1 {a['f1']:.3f} → {b['f1']:.3f}"))
    shown = "".join(f"<div><dt>{name}</dt><dd>{value}<small>{note}</small></dd></div>" for name, value, note in tiles)
    return (
        f'<section aria-labelledby="verdict"><p class="eyebrow">Skew report: does '
        f'<code class="candidate">{escape(report["candidate"]["file"])}</code> (candidate) compute what '
        f'<code class="reference">{escape(report["reference"]["file"])}</code> (reference) computes? '
        f"{count} recordings: {escape(report['source'])}.</p>"
        f'<div class="headline {kind}"><h1 id="verdict">{headline}</h1>'
        f"{''.join(f'<p>{escape(line)}</p>' for line in verdict(report))}</div>"
        f'<dl class="tiles">{shown}</dl></section>'
    )


def _stages(report: dict[str, Any]) -> str:
    first = report["first_divergence"]
    rows = []
    for at, stage in enumerate(report["stages"]):
        is_first = first is not None and at == first["row"]
        head = escape(stage_name(stage)) + (f" {badge('first difference', 'differs')}" if is_first else "")
        definition = escape(stage["definition"])
        edit = None if stage["edit"] is None else report["edits"][stage["edit"]]
        if edit and edit["alone"]["recordings"] and not edit["inputs_changed_alone"]:
            definition += '<br><span class="note">alone, it changes nothing here</span>'
        if stage["shapes"]:
            head += f'<br><span class="note shape">{shapes(stage)}</span>'
        shown = badge(output(stage), "same" if stage["same"] else "differs")
        cells = [definition, shown, f"<span class=unit>{escape(stage['unit'])}</span>", *difference(stage)]
        rows.append(row(head, cells, numeric=4, kind="first" if is_first else ""))
    return (
        '<section aria-labelledby="where"><h2 id="where">Where: stage by stage</h2>'
        "<p>What both pipelines hold after each stage, on the same recording. Where only one of them has the stage, its "
        "output is compared with what the other holds at that point. Outputs of different length are compared over the "
        "part they share.</p>"
        + table(
            ["Stage", "Definition", "Output", "Unit", "Largest", "Mean", "99th pct.", "Affected"],
            rows,
            numeric=4,
            caption="Absolute differences over all recordings, in each stage&rsquo;s own unit. “differs in” counts "
            "recordings; “affected” is the share of values.",
        )
        + "</section>"
    )


def _attribution(report: dict[str, Any]) -> str:
    rows = [
        row(
            escape(e["edit"]),
            [
                inputs_changed(e),
                *effect_cells(e["alone"], "mean_abs", "max_abs", "flips"),
                *map(escape, in_order(report, e)),
            ],
            numeric=1,
        )
        for e in report["edits"]
    ]
    together, interaction = report["together"], report["interaction"]
    whole = ["", *effect_cells(together, "mean_abs", "max_abs", "flips", "mean", "mean_abs", "flips")]
    rest = [
        "",
        *effect_cells(interaction, "mean_abs", "max_abs"),
        "",
        probability(interaction["mean"], sign=True),
        "",
        "",
    ]
    return (
        '<section aria-labelledby="why"><h2 id="why">Why: what each edit does to the probability</h2>'
        "<p>The candidate is the reference with these edits. <b>Alone</b>: the reference with that one edit. <b>In order</b>: "
        "edits applied one after the other as they stand in the pipeline; these changes add up to the whole. "
        "<b>Interaction</b>: the whole less the sum of the edits alone.</p>"
        f'<figure class="wide">{_image(pictures.attribution(report))}</figure>'
        + table(
            ["Edit", "Inputs changed", "Mean |Δp|", "Largest |Δp|", "Decisions", "Mean Δp", "Mean |Δp|", "Decisions"],
            rows,
            groups='<tr><td></td><th scope="colgroup" colspan="4">Alone</th><th scope="colgroup" colspan="3">In order</th></tr>',
            numeric=1,
            caption="Inputs changed: for how many recordings the network&rsquo;s input differs at all. Δp: change of the "
            "probability. Decisions: how many change with that step.",
            foot=row("all together", whole, numeric=1) + row("interaction", rest, numeric=1),
        )
        + "".join(f'<p class="note">{escape(note)}.</p>' for note in cannot_run(report))
        + "</section>"
    )


def _decisions(report: dict[str, Any]) -> str:
    flips = [r for r in report["recordings"] if r["chosen"]["reference"] != r["chosen"]["candidate"]]
    parts = []
    if report["metrics"]:
        names = {"auc": "AUC", "f1": "F1", "precision": "Precision", "recall": "Recall", "accuracy": "Accuracy"}
        sides = [report["metrics"][side] for side in ("reference", "candidate")]
        rows = [
            row(
                label,
                [f"{m[name]:.4f}" for m in sides] + [probability(sides[1][name] - sides[0][name], sign=True)],
                numeric=1,
            )
            for name, label in names.items()
        ]
        head = ["Metric", "Reference", "Candidate", "Change"]
        parts.append(table(head, rows, numeric=1, caption=f"Against the labels{threshold_phrase(report)}"))
    else:
        parts.append('<p class="note">No AUC or F1: they need labelled recordings of every class.</p>')
    if flips:
        changed = _recording_table(flips, "Decisions that change")
    else:
        changed = f"<p>No decision changes{threshold_phrase(report)}.</p>"
    return (
        '<section aria-labelledby="what"><h2 id="what">What it does to decisions</h2><div class="pair">'
        f"<figure>{_image(pictures.decisions(report))}<figcaption>One mark per recording. On the diagonal nothing changed; "
        f"on tinted ground the decision does.</figcaption></figure><div>{''.join(parts)}</div></div>{changed}</section>"
    )


def _recording_table(recordings: Iterable[dict[str, Any]], caption: str) -> str:
    rows = [
        row(
            escape(r["name"]),
            [
                escape(r["label"] or "-"),
                escape(decision_change(r)),
                *(f"{r['probability'][side]:.4f}" for side in ("reference", "candidate")),
                probability(r["change"], sign=True),
            ],
            numeric=3,
        )
        for r in recordings
    ]
    head = ["Recording", "Label", "Decision", "Reference", "Candidate", "Change"]
    return table(head, rows, numeric=3, caption=caption)


def _examples(report: dict[str, Any], examples: Sequence[Example]) -> str:
    if not examples:
        return ""
    return (
        '<section aria-labelledby="worst"><h2 id="worst">The recordings that change most</h2>'
        f"{''.join(_example(report, example, rank) for rank, example in enumerate(examples, start=1))}</section>"
    )


def _example(report: dict[str, Any], example: Example, rank: int) -> str:
    entry = example.entry
    p = entry["probability"]
    flipped = entry["chosen"]["reference"] != entry["chosen"]["candidate"]
    change = badge(f"decision changes: {decision_change(entry)}" if flipped else f"{decision_change(entry)} in both",
                   "flip" if flipped else "same")  # fmt: skip
    label = f"labelled {escape(entry['label'])}; " if entry["label"] else ""
    steps = [(change, report["edits"][k]["edit"]) for k, change in enumerate(entry["in_order"]) if change]
    most = max(steps, key=lambda step: abs(step[0]), default=None)
    cause = (
        f"; most of it from “{escape(most[1])}” ({probability(most[0], sign=True)})" if most and len(steps) > 1 else ""
    )
    parts = [
        f'<article aria-labelledby="worst-{rank}"><h3 id="worst-{rank}">{rank}. {escape(entry["name"])} {change}</h3>'
        f"<p>{label}probability <b class=reference>{p['reference']:.4f}</b> → <b class=candidate>{p['candidate']:.4f}</b> "
        f"({probability(entry['change'], sign=True)}){cause}.</p>"
    ]
    wave = pictures.waveform(example)
    if wave:
        parts.append(f'<h4>Waveform before segmentation</h4><figure class="wide">{_image(wave)}</figure>')
    for images in pictures.segment_images(example):
        drawn = [("Reference", images.reference), ("Candidate", images.candidate), ("Difference", images.difference)]
        cells = "".join(
            f"<figure><figcaption>{name}</figcaption>{_image(picture)}</figure>" for name, picture in drawn if picture
        )
        parts.append(f'<h4>What the network sees. {escape(images.title)}</h4><div class="trio">{cells}</div>')
    timeline = pictures.timeline(example, report["threshold"])
    if timeline:
        parts.append(f'<h4>Probability over time</h4><figure class="wide">{_image(timeline)}</figure>')
    return "".join([*parts, "</article>"])


def _recordings(report: dict[str, Any]) -> str:
    ranked = sorted(report["recordings"], key=lambda r: -abs(r["change"]))
    left_out = "".join(f"<li><b>{escape(u['name'])}</b>: {escape(u['reason'])}</li>" for u in report["unreadable"])
    return (
        '<section aria-labelledby="all"><h2 id="all">All recordings</h2>'
        + (f"<p>Left out, because one side cannot read them:</p><ul>{left_out}</ul>" if left_out else "")
        + f"<details><summary>{len(ranked)} recordings, largest change first</summary>"
        + _recording_table(ranked, "Probability by either pipeline")
        + "</details></section>"
    )


def _provenance(report: dict[str, Any]) -> str:
    checkpoint = report["checkpoint"]
    metadata = {
        "Reference": f"{report['reference']['file']}, fingerprint {report['reference']['fingerprint'][:16]}",
        "Candidate": f"{report['candidate']['file']}, fingerprint {report['candidate']['fingerprint'][:16]}",
        "Checkpoint": f"{checkpoint['file']}, epoch {checkpoint['epoch']}, SHA-256 {checkpoint['sha256'][:16]}",
        "Trained with": "the reference pipeline"
        if checkpoint["trained_with_reference"]
        else f"another pipeline, fingerprint {checkpoint['pipeline_fingerprint'][:16]}",
        "Device": report["precision"]["device"],
        "Versions": ", ".join(f"{name} {version}" for name, version in report["library_versions"].items()),
    }
    listed = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in metadata.items())
    return (
        '<section aria-labelledby="from"><h2 id="from">How it was measured</h2>'
        f'<dl class="metadata">{listed}</dl><p class="note">Every pipeline ran on the same bytes with the same weights, so a '
        "difference here is a difference of preprocessing. All numbers are in skew.json beside this page.</p></section>"
    )
