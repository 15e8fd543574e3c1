#!/usr/bin/env bash
# torch 2.13.0, CPU: torch.optim.Adam(fused=True) pairs a parameter with its moments as they lie in memory, and not element by element.
#
# A channels-last model that loads the optimiser's state of the same model saved contiguous takes wrong steps from there on, without a
# word: load_state_dict keeps the strides of the file, and the fused kernel reads all tensors from first to last byte. Adam without
# fused=True is right. The same happens where .grad lies otherwise than its parameter; autograd lays gradients out, a caller may not.
#
# Seen on 2026-11-29, Python 3.11, Linux x86-64, as printed below: the step of the fused one is off by more than a hundredth of lr,
# the other's by nothing. Wants python3, pip and network; 200 MB (the CPU build, where pip finds one).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy --extra-index-url https://download.pytorch.org/whl/cpu > "$folder/pip.txt" 2>&1 || { cat "$folder/pip.txt"; exit 1; }
cat > "$folder/steps.py" <<'PYTHON'
import torch


def model():
    torch.manual_seed(0)
    return torch.nn.Conv2d(8, 4, 3)


def step(net, adam):
    adam.zero_grad()
    torch.manual_seed(1)
    net(torch.randn(2, 8, 6, 6)).square().sum().backward()
    adam.step()


def resumed(layout, fused):
    """One step of a contiguous model, its state loaded into one of this layout, and a step of that."""
    first = model()
    saver = torch.optim.Adam(first.parameters(), lr=0.1)
    step(first, saver)
    second = model().to(memory_format=layout)
    second.load_state_dict(first.state_dict())
    adam = torch.optim.Adam(second.parameters(), lr=0.1, fused=fused)
    adam.load_state_dict(saver.state_dict() | {"param_groups": adam.state_dict()["param_groups"]})
    step(second, adam)
    return second.weight.detach()


right = resumed(torch.contiguous_format, False)
for fused in (False, True):
    for name, layout in (("contiguous", torch.contiguous_format), ("channels_last", torch.channels_last)):
        off = (resumed(layout, fused) - right).abs().max().item()
        print(f"fused={fused}, {name}: {'another step' if off > 1e-3 else 'the step'}")
PYTHON
said=$("$folder/venv/bin/python" -W ignore "$folder/steps.py")
printf '%s\n' "$said"
expected="fused=False, contiguous: the step
fused=False, channels_last: the step
fused=True, contiguous: the step
fused=True, channels_last: another step"
[ "$said" = "$expected" ] || { echo "another behaviour than was seen"; exit 1; }
echo "as seen"
