"""What adoption found, as text for a terminal and as one HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from skewless.html_page import badge, document, row, table
from skewless.terminal import columns

_HEAD = ["pipeline", "reproduces", "largest difference", "mean"]


def verdict(report: Mapping[str, Any]) -> list[str]:
    """Which pipeline the service has, how closely its record is reproduced, and what was made of it: sentences."""
    best, record = report["best"], report["record"]
    gap = best["gap"]
    numbers = f"{record['numbers']} recorded numbers of {record['files']} files"
    if gap["reproduced"]:
        lines = [
            f"{best['name']} is what the service computes: all {numbers} are reproduced, the largest difference is "
            f"{size_text(gap['largest'])}."
        ]
        others = [
            t["name"] for t in report["trials"] if t["gap"] and t["gap"]["reproduced"] and t["name"] != best["name"]
        ]
        if others:
            lines.append(f"As far as these files can tell, these reproduce it, too: {'; '.join(others)}.")
    else:
        lines = [
            f"No pipeline reproduces the {numbers}. The closest is {best['name']}: the largest difference is "
            f"{size_text(gap['largest'])} ({gap['worst']}), the mean {size_text(gap['mean'])}."
        ]
        if gap["missing"]:
            lines.append(
                f"{gap['missing']} recorded numbers are of windows that it does not cut; each counts as a difference of 1."
            )
    adopted = report.get("adopted")
    lines += [f"{name} cannot be packaged: {reason}" for name, reason in report["not_packaged"].items()]
    foreign = "It imitates a fault with a stage that no archive carries"
    if adopted is None and not best["servable"]:
        lines.append(
            f"{foreign}, and every pipeline that can be served is further away; --accept-closest builds the closest of those."
        )
    elif adopted is None and gap["reproduced"]:
        lines.append(
            "So nothing was built. Mend that, for instance with --runtime eager, and adopt again: it goes on from here."
        )
    elif adopted is None:
        lines.append(
            "So nothing was built. What is missing is a difference that no single change of the tried pipelines makes: write the "
            "service's preprocessing as a pipeline file and give it with --try, find the line with `skewless diff`, or build "
            "the closest with --accept-closest."
        )
    elif adopted["pipeline"] != best["name"]:
        lines += [] if best["servable"] else [f"{foreign}."]
        lines.append(
            f"Built is {adopted['pipeline']}, the closest that can be served, which "
            f"{'reproduces the record, too' if adopted['reproduced'] else 'does not reproduce the record'}: the largest difference "
            f"is {size_text(adopted['largest'])}."
        )
    return lines


def instead(report: Mapping[str, Any]) -> list[str]:
    """What another pipeline would change, in sentences; empty where nothing was built."""
    if "adopted" not in report:
        return []
    other = report["instead"]
    if other is None:
        return ["What was adopted is the pipeline to compare with: there is nothing to serve otherwise."]
    lines = [
        f"Served behind {other['pipeline']} instead ({'; '.join(other['edits'])}), {other['flips']} of {other['files']} decisions "
        f"would change at threshold {report['threshold']:g}; the probability by {other['mean']:.2g} on average and "
        f"{other['largest']:.2g} at most."
    ]
    if other["auc"]:
        auc, right = other["auc"], other["accuracy"]
        lines.append(
            f"By the labels: accuracy {right['reference']:.3f} as adopted and {right['candidate']:.3f} instead, AUC "
            f"{auc['reference']:.3f} and {auc['candidate']:.3f}."
        )
    return lines


def as_text(report: Mapping[str, Any]) -> str:
    """What to print: the pipelines that were tried, the nearest first, the verdict, and what was written."""
    rows = [[trial["name"], *_cells(trial)] for trial in _nearest_first(report)]
    failed = [f"{trial['name']} could not be run: {trial['failure']}" for trial in report["trials"] if trial["failure"]]
    parts = [columns(_HEAD, rows), *failed, *_edits(report), *_columns_not_used(report), "", *verdict(report)]
    adopted = report.get("adopted")
    if adopted:
        parts += ["", *instead(report), "", *_changed(report), f"pipeline, model and variants: {adopted['folder']}"]
        parts += [f"checkpoint: {adopted['checkpoint']}", f"archive: {adopted['archive']}"]
    return "\n".join(parts)


def size_text(difference: float) -> str:
    """A difference with two digits; 0 for none."""
    return f"{difference:.1e}" if difference else "0"


def _nearest_first(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    ran = [trial for trial in report["trials"] if trial["gap"] is not None]
    return sorted(ran, key=lambda trial: (not trial["gap"]["reproduced"], trial["gap"]["mean"]))


def _cells(trial: Mapping[str, Any]) -> list[str]:
    gap = trial["gap"]
    return ["yes" if gap["reproduced"] else "no", size_text(gap["largest"]), size_text(gap["mean"])]


def _changed(report: Mapping[str, Any]) -> list[str]:
    told = "; ".join(f"{name} {value}" for name, value in report["changed"].items())
    return [f"model.yaml is {report['archive']}'s, but for {told}"] if told else []


def _edits(report: Mapping[str, Any]) -> list[str]:
    count = report["edits_tried"]
    return [f"{count} edits were tried on a few files first; of those the nearest are listed"] if count else []


def _columns_not_used(report: Mapping[str, Any]) -> list[str]:
    unused = report["record"]["unused"]
    return [f"columns of {report['record']['file']} that no answer has: {', '.join(unused)}"] if unused else []


def write_html(report: Mapping[str, Any], path: Path) -> None:
    """Write the page. It links to the skew report beside it, where there is one."""
    title = f"Adopted: {report['checkpoint']['file']} as {report['archive']}"
    sections = [_summary(report), _pipelines(report), _agreement(report), _instead(report), _provenance(report)]
    path.write_text(document(title, [section for section in sections if section]), encoding="utf-8")


def _summary(report: Mapping[str, Any]) -> str:
    gap, record, adopted = report["best"]["gap"], report["record"], report.get("adopted")
    kind, headline = ("good", "The service is reproduced") if gap["reproduced"] else ("bad", "Not reproduced")
    if adopted and not adopted["reproduced"]:
        kind, headline = "warn", "The closest is built"
    tiles = [
        ("Pipeline of the service", escape(report["best"]["name"]), f"of {len(report['trials'])} tried on all files"),
        ("Largest difference", size_text(gap["largest"]), f"of {record['numbers']} recorded numbers"),
        ("Files", f"{record['files']}", f"with a record, of {record['labelled']} with a label"),
    ]
    if adopted:
        tiles.append(("Archive", escape(Path(adopted["archive"]).name), f"AUC {adopted['auc']:.3f} by the labels"))
    shown = "".join(f"<div><dt>{name}</dt><dd>{value}<small>{note}</small></dd></div>" for name, value, note in tiles)
    told = "".join(f"<p>{escape(line)}</p>" for line in verdict(report))
    return (
        f'<section aria-labelledby="verdict"><p class="eyebrow">Which preprocessing does the service run that answered '
        f"<code>{escape(record['file'])}</code> with the weights of <code>{escape(report['checkpoint']['file'])}</code>?</p>"
        f'<div class="headline {kind}"><h1 id="verdict">{headline}</h1>{told}</div><dl class="tiles">{shown}</dl></section>'
    )


def _pipelines(report: Mapping[str, Any]) -> str:
    best = report["best"]["fingerprint"]
    rows = []
    for trial in _nearest_first(report):
        reproduces, *numbers = _cells(trial)
        mark = badge("reproduces" if reproduces == "yes" else "differs", "same" if reproduces == "yes" else "differs")
        if not trial["servable"]:
            mark += " " + badge("cannot be served", "flip")
        rows.append(
            row(
                escape(trial["name"]),
                [mark, *numbers],
                numeric=2,
                kind="first" if trial["fingerprint"] == best else "",
            )
        )
    failed = "".join(
        f"<p class=note>{escape(trial['name'])} could not be run: {escape(trial['failure'])}</p>"
        for trial in report["trials"]
        if trial["failure"]
    )
    allowed = "; ".join(
        f"{escape(name)}: {field['allowed']:.2g}" for name, field in report["record"]["columns"].items()
    )
    return (
        '<section aria-labelledby="tried"><h2 id="tried">What was tried</h2>'
        f"<p>The weights behind every pipeline, on the files with a record. A pipeline reproduces the record when no number is "
        f"further from it than is allowed ({allowed}): what two machines may be apart, and half of the last digit that was "
        "written.</p>"
        + table(
            _HEAD,
            rows,
            numeric=2,
            caption="Differences are shares of each quantity&rsquo;s largest recorded value, or of 1.",
        )
        + "".join(f"<p class=note>{line}.</p>" for line in _edits(report))
        + f"{failed}</section>"
    )


def _agreement(report: Mapping[str, Any]) -> str:
    """Recorded against ours, a dot for each number, as an SVG that needs no library."""
    pairs: Sequence[Mapping[str, Any]] = report["best"]["pairs"]
    if not pairs:
        return ""
    size, edge = 360, 44
    span = size - 2 * edge

    def at(x: float, y: float) -> tuple[float, float]:
        return edge + span * x, size - edge - span * y

    (x0, y0), (x1, y1) = at(0, 0), at(1, 1)
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2"><title>{escape(pair["file"])}, {escape(pair["name"])}: recorded '
        f"{pair['recorded']:.6f}, ours {pair['ours']:.6f}</title></circle>"
        for pair in pairs
        for x, y in [at(pair["recorded"], pair["ours"])]
    )
    ticks = "".join(
        f'<text x="{at(v, 0)[0]:.0f}" y="{y0 + 16:.0f}" text-anchor="middle">{v:g}</text>'
        f'<text x="{x0 - 8:.0f}" y="{at(0, v)[1] + 4:.0f}" text-anchor="end">{v:g}</text>'
        for v in (0, 0.5, 1)
    )
    alt = f"Recorded against ours for {len(pairs)} numbers: the largest difference is {size_text(report['best']['gap']['largest'])}."
    return (
        '<section aria-labelledby="agreement"><h2 id="agreement">Recorded and ours</h2><figure><div class="wide">'
        f'<svg viewBox="0 0 {size} {size}" width="{size}" role="img" aria-label="{escape(alt, quote=True)}" '
        'font-size="11" fill="var(--ink)">'
        f'<path d="M{x0} {y0}L{x1} {y1}" stroke="var(--muted)" stroke-dasharray="4 4"/>'
        f'<path d="M{x0} {y1}V{y0}H{x1}" stroke="var(--muted)" fill="none"/>{ticks}'
        f'<text x="{size / 2}" y="{size - 8}" text-anchor="middle">recorded</text>'
        f'<text x="12" y="{size / 2}" text-anchor="middle" transform="rotate(-90 12 {size / 2})">ours</text>'
        f'<g fill="var(--candidate)" fill-opacity=".75">{dots}</g></svg></div>'
        "<figcaption>A dot for each recorded number, as a share of its scale. On the dashed line both are the same.</figcaption>"
        "</figure></section>"
    )


def _instead(report: Mapping[str, Any]) -> str:
    lines = instead(report)
    if not lines:
        return ""
    told = "".join(f"<p>{escape(line)}</p>" for line in lines)
    link = (
        '<p><a href="instead/index.html">Where the two part, stage by stage</a></p>'
        if report["instead"] is not None
        else ""
    )
    return f'<section aria-labelledby="instead"><h2 id="instead">Served otherwise</h2>{told}{link}</section>'


def _provenance(report: Mapping[str, Any]) -> str:
    facts = [
        ("Weights", f"{report['checkpoint']['file']}, SHA-256 {report['checkpoint']['sha256']}"),
        ("Record", f"{report['record']['file']}, SHA-256 {report['record']['sha256']}"),
        *(("Note", note) for note in report["notes"]),
        *(("Note", note) for note in (*_columns_not_used(report), *_changed(report))),
        *(("Note", note) for note in report.get("adopted", {}).get("warnings", ())),
    ]
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts)
    return f'<section aria-labelledby="from"><h2 id="from">Made from</h2><dl class="metadata">{listed}</dl></section>'
