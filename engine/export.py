"""A student for other programs.

    potstill export runs/digits --to hub --out out/digits

DIR gets a README.md (a model card with method, teacher, data, quality and licence) beside the files of the format:
safetensors (the weight file itself), hub (model.safetensors, config.json), diffusers (a pipeline that needs nothing of
potstill; of a net of diffusers the teacher's own with another denoiser and scheduler, or adapters for it), onnx (noise,
labels -> images).
"""

import argparse
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from potstill.engine.common.cli import parser_of, run
from potstill.engine.common.errors import UserError, writing
from potstill.engine.data.captions import CAPTIONS, read_prompts
from potstill.engine.formats.card import HERE, About, card, labels_in_python
from potstill.engine.formats.diffusers import write_diffusers
from potstill.engine.formats.onnx import largest_difference, write_onnx
from potstill.engine.formats.pipeline import write_pipeline
from potstill.engine.jobs.lock import LOCK, lock
from potstill.engine.measure.summary import read_summary
from potstill.engine.models.opening import STUDENT, open_models, settings, teacher_elsewhere
from potstill.engine.models.origins import local_path, on_hub
from potstill.engine.models.router import Router, one_of
from potstill.engine.models.student import Student, copy_weights, write_hub
from potstill.engine.models.weights import round_weights
from potstill.engine.nets.diffusers import DiffusersDenoiser
from potstill.engine.nets.edm_denoiser import EDMDenoiser

ONNX = "student.onnx"
UNKNOWN = "FOLDER"  # a pipeline that nothing names
MOST_UNLIKE = 1e-3  # between onnxruntime and PyTorch, of images in [-1, 1]: more is another net, not another rounding


@dataclass
class Subject:
    """What is exported: a student, the file it is in, and what is known about it."""

    student: Student
    path: Path
    about: About
    pipeline: Path | None = None  # the teacher's, of a student of diffusers' nets
    named: str = ""  # how a card calls it
    prompt: str = "a photo of a cat"  # one that its net knows, of nets that are told prompts


def main(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    out = args.out.expanduser()
    if out.exists():
        raise UserError(f"{out} exists: choose a folder that does not, or remove it")
    if args.bits == 16 and args.to not in ("safetensors", "hub"):
        raise UserError(f"--bits 16 is for --to safetensors and hub, got --to {args.to}, whose readers choose a dtype of their own")
    subject = found(args.source.expanduser(), args.pipeline)
    part = out.with_name(out.name + ".part")
    with lock(part / LOCK), writing(out):
        try:
            part.mkdir(parents=True, exist_ok=True)
            emptied(part)
            written = FORMATS[args.to](subject, part)
            for file in part.rglob("*.safetensors") if args.bits == 16 else ():
                round_weights(file)
            (part / "README.md").write_text(card(subject.about, written.library, written.use), encoding="utf-8")
            (part / LOCK).unlink(missing_ok=True)
            part.rename(out)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"{out}: {written.told}, {size / 2**20:.1f} MiB; read {out}/README.md before you publish it", file=sys.stderr)


def emptied(part: Path) -> None:
    """Nothing but our lock is left of an export that was killed."""
    for old in part.iterdir():
        if old.is_dir():
            shutil.rmtree(old)
        elif old.name != LOCK:
            old.unlink()


def parser() -> argparse.ArgumentParser:
    p = parser_of("export", __doc__)
    p.add_argument("source", type=Path, metavar="RUN_OR_FILE", help="a finished run, or a student's .safetensors file")
    p.add_argument("--to", choices=list(FORMATS), required=True, help="what shall read it")
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="a folder that does not exist yet")
    where = "the teacher's pipeline of diffusers, where it is not at the run's teacher.checkpoint"
    p.add_argument("--pipeline", metavar="FOLDER", help=where)
    p.add_argument("--bits", type=int, choices=(16, 32), default=32, help="of a weight; 16 for half the bytes (default 32)")
    return p


