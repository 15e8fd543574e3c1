"""FID's Inception network of 2015-12-05, from one of the two files in which PyTorch users have it.

    inception-2015-12-05.pt                          NVIDIA's TorchScript, what EDM's fid.py computes with; 91 MiB
    weights-inception-2015-12-05-6726825d.pth        torch-fidelity's state dict; wants the extra `fid`

Both take the images as uint8, enlarge them as TensorFlow 1 did and give 2048 pooled features. A distance in them is called
FID only where the file's sha256 is one of these two.
"""

# torch-fidelity is optional.
# pyright: reportMissingImports=false

import io
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from potstill.engine.common.download import cached_path, digest, fetch, file_at
from potstill.engine.common.errors import UserError, what_it_is
from potstill.engine.measure.features import Features, Scripted, rgb

URL = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"  # of 95,607,719 bytes
STATE_DICT_URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
STATE_DICT_SHA256 = "6726825d"  # its beginning, as the file's name says
NUM_FEATURES = 2048


def load_inception(where: str, command: str) -> Features:
    """From a file or an address; "": NVIDIA's file, from the cache or downloaded, and only if its sha256 is right."""
    path = _downloaded(command) if where in ("", URL) else file_at(where, command=command)
    if path.suffix != ".pth" and what_it_is(path) == "it is a pickle":
        raise UserError(f"{path} is a pickle, which would have to be executed: wanted the same network as TorchScript, {URL}")
    return FidelityInception(path) if path.suffix == ".pth" else ScriptedInception(path)


def is_inception(path: Path) -> bool:
    """Is it, whatever its name, one of the two files by whose sha256 FID is known?"""
    found = digest(path)
    return found == SHA256 or (path.suffix == ".pth" and found.startswith(STATE_DICT_SHA256))


def _downloaded(command: str) -> Path:
    path = cached_path(URL)
    try:
        return fetch(URL, command=command, sha256=SHA256)
    except UserError as error:
        if path.is_file():
            raise
        raise UserError(f"{error}; elsewhere this line gets it: curl -L --create-dirs -o {path} {URL}") from error


class ScriptedInception(Scripted):
    """NVIDIA's TorchScript module, called for the features before the softmax layer."""

    edm2 = "fid"

    def __init__(self, path: Path):
        super().__init__(path)
        self.title = "FID" if self.sha256 == SHA256 else f"FD-{path.stem} (not FID's Inception: another sha256)"
        if not self.flags:
            raise UserError(
                f"{path} has no flag return_features in its forward, as NVIDIA's Inception has: wanted {URL}; another net of "
                "yours goes by its path alone, without inception:"
            )

    def measure(self, images: Tensor) -> None:
        super().measure(images)
        check_width(self)


class FidelityInception(Features):
    """torch-fidelity's network with its state dict, which is read without unpickling anything but tensors."""

    edm2 = "fid"

    def __init__(self, path: Path):
        super().__init__()
        self.sha256 = digest(path)
        known = self.sha256.startswith(STATE_DICT_SHA256)
        self.title = "FID" if known else f"FD-{path.stem} (not FID's Inception: another sha256)"
        weights = read_state_dict(path)
        net = torch_fidelity().FeatureExtractorInceptionV3
        # It would unpickle the file whole; so it is given a copy that we have made of the tensors.
        copy = io.BytesIO()
        torch.save(weights, copy)
        copy.seek(0)
        try:
            self.net = net("inception-v3-compat", [str(NUM_FEATURES)], feature_extractor_weights_path=copy).eval()
        except RuntimeError as error:
            raise UserError(f"{path} does not fit torch-fidelity's Inception: wanted {STATE_DICT_URL}") from error

    def forward(self, images: Tensor) -> Tensor:
        return self.net(rgb(images))[0].double()

    def measure(self, images: Tensor) -> None:
        super().measure(images)
        check_width(self)


def torch_fidelity() -> ModuleType:
    try:
        import torch_fidelity.feature_extractor_inceptionv3 as module
    except ImportError as error:
        raise UserError(
            f"a .pth of Inception wants torch-fidelity ({error}): pip install 'potstill[fid]', or use NVIDIA's TorchScript {URL}"
        ) from error
    return module


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """UserError unless the file is tensors by name, and nothing else."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's reader raises whatever the bytes made it stumble over
        raise UserError(
            f"{path} holds no plain state dict ({type(error).__name__}): wanted {STATE_DICT_URL}; {what_it_is(path)}"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise UserError(f"{path} holds no plain state dict: wanted {STATE_DICT_URL}")
    return found


def check_width(features: Features) -> None:
    if features.num_features != NUM_FEATURES:
        raise UserError(f"FID's Inception has {NUM_FEATURES} features, {features.title} has {features.num_features}")
