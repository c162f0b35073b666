#!/usr/bin/env bash
# Lint and run every test; arguments go to pytest, such as `-k decode`.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m pytest "$@"
