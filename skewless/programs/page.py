"""What the comparison of two programs found as one HTML page: both sides' own lines beside each other, nothing fetched."""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from skewless.html_page import badge, document, row, table
from skewless.programs.report import (
    CHANGED_UNSEEN,
    FILE_HEAD,
    KINDS,
    LEFT_OUT,
    MEANING,
    SIDES,
    argument,
    changes,
    difference,
    effects,
    file_row,
    flips,
    frequency,
    instead,
    most_moved,
    number,
    percent,
    plain,
    remarks,
    sentence,
    step,
    tables,
    threshold_phrase,
    verdict,
    where,
)
from skewless.skew.report import probability
from skewless.terminal import printable

# Lines of source above and below each line in question, and at most how many lines an expression is looked for in.
_AROUND = 3
_LONGEST = 30
# How a line in question is marked: (sign, what it means). An earlier one counts where a line is in question twice.
_MARKS = {
    "apart": ("≠", "the line in question"),
    "missing": ("−", "only training does this"),
    "common": ("=", "last value in common"),
}


def write_html(report: dict[str, Any], path: Path) -> None:
    """Write the page of what `skewless.programs.diff.diff` returns."""
    title = f"Lines that differ: {plain(report['reference'])} against {plain(report['candidate'])}"
    sections = [
        _summary(report),
        _overview(report),
        *_cards(report),
        _rest(report),
        _files(report),
        _provenance(report),
    ]
    path.write_text(document(title, sections, _CSS), encoding="utf-8")


_CSS = """
.source{margin:.6em 0}
.source figcaption{font-weight:600}
.source pre{margin:.3em 0;padding:8px 0;border:1px solid var(--grid);border-radius:8px;overflow-x:auto;
font:.84rem/1.55 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;tab-size:4}
.source code{font-size:1em;overflow-wrap:normal;display:block;width:max-content;min-width:100%}
.line{display:block;padding:0 12px 0 8px;border-left:4px solid transparent}
.line i{display:inline-block;width:1.6em;font-style:normal;font-weight:700;text-align:center;user-select:none}
.line b{display:inline-block;width:3.2em;margin-right:.6em;font-weight:400;text-align:right;color:var(--muted);user-select:none}
.line.apart{background:var(--tint);border-color:var(--candidate)}
.reference .line.apart{border-color:var(--reference)}
.line.missing{border-left-style:dashed;border-color:var(--reference)}
.line.common{border-left-style:dotted;border-color:var(--good)}
.source.reference,.source.candidate{color:inherit}
.source.reference figcaption span{color:var(--reference)}.source.candidate figcaption span{color:var(--candidate)}
.gap{color:var(--muted)}
.bar{display:block;height:7px;min-width:110px;margin-top:4px;border:1px solid var(--muted);border-radius:4px;overflow:hidden}
.bar span{display:block;height:100%;background:var(--muted)}
.bar.reference span{background:var(--reference)}.bar.candidate span{background:var(--candidate)}
.hidden{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap;user-select:none}
.told dt{font-weight:600}
#cost ~ figure tbody th{min-width:15em;max-width:24em}#cost ~ figure tbody code{font-weight:400}
a{color:var(--reference)}
p,li{overflow-wrap:anywhere}
"""


