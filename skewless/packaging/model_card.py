"""A model card in Hugging Face's format, from the metrics: what a model is, how good it is, and what that is known from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml


@dataclass(frozen=True)
class Figure:
    """One figure of an evaluation. kind: the metric as Hugging Face names it, such as roc_auc. name: for people."""

    kind: str
    name: str
    value: float


def figures(evaluation: Mapping[str, Any]) -> list[Figure]:
    """What `skewless evaluate` measured, of two classes or of more."""
    found = [
        Figure("roc_auc", "Area under the ROC curve", evaluation["auc"]),
        Figure("average_precision", "Average precision", evaluation["average_precision"]),
        Figure("brier_score", "Brier score", evaluation["brier"]),
    ]
    if chosen := evaluation.get("at_best_threshold"):
        at = f"at {chosen['threshold']:g}"
        return found + [
            Figure(kind, f"{kind.capitalize()} {at}", chosen[kind])
            for kind in ("accuracy", "precision", "recall", "f1")
        ]
    return [
        *found,
        Figure("accuracy", "Accuracy", evaluation["accuracy"]),
        Figure("f1", "F1, mean over the classes", evaluation["macro_f1"]),
    ]


def model_card(metrics: Mapping[str, Any], reads: str) -> str:
    """Markdown with a YAML block in front, whose `model-index` Hugging Face reads as evaluation results.

    metrics: an archive's. reads: "audio" or "image", what the model takes.
    The format: https://github.com/huggingface/hub-docs/blob/main/modelcard.md
    """
    name, version, evaluation = metrics["model_name"], metrics["model_version"], metrics["evaluation"]
    task = f"{reads}-classification"
    data = metrics["dataset_sha256"]
    index = {
        "name": f"{name} {version}",
        "results": [
            {
                "task": {"type": task},
                "dataset": {
                    "name": f"{name}, {evaluation['split']} split",
                    "type": name,
                    "split": evaluation["split"],
                    "revision": data,
                },
                "metrics": [
                    {"type": each.kind, "value": each.value, "name": each.name} for each in figures(evaluation)
                ],
            }
        ],
    }
    front = {"library_name": "skewless", "pipeline_tag": task, "tags": ["torchserve"], "model-index": [index]}
    rows = [f"| {each.name} | {each.value:.4g} |" for each in figures(evaluation)]
    runtime = metrics["runtime"]
    tier = metrics.get("tier", runtime["tier"])
    lines = [
        *("---", yaml.safe_dump(front, sort_keys=False, allow_unicode=True).rstrip(), "---", ""),
        *(f"# {name} {version}", ""),
        f"Tells {_or(evaluation['classes'])} apart in {_THINGS[reads]}. It decides at a threshold of {metrics['threshold']:g}, chosen on "
        f"{_CHOSEN.get(evaluation['threshold_chosen_on'], evaluation['threshold_chosen_on'])}.",
        *("", "## Evaluation", ""),
        f"On the {evaluation['recordings']} files of the {evaluation['split']} split"
        + (f"; {evaluation['skipped']} more could not be read." if evaluation["skipped"] else "."),
        *("", "| figure | value |", "|---|---|", *rows, ""),
        _proof(evaluation),
        *_accepted(metrics["accepted_untrained"]),
        *("", "## What is served", ""),
        f"- Executed by `{runtime['name']}` in {runtime['precision']}, tier *{tier}*.",
        f"- Preprocessing: the pipeline `{metrics['pipeline_fingerprint']}`.",
        f"- References that travel in the archive: {metrics['references']['kind']}. A worker replays them before it serves.",
        *("", "## Where it comes from", ""),
        f"- Data set: SHA-256 `{data}` over its files' digests and labels.",
        f"- Checkpoint: SHA-256 `{metrics['checkpoint_sha256']}`.",
        f"- Built by skewless {metrics['skewless_version']}, commit `{metrics['git_commit']}`, with "
        + ", ".join(f"{library} {number}" for library, number in metrics["library_versions"].items())
        + ".",
        *("", "## Limits", ""),
        "The figures hold for files like those of the evaluation. How well the model does on others was not measured, and "
        "neither was for whom or for what its mistakes matter.",
    ]
    return "\n".join(lines) + "\n"


_THINGS = {"audio": "recordings", "image": "pictures"}
_CHOSEN = {"val": "the validation split", "the definition": "no data: the definition says it"}


def _or(names: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(f"*{name}*" for name in names[:-1]), f"*{names[-1]}*"]))


def _accepted(names: list[str]) -> list[str]:
    if not names:
        return []
    return [
        "",
        f"Accepted by whoever imported or built it, although they look untrained: {', '.join(map('`{}`'.format, names))}.",
    ]


def _proof(evaluation: Mapping[str, Any]) -> str:
    reproduced = evaluation.get("training_reproduced")
    adopted = (evaluation.get("imported_from") or {}).get("reproduces")
    if adopted:
        does = "reproduces" if adopted["reproduced"] else "comes close to"
        return (
            f"The weights were imported, and this archive {does} what the service that ran them before had answered for "
            f"{adopted['files']} files: of {adopted['numbers']} recorded numbers the largest difference is {adopted['largest']:.2g}."
        )
    if not reproduced:
        return "The weights were imported: nothing proves that the evaluation computes what their training computed."
    return (
        f"The evaluation reproduced what training computed for {reproduced['recordings']} files; the largest difference of a "
        f"probability was {reproduced['max_dp']:.2g}."
    )
