#!/usr/bin/env bash
# uv 0.13.8: `uv pip compile --generate-hashes` never looks up hashes of a version that stands in the output file already.
#
# What it finds there it writes again: one hash of two stays one, a hash that no file has stays, with exit code 0 and no word. Only a
# file that is not there, or --upgrade, brings the index's. So hashes that were once added by hand, or of fewer systems, stay as they
# were through every renewal, and the lock fails where it is installed.
#
# Seen on 2026-11-28, Python 3.11, as printed below. Wants python3, pip and network; 30 MB.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q uv==0.13.8 > pip.txt 2>&1 || { cat pip.txt; exit 1; }
echo six==1.17.0 > requirements.in

compiled() { # options: what becomes of lock.txt
    venv/bin/uv pip compile -q --no-config --generate-hashes --no-header --no-annotate "$@" requirements.in -o lock.txt
    sed 's/\(sha256:....\).*/\1…/' lock.txt
}
said=$(
    echo "nothing there:" && compiled
    sed -i '3d; 2s, .$,,' lock.txt
    echo "one of two:" && compiled
    sed -i 's/sha256:..../sha256:0000/' lock.txt
    echo "of no file:" && compiled
    echo "--upgrade:" && compiled --upgrade
)
printf '%s\n' "$said"
expected='nothing there:
six==1.17.0 \
    --hash=sha256:4721…
    --hash=sha256:ff70…
one of two:
six==1.17.0 \
    --hash=sha256:4721…
of no file:
six==1.17.0 \
    --hash=sha256:0000…
--upgrade:
six==1.17.0 \
    --hash=sha256:4721…
    --hash=sha256:ff70…'
[ "$said" = "$expected" ] || { echo "this has changed; it was:"; printf '%s\n' "$expected"; exit 1; }
