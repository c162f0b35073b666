"""Send one file to a served model: print the curl command that does the same, and the answer."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from serving.client import Client
from serving.errors import ServerError, UsageError
from serving.server import Server


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="what the model reads, such as a recording")
    parser.add_argument("--model", default="cough", help="name of a registered model (cough)")
    parser.add_argument("--version", help="one of its versions (the default one)")
    parser.add_argument("--state-dir", type=Path, default=Path(".server"), help="the server's (.server)")
    arguments = parser.parse_args()
    if not arguments.file.is_file():
        parser.error(f"there is no file {arguments.file}")
    try:
        server = Server.attach(arguments.state_dir)
        path = "/".join(filter(None, ("predictions", arguments.model, arguments.version)))
        print(
            f"TOKEN=$(python scripts/serve.py token --state-dir {arguments.state_dir})\n"
            "curl -H \"Authorization: Bearer $TOKEN\" -H 'Content-Type: application/octet-stream' \\\n"
            f"     --data-binary @{arguments.file} {server.inference_url}/{path}\n"
        )
        with Client(server) as client:
            answer = client.predict_rest(arguments.model, arguments.file.read_bytes(), arguments.version)
    except UsageError as error:
        parser.error(str(error))
    except ServerError as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(answer.body, indent=2))
    return 0 if answer.status == 200 else 1


if __name__ == "__main__":
    sys.exit(main())
