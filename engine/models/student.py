"""A student as one object: images from seeds, or from noise of your own.

student = Student("runs/digits")                     # a run, an exported folder, a weight file, or USER/NAME on the hub
images = student(seeds=[0, 1, 2])                    # uint8 [3, C, H, W]: the images that `potstill sample` makes
images = student(seeds=[0, 1], prompts=["a cat", "a dog"])  # of a student that is told prompts
x = student.generate(z, labels)                      # float32 about in [-1, 1], differentiable, without random numbers
"""

# huggingface_hub is optional.
# pyright: reportMissingImports=false

import json
import re
import shutil
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from potstill.engine.common.class_names import number_named
from potstill.engine.common.errors import UserError
from potstill.engine.data.embeddings import Encoder
from potstill.engine.data.pipelines import decodes
from potstill.engine.data.prompts import Prompts
from potstill.engine.data.vae import VAE
from potstill.engine.diffusion.sampling import ANCESTRAL, RENOISE, Sampler
from potstill.engine.models.decoding import CHANNELS, decoder_of
from potstill.engine.models.generate import Decode, Rows, generate
from potstill.engine.models.opening import STUDENT, WEIGHTS, open_models, pipeline_named, settings, teacher_elsewhere
from potstill.engine.models.origins import is_pipeline
from potstill.engine.models.router import MANIFEST, Router, one_of, read_manifest, student_name
from potstill.engine.models.weights import read_metadata, save_net
from potstill.engine.nets.conditions import Condition, Text
from potstill.engine.nets.denoiser import Denoiser
from potstill.engine.nets.diffusers import DiffusersDenoiser

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILES = ["*.safetensors", "*.json"]  # what Student reads; pickles and code are not even downloaded


class GivenNoise:
    """Noise that is there already, [N, draws, C, H, W]: one draw after the other."""

    def __init__(self, z: Tensor):
        self.draws = iter(z.unbind(1))

    def normal(self, *shape: int) -> Tensor:
        return next(self.draws)


