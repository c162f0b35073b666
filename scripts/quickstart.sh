#!/usr/bin/env bash
# From nothing to a proven service: make a corpus, train, evaluate, package, serve, and compare what is served with
# what was evaluated. Run again, it takes up what is already done. --archive NAME chooses one of archive/ (cough);
# --keep leaves the server running.
set -euo pipefail
cd "$(dirname "$0")/.."

name=cough keep=""
while [ $# -gt 0 ]; do
    case "$1" in
        --keep) keep=yes ;;
        --archive) name="${2:-}"; shift ;;
        *) echo "usage: $0 [--archive NAME] [--keep]" >&2; exit 2 ;;
    esac
    shift || break
done
name="${name%/}"
recipe="archive/$name/recipe.yaml"
if [ -z "$name" ] || [ ! -f "$recipe" ]; then
    echo "$0: --archive is '$name', expected one of: $(cd archive && echo *)" >&2
    exit 2
fi
. scripts/environment.sh

work="runs/quickstart/$name"
skewless() { "$VENV/bin/skewless" "$@"; }
step() { printf '\n== %s\n' "$1"; }

step "1/6 a synthetic corpus (for demonstration only)"
skewless corpus --recipe "$recipe" --out "$work/corpus"
step "2/6 training"
skewless train "archive/$name" --recipe "$recipe" --manifest "$work/corpus/manifest.csv" --out "$work/train"
step "3/6 evaluation"
skewless evaluate "archive/$name" --checkpoint "$work/train/best.pth" --manifest "$work/corpus/manifest.csv" \
    --out "$work/evaluation"
step "4/6 packaging"
skewless build "archive/$name" --checkpoint "$work/train/best.pth" --evaluation "$work/evaluation" --version 1.0 \
    --out "$work/model_store" --force
step "5/6 serving"
# One that an earlier --keep left, healthy or not.
skewless serve stop --state-dir "$work/server" 2> /dev/null || true
[ -n "$keep" ] || trap 'skewless serve stop --state-dir "$work/server"' EXIT
# Version 1.0 is built anew each time.
skewless serve start --state-dir "$work/server" --model-store "$work/model_store" --ports free --forget
skewless register "$work/model_store/$name-1.0.mar" --default --state-dir "$work/server"
step "6/6 smoke test: served against evaluated"
skewless smoke "$name" --state-dir "$work/server"
step "one request"
skewless predict "$work"/evaluation/references/08.* --model "$name" --state-dir "$work/server"
if [ -n "$keep" ]; then
    printf '\nthe server goes on; stop it with: %s serve stop --state-dir %s\n' "$VENV/bin/skewless" "$work/server"
fi
