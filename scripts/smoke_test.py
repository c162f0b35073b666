"""Prove a served model: every reference by REST and gRPC, one at a time and in batches, against evaluation's numbers.

Exits with 1 when a probability is further from its reference than the archive's tier allows (exact: 1e-4, reduced: 0.02),
or a request fails.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from skewless.errors import ServerError, UsageError
from skewless.torchserve.server import Server
from skewless.torchserve.smoke import as_table, smoke_test


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="cough", help="name of a registered model (cough)")
    parser.add_argument("--version", help="one of its versions (the default one)")
    parser.add_argument("--state-dir", type=Path, default=Path(".server"), help="the server's (.server)")
    arguments = parser.parse_args()
    try:
        rows = smoke_test(Server.attach(arguments.state_dir), arguments.model, arguments.version)
    except UsageError as error:
        parser.error(str(error))
    except ServerError as error:
        print(error, file=sys.stderr)
        return 1
    print(as_table(rows))
    failed = [row for row in rows if not row.passed]
    print(f"{len(rows) - len(failed)} of {len(rows)} paths serve the reference probabilities")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
