#!/usr/bin/env bash
# diffusers 0.42.1: from_config drops what register_to_config changed, where the constructor had been left at its default.
#
# A scheduler notes which of its settings nobody gave. register_to_config(prediction_type="v_prediction") changes the value and not
# that note, so the config shows v_prediction, a saved file holds it, and from_config(scheduler.config), the usual way to change
# samplers, takes the class's default again without a word. With the default given by name in the constructor it is kept.
# huggingface/diffusers issue 14460 reports the same loss for what the constructor is given by position.
#
# Seen on 2026-11-29, Python 3.11, Linux x86-64, as printed below.
# Wants python3, pip and network; 250 MB (the CPU build of torch, where pip finds one).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy diffusers==0.42.1 --extra-index-url https://download.pytorch.org/whl/cpu > "$folder/pip.txt" 2>&1 || { cat "$folder/pip.txt"; exit 1; }
cat > "$folder/seen.py" <<'PYTHON'
import tempfile

from diffusers import DDIMScheduler, EulerDiscreteScheduler

for how, given in (("left out", {}), ("given", {"prediction_type": "epsilon"})):
    scheduler = DDIMScheduler(**given)
    scheduler.register_to_config(prediction_type="v_prediction")
    with tempfile.TemporaryDirectory() as folder:
        scheduler.save_pretrained(folder)
        saved = EulerDiscreteScheduler.from_pretrained(folder)
    euler = EulerDiscreteScheduler.from_config(scheduler.config)
    print(f"{how}: config {scheduler.config.prediction_type}, from_config {euler.config.prediction_type}, saved and loaded {saved.config.prediction_type}")
PYTHON
said=$("$folder/venv/bin/python" "$folder/seen.py" 2> "$folder/errors.txt") || { cat "$folder/errors.txt"; exit 1; }
echo "$said"
expected='left out: config v_prediction, from_config epsilon, saved and loaded v_prediction
given: config v_prediction, from_config v_prediction, saved and loaded v_prediction'
[ "$said" = "$expected" ] || { echo "this has changed; it was:"; echo "$expected"; exit 1; }
