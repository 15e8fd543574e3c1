"""Does a picture show what its caption says? The judge of `data.path=scenes`: a small classifier of cells, trained in a second.

A cell of 8x8 is one of ten digits, bright or faint, or empty. A caption is right if both cells are what it says; pictures of chance
are right once in 400. The judge learns from the digits that the pictures are made of, and is tested on the others (`own_accuracy`).
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from potstill.engine.common.errors import UserError
from potstill.engine.data import scenes
from potstill.engine.data.scenes import EMPTY, SIDE, Cell
from potstill.engine.models.tensors import hash_of

BLANK = 20  # the class of an empty cell; a digit's is 2·digit, of a faint one 2·digit + 1
STEPS, COPIES, NOISE = 400, 4, 0.06  # of the training: updates, noisy copies of a digit, their noise


class Accuracy:
    """The share of pictures [N, 3, 8, 16] that show what their captions say: a `measure.scores.Score`."""

    name = title = scenes.NAME

    @staticmethod
    def check(where: str) -> None:
        if where:
            raise UserError(
                f"score {scenes.NAME} takes no file, got {where!r:.60}: it is trained on the digits that scikit-learn brings along"
            )

    def __init__(self, where: str, device: torch.device):
        self.check(where)
        self.net = judge().net
        self.sha256 = hash_of(self.net.state_dict())

    def __call__(self, pictures: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """accuracy: 1 for a caption that is right, else 0. UserError for other pictures, and prompts that are no captions of scenes."""
        if tuple(pictures.shape[2:]) != (SIDE, 2 * SIDE):
            raise UserError(f"score {scenes.NAME} is for pictures of 8x16, got {pictures.shape[2]}x{pictures.shape[3]}")
        known = scenes.scene_of()
        if other := next((text for text in prompts if text not in known), None):
            raise UserError(f"score {scenes.NAME} knows no scene {other!r:.80}: wanted captions such as 'a three and a faint seven'")
        wanted = torch.tensor([[class_of(cell) for cell in known[text]] for text in prompts])
        grey = pictures.cpu().float().mean(1) / 255
        return {"accuracy": (seen(self.net, grey) == wanted).all(1).double()}


class Judge(NamedTuple):
    net: nn.Module
    own_accuracy: float  # of the captions of real pictures that it has not learnt from, with digits that it has not


def class_of(cell: Cell) -> int:
    return BLANK if cell == EMPTY else 2 * cell.digit + cell.faint


@torch.no_grad()
def seen(net: nn.Module, pictures: Tensor) -> Tensor:
    """The classes [N, 2] of both cells of pictures [N, 8, 16] in 0 … 1."""
    cells = pictures.reshape(-1, SIDE, 2, SIDE).transpose(1, 2).reshape(-1, SIDE * SIDE)
    return net(cells).argmax(1).view(-1, 2)


@cache
def judge() -> Judge:
    """The classifier, the same at every call."""
    values, digit = scenes.digits()
    rng = np.random.Generator(np.random.Philox(0))
    cells = np.concatenate([values, scenes.FAINT * values, np.zeros_like(values)])
    classes = np.concatenate([2 * digit, 2 * digit + 1, np.full(len(digit), BLANK)])
    cells = np.concatenate([(cells + NOISE * rng.standard_normal(cells.shape)).clip(0, 1) for _ in range(COPIES)])
    x, y = torch.from_numpy(cells).float().flatten(1), torch.from_numpy(np.tile(classes, COPIES))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(SIDE * SIDE, 128), nn.ReLU(), nn.Linear(128, BLANK + 1))
        optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
        with torch.enable_grad():
            for batch in (torch.from_numpy(rng.integers(len(x), size=512)) for _ in range(STEPS)):
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
                optimizer.step()
    drawn = scenes.drawn_scenes(2000, seed=2)
    real = torch.from_numpy(scenes.pictures_of(drawn, tests=True, seed=3))[:, 0].float() / 255
    wanted = torch.tensor([[class_of(cell) for cell in scene] for scene in drawn])
    return Judge(net.eval(), (seen(net, real) == wanted).all(1).double().mean().item())
