#!/usr/bin/env bash
# hydra-core 1.3.2 with omegaconf 2.3.0: a setting of type Dict[str, SomeDataclass] cannot get a new entry on the command line.
#
# OmegaConf.merge takes a plain dictionary as a new entry and makes a SomeDataclass of it; so does a YAML file. Hydra's own
# +optim.fake.lr=0.1 and +optim.fake={lr:0.1} are refused: "Invalid type assigned: dict is not a subclass of Optim". And a
# branch of type Optional[SomeDataclass] that is null cannot be reached: net.width=3 ends in an AssertionError.
#
# Seen on 2026-11-28, Python 3.11, as printed below. Wants python3, pip and network; a few MB.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/ask.py" <<'PYTHON'
from dataclasses import dataclass, field
from typing import Dict, Optional

from hydra import compose, initialize
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf


@dataclass
class Optim:
    lr: float = 0.001


@dataclass
class Net:
    width: int = 8


@dataclass
class Config:
    optim: Dict[str, Optim] = field(default_factory=dict)
    net: Optional[Net] = None


ConfigStore.instance().store(name="config", node=Config)
with initialize(version_base="1.3", config_path=None):
    tree = compose("config")
    OmegaConf.set_struct(tree, False)
    merged = OmegaConf.merge(tree, {"optim": {"fake": {"lr": 0.1}}, "net": {"width": 3}})
    print("merge:", type(OmegaConf.to_object(merged).optim["fake"]).__name__, merged.net.width)
    for override in ("+optim.fake.lr=0.1", "+optim.fake={lr:0.1}", "net.width=3"):
        try:
            compose("config", overrides=[override])
            print(override, "works")
        except Exception as error:
            inner = error
            while inner.__cause__ is not None:
                inner = inner.__cause__
            print(override, type(error).__name__ + ":", str(inner).splitlines()[0])
PYTHON
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q hydra-core==1.3.2 omegaconf==2.3.0 antlr4-python3-runtime==4.9.3 > "$folder/pip.txt" 2>&1 || { cat "$folder/pip.txt"; exit 1; }
said=$("$folder/venv/bin/python" "$folder/ask.py")
printf '%s\n' "$said"
expected="merge: Optim 3
+optim.fake.lr=0.1 ConfigCompositionException: Invalid type assigned: dict is not a subclass of Optim. value: {}
+optim.fake={lr:0.1} ConfigCompositionException: Invalid type assigned: dict is not a subclass of Optim. value: {'lr': 0.1}
net.width=3 AssertionError: Unexpected type for root: NoneType"
[ "$said" = "$expected" ] || { echo "this has changed; it was:"; printf '%s\n' "$expected"; exit 1; }
