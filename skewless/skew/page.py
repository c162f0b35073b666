"""The skew report as one HTML page: styles and pictures inside, no scripts, nothing fetched."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from skewless.skew import pictures
from skewless.skew.pictures import PALETTE, Example, Picture
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
    path.write_text(
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>{escape(title)}</title>\n'
        f"<style>{_css()}</style>\n</head>\n<body>\n<main>\n" + "\n".join(sections) + "\n</main>\n</body>\n</html>\n",
        encoding="utf-8",
    )


def _css() -> str:
    light, dark = (";".join(f"--{name}:{pair[k]}" for name, pair in PALETTE.items()) for k in (0, 1))
    return f":root{{{light};{_GROUND_LIGHT}}}@media(prefers-color-scheme:dark){{:root{{{dark};{_GROUND_DARK}}}}}{_CSS}"


_GROUND_LIGHT = "--ground:#f4f6f8;--panel:#fff;--good:#14713a;--tint:#fff6ec"
_GROUND_DARK = "--ground:#14181d;--panel:#1d232a;--good:#67cf8f;--tint:#33291d"
_CSS = """
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:1080px;margin:0 auto;padding:24px 16px 64px}
h1{font-size:1.9rem;line-height:1.2;margin:.2em 0}
h2{font-size:1.3rem;margin:0 0 .3em}
h3{font-size:1.1rem;margin:0;overflow-wrap:anywhere}
h4{font-size:.95rem;margin:1.2em 0 .2em}
p{margin:.4em 0;max-width:75ch}
section,article{background:var(--panel);border:1px solid var(--grid);border-radius:10px;padding:20px;margin:18px 0}
section section,section article{border-width:1px 0 0;border-radius:0;padding:20px 0 0;margin:24px 0 0}
.eyebrow,.note,figcaption{color:var(--muted);font-size:.9rem}
.headline{border-left:6px solid var(--muted);padding-left:14px}
.headline.good{border-color:var(--good)}.headline.warn{border-color:var(--candidate)}.headline.bad{border-color:var(--flip)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(210px,1fr));gap:12px;margin:18px 0 0;padding:0}
.tiles div{border:1px solid var(--grid);border-radius:8px;padding:12px 14px}
.tiles dt{color:var(--muted);font-size:.85rem}
.tiles dd{margin:0;font-size:1.35rem;font-weight:650;line-height:1.3;overflow-wrap:anywhere}
.tiles dd small{display:block;font-size:.85rem;font-weight:400;color:var(--muted)}
.note{font-weight:400}.unit{white-space:nowrap}.shape{white-space:nowrap;font-size:.8rem}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums;margin:.6em 0}
th,td{padding:6px 10px 6px 0;border-bottom:1px solid var(--grid);text-align:left;vertical-align:top}
thead th{color:var(--muted);font-weight:600;white-space:nowrap;border-bottom-width:2px}
tbody th{font-weight:600}
.n{text-align:right;white-space:nowrap}
th[colspan]{text-align:center;border-left:4px solid var(--panel);border-bottom-width:1px}
tr.first{background:var(--tint)}
tfoot td,tfoot th{border-bottom:0;border-top:2px solid var(--grid)}
.badge{display:inline-block;border:1.5px solid currentColor;border-radius:99px;padding:0 8px;font-size:.8rem;
font-weight:600;white-space:nowrap}
.same{color:var(--good)}.differs{color:var(--candidate)}.flip{color:var(--flip)}
.reference{color:var(--reference)}.candidate{color:var(--candidate)}
figure{margin:0}
figure img{display:block;max-width:100%;height:auto}
.wide{overflow-x:auto}.wide img{min-width:640px}
.trio{display:grid;grid-template-columns:repeat(auto-fit,minmax(270px,1fr));gap:14px}
.trio figcaption{color:var(--ink);font-weight:600}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(300px,1fr));gap:22px;align-items:start}
details summary{cursor:pointer;font-weight:600}
code{font-size:.88em;overflow-wrap:anywhere}
dl.metadata{display:grid;grid-template-columns:minmax(110px,max-content) 1fr;gap:4px 16px;font-size:.92rem}
dl.metadata dt{color:var(--muted)}dl.metadata dd{margin:0}
"""


def _table(
    head: Sequence[str], rows: Iterable[str], *, numeric: int, caption: str, foot: str = "", groups: str = ""
) -> str:
    """A table whose columns from `numeric` on hold numbers; `rows` are made by `_row`, `groups` is a row of headers."""
    cells = "".join(
        f'<th scope="col"{" class=n" if k >= numeric else ""}>{escape(name)}</th>' for k, name in enumerate(head)
    )
    return (
        f'<figure><figcaption>{caption}</figcaption><div class="scroll" tabindex="0"><table><thead>{groups}<tr>{cells}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody>{f'<tfoot>{foot}</tfoot>' if foot else ''}</table></div></figure>"
    )


def _row(head: str, cells: Sequence[str], *, numeric: int, kind: str = "") -> str:
    """A row of ready HTML: the row header, then cells, of which those from column `numeric` on are numbers."""
    inner = "".join(f"<td{' class=n' if k >= numeric else ''}>{cell}</td>" for k, cell in enumerate(cells, start=1))
    return f'<tr{f" class={kind}" if kind else ""}><th scope="row">{head}</th>{inner}</tr>'


def _image(picture: Picture) -> str:
    return f'<img src="{picture.uri}" width="{picture.width}" alt="{escape(picture.alt, quote=True)}">'


def _badge(text: str, kind: str) -> str:
    return f'<span class="badge {kind}">{escape(text)}</span>'


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
        head = escape(stage_name(stage)) + (f" {_badge('first difference', 'differs')}" if is_first else "")
        definition = escape(stage["definition"])
        edit = None if stage["edit"] is None else report["edits"][stage["edit"]]
        if edit and edit["alone"]["recordings"] and not edit["inputs_changed_alone"]:
            definition += '<br><span class="note">alone, it changes nothing here</span>'
        if stage["shapes"]:
            head += f'<br><span class="note shape">{shapes(stage)}</span>'
        badge = _badge(output(stage), "same" if stage["same"] else "differs")
        cells = [definition, badge, f"<span class=unit>{escape(stage['unit'])}</span>", *difference(stage)]
        rows.append(_row(head, cells, numeric=4, kind="first" if is_first else ""))
    return (
        '<section aria-labelledby="where"><h2 id="where">Where: stage by stage</h2>'
        "<p>What both pipelines hold after each stage, on the same recording. Where only one of them has the stage, its "
        "output is compared with what the other holds at that point. Outputs of different length are compared over the "
        "part they share.</p>"
        + _table(
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
        _row(
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
        + _table(
            ["Edit", "Inputs changed", "Mean |Δp|", "Largest |Δp|", "Decisions", "Mean Δp", "Mean |Δp|", "Decisions"],
            rows,
            groups='<tr><td></td><th scope="colgroup" colspan="4">Alone</th><th scope="colgroup" colspan="3">In order</th></tr>',
            numeric=1,
            caption="Inputs changed: for how many recordings the network&rsquo;s input differs at all. Δp: change of the "
            "probability. Decisions: how many change with that step.",
            foot=_row("all together", whole, numeric=1) + _row("interaction", rest, numeric=1),
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
            _row(
                label,
                [f"{m[name]:.4f}" for m in sides] + [probability(sides[1][name] - sides[0][name], sign=True)],
                numeric=1,
            )
            for name, label in names.items()
        ]
        head = ["Metric", "Reference", "Candidate", "Change"]
        parts.append(_table(head, rows, numeric=1, caption=f"Against the labels{threshold_phrase(report)}"))
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
        _row(
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
    return _table(head, rows, numeric=3, caption=caption)


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
    badge = _badge(f"decision changes: {decision_change(entry)}" if flipped else f"{decision_change(entry)} in both",
                   "flip" if flipped else "same")  # fmt: skip
    label = f"labelled {escape(entry['label'])}; " if entry["label"] else ""
    steps = [(change, report["edits"][k]["edit"]) for k, change in enumerate(entry["in_order"]) if change]
    most = max(steps, key=lambda step: abs(step[0]), default=None)
    cause = (
        f"; most of it from “{escape(most[1])}” ({probability(most[0], sign=True)})" if most and len(steps) > 1 else ""
    )
    parts = [
        f'<article aria-labelledby="worst-{rank}"><h3 id="worst-{rank}">{rank}. {escape(entry["name"])} {badge}</h3>'
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
