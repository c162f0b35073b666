"""`skewless new`: the folder of a new model, ready to train, with a comment wherever its owner has to decide."""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

from skewless import resources
from skewless.core.definition import MODEL, PIPELINE

_TEMPLATES = Path(__file__).resolve().parent / "templates"
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")

# What the copy of one of our archives says above each file.
_DECIDE = {
    PIPELINE: "# DECIDE: these are the stages of '{like}'. They have to be what your training computes, in its order and with\n"
    "# its parameters; `skewless skew` shows where two lists part. A stage of your own is FILE.py:Class.\n",
    MODEL: "# DECIDE: the network, and the classes in the order of the labels' numbers; the limits of a request. A network or\n"
    "# post-processing of your own is FILE.py:Class, and {{exported: model.pt2}} a network without a class.\n",
    "recipe.yaml": "# DECIDE: `training`'s settings for your own recordings. `corpus` makes synthetic ones to try the rest on.\n",
}


def create(name: str, folder: Path, like: str | None = None) -> Path:
    """Write the folder `folder/name` and return its path.

    like: one of our archives, such as "cough", to start from; None for a small sound classifier with a stage and a
        network of its own.
    Raises ValueError for a name that no model can have, an unknown `like`, and a folder that exists already.
    """
    known = [p.parent.name for p in sorted(resources.ARCHIVES.glob(f"*/{MODEL}"))]
    if not _NAME.fullmatch(name):
        raise ValueError(f"the name is {name!r}, expected letters, digits, - and _, beginning with a letter")
    if like is not None and like not in known:
        raise ValueError(f"--like is {like!r}, expected one of {', '.join(known)}")
    target = folder / name
    if target.exists():
        raise ValueError(f"{target} exists already; choose another name, or delete it")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{name}-") as scratch:
        made = Path(scratch, name)
        if like is None:
            shutil.copytree(_TEMPLATES / "sound", made, ignore=shutil.ignore_patterns("__pycache__"))
            shutil.copy(_TEMPLATES / "model-config.yaml", made)
        else:
            made.mkdir()
            for path in sorted((resources.ARCHIVES / like).glob("*.yaml")):
                text = path.read_text(encoding="utf-8")
                (made / path.name).write_text(_DECIDE.get(path.name, "").format(like=like) + text, encoding="utf-8")
        pipeline = made / PIPELINE
        text = pipeline.read_text(encoding="utf-8")
        pipeline.write_text(re.sub(r"(?m)^name: .*$", f"name: {name}", text, count=1), encoding="utf-8")
        made.rename(target)
    return target
