#!/usr/bin/env bash
# The main job on the embedded default: start everything, fine-tune, show the ledger, stop everything.
# usage: deploy/demo.sh DIRECTORY_OF_D2FT   state lies in .demo/, and is made anew each time
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${1:-.venv/bin}
export D2FT_HOME=$PWD/.demo
# Quiet, local and small: nothing is reported anywhere, one thread per process.
export RAY_USAGE_STATS_ENABLED=0 OMP_NUM_THREADS=1

[ -e "$D2FT_HOME/server.json" ] && "$bin/d2ft" down
rm -rf "$D2FT_HOME"
trap '"$bin/d2ft" down' EXIT
begin=$SECONDS
port=$("$bin/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
"$bin/d2ft" up --port "$port"
"$bin/d2ft" submit --name demo --model d2ft_digits --dataset digits --workers 2 \
    --compute 0.6 --bytes 0.5 --micro-batch-size 8 --steps 150 --watch
echo "demo: $((SECONDS - begin)) s from start to ledger; everything is under $D2FT_HOME" >&2
