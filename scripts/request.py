"""Send one or more files to a served model: print the curl command that does the same, and the answer.

Several files travel in one request; each is answered under its name.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from skewless.torchserve.client import Client
from skewless.errors import ServerError, UsageError
from skewless.torchserve.server import Server


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "files", type=Path, nargs="+", metavar="file", help="what the model reads: a recording, an image"
    )
    parser.add_argument("--model", default="cough", help="name of a registered model (cough)")
    parser.add_argument("--version", help="one of its versions (the default one)")
    parser.add_argument("--json", action="store_true", help="send the files as JSON, in base64")
    parser.add_argument("--state-dir", type=Path, default=Path(".server"), help="the server's (.server)")
    arguments = parser.parse_args()
    if missing := [file for file in arguments.files if not file.is_file()]:
        parser.error(f"there is no file {missing[0]}")
    try:
        server = Server.attach(arguments.state_dir)
        path = "/".join(filter(None, ("predictions", arguments.model, arguments.version)))
        named = dict(zip(_names(arguments.files), arguments.files, strict=True))
        print(f"TOKEN=$(python scripts/serve.py token --state-dir {shlex.quote(str(arguments.state_dir))})")
        print(_curl(named, arguments.json, f"{server.inference_url}/{path}"), end="\n\n")
        with Client(server) as client:
            if len(named) > 1:
                contents = {name: file.read_bytes() for name, file in named.items()}
                answer = client.predict_batch_rest(arguments.model, contents, arguments.version, as_json=arguments.json)
            else:
                json_key = "file" if arguments.json else None
                payload = arguments.files[0].read_bytes()
                answer = client.predict_rest(arguments.model, payload, arguments.version, json_key=json_key)
    except UsageError as error:
        parser.error(str(error))
    except ServerError as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(answer.body, indent=2))
    return 0 if answer.status == 200 and not answer.body.get("failed") else 1


def _names(files: list[Path]) -> list[str]:
    """A name for each file that curl can send and TorchServe delivers unchanged."""
    names = [re.sub(r'[",:;=\\\x00-\x1f]|\s$', "_", file.name) for file in files]
    return names if len(set(names)) == len(names) else [f"{i}.{name}" for i, name in enumerate(names, 1)]


def _curl(named: dict[str, Path], as_json: bool, url: str) -> str:
    command = 'curl -H "Authorization: Bearer $TOKEN"'
    if as_json:
        contents = " ".join(f"\"$(base64 < {shlex.quote(str(file))} | tr -d '\\n')\"" for file in named.values())
        # printf takes a % for the start of a conversion.
        fields = {name.replace("%", "%%"): "%s" for name in named}
        body = json.dumps({"files": fields} if len(named) > 1 else {"file": "%s"}, ensure_ascii=False)
        command = f"printf {shlex.quote(body)} {contents} |\n{command} -H 'Content-Type: application/json'"
        return f"{command} \\\n     --data-binary @- {url}"
    if len(named) > 1:
        forms = [f"-F {shlex.quote(f'files.{name}=@{_form_path(file)}')}" for name, file in named.items()]
        return " \\\n     ".join([command, *forms, url])
    (file,) = named.values()
    sent = f"-H 'Content-Type: application/octet-stream' \\\n     --data-binary {shlex.quote(f'@{file}')}"
    return f"{command} {sent} {url}"


def _form_path(file: Path) -> str:
    # Outside quotes, curl ends a path at ; and starts another at a comma.
    if not re.search(r'[";,\\]', str(file)):
        return str(file)
    return '"' + re.sub(r'(["\\])', r"\\\1", str(file)) + '"'


if __name__ == "__main__":
    sys.exit(main())
