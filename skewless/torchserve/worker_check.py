"""Verify the unpacked archive in the working directory, then become the TorchServe worker that was asked for.

TorchServe starts a worker in the folder of the archive that it is to load. Run as a script, by `verifying_python`, with the
worker's command line behind it. A refusal ends the process before the worker begins, with the reason where that of any failed
load is.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path


def main() -> None:
    # This installation's own code: neither the archive's nor what the Python path says.
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

    from skewless.core import load_error
    from skewless.errors import UsageError
    from skewless.packaging.signing import TrustedKeys, verify_folder
    from skewless.torchserve.archive import MANIFEST, NAME
    from skewless.torchserve.launch import TRUSTED_KEYS

    folder = Path.cwd()
    try:
        with contextlib.ExitStack() as stack:
            # Of an archive that may have been altered, not even the name is believed.
            with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
                model = json.loads((folder / MANIFEST).read_bytes())["model"]
                if all(NAME.fullmatch(model[key]) for key in ("modelName", "modelVersion")):
                    stack.enter_context(load_error.written_down(model))
            verify_folder(folder, TrustedKeys.read(os.environ[TRUSTED_KEYS]))
    except UsageError as error:
        # TorchServe's log has what a worker prints.
        print(f"not loaded: {error}", flush=True)
        sys.exit(1)
    # The worker must leave no compiled code beside the archive's: at its next start that would be a file that nobody signed.
    os.execv(sys.executable, [sys.executable, "-B", *sys.argv[1:]])


if __name__ == "__main__":
    main()
