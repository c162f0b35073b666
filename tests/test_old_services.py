"""The five documents' services, by their own libraries: adopting each finds what it runs, and serves the same numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.old_services import SERVICES, OldService, as_markdown, take_over
from skewless.core.pipeline import Pipeline
from tests.conftest import ROOT
from tests.recordings import one_thread  # noqa: F401

pytestmark = [pytest.mark.chain, pytest.mark.usefixtures("one_thread")]

# The pipeline that is to be found, and how far the answers may be from the record: float32's own noise, and for pictures, which
# another library decodes by another thread count, what test_import_keras.py allows.
FOUND = {
    "000": ("variants/no_highpass.yaml, standardize: arithmetic float32 → float16", 5e-6),
    "001": ("variants/onnx_backend.yaml", 5e-6),
    "002": ("pipeline.yaml", 5e-6),
    "003": ("pipeline.yaml", 5e-6),
    "004": ("variants/app_py.yaml", 5e-5),
}


@pytest.mark.parametrize("service", SERVICES, ids=lambda service: service.document)
def test_what_the_service_runs_is_found_and_packaged(service: OldService, tmp_path: Path):
    found = take_over(service, tmp_path, tmp_path / "scratch", limit=8)
    report = found["report"]
    name, noise = FOUND[service.document]
    assert report["best"]["name"] == name
    assert report["best"]["gap"]["largest"] <= noise
    adopted = report["adopted"]
    assert adopted["reproduced"] and Path(adopted["archive"]).is_file()
    # One decoder of two that give the same is served: the other exists to compare with.
    assert (adopted["pipeline"] == name) == report["best"]["servable"]
    assert f"| {service.document} | {service.runs} |" in as_markdown([found])
    packaged = Pipeline.from_yaml(Path(adopted["folder"]) / "pipeline.yaml")
    if name == "pipeline.yaml":
        own = Pipeline.from_yaml(ROOT / "archive" / service.archive / "pipeline.yaml")
        assert packaged.fingerprint == own.fingerprint and report["instead"] is None
    else:
        assert report["instead"]["largest"] > 0
