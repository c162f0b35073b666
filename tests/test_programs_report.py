"""What the comparison of two programs tells, in the terminal and on the page, from reports made by hand."""

from __future__ import annotations

import copy
import itertools
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from skewless.programs.page import write_html
from skewless.programs.report import as_text, verdict

TRAIN = """import torch


def network_input(path):
    x = read(path)
    x = sosfilt(
        high_pass(2),
        x,
    )
    x = x / x.abs().max()
    db = to_db(x)
    db = torch.maximum(db, db.max() - 80)
    return db
"""
SERVE = """def network_input(path):
    x = read(path)

    x = x / 32768
    db = to_db(x, top_db=90)



    # far away from the line above



    db = torch.maximum(db, db.max() - 90)
    return db[:7]
"""


def place(file: str, line: int, text: str) -> dict[str, Any]:
    return {"file": file, "line": line, "text": text, "function": "network_input"}


def effect(largest: float | None, relative: float | None, **others: Any) -> dict[str, Any]:
    return {
        "files": 2, "input_largest": largest, "input_relative": relative, "rows": None, "dp_mean": None, "dp_largest": None,
        "flips": None, "refused": "", **others,
    }  # fmt: skip


def argument(
    function: str, name: str, theirs: str | None, ours: str | None, given: tuple[bool, bool]
) -> dict[str, Any]:
    return {
        "function": function,
        "argument": name,
        "reference": theirs,
        "candidate": ours,
        "given": {"reference": given[0], "candidate": given[1]},
    }


def cause(kind: str, at: dict[str, Any], there: dict[str, Any] | None, **others: Any) -> dict[str, Any]:
    value = {"kind": "torch", "shape": [3], "dtype": "float32"}
    return {
        "kind": kind,
        "place": at,
        "operation": "-",
        "counterpart": there,
        "counterpart_operation": "-" if there else None,
        "put_right_at": None,
        "last_common": {"candidate": None, "reference": None},
        "missing": [],
        "value": {"candidate": value, "reference": value if there else None},
        "relation": None,
        "arguments": [],
        "files": 1,
        "runs": 1,
        "changed_unseen": False,
        "stopped": "",
        "effect": {"alone": None, "in_order": None},
        **others,
    }


def file(name: str, **others: Any) -> dict[str, Any]:
    return {
        "file": name, "same": False, "same_in_the_end": True, "stopped": "", "input_largest": 3.25, "input_relative": 0.5,
        "rows": None, "shapes": {"reference": [[7, 40]], "candidate": [[7, 40]]},
        "scores": {"reference": None, "candidate": None}, "flipped": None, "refused": "", "causes": [],
        "seconds": {"reference": 0.1, "candidate": 0.1}, **others,
    }  # fmt: skip


TOP_DB = argument("to_db", "top_db", "80", "90", (False, True))


