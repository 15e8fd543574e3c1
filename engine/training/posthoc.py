"""The average of any length, made afterwards of those that a run has kept (its profiles, `engine.training.phema`).

A profile is an ordinary weight file whose metadata say in `phema` how many images had been seen, and of which std it is; FOLDER/phema
of a stage holds them. `reconstructed` takes profiles of whatever origin. It reads one file after the other, and of that one tensor
at a time: in memory are the sums, in float64.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from potstill.engine.common.errors import Damaged, UserError
from potstill.engine.common.kinds import Kind, check, count, is_number
from potstill.engine.common.progress import Bar
from potstill.engine.methods.table import settings_of
from potstill.engine.models.router import MANIFEST
from potstill.engine.models.tensors import metadata_of, streamed
from potstill.engine.models.weights import planned
from potstill.engine.readers.headers import opened
from potstill.engine.training.phema import LIMIT, Length, combination, is_std

PROFILES = "phema"  # the folder of a stage, and the name in the metadata
NAMED = re.compile(r"\d{10}-0\.\d{3}")
ADVICE = "copy the file again, or leave it out"
KINDS = {"images": count(1), "std": Kind(lambda value: is_number(value) and is_std(value), f"a number above 0 and below {LIMIT}")}
#: What the metadata of profiles of one net agree in.
SAME = ("precond", "kwargs", "diffusers", "lora", "method", "partition", "student")


class Profile(NamedTuple):
    """An average that was kept.

    tensors: opens it; what comes are weights and buffers by the net's names, of which not more than one need be in memory.
    metadata: how the net is built, as a weight file says it.
    """

    images: int
    std: float
    tensors: Callable[[], AbstractContextManager[Mapping[str, Tensor]]]
    metadata: dict[str, Any]
    path: Path


class Reconstructed(NamedTuple):
    """A weight file's tensors (averaged ones in float32) and metadata. off: how far the average is from the wanted one's function of
    time, relative to its norm (`combination`)."""

    tensors: dict[str, Tensor]
    metadata: dict[str, Any]
    images: int
    used: int
    off: float


def profile_file(folder: Path, images: int, std: float) -> Path:
    """Where a stage keeps one."""
    return folder / PROFILES / f"{images:010d}-{std:.3f}.safetensors"


def profiles_in(where: Path) -> list[Profile]:
    """Those of a run folder, or of any folder with such files. UserError where there are none."""
    if not where.is_dir():
        raise UserError(f"no folder at {where}: wanted a run with train.phema=[0.05,0.1], or a folder of profiles that it kept")
    folder = where / PROFILES if (where / PROFILES).is_dir() else where
    found = [one for path in sorted(folder.glob("*.safetensors")) if (one := _profile(path)) is not None]
    if not found:
        stages = [path.parent for path in sorted(where.glob(f"*/{PROFILES}"))]
        what = (
            f"students: give one of {', '.join(map(str, stages))}" if (where / MANIFEST).exists() else f"{stages and stages[0]}: give that"
        )
        raise UserError(
            f"{where} holds no profiles"
            + (f", they are those of its {what}" if stages else ": a run with train.phema=[0.05,0.1] keeps some")
        )
    return found


def _profile(path: Path) -> Profile | None:
    """The profile in a weight file; None where it holds something else."""
    with opened(path) as file:
        metadata = metadata_of(path, file)
    if (said := metadata.pop(PROFILES, None)) is None:
        if NAMED.fullmatch(path.stem):
            raise Damaged(f"{path} lacks {PROFILES} in its metadata, and its name says that it is a profile: {ADVICE}")
        return None
    if missing := KINDS.keys() - said.keys():
        raise Damaged(f"{path} lacks {PROFILES}.{min(missing)} in its metadata: {ADVICE}")
    check(path, said, KINDS, ADVICE, inside=f"{PROFILES}.")

    @contextmanager
    def tensors() -> Iterator[Mapping[str, Tensor]]:
        with opened(path) as file:
            yield streamed(path, file)

    return Profile(said["images"], float(said["std"]), tensors, metadata, path)


def reconstructed(profiles: Sequence[Profile], std: float, kimg: float | None = None) -> Reconstructed:
    """The average of this std when `kimg` thousand images had been seen: of the times at which there are profiles the nearest, null the last.

    UserError where the profiles have none, or are of different nets.
    """
    if not is_std(std):
        raise UserError(f"--std wants a relative length above 0 and below {LIMIT}, got {std:g}")
    images = _time(sorted({one.images for one in profiles}), kimg)
    used = sorted((one for one in profiles if one.images <= images), key=lambda one: (one.images, one.std))
    last = used[-1]
    for one, after in zip(used, used[1:], strict=False):
        if (one.images, one.std) == (after.images, after.std):
            raise UserError(
                f"{one.path} and {after.path} are both the profile of std {one.std:g} at {one.images / 1000:g} kimg: leave one out"
            )
    for one in used:
        if other := [name for name in SAME if _same(one, name) != _same(last, name)]:
            raise UserError(f"{one.path} is of another net than {last.path} ({other[0]} differs): wanted the profiles of one training")
    try:
        weights, off = combination([Length(one.images, one.std) for one in used], Length(images, std))
    except np.linalg.LinAlgError as error:
        raise UserError(f"the profiles up to {last.path} are too much alike to make another of: leave out every other") from error
    tensors = _summed(used, weights)
    said = {"std": std, "images": images, "profiles": [[one.images, one.std, w] for one, w in zip(used, weights.tolist(), strict=True)]}
    metadata = last.metadata | {"kimg": images / 1000, "reconstructed": said | {"off": off}}
    return Reconstructed(tensors, metadata, images, len(used), off)


def _same(profile: Profile, name: str) -> Any:
    """What the metadata say; of a method the settings' class, for a run may have begun before the names of variants were kept."""
    said = profile.metadata.get(name)
    return (settings_of(said) or said) if name == "method" and said else said


