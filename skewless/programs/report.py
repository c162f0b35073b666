"""What the comparison of two programs found, in sentences and tables for the terminal."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable
from typing import Any

from skewless.programs.trace import Event, Site, Trace
from skewless.skew.report import probability
from skewless.terminal import columns, printable

SIDES = {"reference": "training", "candidate": "the service"}
_WIDTH = 110
_CELL = 80


def as_text(report: dict[str, Any]) -> str:
    """The terminal report of what `skewless.programs.diff.diff` returns: verdict, causes, then what else the programs do differently."""
    parts = [
        f"Training: {plain(report['reference'])}\nService:  {plain(report['candidate'])}",
        "\n".join(textwrap.fill(line, _WIDTH, break_long_words=False) for line in verdict(report)),
        *(_cause(report, number, cause) for number, cause in enumerate(report["causes"], start=1)),
    ]
    if report["causes"]:
        parts.append(textwrap.fill(MEANING, _WIDTH))
    for title, head, rows in tables(report):
        parts.append(f"{title}\n\n{columns(head, [[_short(cell) for cell in row] for row in rows])}")
    for title, lines in remarks(report):
        wrapped = (textwrap.fill(line, _WIDTH, initial_indent="  ", subsequent_indent="    ") for line in lines)
        parts.append("\n".join([f"{title}:", *wrapped]))
    return "\n\n".join(parts)


MEANING = (
    "Alone: training's program, with only this line done as the service does it, against training's as it is. In order: the "
    "service's program with all lines above put right, before and after this one is put right too."
)


def verdict(report: dict[str, Any]) -> list[str]:
    """The report in sentences: whether the programs return the same, the line at which they first part, what it costs."""
    causes, count = report["causes"], report["files_compared"]
    if report["files_same"] == count:
        lines = [f"Both programs return the same {_on_all(count)}. {_apart(report)}"]
    elif not causes:
        lines = [
            f"The programs return different results {_in_files(count - report['files_same'], count)}, and no line of the service was "
            f"found at which they part. {_apart(report)}"
        ]
    else:
        first = causes[0]
        lines = [f"The service first parts from training at {quoted(first['place'])}. {sentence(instead(first))}"]
        if len(causes) > 1:
            lines.append(
                f"{len(causes)} such lines were found; they are listed in the order in which the service runs them."
            )
        lines += [_in_the_end(report), _apart(report)]
        if (most := _most_effect(causes)) is not None:
            lines.append(f"Number {most} has the largest effect alone: {where(causes[most - 1]['place'])}.")
    if other := len(untold_calls(report)) + len(report["settings"]) + len(report["versions"]["apart"]):
        what = (
            "argument of a library function, setting or version"
            if other == 1
            else "arguments of library functions, settings or versions"
        )
        lines.append(f"They also differ in {other} {what} listed below, which may matter on other files.")
    lines += _swallowed_sentences(report)
    if report["unreadable"]:
        left = len(report["unreadable"])
        lines.append(f"{left} {'file' if left == 1 else 'files'} could not be compared; the reasons are below.")
    return lines


def tables(report: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, head, rows) of what differs besides the causes; the last column says where, and tables without rows are left out."""
    head = ["training", "the service", "training's line", "the service's line"]
    calls = [
        [
            plain(f"{call['function']}: {call['argument']}"),
            *argument(call),
            *(where(call["places"][side]) for side in SIDES),
        ]
        for call in untold_calls(report)
    ]
    settings = [
        [plain(each[part]) for part in ("name", "reference", "candidate", "reference_place", "candidate_place")]
        for each in report["settings"]
    ]
    versions = [[plain(part) for part in each] for each in report["versions"]["apart"]]
    changed = sorted(
        (each for each in report["files"] if not each["same"]), key=lambda each: -(each["input_relative"] or 0.0)
    )
    found = [
        ("Library functions that get other arguments, besides those above", ["argument", *head], calls),
        ("Names that both programs give a value, and another one", ["name", *head], settings),
        ("Exceptions that the programs swallow", ["exception", *head[2:]], swallowed(report)),
        ("Packages in another version", ["package", *head[:2]], versions),
        (
            f"Files with another result{', the five furthest apart' if len(changed) > 5 else ''}",
            FILE_HEAD,
            [file_row(each) for each in changed[:5]],
        ),
    ]
    return [(title, names, rows) for title, names, rows in found if rows]


