"""Build a model archive (.mar), after proving that what goes into it gives the numbers that evaluation recorded."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from skewless import __version__, resources
from skewless.core.cascade import DECISION_EXACT
from skewless.core.definition import FAST, MODEL, PIPELINE, REQUIREMENTS, Definition
from skewless.core.files import atomic
from skewless.core.request import Limits, Request
from skewless.core.selftest import SelfTestError, record
from skewless.core.selftest.record import ENTRIES, REFERENCES
from skewless.core.service import METRICS, ModelService
from skewless.core.telemetry import HISTOGRAM
from skewless.core.versions import library_versions
from skewless.errors import BuildError, UsageError
from skewless.evaluation.scores import PREDICTIONS, score_histogram, service_of
from skewless.packaging.bill_of_materials import bill_of_materials
from skewless.packaging.decision_exact import DecisionExact, summary
from skewless.packaging.execution import Execution
from skewless.packaging.model_card import model_card
from skewless.packaging.probes import network_inputs
from skewless.packaging.references import Choice, check_evaluated, stage_references
from skewless.packaging.reservation import reserved
from skewless.packaging.signing import SigningKey, sign_folder
from skewless.torchserve.archive import Archive
from skewless.training.checkpoint import file_digest, load_checkpoint, network_of, trained
from skewless.training.untrained import UntrainedError, require_trained

VERSION = re.compile(r"[0-9A-Za-z]+([.-][0-9A-Za-z]+)*")

TORCHSERVE = "model-config.yaml"
BILL_OF_MATERIALS, MODEL_CARD = "bom.cdx.json", "MODEL_CARD.md"
TUNING = "tuning.json"  # what `skewless tune` measured
# Seconds that TorchServe waits for a batch where model-config.yaml does not say: config.properties.
DEFAULT_RESPONSE_TIMEOUT = 60


@dataclass(frozen=True)
class Built:
    """A built archive, and what whoever built it should know: plain sentences, for a terminal."""

    path: Path
    warnings: tuple[str, ...]


def build_archive(
    archive: Path,
    checkpoint_path: Path,
    evaluation: Path,
    version: str,
    out: Path,
    *,
    force: bool = False,
    execution: Execution | None = None,
    decision_exact: DecisionExact | None = None,
    references: Choice = "evaluation",
    accept_untrained: Collection[str] = (),
    key: SigningKey | None = None,
) -> Built:
    """Write `out/NAME-VERSION.mar`. The same inputs give the same bytes, but for a signature, which differs each time.

    archive: a definition (pipeline.yaml, model.yaml, and TorchServe's model-config.yaml); its folder's name is the model's.
    evaluation: what `skewless evaluate` wrote for this checkpoint.
    execution: the runtime, when not the one that model.yaml names.
    decision_exact: a fast network to ask before that runtime's, which has to be in fp32.
    references: the recordings that travel in the archive, as skewless.packaging.references.Choice describes.
    accept_untrained: layers, or "outputs", that look untrained and are rightly so, beside those that the checkpoint records.
    key: to sign the archive with.
    Raises BuildError, CheckpointError or PipelineError, and then leaves nothing behind: for a checkpoint trained with
    another pipeline, weights that do not fit, an evaluation of another checkpoint or one that did not reproduce its training,
    references that are not reproduced within the tier's tolerance or that barely vary, a reduced precision whose AUC is
    another, a fast network that is further from the exact one than its margin, limits that let a batch take longer than
    TorchServe waits, or a different archive already there (unless `force`).
    """
    if not VERSION.fullmatch(version):
        raise BuildError(f"version is {version!r}, expected digits and letters joined by dots, such as 1.0")
    for path in (
        archive / PIPELINE,
        archive / MODEL,
        archive / TORCHSERVE,
        evaluation / METRICS,
        evaluation / PREDICTIONS,
    ):
        if not path.is_file():
            raise BuildError(f"there is no {path}")
    definition = Definition.read(archive)
    check_times(archive / TORCHSERVE, definition.limits)
    checkpoint = load_checkpoint(checkpoint_path)
    definition = trained(definition, checkpoint)
    name, pipeline = definition.name, definition.pipeline
    _check_servable(definition)
    execution = execution or Execution.of(definition.runtime)
    definition = _with_runtimes(definition, execution, decision_exact, references)
    network = network_of(checkpoint, definition)
    measured = evaluated(evaluation, checkpoint_path)
    recorded = checkpoint.get("accepted_untrained", [])
    _check_reproduced(checkpoint, measured, evaluation)
    inputs = list(network_inputs(pipeline))
    _check_trained(network, measured, accept_untrained, recorded, inputs)
    metrics = {
        "model_name": name,
        "model_version": version,
        "threshold": measured["threshold"],
        "pipeline_fingerprint": pipeline.fingerprint,
        "pipeline": pipeline.to_dict(),
        "network": definition.network,
        "postprocess": definition.postprocess,
        "code": definition.code,
        "checkpoint_sha256": measured["checkpoint_sha256"],
        "dataset_sha256": measured["dataset_sha256"],
        "skewless_version": __version__,
        "git_commit": _git_commit(),
        "library_versions": library_versions(definition.packages),
        "accepted_untrained": sorted({*recorded, *accept_untrained}),
        "runtime": execution.metadata(),
        "evaluation": measured,
        HISTOGRAM: score_histogram(evaluation / PREDICTIONS, measured["split"], measured["classes"]),
        **_tuning(definition),
    }
    out.mkdir(parents=True, exist_ok=True)
    with reserved(out, name, version), tempfile.TemporaryDirectory() as scratch:
        staged = Path(scratch, "staged")
        copy_code(staged)
        copy_definition(definition, staged)
        service = service_of(definition, checkpoint, torch.device("cpu"))
        metrics["references"], warnings = stage_references(references, evaluation, measured["split"], staged, service)
        weights = [*execution.write(network, definition, staged), *(staged / file for file in network.files)]
        weights += decision_exact.write(network, definition, staged) if decision_exact else []
        metrics["weights_sha256"] = {path.relative_to(staged).as_posix(): file_digest(path) for path in weights}
        if decision_exact:
            metrics["fast_runtime"] = decision_exact.prove(staged, metrics["threshold"], evaluation)
            metrics["tier"] = DECISION_EXACT
            warnings += summary(metrics["fast_runtime"])
        _write_metrics(metrics, staged)
        if execution.tier == "reduced":
            service = ModelService.load(staged, torch.device("cpu"), replay=False)
            metrics["runtime"]["measured"] = execution.measure(service, evaluation)
            _write_metrics(metrics, staged)
        _run_self_test(staged)
        _describe(metrics, pipeline.reads, staged)
        unpacked = _archive_directory(staged, weights[0], name, version, Path(scratch))
        _forget_date(unpacked)
        if key:
            sign_folder(unpacked, key)
        packed = Path(scratch, "packed")
        _zip_reproducibly(unpacked, packed)
        target = out / f"{name}-{version}.mar"
        same = target.exists() and _same_files(target, packed)
        if target.exists() and not same and not force:
            raise BuildError(f"{target} exists and differs; choose another --version, or replace it with --force")
        # The same files, perhaps signed: they stay so, unless they are to be signed anew.
        if not same or key:
            with atomic(target) as unfinished:
                shutil.move(packed, unfinished)
    return Built(target, tuple(warnings))


def check_times(config: Path, limits: Limits) -> None:
    """Raise BuildError where the requests of one batch may take longer than TorchServe waits for its answer.

    It kills a worker that takes longer than `responseTimeout`, and with it every request of the batch, whoever sent it. Half
    of that is left for what cannot be interrupted: the network, on the files that it has been given.
    """
    try:
        settings = yaml.safe_load(config.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise BuildError(f"{config} is not YAML: {error}") from error
    if not isinstance(settings, dict):
        raise BuildError(f"{config} is {settings!r:.60}, expected keys and values")
    found = {"batchSize": 1, "responseTimeout": DEFAULT_RESPONSE_TIMEOUT} | settings
    for key in ("batchSize", "responseTimeout"):
        if type(found[key]) is not int or found[key] < 1:
            raise BuildError(f"{config}: {key} is {found[key]!r}, expected a whole number from 1")
    size, timeout = found["batchSize"], found["responseTimeout"]
    if size * limits.max_read_s > timeout / 2:
        raise BuildError(
            f"batchSize {size} x max_read_s {limits.max_read_s:g} s is {size * limits.max_read_s:g} s, which the requests of one "
            f"batch may take to be read, and more than half of responseTimeout {timeout} s, after which TorchServe kills the "
            f"worker with all of them: lower batchSize or raise responseTimeout in {config}, or lower max_read_s in {MODEL}"
        )
    if limits.max_batch_s > timeout / 2:
        raise BuildError(
            f"max_batch_s is {limits.max_batch_s:g} s, more than half of responseTimeout {timeout} s, after which TorchServe "
            f"kills the worker with all requests of a batch: raise responseTimeout in {config}, or lower max_batch_s in {MODEL}"
        )


def evaluated(evaluation: Path, checkpoint_path: Path) -> dict[str, Any]:
    """What `skewless evaluate` measured for this checkpoint; raises BuildError where it was another one, or where the
    references beside it are not the evaluation's."""
    measured = json.loads((evaluation / METRICS).read_text(encoding="utf-8"))
    if measured.get("checkpoint_sha256") != file_digest(checkpoint_path):
        raise BuildError(
            f"{evaluation} measured another checkpoint than {checkpoint_path}; run `skewless evaluate` on this one"
        )
    if "classes" not in measured:
        raise BuildError(f"{evaluation} was written by another version of `skewless evaluate`; run it again")
    check_evaluated(evaluation)
    return measured


def _tuning(definition: Definition) -> dict[str, Any]:
    """The figures of `skewless tune`, where it chose what this archive has."""
    path = definition.folder / TUNING
    if not path.is_file():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    built = {"network": definition.network, "runtime": definition.runtime, "threads": definition.precision.threads}
    return {"tuning": found} if all(found["configuration"][key] == value for key, value in built.items()) else {}


def copy_code(staged: Path) -> None:
    """The handler, and of this package what ships: `skewless.core`."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(resources.HANDLER, staged / "handler", ignore=ignored)
    shutil.copytree(resources.CORE, staged / "skewless" / "core", ignore=ignored)
    shutil.copyfile(resources.CORE.parent / "__init__.py", staged / "skewless" / "__init__.py")


def copy_definition(definition: Definition, staged: Path) -> None:
    """The folder's files: the pipeline with what training has fitted, model.yaml as it is, comments too, unless the
    runtime is another, and the Python files, requirements and network files that they name."""
    (staged / PIPELINE).write_text(definition.pipeline.to_yaml(), encoding="utf-8")
    text = (definition.folder / MODEL).read_text(encoding="utf-8")
    content = yaml.safe_load(text)
    served = {"runtime": definition.runtime}
    served |= {"fast_runtime": definition.fast_runtime} if definition.fast_runtime is not None else {}
    if served != {key: content[key] for key in content if key.endswith("runtime")}:
        text = yaml.safe_dump(content | served, sort_keys=False)
    (staged / MODEL).write_text(text, encoding="utf-8")
    files = [TORCHSERVE, *definition.code, *definition.network_files]
    files += [REQUIREMENTS] if (definition.folder / REQUIREMENTS).is_file() else []
    for file in files:
        (staged / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(definition.folder / file, staged / file)


def _with_runtimes(
    definition: Definition, execution: Execution, decision_exact: DecisionExact | None, references: Choice
) -> Definition:
    """The definition with what will execute it; raises BuildError for runtimes that do not go together."""
    asked, runtime = definition.fast_runtime, execution.definition(definition.runtime)
    if decision_exact is None:
        if asked is not None:
            raise BuildError(
                "model.yaml has a fast_runtime, whose margin has to be proved: give --decision-exact with its precision, or remove "
                "the key"
            )
        return replace(definition, runtime=runtime)
    if references == "none":
        raise BuildError("a decision-exact archive proves its margin anew where it is loaded; it needs --references")
    found = replace(definition, runtime=runtime, fast_runtime=decision_exact.fast.definition(asked or runtime))
    found.check_fast_runtime()
    return found


def _check_servable(definition: Definition) -> None:
    # In the archive they lie beside `handler` and `skewless`, first on the worker's Python path.
    first = {file: Path(file).parts[0].removesuffix(".py") for file in definition.code}
    hiding = [file for file, name in first.items() if _is_taken(name, definition.folder.resolve())]
    if hiding:
        raise BuildError(f"in an archive {hiding[0]} would hide a package of the same name; give the file another name")
    if imitating := definition.pipeline.comparison_only:
        raise BuildError(
            f"stage '{imitating[0]}' imitates another system to compare with, and cannot be served; use the stage that "
            "training used"
        )


def _is_taken(name: str, folder: Path) -> bool:
    if name in ("handler", "entry", REFERENCES, FAST):
        return True
    found = importlib.util.find_spec(name)
    if found is None:
        return False
    # Whoever builds inside of the folder has its files on the Python path.
    return found.origin is None or not Path(found.origin).is_relative_to(folder)


def _describe(metrics: dict[str, Any], reads: str, folder: Path) -> None:
    """Write what an archive is made of, and what it is good for, beside its metrics."""
    (folder / BILL_OF_MATERIALS).write_text(bill_of_materials(metrics, reads), encoding="utf-8")
    (folder / MODEL_CARD).write_text(model_card(metrics, reads), encoding="utf-8")


def _write_metrics(metrics: dict[str, Any], folder: Path) -> None:
    (folder / METRICS).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


def _run_self_test(staged: Path) -> None:
    """Record every stage for the references and the probes, and load the archive as a worker will."""
    device = torch.device("cpu")
    untested = ModelService.load(staged, device, replay=False)
    record(untested.definition, untested.runtime)
    try:
        service = ModelService.load(staged, device)
    except SelfTestError as error:
        raise BuildError(
            f"the references are not reproduced, so weights, libraries or code are not the evaluation's: {error}"
        ) from error
    # The limits and the answer's fields are no part of the self-test.
    references = staged / REFERENCES
    for entry in json.loads((references / ENTRIES).read_text(encoding="utf-8")):
        (answer,) = service.predict([Request((references / entry["file"]).read_bytes())])
        if answer.status != 200:
            raise BuildError(f"the archive refuses its own reference {entry['file']}: {answer.body['message']}")


def _check_reproduced(checkpoint: dict[str, Any], measured: dict[str, Any], evaluation: Path) -> None:
    """A checkpoint of ours has to have had its training reproduced. Of an imported one there is nothing to reproduce."""
    if checkpoint["validation_scores"] and not (measured.get("training_reproduced") or {}).get("recordings"):
        raise BuildError(
            f"{evaluation} reproduced none of the scores that training computed; run `skewless evaluate` with a manifest whose "
            "val split has recordings that training validated on"
        )


def _check_trained(
    network: nn.Module,
    measured: dict[str, Any],
    accepted: Collection[str],
    recorded: list[str],
    inputs: list[torch.Tensor],
) -> None:
    try:
        require_trained(network, accepted, recorded, inputs)
    except UntrainedError as error:
        raise BuildError(str(error)) from error
    if not measured["auc"] > 0.5:
        raise BuildError(
            f"the evaluation's AUC is {measured['auc']:.3f}, no better than guessing (0.5): the network looks untrained, or "
            "its preprocessing is not the one it was trained with"
        )


def _git_commit() -> str:
    """The commit the code is at, "-dirty" when tracked files differ from it, "unknown" outside a git checkout."""
    command = ["git", "-C", str(resources.ROOT), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else "unknown"


def _archive_directory(staged: Path, weights: Path, name: str, version: str, scratch: Path) -> Path:
    """Let torch-model-archiver lay out the archive, unzipped."""
    config = staged / TORCHSERVE
    command = [sys.executable, "-m", "model_archiver.model_packaging", "--archive-format", "no-archive"]
    command += ["--model-name", name, "--version", version, "--handler", str(staged / "handler" / "entry.py")]
    command += ["--serialized-file", str(weights), "--config-file", str(config), "--export-path", str(scratch)]
    command += ["--extra-files", str(staged)]
    # It gathers its files in TMPDIR/NAME, which two builds at once must not share.
    temporary = scratch / "tmp"
    temporary.mkdir()
    result = subprocess.run(command, capture_output=True, text=True, check=False, env={"TMPDIR": str(temporary)})
    if result.returncode != 0:
        raise BuildError(f"torch-model-archiver failed:\n{result.stdout}{result.stderr}")
    return scratch / name


def _forget_date(folder: Path) -> None:
    """Remove the archive's creation time from its manifest."""
    manifest_path = folder / "MAR-INF" / "MANIFEST.json"
    manifest: dict[str, Any] = json.loads(manifest_path.read_text(encoding="utf-8"))
    manifest.pop("createdOn", None)
    manifest_path.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _same_files(target: Path, packed: Path) -> bool:
    """Whether two archives hold the same files, whoever signed them. False where the first is no archive."""
    try:
        with Archive(target) as old, Archive(packed) as new:
            return old.digest() == new.digest()
    except UsageError:
        return False


def _zip_reproducibly(folder: Path, target: Path) -> None:
    """Zip in sorted order with a fixed date."""
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            info = zipfile.ZipInfo(path.relative_to(folder).as_posix(), date_time=(1980, 1, 1, 0, 0, 0))
            info.external_attr = 0o644 << 16
            # Weights do not compress; storing them keeps building and loading fast.
            stored = path.suffix in (".safetensors", ".onnx", ".mnn", ".pt2")
            info.compress_type = zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED
            archive.writestr(info, path.read_bytes())
