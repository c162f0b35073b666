"""What defines a model: a folder with pipeline.yaml, model.yaml and, where they name any, Python files of its own.

An unpacked archive is such a folder, too, with the weights and the metrics beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import InvalidRequirement, Requirement

from skewless.core.catalogue import check
from skewless.core.errors import DefinitionError
from skewless.core.networks import NETWORKS, Network, build_network, exported_file, spelt_out
from skewless.core.numerics import TIERS, NumericPolicy
from skewless.core.own_code import OwnCode, file_of
from skewless.core.pipeline import Pipeline
from skewless.core.postprocess import POSTPROCESSORS, Postprocessor, build_postprocessor
from skewless.core.request import Limits
from skewless.core.runtimes import RUNTIMES, Runtime, load_runtime, runtime_settings
from skewless.core.stages import Stage
from skewless.core.yaml_file import read_yaml

PIPELINE, MODEL, REQUIREMENTS = "pipeline.yaml", "model.yaml", "requirements.txt"
# The folder in an archive with the files of its fast runtime.
FAST = "fast"
_KEYS = ("network", "runtime", "postprocess", "precision", "limits")
_OPTIONAL = ("fast_runtime",)


@dataclass(frozen=True)
class Definition:
    """One model's definition, checked.

    network, runtime, postprocess: each `{name: {parameter: value}}`. precision: the numeric policy. limits: what one
    request may ask for. fast_runtime: like runtime, in a reduced precision, for a decision-exact archive: it is asked first,
    and `runtime` where its answer is close to a decision's boundary.
    """

    folder: Path
    pipeline: Pipeline
    network: Mapping[str, Any]
    runtime: Mapping[str, Any]
    postprocess: Mapping[str, Any]
    precision: NumericPolicy
    limits: Limits
    fast_runtime: Mapping[str, Any] | None = None

    @classmethod
    def read(cls, folder: str | Path) -> Definition:
        """Read and check a folder. Raises DefinitionError naming the file, the key and the value that is wrong, and for
        packages of its requirements.txt that are not installed as it asks."""
        folder = Path(folder)
        for name in (PIPELINE, MODEL):
            if not (folder / name).is_file():
                raise DefinitionError(
                    f"{folder} has no {name}: a model's folder has {PIPELINE} and {MODEL}; `skewless new` writes one"
                )
        check_requirements(folder)
        found = cls(folder, Pipeline.from_yaml(folder / PIPELINE), **read_model(folder / MODEL))
        # Raises where they do not end the pipeline.
        _ = found.absorbed
        found.check_fast_runtime()
        return found

    @property
    def name(self) -> str:
        """The model's name: the folder's."""
        return self.folder.resolve().name

    @cached_property
    def postprocessor(self) -> Postprocessor:
        """Raises DefinitionError for a definition that cannot be built."""
        return build_postprocessor(self.postprocess, self.folder)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, by the labels' numbers."""
        return self.postprocessor.classes

    @property
    def absorbed(self) -> tuple[Stage, ...]:
        """The pipeline's last stages, those that the runtime computes with the network; raises DefinitionError for others."""
        name, _ = RUNTIMES.split(self.runtime)
        absorb = runtime_settings(self.runtime)[1].absorb
        names = list(self.pipeline.stages)
        if list(absorb) != names[len(names) - len(absorb) :] or len(absorb) >= len(names):
            raise DefinitionError(
                f"runtime '{name}': absorb is {list(absorb)}, expected the pipeline's last stages in order, such as "
                f"[{', '.join(names[-2:])}]"
            )
        return tuple(self.pipeline.stages[each] for each in absorb)

    def check_fast_runtime(self) -> None:
        """Raise DefinitionError for a fast runtime that is not of the reduced tier, or takes other values than `runtime`."""
        if self.fast_runtime is None:
            return
        (_, exact), (name, fast) = runtime_settings(self.runtime), runtime_settings(self.fast_runtime)
        if TIERS[exact.precision] != "exact" or TIERS[fast.precision] != "reduced":
            raise DefinitionError(
                f"runtime is in {exact.precision} and fast_runtime in {fast.precision}, expected fp32 and a reduced precision "
                "such as int8: answers of the fast one are confirmed by the other"
            )
        if fast.absorb != exact.absorb:
            raise DefinitionError(
                f"fast_runtime '{name}': absorb is {list(fast.absorb)}, expected the runtime's {list(exact.absorb)}: both take "
                "the same values"
            )

    @cached_property
    def prepared(self) -> Pipeline:
        """The stages that run before the runtime: the pipeline without those that the runtime absorbs."""
        absorbed = runtime_settings(self.runtime)[1].absorb
        return self.pipeline.split(absorbed[0])[0] if absorbed else self.pipeline

    def load_runtime(self, device: torch.device) -> Runtime:
        """What executes the network of this folder, an unpacked archive, on `device`; raises ValueError."""
        return load_runtime(self.runtime, self.network, self.folder, device, self.absorbed)

    def load_fast_runtime(self, device: torch.device) -> Runtime | None:
        """What is asked before `load_runtime`'s, None for an archive that has no such thing; raises ValueError."""
        if self.fast_runtime is None:
            return None
        return load_runtime(self.fast_runtime, self.network, self.folder / FAST, device, self.absorbed)

    def build_network(self) -> Network:
        """The network, with random weights unless it is an exported one; raises DefinitionError."""
        return build_network(self.network, self.folder)

    @property
    def network_files(self) -> tuple[str, ...]:
        """Files of the folder that hold the network, such as model.pt2; empty where a class builds it."""
        name, params = NETWORKS.split(self.network)
        return (exported_file(params).file,) if name == "exported" else ()

    @cached_property
    def packages(self) -> set[str]:
        """The packages that compute the numbers, from the file's bytes to the network's outputs, as pip names them."""
        name, _ = NETWORKS.split(self.network)
        runtimes = [runtime_settings(each)[0] for each in (self.runtime, self.fast_runtime) if each is not None]
        network = NETWORKS.find(name, OwnCode(self.folder))
        return {*self.pipeline.packages, *network.packages, *(p for runtime in runtimes for p in runtime.packages)}

    @cached_property
    def code(self) -> dict[str, str]:
        """SHA-256 of every Python file of the folder that the definition names or such a file imports, by name."""
        names = [name for part in (self.network, self.postprocess) for name in part]
        files = {file for name in names if (file := file_of(name)) is not None}
        return {**self.pipeline.code, **OwnCode(self.folder).digests(files)}