def remarks(report: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """(title, lines) of what is told in words at the end."""
    stopped: dict[str, int] = {}
    for each in report["files"]:
        if not each["same_in_the_end"] and each["stopped"]:
            stopped[each["stopped"]] = stopped.get(each["stopped"], 0) + 1
    count = report["files_compared"]
    found = [
        (
            "Where the search ended before the results agreed",
            [f"{_in_files(n, count)}: {plain(why)}" for why, n in stopped.items()],
        ),
        *(
            (f"Library functions that only {SIDES[side]} calls", [", ".join(map(plain, report["only_called"][side]))])
            for side in SIDES
            if report["only_called"][side] and report["files_same"] < count
        ),
        *((f"Notes on {SIDES[side]}", [plain(note) for note in report["notes"][side]]) for side in SIDES),
        (
            "Files that could not be compared",
            [f"{plain(u['file'])}: {plain(u['reason'])}" for u in report["unreadable"]],
        ),
    ]
    return [(title, lines) for title, lines in found if lines]


# --- one cause


def _cause(report: dict[str, Any], number: int, cause: dict[str, Any]) -> str:
    rows = [("the service", step(cause["place"]), False), ("training", _there(cause), False)]
    for side in ("candidate", "reference"):
        if place := cause["last_common"][side]:
            rows.append(("last in common", f"{step(place)}  ({SIDES[side]})", False))
    if cause["missing"]:
        rows.append(("left out", f"{LEFT_OUT}:", False))
        rows += [("left out", step(place), False) for place in cause["missing"]]
    rows += [("difference", line, True) for line in difference(cause)]
    rows += [
        ("argument", f"{plain(a['argument'])} of {plain(a['function'])}: {_both(a)}", True) for a in cause["arguments"]
    ]
    rows.append(("found", frequency(report, cause), True))
    rows += [(way, text, True) for way, text in effects(cause)]
    if cause["put_right_at"]:
        rows.append(("put right at", step(cause["put_right_at"]), True))
    if cause["changed_unseen"]:
        rows.append(("note", CHANGED_UNSEEN, True))
    lines: list[str] = []
    for at, (label, text, wrap) in enumerate(rows):
        repeated = at > 0 and rows[at - 1][0] == label
        start = f"{f'{number}.' if at == 0 else '':<4}{'' if repeated else label:<16}"
        lines += textwrap.wrap(
            text,
            _WIDTH if wrap else 10_000,
            initial_indent=start,
            subsequent_indent=" " * len(start),
            break_long_words=False,
        )
    return "\n".join(lines)


LEFT_OUT = "training has done this before, and the service never has"
CHANGED_UNSEEN = "a value that this line is given was changed in a way that was not recorded, so what differs may be done before this line"


def _there(cause: dict[str, Any]) -> str:
    return step(cause["counterpart"]) if cause["counterpart"] else instead(cause)


# What a cause is called in a word or two.
KINDS = {
    "other": "computed otherwise",
    "missing": "steps left out",
    "extra": "a step too many",
    "number": "another number of runs",
    "unlike": "nothing like it in training",
}


def instead(cause: dict[str, Any]) -> str:
    """What training does at the cause's line, as a sentence without its full stop."""
    kind = cause["kind"]
    if kind == "extra":
        return "training does nothing there and goes on with the value that the service's line is given"
    if cause["counterpart"] is None:
        return "training computes nothing like it"
    there = f"training has {quoted(cause['counterpart'])} there"
    if kind == "missing":
        count = len(cause["missing"])
        return f"{there}, after {count} {'step' if count == 1 else 'steps'} that the service leaves out, from {quoted(cause['missing'][0])} on"
    return there


def difference(cause: dict[str, Any]) -> list[str]:
    """How the two values differ: the relation in words, the largest difference, and their shapes and types if those differ."""
    lines = []
    relation, values = cause["relation"], cause["value"]
    if relation is not None:
        text = plain(relation["text"])
        if relation["largest"]:
            text += f"; largest difference {number(relation['largest'])}{_of_largest(relation['relative'])}"
        lines.append(text)
    if values["candidate"] and values["reference"]:
        ours, theirs = values["candidate"], values["reference"]
        if (ours["shape"], ours["dtype"]) != (theirs["shape"], theirs["dtype"]):
            lines.append(f"training's value is {shape(theirs)}, the service's {shape(ours)}")
    return lines


def frequency(report: dict[str, Any], cause: dict[str, Any]) -> str:
    """In how many files a cause was found, and how often its line ran in one of them."""
    text = _in_files(cause["files"], report["files_compared"])
    return text if cause["runs"] == 1 else f"{text}; the line differs in up to {cause['runs']} runs for one file"


def effects(cause: dict[str, Any]) -> list[tuple[str, str]]:
    """(way, sentence) of what a cause does to the network's input, the probability and decisions: alone, and in order."""
    if cause["stopped"]:
        return [
            (
                "effect",
                f"not measured: training's value could not be put in place of this line's ({plain(cause['stopped'])}). The lines "
                "told after it were found with this one as it is",
            )
        ]
    return [("alone", _effect(cause["effect"]["alone"])), ("in order", _effect(cause["effect"]["in_order"]))]


def _effect(told: dict[str, Any] | None) -> str:
    if told is None:
        return "not measured"
    if not told["files"]:
        return f"not measured: {plain(told['refused'])}"
    if told["input_largest"] is None:
        parts = ["the network's input has another shape, so its change cannot be told"]
    elif not told["input_largest"]:
        parts = ["the network's input does not change"]
    else:
        parts = [
            f"the network's input changes by at most {number(told['input_largest'])}{_of_largest(told['input_relative'])}"
        ]
    if told["rows"]:
        one, other = told["rows"]
        parts.append(f"of {one} and {other} rows, the first {min(one, other)} were compared")
    if told["dp_mean"] is not None:
        parts.append(
            f"the probability by {probability(told['dp_mean'])} on average and {probability(told['dp_largest'])} at most"
        )
    if told["flips"] is not None:
        parts.append(f"{told['flips']} of {told['files']} decisions change")
    if told["refused"]:
        parts.append(f"not measured on every file ({plain(told['refused'])})")
    return "; ".join(parts)


# --- what else was found


FILE_HEAD = ["file", "result", "largest difference", "of training's largest", "shapes", "scores", "decision"]


def file_row(each: dict[str, Any]) -> list[str]:
    """A file's cells under FILE_HEAD."""
    ours, theirs = each["shapes"]["candidate"], each["shapes"]["reference"]
    same = ours == theirs
    shapes = _shapes(theirs) if same else f"{_shapes(theirs)} → {_shapes(ours)}"
    scores = [each["scores"][side] for side in SIDES]
    shown = " → ".join(_scores(s) for s in scores) if all(scores) else "-"
    changed = {None: "-", True: "changes", False: "same"}[each["flipped"]]
    result = "same" if each["same"] else "same once put right" if each["same_in_the_end"] else "differs"
    return [
        plain(each["file"]),
        result,
        "-" if each["input_largest"] is None else number(each["input_largest"]),
        "-" if each["input_relative"] is None else percent(each["input_relative"]),
        shapes,
        shown,
        changed,
    ]


def untold_calls(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Library calls with other arguments that no cause has told already."""
    told = {_key(one) for cause in report["causes"] for one in cause["arguments"]}
    return [call for call in report["calls"] if _key(call) not in told]


def _key(call: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(call[name] for name in ("function", "argument", "reference", "candidate"))


def argument(one: dict[str, Any]) -> list[str]:
    """(training's, the service's) value of an argument; one that the program did not write is its default."""
    shown = []
    for side in SIDES:
        value = one[side]
        if value is None:
            shown.append("not given")
        else:
            shown.append(plain(value) + ("" if one["given"][side] else " (default)"))
    return shown


def swallowed(report: dict[str, Any]) -> list[list[str]]:
    """A row for each exception: its name and message, and where training and the service swallow it, "-" where a side does not."""
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    for side in SIDES:
        for one in report["swallowed"][side]:
            places = found.setdefault((one["exception"], one["message"]), {each: [] for each in SIDES})[side]
            places.append(f"{where(one['place'])} ({one['count']} {'time' if one['count'] == 1 else 'times'})")
    return [
        [plain(f"{kind}: {message}" if message else kind), *(", ".join(places[side]) or "-" for side in SIDES)]
        for (kind, message), places in found.items()
    ]


def _swallowed_sentences(report: dict[str, Any]) -> list[str]:
    rows = swallowed(report)
    groups = [
        ("Both programs swallow", "What was to run there did not run to its end on either side, so no difference shows it.",
         [row for row in rows if "-" not in row[1:]]),
        ("Training swallows", "The service does not. What was to run there did not run to its end.", [row for row in rows if row[2] == "-"]),
        ("The service swallows", "Training does not. What was to run there did not run to its end.", [row for row in rows if row[1] == "-"]),
    ]  # fmt: skip
    lines = []
    for start, meaning, found in groups:
        if found:
            exception, *places = found[0]
            others = f", and {len(found) - 1} more (listed below)" if len(found) > 1 else ""
            at = " and ".join(
                f"{place} in {side}" for place, side in zip(places, SIDES.values(), strict=True) if place != "-"
            )
            lines.append(f"{start} {exception}, at {at}{others}. {meaning}")
    return lines


# --- words


def where(place: dict[str, Any]) -> str:
    return f"{plain(place['file'])}:{place['line']}"


def step(place: dict[str, Any]) -> str:
    """A line and what stands there: `train.py:14  db.max() - 80`."""
    return f"{where(place)}  {plain(place['text'])}"


def quoted(place: dict[str, Any]) -> str:
    """The same within a sentence."""
    return f"{where(place)} `{plain(place['text'])}`"


def plain(text: Any) -> str:
    """One line of text from a program, an exception or a file name, with nothing in it that a terminal would obey."""
    return printable(" ".join(str(text).split()))


def number(value: float) -> str:
    return f"{value:.3g}"


def percent(value: float) -> str:
    return f"{100 * value:.3g} %"


def shape(value: dict[str, Any]) -> str:
    """An array as numpy writes it: `float32 (2, 6)`."""
    return f"{plain(value['dtype'])} {tuple(value['shape'])}"


def most_moved(report: dict[str, Any]) -> dict[str, Any] | None:
    """The file whose network input differs most, None where no two inputs can be subtracted."""
    told = [each for each in report["files"] if each["input_largest"] is not None]
    return max(told, key=lambda each: each["input_largest"], default=None)


def changes(report: dict[str, Any]) -> list[float]:
    """By how much the service's score is off training's, of the class that training chooses; for each file with scores."""
    pairs = [(each["scores"]["reference"], each["scores"]["candidate"]) for each in report["files"]]
    return [b[a.index(max(a))] - a[a.index(max(a))] for a, b in pairs if a and b]


def flips(report: dict[str, Any]) -> int | None:
    """How many decisions change, None without a network."""
    known = [each["flipped"] for each in report["files"] if each["flipped"] is not None]
    return sum(known) if known else None


def threshold_phrase(report: dict[str, Any]) -> str:
    """Where decisions are made, as the end of a sentence; with more than one score no threshold decides."""
    single = any(len(each["scores"]["reference"] or ()) == 1 for each in report["files"])
    return f" at threshold {report['threshold']:g}" if single and report["threshold"] is not None else ""


def _apart(report: dict[str, Any]) -> str:
    """How far the results are apart as they are, in one or two sentences."""
    most, moved, count = most_moved(report), changes(report), report["files_compared"]
    if most is None:
        text = "The two results have different shapes, so their difference cannot be told."
    elif not most["input_largest"]:
        text = "The largest difference of the network's input is 0."
    else:
        text = f"The network's input differs by at most {number(most['input_largest'])}{_of_largest(most['input_relative'])}."
    if any(each["rows"] for each in report["files"]):
        text += " Where the two have another number of rows, those that both have are compared."
    if moved:
        size = [abs(change) for change in moved]
        text += (
            f" The probability changes by {probability(sum(size) / len(size))} on average and {probability(max(size))} at most; "
            f"{flips(report)} of {len(moved)} decisions change{threshold_phrase(report)}."
        )
    if report["files_same"] == count:
        text += f" Numbers closer than {percent(report['rtol'])} of training's largest count as the same."
    return text


def _most_effect(causes: list[dict[str, Any]]) -> int | None:
    """The number of the cause with the largest effect alone: on the probability where it is known, else on the input."""
    told = [
        (number, cause["effect"]["alone"]) for number, cause in enumerate(causes, start=1) if cause["effect"]["alone"]
    ]
    for name in ("dp_mean", "input_largest"):
        known = [(one[name], -number) for number, one in told if one.get(name)]
        if len(told) > 1 and known:
            return -max(known)[1]
    return None


def _of_largest(relative: float | None) -> str:
    return "" if relative is None else f" ({percent(relative)} of training's largest number)"


def _both(one: dict[str, Any]) -> str:
    theirs, ours = argument(one)
    return f"{theirs} in training, {ours} in the service"


def _on_all(count: int) -> str:
    return "on the one file compared" if count == 1 else f"on all {count} files"


def _in_files(some: int, count: int) -> str:
    return _on_all(count) if some == count else f"on {some} of {count} files"


def _in_the_end(report: dict[str, Any]) -> str:
    """Whether the results agree once training's values are in place."""
    causes, count, same = report["causes"], report["files_compared"], report["files_same_in_the_end"]
    right = sum(not cause["stopped"] for cause in causes)
    if same == count:
        put = "value in its place" if len(causes) == 1 else "values in their places"
        return f"With training's {put}, both programs return the same {_on_all(count)}."
    if not right:
        return "Training's value could not be put in its place, so there may be more such lines behind it."
    return (
        f"Training's values could be put in place of {right} of these {len(causes)} lines. With that, both programs return the same "
        f"{_in_files(same, count)}, so there may be more such lines."
    )


def sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _shapes(shapes: Iterable[list[int]]) -> str:
    return " + ".join("x".join(map(str, each)) or "1" for each in shapes) or "none"


def _scores(scores: list[float]) -> str:
    return "/".join(f"{score:.4f}" for score in scores)


def _short(cell: str) -> str:
    return cell if len(cell) <= _CELL else f"{cell[: _CELL - 3]}..."


def trace_text(trace: Trace, plain_seconds: float, most: int = 40) -> str:
    """What a traced run computed, line by line: the lines with the arrays they gave, the last `most` of them."""
    ends: dict[tuple[str, int], Event] = {}
    runs: Counter[Site] = Counter()
    for event in trace.events:
        ends[event.site.whole] = event
        runs[event.site] += 1
    told = sorted(ends.values(), key=lambda event: event.number)
    rows = [
        [
            str(event.site),
            f"{runs[event.site]} x" if runs[event.site] > 1 else "",
            _short(event.site.text),
            " ".join(f"{item.kind} {item.dtype} {tuple(item.shape)}" for item in event.outputs[:2]),
        ]
        for event in told[-most:]
    ]
    parts = [
        f"{trace.program} on {trace.file}: {len(trace.events)} results noted, {len(told)} lines, {trace.seconds:.2f} s (plain {plain_seconds:.2f} s)",
        columns(["line", "runs", "what", "gives"], rows),
    ]
    if len(told) > most:
        parts.insert(1, f"The last {most} lines:")
    parts += [f"{s.site} kept {s.exception} from the caller, {s.count} x: {s.message}" for s in trace.swallowed]
    parts += list(trace.notes)
    return "\n\n".join(parts)
