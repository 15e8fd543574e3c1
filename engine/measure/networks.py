"""The networks whose distances have names of their own, as features; and features by their names, of which
engine/measure/features.py has the list.

    inception   FID's network of 2015-12-05, 2048 features; inception-2015-12-05.pt, NVIDIA's TorchScript of 91 MiB that EDM's
                fid.py computes with, or torch-fidelity's state dict weights-inception-2015-12-05-6726825d.pth (extra `fid`)
    dinov2      ViT-L/14, its class token, 1024 features: FD-DINOv2 (2306.04675)
    clip        OpenAI's ViT-B/32, its image embedding, 512 features: CLIP-FID (2203.06026)

Both files of Inception take the images as uint8 and enlarge them as TensorFlow 1 did. A distance in them is called FID only
where the file's sha256 is one of these two. The weights of the other two are timm's .safetensors. Their images are enlarged
to 224 pixels by PyTorch's bicubic filter with antialiasing, as in EDM2's code; clean-fid, where CLIP-FID comes from, resizes
in Pillow, which rounds to 8 bits in between.
"""

# torch-fidelity and timm are optional.
# pyright: reportMissingImports=false

import io
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from potstill.engine.common.download import cached_path, digest, fetch, file_at, is_url
from potstill.engine.common.errors import UserError, what_it_is
from potstill.engine.measure.features import KINDS, Features, Pixels, Scripted, rgb
from potstill.engine.readers.pickles import Unreadable
from potstill.engine.readers.tensors import in_memory
from potstill.engine.readers.torch_pickles import read_file

INCEPTION_URL = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"  # of 95,607,719 bytes
STATE_DICT_URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
STATE_DICT_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
SIDE = 224  # pixels that the vision transformers take


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
    return load_inception(where, command) if kind == "inception" else Vision(NETWORKS[kind], file_at(where, command=command))


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


def load_inception(where: str, command: str) -> Features:
    """From a file or an address; "": NVIDIA's file, from the cache or downloaded, and only if its sha256 is right."""
    path = _downloaded(command) if where in ("", INCEPTION_URL) else file_at(where, command=command)
    if path.suffix != ".pth" and what_it_is(path) == "it is a pickle":
        raise UserError(f"{path} is a pickle, which would have to be executed: wanted the same network as TorchScript, {INCEPTION_URL}")
    return FidelityInception(path) if path.suffix == ".pth" else ScriptedInception(path)


def is_inception(path: Path) -> bool:
    """Is it, whatever its name, one of the two files by whose sha256 FID is known?"""
    found = digest(path)
    return found == INCEPTION_SHA256 or (path.suffix == ".pth" and found == STATE_DICT_SHA256)


def _inception_title(path: Path) -> str:
    return "FID" if is_inception(path) else f"FD-{path.stem} (not FID's Inception: another sha256)"


def _downloaded(command: str) -> Path:
    path = cached_path(INCEPTION_URL)
    try:
        return fetch(INCEPTION_URL, command=command, sha256=INCEPTION_SHA256)
    except UserError as error:
        if path.is_file():
            raise
        raise UserError(f"{error}; elsewhere this line gets it: curl -L --create-dirs -o {path} {INCEPTION_URL}") from error


class ScriptedInception(Scripted):
    """NVIDIA's TorchScript module, called for the features before the softmax layer."""

    edm2, width = "fid", 2048

    def __init__(self, path: Path):
        super().__init__(path)
        self.title = _inception_title(path)
        if not self.flags:
            raise UserError(
                f"{path} has no flag return_features in its forward, as NVIDIA's Inception has: wanted {INCEPTION_URL}; another net of "
                "yours goes by its path alone, without inception:"
            )


