"""Which class each output is: nobody assumes it, and a few labelled files show it."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from skewless.core.definition import Definition
from skewless.importers.class_order import orders, said_classes
from skewless.importers.errors import ImportFileError
from skewless.importers.run import ImportRequest, ImportResult, import_file
from skewless.training.checkpoint import load_checkpoint
from tests.conftest import ROOT, run_skewless
from tests.recordings import one_thread  # noqa: F401
from tests.tiny_model import TinyModel, tiny_model  # noqa: F401

PORTRAIT, COUGH = (Definition.read(ROOT / "archive" / name) for name in ("portrait", "cough"))
ORDER = ("animal", "avatar", "human")


def labelled(classes: int, each: int) -> NDArray[np.int64]:
    return np.repeat(np.arange(classes), each)


def answers(labels: NDArray[np.int64], classes: int, share: float = 1.0, seed: int = 0) -> NDArray[np.float64]:
    """Scores `(N, C)` of a network that is right about so many of every class's files; it errs towards any other class."""
    generator = np.random.default_rng(seed)
    chosen = labels.copy()
    for k in range(classes):
        mine = np.flatnonzero(labels == k)
        for n in mine[: round((1 - share) * len(mine))]:
            chosen[n] = (k + generator.integers(1, classes)) % classes
    scores = generator.uniform(0, 0.3, (len(labels), classes))
    scores[np.arange(len(labels)), chosen] += 0.5
    return scores / scores.sum(axis=1, keepdims=True)


def named(count: int) -> tuple[str, ...]:
    return tuple("abcdefgh"[:count])


@pytest.mark.parametrize("classes", [3, 4, 5, 6, 8])
@pytest.mark.parametrize("moved", [2, 3])
def test_five_files_of_each_class_show_an_exchange(classes: int, moved: int):
    labels = labelled(classes, 5)
    scores = answers(labels, classes)
    right = list(range(classes))
    right[:moved] = [*range(1, moved), 0]
    # Output k is the class right[k]; the given order takes it for class k.
    outputs = np.empty_like(scores)
    for k, number in enumerate(right):
        outputs[:, k] = scores[:, number]
    found = orders(outputs, labels, named(classes))
    assert found.best[0].classes == tuple(named(classes)[number] for number in right)
    assert found.best[0].accuracy == found.best[0].mean_recall == 1.0
    assert found.given.classes == named(classes) and found.given.accuracy == pytest.approx(1 - moved / classes)
    assert found.doubtful and "hardly by chance" in found.verdict and found.verdict in found.text()


def test_five_files_of_each_class_show_an_exchange_of_a_model_that_errs():
    """Once, and in the way that speaks for the wrong order."""
    labels = labelled(3, 5)
    scores = answers(labels, 3)
    scores[0] = scores[-1]
    found = orders(scores[:, [2, 1, 0]], labels, ORDER)
    assert found.best[0].classes == ("human", "avatar", "animal") and found.doubtful
    # 9 of 10, for three possible exchanges.
    assert found.p == pytest.approx(3 * 11 / 2**10)


@pytest.mark.parametrize("classes", [2, 3, 5, 6])
def test_the_right_order_raises_no_doubt(classes: int):
    labels = labelled(classes, 5)
    found = orders(answers(labels, classes, 0.8), labels, named(classes))
    assert found.best[0] == found.given and found.p == 1 and not found.doubtful
    assert "fits these" in found.verdict and "(given)" in found.text()


@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_one_score_speaks_for_the_second_of_two(shape: tuple[int, ...], scale: float):
    """Whatever the threshold: a network whose scores never reach 0.5 has an order, too."""
    labels = labelled(2, 5)
    score = answers(labels, 2)[:, 1] * scale
    assert not orders(score.reshape(shape), labels, ("no", "yes")).doubtful
    swapped = orders((scale - score).reshape(shape), labels, ("no", "yes"))
    assert swapped.best[0].classes == ("yes", "no") and swapped.doubtful
    assert swapped.p == pytest.approx(2**-10)


def test_every_order_of_a_few_classes_is_tried():
    labels = labelled(4, 6)
    scores = answers(labels, 4, 0.7, seed=3)
    found = orders(scores, labels, named(4))
    accuracies = sorted(
        (float((np.take(order, scores.argmax(axis=1)) == labels).mean()) for order in itertools.permutations(range(4))),
        reverse=True,
    )
    assert [each.accuracy for each in found.best] == pytest.approx(accuracies[:5])


