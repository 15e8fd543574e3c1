#!/usr/bin/env bash
# diffusers 0.42.1: a pipeline without a VAE is saved whole, and its folder cannot be loaded.
#
# PixArtAlphaPipeline is built with vae=None (a net of pixels has none, and one of latents can be kept apart from its VAE) and runs with
# output_type="latent". save_pretrained says of the VAE that it cannot be saved, and writes [null, null] for it into model_index.json.
# from_pretrained refuses that folder, as if a component were missing: what the index says to be none must be passed again as vae=None by whoever loads
# the folder. So a folder of a pixel net that anybody can load needs a VAE that hands pictures on.
#
# Seen on 2026-11-30, Python 3.11, Linux x86-64, as printed below, with tiny nets.
# Wants python3, pip and network; 300 MB (the CPU build of torch, where pip finds one).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy diffusers==0.42.1 transformers==5.24.0 --extra-index-url https://download.pytorch.org/whl/cpu > "$folder/pip.txt" 2>&1 || { cat "$folder/pip.txt"; exit 1; }
cat > "$folder/seen.py" <<'PYTHON'
import json
import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

here = Path(sys.argv[1]) / "pipeline"
net = PixArtTransformer2DModel(
    num_attention_heads=1, attention_head_dim=8, in_channels=1, out_channels=1, num_layers=1, sample_size=8,
    cross_attention_dim=8, caption_channels=8, norm_num_groups=1,
)
none = dict(vae=None, tokenizer=None, text_encoder=None)
text = dict(prompt_embeds=torch.zeros(1, 3, 8), prompt_attention_mask=torch.ones(1, 3), guidance_scale=1.0)


def shape(pipe):
    pipe.set_progress_bar_config(disable=True)
    made = pipe(prompt=None, negative_prompt=None, num_inference_steps=2, height=64, width=64, use_resolution_binning=False,
                output_type="latent", **text)
    return list(made.images.shape)


pipe = PixArtAlphaPipeline(transformer=net, scheduler=EulerDiscreteScheduler(), **none)
print("built:", shape(pipe))
pipe.save_pretrained(here)
print("saved: vae", json.loads((here / "model_index.json").read_text())["vae"])
try:
    print("loaded:", shape(DiffusionPipeline.from_pretrained(here)))
except ValueError as error:
    print("loaded: ValueError, expected", str(error).partition("expected ")[2].partition(", but")[0])
print("loaded with None again:", shape(DiffusionPipeline.from_pretrained(here, **none)))
PYTHON
said=$("$folder/venv/bin/python" -W ignore "$folder/seen.py" "$folder" 2> "$folder/errors.txt") || { cat "$folder/errors.txt"; exit 1; }
echo "$said"
expected="built: [1, 1, 8, 8]
saved: vae [None, None]
loaded: ValueError, expected ['scheduler', 'text_encoder', 'tokenizer', 'transformer', 'vae']
loaded with None again: [1, 1, 8, 8]"
[ "$said" = "$expected" ] || { echo "this has changed; it was:"; echo "$expected"; exit 1; }
