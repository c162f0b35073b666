"""Threads that read files: each computes alone, nobody else notices, and the numbers do not depend on how many there are."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
import torchaudio.functional as AF

from skewless.core.definition import Definition
from skewless.core.numerics import reader_threads
from skewless.core.request import Request
from skewless.core.service import ModelService, Prepared
from skewless.packaging.probes import probes
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def counts() -> set[int]:
    """How many threads torch, OpenMP and, where torch has it, MKL use in this thread."""
    # A thread settles on a number at its first operation.
    torch.ones(300, 300) @ torch.ones(300, 300)
    found = re.findall(r"(?:get_num_threads|get_max_threads)\(\) : (\d+)", torch.__config__.parallel_info())
    assert len(found) >= 2
    return set(map(int, found))


def computed() -> list[torch.Tensor]:
    """Operations that torch shares out to threads by itself, by OpenMP and by MKL."""
    noise = torch.rand(4, 60000, generator=torch.Generator().manual_seed(0)) - 0.5
    kernels = torch.rand(40, 1, 400, generator=torch.Generator().manual_seed(1)) - 0.5
    square = noise[:, :40000].reshape(400, 400)
    spectrum = torch.stft(noise, 1024, 160, window=torch.hann_window(1024), return_complex=True)
    filtered = AF.highpass_biquad(noise, 16000, 50.0)
    return [square @ square, spectrum.abs(), F.conv1d(noise[:, None], kernels, stride=10), filtered, noise.exp()]


def test_a_reader_computes_alone_and_others_as_before():
    before = computed()
    assert counts() == {2}
    both = threading.Barrier(2)

    def reader() -> set[int]:
        both.wait()
        return counts()

    with reader_threads(2) as readers:
        first = [readers.submit(reader) for _ in range(2)]
        assert [each.result() for each in first] == [{1}, {1}]
        assert counts() == {2}
        with ThreadPoolExecutor(1) as later:
            assert later.submit(counts).result() == {2}
        assert all(map(torch.equal, computed(), before))
        assert readers.submit(counts).result() == {1}
    assert counts() == {2}


@pytest.mark.parametrize("name", ["cough", "orca", "portrait"])
def test_what_is_read_depends_neither_on_threads_nor_on_company(name: str):
    definition = Definition.read(ROOT / "archive" / name)
    files = [Request(payload) for payload in probes(definition.pipeline.reads).values()]

    def read(*requests: Request) -> list[torch.Tensor]:
        service = ModelService(definition, None, {})  # type: ignore[arg-type]  # reading needs no network
        prepared = list(service.prepare(requests))
        assert all(isinstance(each, Prepared) for each in prepared), prepared
        return [each.signal.data for each in prepared if isinstance(each, Prepared)]

    alone = [read(file)[0] for file in files]
    together = read(*files)
    torch.set_num_threads(1)
    plain = [definition.prepared.run(file.payload).data for file in files]
    assert all(map(torch.equal, alone, plain))
    assert all(map(torch.equal, together, plain))
