"""Scores by a CLIP of transformers, from a folder with weights as safetensors, tokenizer and image processor; nothing in it is executed.

    clip:FOLDER                            100 · max(0, cos) of picture and prompt, each picture clipped (2104.08718, there 2.5 · max(0, cos));
                                           the prompt as it is, where that paper and GigaGAN's and DMD2's code say "A photo depicts" before it
    pickscore:FOLDER                       exp(logit_scale) · cos of a CLIP that was trained on people's choices (2305.01569); any CLIP's
                                           folder is taken: that it was trained so, the name says and nothing here checks
    aesthetic:HEAD.safetensors:FOLDER      LAION's predictors of beauty from 1 to 10: a linear head, or its five linear layers, on the picture's
                                           normalised embedding, which must be of the CLIP that the head was trained on; the prompt is not read

Pictures are resized and cropped in Pillow by transformers' own processor, as preprocessor_config.json says.
"""

# transformers is optional.
# pyright: reportMissingImports=false

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from potstill.engine.common.download import digest
from potstill.engine.common.errors import UserError, what_it_is
from potstill.engine.common.packages import installed
from potstill.engine.common.reading import read_json
from potstill.engine.data.pipelines import SMALL, tokenizer, transformer
from potstill.engine.nets.parts import check_finite, stored_in, stumbling, weight_files
from potstill.engine.nets.pipelines import AGAIN, quietly

PROCESSORS = ("preprocessor_config.json", "processor_config.json")  # earlier and later versions of transformers
HEAD = ".safetensors"
LAION = (0, 2, 4, 6, 7)  # of its layers, the linear ones; the others are dropout


