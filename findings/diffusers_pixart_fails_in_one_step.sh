#!/usr/bin/env bash
# diffusers 0.42.1 with transformers 5.24.0: PixArtAlphaPipeline(num_inference_steps=1) fails with the scheduler that its signature names.
#
# For one step the pipeline takes the second entry of what the scheduler's step returns, the guess of the clean image, as one-step
# students want it. DPMSolverMultistepScheduler returns one entry only, so one step ends in an IndexError after the net has run, and
# two steps work. DDPMScheduler, which returns two, works in one.
#
# Seen on 2026-11-29, Python 3.11, Linux x86-64, as printed below, with tiny nets.
# Wants python3, pip and network; 300 MB (the CPU build of torch, where pip finds one).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy diffusers==0.42.1 transformers==5.24.0 --extra-index-url https://download.pytorch.org/whl/cpu > "$folder/pip.txt" 2>&1 || { cat "$folder/pip.txt"; exit 1; }
cat > "$folder/seen.py" <<'PYTHON'
import torch
from diffusers import AutoencoderKL, DDPMScheduler, DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

net = PixArtTransformer2DModel(
    num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=1, sample_size=8,
    cross_attention_dim=8, caption_channels=8, norm_num_groups=1,
)
vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=1, sample_size=8)
text = dict(prompt_embeds=torch.zeros(1, 3, 8), prompt_attention_mask=torch.ones(1, 3), guidance_scale=1.0)
for scheduler, steps in ((DPMSolverMultistepScheduler(), 2), (DPMSolverMultistepScheduler(), 1), (DDPMScheduler(), 1)):
    pipeline = PixArtAlphaPipeline(None, None, vae, net, scheduler)
    try:
        pipeline(**text, negative_prompt=None, height=8, width=8, num_inference_steps=steps, use_resolution_binning=False, output_type="latent")
        outcome = "works"
    except IndexError as error:
        outcome = f"IndexError, {error}"
    print(f"{type(scheduler).__name__}, steps {steps}: {outcome}")
PYTHON
said=$("$folder/venv/bin/python" "$folder/seen.py" 2> "$folder/errors.txt") || { cat "$folder/errors.txt"; exit 1; }
echo "$said"
expected='DPMSolverMultistepScheduler, steps 2: works
DPMSolverMultistepScheduler, steps 1: IndexError, tuple index out of range
DDPMScheduler, steps 1: works'
[ "$said" = "$expected" ] || { echo "this has changed; it was:"; echo "$expected"; exit 1; }
