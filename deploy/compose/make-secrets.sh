#!/usr/bin/env bash
# Makes the secrets of compose.yaml where there are none: Ray's token and PostgreSQL's password, 256 random bits each.
# Containers read them as another user than yours, so the files can be read by all and the directory by you alone.
set -euo pipefail
cd "$(dirname "$0")"
mkdir -p data
install --directory --mode 0700 secrets
for name in ray_token postgres_password; do
    if [[ ! -s secrets/$name ]]; then
        head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' > "secrets/$name"
        chmod 0444 "secrets/$name"
        echo "made deploy/compose/secrets/$name"
    fi
done
