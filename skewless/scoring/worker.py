"""One worker: an archive loaded as a server loads it, which answers one file after another.

Ray takes the class to its processes as it is written here, by value. There the archive is put first on the Python path, so that
every line that decides a number is the archive's own. That is why nothing of skewless is imported at the top of this file.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import os
import stat
import sys
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow
    import ray

# The key of a row that says why the worker could not load the archive. Raised, Ray would wrap it in pages of its own.
FAULT = "fault"


class Scorer:
    """Loads the archive, which replays its references, and answers every file by itself, as a lone request.

    archive: the .mar's bytes. threads: for torch, where the archive does not say how many. threshold: the request's own, or
    None for the archive's. folder: where to unpack the archive; None for the machine's own temporary folder.
    """

    def __init__(self, archive: ray.ObjectRef, threads: int, threshold: float | None, folder: str | None):
        import ray

        self._threshold = threshold
        self._fault = ""
        self._folder = tempfile.TemporaryDirectory(prefix="archive-", dir=folder)
        try:
            with zipfile.ZipFile(io.BytesIO(ray.get(archive))) as packed:
                packed.extractall(self._folder.name)
            self._load(Path(self._folder.name), threads)
        except Exception as error:  # whatever an archive's own code raises
            self._fault = f"{type(error).__name__}: {error}"

    def __call__(self, files: pyarrow.Table) -> pyarrow.Table:
        """Files, with `file_path` and where it is, `path`, to one column `row` of JSON texts, in the same order.

        As text, so that the columns need not be the same for every file.
        """
        import pyarrow as pa

        rows = [self._row(file["file_path"], file["path"]) for file in files.to_pylist()]
        return pa.table({"row": pa.array([json.dumps(row, allow_nan=False) for row in rows], pa.string())})

    def _load(self, folder: Path, threads: int) -> None:
        sys.path.insert(0, str(folder))

        import torch

        from skewless.core import load_error
        from skewless.core.numerics import choose_device
        from skewless.core.request import refuse_large
        from skewless.core.service import ModelService

        load_error.check_own_code(str(folder))
        # Before the archive's numeric policy, which may set another number, and before runtimes that take it over.
        torch.set_num_threads(threads)
        service = ModelService.load(folder, choose_device(None))
        # Nobody waits beside a file here, so no answer may depend on how fast the machine is. Older archives
        # have no such limits.
        times: dict[str, Any] = {
            name: math.inf for name in ("max_read_s", "max_batch_s") if hasattr(service.limits, name)
        }
        limits = replace(service.limits, **times)
        self._service = replace(service, definition=replace(service.definition, limits=limits))
        self._limits, self._refuse_large = self._service.limits, refuse_large
        self._reasons = _Reasons()
        logging.getLogger("skewless").addHandler(self._reasons)
        runtime = self._service.runtime
        self._answered_by = {
            "model_version": self._service.metrics["model_version"],
            "pipeline_fingerprint": self._service.pipeline.fingerprint,
            "runtime": runtime.name,
            "precision": runtime.precision,
            "tier": runtime.tier,
        }

    def _row(self, file_path: str, path: str) -> dict[str, Any]:
        """What is known of one file: plain values, some of them None where it has no answer."""
        if self._fault:
            return {"file_path": file_path, FAULT: self._fault}
        from skewless.core.request import BatchRequest, Request, RequestError, parse_request

        row: dict[str, Any] = {"file_path": file_path, **self._answered_by}
        fields: dict[str, Any] = {} if self._threshold is None else {"threshold": repr(self._threshold)}
        request: Request | BatchRequest | RequestError
        try:
            payload = self._read(path)
            row["sha256"] = hashlib.sha256(payload).hexdigest()
            request = parse_request({**fields, "data": payload}, {}, self._limits)
        except OSError as error:
            # No server has seen it, so there is no status.
            return row | {"error": f"the file cannot be read: {error.strerror or error}"}
        except RequestError as error:
            request = error
        if isinstance(request, BatchRequest):
            request = RequestError(400, "the file is a JSON request for several files, expected one recording or image")
        self._reasons.last = ""
        (answer,) = self._service.predict([request])
        try:  # the code of older archives may give such an answer
            row |= {"status": answer.status, "body": json.dumps(answer.body, allow_nan=False)}
        except ValueError:
            return row | {
                "status": 503,
                "error": "the answer has a number that is not finite, which a server cannot send",
            }
        if answer.status != 200:
            return row | {"error": self._reasons.last or answer.body["message"]}
        # Of a decision-exact archive's two networks, the one that gave this answer.
        row |= {key: answer.body[key] for key in ("runtime", "precision", "tier")}
        postprocessor = self._service.postprocessor
        scores, chosen = postprocessor.read(answer.body)
        names = ["score"] if len(scores) == 1 else [f"score_{name}" for name in postprocessor.classes]
        given: dict[str, Any] = dict(zip(names, scores, strict=True))
        given |= {"decision": postprocessor.classes[chosen], "threshold": answer.body["threshold_used"]}
        # The rest is in the body: lists, and what would be taken for one of ours.
        plain = {
            name: value
            for name, value in answer.body.items()
            if isinstance(value, int | float | str) and name != "threshold_used" and not name.startswith("score")
        }
        return plain | row | given

    def _read(self, path: str) -> bytes:
        """A file's bytes. Raises OSError, and RequestError for one that is too large, which is not read."""
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise OSError("it is no file")
        self._refuse_large(found.st_size, self._limits)
        return Path(path).read_bytes()


class _Reasons(logging.Handler):
    """Keeps the last exception that was logged: a worker's log ends with the run, and the answer only points to it."""

    last = ""

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1]:
            self.last = f"{record.getMessage()}: {record.exc_info[0].__name__}: {record.exc_info[1]}"
