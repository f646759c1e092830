#!/usr/bin/env bash
# Makes Ray's token for cluster.yaml where there is none: 256 random bits, readable by you alone.
set -euo pipefail
cd "$(dirname "$0")"
umask 077
mkdir -p secrets
[[ -s secrets/auth_token ]] || head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' > secrets/auth_token