def everything() -> dict[str, Any]:
    """Three causes (computed otherwise after a step left out, a step too many, nothing like it), and all that can be told besides."""
    level = cause(
        "missing",
        place("serve.py", 4, "x / 32768"),
        place("train.py", 10, "x / x.abs().max()"),
        last_common={"candidate": place("serve.py", 2, "read(path)"), "reference": place("train.py", 5, "read(path)")},
        missing=[place("train.py", 6, "sosfilt( high_pass(2), x, )")],
        relation={
            "kind": "scale",
            "text": "the service's value is 0.6635 times training's",
            "numbers": {"ratio": 0.6635, "bands": [[0.1, -3.5]]},
            "largest": 0.3365,
            "relative": 0.25,
        },
        files=2,
        effect={
            "alone": effect(2.0, 0.4, dp_mean=0.12, dp_largest=0.2, flips=1),
            "in_order": effect(1.0, 0.1, dp_mean=0.11, dp_largest=0.19, flips=0, rows=[7, 9]),
        },
    )
    floor = cause(
        "other",
        place("serve.py", 13, "db.max() - 90"),
        place("train.py", 12, "db.max() - 80"),
        arguments=[TOP_DB],
        runs=5,
        changed_unseen=True,
        value={
            "candidate": {"kind": "numpy", "shape": [2, 6], "dtype": "float64"},
            "reference": {"kind": "numpy", "shape": [1, 6], "dtype": "float32"},
        },
        effect={"alone": effect(None, None), "in_order": {"files": 0, "refused": "serve.py returns no array"}},
    )
    extra = cause("extra", place("serve.py", 14, "db[:7]"), None, effect={"alone": effect(0.0, 0.0), "in_order": None})
    unlike = cause("unlike", place("helpers.py", 3, "warp(x)"), None, stopped="training computes nothing like it")
    places = {"reference": place("train.py", 11, "to_db(x)"), "candidate": place("serve.py", 5, "to_db(x, top_db=90)")}
    return {
        "reference": "train.py:network_input",
        "candidate": "serve.py:network_input",
        "rtol": 1e-5,
        "threshold": 0.5,
        "files_compared": 2,
        "files_same": 0,
        "files_same_in_the_end": 1,
        "causes": [level, floor, extra, unlike],
        "files": [
            file("one.wav", scores={"reference": [0.25], "candidate": [0.75]}, flipped=True),
            file(
                "two.wav",
                same_in_the_end=False,
                stopped="training computes nothing like it",
                input_largest=None,
                input_relative=None,
                shapes={"reference": [[7, 40]], "candidate": [[9, 40], [2]]},
                scores={"reference": [0.5], "candidate": [0.625]},
                flipped=False,
            ),
        ],
        "unreadable": [{"file": "three.wav", "reason": "ValueError: not audio"}],
        "calls": [
            {**TOP_DB, "places": places, "files": 2},
            {**argument("torch.stft", "center", "True", "False", (False, True)), "places": places, "files": 2},
            {**argument("torch.stft", "window", None, "'hann'", (False, True)), "places": places, "files": 2},
        ],
        "only_called": {"reference": ["scipy.signal.sosfilt"], "candidate": []},
        "swallowed": {
            "reference": [
                {"place": place("train.py", 4, "except E:"), "exception": "AttributeError", "message": "no highpass", "files": 2, "count": 2},
                {"place": place("train.py", 9, "except E:"), "exception": "KeyError", "message": "'a'", "files": 1, "count": 1},
            ],
            "candidate": [
                {"place": place("serve.py", 8, "except E:"), "exception": "AttributeError", "message": "no highpass", "files": 2, "count": 2},
                {"place": place("serve.py", 9, "except E:"), "exception": "OSError", "message": "", "files": 1, "count": 3},
            ],
        },
        "settings": [
            {"name": "SAMPLE_RATE", "reference": "16000", "candidate": "22050", "reference_place": "train.py:2", "candidate_place": "serve.py:3"}
        ],
        "versions": {
            "reference": {"python": "3.11.7", "librosa": "0.9.2"},
            "candidate": {"python": "3.11.7", "librosa": "0.11.0"},
            "apart": [["librosa", "0.9.2", "0.11.0"]],
        },
        "notes": {"reference": ["a generator was not followed"], "candidate": []},
        "sources": {"reference": {"train.py": TRAIN}, "candidate": {"serve.py": SERVE}},
    }  # fmt: skip


def nothing() -> dict[str, Any]:
    """Both programs return the same, on three files."""
    same = everything()
    same.update(
        files_compared=3,
        files_same=3,
        files_same_in_the_end=3,
        causes=[],
        unreadable=[],
        calls=[],
        settings=[],
        threshold=None,
    )
    same["files"] = [
        file(name, same=True, input_largest=largest, input_relative=largest / 4)
        for name, largest in (("one.wav", 0.0), ("two.wav", 2e-6), ("three.wav", 1e-6))
    ]
    same["swallowed"] = {"reference": [], "candidate": []}
    same["versions"]["apart"] = []
    same["notes"]["reference"] = []
    return same


def blocks(report: dict[str, Any]) -> list[str]:
    """The terminal report's paragraphs, each without its line breaks."""
    return [" ".join(block.split()) for block in as_text(report).split("\n\n")]


# --- the terminal