def test_a_network_that_knows_nothing_rarely_raises_doubt():
    generator = np.random.default_rng(0)
    labels = labelled(3, 5)
    doubts = sum(orders(generator.uniform(size=(15, 3)), labels, ORDER).doubtful for _ in range(400))
    assert doubts <= 0.05 * 400


def test_a_network_that_always_says_the_same_is_no_reason_for_another_order():
    """With accuracy alone, the frequent label's name would go to that output."""
    labels = np.array([0] * 5 + [1] * 5 + [2] * 60)
    scores = np.tile([0.8, 0.1, 0.1], (70, 1))
    found = orders(scores, labels, ORDER)
    assert found.best[0] == found.given and not found.doubtful
    # Once right, by accident, under another name.
    scores[0] = [0.1, 0.1, 0.8]
    found = orders(scores, labels, ORDER)
    assert found.best[0].classes == ("human", "avatar", "animal") and found.best[0].accuracy > 0.8
    assert not found.doubtful


def test_few_files_are_said_to_be_few():
    labels = np.array([0, 1, 2])
    found = orders(answers(labels, 3)[:, [1, 0, 2]], labels, ORDER)
    assert found.best[0].classes == ("avatar", "animal", "human")
    assert not found.doubtful and "proves nothing" in found.verdict


@pytest.mark.parametrize(
    "scores", [np.full((4, 2), 0.5), np.full((4, 3), np.nan), np.zeros((0, 3)), np.full(4, 0.5)], ids=str
)
def test_scores_that_are_none_are_refused(scores: NDArray[np.float64]):
    labels = np.zeros(len(scores), dtype=int)
    with pytest.raises(ValueError, match="expected finite ones"):
        orders(scores, labels, ORDER)


# --- what is said


def test_nobody_says_it():
    with pytest.raises(ImportFileError) as error:
        said_classes((), {}, PORTRAIT)
    message = str(error.value)
    assert message.startswith("--classes is required")
    for part in ("animal, avatar, human", "swaps labels and nothing would notice", "alphabetical", "--manifest"):
        assert part in message
    with pytest.raises(ImportFileError, match="the second is the one that a single output speaks for, here positive"):
        said_classes((), {"classes": 2}, COUGH)


def test_the_file_says_it():
    assert said_classes((), {"classes": list(ORDER)}, PORTRAIT) == ORDER
    assert said_classes(ORDER, {"classes": list(ORDER)}, PORTRAIT) == ORDER
    with pytest.raises(ImportFileError, match="configuration says human, avatar, animal; find out"):
        said_classes(ORDER, {"classes": list(ORDER[::-1])}, PORTRAIT)
    with pytest.raises(ImportFileError, match=r"the file's configuration has the classes human.* Write into it\n"):
        said_classes((), {"classes": list(ORDER[::-1])}, PORTRAIT)


@pytest.mark.parametrize("given", [("cat", "dog", "human"), ("animal", "human"), ("animal", "animal", "human"), ("",)])
def test_other_names_are_refused(given: tuple[str, ...]):
    with pytest.raises(ImportFileError, match="has animal, avatar, human; expected the same names, each once"):
        said_classes(given, {}, PORTRAIT)


def test_another_order_is_refused_with_the_line_that_takes_it(tmp_path: Path):
    folder = tmp_path / "portrait"
    shutil.copytree(PORTRAIT.folder, folder)
    given = ("human", "avatar", "animal")
    with pytest.raises(ImportFileError) as error:
        said_classes(given, {}, Definition.read(folder))
    line = next(line for line in str(error.value).splitlines() if line.startswith("postprocess: "))
    assert line == "postprocess: {class_probabilities: {classes: [human, avatar, animal], threshold: 0.7}}"
    model = folder / "model.yaml"
    lines = [line if old.startswith("postprocess:") else old for old in model.read_text().splitlines()]
    model.write_text("\n".join(lines))
    changed = Definition.read(folder)
    assert said_classes(given, {}, changed) == given
    assert changed.postprocessor.threshold == PORTRAIT.postprocessor.threshold


