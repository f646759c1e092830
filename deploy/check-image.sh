#!/usr/bin/env bash
# Does what the Dockerfile does to build a target, in a clean virtual environment instead of an image, and tries it.
# usage: deploy/check-image.sh api|worker|worker-cpu [MODELS_JSON]
#   MODELS_JSON   for api: a catalogue (python -m workers.catalog --out FILE); with it the service is started and asked
set -euo pipefail
target=${1:?api, worker or worker-cpu} models=${2:-}
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'kill "${server:-}" 2>/dev/null || true; rm -rf "$work"' EXIT

mkdir -p "$work/src/deploy" "$work/home"
cd "$root"
cp -r pyproject.toml README.md LICENSE scheduler workers service "$work/src/"
cp deploy/{constraints.txt,requirements-api.txt,install.sh} "$work/src/deploy/"
"${PYTHON:-python3.11}" -m venv "$work/d2ft"
(cd "$work/src" && deploy/install.sh "$target" "$work/d2ft")
cd "$work/home"
python=$work/d2ft/bin/python

if [[ $target != api ]]; then
    OMP_NUM_THREADS=1 "$python" -c 'import workers.loop, workers.rank, torch; print("engine imports, torch", torch.__version__)'
    OMP_NUM_THREADS=1 "$python" -m workers.catalog --out "$work/models.json"
    cp "$work/models.json" "${models:-/dev/null}"
    exit
fi

"$python" - <<'PYTHON'
import importlib.util
import service.app, service.cli, service.planner_child, service.thumbnail_child, workers.sources.parquet
for name in ("torch", "timm", "ray", "torchvision", "sklearn"):
    assert importlib.util.find_spec(name) is None, f"{name} is installed"
print("the service imports; torch, timm and ray are not there")
PYTHON
[[ -n $models ]] || exit 0

port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export D2FT_HOME=$work/home D2FT_PORT=$port D2FT_CATALOGUE_FILE=$(realpath "$root/$models" 2>/dev/null || realpath "$models")
"$python" -m service.app > "$work/api.log" 2>&1 &
server=$!
for _ in $(seq 100); do "$python" -c "import urllib.request as r; r.urlopen('http://127.0.0.1:$port/healthz')" 2>/dev/null && break; sleep 0.2; done
export D2FT_URL=http://127.0.0.1:$port
D2FT_API_KEY=$(cat "$work/home/key")
export D2FT_API_KEY
"$work/d2ft/bin/d2ft" models --search vit_small --limit 3
"$work/d2ft/bin/d2ft" plan --model vit_small_patch16_224 --device "2x a100" --device l4 --link 10Gbps --ratios 2,3,0 | head -5
"$work/d2ft/bin/d2ft" submit --model vit_small_patch16_224 --steps 4
echo "healthz, models, a dry run and a submit work without torch"
