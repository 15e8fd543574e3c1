"""The parts of a pipeline's folder that hold weights: their files, compared on paper with the nets that they are for, and loaded.

Both libraries take a file that lacks some weights, and draw the others at random. Here every part is whole, or refused.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from potstill.engine.common.errors import Damaged, UserError
from potstill.engine.common.kinds import is_text, shown
from potstill.engine.common.reading import read_json
from potstill.engine.nets.pipelines import AGAIN, quietly
from potstill.engine.readers.headers import FLOATS, Stored, kinds_of, opened

INDEX = ".index.json"  # ends the name of the list of shards
#: Which file a library reads, the first that is there.
LOADED = {
    "diffusers": ("diffusion_pytorch_model.safetensors" + INDEX, "diffusion_pytorch_model.safetensors"),
    "transformers": ("model.safetensors", "model.safetensors" + INDEX),
}
VARIANT = re.compile(r"(?:diffusion_pytorch_)?model\.(\w+)(?:-\d+-of-\d+)?\.safetensors")
QUANTIZED = ("F8_E4M3", "F8_E5M2")  # floats of 8 bits, which both libraries read as floats of more


def weight_files(path: Path, library: str) -> list[Path]:
    """The safetensors files that a library reads in the folder of a part. UserError where there are none, Damaged where one is missing."""
    files = wanted_files(path, library)
    missing = [file.name for file in files if not file.is_file()]
    if missing and _first(path, library) is None:
        raise UserError(_none(path, missing[0]))
    if missing:
        raise Damaged(f"{path} lacks {missing[0]}, 1 of {len(files)} files of weights that its {_first(path, library)} names: {AGAIN}")
    return files


def wanted_files(path: Path, library: str) -> list[Path]:
    """The same, whether they are there or not. Damaged for a list of shards that is none."""
    first = _first(path, library) or min(LOADED[library], key=len)
    if not first.endswith(INDEX):
        return [path / first]
    shards = read_json(path / first, dict, AGAIN).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(is_text(one) and Path(one).name == one for one in shards.values()):
        raise Damaged(f"{path / first} does not say which weights are in which file: {AGAIN}")
    return [path / name for name in sorted(set(shards.values()))]


def _first(path: Path, library: str) -> str | None:
    return next((name for name in LOADED[library] if (path / name).is_file()), None)


def _none(path: Path, wanted: str) -> str:
    """Why a part has no weights that are read."""
    found = sorted(file.name for file in path.glob("*.safetensors"))
    if not found:
        return f"{path} has no weights as safetensors, and no pickle is read: download the model as safetensors"
    if all(matches := [VARIANT.fullmatch(name) for name in found]):
        variant = matches[0][1] if matches[0] else ""
        return (
            f"{path} has weights of the variant {variant} only ({found[0]}), wanted {wanted}: download the model without a variant, or "
            f'DiffusionPipeline.from_pretrained(FOLDER, variant="{variant}").save_pretrained(OTHER) and name that folder'
        )
    return f"{path} has {found[0]}, wanted {wanted}, or its {wanted}{INDEX} beside shards: {AGAIN}"


def stored_in(path: Path, library: str) -> dict[str, Stored]:
    """Dtypes and shapes of a part's tensors by name, from the headers of its files. UserError, Damaged where one is missing or cut off."""
    found: dict[str, Stored] = {}
    for file in weight_files(path, library):
        with opened(file, "weights as safetensors") as read:
            found |= kinds_of(read)
    return found


def on_paper(kind: Any, path: Path) -> Any:
    """The net of diffusers' class `kind` as the folder `path` describes it, on the meta device.

    UserError, Damaged unless the folder's files hold floats of just its names and shapes.
    """
    read_json(path / "config.json", dict, AGAIN)
    with quietly(), stumbling(path, kind.__name__), torch.device("meta"):
        net = kind.from_config(kind.load_config(path, local_files_only=True))
    files, stored = weight_files(path, "diffusers"), stored_in(path, "diffusers")
    if len(files) == 1:  # as diffusers itself has it, which knows older names
        net._fix_state_dict_keys_on_load(stored)
    _check_fits(net, stored, path)
    return net


def loaded(kind: Any, path: Path, dtype: torch.dtype) -> Any:
    """That net with its weights, on the CPU. UserError, Damaged, too, where a number is not finite."""
    on_paper(kind, path)
    with quietly(), stumbling(path, kind.__name__):
        net = kind.from_pretrained(path, dtype=dtype, use_safetensors=True, local_files_only=True)
    check_finite(net, path)
    return net


@contextmanager
def stumbling(path: Path, name: str) -> Iterator[None]:
    """UserError for what diffusers and transformers have against a folder."""
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except (
        SafetensorError, OSError, ValueError, ImportError, RuntimeError, LookupError, TypeError, AttributeError, ArithmeticError,
        AssertionError,
    ) as error:  # fmt: skip
        advice = "it wants more memory" if isinstance(error, RuntimeError) and "memory" in str(error) else AGAIN
        raise UserError(f"{path} cannot be read as {name} ({' '.join(str(error).split()):.200}): {advice}") from error


def check_finite(net: nn.Module, path: Path) -> None:
    """Damaged where a weight is NaN or infinite."""
    for name, tensor in net.state_dict().items():
        if tensor.is_floating_point() and tensor.numel() and not all(bound.isfinite() for bound in tensor.aminmax()):  # NaN is both
            raise Damaged(f"{path} holds numbers that are not finite in {name}: its training went wrong, or the file is damaged; {AGAIN}")


def _check_fits(net: Any, found: Mapping[str, Stored], path: Path) -> None:
    """UserError unless the files store floats of just the net's names and shapes."""
    wanted = net.state_dict()
    unsaved = {name for name, _ in net.named_buffers()} - wanted.keys()  # earlier versions of diffusers saved some
    ignored = [re.compile(pattern) for pattern in net._keys_to_ignore_on_load_unexpected or []]
    missing = [name for name in wanted if name not in found]
    extra = [name for name in found if name not in wanted and name not in unsaved and not any(one.search(name) for one in ignored)]
    shapes = [name for name in wanted if name in found and found[name].shape != tuple(wanted[name].shape)]
    floats = [name for name in wanted if name in found and wanted[name].is_floating_point()]
    if other := next((name for name in floats if found[name].dtype not in (*FLOATS, *QUANTIZED)), None):
        raise UserError(
            f"{path} holds {other} as {found[other].dtype}, wanted one of {', '.join(FLOATS)}: weights that were quantised are not read"
        )
    parts = [f"they miss {_counted(missing)}"] if missing else []
    parts += [f"they hold {_counted(extra)} that it lacks"] if extra else []
    if shapes:
        name = shapes[0]
        parts += [f"{name} is {list(found[name].shape)}, wanted {list(wanted[name].shape)} (shapes that differ: {len(shapes)})"]
    if parts:
        raise UserError(f"the weights in {path} are not those of the {type(net).__name__} of its config.json: {'; '.join(parts)}; {AGAIN}")


def _counted(names: Sequence[str]) -> str:
    first = names[0] if names[0].isprintable() else shown(names[0])
    return first + (f" and {len(names) - 1} more" if len(names) > 1 else "")
