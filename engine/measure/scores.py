"""What pictures are worth by themselves and beside their prompts: scores of each picture, and the means of their figures.

    score = open_score("clip:FOLDER", device)
    score(pictures, prompts)                        # [N], or figures by name, [N] each

engine/measure/clip.py says what the kinds are. Another one is a class that is made of what stands behind the colon and the device, has a
`check` that is fast, and a line in KINDS.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from potstill.engine.common.errors import UserError
from potstill.engine.measure.clip import Aesthetic, ClipScore, PickScore
from potstill.engine.measure.features import rgb
from potstill.engine.training.ranks import ALONE, Ranks


class Score(Protocol):
    """name: as in settings, such as clip:FOLDER. title: of a figure that has no name of its own. sha256: of the files it is read from."""

    name: str
    title: str
    sha256: str

    def __call__(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor | dict[str, Tensor]:
        """[N, 3, H, W] uint8 on any device, and their prompts [N] -> one number a picture, float [N]; of several figures, by their names."""
        ...


KINDS: dict[str, Any] = {"clip": ClipScore, "pickscore": PickScore, "aesthetic": Aesthetic}


def check_score_name(name: str) -> None:
    """UserError for a score that cannot be meant, before anything is loaded."""
    kind, _, where = name.partition(":")
    if kind not in KINDS:
        raise UserError(
            f"no score {name!r:.80}: wanted clip:FOLDER, pickscore:FOLDER, aesthetic:HEAD.safetensors:FOLDER, or another of {', '.join(KINDS)}"
        )
    KINDS[kind].check(where)


def check_score_names(names: Sequence[str]) -> None:
    """The same for several, of which no two may be of one kind: their figures would have one name."""
    for name in names:
        check_score_name(name)
    kinds = [name.partition(":")[0] for name in names]
    if twice := [kind for kind in dict.fromkeys(kinds) if kinds.count(kind) > 1]:
        raise UserError(f"scores want different kinds, got {twice[0]} {kinds.count(twice[0])} times: evaluate twice")


def open_score(name: str, device: torch.device) -> Score:
    """The score of a name. UserError, Damaged where its files cannot be read."""
    check_score_name(name)
    kind, _, where = name.partition(":")
    score = KINDS[kind](where, device)
    score.name = name
    return score


def figures_of(score: Score, pictures: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Of pictures [N, 1 or 3, H, W]: KIND, or KIND/FIGURE, -> float [N]. UserError for other channels."""
    if pictures.shape[1] not in (1, 3):
        raise UserError(f"{score.title} wants grey or RGB pictures, got {pictures.shape[1]} channels")
    kind, found = score.name.partition(":")[0], score(rgb(pictures), prompts)
    return {f"{kind}/{name}": each for name, each in found.items()} if isinstance(found, dict) else {kind: found}


class Tally:
    """Means of all figures over a stream of pictures."""

    def __init__(self, scores: Sequence[Score], device: torch.device | str = "cpu"):
        self.scores, self.device, self.n = scores, device, 0
        self.sums: dict[str, float] = {}

    def over(self, batches: Iterable[Tensor], prompts: Sequence[str]) -> Iterator[Tensor]:
        """The same batches, each scored as it passes; prompts: one for each picture."""
        for batch in batches:
            self.add(batch, prompts[self.n : self.n + len(batch)])
            yield batch

    def add(self, pictures: Tensor, prompts: Sequence[str]) -> None:
        for score in self.scores:
            for figure, each in figures_of(score, pictures, prompts).items():
                self.sums[figure] = self.sums.get(figure, 0.0) + float(each.double().sum())
        self.n += len(pictures)

    def result(self, ranks: Ranks = ALONE) -> dict[str, Any]:
        """Of all processes, for JSON: the means by figure, and of what they are; {} without scores."""
        if not self.scores:
            return {}
        names = ranks.agree(list(self.sums))
        sums = torch.tensor([self.n, *(self.sums.get(name, 0.0) for name in names)], dtype=torch.float64, device=self.device)
        n, *totals = ranks.total(sums).tolist()
        return {
            "scores": {name: total / n for name, total in zip(names, totals, strict=True)},
            "scores_of": {"n": int(n), "sha256": {score.name: score.sha256 for score in self.scores}},
        }
