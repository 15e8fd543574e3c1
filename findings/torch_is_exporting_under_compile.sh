#!/usr/bin/env bash
# torch 2.11.0 and 2.13.0: torch.compiler.is_exporting() inside a function that torch.compile traces.
#
# A library that gives exporters a graph of plain operations, and everybody else its own fused op, asks is_exporting(). In
# 2.11.0 the answer is True under torch.compile as well, so that a compiled model silently takes the plain way; in 2.13.0 it
# is False there. Asking `is_exporting() and not is_dynamo_compiling()` is right in both.
#
# Seen on 2026-11-28 on a CPU: "2.11.0: compiled takes the way for exporting: True" and "2.13.0: … False".
# Wants python3 (3.11 was used), pip, network and several GB: on Linux x86-64 these wheels bring CUDA, which is not used.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/ask.py" <<'PYTHON'
import torch

def function(x):
    if torch.compiler.is_exporting():
        return x + 1
    return x * 3


graph = []


def look(module, inputs):
    graph.extend(node.target.__name__ for node in module.graph.nodes if node.op == "call_function")
    return module.forward


torch.compile(function, backend=look, fullgraph=True)(torch.ones(2))
print(f"{torch.__version__.partition('+')[0]}: compiled takes the way for exporting: {graph == ['add']}")
PYTHON
said=""
for version in 2.11.0 2.13.0; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/pip" install -q "torch==$version" numpy > "$folder/pip.txt" 2>&1 || { cat "$folder/pip.txt"; exit 1; }
    said+=$("$folder/$version/bin/python" "$folder/ask.py")$'\n'
done
printf '%s' "$said"
expected=$'2.11.0: compiled takes the way for exporting: True\n2.13.0: compiled takes the way for exporting: False\n'
[ "$said" = "$expected" ] || { echo "this has changed; it was:"; printf '%s' "$expected"; exit 1; }