def found(source: Path, pipeline: str | None = None) -> Subject:
    """The student at `source`. UserError if there is none, or its run is not finished.

    pipeline: the folder of the teacher's; None: as the run, or a file of adapters, names it.
    """
    run = source if source.is_dir() else source.parent
    # Of a single file's run: its numbers are about its last student only.
    summary = read_summary(run) if source.is_dir() or source.name == "student.safetensors" else None
    if source.is_dir() and summary is None:
        has = (run / "student.safetensors").is_file()
        raise UserError(
            f"{run} is no finished run (it has no summary.json): repeat its potstill train command to finish it"
            + (", or export the file student.safetensors in it" if has else "")
        )
    given = local_path(pipeline) if pipeline else None
    model = open_models(source, STUDENT, base=given)[0]
    student = Student(model.net, model.sampler, model.metadata).eval()
    net = student.net
    told = "prompts" if net.text else f"{net.label_dim:,} classes" if net.label_dim else "no classes"
    size = f"{'x'.join(str(side) for side in (*net.shape[1:], net.shape[0]))}, {told}, "
    about = About(
        name=(run if source.is_dir() or summary else source.with_suffix("")).resolve().name,
        metadata=model.metadata,
        nfe=model.sampler.nfe,
        size=size + f"{sum(p.numel() for p in net.parameters()):,} parameters",
        students=len(net.students) if isinstance(net, Router) else 1,
        teacher=_teacher(source, model.metadata),
        summary=summary or {},
        task="text-to-image" if net.text else "unconditional-image-generation",
    )
    own = Path(one_of(net).source) if one_of(net).adapters is not None else None
    named = _learnt_from(source)
    place = given or own or teacher_elsewhere(source) or (local_path(named) if named else None)
    from_hub = named if named and on_hub(named) and not Path(named).exists() else None
    captions = run / CAPTIONS  # of a teacher that was trained here
    prompt = read_prompts(captions)[0] if net.text and captions.is_file() else Subject.prompt
    return Subject(student, model.path, about, place, pipeline or from_hub or str(place), prompt)


def _teacher(source: Path, metadata: dict[str, Any]) -> str | None:
    """A name for what the student learnt from."""
    teacher = metadata.get("teacher")
    if isinstance(teacher, dict) and teacher.get("source"):
        sha = str(teacher.get("sha256", ""))
        return str(teacher["source"]) + (f" (sha256 {sha})" if sha else "")
    recipe = settings(source)
    if not recipe:
        return None
    given = _learnt_from(source)
    return Path(given).name if given else f"a teacher trained in the same run on {metadata.get('data', 'its data')}"


def _learnt_from(source: Path) -> str | None:
    """The teacher's checkpoint as its run names it."""
    return (settings(source).get("teacher") or {}).get("checkpoint")


# How each format is written into a folder.


class Written(NamedTuple):
    """What to say about it, the hub's name of what loads it, and Markdown on how it is loaded."""

    told: str
    library: str
    use: str


def to_safetensors(subject: Subject, folder: Path) -> Written:
    copy_weights(subject.path, folder, "student.safetensors")
    where = "." if subject.about.students > 1 else "student.safetensors"
    use = _python(subject, f'"{where}"', "  # in this folder")
    more = ""
    if isinstance(net := one_of(subject.student.net), DiffusersDenoiser) and _wants_pipeline(net):
        more = f" --pipeline {_its_pipeline(subject)}" + ' --prompts "a cat"' * net.text
    use += f"\n\nOr `potstill sample {where}{more} --seeds 0-63 --out grid.png`."
    return Written("weights with their description in their metadata", "potstill", use)


def to_hub(subject: Subject, folder: Path) -> Written:
    write_hub(subject.path, folder)
    up = "Upload it with `hf upload USER/NAME DIR`; only safetensors and JSON are ever read."
    return Written(
        "a folder for the Hugging Face hub",
        "potstill",
        _python(subject, HERE, '  # this folder; once it is on the hub "USER/NAME"') + "\n\n" + up,
    )


def _python(subject: Subject, where: str, comment: str = "") -> str:
    net = one_of(subject.student.net)
    if isinstance(net, DiffusersDenoiser):
        told, condition, tell = "", "", ""
        if net.text:
            tell, told, condition = '\nprompts = ["a cat"] * 16', ", prompts=prompts", ", student.encode(prompts)"
        elif net.label_dim:
            tell, told, condition = f"\nclasses = torch.arange(16) % {net.label_dim}", ", labels=classes", ", classes"
        place, note = "", comment
        if _wants_pipeline(net):
            its = _its_pipeline(subject)
            place = f", pipeline={its if its == UNKNOWN else repr(its)}"
            note = f"{comment}; pipeline: the teacher's, which has the text encoder and VAE"
        return f"""\
```python
import torch
from potstill.engine.models.student import Student  # potstill

student = Student.from_pretrained({where}{place}){note}{tell}
images = student(seeds=range(16){told})  # uint8 [16, C, H, W]
x = student.generate(torch.randn(16, *student.noise_shape){condition})  # float32; of latents what the VAE decodes
```"""
    chosen = ""
    if net.label_dim:
        labels = labels_in_python(net.label_dim, subject.about.metadata.get("classes"), 4)
        chosen = f"\nimages = student(seeds=range(4), labels={labels})  # the class of each"
    return f"""\
```python
from potstill.engine.models.student import Student  # potstill

student = Student.from_pretrained({where}){comment}
images = student(seeds=range(16))  # uint8 [16, C, H, W]{chosen}
```"""


