"""Which class each output of an imported network is: what somebody says of it, and what labelled files say.

Weights have no names for their outputs. Behind a wrong order labels are swapped, and no number looks wrong.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from skewless.core.definition import MODEL, Definition
from skewless.importers.errors import ImportFileError

# Up to so many classes every order is tried: 120 of five.
_EVERY_ORDER = 5
_SHOWN = 5
_CHANCE = 0.05


def said_classes(given: Sequence[str], config: Mapping[str, Any], definition: Definition) -> tuple[str, ...]:
    """The classes in the order of the file's outputs, which is the definition's: as `given`, or else as the file's `config`
    says under `classes`. Of two classes with one output between them, it speaks for the second.

    Empty where the definition's post-processing has no names for its classes.
    Raises ImportFileError where nobody says it, and where it is another order, or other names, than the definition has.
    """
    if not definition.classes:
        return ()
    ours, model = tuple(definition.classes), definition.folder / MODEL
    recorded = config.get("classes")
    recorded = (
        tuple(recorded) if isinstance(recorded, list | tuple) and all(isinstance(c, str) for c in recorded) else ()
    )
    if given and recorded and tuple(given) != recorded:
        raise ImportFileError(
            f"--classes is {_listed(given)}, and the file's configuration says {_listed(recorded)}; find out which of the two the "
            "weights were trained with"
        )
    said = tuple(given) or recorded
    if not said:
        second = f" Of two classes the second is the one that a single output speaks for, here {ours[1]}." * (
            len(ours) == 2
        )
        raise ImportFileError(
            f"--classes is required: the file does not say which class each of its outputs is. {model} has {_listed(ours)}, in "
            f"this order; a wrong order swaps labels and nothing would notice.{second}\nLook in the training script for the list "
            "of class names, or for how it numbers them: image_dataset_from_directory, flow_from_directory and ImageFolder take "
            "the folders' names, and LabelEncoder the labels, in alphabetical order. Then say it, such as "
            f"--classes {','.join(ours)}\nNot sure? Give --manifest with some files that you label yourself, all of split val: it shows "
            "which order fits."
        )
    who = "--classes is" if given else "the file's configuration has the classes"
    if sorted(said) != sorted(ours):
        raise ImportFileError(
            f"{who} {_listed(said)}, and {model} has {_listed(ours)}; expected the same names, each once"
        )
    if said != ours:
        raise ImportFileError(
            f"{who} {_listed(said)}, and {model} has {_listed(ours)}: {_how_to_order(definition, said)}"
        )
    return said


def _listed(classes: Sequence[str]) -> str:
    return ", ".join(classes) or "empty"


def _how_to_order(definition: Definition, classes: Sequence[str]) -> str:
    ((name, parameters),) = definition.postprocess.items()
    if "classes" not in (parameters or {}):
        return f"imported so, labels would be swapped. {name} has the classes in its code; change their order there"
    changed = {"postprocess": {name: {**parameters, "classes": list(classes)}}}
    line = yaml.safe_dump(changed, sort_keys=False, default_flow_style=True, width=math.inf).strip()[1:-1]
    field = parameters.get("positive_field")
    positive = f". {field} is then true for {classes[1]}: name it accordingly" if field else ""
    return f"imported so, labels would be swapped. Write into it\n{line}\nand import again{positive}"


@dataclass(frozen=True)
class Order:
    """One order of the classes, and how the network's choices fit the labels in it.

    accuracy: the share of files whose label is the chosen class. mean_recall: the mean of that share over the labels, so
    that a frequent one has no more say than a rare one.
    """

    classes: tuple[str, ...]
    accuracy: float
    mean_recall: float


@dataclass(frozen=True)
class Orders:
    """Orders of the classes, held against labelled files.

    given: the one in question. best: the others and it that fit best, by mean recall, the best first; of equals, the given
    one and those near it. p: how likely it is that the best one fits so much better by chance (see `orders`), 1 where the
    given one is the best.
    """

    files: int
    given: Order
    best: tuple[Order, ...]
    p: float

    @property
    def doubtful(self) -> bool:
        """Whether another order fits better by more than chance."""
        return self.p < _CHANCE

    def text(self) -> str:
        """A Markdown table with one row per order, and what follows from it."""
        shown = list(self.best) if self.given in self.best else [*self.best, self.given]
        rows = [["order of the outputs", "accuracy", "mean recall"]]
        for order in shown:
            name = _listed(order.classes) + " (given)" * (order == self.given)
            rows.append([name, f"{order.accuracy:.4f}", f"{order.mean_recall:.4f}"])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in rows]
        lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
        return "\n".join([*lines, self.verdict])

    @property
    def verdict(self) -> str:
        best = self.best[0]
        if best == self.given:
            return f"The given order of the classes fits these {self.files} files best."
        how = (
            f"{_listed(best.classes)} fits these {self.files} files better than the given {_listed(self.given.classes)}: accuracy "
            f"{best.accuracy:.4f}, not {self.given.accuracy:.4f}"
        )
        if not self.doubtful:
            return f"{how}. That proves nothing (p = {self.p:.2g}); label more files."
        return (
            f"{how}, and hardly by chance (p = {self.p:.1g}). The outputs are most likely in that order: find out, put it into "
            f"{MODEL}'s classes, and import again."
        )


def orders(scores: NDArray[np.floating], labels: NDArray[np.integer], classes: Sequence[str]) -> Orders:
    """How well each order of `classes` fits labelled files.

    scores: `(N, C)`, one per output, or of two classes `(N,)` or `(N, 1)`, the probability of the second. labels: `(N,)`, numbers
        of `classes`, which is the given order.

    The highest score chooses. A single score is cut halfway between the mean scores of the two labels, so that it does not matter
    where the threshold is. Up to five classes every order is tried; of more, the best one is assigned from the counts of
    choices and labels (H. W. Kuhn, "The Hungarian Method for the Assignment Problem", 1955).

    p is of a paired exact test (the sign test, Q. McNemar 1947, one-sided): only files count that one of the two orders gets
    right and the other wrong; by chance each falls to either side. It is multiplied by the number of other orders that move at most
    as many classes, from which the best was picked (Bonferroni). It is 1 where a class that moves is not recognised more often
    then: a network that mostly says the same is no reason to call its output by the most frequent label.

    Raises ValueError for scores that are not finite, or of another shape.
    """
    counts = _counts(np.asarray(scores, dtype=np.float64), np.asarray(labels), len(classes))
    per_label = counts.sum(axis=0)
    seen = per_label > 0
    recalls = counts / np.where(seen, per_label, 1)

    def order(permutation: Sequence[int]) -> Order:
        chosen = (range(len(classes)), permutation)
        accuracy, recall = counts[chosen].sum() / counts.sum(), recalls[chosen].sum() / seen.sum()
        return Order(tuple(classes[k] for k in permutation), float(accuracy), float(recall))

    given = tuple(range(len(classes)))
    found = {permutation: order(permutation) for permutation in _permutations(recalls)}
    # Rounded: sums in another order are no better fit.
    ranked = sorted(found, key=lambda p: (-round(found[p].mean_recall, 9), _moved(p), p))
    best = tuple(found[permutation] for permutation in ranked[:_SHOWN])
    return Orders(int(counts.sum()), found[given], best, _chance(counts, ranked[0]))


def _counts(scores: NDArray[np.float64], labels: NDArray[np.integer], classes: int) -> NDArray[np.int64]:
    """How many files of each label (columns) each output was highest for (rows)."""
    columns = scores.reshape(max(1, len(labels)), -1)
    expected = 1 if classes == 2 else classes
    if columns.shape[1] not in (expected, classes) or not np.isfinite(columns).all():
        raise ValueError(
            f"scores are {scores.shape} for {len(labels)} labels and {classes} classes, expected finite ones, ({len(labels)}, "
            f"{expected})"
        )
    if columns.shape[1] == 1:
        means = [columns[labels == k, 0].mean() for k in range(2) if (labels == k).any()]
        chosen = (columns[:, 0] > np.mean(means)).astype(int)
    else:
        chosen = columns.argmax(axis=1)
    counts = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(counts, (chosen, labels), 1)
    return counts


def _permutations(recalls: NDArray[np.float64]) -> set[tuple[int, ...]]:
    """Of each output, its class: every order, or the given one and the best of all."""
    count = len(recalls)
    if count <= _EVERY_ORDER:
        return set(itertools.permutations(range(count)))
    from scipy.optimize import linear_sum_assignment

    # Of equally good orders, the one that moves least.
    _, best = linear_sum_assignment(recalls + 1e-9 * np.eye(count), maximize=True)
    return {tuple(range(count)), tuple(map(int, best))}


def _moved(permutation: Sequence[int]) -> int:
    return sum(number != k for k, number in enumerate(permutation))


def _chance(counts: NDArray[np.int64], best: Sequence[int]) -> float:
    """The p of `orders`."""
    moved = [(k, number) for k, number in enumerate(best) if k != number]
    if not moved:
        return 1.0
    if any(counts[k, number] <= counts[number, number] for k, number in moved):
        return 1.0
    won, lost = sum(int(counts[k, number]) for k, number in moved), sum(int(counts[k, k]) for k, _ in moved)
    as_many = sum(math.comb(won + lost, n) for n in range(won, won + lost + 1)) / 2 ** (won + lost)
    tried = sum(math.comb(len(best), m) * _derangements(m) for m in range(2, len(moved) + 1))
    return min(1.0, as_many * tried)


def _derangements(count: int) -> int:
    """Orders of so many things in which none stays in its place."""
    return round(sum((-1) ** k * math.factorial(count) / math.factorial(k) for k in range(count + 1)))
