#!/usr/bin/env bash
# diffusers 0.42.1: the rotary embedding of a QwenImageTransformer2DModel that was called once is never freed.
#
# Its methods are wrapped in functools.lru_cache, of which there is one for the class and not one per net, and self is part of every
# key: each embedding that was used stays in it with its tables, also their copies on a GPU, after the net is gone. A net that was
# only built is freed whole. It adds up where nets are made again and again, as in tests.
#
# Seen on 2026-11-29, Python 3.11, Linux x86-64, as printed below.
# Wants python3, pip and network; 250 MB (the CPU build of torch, where pip finds one).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy diffusers==0.42.1 --extra-index-url https://download.pytorch.org/whl/cpu > "$folder/pip.txt" 2>&1 || { cat "$folder/pip.txt"; exit 1; }
cat > "$folder/seen.py" <<'PYTHON'
import gc
import weakref

import torch
from diffusers import QwenImageTransformer2DModel


def left(call):
    net = QwenImageTransformer2DModel(
        in_channels=4, out_channels=1, num_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=8, axes_dims_rope=(2, 2, 4)
    )
    if call:
        with torch.no_grad():
            net(torch.zeros(1, 4, 4), torch.zeros(1, 3, 8), torch.ones(1, 3), torch.ones(1), img_shapes=[[(1, 2, 2)]])
    seen = {"net": weakref.ref(net), "rotary embedding": weakref.ref(net.pos_embed)}
    del net
    gc.collect()
    return [name for name, reference in seen.items() if reference() is not None] or "nothing"


print("built and deleted, left:", left(False))
print("built, called and deleted, left:", left(True))
PYTHON
said=$("$folder/venv/bin/python" "$folder/seen.py" 2> "$folder/errors.txt") || { cat "$folder/errors.txt"; exit 1; }
echo "$said"
expected='built and deleted, left: nothing
built, called and deleted, left: ['\''rotary embedding'\'']'
[ "$said" = "$expected" ] || { echo "this has changed; it was:"; echo "$expected"; exit 1; }
