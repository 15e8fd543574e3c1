"""Published references: the Gaussian of a data set's features as EDM's fid.py keeps it, an .npz of `mu` [D] and `sigma` [D, D].

The file is read as plain arrays: a pickle inside it is refused, not opened.
"""

import os
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from engine.errors import UserError
from engine.evaluation.frechet import Gaussian

MOST_FEATURES = 16_384  # a covariance of 2 GiB
BROKEN = (OSError, ValueError, EOFError, KeyError, TypeError, SyntaxError, MemoryError, OverflowError, NotImplementedError)
BROKEN += (zipfile.BadZipFile, zlib.error, struct.error)


def read_reference(path: Path) -> Gaussian:
    """UserError for all but two float arrays that are a mean and a covariance."""
    try:
        arrays = _arrays(path)
    except (*BROKEN, AttributeError) as error:  # AttributeError: one plain .npy, which has no names
        raise UserError(
            f"{path} is no complete .npz of plain arrays ({type(error).__name__}): wanted EDM's reference, mu and sigma"
        ) from error
    if len(arrays) < 2:
        raise UserError(f"{path} holds {' '.join(arrays) or 'neither'} of mu and sigma, wanted both: the mean and covariance of features")
    mu, sigma = arrays["mu"], arrays["sigma"]
    d = len(mu) if mu.ndim == 1 else 0
    if not d or sigma.shape != (d, d) or mu.dtype.kind != "f" or sigma.dtype.kind != "f":
        raise UserError(
            f"{path} has mu {list(mu.shape)} {mu.dtype} and sigma {list(sigma.shape)} {sigma.dtype}, wanted floats [D] and [D, D]"
        )
    mu, sigma = mu.astype(np.float64), sigma.astype(np.float64)
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()) or sigma.trace() < 0:
        raise UserError(f"{path} holds numbers that are no mean and covariance: not finite, or a negative variance")
    if abs(sigma - sigma.T).max() > 1e-6 * max(abs(sigma).max(), 1e-300):
        raise UserError(f"{path} has a sigma that is not symmetric, wanted a covariance")
    return Gaussian(torch.from_numpy(mu), torch.from_numpy(sigma))


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """mu and sigma as far as they are there. Raises one of BROKEN."""
    with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
        if max((member.file_size for member in file.zip.infolist()), default=0) > 8 * MOST_FEATURES**2 + 1024:
            raise MemoryError
        return {name: file[name] for name in ("mu", "sigma") if name in file.files}


def write_reference(path: Path, gaussian: Gaussian) -> None:
    """As EDM's fid.py writes it; whole or absent."""
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            np.savez(file, mu=gaussian.mu.numpy(), sigma=gaussian.sigma.numpy())
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)