def _its_pipeline(subject: Subject) -> str:
    """What the teacher's pipeline is called, as far as that is known."""
    return subject.named if subject.pipeline else UNKNOWN


def _wants_pipeline(net: DiffusersDenoiser) -> bool:
    """Does it take its teacher's text encoder or VAE to make pictures of it?"""
    return net.text or net.shape[0] not in (1, 3)


def to_diffusers(subject: Subject, folder: Path) -> Written:
    student = single(subject, "diffusers")
    if isinstance(student.net, DiffusersDenoiser):
        if not subject.pipeline:
            raise UserError(
                "--to diffusers wants the pipeline that the student learnt from, which its run does not name: --pipeline FOLDER"
            )
        told, use = write_pipeline(student.net, student.sampler, folder, subject.pipeline, subject.prompt, subject.named)
        return Written(told, "diffusers", use)
    metadata = {"license": subject.about.metadata["license"]} if "license" in subject.about.metadata else {}
    assert isinstance(student.net, EDMDenoiser)
    write_diffusers(student.net, student.sampler.to_dict(), folder, metadata)
    classes = f", class_labels={labels_in_python(student.label_dim, None, 4)}" if student.label_dim else ""
    use = f"""\
```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({HERE}, custom_pipeline={HERE}, trust_remote_code=True)  # this folder
images = pipe(seeds=[0, 1, 2, 3]{classes}).images
```

`trust_remote_code` runs pipeline.py and unet/denoiser.py of this folder: read them, they are short."""
    return Written("a diffusers pipeline", "diffusers", use)


def to_onnx(subject: Subject, folder: Path) -> Written:
    """The graph and its check. UserError if onnxruntime's images are not PyTorch's, and for what no graph of ours holds."""
    if isinstance(subject.student.net, DiffusersDenoiser):
        raise UserError(
            "--to onnx writes potstill's own nets, and this one is of diffusers, with a text encoder and VAE beside it: --to diffusers"
        )
    generator = Graph(student := single(subject, "onnx"))
    example, names = generator.example(), generator.names
    write_onnx(generator, example, names, folder / ONNX)
    difference = largest_difference(folder / ONNX, generator, example, names)
    if difference is None:
        told = "an ONNX graph, not checked (pip install onnxruntime checks it)"
    elif difference < MOST_UNLIKE:
        told = f"an ONNX graph, within {difference:.1e} of PyTorch in onnxruntime"
    else:
        raise UserError(f"onnxruntime's images differ by {difference:.2g} from PyTorch's: export to safetensors instead")
    labels = ', "labels": np.arange(16)' + (f" % {student.label_dim}" if student.label_dim < 16 else "") if student.label_dim else ""
    use = f"""\
```python
import numpy as np, onnxruntime

z = np.random.default_rng(0).standard_normal((16, {", ".join(map(str, student.noise_shape))}), np.float32)
(images,) = onnxruntime.InferenceSession("{ONNX}").run(None, {{"z": z{labels}}})  # about in [-1, 1]
```"""
    return Written(told, "onnx", use)


def single(subject: Subject, kind: str) -> Student:
    if isinstance(subject.student.net, Router):
        files = ", ".join(f"student-{k}/student.safetensors" for k in range(min(subject.about.students, 3)))
        raise UserError(
            f"--to {kind} takes one net, this run has {subject.about.students} students: export each by its file ({files} …), "
            "or all of them --to hub"
        )
    subject.student.net.compute_dtype = torch.float32
    return subject.student


class Graph(nn.Module):
    """forward(z, labels) of a student, for torch.export."""

    def __init__(self, student: Student):
        super().__init__()
        self.student = student
        student.sampler.levels(student.net)  # an iDDPM net's are read from its weights now: a tracer sees no numbers
        self.names = ("z", "labels") if student.label_dim else ("z",)

    def example(self) -> tuple[Tensor, ...]:
        student = self.student
        z = torch.randn(2, *student.noise_shape, generator=torch.Generator().manual_seed(0))
        return (z, torch.arange(2) % student.label_dim) if student.label_dim else (z,)

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.student.generate(z, labels)


FORMATS = {"safetensors": to_safetensors, "hub": to_hub, "diffusers": to_diffusers, "onnx": to_onnx}

if __name__ == "__main__":
    run(main)