def _summary(report: dict[str, Any]) -> str:
    causes, count = report["causes"], report["files_compared"]
    most, moved, changed = most_moved(report), changes(report), flips(report)
    if report["files_same"] == count:
        kind, headline = "good", "Both programs return the same"
    else:
        found = (
            f"The programs part at {len(causes)} {'line' if len(causes) == 1 else 'lines'}"
            if causes
            else "The results differ"
        )
        kind, headline = ("bad", f"{found}, and decisions change") if changed else ("warn", found)
    tiles = [
        (
            "First line that differs",
            escape(where(causes[0]["place"])) if causes else "none",
            escape(KINDS[causes[0]["kind"]]) if causes else "",
        ),
        ("Files with the same result", f"{report['files_same']} of {count}", _once(report) if causes else ""),
        (
            "Network&rsquo;s input differs by",
            "unknown" if most is None else number(most["input_largest"]),
            "the shapes differ"
            if most is None
            else ""
            if most["input_relative"] is None
            else f"{percent(most['input_relative'])} of training&rsquo;s largest number",
        ),
    ]
    if moved:
        size = [abs(change) for change in moved]
        tiles += [
            (
                "Change of the probability",
                probability(sum(size) / len(size)),
                f"on average; at most {probability(max(size))}",
            ),
            ("Decisions that change", f"{changed} of {len(moved)}", escape(threshold_phrase(report).strip())),
        ]
    shown = "".join(f"<div><dt>{name}</dt><dd>{value}<small>{note}</small></dd></div>" for name, value, note in tiles)
    return (
        '<section aria-labelledby="verdict"><p class="eyebrow">Does '
        f'<code class="candidate">{escape(plain(report["candidate"]))}</code> (the service) compute what '
        f'<code class="reference">{escape(plain(report["reference"]))}</code> (training) computes? '
        f"{count} {'file' if count == 1 else 'files'} compared.</p>"
        f'<div class="headline {kind}"><h1 id="verdict">{headline}</h1>'
        f"{''.join(f'<p>{_with_code(line)}</p>' for line in verdict(report))}</div>"
        f'<dl class="tiles">{shown}</dl></section>'
    )


def _once(report: dict[str, Any]) -> str:
    return f"{report['files_same_in_the_end']} with training&rsquo;s values in place"


