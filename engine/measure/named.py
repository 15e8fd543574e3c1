"""The features that a name stands for, of those that engine/measure/features.py lists."""

from pathlib import Path

from potstill.engine.common.download import is_url
from potstill.engine.common.errors import UserError
from potstill.engine.measure.features import KINDS, Features, Pixels, Scripted
from potstill.engine.measure.inception import is_inception, load_inception
from potstill.engine.measure.vision import load_vision


def check_features(name: str) -> None:
    """UserError for features that cannot be meant, before anything is loaded or downloaded."""
    kind, _, where = name.partition(":")
    if name == "pixels" or (kind in KINDS and (where or kind == "inception")):
        if where and not is_url(where) and not Path(where).is_file():
            raise UserError(f"no file {where}: features {kind} want the file or the address of their weights")
    elif not Path(name).is_file():
        raise UserError(
            f"no features {name!r}: wanted pixels, inception, {', '.join(f'{k}:FILE' for k in KINDS)}, or the path of a TorchScript file"
        )


def load_features(name: str, *, command: str = "the same command") -> Features:
    """The features of a name. UserError for anything else; `command` is what to type again after a download."""
    check_features(name)
    kind, _, where = name.partition(":")
    if name == "pixels":
        return Pixels()
    if kind not in KINDS:
        return load_inception(name, command) if is_inception(Path(name)) else Scripted(Path(name))
    return load_inception(where, command) if kind == "inception" else load_vision(kind, where, command)
