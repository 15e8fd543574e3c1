"""How far it is from the loop to a method's formula, and from a public loss to its kernel: counted in frames of our own code."""

import os
import subprocess
import sys
import traceback
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from places import needs_triton

from potstill.engine.methods.base import Turn
from potstill.engine.methods.teacher import EDMLoss, Teacher
from potstill.engine.nets.edm import from_kwargs
from potstill.engine.training.graphs import Graphs
from potstill.engine.training.log import LogConfig
from potstill.engine.training.loop import train
from potstill.engine.training.run import Run, TrainConfig

ROOT = Path(__file__).parent.parent
TINY = {"model_type": "SongUNet", "model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}


class Eager:
    """A backend of graphs that are never captured in so few iterations."""

    stream = staticmethod(nullcontext)


@pytest.mark.parametrize("graphs", [None, Graphs(Eager())], ids=["eager", "graphs"])
def test_the_loop_calls_one_function_and_that_holds_the_call_of_the_formula(graphs, tmp_path):
    walks = []

    def formula(batch):
        frames = traceback.extract_stack()
        walks.append([frame.name for frame in frames if Path(frame.filename).resolve().is_relative_to(ROOT / "engine")])
        return method.loss(batch)

    method = Teacher(EDMLoss(), from_kwargs("EDMPrecond", img_resolution=8, img_channels=1, dropout=0.0, **TINY))
    method.turns = (Turn("teacher", formula),)
    run = Run(method, TrainConfig(kimg=0.004, batch=4), 0, torch.device("cpu"))
    if graphs:
        run.use(graphs)
    train(run, lambda step: (torch.zeros(4, 1, 8, 8), None), tmp_path, title="hops", log=LogConfig(tensorboard=False))
    # take_turn is written within take: a reader goes from the loop to take and from there to the formula
    assert [walk[walk.index("iterate") + 1 :] for walk in walks] == [["take", "run", "take_turn"] if graphs else ["take", "take_turn"]]
    assert "take_turn" in [getattr(constant, "co_name", "") for constant in Run.take.__code__.co_consts]


WALK = """
import traceback, torch
from potstill.kernels import score_implicit as public
from potstill.kernels import Estimate
import sys
module = sys.modules["potstill.kernels.score_implicit"]

class Kernel:
    def __getitem__(self, grid):
        return lambda *args, **kwargs: walks.append([f.name for f in traceback.extract_stack() if "/kernels/" in f.filename])

walks = []
for name in [n for n in vars(module) if n.endswith("_kernel")]:
    setattr(module, name, Kernel())
x = torch.randn(2, 1, 4, 4)
public(x, x + 1, x - 1)
print(walks[0][walks[0].index("score_implicit") + 1 :])
"""


@needs_triton
def test_four_hops_at_most_lie_between_a_public_loss_and_its_kernel():
    """Where Triton takes CPU tensors, that is under the interpreter, whose place a list takes here: op, launcher, kernel."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", WALK], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(["launch", "_forward"])  # and the kernel
