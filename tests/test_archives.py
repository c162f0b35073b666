"""The other archives, beside the first in one TorchServe: the evaluated numbers by every path, and bad input refused."""

from __future__ import annotations

import io
import json
import zipfile
from functools import partial

import numpy as np
import pytest
import soundfile
import torch
import yaml
from PIL import Image

from skewless.core.pipeline import Pipeline
from skewless.core.postprocess import Postprocessor, build_postprocessor
from skewless.errors import BuildError
from skewless.packaging.build import build_archive
from skewless.torchserve.client import Client
from skewless.torchserve.server import Server
from skewless.torchserve.smoke import smoke_test
from skewless.training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from tests.conftest import OTHERS, ROOT, SERVED, Demonstration
from tests.test_build import edited_checkpoint


def reference(made: Demonstration, number: int = -1) -> tuple[bytes, dict]:
    """One of the references and what evaluation recorded for it."""
    entry = json.loads((made.evaluation / "references" / "references.json").read_text())[number]
    return (made.evaluation / "references" / entry["file"]).read_bytes(), entry


def test_four_archives_are_served_at_once(server: Server, others: dict[str, Demonstration]):
    served = {m["name"]: m["workers"] for m in server.models()}
    assert set(served) == {"cough", *OTHERS}
    assert all(workers == ["READY"] for workers in served.values()), served


@pytest.mark.parametrize("name", OTHERS)
def test_smoke_test_passes_on_every_path(server: Server, others: dict[str, Demonstration], name: str):
    rows = smoke_test(server, name)
    assert len(rows) == 12
    for row in rows:
        assert row.passed and row.flips == 0 and row.max_dp <= SERVED, row


def test_answers_of_orca(client: Client, others: dict[str, Demonstration]):
    payload, entry = reference(others["orca"])
    body = client.predict_rest("orca", payload).body
    assert body["deciding_confidence"] == pytest.approx(entry["scores"][0], abs=SERVED)
    confidences = [second["confidence"] for second in body["seconds"]]
    assert confidences == pytest.approx([p for *_, p in entry["parts"]], abs=SERVED)
    positive = [c for c in confidences if c > 0.5]
    assert body["global_confidence"] == pytest.approx(100 * sum(positive) / max(1, len(positive)), abs=1e-9)
    assert body["orcaDetected"] is (sum(c > 0.5 for c in confidences) >= 3)
    assert client.predict_rest("orca", payload, headers={"X-Threshold": "1"}).body["orcaDetected"] is False


def test_answers_of_talent(client: Client, others: dict[str, Demonstration]):
    payload, entry = reference(others["talent"])
    body = client.predict_rest("talent", payload).body
    (probability,) = entry["scores"]
    assert body["probability"] == pytest.approx(probability, abs=SERVED)
    assert body["label"] == ("good" if body["talented"] else "poor")
    chosen = probability if body["talented"] else 1 - probability
    assert body["confidence"] == pytest.approx(chosen, abs=SERVED)


def test_answers_of_portrait(client: Client, others: dict[str, Demonstration]):
    payload, entry = reference(others["portrait"])
    for answer in (
        client.predict_rest("portrait", payload),
        client.predict_rest("portrait", payload, json_key="image"),
        client.predict_rest("portrait", payload, multipart=True),
        client.predict_grpc("portrait", payload),
    ):
        body = answer.body
        assert list(body["probabilities"].values()) == pytest.approx(entry["scores"], abs=SERVED)
        assert sum(body["probabilities"].values()) == pytest.approx(1.0, abs=1e-6)
        assert body["label"] == max(body["probabilities"], key=body["probabilities"].get)
        assert body["confident"] is (body["probabilities"][body["label"]] >= body["threshold_used"])


# --- bad input --------------------------------------------------------------------------------------------------------


def wav(samples: np.ndarray, rate: int, subtype: str = "PCM_16") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype=subtype)
    return file.getvalue()


def picture(size: tuple[int, int], kind: str = "PNG", mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, 1 if mode == "1" else None).save(file, kind)
    return file.getvalue()


