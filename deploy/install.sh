#!/usr/bin/env bash
# Installs one target of the image into a virtual environment that is there: the same steps for Dockerfile and check-image.sh.
# usage: deploy/install.sh api|worker|worker-cpu VENV     from the repository's root
#   D2FT_TORCH_INDEX   an index that has torch's builds, instead of the package registry's (https://download.pytorch.org/whl/cpu)
#   D2FT_EXTRAS        extras of the workers (gcs,hf,onnx,otel,s3,tensorboard,mlflow)
set -euo pipefail
target=${1:?api, worker or worker-cpu} venv=${2:?directory of a virtual environment}
pip=("$venv/bin/python" -m pip install --no-cache-dir --quiet --constraint deploy/constraints.txt)

case $target in
    api)
        "${pip[@]}" --requirement deploy/requirements-api.txt
        "${pip[@]}" --no-deps . ;;
    worker | worker-cpu)
        # torch first and by itself: what the other packages need of it is there then. "+cpu" counts as newer than none.
        mapfile -t torch < <(grep -E '^torch(vision)?==' deploy/constraints.txt)
        "${pip[@]}" ${D2FT_TORCH_INDEX:+--extra-index-url "$D2FT_TORCH_INDEX"} "${torch[@]}"
        "${pip[@]}" ".[${D2FT_EXTRAS:-gcs,hf,onnx,otel,s3,tensorboard,mlflow}]" ;;
    *) echo "unknown target: $target" >&2; exit 2 ;;
esac