def test_the_verdict_names_the_first_line_and_what_it_costs():
    lines = verdict(everything())
    assert lines[0] == (
        "The service first parts from training at serve.py:4 `x / 32768`. Training has train.py:10 `x / x.abs().max()` there, after 1 "
        "step that the service leaves out, from train.py:6 `sosfilt( high_pass(2), x, )` on."
    )
    assert lines[1].startswith("4 such lines were found")
    assert lines[2].startswith(
        "Training's values could be put in place of 3 of these 4 lines. With that, both programs return the same on 1 of 2"
    )
    assert lines[3].startswith("The network's input differs by at most 3.25 (50 % of training's largest number).")
    assert "changes by 0.3125 on average and 0.5000 at most; 1 of 2 decisions change at threshold 0.5." in lines[3]
    assert "Number 1 has the largest effect alone: serve.py:4." in lines
    assert "1 file could not be compared; the reasons are below." in lines


def test_each_cause_has_a_paragraph_with_its_own_facts():
    text = blocks(everything())
    first, second, third, fourth = (next(b for b in text if b.startswith(f"{n}. the service")) for n in (1, 2, 3, 4))
    assert first.startswith(
        "1. the service serve.py:4 x / 32768 training train.py:10 x / x.abs().max() last in common serve.py:2 read(path) (the service)"
    )
    assert "train.py:5 read(path) (training)" in first
    assert (
        "left out training has done this before, and the service never has: train.py:6 sosfilt( high_pass(2), x, )"
        in first
    )
    assert (
        "difference the service's value is 0.6635 times training's; largest difference 0.337 (25 % of training's largest number)"
        in first
    )
    assert "found on all 2 files" in first
    assert (
        "alone the network's input changes by at most 2 (40 % of training's largest number); the probability by 0.1200 on average and 0.2000 at most; 1 of 2 decisions change"
        in first
    )
    assert "in order the network's input changes by at most 1 (10 %" in first
    assert "of 7 and 9 rows, the first 7 were compared" in first
    assert "argument top_db of to_db: 80 (default) in training, 90 in the service" in second
    assert "difference training's value is float32 (1, 6), the service's float64 (2, 6)" in second
    assert "found on 1 of 2 files; the line differs in up to 5 runs for one file" in second
    assert "alone the network's input has another shape" in second
    assert "in order not measured: serve.py returns no array" in second
    assert "changed in a way that was not recorded" in second
    assert "changed in a way" not in first
    assert "training does nothing there" in third
    assert "alone the network's input does not change" in third
    assert "training computes nothing like it" in fourth
    assert "not measured: training's value could not be put in place" in fourth
    assert "not measured" not in first


def test_what_else_differs_is_told_once():
    text = as_text(everything())
    rows = [line.split() for line in text.splitlines()]
    assert ["torch.stft:", "center", "True", "(default)", "False", "train.py:11", "serve.py:5"] in rows
    assert ["torch.stft:", "window", "not", "given", "'hann'", "train.py:11", "serve.py:5"] in rows
    assert ["SAMPLE_RATE", "16000", "22050", "train.py:2", "serve.py:3"] in rows
    assert ["librosa", "0.9.2", "0.11.0"] in rows
    assert ["AttributeError:", "no", "highpass", "train.py:4", "(2", "times)", "serve.py:8", "(2", "times)"] in rows
    assert ["OSError", "-", "serve.py:9", "(3", "times)"] in rows
    # The cause has told it.
    assert text.count("top_db of to_db") == 1
    assert "to_db: top_db" not in text
    assert "They also differ in 4 arguments" in " ".join(verdict(everything()))
    assert "Notes on training:\n  a generator was not followed" in text
    assert "Notes on the service" not in text
    assert "Files that could not be compared:\n  three.wav: ValueError: not audio" in text
    assert (
        "Where the search ended before the results agreed:\n  on 1 of 2 files: training computes nothing like it"
        in text
    )
    assert "only training calls:\n  scipy.signal.sosfilt" in text


def test_a_long_argument_is_cut_in_the_terminal_and_whole_on_the_page(page):
    report = everything()
    report["calls"][1]["candidate"] = "x" * 100
    assert f"{'x' * 77}..." in as_text(report).split()
    assert "x" * 100 in page(report)[1].all("td")


def test_files_are_told_with_their_shapes_scores_and_decisions():
    rows = [re.split(r"\s{2,}", line.strip()) for line in as_text(everything()).splitlines()]
    assert ["one.wav", "same once put right", "3.25", "50 %", "7x40", "0.2500 → 0.7500", "changes"] in rows
    assert ["two.wav", "differs", "-", "-", "7x40 → 9x40 + 2", "0.5000 → 0.6250", "same"] in rows


