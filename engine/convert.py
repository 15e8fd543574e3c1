"""Any pictures become a data set (EDM's zip), pictures and prompts what a pipeline's nets see of them, networks weight files,
and the averages that a run has kept one of another length.

    potstill convert images SRC OUT.zip --resolution 64
    potstill convert latents SRC OUT --pipeline FOLDER
    potstill convert prompts PROMPTS OUT --pipeline FOLDER
    potstill convert edm IN.pkl|URL OUT.safetensors
    potstill convert phema RUN OUT.safetensors --std 0.08

`potstill convert images --help` and so on say more.
"""

import argparse
import shlex
import sys
from contextlib import nullcontext
from pathlib import Path

from safetensors import SafetensorError

from potstill.engine.common.cli import parser_of, run
from potstill.engine.common.download import digest, file_at, is_url
from potstill.engine.common.errors import UserError, writing
from potstill.engine.common.writing import check_free, check_writable
from potstill.engine.data.captions import captions_of, read_prompts
from potstill.engine.data.embeddings import PRECISIONS, write_embeddings
from potstill.engine.data.images import open_images
from potstill.engine.data.progress import in_order
from potstill.engine.data.sources import Source, open_source
from potstill.engine.data.vae import write_latents
from potstill.engine.diffusion.sampling import Sampler, one_step
from potstill.engine.formats.edm2_snapshots import NAME, Snapshot, snapshots_in
from potstill.engine.formats.edm_pickle import Found, read_net
from potstill.engine.formats.images import RESAMPLING, Fit, channels_of, dataset_zip, fitted, plain, png
from potstill.engine.models.descriptions import described
from potstill.engine.models.opening import device_named
from potstill.engine.models.origins import fetched
from potstill.engine.models.weights import save_net, save_weights
from potstill.engine.training.phema import LIMIT
from potstill.engine.training.posthoc import Profile, profiles_in, reconstructed

IMAGES = """\
SRC is a folder (sub-folders are classes), an EDM dataset zip, an .npz, webdataset's shards ('train-{000..063}.tar'),
hf:NAME[:CONFIG][@SPLIT] for a Hugging Face data set, 'digits' or synthetic:RESOLUTIONxCHANNELS.
Pictures may be of any size and are turned as the camera was held; if all are grey the set is grey, otherwise RGB. EDM's
own tool resizes with lanczos: add --filter lanczos for a set like those its published teachers were trained on."""

LATENTS = """\
SRC is a data set whose pictures are alike (`potstill convert images`). The VAE of the pipeline encodes each once; what is kept is
the mean of its posterior, shifted and scaled as the pipeline's denoiser wants it. A run then learns from data.path=OUT. Captions
come from --captions, from a folder's metadata.jsonl or from KEY.txt in tars. The same command goes on after it was stopped."""

PROMPTS = """\
PROMPTS is a text file with one prompt a line, a .jsonl whose lines have a prompt, caption or text, or a folder of latents with
captions. The pipeline's text encoders embed each once, which a run does as well: this makes the cache ahead, for text.cache=OUT.
The same command goes on after it was stopped."""

EDM = """\
IN is a network pickle of EDM, EDM2, SiD, SiDA, GDD, ECT or SFD, or a PyTorch checkpoint of such a net (DMD2, FastGen, training
states) with --like, or the address of one: it is then downloaded into $POTSTILL_CACHE (~/.cache/potstill). Pickles can hold
programs: nothing in the file is executed, and one that asks for anything but a network is refused."""
PHEMA = """\
RUN is the folder of a run with train.phema=[0.05,0.1], RUN/teacher that of its teacher's training, RUN/student-0 that of
one of several students; or a folder of the profiles that one has kept, or of EDM2's (network-snapshot-KIMG-STD.pkl). OUT is the
average of the weights of another relative length, as if it had been followed from the start (power-function EMA, 2312.02696),
after as many images as some of the profiles."""
LICENSE = (
    "These weights are somebody else's: EDM's and EDM2's, and what is made from them (SiD, SiDA, GDD, ECT, SFD, DMD2), are CC BY-NC-SA 4.0 "
    "(attribution, non-commercial, share alike)."
)
RAW = argparse.RawDescriptionHelpFormatter
ONE_STEP = {"GDDPrecond": 80.0, "ECMPrecond": 80.0}  # where GDD's and ECT's generators begin


