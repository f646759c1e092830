#!/usr/bin/env bash
# Fetches what the pages take from npm, by exact version, into service/web/static/vendor; run it to change a version.
# The files are committed: neither the wheel nor a clone needs npm. SHA256SUMS is checked by the tests.
set -euo pipefail
cd "$(dirname "$0")/../service/web/static/vendor"
HTMX=4.0.1
UPLOT=1.6.32
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for package in "htmx.org@$HTMX" "uplot@$UPLOT"; do
    name=${package%@*}
    tarball=$(npm pack --silent --pack-destination "$work" "$package")
    mkdir "$work/$name"
    tar xzf "$work/$tarball" -C "$work/$name" --strip-components=1
done
cp "$work/htmx.org/dist/htmx.min.js" .
cp "$work/htmx.org/LICENSE" htmx.LICENSE
cp "$work/uplot/dist/uPlot.iife.min.js" "$work/uplot/dist/uPlot.min.css" .
cp "$work/uplot/LICENSE" uPlot.LICENSE
sha256sum -- *.js *.css *.LICENSE > SHA256SUMS