class Student(nn.Module):
    """A net (or the router of several) with the way to sample it, and `metadata`, what its weight file says.

    Of a folder, a file or a name on the hub, `Student("runs/digits")`, it is what `from_pretrained` finds there.

    pipeline: of a net of diffusers, the folder of its teacher's, which embeds prompts and decodes latents; text: how its encoder works
    (precision, max_length). None: they are not known, and neither is done.
    """

    def __init__(
        self, net: Denoiser | Router | str | Path, sampler: Sampler | None = None, metadata: dict[str, Any] | None = None, *,
        pipeline: Path | None = None, text: dict[str, Any] | None = None,
    ):  # fmt: skip
        super().__init__()
        if isinstance(net, str | Path):
            found = Student.from_pretrained(net, pipeline=pipeline)
            self.__init__(found.net, found.sampler, found.metadata, pipeline=found.pipeline, text=found.text)
            self.eval()
            return
        if sampler is None:
            raise UserError("a Student of a net wants to know how it is sampled: Student(net, sampler), or Student(FOLDER)")
        self.net, self.sampler, self.metadata, self.pipeline, self.text = net, sampler, metadata or {}, pipeline, text or {}
        self._loaded: dict[tuple[str, torch.device], Any] = {}  # of the pipeline, when it is asked for
        self.label_dim, self.shape = net.label_dim, net.shape
        self.draws = sampler.nfe if sampler.solver in (ANCESTRAL, RENOISE) else 1  # arrays of noise that an image takes
        self.noise_shape = self.shape if self.draws == 1 else (self.draws, *self.shape)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, revision: str | None = None, device: torch.device | str = "cpu", pipeline: str | Path | None = None
    ) -> "Student":  # fmt: skip
        """The student of a run folder, of a folder that `potstill export` made, in a weight file, or USER/NAME on the hub.

        Only safetensors and JSON are read; nothing of it is executed.

        Args:
            source: a folder, a file, or a name on the hub, which wants the extra `hub`.
            revision: a branch, tag or commit of the hub.
            device: where the net shall be.
            pipeline: of a net of diffusers, its teacher's folder, or USER/NAME in the hub's cache; None: where the run found it.

        Raises:
            UserError: nothing of that name, no student in it, or one of a format that is not known; adapters of other weights.
        """
        place = Path(source).expanduser()
        if not place.exists() and HUB_ID.fullmatch(str(source)):
            place = _downloaded(str(source), revision)
        if (place / "model_index.json").is_file():
            raise UserError(f"{place} is a diffusers pipeline: load it with DiffusionPipeline.from_pretrained")
        place, given = place / WEIGHTS if (place / WEIGHTS).is_file() else place, pipeline_named(pipeline)
        model = open_models(place, STUDENT, device=device, base=given)[0]
        net = one_of(model.net)
        if not isinstance(net, DiffusersDenoiser):
            return cls(model.net, model.sampler, model.metadata).eval()
        own = Path(net.source) if net.adapters is not None else None
        found = next((one for one in (given, teacher_elsewhere(place), own) if one is not None and is_pipeline(one)), None)
        said = settings(place).get("text") or {}
        text = {name: said[name] for name in ("precision", "max_length") if said.get(name) is not None}
        return cls(model.net, model.sampler, model.metadata, pipeline=found, text=text).eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Weights and config.json as `from_pretrained` reads them. `potstill export --to hub` adds the model card.

        Raises:
            UserError: the student is several nets (MSD), which are saved from their run.
        """
        if isinstance(self.net, Router):
            raise UserError("a student of several nets is saved from its run: potstill export RUN --to hub --out DIR")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        more = {k: v for k, v in self.metadata.items() if k not in ("format", "precond", "kwargs")}
        save_net(folder / WEIGHTS, self.net, **more | {"sampler": self.sampler.to_dict()})
        write_config(folder, folder / WEIGHTS)

    def generate(self, z: Tensor, labels: Condition | None = None) -> Tensor:
        """Images [N, C, H, W] float32 about in [-1, 1], or latents, differentiable in z and in the net's parameters.

        Args:
            z: standard normals [N, C, H, W], or [N, draws, C, H, W] for a student that draws at every step (`self.draws` > 1).
            labels: classes [N] of an integer dtype or rows [N, label_dim], or N prompts (`Text`); None is "no class", which a net must have
                learnt, and of a net of prompts its null prompt.

        Raises:
            UserError: noise or labels of another shape; no prompts for a net that has no null prompt.
        """
        if labels is None and getattr(self.net, "text", False) and getattr(self.net, "null", None) is None:
            raise UserError('this student is told prompts, got none: student.generate(z, student.encode(["a cat", …])), one for each image')
        if tuple(z.shape[1:]) != self.noise_shape:
            raise UserError(f"this student wants noise {['N', *self.noise_shape]}, got {list(z.shape)}")
        noise = GivenNoise(z[:, None] if self.draws == 1 else z)
        return self.sampler(self.net, self._rows(labels, z.shape[0]), noise)

    def __repr__(self) -> str:
        """One line: what it is, and not every layer of it."""
        size = sum(p.numel() for p in self.net.parameters())
        told = f", {self.label_dim} classes" if self.label_dim else ", prompts" if getattr(self.net, "text", False) else ""
        method, shape = self.metadata.get("method", "unknown method"), "x".join(map(str, self.shape))
        return f"Student({type(one_of(self.net)).__name__}, {method}, {shape}{told}, NFE {self.sampler.nfe}, {size:,} parameters)"

    def forward(
        self,
        seeds: Sequence[int] | np.ndarray | Tensor,
        labels: Sequence[int | str] | np.ndarray | Tensor | None = None,
        *,
        prompts: Sequence[str] | Text | None = None,
        dtype: torch.dtype = torch.uint8,
        batch: int = 256,
    ) -> Tensor:
        """One image per seed, [N, C, H, W]; a seed is the same image on every device, up to rounding.

        Args:
            seeds: whole numbers; noise is drawn on the CPU.
            labels: one class for each seed, by number or, where classes have names (`classes`), by name; by default seed s has class
                s mod classes, as in `potstill sample`.
            prompts: of a net that is told some, one for each seed, as texts or embedded (`encode`).
            dtype: uint8, EDM's rounding to 0 … 255; or float32, about in [-1, 1]. Latents are decoded by the VAE of `pipeline`.
            batch: images at a time.

        Raises:
            UserError: classes or prompts for a net without, too few of them, or a class that there is not; latents or texts without a
                pipeline; an image that is not finite.
        """
        if isinstance(seeds, int):
            raise UserError(
                f"wanted a list of seeds, one for each image, got {seeds}: student([{seeds}]) is one, student(range({seeds})) the first {seeds}"
            )
        seeds, labels = _listed(seeds), _listed(labels)
        if not isinstance(seeds, Sequence) or not all(_whole(seed) and -(2**63) <= seed < 2**63 for seed in seeds):
            raise UserError(f"wanted a list of seeds, whole numbers of 64 bits, such as [0, 1, 2], got {seeds!r:.60}")
        seeds = [int(seed) for seed in seeds]
        told = self._told(seeds, labels, prompts)
        decode = self._decode()
        if not len(seeds):
            return torch.empty(0, *self.shape, dtype=dtype, device=self.device)
        return torch.cat(
            list(generate(self.net, self.sampler, told, list(seeds), batch=batch, device=self.device, dtype=dtype, decode=decode))
        )

    def encode(self, prompts: Sequence[str]) -> Text:
        """Prompts as the net is told them, by the text encoders of `pipeline`, which stay on the device.

        Raises:
            UserError: a net that is told none, or no pipeline.
        """
        if not getattr(self.net, "text", False):
            raise UserError("this student is told no prompts")
        if isinstance(prompts, str) or not len(prompts) or not all(isinstance(one, str) for one in prompts):
            raise UserError(f"wanted a list of prompts, got {prompts!r:.60}")
        pipeline = self._of_pipeline("embeds prompts")
        return self._kept("encoder", lambda: Encoder(pipeline, self.device, **self.text))(prompts)

    @property
    def classes(self) -> list[str] | None:
        """Names of the net's classes, or of the first of them; None where they have none."""
        return self.metadata.get("classes")

    @property
    def device(self) -> torch.device:
        """Where the net is; `student.to(device)` moves it."""
        return next(self.net.parameters()).device

    def _of_pipeline(self, does: str) -> Path:
        if self.pipeline is None:
            raise UserError(
                f"the pipeline of this student's teacher, which {does}, is not known or not there: Student.from_pretrained(…, pipeline=FOLDER), or "
                "student.generate(z, prompts or labels), which takes embedded prompts and gives latents"
            )
        return self.pipeline

    def _kept(self, what: str, make: Callable[[], Any]) -> Any:
        """A part of the pipeline that is loaded once for a device."""
        key = what, self.device
        if key not in self._loaded:
            self._loaded[key] = make()
        return self._loaded[key]

    def _decode(self) -> Decode | None:
        """What makes pictures of latents; None for a net of pictures."""
        net = one_of(self.net)
        if not isinstance(net, DiffusersDenoiser) and net.img_channels == CHANNELS:
            return self._kept("vae", lambda: decoder_of(None, self.metadata, self.device))
        if not isinstance(net, DiffusersDenoiser) or (self.pipeline is None and not net.text and net.img_channels in (1, 3)):
            return None
        pipeline = self._of_pipeline("decodes latents")
        return self._kept("vae", lambda: VAE(pipeline, self.device)).decode if decodes(pipeline) else None

    def _told(self, seeds: Sequence[int], labels: Any, prompts: Sequence[str] | Text | None) -> Rows | np.ndarray | None:
        """What the net is told for every seed."""
        if not getattr(self.net, "text", False) or labels is not None:
            if prompts is not None:
                raise UserError(
                    "this student is told " + ("prompts alone: leave labels out" if labels is not None else "no prompts: leave them out")
                )
            return self._classes(seeds, labels)
        if prompts is None:
            raise UserError('this student is told prompts, got none: student(seeds=[0, 1], prompts=["a cat", "a dog"]), one for each seed')
        if isinstance(prompts, str) or len(prompts) != len(seeds):
            raise UserError(f"wanted one prompt for each of {len(seeds)} seeds, got {1 if isinstance(prompts, str) else len(prompts)}")
        if isinstance(prompts, Text):
            return Prompts([""] * len(prompts), lambda ids: prompts[torch.tensor(ids, device=prompts.embeds.device)], None, self.device)
        return Prompts(list(prompts), lambda ids: self.encode([prompts[i] for i in ids]), None, self.device)

    def _classes(self, seeds: Sequence[int], labels: Any) -> np.ndarray | None:
        """The class of every seed, int64 [N]; None for a net without classes."""
        if not self.label_dim:
            if labels is not None:
                instead = ": prompts=[…] tell it what to draw" if getattr(self.net, "text", False) else ""
                raise UserError(f"this student knows no classes, got labels {labels}{instead}")
            return None
        if labels is None:
            return np.array([seed % self.label_dim for seed in seeds], np.int64)
        if not isinstance(labels, Sequence) or isinstance(labels, str) or len(labels) != len(seeds):
            raise UserError(f"wanted a list of classes, one for each of {len(seeds)} seeds, got {labels!r:.60}")
        labels = [number_named(one, self.classes) if isinstance(one, str) else one for one in labels]
        if wrong := [one for one in labels if not _whole(one)]:
            raise UserError(f"a class is a whole number or a name, got {wrong[0]!r:.60}")
        classes = np.array(labels, object)
        if len(classes) and not 0 <= classes.min() <= classes.max() < self.label_dim:
            raise UserError(f"classes are 0 … {self.label_dim - 1}, got {classes.min()} … {classes.max()}")
        return classes.astype(np.int64)

    def _rows(self, labels: Condition | None, n: int) -> Condition | None:
        """Labels as the net wants them, float32 [N, label_dim]. A class that there is not becomes "no class", without a sync."""
        if isinstance(labels, Text):
            return labels.to(self.device)
        if labels is None or not self.label_dim:
            return None
        labels = labels.to(self.device)
        if labels.dim() == 1:
            labels = labels[:, None] == torch.arange(self.label_dim, device=self.device)
        if labels.shape[1] != self.label_dim:
            raise UserError(f"wanted labels [{n}] or [{n}, {self.label_dim}], got {list(labels.shape)}")
        return labels.float()