def test_swallowed_exceptions_say_which_side_they_are_on():
    lines = verdict(everything())
    both, training, service = (line for line in lines if "swallow" in line)
    assert both.startswith(
        "Both programs swallow AttributeError: no highpass, at train.py:4 (2 times) in training and serve.py:8 (2 times) in the service."
    )
    assert "no difference shows it" in both
    assert training.startswith(
        "Training swallows KeyError: 'a', at train.py:9 (1 time) in training. The service does not."
    )
    assert service.startswith(
        "The service swallows OSError, at serve.py:9 (3 times) in the service. Training does not."
    )


def test_no_difference_is_told_with_the_number_of_files_and_the_largest():
    assert verdict(nothing()) == [
        "Both programs return the same on all 3 files. The network's input differs by at most 2e-06 (5e-05 % of training's largest "
        "number). Numbers closer than 0.001 % of training's largest count as the same."
    ]
    text = as_text(nothing())
    assert "the service     " not in text
    assert "Alone:" not in text
    assert "Files with another result" not in text


def test_what_both_sides_swallow_is_told_when_nothing_differs():
    same = nothing()
    same["swallowed"] = everything()["swallowed"]
    assert any(line.startswith("Both programs swallow AttributeError: no highpass") for line in verdict(same))
    assert "AttributeError: no highpass" in as_text(same).split("Exceptions that the programs swallow")[1]


def test_another_argument_is_told_when_nothing_differs():
    same = nothing()
    same["calls"] = everything()["calls"]
    assert "They also differ in 3 arguments" in verdict(same)[1]
    assert "to_db: top_db" in as_text(same)


def test_results_that_differ_at_no_known_line_are_told_so():
    unknown = everything()
    unknown.update(causes=[], files_same=1)
    assert verdict(unknown)[0].startswith(
        "The programs return different results on 1 of 2 files, and no line of the service was found"
    )


@pytest.mark.parametrize(
    ("kept", "same", "words"),
    [
        ([0], 2, "With training's value in its place, both programs return the same on all 2 files."),
        ([0, 1], 2, "With training's values in their places, both programs return the same on all 2 files."),
        ([3], 0, "Training's value could not be put in its place, so there may be more such lines behind it."),
    ],
)
def test_whether_the_list_of_lines_is_whole(kept, same, words):
    report = everything()
    report.update(causes=[report["causes"][n] for n in kept], files_same_in_the_end=same)
    assert words in verdict(report)


def test_several_scores_have_no_threshold():
    report = everything()
    for each in report["files"]:
        each["scores"] = {"reference": [0.2, 0.5, 0.3], "candidate": [0.7, 0.1, 0.2]}
    line = verdict(report)[3]
    assert "changes by 0.4000 on average" in line
    assert "threshold" not in line


# --- the page

VOID = {"meta", "br", "img", "hr", "input", "link"}


