"""Callers of a gateway over REST and gRPC, each with an identity of its own, and what each was answered."""

from __future__ import annotations

import io
import json
import random
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import requests
import soundfile

from skewless.core.pipeline import Pipeline
from skewless.torchserve.client import MAX_MESSAGE_BYTES, MESSAGES, SERVICE
from skewless.torchserve.server import session

CLIENT, ARM, VERSION = "x-client-id", "x-skewless-arm", "x-skewless-version"


@dataclass(frozen=True)
class Asked:
    """One request of a caller and its answer. status: of HTTP; of gRPC 200 for OK, else 500. version: as the answer's body has
    it; arm and said: arm and version of the gateway's headers."""

    time: float
    client: str
    protocol: str
    status: int
    arm: str
    said: str
    version: str
    seconds: float
    message: str


class Recordings:
    """The recordings that callers send: those of a folder, each time as another level and beginning, one in ten in stereo, one in
    five as if it had been made at 24 kHz."""

    def __init__(self, files: Sequence[Path]):
        self._sounds = [_decoded(file) for file in files]

    def one(self, chance: random.Random) -> bytes:
        samples, rate = chance.choice(self._sounds)
        level = 10 ** (-chance.uniform(0, 30) / 20) / max(1e-9, float(np.abs(samples).max()))
        begins = chance.randrange(1 + min(rate // 4, max(0, len(samples) - 3 * rate)))
        sound = samples[begins:] * level
        if chance.random() < 0.1:
            sound = np.stack([sound, sound], axis=1)
        if chance.random() < 0.2:
            rate = 24_000
        file = io.BytesIO()
        soundfile.write(file, sound, rate, format="WAV", subtype="PCM_16")
        return file.getvalue()


class Traffic:
    """Callers that ask the gateway again and again, from `start` until `stop`.

    callers: as many ask at once; half of the requests by REST, half by gRPC. clients: as many identities are there.
    """

    def __init__(
        self, url: str, grpc_address: str, model: str, recordings: Recordings, callers: int, clients: int, seed: int
    ):
        self.asked: list[Asked] = []
        self._url, self._model, self._recordings = f"{url}/predictions/{model}", model, recordings
        self._clients = [f"client-{number}" for number in range(clients)]
        self._ended = threading.Event()
        limits = [
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ]
        self._channel = grpc.insecure_channel(grpc_address, options=limits)
        self._predict = self._channel.unary_unary(
            f"/{SERVICE}.InferenceAPIsService/Predictions",
            request_serializer=MESSAGES["PredictionsRequest"].SerializeToString,
            response_deserializer=MESSAGES["PredictionResponse"].FromString,
        )
        self._threads = [
            threading.Thread(target=self._ask, args=(random.Random(f"{seed} {n}"),)) for n in range(callers)
        ]

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()
        self._channel.close()

    def _ask(self, chance: random.Random) -> None:
        with session() as connection:
            while not self._ended.is_set():
                payload, client = self._recordings.one(chance), chance.choice(self._clients)
                began = time.time()
                answer = (
                    self._rest(connection, payload, client) if chance.random() < 0.5 else self._grpc(payload, client)
                )
                self.asked.append(Asked(time=began, client=client, seconds=time.time() - began, **answer))

    def _rest(self, connection: requests.Session, payload: bytes, client: str) -> dict[str, Any]:
        headers = {"Content-Type": "application/octet-stream", CLIENT: client}
        try:
            answer = connection.post(self._url, payload, headers=headers, timeout=120)
        except requests.RequestException as error:
            return _answered("rest", 0, {}, b"", str(error))
        return _answered("rest", answer.status_code, answer.headers, answer.content, answer.text)

    def _grpc(self, payload: bytes, client: str) -> dict[str, Any]:
        request = MESSAGES["PredictionsRequest"](model_name=self._model, input={"data": payload})
        try:
            reply, call = self._predict.with_call(request, metadata=[(CLIENT, client)], timeout=120)
        except grpc.RpcError as error:
            return _answered("grpc", 500, {}, b"", str(error))
        told = {key: value for key, value in call.initial_metadata() if isinstance(value, str)}
        body = _json(reply.prediction)
        return _answered("grpc", int(body.get("code", 200)), told, reply.prediction, str(body.get("message", "")))


def _answered(protocol: str, status: int, headers: Mapping[str, str], content: bytes, message: str) -> dict[str, Any]:
    return {
        "protocol": protocol,
        "status": status,
        "arm": headers.get(ARM, ""),
        "said": headers.get(VERSION, ""),
        "version": str(_json(content).get("model_version", "")),
        "message": "" if status == 200 else message[:300],
    }


def _json(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _decoded(file: Path) -> tuple[np.ndarray, int]:
    """A recording's first channel and its rate in Hz, by the product's own decoder."""
    signal = Pipeline.from_dict({"name": "decoded", "stages": [{"decode": {}}, {"downmix": {}}]}).run(file.read_bytes())
    return signal.data.numpy().reshape(-1), signal.sampling_rate