class Clip:
    """Embeddings of unit length, float32 on the device."""

    def __init__(self, folder: Path, device: torch.device):
        check_clip(folder)
        self.net = transformer(folder, "CLIPModel", dtype=torch.float32)
        check_finite(self.net, folder)
        self.net = self.net.eval().requires_grad_(False).to(device)
        self.tokenizer, self.processor, self.device = tokenizer(folder, "CLIPTokenizer"), _processor(folder), device
        with stumbling(folder, "CLIPModel"):  # where its parts do not fit one another
            self.cosines(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ["a picture"])
        self.sha256 = _digest([*weight_files(folder, "transformers"), *sorted(one for one in folder.iterdir() if one.suffix in SMALL)])

    @torch.no_grad()
    def pictures(self, pictures: Tensor) -> Tensor:
        """[N, 3, H, W] uint8 -> [N, D]."""
        with quietly():
            pixels = self.processor(list(pictures.cpu().numpy()), input_data_format="channels_first", return_tensors="pt")["pixel_values"]
        return F.normalize(self.net.get_image_features(pixels.to(self.device)).pooler_output, dim=1)

    @torch.no_grad()
    def prompts(self, prompts: Sequence[str]) -> Tensor:
        """[N, D]; what is too long is cut off, as in training."""
        length = self.net.config.text_config.max_position_embeddings
        with quietly():
            tokens = self.tokenizer(list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return F.normalize(self.net.get_text_features(**tokens.to(self.device)).pooler_output, dim=1)

    def cosines(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        """Of each picture and its prompt, [N]."""
        return (self.pictures(pictures) * self.prompts(prompts)).sum(1)


def check_clip(folder: Path) -> None:
    """UserError, Damaged for a folder without a CLIP that can be read. No weight is."""
    for package in ("diffusers", "transformers"):
        if not installed(package):
            raise UserError(
                f"package {package}, for scores by CLIP: pip install 'potstill[diffusers]', or leave eval.scores (--scores) out"
            )
    if not (folder / "config.json").is_file():
        raise UserError(f"no CLIP at {folder}: wanted a folder with config.json, as transformers' save_pretrained writes it")
    if (kind := read_json(folder / "config.json", dict, AGAIN).get("model_type")) != "clip":
        raise UserError(f"{folder} holds a model of type {kind!r:.40}, wanted a whole CLIP (CLIPModel), whose type is 'clip'")
    stored_in(folder, "transformers")
    if not any((folder / name).is_file() for name in PROCESSORS):
        raise UserError(
            f"{folder} has no {PROCESSORS[0]}, which says how pictures are resized: copy it from the CLIP that this one was made of"
        )
    tokenizer(folder, "CLIPTokenizer")


class ClipScore:
    name, title = "", "CLIP-score"

    def __init__(self, where: str, device: torch.device):
        self.clip = Clip(Path(where).expanduser(), device)
        self.sha256 = self.clip.sha256

    @staticmethod
    def check(where: str) -> None:
        check_clip(Path(where).expanduser())

    def __call__(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        return 100 * self.clip.cosines(pictures, prompts).clamp(min=0)


class PickScore(ClipScore):
    title = "PickScore"

    def __call__(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.clip.net.logit_scale.exp() * self.clip.cosines(pictures, prompts)


class Aesthetic:
    name, title = "", "aesthetic score"

    def __init__(self, where: str, device: torch.device):
        file, folder = _parted(where)
        self.clip = Clip(folder, device)
        self.head = read_head(file, self.clip.net.config.projection_dim).to(device)
        self.sha256 = hashlib.sha256(f"{digest(file)} {self.clip.sha256}".encode()).hexdigest()

    @staticmethod
    def check(where: str) -> None:
        file, folder = _parted(where)
        check_clip(folder)
        read_head(file, transformer(folder, "CLIPModel", device_map="meta").config.projection_dim)

    @torch.no_grad()
    def __call__(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.head(self.clip.pictures(pictures))[:, 0]


def read_head(file: Path, width: int) -> nn.Module:
    """[N, width] -> [N, 1]: one linear layer, or LAION's five. UserError for any other."""
    try:
        weights = load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is no head of an aesthetic score, wanted its weights as safetensors: {what_it_is(file)}") from error
    names = [f"layers.{i}." for i in LAION] if any(name.startswith("layers.") for name in weights) else [""]
    wanted = {f"{name}{part}" for name in names for part in ("weight", "bias")}
    if weights.keys() != wanted:
        raise UserError(f"{file} holds {', '.join(sorted(weights))!r:.80}, wanted weight and bias, or those of layers {LAION}")
    shapes = [tuple(weights[name + "weight"].shape) for name in names]
    chain = [width, *(shape[0] for shape in shapes)]
    fits = shapes == [*zip(chain[1:], chain[:-1], strict=True)] and all(
        weights[f"{name}bias"].shape == shape[:1] for name, shape in zip(names, shapes, strict=True)
    )
    if not fits or chain[-1] != 1:
        raise UserError(f"{file} holds layers {shapes}, wanted such that lead from {width} numbers, the embedding of its CLIP, to one")
    head = nn.Sequential(*(nn.Linear(shape[1], shape[0]) for shape in shapes))
    head.load_state_dict({f"{i}.{part}": weights[name + part] for i, name in enumerate(names) for part in ("weight", "bias")})
    check_finite(head, file)
    return head.float().eval().requires_grad_(False)


def _parted(where: str) -> tuple[Path, Path]:
    """Head and folder of HEAD.safetensors:FOLDER."""
    head, found, folder = where.partition(f"{HEAD}:")
    if not found or not folder:
        raise UserError(f"aesthetic wants a head and the folder of its CLIP, aesthetic:HEAD{HEAD}:FOLDER, got aesthetic:{where}")
    return Path(head + HEAD).expanduser(), Path(folder).expanduser()


def _processor(folder: Path) -> Any:
    """transformers' processor in Pillow; in its later versions the one without that name is torchvision's."""
    import transformers

    with quietly(), stumbling(folder, "CLIPImageProcessor"):
        kind = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
        return kind.from_pretrained(folder, local_files_only=True)


def _digest(files: Sequence[Path]) -> str:
    return hashlib.sha256("".join(f"{file.name} {digest(file)}\n" for file in files).encode()).hexdigest()