def main(argv: list[str]) -> None:
    parser = parser_of("convert", __doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="images|latents|prompts|edm|phema", help="what is converted:")

    images = commands.add_parser("images", help="pictures -> EDM dataset zip", description=IMAGES, formatter_class=RAW)
    images.set_defaults(call=convert_images)
    images.add_argument("src", metavar="SRC", help="the pictures: a folder, an archive, hf:NAME")
    images.add_argument("out", metavar="OUT.zip", type=Path, help="the data set to be written")
    images.add_argument("--resolution", type=int, required=True, help="side of the square images, in pixels")
    images.add_argument(
        "--fit",
        choices=("centre-crop", "center-crop", "stretch", "pad"),
        default="centre-crop",
        help="how a picture becomes a square; pad is black (default centre-crop)",
    )
    images.add_argument("--filter", choices=tuple(RESAMPLING), help="(default: box to shrink, lanczos to enlarge)")
    images.add_argument("--unlabelled", action="store_true", help="ignore dataset.json and class folders")
    images.add_argument("--max-images", type=int, metavar="N", help="only the first N in the order of names")
    images.add_argument("--skip-corrupt", action="store_true", help="leave damaged pictures out, and say which")
    images.add_argument("--force", action="store_true", help="overwrite OUT.zip")

    latents = commands.add_parser("latents", help="pictures -> latents of a VAE", description=LATENTS, formatter_class=RAW)
    latents.set_defaults(call=convert_latents)
    latents.add_argument("src", metavar="SRC", help="the pictures: whatever data.path takes")
    latents.add_argument("--bits", type=int, choices=(16, 32), default=16, help="of a number (default 16)")
    latents.add_argument("--captions", metavar="FILE", type=Path, help=".txt or .jsonl with one caption an image")
    latents.add_argument("--unlabelled", action="store_true", help="ignore dataset.json and class folders")

    prompts = commands.add_parser("prompts", help="prompts -> embeddings of text encoders", description=PROMPTS, formatter_class=RAW)
    prompts.set_defaults(call=convert_prompts)
    prompts.add_argument("src", metavar="PROMPTS", help="the prompts: whatever text.prompts takes")
    prompts.add_argument("--max-length", type=int, metavar="N", help="tokens of a prompt (default: as many as the pipeline takes)")
    prompts.add_argument("--precision", choices=PRECISIONS, default="auto", help="of the text encoder (default auto: bf16 on a GPU)")

    for command, batch in ((latents, 8), (prompts, 32)):
        command.add_argument("out", metavar="OUT", type=Path, help="the folder to be written")
        command.add_argument("--pipeline", metavar="FOLDER|USER/NAME", required=True, help="a diffusers pipeline, also of the hub")
        command.add_argument("--batch", type=int, default=batch, metavar="N", help=f"as many at a time (default {batch})")
        command.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1 (default auto)")

    edm = commands.add_parser("edm", help="network pickle or checkpoint -> weight file", description=EDM, formatter_class=RAW)
    edm.set_defaults(call=convert_edm)
    edm.add_argument("source", metavar="IN.pkl|URL", help="a file, or the address of one")
    edm.add_argument("out", metavar="OUT.safetensors", type=Path, help="the weight file to be written")
    edm.add_argument("--net", metavar="NAME", help="which of the nets in the file (default: ema, or the only one)")
    edm.add_argument("--like", metavar="TEACHER.safetensors", type=Path, help="of a checkpoint: a converted net of its architecture")
    edm.add_argument(
        "--one-step", metavar="SIGMA", type=float, help="it is a generator, x = D(SIGMA z): SiD, SiDA 2.5; DMD2, GDD and ECT 80"
    )
    edm.add_argument("--force", action="store_true", help="overwrite OUT.safetensors")

    phema = commands.add_parser("phema", help="averages of a run -> one of any length", description=PHEMA, formatter_class=RAW)
    phema.set_defaults(call=convert_phema)
    phema.add_argument("source", metavar="RUN", type=Path, help="a run folder, or one with its profiles")
    phema.add_argument("out", metavar="OUT.safetensors", type=Path, help="the weight file to be written")
    phema.add_argument("--std", metavar="S", type=float, required=True, help=f"relative length of the average, above 0 and below {LIMIT}")
    phema.add_argument("--kimg", metavar="N", type=float, help="thousands of images seen, the nearest that was kept (default: the last)")
    phema.add_argument("--force", action="store_true", help="overwrite OUT.safetensors")

    arguments = parser.parse_args(argv)
    arguments.again = shlex.join(["potstill", "convert", *argv])
    arguments.call(arguments)


