"""Commands about definitions: schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from skewless.cli.frame import DEFINE, Result, app, command


@command(app, "schema", panel=DEFINE)
def schema(
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write NAME.schema.json for each.", show_default="print one document"),
    ] = None,
) -> Result:
    """Print the JSON Schemas of pipeline.yaml, model.yaml and recipe.yaml, which let editors complete and check them."""
    from skewless.schema import schemas

    found = schemas()
    if out is None:
        return Result(found, json.dumps(found, indent=2))
    out.mkdir(parents=True, exist_ok=True)
    files = [out / f"{name}.schema.json" for name in found]
    for file, content in zip(files, found.values(), strict=True):
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return Result({"files": files}, "\n".join(map(str, files)))
