"""students.start: students and fake nets that go on from another run's last checkpoint, such as MSD's stage ADM from stage DM."""

from pathlib import Path

import torch

from potstill.engine.common.errors import UserError
from potstill.engine.config.tree import Config
from potstill.engine.methods.base import Method
from potstill.engine.models.router import student_folder
from potstill.engine.training.checkpoint import load_newest


def earlier_folder(cfg: Config, student: int) -> Path | None:
    """The folder with the checkpoints that this student goes on from; None where it starts from the teacher."""
    if not cfg.students.start:
        return None
    folder = Path(cfg.students.start).expanduser()
    return student_folder(folder, student) if cfg.students.count > 1 else folder


def load_earlier(method: Method, folder: Path) -> None:
    """Load the method's nets from another run's last checkpoint; parts that it may lack stay new, and optimisers are new."""
    for name, weights in earlier_weights(method, folder).items():
        method.nets[name].load_state_dict(weights, strict=False)


def earlier_weights(method: Method, folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The weights for each of the method's nets in another run's last checkpoint. UserError unless they fit (`may_be_new` apart)."""
    state = load_newest(folder / "checkpoints", "cpu")
    if state is None:
        raise UserError(f"students.start: no checkpoint in {folder / 'checkpoints'}; wanted a finished run of the same shape")
    for name, net in method.nets.items():
        theirs = {key: t.shape for key, t in state["nets"].get(name, {}).items()}
        ours = {key: t.shape for key, t in net.state_dict().items() if key in theirs or not key.startswith(method.may_be_new)}
        if other := sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)):
            raise UserError(f"students.start: net {name!r} in {folder} is of another shape (first difference: {other[0]})")
    return {name: state["nets"][name] for name in method.nets}
