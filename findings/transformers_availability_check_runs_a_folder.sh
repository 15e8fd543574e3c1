#!/usr/bin/env bash
# transformers 5.24.0: is_kernels_available() imports, and so runs, any package called kernels when no distribution of that name is installed.
#
# The function is asked before each use of Hugging Face's `kernels`, and looks like a look-up. It asks importlib.util.find_spec, then the
# distribution's metadata, and where there is no metadata it imports the package to read its __version__. A project with a folder
# kernels/ of its own (a usual name for CUDA and Triton code) therefore has it imported, with all that this costs or raises, by a
# library that then answers False; an error in that folder comes out of transformers' own call.
#
# Seen on 2026-11-28: "kernels/ of this folder is imported", then "available: False".
# Wants python3 (3.11 was used), pip and network; no torch.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "transformers==5.24.0" > "$folder/pip.txt" 2>&1 || { cat "$folder/pip.txt"; exit 1; }
mkdir -p "$folder/project/kernels"
echo 'print("kernels/ of this folder is imported")' > "$folder/project/kernels/__init__.py"
cd "$folder/project"
said=$("$folder/venv/bin/python" -c 'from transformers.utils import is_kernels_available; print("available:", is_kernels_available())' 2> "$folder/errors.txt") ||
    { cat "$folder/errors.txt"; exit 1; }
echo "$said"
expected=$'kernels/ of this folder is imported\navailable: False'
[ "$said" = "$expected" ] || { echo "this has changed; it was:"; echo "$expected"; exit 1; }
