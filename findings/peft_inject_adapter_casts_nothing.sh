#!/usr/bin/env bash
# peft 0.21.2: autocast_adapter_dtype of a tuner's inject_adapter does nothing.
#
# It is documented there, with True as its default, and nothing reads it: only PeftModel casts, after the injection. In a net of
# bfloat16 get_peft_model gives adapters of float32, as documented; inject_adapter_in_model, and inject_adapter with the argument
# given as True, leave them in bfloat16. So the same LoRA trains in another precision by the way it was put in.
#
# Seen on 2026-11-29, Python 3.11, Linux x86-64, as printed below.
# Wants python3, pip and network; 300 MB (the CPU build of torch, where pip finds one).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy transformers==5.24.0 peft==0.21.2 --extra-index-url https://download.pytorch.org/whl/cpu > "$folder/pip.txt" 2>&1 || { cat "$folder/pip.txt"; exit 1; }
cat > "$folder/seen.py" <<'PYTHON'
import torch
from peft import LoraConfig, LoraModel, get_peft_model, inject_adapter_in_model


def by_the_tuner(net, config):
    tuner = LoraModel(net, config, "first")
    tuner.peft_config["second"] = config
    tuner.inject_adapter(net, "second", autocast_adapter_dtype=True)
    return net


ways = {
    "get_peft_model": get_peft_model,
    "inject_adapter_in_model": lambda net, config: inject_adapter_in_model(config, net),
    "inject_adapter(autocast_adapter_dtype=True)": by_the_tuner,
}
for name, way in ways.items():
    net = torch.nn.Sequential(torch.nn.Linear(4, 4, dtype=torch.bfloat16))
    adapted = way(net, LoraConfig(r=2, target_modules=["0"]))
    print(f"{name}:", *{str(p.dtype) for name, p in adapted.named_parameters() if "lora_" in name})
PYTHON
said=$("$folder/venv/bin/python" "$folder/seen.py" 2> "$folder/errors.txt") || { cat "$folder/errors.txt"; exit 1; }
echo "$said"
expected='get_peft_model: torch.float32
inject_adapter_in_model: torch.bfloat16
inject_adapter(autocast_adapter_dtype=True): torch.bfloat16'
[ "$said" = "$expected" ] || { echo "this has changed; it was:"; echo "$expected"; exit 1; }
