#!/usr/bin/env bash
# Makes the secrets of base/ in the namespace where there are none, 256 random bits each; Ray's token is made by KubeRay.
# usage: deploy/kubernetes/make-secrets.sh [NAMESPACE]
set -euo pipefail
namespace=${1:-d2ft}
for name in d2ft-postgres d2ft-redis; do
    if ! kubectl --namespace "$namespace" get secret "$name" > /dev/null 2>&1; then
        # From a pipe: an argument would be seen in the list of processes.
        head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' |
            kubectl --namespace "$namespace" create secret generic "$name" --from-file=password=/dev/stdin
    fi
done