class FidelityInception(Features):
    """torch-fidelity's network with its state dict, which is read without unpickling anything but tensors."""

    edm2, width = "fid", 2048

    def __init__(self, path: Path):
        super().__init__()
        self.sha256 = digest(path)
        self.title = _inception_title(path)
        weights = read_state_dict(path)
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise UserError(
                f"a .pth of Inception wants torch-fidelity ({error}): pip install 'potstill[fid]', or use NVIDIA's TorchScript "
                f"{INCEPTION_URL}"
            ) from error
        # It would unpickle the file whole; so it is given a copy that we have made of the tensors.
        copy = io.BytesIO()
        torch.save(weights, copy)
        copy.seek(0)
        try:
            self.net = FeatureExtractorInceptionV3("inception-v3-compat", [str(self.width)], feature_extractor_weights_path=copy).eval()
        except RuntimeError as error:
            raise UserError(f"{path} does not fit torch-fidelity's Inception: wanted {STATE_DICT_URL}") from error

    def forward(self, images: Tensor) -> Tensor:
        return self.net(rgb(images))[0].double()


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """UserError unless the file is tensors by name, and nothing else."""
    try:
        found = in_memory(read_file(path))
    except (UserError, Unreadable) as error:
        raise UserError(f"{path} holds no plain state dict ({error}): wanted {STATE_DICT_URL}; {what_it_is(path)}") from error
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise UserError(f"{path} holds no plain state dict: wanted {STATE_DICT_URL}")
    return found


class Network(NamedTuple):
    title: str
    timm: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    url: str
    edm2: str | None = None  # its entry in EDM2's references


NETWORKS = {
    "dinov2": Network(
        "FD-DINOv2", "vit_large_patch14_dinov2", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225),
        "https://huggingface.co/timm/vit_large_patch14_dinov2.lvd142m/resolve/main/model.safetensors",
        "fd_dinov2",
    ),
    "clip": Network(
        "CLIP-FID", "vit_base_patch32_clip_quickgelu_224.openai",
        (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711),
        "https://huggingface.co/timm/vit_base_patch32_clip_224.openai/resolve/main/model.safetensors",
    ),
}  # fmt: skip


class Vision(Features):
    """A vision transformer of timm's on RGB images [N, 3, H, W] uint8; grey ones are repeated to RGB."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: Network, path: Path):
        super().__init__()
        self.title, self.sha256, self.edm2 = network.title, digest(path), network.edm2
        self.net = _built(network)
        try:
            weights = load_file(path)
            if "pos_embed" in weights:
                weights["pos_embed"] = resampled(weights["pos_embed"], self.net.pos_embed.shape[1])
            self.net.load_state_dict(weights)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise UserError(
                f"{path} holds no weights of timm's {network.timm} ({type(error).__name__}): wanted {network.url}; {what_it_is(path)}"
            ) from error
        self.net.eval()
        self.register_buffer("mean", torch.tensor(network.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(network.std).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        x = rgb(images).float() / 255
        x = F.interpolate(x, size=(SIDE, SIDE), mode="bicubic", antialias=True)
        return self.net((x - self.mean) / self.std).double()


def resampled(embedding: Tensor, tokens: int) -> Tensor:
    """Position embeddings [1, 1 + s², C] for another number of tokens, as DINOv2's own code resamples them.

    Bicubic, without antialiasing, by the factor (s' + 0.1) / s; timm's own way differs, and its features would, too.
    """
    if embedding.shape[1] == tokens:
        return embedding
    first, rest = embedding[:, :1], embedding[:, 1:]
    old, new = round(rest.shape[1] ** 0.5), round((tokens - 1) ** 0.5)
    square = rest.reshape(1, old, old, -1).permute(0, 3, 1, 2).float()
    square = F.interpolate(square, scale_factor=((new + 0.1) / old,) * 2, mode="bicubic")
    return torch.cat([first, square.permute(0, 2, 3, 1).reshape(1, new * new, -1).to(first)], 1)


def _built(network: Network) -> Any:
    """timm's module; of which class, depends on timm's version."""
    try:
        import timm
    except ImportError as error:
        raise UserError(f"{network.title} wants timm ({error}): pip install 'potstill[timm]'") from error
    sized: dict[str, Any] = {"img_size": SIDE, "num_classes": 0} if "dinov2" in network.timm else {}
    return timm.create_model(network.timm, pretrained=False, **sized)
