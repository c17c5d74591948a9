#!/bin/sh
# Rewrites the locked requirements from the .in files: one resolution for Python 3.11 to 3.13, with hashes and
# without addresses of a registry. Run it by `make lock`.
set -eu
cd "$(dirname "$0")"
lock="uv pip compile --quiet --universal --generate-hashes --python-version 3.11 --no-header --no-emit-index-url --no-annotate"
$lock dev.in -o dev.txt
for name in operator preflight trainer; do
  $lock "$name.in" -c dev.txt -o "$name.txt"
done
$lock bootstrap.in -o bootstrap.txt
$lock --no-deps demo-model.in -o demo-model.txt
