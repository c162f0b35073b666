# Sourced by the other shell scripts: makes the virtual environment in $VENV (.venv) when it is missing or out of date, with
# the packages of requirements-dev.txt and this project itself, and sets PYTHON to its interpreter. Needs Python 3.11 to
# 3.13 and nothing else; Java comes with the packages.
VENV="${VENV:-.venv}"
PYTHON="$VENV/bin/python"

# The folder, too: the project is installed by its path.
_wanted="$(cat requirements.txt requirements-dev.txt pyproject.toml | cksum) $PWD"
if [ "$(cat "$VENV/.installed" 2>/dev/null)" != "$_wanted" ]; then
    _base=""
    for _candidate in python3.11 python3.12 python3.13 python3; do
        if "$_candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
            _base="$_candidate"
            break
        fi
    done
    if [ -z "$_base" ]; then
        echo "Python 3.11, 3.12 or 3.13 is needed and none is on PATH; install one and run this again" >&2
        exit 2
    fi
    echo "installing the packages of requirements-dev.txt into $VENV (about 5 GB; a minute or more)"
    "$_base" -m venv "$VENV"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
    # Written last: an interrupted installation is taken up again.
    printf '%s\n' "$_wanted" > "$VENV/.installed"
fi