def read_model(path: Path) -> dict[str, Any]:
    """The parts of a model.yaml; raises DefinitionError when it is not YAML, lacks one, or has one that is wrong."""
    try:
        content = read_yaml(path)
    except DefinitionError as error:
        raise DefinitionError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise DefinitionError(f"{path} is {content!r:.60}, expected the keys {', '.join(_KEYS)}")
    if missing := [key for key in _KEYS if key not in content]:
        raise DefinitionError(f"{path} has no {', '.join(missing)}; it needs {', '.join(_KEYS)}")
    if unknown := [str(key) for key in content if key not in (*_KEYS, *_OPTIONAL)]:
        takes = ", ".join((*_KEYS, *_OPTIONAL))
        raise DefinitionError(
            f"{path} has the unknown key {', '.join(unknown)}; it takes {takes}. What TorchServe reads, such as "
            "batchSize, is in model-config.yaml"
        )
    try:
        name, params = NETWORKS.split(spelt_out(content["network"]))
        if name == "exported":
            exported_file(params)
        runtime_settings(content["runtime"])
        if "fast_runtime" in content:
            runtime_settings(content["fast_runtime"])
        POSTPROCESSORS.split(content["postprocess"])
        for key, kind in (("precision", NumericPolicy), ("limits", Limits)):
            if not isinstance(content[key], dict):
                raise DefinitionError(f"{key} is {content[key]!r}, expected a mapping (use {{}} for the defaults)")
            content[key] = kind(**check(kind, content[key], key))
    except ValueError as error:
        raise DefinitionError(f"{path}: {error}") from error
    return content | {"network": spelt_out(content["network"])}


def check_requirements(folder: Path) -> None:
    """Raise DefinitionError unless every line of the folder's requirements.txt, if it has one, is met here."""
    path = folder / REQUIREMENTS
    if not path.is_file():
        return
    problems = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        try:
            wanted = Requirement(text)
        except InvalidRequirement as error:
            raise DefinitionError(f"{path}, line {number}: {text!r} is no requirement: {error}") from error
        if wanted.marker is not None and not wanted.marker.evaluate():
            continue
        try:
            installed = version(wanted.name)
        except PackageNotFoundError:
            problems.append(f"{wanted} is not installed")
            continue
        if not wanted.specifier.contains(installed, prereleases=True):
            problems.append(f"{wanted} is asked for, {installed} is installed")
    if problems:
        raise DefinitionError(f"{path}: {'; '.join(problems)}. Install them: pip install -r {path}")
