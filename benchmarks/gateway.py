"""What the gateway adds to a request, and what is lost while something changes.

For a running server with a gateway (`skewless gateway start`): requests one after the other, to TorchServe and through the
gateway in turn; then requests from several callers while nginx is told to reload its configuration, again and again, which a
step of a rollout does not need.

    python -m benchmarks.gateway --state-dir .server --model cough --file recording.wav
"""

from __future__ import annotations

import argparse
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import grpc
import numpy as np
import psutil
import requests
from tqdm import tqdm

from skewless.rollout.gateway import Gateway
from skewless.torchserve.client import MESSAGES, SERVICE
from skewless.torchserve.server import Server, bearer, session

CALL = f"/{SERVICE}.InferenceAPIsService/Predictions"
TYPED = {"Content-Type": "application/octet-stream"}


def by_rest(url: str, model: str, file: bytes, headers: dict[str, str]) -> Callable[[], str]:
    """Sends the file over one kept connection; returns the status."""
    connection = session()

    def ask() -> str:
        try:
            answer = connection.post(f"{url}/predictions/{model}", file, headers=TYPED | headers, timeout=60)
        except requests.RequestException as error:
            return type(error).__name__
        return str(answer.status_code)

    return ask


def by_grpc(address: str, model: str, file: bytes, headers: dict[str, str]) -> Callable[[], str]:
    """As `by_rest`, over a channel of its own."""
    channel = grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
    request = MESSAGES["PredictionsRequest"](model_name=model, input={"data": file}).SerializeToString()
    call = channel.unary_unary(CALL, None, MESSAGES["PredictionResponse"].FromString)
    metadata = [(key.lower(), value) for key, value in headers.items()]

    def ask() -> str:
        try:
            call(request, metadata=metadata, timeout=60)
        except grpc.RpcError as error:
            return str(error.code().name)
        return "200"

    return ask


def latencies(ways: dict[str, Callable[[], str]], rounds: int) -> dict[str, np.ndarray]:
    """Milliseconds of each way, in turn, so that what else runs hits all of them."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in tqdm(range(rounds + 20), desc="one at a time", leave=False):
        for name, ask in ways.items():
            started = time.perf_counter()
            status = ask()
            if status != "200":
                raise SystemExit(f"{name}: {status}, expected 200")
            if number >= 20:
                taken[name].append(1000 * (time.perf_counter() - started))
    return {name: np.array(values) for name, values in taken.items()}


def while_reloading(make: Callable[[], Callable[[], str]], nginx: psutil.Process, reloads: int) -> Counter[str]:
    """Statuses of four callers while nginx reloads every 0.2 s."""
    statuses: Counter[str] = Counter()
    ending = threading.Event()

    def caller() -> None:
        ask = make()
        while not ending.is_set():
            statuses[ask()] += 1

    callers = [threading.Thread(target=caller) for _ in range(4)]
    for each in callers:
        each.start()
    for _ in tqdm(range(reloads), desc="reloads", leave=False):
        nginx.send_signal(signal.SIGHUP)
        time.sleep(0.2)
    ending.set()
    for each in callers:
        each.join()
    return statuses


def main() -> None:
    """Measure, and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state-dir", type=Path, default=Path(".server"))
    parser.add_argument("--model", required=True)
    parser.add_argument("--file", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--reloads", type=int, default=100)
    asked = parser.parse_args()
    server, gateway = Server.attach(asked.state_dir), Gateway.attach(asked.state_dir)
    file = asked.file.read_bytes()
    token = bearer(server.token("inference"))
    ways = {
        "REST, TorchServe": by_rest(server.inference_url, asked.model, file, token),
        "REST, gateway": by_rest(gateway.rest_url, asked.model, file, {}),
        "gRPC, TorchServe": by_grpc(server.grpc_address, asked.model, file, token),
        "gRPC, gateway": by_grpc(gateway.grpc_address, asked.model, file, {}),
    }
    print(f"{len(file)} bytes, {asked.rounds} requests each\n\n{'':20} p50 ms  p95 ms")
    for name, values in latencies(ways, asked.rounds).items():
        print(f"{name:20} {np.percentile(values, 50):6.2f}  {np.percentile(values, 95):6.2f}")
    nginx = psutil.Process(int((gateway.folder / "nginx.pid").read_text()))
    print(f"\n{asked.reloads} reloads of nginx, 4 callers")
    for name, make in (
        ("REST", lambda: by_rest(gateway.rest_url, asked.model, file, {})),
        ("gRPC", lambda: by_grpc(gateway.grpc_address, asked.model, file, {})),
    ):
        print(f"{name:20} {dict(while_reloading(make, nginx, asked.reloads))}")


if __name__ == "__main__":
    main()
