"""Students of diffusers nets as diffusers pipelines: the lines of the model card, run as they stand in plain diffusers, give the latents
of our Sampler on our net, for every family; and as LoRA files, whatever alpha is.

The seed is all that both have in common: the first numbers after it are the noise that either starts from.
"""

import functools
import json
import re
import shutil

import pytest

pytest.importorskip("diffusers")

import diffusers_models
import diffusers_pipelines
import torch
from diffusers_models import TINY
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from potstill.engine.common.errors import UserError
from potstill.engine.diffusion.sampling import Sampler, one_step
from potstill.engine.diffusion.tables import CAP
from potstill.engine.export import main
from potstill.engine.formats.pipeline import LORA as LORA_FILE
from potstill.engine.formats.pipeline import write_pipeline
from potstill.engine.models.student import Student
from potstill.engine.models.weights import save_net
from potstill.engine.nets.diffusers import DiffusersDenoiser
from potstill.engine.nets.families import family_of
from potstill.engine.nets.lora import LoraConfig, with_adapters

# EulerDiscreteScheduler gives NumPy a tensor; what is asked of an array NumPy 2 then warns that it lacks.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning:diffusers")

PROMPT = "a photo of a cat"  # the card's
PACKED = ("flux", "qwen", "flux2")  # their pipelines' states are tokens


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Kind -> the folder of its pipeline; once for each."""

    @functools.cache
    def teacher(kind, **changes):
        files = diffusers_models if kind == "unet_classes" else diffusers_pipelines
        return files.folder(kind, tmp_path_factory.mktemp("teacher") / kind, **changes)

    return teacher


def student(teacher, size=(8, 8)):
    """A net whose every weight is another than its teacher's."""
    net = DiffusersDenoiser.from_folder(teacher, size=(2, *size) if "wan" in teacher.name else size)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1.1)
    return net


def as_state(kind, tokens):
    """A pipeline's tokens [N, L, C'] as the state [N, C, H, W] of a square picture; of FLUX.1 and Qwen-Image by a function of diffusers."""
    from diffusers import FluxPipeline

    side = int(tokens.shape[1] ** 0.5)
    if kind == "flux2":
        return tokens.transpose(1, 2).unflatten(2, (side, side))
    return FluxPipeline._unpack_latents(tokens, 2 * side, 2 * side, 1)


