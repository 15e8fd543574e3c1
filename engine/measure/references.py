"""Published references: the Gaussian of a data set's features, a mean `mu` [D] and a covariance `sigma` [D, D].

    FILE.npz    EDM's, of fid.py: the arrays mu and sigma
    FILE.pkl    EDM2's, of calculate_metrics.py: {"num_images": n, "fid": {"mu", "sigma"}, "fd_dinov2": {"mu", "sigma"}}

Either is read as plain arrays: an .npz with a pickle inside is refused, and of a pickle nothing is executed.
"""

import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from potstill.engine.common.errors import UserError, reading, what_it_is, writing
from potstill.engine.common.writing import whole
from potstill.engine.measure.distances import Gaussian
from potstill.engine.readers.npz import check_member
from potstill.engine.readers.numpy_pickles import read_arrays
from potstill.engine.readers.pickles import shown

MOST_FEATURES = 16_384  # a covariance of 2 GiB
BROKEN = (OSError, ValueError, EOFError, KeyError, TypeError, SyntaxError, MemoryError, OverflowError, NotImplementedError)
BROKEN += (zipfile.BadZipFile, zlib.error, struct.error)


def read_reference(path: Path, entry: str | None = None) -> Gaussian:
    """The Gaussian in a file; `entry` is what EDM2 calls these features (Features.edm2), None where it has no name for them.

    UserError for all but two float arrays that are a mean and a covariance.
    """
    with reading(path), path.open("rb") as file:
        pickled = file.read(1) == b"\x80"
    arrays = _pickle_arrays(path, read_arrays(path), entry) if pickled else _npz_arrays(path)
    found = {name: arrays[name] for name in ("mu", "sigma") if isinstance(arrays.get(name), np.ndarray)}
    if len(found) < 2:
        raise UserError(
            f"{path} holds {' '.join(found) or 'neither'} of mu and sigma, wanted both: the mean and covariance of features; "
            f"{what_it_is(path)}"
        )
    return _gaussian(path, found["mu"], found["sigma"])


def _gaussian(path: Path, mu: np.ndarray, sigma: np.ndarray) -> Gaussian:
    d = len(mu) if mu.ndim == 1 else 0
    if not d or sigma.shape != (d, d) or mu.dtype.kind != "f" or sigma.dtype.kind != "f":
        raise UserError(
            f"{path} has mu {list(mu.shape)} {mu.dtype} and sigma {list(sigma.shape)} {sigma.dtype}, wanted floats [D] and [D, D]"
        )
    mu, sigma = mu.astype(np.float64), sigma.astype(np.float64)
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise UserError(f"{path} holds numbers that are no mean and covariance: not finite")
    # Σ f fᵀ - n μ μᵀ of images that are all alike is 0 up to the rounding of its terms, which are as large as μ².
    rounding = 1e-6 * abs(sigma).max() + 1e-9 * np.square(mu).max()
    if sigma.diagonal().min() < -rounding:
        raise UserError(f"{path} holds numbers that are no mean and covariance: a negative variance")
    if abs(sigma - sigma.T).max() > rounding:
        raise UserError(f"{path} has a sigma that is not symmetric, wanted a covariance")
    return Gaussian(torch.from_numpy(mu), torch.from_numpy(sigma))


def _npz_arrays(path: Path) -> dict[str, np.ndarray]:
    """mu and sigma of an .npz, as far as they are there."""
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            if max((member.file_size for member in file.zip.infolist()), default=0) > 8 * MOST_FEATURES**2 + 1024:
                raise MemoryError
            names = [name for name in ("mu", "sigma") if name in file.files]
            for name in names:
                check_member(file.zip, name)
            return {name: file[name] for name in names}
    except (*BROKEN, AttributeError) as error:  # AttributeError: one plain .npy, which has no names
        raise UserError(
            f"{path} is no complete .npz of plain arrays ({type(error).__name__}): wanted EDM's reference, mu and sigma; {what_it_is(path)}"
        ) from error


def _pickle_arrays(path: Path, content: Any, entry: str | None) -> dict[str, Any]:
    """What EDM2's pickle holds for these features."""
    entries = {name: one for name, one in content.items() if type(one) is dict} if type(content) is dict else {}
    if not entries:
        raise UserError(f"{path} is a pickle without a reference: wanted EDM2's, with the entries fid or fd_dinov2, or EDM's .npz")
    if entry not in entries:
        held = " and ".join(map(shown, entries))
        wanted = f"no {entry}" if entry else "nothing for these features"
        raise UserError(f"{path} holds {held:.60}, and {wanted}: fid goes with --features inception, fd_dinov2 with --features dinov2:FILE")
    return entries[entry]


def write_reference(path: Path, gaussian: Gaussian) -> None:
    """As EDM's fid.py writes it; whole or absent."""
    with writing(path), whole(path) as part, part.open("wb") as file:
        np.savez(file, mu=gaussian.mu.numpy(), sigma=gaussian.sigma.numpy())