_TONE = 0.3 * np.sin(2 * np.pi * 220 * np.arange(22050 * 3) / 22050)
_NAN = np.where(np.arange(len(_TONE)) == 100, np.nan, _TONE)
_PHOTO = picture((300, 200), "JPEG")
REFUSED = {
    **{
        f"{name}-{what}": (name, payload, status, words)
        for name in ("orca", "talent")
        for what, payload, status, words in (
            ("empty", b"", 400, "empty"),
            ("image", _PHOTO, 415, "not a known audio format"),
            ("text", b"no recording at all", 415, "not a known audio format"),
            ("cut short", wav(_TONE, 22050)[:9999], 400, "truncated"),
            ("NaN", wav(_NAN, 22050, "FLOAT"), 400, "NaN"),
            ("too long", wav(np.zeros(8000 * 700), 8000, "PCM_U8"), 413, "longer than"),
            ("too large", bytes(53_000_000), 413, "at most"),
        )
    },
    "talent-too short for a feature": ("talent", wav(_TONE[:50], 22050), 400, ""),
    "portrait-empty": ("portrait", b"", 400, "empty"),
    "portrait-audio": ("portrait", wav(_TONE, 22050), 415, "not a known picture format"),
    "portrait-GIF": ("portrait", picture((64, 64), "GIF"), 415, "not a known picture format"),
    "portrait-cut short": ("portrait", _PHOTO[: len(_PHOTO) // 2], 400, ""),
    "portrait-one pixel": ("portrait", picture((1, 1)), 400, "1 x 1"),
    "portrait-bomb": ("portrait", picture((20_000, 20_000), mode="1"), 413, "20,000 x 20,000"),
    "portrait-too large": ("portrait", bytes(20_000_001), 413, "at most"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_with_a_reason(client: Client, others: dict[str, Demonstration], case: str):
    name, payload, status, words = REFUSED[case]
    for answer in (client.predict_rest(name, payload), client.predict_grpc(name, payload)):
        assert (answer.status, answer.body["code"]) == (status, status), answer
        assert words in answer.body["message"], answer


@pytest.mark.parametrize("name", OTHERS)
def test_a_bad_file_leaves_its_neighbours_alone(client: Client, others: dict[str, Demonstration], name: str):
    payload, entry = reference(others[name])
    other, expected = reference(others[name], 0)
    decision = load_decision(others[name])
    files = {"first": payload, "bad": b"neither sound nor picture", "last": other, "empty": b""}
    for send in (
        client.predict_batch_rest,
        partial(client.predict_batch_rest, as_json=True),
        client.predict_batch_grpc,
    ):
        body = send(name, files).body
        assert (body["succeeded"], body["failed"]) == (2, 2), body
        assert [body["results"][bad]["code"] for bad in ("bad", "empty")] == [415, 400]
        for good, wanted in (("first", entry), ("last", expected)):
            assert decision.read(body["results"][good])[0] == pytest.approx(wanted["scores"], abs=SERVED)


def load_decision(made: Demonstration) -> Postprocessor:
    return build_postprocessor(load_checkpoint(made.checkpoint)["postprocess"])


# --- what may not be forgotten ----------------------------------------------------------------------------------------


def test_the_scaler_is_in_the_archive(others: dict[str, Demonstration]):
    trained = Pipeline.from_dict(load_checkpoint(others["talent"].checkpoint)["pipeline"])
    with zipfile.ZipFile(others["talent"].archive) as archive:
        text = archive.read("pipeline.yaml").decode()
    assert Pipeline.from_dict(yaml.safe_load(text)).fingerprint == trained.fingerprint
    assert len(trained.stages["standard_scaler"].mean) == 37
    assert Pipeline.from_yaml(ROOT / "archive" / "talent" / "pipeline.yaml").unfitted == ["standard_scaler"]


def test_an_archive_without_the_scaler_does_not_build(others: dict[str, Demonstration], tmp_path):
    made = others["talent"]
    checkpoint = load_checkpoint(made.checkpoint)
    bare = Pipeline.from_yaml(ROOT / "archive" / "talent" / "pipeline.yaml")
    save_checkpoint(
        tmp_path / "bare.pth", checkpoint | {"pipeline": bare.to_dict(), "pipeline_fingerprint": bare.fingerprint}
    )
    with pytest.raises(CheckpointError, match="'standard_scaler' has no statistics of a training set"):
        build_archive(ROOT / "archive" / "talent", tmp_path / "bare.pth", made.evaluation, "2.0", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["bare.pth"]


def test_a_head_that_was_never_trained_does_not_build(others: dict[str, Demonstration], tmp_path):
    """ImageNet-like weights under a random head: what a service ran when its trained file would not load."""

    def forget(checkpoint: dict) -> None:
        weights = checkpoint["model_state_dict"]
        for layer in ("dense", "predictions"):  # as Keras draws them
            torch.nn.init.xavier_uniform_(weights[f"{layer}.weight"])
            torch.nn.init.zeros_(weights[f"{layer}.bias"])

    checkpoint, evaluation = edited_checkpoint(others["portrait"], tmp_path, forget)
    with pytest.raises(BuildError, match="layer 'dense' has a bias of exactly 0 throughout"):
        build_archive(ROOT / "archive" / "portrait", checkpoint, evaluation, "2.0", tmp_path / "out")