def _listed(values: Any) -> Any:
    """An array's or a tensor's numbers and names as a list; all else as it is."""
    return values.tolist() if isinstance(values, Tensor | np.ndarray) else values


def _whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _downloaded(name: str, revision: str | None) -> Path:
    """The folder of a hub repository in Hugging Face's cache."""
    if find_spec("huggingface_hub") is None:
        raise UserError(f"no folder or file at {name}; if it is a name on the Hugging Face hub: pip install 'potstill[hub]' and try again")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"no folder or file at {name}, and none of that name came from the hub ({reason})") from error


def write_hub(weights: Path, folder: Path) -> None:
    """A student's weight file and its config.json into a folder that exists; of several students, all of theirs."""
    write_config(folder, copy_weights(weights, folder, WEIGHTS))


def copy_weights(weights: Path, folder: Path, name: str) -> Path:
    """Copy a weight file to `name` in a folder; a manifest and all that it names, as they are called. Returns the first weight file."""
    if weights.name != MANIFEST:
        return Path(shutil.copyfile(weights, folder / name))
    names = [student_name(k) for k in range(len(read_manifest(weights).files))]
    for name in [MANIFEST, *names]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(weights.parent / name, folder / name)
    return folder / names[0]


def write_config(folder: Path, weights: Path) -> None:
    """config.json: the metadata of a weight file, for people and for the hub's counters; the file decides."""
    text = {"library_name": "potstill", **read_metadata(weights)}
    (folder / "config.json").write_text(json.dumps(text, indent=2, sort_keys=True) + "\n", encoding="utf-8")
