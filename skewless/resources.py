"""Where the files are that are not Python modules: in an installed wheel inside the package, in a checkout beside it."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_INSTALLED = _PACKAGE / "resources"
ROOT = _INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parent

HANDLER = ROOT / "handler"
CONFIG = ROOT / "config.properties"
ARCHIVES = ROOT / "archive"
CORE = _PACKAGE / "core"
