#!/usr/bin/env bash
# pip 26.3 (and 23.2.1): listing hashes does not only check the file that pip would take, it makes pip take another one.
#
# A folder (--find-links) offers six 1.17.0+here, PyPI has six 1.17.0. For six==1.17.0 pip takes the folder's, whose local version
# counts as newer. With the hashes of both files listed, it takes PyPI's: a file whose link carries a hash that is listed goes before
# every other, whatever their versions, and a file in a folder has no hash in its link. With the folder's hash alone it takes
# that, and checks it. So a lock that lists PyPI's torch 2.13.0 and a CPU build beside it installs PyPI's, with gigabytes of CUDA.
#
# Seen on 2026-11-28, Python 3.11, as printed below. Wants python3, pip and network; a few MB.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
mkdir wheels
python3 - << 'PYTHON'
from zipfile import ZipFile

info = "six-1.17.0+here.dist-info"
with ZipFile("wheels/six-1.17.0+here-py3-none-any.whl", "w") as wheel:
    wheel.writestr("six.py", "")
    wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: six\nVersion: 1.17.0+here\n")
    wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    wheel.writestr(f"{info}/RECORD", f"six.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
PYTHON
here=$(sha256sum wheels/*.whl | cut -d ' ' -f 1)
pypi=4721f391ed90541fddacab5acf947aa0d3dc7d27b2e1e8eda2be8970586c3274 # six-1.17.0-py2.py3-none-any.whl
python3 -m venv venv
venv/bin/pip install -qq pip==26.3

taken() { # a requirement: the version of six that pip takes for it
    echo "$1" > requirements.txt
    venv/bin/pip install -qq --no-deps --force-reinstall --find-links wheels -r requirements.txt > pip.txt 2>&1 || { cat pip.txt; exit 1; }
    venv/bin/python -c "from importlib.metadata import version; print(version('six'))"
}
said=$(
    echo "without hashes: $(taken "six==1.17.0")"
    echo "both hashes: $(taken "six==1.17.0 --hash=sha256:$here --hash=sha256:$pypi")"
    echo "the folder's hash: $(taken "six==1.17.0 --hash=sha256:$here")"
)
printf '%s\n' "$said"
expected="without hashes: 1.17.0+here
both hashes: 1.17.0
the folder's hash: 1.17.0+here"
[ "$said" = "$expected" ] || { echo "this has changed; it was:"; printf '%s\n' "$expected"; exit 1; }