def convert_images(arguments: argparse.Namespace) -> None:
    """Read, square, resize and write; prints one line about the zip."""
    resolution, out = arguments.resolution, arguments.out.expanduser()
    if resolution < 1 or (arguments.max_images is not None and arguments.max_images < 1):
        raise UserError("wanted --resolution and --max-images of at least 1")
    source = open_source(arguments.src, labelled=not arguments.unlabelled)
    n = min(len(source), arguments.max_images or len(source))
    labels = source.labels
    skipped: list[UserError] = []
    fit: Fit = "centre-crop" if arguments.fit == "center-crop" else arguments.fit

    def made(i: int) -> bytes | UserError:
        try:
            picture = plain(source.picture(i, upright=True), channels, source.title(i))
        except UserError as error:
            return error
        return png(fitted(picture, resolution, fit, arguments.filter))

    with dataset_zip(out, classes=labels.classes if labels else None, overwrite=arguments.force) as writer:
        channels = _channels(source, n, arguments.skip_corrupt)
        for i, image in enumerate(in_order(made, n, f"converting {source.path}", chunk=8)):
            if isinstance(image, bytes):
                writer.add(image, None if labels is None else int(labels.of[i]))
            elif arguments.skip_corrupt:
                skipped.append(image)
            else:
                raise image
        if not writer.labels:
            raise UserError(f"not one of the {n:,} pictures of {source.path} could be read; the first: {skipped[0]}")
    for error in skipped:
        print(f"left out: {error}", file=sys.stderr)
    kind = "grey" if channels == 1 else "RGB"
    classes = f"{len({label for _, label in writer.labels})} classes" if labels else "no labels"
    left_out = f", {len(skipped):,} left out" if skipped else ""
    size = f"{resolution}x{resolution} {kind}, {out.stat().st_size / 2**20:.1f} MiB"
    print(f"{out}: {len(writer.labels):,} images {size}, {classes}{left_out}")


def _channels(source: Source, n: int, skip_corrupt: bool) -> int:
    """1 where all pictures are grey, else 3."""

    def channels(i: int) -> int:
        try:
            return channels_of(source.header(i).mode)
        except UserError:
            if skip_corrupt:
                return 1
            raise

    return max(in_order(channels, n, f"looking at {source.path}", chunk=256))


def convert_latents(arguments: argparse.Namespace) -> None:
    """Encode and write; prints one line about the folder."""
    _check_counts(arguments, "batch")
    images, out = open_images(arguments.src, labelled=not arguments.unlabelled), arguments.out.expanduser()
    check_writable(out, folder=True)
    captions = captions_of(images.source, arguments.captions)
    device, pipeline = device_named(arguments.device), fetched(arguments.pipeline)
    write_latents(out, images, pipeline, device, captions=captions, bits=arguments.bits, batch=arguments.batch)
    print(f"{out}: {str(open_images(out)).partition(': ')[2]}, {'captions' if captions else 'no captions'}")


def convert_prompts(arguments: argparse.Namespace) -> None:
    """Embed and write; prints one line about the folder."""
    _check_counts(arguments, "batch", "max_length")
    texts, out = read_prompts(arguments.src), arguments.out.expanduser()
    check_writable(out, folder=True)
    device, pipeline = device_named(arguments.device), fetched(arguments.pipeline)
    how = {"precision": arguments.precision, "max_length": arguments.max_length, "batch": arguments.batch}
    write_embeddings(out, texts, pipeline, device, **how)
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"{out}: {len(texts):,} prompts, {size / 2**20:.1f} MiB")


def _check_counts(arguments: argparse.Namespace, *names: str) -> None:
    for name in names:
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise UserError(f"wanted --{name.replace('_', '-')} of at least 1, got {value}")