def test_a_field_that_means_the_second_class_is_pointed_out():
    with pytest.raises(ImportFileError, match="coughDetected is then true for negative: name it accordingly"):
        said_classes(("positive", "negative"), {}, COUGH)


def test_classes_in_code_are_changed_there():
    fixed = replace(COUGH, postprocess={"own.py:Own": None})
    vars(fixed)["postprocessor"] = COUGH.postprocessor
    with pytest.raises(ImportFileError, match=r"own\.py:Own has the classes in its code; change their order there"):
        said_classes(("positive", "negative"), {}, fixed)


def test_where_answers_have_no_class_names_nothing_is_asked():
    nameless = replace(COUGH)
    vars(nameless)["postprocessor"] = type("Nameless", (), {"classes": ()})()
    assert said_classes((), {}, nameless) == ()


# --- the import


def imported(model: TinyModel, folder: Path, **more: Any) -> ImportResult:
    weights = load_checkpoint(model.checkpoint)["model_state_dict"]
    if more.pop("swapped", False):
        weights = {name: -value if name.startswith("output") else value for name, value in weights.items()}
    torch.save({"model_state_dict": weights, "config": more.pop("config", {})}, folder / "old.pth")
    given: dict[str, Any] = {"classes": ("tone", "noise"), "variants": folder} | more
    shutil.copy(model.archive / "pipeline.yaml", folder)
    return import_file(
        ImportRequest(model.archive, folder / "old.pth", folder / "new.pth", folder / "pipeline.yaml", **given)
    )


def test_the_checkpoint_keeps_the_classes_as_they_were_said(tiny_model: TinyModel, tmp_path: Path):  # noqa: F811
    result = imported(tiny_model, tmp_path)
    assert load_checkpoint(tmp_path / "new.pth")["imported_from"]["classes"] == ["tone", "noise"]
    assert result.classes == ("tone", "noise") and "its outputs are tone, noise, in this order" in result.text()
    assert result.orders is None and result.warning() == ""


def test_the_configuration_may_say_them(tiny_model: TinyModel, tmp_path: Path):  # noqa: F811
    assert imported(tiny_model, tmp_path, classes=(), config={"classes": ["tone", "noise"]}).classes == (
        "tone",
        "noise",
    )


def test_without_a_word_nothing_is_written(tiny_model: TinyModel, tmp_path: Path):  # noqa: F811
    with pytest.raises(ImportFileError, match="--classes is required"):
        imported(tiny_model, tmp_path, classes=())
    assert not (tmp_path / "new.pth").exists()


def test_labelled_files_show_the_order(tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    """Ten recordings, five of each class."""
    manifest = tmp_path / "few.csv"
    rows = tiny_model.manifest.read_text().splitlines()
    manifest.write_text("\n".join([rows[0], *(row.replace("train", "val") for row in rows[1:11])]))
    labelled_files = {"manifest": manifest, "root": tiny_model.manifest.parent}
    right = imported(tiny_model, tmp_path, **labelled_files)
    assert right.orders is not None and right.orders.files == 10 and not right.orders.doubtful
    assert right.warning() == "" and "| tone, noise (given) " in right.text()
    (tmp_path / "new.pth").unlink()
    wrong = imported(tiny_model, tmp_path, swapped=True, **labelled_files)
    assert wrong.orders is not None and wrong.orders.best[0].classes == ("noise", "tone")
    assert "WARNING: noise, tone fits these 10 files better than the given tone, noise" in wrong.warning()
    assert wrong.to_dict()["comparison"]["trials"][0]["orders"]["best"][0]["classes"] == ("noise", "tone")


def test_the_command_takes_a_list(tiny_model: TinyModel, tmp_path: Path):  # noqa: F811
    imported(tiny_model, tmp_path)
    arguments = ("import", tiny_model.archive, tmp_path / "old.pth", "--pipeline", tmp_path / "pipeline.yaml")
    out = tmp_path / "by_command.pth"
    refused = run_skewless(*arguments, "--out", out, "--classes", "noise,tone", check=False)
    assert refused.returncode == 2 and "classes: [noise, tone]" in refused.stderr and not out.exists()
    taken = run_skewless(*arguments, "--out", out, "--classes", "tone, noise")
    assert "its outputs are tone, noise, in this order" in taken.stdout
