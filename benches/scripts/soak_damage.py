"""What happens to a run's files between two calls of the soak, and how a user sets it right again."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

Damage = Callable[[Path], None]  # of a run folder


def newest(folder: Path) -> Path:
    """The checkpoint that the run would go on from."""
    found = [*folder.rglob("checkpoints/[0-9]*.pt"), *folder.rglob("checkpoints/[0-9]*.dcp")]
    return max(found, key=lambda path: path.stat().st_mtime_ns)


def to(name: str, change: Callable[[Path], None]) -> Damage:
    """Change one file of the run folder."""
    return lambda folder: change(folder / name)


def to_newest(change: Callable[[Path], None], part: str = "") -> Damage:
    """Change the newest checkpoint, or of a sharded one the first file that matches `part`."""
    return lambda folder: change(min(newest(folder).glob(part)) if part else newest(folder))


def to_all(change: Callable[[Path], None]) -> Damage:
    """Change every checkpoint of the stage that has the newest."""

    def damage(folder: Path) -> None:
        for path in newest(folder).parent.glob("[0-9]*"):
            change(path)

    return damage


def cut(path: Path) -> None:
    """To half its bytes."""
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def zeros_at_end(path: Path) -> None:
    """The last quarter is zeros, as a file system leaves what was not written before the power went."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 3 // 4] + bytes(len(data) - len(data) * 3 // 4))


def flip(*shares: float) -> Callable[[Path], None]:
    """One bit, of the byte at each of these shares of the file."""

    def change(path: Path) -> None:
        data = bytearray(path.read_bytes())
        for share in shares:
            data[int(share * (len(data) - 1))] ^= 16
        path.write_bytes(data)

    return change


def garbage(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 4)


def line_of_garbage(path: Path) -> None:
    """In the middle of a text."""
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], b'\xff\xfe{"step": no\n', *lines[2:]]))


def half_a_line(path: Path) -> None:
    with path.open("a") as file:
        file.write('{"step": 9, "ki')


def a_line_without_step(path: Path) -> None:
    path.write_text('{"loss": 1.0}\n[]\n' + path.read_text())


def gone(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def a_folder(path: Path) -> None:
    """A folder of the same name stands where the file was."""
    path.unlink()
    path.mkdir()


def another_net(path: Path) -> None:
    """A weight file that is whole and of the same shape, and of other weights. `back` has the right ones."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    shutil.copy(path, path.with_suffix(".before"))
    save_file({name: t + 0.25 for name, t in load_file(path).items()}, path, metadata)


def back(path: Path) -> None:
    os.replace(path.with_suffix(".before"), path)


def together(*damages: Damage) -> Damage:
    def damage(folder: Path) -> None:
        for one in damages:
            one(folder)

    return damage
