#!/usr/bin/env bash
# diffusers 0.42.1: FlowMatchEulerDiscreteScheduler with a static shift other than 1 shifts its last step twice in set_timesteps(n).
#
# The constructor keeps the smallest and largest noise level after shifting them; set_timesteps spreads its steps between these and
# shifts what it gets. With shift 3 and 1000 steps, the number it was trained on, the last timestep is not the one that the
# constructor lists. Reported as huggingface/diffusers issue 13243, which was open; noise levels given as sigmas= are shifted once.
#
# Seen on 2026-11-29, Python 3.11, Linux x86-64, as printed below.
# Wants python3, pip and network; 250 MB (the CPU build of torch, where pip finds one).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy diffusers==0.42.1 --extra-index-url https://download.pytorch.org/whl/cpu > "$folder/pip.txt" 2>&1 || { cat "$folder/pip.txt"; exit 1; }
cat > "$folder/seen.py" <<'PYTHON'
from diffusers import FlowMatchEulerDiscreteScheduler

for shift in (1.0, 3.0):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    built = scheduler.timesteps[-1].item()
    scheduler.set_timesteps(1000)
    after = scheduler.timesteps[-1].item()
    scheduler.set_timesteps(sigmas=[i / 1000 for i in range(1000, 0, -1)])
    given = scheduler.timesteps[-1].item()
    print(f"shift {shift}: last timestep {built:.3f} when built, {after:.3f} after set_timesteps(1000), {given:.3f} with sigmas given")
PYTHON
said=$("$folder/venv/bin/python" "$folder/seen.py" 2> "$folder/errors.txt") || { cat "$folder/errors.txt"; exit 1; }
echo "$said"
expected='shift 1.0: last timestep 1.000 when built, 1.000 after set_timesteps(1000), 1.000 with sigmas given
shift 3.0: last timestep 2.994 when built, 8.929 after set_timesteps(1000), 2.994 with sigmas given'
[ "$said" = "$expected" ] || { echo "this has changed; it was:"; echo "$expected"; exit 1; }
