#!/usr/bin/env bash
# torch 2.11.0 and 2.13.0, libtorch's stable ABI (torch/csrc/stable): which headers define STD_CUDA_CHECK.
#
# The macro that checks a CUDA call in extensions on the stable ABI is there since 2.10, and in 2.13.0 it comes with
# torch/csrc/stable/accelerator.h. In 2.11.0 no other header of the stable ABI includes torch/csrc/stable/macros.h, so an
# extension that was written against 2.13.0, with TORCH_TARGET_VERSION of 2.10, does not compile in 2.11.0 although all that
# it uses is in both. Including macros.h by name is right in either.
#
# Seen on 2026-11-28 with g++ 12: "2.11.0: alone no, with macros.h yes" and "2.13.0: alone yes, with macros.h yes".
# Wants pip, unzip, g++ and network: the headers are taken out of the two wheels for macOS, 190 MB, which hold no CUDA.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
defined() { # version, further includes: yes or no
    printf '#include <torch/csrc/stable/library.h>\n#include <torch/csrc/stable/tensor.h>\n#include <torch/csrc/stable/accelerator.h>\n%b#ifdef STD_CUDA_CHECK\nstd_cuda_check_is_here\n#endif\n' "$2" > "$folder/a.cpp"
    # Only the preprocessor runs: cuda_runtime.h may be missing on this machine, so an empty one stands in.
    g++ -std=c++20 -E -DUSE_CUDA -DTORCH_TARGET_VERSION=0x020a000000000000 -I "$folder/stand_in" \
        -I "$folder/$1/torch/include" "$folder/a.cpp" > "$folder/a.txt"
    if grep -q '^std_cuda_check_is_here' "$folder/a.txt"; then echo yes; else echo no; fi
}
mkdir "$folder/stand_in" && touch "$folder/stand_in/cuda_runtime.h"
said=""
for version in 2.11.0 2.13.0; do
    python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.11 --platform macosx_11_0_arm64 \
        --platform macosx_14_0_arm64 -d "$folder" "torch==$version" > "$folder/pip.txt" 2>&1 || { cat "$folder/pip.txt"; exit 1; }
    unzip -q "$folder"/torch-"$version"*.whl 'torch/include/*' -d "$folder/$version"
    said+="$version: alone $(defined $version ''), with macros.h $(defined $version '#include <torch/csrc/stable/macros.h>\n')"$'\n'
done
printf '%s' "$said"
expected=$'2.11.0: alone no, with macros.h yes\n2.13.0: alone yes, with macros.h yes\n'
[ "$said" = "$expected" ] || { echo "this has changed; it was:"; printf '%s' "$expected"; exit 1; }