class Page(HTMLParser):
    """Reads a page strictly: every element is closed in order. Keeps elements, the text of each, and source lines by card."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.open: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, dict[str, str | None], str]] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"an attribute twice in <{tag}>"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, dict(attrs), []))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        opened, attrs, text = self.open.pop()
        assert opened == tag, f"</{tag}> closes <{opened}>"
        self.texts.append((tag, attrs, "".join(text)))

    def handle_data(self, data: str) -> None:
        for _, _, text in self.open:
            text.append(data)

    def attributes(self, name: str) -> list[str]:
        return [value for _, attrs in self.elements if (value := attrs.get(name)) is not None]

    def all(self, tag: str, kind: str | None = None) -> list[str]:
        """The texts of the elements of this name, and of this class."""
        return [
            t
            for name, attrs, t in self.texts
            if name == tag and (kind is None or kind in (attrs.get("class") or "").split())
        ]


@pytest.fixture
def page(tmp_path: Path):
    def written(report: dict[str, Any]) -> tuple[str, Page]:
        path = tmp_path / "index.html"
        write_html(report, path)
        html = path.read_text(encoding="utf-8")
        return html, Page(html)

    return written


@pytest.mark.parametrize("report", [everything(), nothing()], ids=["everything", "nothing"])
def test_the_page_is_whole_and_fetches_nothing(page, report):
    html, read = page(report)
    assert html.startswith("<!DOCTYPE html>")
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in read.elements}
    assert not re.search(r"@import|url\(|https?://", html)
    assert all(target.startswith("#") for name in ("href", "src") for target in read.attributes(name))
    ids = read.attributes("id")
    assert len(ids) == len(set(ids))
    assert {target.removeprefix("#") for target in read.attributes("href")} <= set(ids)
    assert set(read.attributes("aria-labelledby")) <= set(ids)
    # A screen reader finds its way by headings, none left out between levels.
    levels = [int(tag[1]) for tag, _ in read.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert all(attrs.get("scope") for tag, attrs in read.elements if tag == "th")


def test_every_cause_has_a_card_and_a_row(page):
    _, read = page(everything())
    cards = read.all("article")
    headings = [
        "1. serve.py:4 x / 32768",
        "2. serve.py:13 db.max() - 90",
        "3. serve.py:14 db[:7]",
        "4. helpers.py:3 warp(x)",
    ]
    kinds = ["steps left out", "computed otherwise", "a step too many", "nothing like it in training"]
    assert [
        card.startswith(f"{heading} {kind}") for card, heading, kind in zip(cards, headings, kinds, strict=True)
    ] == [True] * 4
    assert "the service's value is 0.6635 times training's; largest difference 0.337" in cards[0]
    assert "bands(0.1, -3.5)" in cards[0]
    assert "Training has done this before, and the service never has:train.py:6 sosfilt( high_pass(2), x, )" in cards[0]
    assert "Arguments of to_db that differ" in cards[1]
    assert "top_db80 (default)90" in cards[1]
    assert read.attributes("href") == [f"#cause-{n}" for n in (1, 2, 3, 4)]


def test_the_lines_in_question_are_marked_in_both_sources(page):
    _, read = page(everything())
    cards = read.all("article")
    figures = {side: read.all("figure", side) for side in ("reference", "candidate")}
    training, service = figures["reference"][0], figures["candidate"][0]
    assert training.startswith("Training: train.py")
    assert service.startswith("The service: serve.py")
    assert "≠4 the line in question:     x = x / 32768\n" in service
    assert "=2 last value in common:     x = read(path)\n" in service
    assert "≠10 the line in question:     x = x / x.abs().max()\n" in training
    assert "=5 last value in common:     x = read(path)\n" in training
    # The whole of an expression over four lines.
    for line in ("6 only training does this:     x = sosfilt(", "7 only training does this:         high_pass(2),",
                 "8 only training does this:         x,", "9 only training does this:     )"):  # fmt: skip
        assert f"−{line}\n" in training
    # What all lines shown have in front is left out.
    assert "≠12 the line in question: db = torch.maximum(db, db.max() - 80)\n" in figures["reference"][1]
    # Only lines around those in question, each with its number.
    assert "1 def network_input(path):" in service
    assert "return db" not in service
    assert "10" in figures["candidate"][1]
    assert "far away" not in figures["candidate"][1]
    # Without its source, a line is shown as the trace tells it.
    assert "≠3 the line in question: warp(x)" in cards[3]


def test_a_line_that_is_in_question_twice_has_the_mark_of_the_difference(page):
    report = everything()
    report["causes"][1]["last_common"]["reference"] = place("train.py", 12, "db.max()")
    _, read = page(report)
    assert "≠12 the line in question" in read.all("figure", "reference")[1]
    assert "Last in commontrain.py:12  db.max() (training)" in read.all("article")[1]


def test_places_far_apart_are_shown_with_a_gap(page):
    report = everything()
    report["causes"][1]["last_common"]["candidate"] = place("serve.py", 2, "read(path)")
    _, read = page(report)
    figure = read.all("figure", "candidate")[1]
    assert figure.count("⋯") == 1
    assert figure.index("=2 last value in common") < figure.index("⋯") < figure.index("≠13 the line in question")


def test_bars_are_as_long_as_the_share_they_stand_for(page):
    html, _ = page(everything())
    # 40 % is the largest, 10 % a quarter of it, 0 nothing.
    assert re.findall(r"style=\"width:([\d.]+)%\"", html) == ["100.0", "25.0", "0.0"]
    assert '40 %<span class="bar reference" aria-hidden="true">' in html
    assert '10 %<span class="bar candidate" aria-hidden="true">' in html


def test_what_else_differs_is_on_the_page(page):
    _, read = page(everything())
    rows = read.all("tr")
    for row in (
        "torch.stft: centerTrue (default)Falsetrain.py:11serve.py:5",
        "SAMPLE_RATE1600022050train.py:2serve.py:3",
        "librosa0.9.20.11.0",
        "AttributeError: no highpasstrain.py:4 (2 times)serve.py:8 (2 times)",
        "one.wavsame once put right3.2550 %7x400.2500 → 0.7500changes",
        "two.wavdiffers--7x40 → 9x40 + 20.5000 → 0.6250same",
    ):
        assert rows.count(row) == 1
    assert "three.wav: ValueError: not audio" in read.all("li")
    assert "a generator was not followed" in read.all("li")


@pytest.mark.parametrize(
    ("change", "headline"),
    [
        ({}, "The programs part at 4 lines, and decisions change"),
        ({"files": [file("one.wav")]}, "The programs part at 4 lines"),
        ({"causes": [], "files": [file("one.wav")]}, "The results differ"),
    ],
)
def test_the_headline(page, change, headline):
    _, read = page({**everything(), **change})
    assert read.all("h1") == [headline]


def test_the_page_of_equal_programs_says_so(page):
    _, read = page(nothing())
    assert read.all("h1") == ["Both programs return the same"]
    assert read.all("article") == []
    assert any(text.startswith("Both programs return the same on all 3 files.") for text in read.all("p"))


HOSTILE = "x = '</code></pre><script>alert(1)</script>' + \"<img src=x onerror='a'>\" & `y` # \x1b[2J\u202e"


def hostile() -> dict[str, Any]:
    """The report of everything in which each text that somebody else wrote is an attack."""

    def attacked(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            if key in ("reference", "candidate") and not value.keys() & {
                "file",
                "shape",
                "librosa",
                "train.py",
                "serve.py",
            }:
                return value
            return {name: attacked(one, name) for name, one in value.items()}
        if isinstance(value, list):
            return [attacked(one, key) for one in value]
        if isinstance(value, str) and key not in ("kind", "file", "line", "stopped", "refused", ""):
            return HOSTILE
        return value

    report = attacked(copy.deepcopy(everything()))
    report["sources"] = {
        side: dict.fromkeys(("train.py", "serve.py"), "\n".join([HOSTILE] * 20)) for side in ("reference", "candidate")
    }
    report["only_called"]["reference"] = [HOSTILE]
    report["notes"]["candidate"] = [HOSTILE]
    for name, one in (("causes", "place"), ("causes", "counterpart")):
        report[name][0][one]["file"] = HOSTILE
    report["causes"][0]["relation"]["numbers"] = {HOSTILE: HOSTILE}
    report["causes"][3]["stopped"] = HOSTILE
    report["files"][0]["file"] = HOSTILE
    report["unreadable"] = [{"file": HOSTILE, "reason": HOSTILE}]
    report["versions"] = {side: {HOSTILE: HOSTILE} for side in ("reference", "candidate")} | {"apart": [[HOSTILE] * 3]}
    return report


def test_hostile_text_stays_text_on_the_page(page):
    html, read = page(hostile())
    assert not {"script", "img"} & {tag for tag, _ in read.elements}
    assert not [name for _, attrs in read.elements for name in attrs if name.startswith("on")]
    assert all("<script>" not in value for _, attrs in read.elements for value in attrs.values() if value)
    # What is shown is the line as it was written, with its invisible characters named.
    shown = HOSTILE.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e")
    assert any(line.endswith(f"{shown}\n") for line in read.all("span", "line"))
    assert "\x1b" not in html
    assert "\u202e" not in html


def test_hostile_text_cannot_move_the_cursor():
    text = as_text(hostile())
    assert "\\x1b[2J\\u202e" in text
    assert all(each.isprintable() or each == "\n" for each in text)