def _time(times: Sequence[int], kimg: float | None) -> int:
    """The time of a profile that is nearest to the wanted one. UserError for one outside of what was kept."""
    if kimg is None:
        return times[-1]
    if not (times[0] // 1000 <= kimg <= times[-1] / 1000 + 5e-4 and kimg > 0):
        raise UserError(f"--kimg wants a time from {times[0] / 1000:g} to {times[-1] / 1000:g}, where there are profiles, got {kimg:g}")
    return min(times, key=lambda images: abs(images - 1000 * kimg))


def _summed(used: Sequence[Profile], weights: np.ndarray) -> dict[str, Tensor]:
    """Σ weight · tensor of what trains; other tensors are the last one's."""
    last = used[-1]
    with last.tensors() as tensors:
        net = planned(last.path, last.metadata, list(tensors))
    averaged = {name for name, _ in net.named_parameters()}
    found: dict[str, Tensor] = {}
    from_last = list(zip(used[::-1], weights[::-1].tolist(), strict=True))
    for one, weight in Bar("averaging", len(used), unit="profiles").over(from_last, lambda _: 1):
        for name, t in _tensors(one, net.state_dict()):
            if name not in averaged:
                found.setdefault(name, t.clone())
            elif name in found:
                found[name].add_(t.double(), alpha=weight)
            else:
                found[name] = t.double() * weight
    for name in averaged & found.keys():
        found[name] = found[name].float()
    return found


def _tensors(profile: Profile, wanted: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """A profile's tensors in turn. UserError unless they are floats of these names and shapes; Damaged where they are not finite."""
    with profile.tensors() as tensors:
        if other := sorted(set(tensors) ^ wanted.keys()):
            raise UserError(f"{profile.path} and the net that the profiles say they are of differ: {other[0]} is in one of the two only")
        for name, like in wanted.items():
            if (t := tensors[name]).shape != like.shape or not t.is_floating_point():
                what = f"{list(t.shape)} of {str(t.dtype).removeprefix('torch.')}"
                raise UserError(f"{profile.path} is of another architecture: {name} is {what}, wanted floats {list(like.shape)}")
            if t.numel() and not all(bound.isfinite() for bound in t.aminmax()):  # NaN is both
                raise Damaged(f"{profile.path} holds numbers that are not finite in {name}: leave it out, and what came after it")
            yield name, t