def convert_edm(arguments: argparse.Namespace) -> None:
    """Fetch, read, save; prints one line about the net."""
    out, sigma = _weight_file(arguments), arguments.one_step
    if sigma is not None and not 0 < sigma < float("inf"):
        raise UserError(f"--one-step wants the noise level of the generator, above 0, got {sigma:g}")
    source = arguments.source
    path = file_at(source, command=arguments.again)
    found = read_net(path, net=arguments.net, like=arguments.like)
    metadata = {"source": source if is_url(source) else path.name, "sha256": digest(path), "license": LICENSE}
    if found.encoder:
        metadata["encoder"] = found.encoder
    if sampler := _sampler(found, sigma, path):
        metadata |= {"method": "converted", "sampler": sampler.to_dict()}
    try:
        with writing(out):
            save_net(out, found.net, **metadata)
    except SafetensorError as error:
        raise UserError(f"cannot write {out}: {error}") from error
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"{out}: {_described(found)} ({metadata['source']}, sha256 {metadata['sha256'][:12]})")


def convert_phema(arguments: argparse.Namespace) -> None:
    """Read, combine, save; prints one line about the average."""
    out = _weight_file(arguments)
    profiles = _profiles(arguments.source.expanduser())
    made = reconstructed(profiles, arguments.std, arguments.kimg)
    save_weights(out, made.tensors, made.metadata)
    lengths = sorted({one.std for one in profiles})
    of = f"{made.used} profiles of std {', '.join(f'{std:g}' for std in lengths)}"
    print(f"{out}: std {arguments.std:g} at {made.images / 1000:g} kimg, of {of} (its weights over time off by {made.off:.1%})")


def _profiles(where: Path) -> list[Profile]:
    """The averages that a run has kept, or one of EDM2's trainings as snapshots."""
    if where.is_dir() and any(NAME.fullmatch(path.name) for path in where.iterdir()):
        return [_of_snapshot(one) for one in snapshots_in(where)]
    return profiles_in(where)


def _of_snapshot(one: Snapshot) -> Profile:
    found = read_net(one.path)
    encoder = {"encoder": found.encoder} if found.encoder else {}
    metadata = {"source": f"snapshots of {one.path.parent.name}", "license": LICENSE} | encoder | described(found.net)
    return Profile(one.images, one.std, lambda: nullcontext(one.tensors()), metadata, one.path)


def _weight_file(arguments: argparse.Namespace) -> Path:
    """OUT.safetensors. UserError for another name, and for a file that nobody wants to lose."""
    out = arguments.out.expanduser()
    if out.suffix != ".safetensors":
        raise UserError(f"wanted an output that ends in .safetensors, got {out}")
    check_free(out, arguments.force)
    return out


def _sampler(found: Found, sigma: float | None, path: Path) -> Sampler | None:
    """How a generator is sampled; None for a teacher. UserError where --one-step contradicts the file."""
    net, known = found.net, ONE_STEP.get(found.net.precond)
    if found.sampler and sigma is not None:
        raise UserError(
            f"{path} says itself how it is sampled ({found.sampler.solver}, NFE {found.sampler.nfe}), and --one-step says {sigma:g}: leave it out"
        )
    if sigma is None:
        return found.sampler if found.sampler or known is None else one_step(known)
    if net.precond == "GDDPrecond" and sigma != known:
        raise UserError(
            f"{path} holds a net of {net.precond}, which knows only the noise level {known:g}, and --one-step says {sigma:g}: leave it out"
        )
    if not net.sigma_min <= sigma <= net.sigma_max:
        levels = f"{net.sigma_min:g} … {net.sigma_max:g}"
        raise UserError(
            f"{path} holds a net for the noise levels {levels}, and --one-step says {sigma:g}: name the level it was trained at"
        )
    return one_step(sigma)


def _described(found: Found) -> str:
    net, kwargs = found.net, found.net.kwargs
    size = f"{net.img_resolution}x{net.img_resolution}x{net.img_channels}"
    classes = f"{net.label_dim:,} classes" if net.label_dim else "no labels"
    numbers = f"{sum(p.numel() for p in net.parameters()):,} parameters"
    title = f"'{found.name}' " if found.name else ""
    return f"net {title}of {net.precond}, {kwargs.get('model_type', type(net.model).__name__)}, {size}, {classes}, {numbers}"


if __name__ == "__main__":
    run(main)
