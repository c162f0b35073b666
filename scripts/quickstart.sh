#!/usr/bin/env bash
# From nothing to a proven service: make recordings, train, evaluate, package, serve, and compare what is served with
# what was evaluated. Run again, it takes up what is already done. --keep leaves the server running.
set -euo pipefail
cd "$(dirname "$0")/.."

keep=""
case "${1:-}" in
    "") ;;
    --keep) keep=yes ;;
    *) echo "usage: $0 [--keep]" >&2; exit 2 ;;
esac
. scripts/environment.sh

work=runs/quickstart
step() { printf '\n== %s\n' "$1"; }

step "1/6 a corpus of synthetic recordings (for demonstration, not for medicine)"
"$PYTHON" scripts/make_corpus.py --out "$work/corpus" --clips 320 --max-seconds 2.9
step "2/6 training"
"$PYTHON" scripts/train.py --manifest "$work/corpus/manifest.csv" --out "$work/train" \
    --epochs 5 --learning-rate 1e-3 --no-augmentation
step "3/6 evaluation"
"$PYTHON" scripts/evaluate.py --checkpoint "$work/train/best.pth" --manifest "$work/corpus/manifest.csv" --out "$work/evaluation"
step "4/6 packaging"
"$PYTHON" scripts/build_archive.py --checkpoint "$work/train/best.pth" --evaluation "$work/evaluation" \
    --version 1.0 --out "$work/model_store" --force
step "5/6 serving"
if "$PYTHON" scripts/serve.py status --state-dir "$work/server" > /dev/null; then
    "$PYTHON" scripts/serve.py stop --state-dir "$work/server"
fi
[ -n "$keep" ] || trap '"$PYTHON" scripts/serve.py stop --state-dir "$work/server"' EXIT
"$PYTHON" scripts/serve.py start --state-dir "$work/server" --model-store "$work/model_store" --ports free
"$PYTHON" scripts/register.py "$work/model_store/cough-1.0.mar" --default --state-dir "$work/server"
step "6/6 smoke test: served against evaluated"
"$PYTHON" scripts/smoke_test.py --model cough --state-dir "$work/server"
step "one request"
"$PYTHON" scripts/request.py "$work"/evaluation/references/08.* --state-dir "$work/server"
if [ -n "$keep" ]; then
    printf '\nthe server goes on; stop it with: %s scripts/serve.py stop --state-dir %s\n' "$PYTHON" "$work/server"
fi
