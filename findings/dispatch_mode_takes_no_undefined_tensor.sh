#!/usr/bin/env bash
# torch 2.13.0, CPU: an operator in C++ that returns Tensor[] with an undefined tensor in it fails under any TorchDispatchMode.
#
# Called plainly it returns [tensor, None]. Within a mode that does nothing but call what it is given, as counters of FLOPs and
# memory are written, the same call raises RuntimeError: the None of the list is not turned back into an undefined tensor. Of an
# operator that returns (Tensor, Tensor) it is. So a backward in C++ that leaves out gradients works until somebody counts FLOPs.
#
# Seen on 2026-11-29, Python 3.11, Linux x86-64, g++ 12:
#   list: plainly [tensor, None]; in a mode RuntimeError, Unable to cast Python instance of type <class 'list'>
#   pair: plainly [tensor, None]; in a mode [tensor, None]
# Wants python3, pip, g++ and network; 200 MB (the CPU build, where pip finds one).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy ninja setuptools --extra-index-url https://download.pytorch.org/whl/cpu > "$folder/pip.txt" 2>&1 || { cat "$folder/pip.txt"; exit 1; }
cat > "$folder/seen.py" <<'PYTHON'
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.cpp_extension import load_inline

load_inline("undefined", """
#include <torch/library.h>
#include <ATen/ATen.h>
std::vector<at::Tensor> list(const at::Tensor& x) { return {x.clone(), at::Tensor()}; }
std::tuple<at::Tensor, at::Tensor> pair(const at::Tensor& x) { return {x.clone(), at::Tensor()}; }
TORCH_LIBRARY(undefined, m) {
  m.def("list(Tensor x) -> Tensor[]");
  m.def("pair(Tensor x) -> (Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(undefined, CPU, m) { m.impl("list", &list); m.impl("pair", &pair); }
""", is_python_module=False)


class Nothing(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **kwargs or {})


def outcome(op):
    try:
        return "[" + ", ".join("None" if t is None else "tensor" for t in op(torch.ones(2))) + "]"
    except RuntimeError as error:
        return f"RuntimeError, {str(error).split(' to C++')[0]}"


for name in ("list", "pair"):
    op = getattr(torch.ops.undefined, name)
    plainly = outcome(op)
    with Nothing():
        print(f"{name}: plainly {plainly}; in a mode {outcome(op)}")
PYTHON
said=$(PATH="$folder/venv/bin:$PATH" TORCH_EXTENSIONS_DIR="$folder/built" "$folder/venv/bin/python" "$folder/seen.py" 2> "$folder/errors.txt") || { cat "$folder/errors.txt"; exit 1; }
echo "$said"
expected='list: plainly [tensor, None]; in a mode RuntimeError, Unable to cast Python instance of type <class '\''list'\''>
pair: plainly [tensor, None]; in a mode [tensor, None]'
[ "$said" = "$expected" ] || { echo "this has changed; it was:"; echo "$expected"; exit 1; }
