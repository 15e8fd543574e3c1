"""Features by their names, of which engine/measure/features.py has the list."""

from pathlib import Path

from potstill.engine.common.download import is_url
from potstill.engine.common.errors import UserError
from potstill.engine.measure.features import KINDS, Features, Pixels, Scripted
from potstill.engine.measure.inception import is_inception, load_inception
from potstill.engine.measure.vision import load_vision


def check_features_name(name: str) -> None:
    """UserError for features that cannot be meant, before anything is loaded or downloaded."""
    kind, _, where = name.partition(":")
    if name == "pixels" or (kind in KINDS and (where or kind == "inception")):
        if where and not is_url(where) and not Path(where).is_file():
            raise UserError(f"no file {where}: features {kind} want the file or the address of their weights")
    elif not Path(name).is_file():
        raise UserError(
            f"no features {name!r}: wanted pixels, inception, {', '.join(f'{k}:FILE' for k in KINDS)}, or the path of a TorchScript file"
        )


def features_by_name(name: str, *, command: str = "the same command") -> Features:
    """The features of a name. UserError for anything else; `command` is what to type again after a download."""
    check_features_name(name)
    kind, _, where = name.partition(":")
    if name == "pixels":
        return Pixels()
    if kind not in KINDS:
        return load_inception(name, command) if is_inception(Path(name)) else Scripted(Path(name))
    return load_inception(where, command) if kind == "inception" else load_vision(kind, where, command)


def features_by_names(text: str) -> list[Features]:
    """The features of several names with commas between them; also NAME:FILE.

    A distance in the features of NAME:FILE is called FD-NAME; NAME is none of the known networks, as inception and dinov2 are.
    """
    found = []
    for part in text.split(","):
        name, colon, file = part.partition(":")
        if colon and name not in KINDS and not Path(part).is_file():
            one = features_by_name(file)
            one.title = f"FD-{name}"
        else:
            one = features_by_name(part)
        found.append(one)
    if len({one.title for one in found}) < len(found):
        raise UserError(f"features wants different names, got {', '.join(one.title for one in found)}: write NAME:FILE")
    return found