def _with_code(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


# --- the causes


def _overview(report: dict[str, Any]) -> str:
    """What each line costs, as bars: of the probability where a network is known, else of the network's input."""
    causes = report["causes"]
    if not causes:
        return ""
    ways = ("alone", "in_order")
    told = [cause["effect"][way] for cause in causes for way in ways]
    known = any(one and one.get("dp_mean") is not None for one in told)
    largest = max((one.get("input_relative") or 0.0 for one in told if one), default=0.0)
    rows = []
    for at, cause in enumerate(causes, start=1):
        cells = [escape(KINDS[cause["kind"]])]
        for way, colour in zip(ways, SIDES, strict=True):
            cells += _effect_cells(cause["effect"][way], largest, colour, known)
        link = f'<a href="#cause-{at}">{at}. {escape(where(cause["place"]))}</a>'
        rows.append(row(f"{link}<br><code>{escape(plain(cause['place']['text']))}</code>", cells, numeric=2))
    columns = ["Network’s input", *(["Mean |Δp|", "Decisions"] if known else [])]
    groups = (
        f'<tr><td colspan="2"></td><th scope="colgroup" colspan="{len(columns)}">Alone</th>'
        f'<th scope="colgroup" colspan="{len(columns)}">In order</th></tr>'
    )
    return (
        '<section aria-labelledby="cost"><h2 id="cost">What each line costs</h2>'
        f"<p>{escape(MEANING)}</p>"
        + table(
            ["Line of the service", "Against training", *columns, *columns],
            rows,
            numeric=2,
            groups=groups,
            caption="Network&rsquo;s input: the largest change, as a share of training&rsquo;s largest number; the longest bar "
            "is the largest of them." + (" Δp: change of the probability." if known else ""),
        )
        + "</section>"
    )


def _effect_cells(told: dict[str, Any] | None, largest: float, colour: str, scored: bool) -> list[str]:
    share = told.get("input_relative") if told else None
    cells = ["-" if share is None else f"{percent(share)}{_bar(share, largest, colour)}"]
    if scored:
        mean, changed = (told.get(name) if told else None for name in ("dp_mean", "flips"))
        cells += [probability(mean), "-" if changed is None else str(changed)]
    return cells


def _bar(share: float, largest: float, colour: str) -> str:
    """A bar whose number stands beside it in words."""
    width = 100.0 if share >= largest else 100 * share / largest
    return (
        f'<span class="bar {colour}" aria-hidden="true"><span style="width:{width if share else 0:.1f}%"></span></span>'
    )


def _cards(report: dict[str, Any]) -> list[str]:
    if not report["causes"]:
        return []
    legend = ", ".join(f"<b>{sign}</b> {escape(meaning)}" for sign, meaning in _MARKS.values())
    cards = "".join(_card(report, at, cause) for at, cause in enumerate(report["causes"], start=1))
    return [
        '<section aria-labelledby="lines"><h2 id="lines">Line by line</h2>'
        f'<p class="note">Marks in the source: {legend}.</p>{cards}</section>'
    ]


def _card(report: dict[str, Any], at: int, cause: dict[str, Any]) -> str:
    common = cause["last_common"]
    told = [
        (
            "Last in common",
            [f"{step(common[side])} ({SIDES[side]})" for side in ("candidate", "reference") if common[side]],
        ),
        ("Difference", difference(cause)),
        ("Found", [frequency(report, cause)]),
        *((way.capitalize(), [text]) for way, text in effects(cause)),
        ("Note", [CHANGED_UNSEEN] if cause["changed_unseen"] else []),
    ]
    listed = "".join(
        f"<dt>{name}</dt>" + "".join(f"<dd>{escape(line)}</dd>" for line in lines) for name, lines in told if lines
    )
    return (
        f'<article aria-labelledby="cause-{at}"><h3 id="cause-{at}">{at}. {escape(where(cause["place"]))} '
        f"<code>{escape(plain(cause['place']['text']))}</code> {badge(KINDS[cause['kind']], 'differs')}</h3>"
        f"<p>{_with_code(sentence(instead(cause)))}</p>"
        f'<div class="pair">{_sources(report, cause, at, "reference")}{_sources(report, cause, at, "candidate")}</div>'
        f"{_left_out(cause)}"
        f'<dl class="metadata told">{listed}</dl>{_relation_numbers(cause)}{_arguments(cause)}</article>'
    )


def _left_out(cause: dict[str, Any]) -> str:
    if not cause["missing"]:
        return ""
    steps = "".join(
        f"<li>{escape(where(place))} <code>{escape(plain(place['text']))}</code></li>" for place in cause["missing"]
    )
    return f"<p>{escape(LEFT_OUT[:1].upper() + LEFT_OUT[1:])}:</p><ul>{steps}</ul>"


def _relation_numbers(cause: dict[str, Any]) -> str:
    numbers = cause["relation"]["numbers"] if cause["relation"] else {}
    if not numbers:
        return ""
    listed = "".join(
        f"<dt>{escape(plain(name))}</dt><dd>{escape(_told(value))}</dd>" for name, value in numbers.items()
    )
    return f'<details><summary>The difference in numbers</summary><dl class="metadata">{listed}</dl></details>'


def _told(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{plain(name)} {_told(one)}" for name, one in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(f"({_told(one)})" if isinstance(one, list | tuple | Mapping) else _told(one) for one in value)
    return f"{value:.6g}" if isinstance(value, float) else plain(value)


def _arguments(cause: dict[str, Any]) -> str:
    if not cause["arguments"]:
        return ""
    rows = [
        row(
            f"<code>{escape(plain(one['argument']))}</code>",
            [f"<code>{escape(text)}</code>" for text in argument(one)],
            numeric=3,
        )
        for one in cause["arguments"]
    ]
    function = escape(plain(cause["arguments"][0]["function"]))
    return table(
        ["Argument", "Training", "The service"],
        rows,
        numeric=3,
        caption=f"Arguments of <code>{function}</code> that differ",
    )


# --- source


def _sources(report: dict[str, Any], cause: dict[str, Any], at: int, side: str) -> str:
    """The side's own lines around those in question, one figure for each file."""
    places = [
        ("apart", cause["place" if side == "candidate" else "counterpart"]),
        *(("missing", place) for place in cause["missing"] if side == "reference"),
        ("common", cause["last_common"][side]),
    ]
    by_file: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for mark, place in places:
        if place is not None:
            by_file.setdefault(place["file"], []).append((mark, place))
    if not by_file:
        return f"<div><p class=note>{escape(SIDES[side].capitalize())}: no line to show.</p></div>"
    figures = [
        _figure(report["sources"][side].get(file), file, marked, side, f"source-{at}-{side}-{n}")
        for n, (file, marked) in enumerate(by_file.items())
    ]
    return f"<div>{''.join(figures)}</div>"


def _figure(source: str | None, file: str, marked: list[tuple[str, dict[str, Any]]], side: str, key: str) -> str:
    # As Python counts lines: a form feed does not end one.
    lines = [] if source is None else [line.expandtabs(4) for line in re.split(r"\r\n?|\n", source)]
    marks: dict[int, str] = {}
    for mark, place in marked:
        for at in range(place["line"], _last_line(lines, place) + 1):
            marks.setdefault(at, mark)
    shown = sorted({near for at in marks for near in range(at - _AROUND, at + _AROUND + 1) if 1 <= near <= len(lines)})
    indent = min((len(line) - len(line.lstrip()) for at in shown if (line := lines[at - 1]).strip()), default=0)
    parts = []
    for n, at in enumerate(shown):
        if n and at != shown[n - 1] + 1:
            parts.append('<span class="line gap" aria-hidden="true">⋯\n</span>')
        parts.append(_line(at, lines[at - 1][indent:], marks.get(at)))
    if not shown:
        # A trace from elsewhere may come without its source.
        parts = [_line(place["line"], place["text"], mark) for mark, place in marked]
    return (
        f'<figure class="source {side}"><figcaption id="{key}"><span>{escape(SIDES[side].capitalize())}</span>: {escape(plain(file))}'
        f'</figcaption><pre tabindex="0" role="region" aria-labelledby="{key}"><code>{"".join(parts)}</code></pre></figure>'
    )


def _last_line(lines: list[str], place: dict[str, Any]) -> int:
    """The line on which the expression at a place ends; its text is known with single spaces and cut where it is long."""
    text = " ".join(place["text"].removesuffix("...").split())
    for end in range(place["line"], min(place["line"] + _LONGEST, len(lines) + 1)):
        if text in " ".join(" ".join(lines[place["line"] - 1 : end]).split()):
            return end
    return int(place["line"])


def _line(at: int, text: str, mark: str | None) -> str:
    sign, meaning = _MARKS[mark] if mark else ("", "")
    spoken = f'<span class="hidden">{escape(meaning)}: </span>' if mark else ""
    return (
        f'<span class="line {mark or ""}"><i aria-hidden="true">{sign}</i><b>{at} </b>{spoken}'
        f"{escape(printable(text))}\n</span>"
    )


# --- what else was found


def _rest(report: dict[str, Any]) -> str:
    parts = []
    for title, head, rows in tables(report):
        if head == FILE_HEAD:
            continue  # all of them have a section of their own
        ready = [row(escape(first), [_cell(cell) for cell in cells], numeric=len(head)) for first, *cells in rows]
        parts.append(
            f"<h3>{escape(title)}</h3>"
            + table([name.capitalize() for name in head], ready, numeric=len(head), caption="")
        )
    for title, lines in remarks(report):
        parts.append(f"<h3>{escape(title)}</h3><ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>")
    if not parts:
        return ""
    return f'<section aria-labelledby="rest"><h2 id="rest">What else was found</h2>{"".join(parts)}</section>'


def _cell(text: str) -> str:
    return f"<code{' class=unit' if len(text) <= 30 else ''}>{escape(text)}</code>"


def _files(report: dict[str, Any]) -> str:
    rows = []
    for each in report["files"]:
        first, *cells = file_row(each)
        cells[0] = badge(cells[0], "same" if each["same"] else "differs")
        rows.append(row(escape(first), [cells[0], *map(escape, cells[1:])], numeric=2))
    head = [name.capitalize() for name in FILE_HEAD]
    listed = table(
        head,
        rows,
        numeric=2,
        caption="The service against training, as they are. Shapes and scores: training → the service.",
    )
    return (
        f'<section aria-labelledby="files"><h2 id="files">All files</h2><details><summary>{len(rows)} compared</summary>'
        f"{listed}</details></section>"
    )


def _provenance(report: dict[str, Any]) -> str:
    versions = {
        f"Packages in {SIDES[side]}": ", ".join(
            f"{plain(name)} {plain(version)}" for name, version in report["versions"][side].items()
        )
        for side in SIDES
    }
    metadata = {
        "Training": plain(report["reference"]),
        "The service": plain(report["candidate"]),
        "Counted as the same": f"numbers closer than {percent(report['rtol'])} of training's largest",
        **versions,
    }
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in metadata.items())
    return (
        f'<section aria-labelledby="from"><h2 id="from">How it was measured</h2><dl class="metadata">{listed}</dl>'
        '<p class="note">Both programs ran on the same files, each in a process of its own, with their values noted line by line. '
        "A line is named where its inputs are values that training has and its result is one that training never has.</p></section>"
    )
