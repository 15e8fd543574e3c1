#!/usr/bin/env bash
# diffusers 0.42.1: DiTTransformer2DModel in train() drops labels by itself, and each block draws anew which ones.
#
# Its label embedding replaces a tenth of the labels by the empty one, for guidance without a classifier; the share is fixed and
# nothing in the net's configuration or forward turns it off. Every block has an embedding of its own, and the last layer asks the
# first block's once more. So most samples that lose their label lose it in some of the layers only: neither conditional nor
# unconditional. Whoever drops labels in the data as well drops them twice, and two equal calls differ.
#
# Seen on 2026-11-29, Python 3.11, Linux x86-64, as printed below.
# Wants python3, pip and network; 250 MB (the CPU build of torch, where pip finds one).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy diffusers==0.42.1 --extra-index-url https://download.pytorch.org/whl/cpu > "$folder/pip.txt" 2>&1 || { cat "$folder/pip.txt"; exit 1; }
cat > "$folder/seen.py" <<'PYTHON'
import torch
from diffusers import DiTTransformer2DModel

torch.manual_seed(0)
net = DiTTransformer2DModel(
    num_attention_heads=2, attention_head_dim=4, in_channels=2, num_layers=2, sample_size=4, num_embeds_ada_norm=10
)
drops = []  # per look-up of labels, which of the samples have the empty label, number 10
for block in net.transformer_blocks:
    table = block.norm1.emb.class_embedder.embedding_table
    table.register_forward_pre_hook(lambda module, args: drops.append(args[0] == 10))
x, t, label = torch.randn(1, 2, 4, 4).repeat(1000, 1, 1, 1), torch.full((1000,), 500), torch.full((1000,), 3)
for mode in ("eval", "train"):
    net.train(mode == "train")
    drops.clear()
    with torch.no_grad():
        one, two = (net(x, timestep=t, class_labels=label).sample for _ in range(2))
    first = torch.stack(drops[: len(drops) // 2])
    some = first.any(0) & ~first.all(0)
    print(f"{mode}: {len(first)} look-ups, labels dropped: {first.any().item()}, "
          f"mostly in some only: {some.sum().item() > first.all(0).sum().item()}, two calls equal: {torch.equal(one, two)}")
PYTHON
said=$("$folder/venv/bin/python" "$folder/seen.py" 2> "$folder/errors.txt") || { cat "$folder/errors.txt"; exit 1; }
echo "$said"
expected='eval: 3 look-ups, labels dropped: False, mostly in some only: False, two calls equal: True
train: 3 look-ups, labels dropped: True, mostly in some only: True, two calls equal: False'
[ "$said" = "$expected" ] || { echo "this has changed; it was:"; echo "$expected"; exit 1; }
