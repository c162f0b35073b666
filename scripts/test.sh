#!/usr/bin/env bash
# Lint, check types, and run every test: first those that need neither a trained model nor a server, then the others.
# Arguments go to pytest, in one run, such as `-k decode` or tests/test_decode.py.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
if [ $# -gt 0 ]; then
    "$PYTHON" -m pytest "$@"
else
    # A test process that dies is a failure, and not started again: its module would be run once more, or waited for.
    "$PYTHON" -m pytest -m "not chain" -n 2 --dist loadscope --max-worker-restart 0
    "$PYTHON" -m pytest -m chain -n 2 --dist loadscope --max-worker-restart 0
fi