class Noise:
    """Standard normals as a pipeline draws them: the first of a sample's shape, the others of its state's."""

    def __init__(self, kind):
        self.kind, self.first = kind, True

    def normal(self, *shape):
        first, self.first = self.first, False
        if first or self.kind not in PACKED:
            return torch.randn(1, *shape)
        c, height, width = shape
        return as_state(
            self.kind, torch.randn(1, height * width // 4, 4 * c) if self.kind != "flux2" else torch.randn(1, height * width, c)
        )


@functools.cache
def embedded(teacher, name):
    """The card's prompt by the teacher's own pipeline."""
    import diffusers

    return family_of(name).encode(diffusers.DiffusionPipeline.from_pretrained(teacher), [PROMPT])


def expected(kind, net, sampler, teacher):
    """Our own sampling of the card's prompt, or of class 0, after seed 0."""
    condition = embedded(teacher, type(net.model).__name__) if net.text else torch.eye(net.label_dim)[:1] if net.label_dim else None
    torch.manual_seed(0)
    with torch.no_grad():
        return sampler(net, condition, Noise(kind))


def card_code(use, folder):
    """The card's lines of Python, of which the last calls the pipeline."""
    code = re.search(r"```python\n(.*?)\n```", use, re.DOTALL).group(1).replace('"."', repr(str(folder)))
    return code.splitlines()


def called(kind, lines, swap=None):
    """The latents of the card's lines after seed 0, as [N, C, H, W]. swap: what is done to the pipeline before."""
    names = {}
    exec("\n".join(lines[:-1]), names)
    pipe, seen = names["pipe"], []
    pipe.set_progress_bar_config(disable=True)
    if swap:
        swap(pipe)
    call = re.fullmatch(r"(images|frames) = pipe\((.*)\)\.\1", lines[-1]).group(2)
    call = re.sub(r"class_labels=\[.*?\]", "class_labels=[0]", call).replace("batch_size=4", "batch_size=1")
    if TINY[kind].text:
        call += ', output_type="latent"'
    elif TINY[kind].classes and kind == "dit":
        pipe.vae.decode = lambda z, decode=pipe.vae.decode: (seen.append(z * pipe.vae.config.scaling_factor), decode(z))[1]
    else:
        call += ", callback=lambda i, t, x: seen.append(x)"
    torch.manual_seed(0)
    out = eval(f"pipe({call}, return_dict=False)[0]", names | {"seen": seen})
    out = seen[-1] if seen else out
    return as_state(kind, out) if kind in PACKED else out


def distance(x, wanted):
    return ((x - wanted).abs().max() / wanted.abs().max()).nan_to_num(torch.inf).item()


def exported(kind, net, sampler, teacher, folder):
    folder.mkdir()
    told, use = write_pipeline(net, sampler, folder, teacher, PROMPT)
    return told, card_code(use, folder)


def level(time):
    return lambda net: net.table[time].item()


def unit(*times):
    """Noise of unit variance at these timesteps, and fresh noise between them."""
    return lambda net: Sampler("renoise", [net.table[time].item() for time in times], start="unit")


def flow(*times, solver="renoise", start="unit"):
    return lambda net: Sampler(solver, [min(t / (1 - t), CAP) if t < 1 else CAP for t in times], start=start)


def walk(*times, end=0.0, **more):
    return lambda net: Sampler("euler", [*(net.table[time].item() for time in times), end], **more)


STOCK = {
    "sd15 at σ z": ("sd15", lambda net: one_step(net.table[625].item()), {}),
    "sd15 between two levels": ("sd15", lambda net: one_step(2.5), {}),
    "sd15 at unit z": ("sd15", unit(399), {}),
    "sd15 in four": ("sd15", unit(999, 749, 499, 249), {}),
    "sd15 in four others": ("sd15", unit(999, 759, 499, 259), {}),
    "sd15 walk": ("sd15", walk(999, 700, 300, end=0.1), {}),
    "sd15 walk to its net's lowest": ("sd15", lambda net: Sampler("euler", net.table[[800, 2, 1]].tolist()), {}),
    "sd15 walk to 0": ("sd15", walk(900, 100, start="unit"), {}),
    "sd21": ("sd21", unit(999), {}),
    "sd21 without any signal": ("sd21", unit(999, 499), {"rescale_betas_zero_snr": True}),
    "sdxl": ("sdxl", unit(399), {}),
    "sdxl in four": ("sdxl", unit(999, 749, 499, 249), {}),
    "pixart": ("pixart", lambda net: one_step(2.5), {}),
    "pixart at unit z": ("pixart", unit(400), {}),
    "pixart that is told the size": ("pixart_1024", unit(400), {}),
    "dit": ("dit", unit(700), {}),
    "dit in two": ("dit", unit(999, 499), {}),
    "unet": ("unet", lambda net: one_step(net.table[500].item()), {}),
    "unet with classes": ("unet_classes", unit(999, 499), {}),
}
for name in ("sd3", "flux", "sana", "qwen", "flux2", "zimage", "lumina2"):
    STOCK[name] = name, flow(1), {}
for name in ("sd3", "flux", "qwen", "flux2"):
    STOCK[f"{name} in four"] = name, flow(1, 0.75, 0.5, 0.25), {}
STOCK["flux in four, shifted"] = "flux", flow(1, 0.9, 0.75, 0.5), {}
STOCK["flux from σ z"] = "flux", flow(1, start="sigma"), {}
STOCK["sd3 in uneven ones from t = 0.7"] = "sd3", flow(0.7, 0.6, 0.2), {}
STOCK["sd3 walk"] = "sd3", flow(1, 0.6, 0.2, 0, solver="euler"), {}
STOCK["wan"] = "wan", flow(1), {}
OWN = {
    "sd15 posterior": ("sd15", lambda net: Sampler("ancestral", [net.table[t].item() for t in (999, 600, 200)]), {}),
    "sd15 in two from σ z": ("sd15", lambda net: Sampler("renoise", [net.table[t].item() for t in (800, 200)]), {}),
    "sd15 walk from the lowest level": ("sd15", lambda net: Sampler("euler", net.table[[800, 0, 0]].tolist()), {}),
    "sd15 analytical first step": ("sd15", walk(999, 700, 300, end=0.1, afs=True), {}),
    "sdxl posterior": ("sdxl", lambda net: Sampler("ancestral", [net.table[t].item() for t in (999, 200)], start="unit"), {}),
    "dit in uneven ones": ("dit", unit(700, 300), {}),
    "dit at σ z": ("dit", lambda net: one_step(net.table[500].item()), {}),
    "unet posterior": ("unet", lambda net: Sampler("ancestral", [net.table[t].item() for t in (999, 200)]), {}),
    "pixart as a flow": ("pixart", flow(1, 0.5), {"prediction_type": "flow_prediction", "use_flow_sigmas": True}),
    "pixart as a flow in one": ("pixart", flow(5 / 7, start="sigma"), {"prediction_type": "flow_prediction", "use_flow_sigmas": True}),
    "pixart for images": ("pixart", lambda net: one_step(2.5), {"prediction_type": "sample"}),
    "wan in four": ("wan", flow(1, 0.75, 0.5, 0.25), {}),
}
for name in ("sd3", "flux", "qwen", "flux2", "lumina2", "wan"):
    OWN[f"{name} at σ z"] = name, flow(5 / 7, start="sigma"), {}
OWN["flux posterior"] = "flux", flow(1, 0.5, solver="ancestral"), {}


@pytest.mark.parametrize("case", STOCK)
def test_a_stock_pipeline_makes_the_students_latents(case, teachers, tmp_path):
    kind, sampler, changes = STOCK[case]
    teacher = teachers(kind, **changes)
    net = student(teacher)
    sampler = sampler(net)
    told, lines = exported(kind, net, sampler, teacher, tmp_path / "out")
    assert "trust_remote_code" not in " ".join(lines) + told
    assert not list((tmp_path / "out").rglob("*.py"))
    wanted = expected(kind, net, sampler, teacher)
    assert distance(called(kind, lines), wanted) <= (3e-5 if case == "flux from σ z" else 1e-5)  # CAP z is no pure noise


@pytest.mark.parametrize("case", OWN)
def test_a_scheduler_of_ours_does_what_no_stock_one_can(case, teachers, tmp_path):
    kind, sampler, changes = OWN[case]
    teacher = teachers(kind, **changes)
    net = student(teacher)
    sampler = sampler(net)
    told, lines = exported(kind, net, sampler, teacher, tmp_path / "out")
    assert "trust_remote_code" in told
    wanted = expected(kind, net, sampler, teacher)
    assert distance(called(kind, lines), wanted) <= 1e-5


@pytest.mark.parametrize("kind", ["sd15", "sd21", "sdxl", "pixart", "dit", "sd3", "flux", "sana", "qwen", "zimage"])
def test_the_teachers_own_scheduler_makes_something_else(kind, teachers, tmp_path):
    teacher = teachers(kind)
    net = student(teacher)
    one = unit(999, 499) if kind == "pixart" else unit(399)  # whose pipeline with its own scheduler fails at a single step
    sampler = (flow(1, 0.75, 0.5, 0.25) if net.flow else one)(net)
    _, lines = exported(kind, net, sampler, teacher, tmp_path / "out")
    wanted = expected(kind, net, sampler, teacher)

    def swap(pipe):
        pipe.scheduler = diffusers_models.scheduler(kind)

    assert distance(called(kind, lines), wanted) <= 1e-5
    assert distance(called(kind, lines, swap), wanted) > 0.01


LORA = ["sd15", "sdxl", "sd3", "flux", "sana", "qwen", "flux2", "zimage", "lumina2", "wan", "pixart", "dit", "unet"]


def adapted(teacher, **settings):
    """A student of adapters alone, whose B are no zeros."""
    net = with_adapters(DiffusersDenoiser.from_folder(teacher, size=(2, 8, 8) if "wan" in teacher.name else (8, 8)), LoraConfig(**settings))
    net.source = str(teacher)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad:
                p.normal_(std=0.2)
    return net.eval()


@pytest.mark.parametrize("kind", LORA)
def test_adapters_are_read_with_the_strength_that_they_were_trained_with(kind, teachers, tmp_path):
    teacher = teachers(kind)
    net = adapted(teacher, rank=4, alpha=10)
    sampler = (flow(1) if net.flow else unit(999, 499))(net)
    told, lines = exported(kind, net, sampler, teacher, tmp_path / "out")
    assert "adapters" in told and not list((tmp_path / "out").rglob("*.bin"))
    wanted = expected(kind, net, sampler, teacher)
    plain = expected(kind, DiffusersDenoiser.from_folder(teacher, size=net.shape[1:]), sampler, teacher)
    assert distance(plain, wanted) > 0.01
    assert distance(called(kind, lines), wanted) <= 1e-5


def test_adapters_without_the_files_metadata_are_the_same(teachers, tmp_path):
    """As readers see them that take alpha for the rank; saved as they are trained, they would be others."""
    from diffusers import StableDiffusionPipeline
    from peft import get_peft_model_state_dict

    teacher = teachers("sd15")
    net = adapted(teacher, rank=4, alpha=10)
    sampler = unit(999)(net)
    _, lines = exported("sd15", net, sampler, teacher, tmp_path / "out")
    wanted = expected("sd15", net, sampler, teacher)
    tensors, file = load_file(tmp_path / "out" / LORA_FILE), tmp_path / "out" / LORA_FILE
    with safe_open(file, "pt") as read:
        assert json.loads(read.metadata()["lora_adapter_metadata"])["unet.lora_alpha"] == 4
    save_file(tensors, file)
    assert distance(called("sd15", lines), wanted) <= 1e-5
    StableDiffusionPipeline.save_lora_weights(tmp_path / "out", unet_lora_layers=get_peft_model_state_dict(net.model))
    assert distance(called("sd15", lines), wanted) > 0.01


def test_adapters_that_no_stock_scheduler_samples_are_added_to_the_weights(teachers, tmp_path):
    teacher = teachers("sd15")
    net = adapted(teacher, rank=4, alpha=10)
    sampler = Sampler("ancestral", [net.table[t].item() for t in (999, 200)])
    told, lines = exported("sd15", net, sampler, teacher, tmp_path / "out")
    assert "trust_remote_code" in told
    assert distance(called("sd15", lines), expected("sd15", net, sampler, teacher)) <= 1e-5


def test_a_picture_is_as_large_as_what_the_student_makes(teachers, tmp_path):
    teacher = teachers("sdxl")
    net = student(teacher, (8, 12))
    _, lines = exported("sdxl", net, unit(399)(net), teacher, tmp_path / "out")
    assert "height=64, width=96" in lines[-1]
    assert distance(called("sdxl", lines), expected("sdxl", net, unit(399)(net), teacher)) <= 1e-5


def test_our_scheduler_takes_no_other_number_of_steps(teachers, tmp_path):
    teacher = teachers("sd3")
    net = student(teacher)
    _, lines = exported("sd3", net, flow(1, 0.5, solver="ancestral")(net), teacher, tmp_path / "out")
    with pytest.raises(ValueError, match="num_inference_steps=2, got 28"):
        called("sd3", [*lines[:-1], lines[-1].replace("num_inference_steps=2, ", "")])


# potstill export


def run_folder(path, net, sampler, teacher):
    """What potstill train leaves behind, as far as an export reads it."""
    path.mkdir()
    save_net(path / "student.safetensors", net, method="dmd", data="captions", sampler=sampler.to_dict())
    (path / "config.yaml").write_text(f"teacher:\n  checkpoint: {teacher}\n")
    return path / "student.safetensors"


def export(*arguments):
    main([str(a) for a in arguments])


def test_the_command_writes_a_folder_whose_card_is_true(teachers, tmp_path, capsys):
    teacher = teachers("sd15")
    net = student(teacher)
    file = run_folder(tmp_path / "run", net, unit(999)(net), teacher)
    export(file, "--to", "diffusers", "--out", tmp_path / "out")
    assert "a plain StableDiffusionPipeline with LCMScheduler, no code in it" in capsys.readouterr().err
    card = (tmp_path / "out/README.md").read_text()
    assert "pipeline_tag: text-to-image" in card
    assert distance(called("sd15", card_code(card, tmp_path / "out")), expected("sd15", net, unit(999)(net), teacher)) <= 1e-5


def test_pickles_beside_safetensors_stay_behind(teachers, tmp_path):
    net = student(teachers("sd15"))
    shutil.copytree(teachers("sd15"), tmp_path / "teacher")
    (tmp_path / "teacher/text_encoder/pytorch_model.bin").write_bytes(b"code")
    exported("sd15", net, unit(999)(net), tmp_path / "teacher", tmp_path / "out")
    assert (tmp_path / "out/text_encoder/model.safetensors").is_file()
    assert not list((tmp_path / "out").rglob("*.bin"))


def test_the_command_knows_the_pipeline_of_adapters(teachers, tmp_path):
    teacher = teachers("flux")
    net = adapted(teacher, rank=4, alpha=1)
    net.source = "elsewhere/flux"
    file = run_folder(tmp_path / "run", net, flow(1)(net), "elsewhere/flux")
    assert "which is not at elsewhere/flux" in refused(file, "--to", "diffusers", "--out", tmp_path / "out")
    export(file, "--to", "diffusers", "--out", tmp_path / "out", "--pipeline", teacher)
    card = (tmp_path / "out/README.md").read_text()
    assert distance(called("flux", card_code(card, tmp_path / "out")), expected("flux", net, flow(1)(net), teacher)) <= 1e-5


@pytest.mark.parametrize("kind", ["sd15", "dit", "unet"])
def test_weight_files_and_hub_folders_hold_the_same_student(kind, teachers, tmp_path):
    teacher = teachers(kind)
    net = student(teacher)
    file = run_folder(tmp_path / "run", net, unit(999)(net), teacher)
    wanted = expected(kind, net, unit(999)(net), teacher)
    for to in ("safetensors", "hub"):
        export(file, "--to", to, "--out", tmp_path / to)
        code = card_code((tmp_path / to / "README.md").read_text(), tmp_path / to)
        assert re.search("prompts" if net.text else "classes" if net.label_dim else r"noise_shape\)\)", code[-1])
        loaded = Student.from_pretrained(tmp_path / to)
        condition = embedded(teacher, type(net.model).__name__) if net.text else torch.tensor([0]) if net.label_dim else None
        torch.manual_seed(0)
        assert distance(loaded.generate(torch.randn(1, *net.shape), condition), wanted) <= 1e-6


# What cannot be


def refused(*arguments):
    with pytest.raises(UserError) as caught:
        export(*arguments)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def test_what_cannot_be_exported_is_one_sentence(teachers, tmp_path):
    teacher = teachers("sd15")
    net = student(teacher)
    file = run_folder(tmp_path / "run", net, unit(999)(net), "")
    to = ("--to", "diffusers", "--out", tmp_path / "out")
    assert "its run does not name: --pipeline FOLDER" in refused(file, *to)
    assert "is no folder of a diffusers pipeline" in refused(file, *to, "--pipeline", tmp_path)
    assert "has 0 parts of the class UNet2DConditionModel" in refused(file, *to, "--pipeline", teachers("sd3"))
    assert "--to diffusers" in refused(file, "--to", "onnx", "--out", tmp_path / "out")
    heun = run_folder(tmp_path / "heun", net, Sampler("heun", [10.0, 1.0, 0.0]), teacher)
    assert "this student by heun" in refused(heun, *to)
    assert not (tmp_path / "out").exists()


def test_a_pipeline_that_is_not_whole_is_one_sentence(teachers, tmp_path):
    net = student(teachers("sd15"))
    file = run_folder(tmp_path / "run", net, unit(999)(net), tmp_path / "teacher")
    to = ("--to", "diffusers", "--out", tmp_path / "out")

    def broken(name, change):
        path = tmp_path / name
        shutil.copytree(teachers("sd15"), path)
        index = json.loads((path / "model_index.json").read_text())
        change(path, index)
        (path / "model_index.json").write_text(json.dumps(index))
        return refused(file, *to, "--pipeline", path)

    assert "has no vae, which StableDiffusionPipeline is made of" in broken("a", lambda path, index: index.pop("vae"))
    assert "has no tokenizer/" in broken("b", lambda path, index: shutil.rmtree(path / "tokenizer"))
    pickled = broken("c", lambda path, index: (path / "vae/diffusion_pytorch_model.safetensors").rename(path / "vae/vae.bin"))
    assert "vae has no weights as safetensors (vae.bin is not read)" in pickled
    assert "code of its own" in broken("d", lambda path, index: index.update(_class_name=["pipeline", "Own"]))
    assert "which diffusers" in broken("e", lambda path, index: index.update(_class_name="TomorrowPipeline"))
