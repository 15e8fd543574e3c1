"""Whole runs with teachers from diffusers through the command's own entry: what they leave behind, how they go on, what they refuse.

Pipelines are tiny, random and made here (diffusers_pipelines.py).
"""

import json
import shutil
import sys
from functools import cache

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("diffusers")

import diffusers_pipelines
import torch
from diffusers_pipelines import WORDS
from killing import killed, killed_in, needs_fork
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_pipeline_export import called, card_code, distance, embedded, expected

from potstill.__main__ import main as potstill
from potstill.engine.common.errors import UserError
from potstill.engine.export import main as export
from potstill.engine.jobs.finish import Gallery
from potstill.engine.jobs.job import Job
from potstill.engine.models.student import Student
from potstill.engine.models.weights import save_net
from potstill.engine.nets.edm import from_kwargs
from potstill.engine.nets.lora import LoraConfig, check_lora
from potstill.engine.train import main as train

# What libraries warn of while they import one another, and of where they are put together here.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(?!potstill)", "ignore::FutureWarning:(?!potstill)"),
    # EulerDiscreteScheduler gives NumPy a tensor; what is asked of an array NumPy 2 then warns that it lacks.
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning:diffusers"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A recipe of four iterations with two samples each, and prompts, more than a batch."""
    folder = tmp_path_factory.mktemp("runs")
    diffusers_pipelines.write_recipe(folder, train="kimg: 0.008, grid_kimg: 0.008, checkpoint_kimg: 0.004")
    return folder


def recipe_of(place, method, **settings):
    """The same recipe with another method and settings of its own."""
    own = json.dumps(settings)
    text = (place / "tiny.yaml").read_text().replace("method: dmd", f"method: {method}")
    (place / f"{method}.yaml").write_text(text.replace("method: {steps: [999], fake_per_student: 2}", f"method: {own}"))
    return place / f"{method}.yaml"


def run(place, name, teacher, *more, text=True):
    """A finished run's folder."""
    folder = place / name
    prompts = [f"text.prompts={place}/prompts.txt"] if text else []
    train([str(place / "tiny.yaml"), f"run_dir={folder}", f"teacher.checkpoint={teacher}", *prompts, *more])
    return folder


@pytest.fixture(autouse=True)
def few_pictures(monkeypatch):
    monkeypatch.setattr(Gallery, "count", 10)


# Runs


@pytest.fixture(scope="module")
def finished(place, pipelines):
    """Folders of finished runs by the kind of their teacher, made when they are asked for."""

    @cache
    def folder(kind):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Gallery, "count", 10)
            teacher = pipelines("sd15" if kind == "lora" else kind)
            return run(place, kind, teacher, *KINDS[kind], text=kind not in ("dit", "unet"))

    return folder


UNIT = ["method.start=unit"]
KINDS = {"sd15": ["method.guidance=2"], "dit": [], "unet": [], "pixart": ["method.steps=[400]", *UNIT], "sd3": UNIT, "flux": UNIT}
KINDS["lora"] = ["lora.rank=2", "lora.alpha=5"]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lora"])
def test_a_run_ends_as_a_pipeline_that_plain_diffusers_loads(kind, place, pipelines, finished):
    folder, out = finished(kind), place / f"{kind}-out"
    export([str(folder), "--to", "diffusers", "--out", str(out)])
    loaded = Student.from_pretrained(folder)
    first = load_file(folder / "student.safetensors")
    assert any((first[name] - tensor).any() for name, tensor in loaded_weights(kind, pipelines).items()), "nothing was learnt"
    wanted = expected(kind, loaded.net, loaded.sampler, pipelines(kind))
    assert distance(called(kind, card_code((out / "README.md").read_text(), out)), wanted) <= 1e-5
    condition = embedded(pipelines(kind), type(loaded.net.model).__name__) if loaded.net.text else None
    if loaded.net.label_dim:
        condition = torch.tensor([0])
    if kind != "flux":  # whose pipeline draws other numbers
        torch.manual_seed(0)
        assert distance(loaded.generate(torch.randn(1, *loaded.noise_shape), condition), wanted) <= 1e-5
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["student"]["nfe"] == 1 and (folder / "samples.png").is_file()


def loaded_weights(kind, pipelines):
    (file,) = (
        pipelines(kind).glob("[tu]*er/diff*.safetensors") if kind not in ("sd15", "unet") else pipelines(kind).glob("unet/*.safetensors")
    )
    return {f"model.{name}": tensor for name, tensor in load_file(file).items()}


def test_a_finished_run_does_nothing(place, pipelines, finished):
    folder = finished("sd15")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    files = load_file(folder / "student.safetensors")
    run(place, "sd15", pipelines("sd15"), *KINDS["sd15"])
    assert before.keys() == set(folder.rglob("*.safetensors"))
    assert all((files[name] == tensor).all() for name, tensor in load_file(folder / "student.safetensors").items())
    assert before[folder / "text/null.safetensors"] == (folder / "text/null.safetensors").stat().st_mtime_ns


def test_a_run_is_drawn_and_measured_by_its_folder(place, pipelines, finished, tmp_path, capsys):
    for k, kind in enumerate(("sd15", "dit", "unet")):
        out = tmp_path / f"{kind}.npz"
        potstill(["sample", str(finished(kind)), "--seeds", "0-2", "--out", str(out)])
        images = np.load(out)["images"]
        assert images.shape == ((3, 64, 64, 3) if k < 2 else (3, 8, 8, 3)), images.shape
    prompts, images = ["a cat", "snow"], []
    (tmp_path / "two.txt").write_text("\n".join(prompts))
    for given in (*prompts, str(tmp_path / "two.txt")):
        potstill(["sample", str(finished("sd15")), "--prompts", given, "--seeds", "0-1", "--out", str(tmp_path / "x.npz")])
        images.append(np.load(tmp_path / "x.npz")["images"].astype(int))
        (tmp_path / "x.npz").unlink()
    assert abs(images[0][0] - images[2][0]).max() <= 1 and abs(images[1][1] - images[2][1]).max() <= 1
    capsys.readouterr()
    for arguments, words in {
        ("sample", str(finished("dit")), "--prompts", "a", "--out", "x.png"): "is told no prompts",
        ("evaluate", str(finished("sd15"))): "wanted --data",
        ("probe", str(finished("sd15") / "student.safetensors"), "--data", "digits", "--out", str(tmp_path / "plan.json")): "EDM's U-Nets",
        ("compare", str(place / "tiny.yaml"), f"run_dir={tmp_path}/c", f"teacher.checkpoint={pipelines('sd15')}"): "potstill train each recipe",
        ("train", str(place / "tiny.yaml"), "rehearse=true", f"teacher.checkpoint={pipelines('sd15')}"): "is a pipeline",
    }.items():  # fmt: skip
        with pytest.raises(SystemExit) as stopped:
            potstill(list(arguments))
        assert stopped.value.code == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_prompts_that_are_embedded_as_the_run_goes_give_the_same_student(place, pipelines):
    """A cache keeps 16 bit, which bfloat16's embeddings are: the two are the same numbers."""
    students = []
    for how in ("cached", "live"):
        folder = run(place, f"how-{how}", pipelines("sd15"), f"text.how={how}", "text.precision=bf16", "text.batch=2")
        assert (folder / "text").exists() == (how == "cached")
        students.append(load_file(folder / "student.safetensors"))
    assert all(distance(students[0][name], students[1][name]) <= 1e-3 for name in students[0])


def same(one, other):
    a, b = (load_file(folder / "student.safetensors") for folder in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@needs_fork
@pytest.mark.parametrize("kind", ["sd15", "lora"])
def test_a_run_that_is_killed_goes_on_exactly(kind, place, pipelines, finished):
    straight, more = finished(kind), KINDS[kind]
    folder = place / f"killed-{kind}"
    killed_in(lambda: run(place, folder.name, pipelines("sd15"), *more), 4)
    assert not (folder / "student.safetensors").exists() and list((folder / "checkpoints").iterdir())
    run(place, folder.name, pipelines("sd15"), *more)
    assert same(straight, folder)


@needs_fork
def test_a_run_that_is_killed_while_it_embeds_goes_on(place, pipelines, finished):
    folder = place / "embeds"
    killed(lambda: run(place, "embeds", pipelines("sd15"), *KINDS["sd15"]), 2)
    assert (folder / "text").is_dir() and not (folder / "checkpoints").exists()
    run(place, "embeds", pipelines("sd15"), *KINDS["sd15"])
    assert same(finished("sd15"), folder)


def test_adapters_are_a_small_file_and_a_start_for_others(place, pipelines, finished):
    first = finished("lora")
    with safe_open(first / "student.safetensors", "pt") as file:
        assert all("lora_" in name for name in file.keys())  # noqa: SIM118
    second = run(place, "lora-2", pipelines("sd15"), "lora.rank=2", "lora.alpha=5", f"students.start={first}")
    assert not same(first, second)
    export([str(second), "--to", "diffusers", "--out", str(place / "lora-out")])
    loaded = Student.from_pretrained(second)
    wanted = expected("sd15", loaded.net, loaded.sampler, pipelines("sd15"))
    code = card_code((place / "lora-out/README.md").read_text(), place / "lora-out")
    assert distance(called("sd15", code), wanted) <= 1e-5


def test_a_teacher_of_16_bit_has_students_of_32(place, pipelines, monkeypatch):
    seen, stage = {}, Job.stage

    def noted(self, method, *arguments, **more):
        seen.update({name: {p.dtype for p in net.parameters()} for name, net in method.nets.items()})
        seen["teacher"] = {p.dtype for p in method.teacher.parameters()}
        seen["start"] = {name: p.detach().clone() for name, p in method.nets["student"].named_parameters()}
        return stage(self, method, *arguments, **more)

    monkeypatch.setattr(Job, "stage", noted)
    folder = run(place, "bf16", pipelines("sd15"), "teacher.precision=bf16", *KINDS["sd15"])
    assert seen["teacher"] == {torch.bfloat16} and seen["student"] == seen["fake"] == {torch.float32}
    assert all(torch.equal(seen["start"][name], tensor) for name, tensor in loaded_weights("sd15", pipelines).items())
    tensors = load_file(folder / "student.safetensors")
    assert all(t.dtype is torch.float32 and t.isfinite().all() for t in tensors.values())


# Latents


@pytest.fixture(scope="module")
def latents(place, pipelines):
    """Of 12 pictures 64 x 64, with a caption for each."""
    (place / "captions.txt").write_text("\n".join(f"{WORDS[i % 7]} {i}" for i in range(12)))
    pictures = place / "pictures"
    pictures.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    for i, image in enumerate(noise):
        Image.fromarray(image).save(pictures / f"{i:02}.png")
    for name, more in {"latents": ["--captions", str(place / "captions.txt")], "plain": []}.items():
        potstill(["convert", "latents", str(pictures), str(place / name), "--pipeline", str(pipelines("sd15")), "--device", "cpu", *more])
    return place / "latents"


LOOKING = {
    "dmd2": ["method.gan=true"],
    "moments": [],
    "captions alone": ["method.gan=true", "text.prompts=null"],
}


@pytest.mark.parametrize("case", LOOKING)
def test_a_run_on_latents_is_measured_on_pictures(case, place, pipelines, latents, capsys):
    moments = recipe_of(place, "moment_matching", steps=2, levels="own", weight="own", guidance=2)
    name, more = (moments if case == "moments" else place / "tiny.yaml"), LOOKING[case]
    folder, prompts = place / f"on-{case.replace(' ', '-')}", f"text.prompts={place}/prompts.txt"
    given = [
        str(name),
        f"run_dir={folder}",
        f"teacher.checkpoint={pipelines('sd15')}",
        f"data.path={latents}",
        "eval.batch=8",
        prompts,
        *more,
    ]
    train(given)
    summary = json.loads((folder / "summary.json").read_text())
    for role in ("student", "teacher"):
        assert 0 < summary[role]["fd"] < float("inf")
        assert summary[role]["num_features"] == 3 * 16 * 16 and summary[role]["labels"] == "prompts"
    with Image.open(folder / "samples.png") as sheet:
        assert sheet.width > 10 * 64
    assert (folder / "text-captions").is_dir() == (case == "dmd2" or case == "moments")
    capsys.readouterr()
    potstill(["evaluate", str(folder), "--device", "cpu"])
    found = json.loads(capsys.readouterr().out)
    assert found["student"]["fd"] == pytest.approx(summary["student"]["fd"], rel=1e-4)
    captions = latents / "captions.jsonl"
    before = captions.read_text()
    try:
        captions.write_text(before.replace("cat", "cow"))
        with pytest.raises(UserError, match=f"begun with another file of {'prompts' if case == 'captions alone' else 'captions'}"):
            train([*given, "--dry-run"])
        captions.write_text(before.partition("\n")[2])
        with pytest.raises(UserError, match=r"captions\.jsonl has 11 captions, wanted one for each of the 12 latents"):
            train([*given, f"run_dir={folder}-fewer"])
    finally:
        captions.write_text(before)


def test_a_data_free_run_of_sim(place, pipelines):
    recipe = recipe_of(place, "sim", levels="own")
    folder = place / "sim"
    train([str(recipe), f"run_dir={folder}", f"teacher.checkpoint={pipelines('sd15')}", f"text.prompts={place}/prompts.txt"])
    assert all(t.isfinite().all() for t in load_file(folder / "student.safetensors").values())


# Inputs that are others by now


@pytest.mark.parametrize("how", ["cached", "live"])
def test_a_run_goes_on_with_the_prompts_and_the_pipeline_it_began_with(how, place, pipelines, tmp_path):
    teacher = shutil.copytree(pipelines("sd15"), tmp_path / "sd15")
    words = tmp_path / "words.txt"
    words.write_text("\n".join(WORDS))
    given = (tmp_path, "run", teacher, f"text.prompts={words}", f"text.how={how}")
    (tmp_path / "tiny.yaml").write_text((place / "tiny.yaml").read_text())
    run(*given, text=False)
    finished_as = (tmp_path / "run/student.safetensors").read_bytes()
    words.write_text("\n".join(reversed(WORDS)))
    with pytest.raises(UserError, match="begun with another file of prompts"):
        run(*given, text=False)
    words.write_text("\n".join(WORDS))
    for part in ("unet", "text_encoder", "tokenizer"):
        other = diffusers_pipelines.pipeline("sd15", seed=5)
        shutil.move(teacher / part, tmp_path / "kept")
        getattr(other, part).save_pretrained(teacher / part)
        if part == "tokenizer":
            (teacher / part / "tokenizer_config.json").write_text('{"model_max_length": 15}')
        with pytest.raises(UserError, match=f"begun with another {'teacher' if part == 'unet' else 'text encoder'}"):
            run(*given, text=False)
        shutil.rmtree(teacher / part)
        shutil.move(tmp_path / "kept", teacher / part)
    assert (tmp_path / "run/student.safetensors").read_bytes() == finished_as
    run(*given, "text.batch=3", text=False)


# What cannot be


@pytest.fixture
def refused(place, tmp_path, capsys):
    """The sentence of a run that ends with exit code 2 and has written nothing."""

    def sentence(teacher, *more, text=True, recipe=None):
        given = [f"text.prompts={place}/prompts.txt"] if text else []
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as stopped:
            potstill(
                ["train", str(recipe or place / "tiny.yaml"), f"run_dir={tmp_path}/run", f"teacher.checkpoint={teacher}", *given, *more]
            )
        assert stopped.value.code == 2
        said = capsys.readouterr().err.splitlines()
        (line,) = [i for i, one in enumerate(said) if one.startswith("error: ")]
        assert sorted(tmp_path.rglob("*")) == before
        return "\n".join(said[line:]).removeprefix("error: ")

    return sentence


@pytest.fixture(scope="module")
def changed(pipelines, tmp_path_factory):
    """A copy of SD's pipeline, with a change to its folder."""

    def copy(change):
        path = shutil.copytree(pipelines("sd15"), tmp_path_factory.mktemp("changed") / "sd15")
        change(path)
        return path

    return copy


def index(name, value):
    def change(path):
        file = path / "model_index.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))

    return change


FOLDERS = {
    "another class": (index("unet", ["diffusers", "UNetSpatioTemporalConditionModel"]), "UNetSpatioTemporalConditionModel"),
    "no class": (index("unet", ["diffusers", "TomorrowModel"]), "TomorrowModel"),
    "no table": (index("scheduler", ["diffusers", "RePaintScheduler"]), "RePaintScheduler"),
    "flow without table": (index("scheduler", ["diffusers", "VQDiffusionScheduler"]), "VQDiffusionScheduler"),
    "only pickles": (lambda path: (path / "unet/diffusion_pytorch_model.safetensors").rename(path / "unet/diffusion_pytorch_model.bin"), "no pickle is read"),
    "no index": (lambda path: (path / "model_index.json").unlink(), "no file or pipeline at"),
    "no text encoder": (index("text_encoder", [None, None]), "no text encoder"),
    "no weights of the text encoder": (lambda path: (path / "text_encoder/model.safetensors").unlink(), "text_encoder"),
    "no weights of the VAE": (lambda path: (path / "vae/diffusion_pytorch_model.safetensors").unlink(), "vae"),
    "code of its own": (index("text_encoder", ["own_code", "Encoder"]), "own_code"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_a_pipeline_that_is_none(case, changed, refused):
    change, words = FOLDERS[case]
    sentence = refused(changed(change))
    assert words in sentence


SETTINGS = {
    "no prompts": ("sd15", ["text.prompts=null"], "is told prompts: set text.prompts=FILE"),
    "prompts for classes": ("dit", [], "text.prompts is for teachers that are told prompts"),
    "prompts for none": ("unet", [], "text.prompts is for teachers that are told prompts"),
    "guidance that is embedded": ("flux", ["method.guidance=2"], "guidance"),
    "the fake's, too": ("flux", ["method.fake_guidance=2"], "guidance"),
    "regression": ("sd15", ["method.regression=0.5", "method.regression_metric=l2"], "method.regression"),
    "two students": ("sd15", ["students.count=2"], "students"),
    "no such way": ("sd15", ["text.how=liv"], "text.how wants one of cached, live, got 'liv'"),
    "a mistyped setting": ("sd15", ["text.promts=a"], "did you mean text.prompts"),
    "a size of one number": ("sd15", ["teacher.size=[8]"], "teacher.size"),
    "a size of three": ("sd15", ["teacher.size=[2,8,8]"], "size"),
    "an odd size of tokens": ("flux", ["teacher.size=[7,8]"], "size"),
    "pictures for latents": ("sd15", ["data.path=digits"], "potstill convert latents"),
    "pictures for latents of classes": ("dit", ["data.path=digits", "text.prompts=null"], "potstill convert latents"),
    "GAN without data": ("sd15", ["method.gan=true"], "data.path"),
    "length": ("sd15", ["text.max_length=7"], "text.max_length"),
    "adapters of no layer": ("sd15", ["lora.rank=2", "lora.targets=[to_x]"], "to_x"),
}  # fmt: skip


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_cannot_be(case, pipelines, refused):
    kind, more, words = SETTINGS[case]
    sentence = refused(pipelines(kind), *more)
    assert words in sentence


def test_data_that_cannot_be(place, pipelines, latents, changed, refused, tmp_path_factory):
    sd, folder = pipelines("sd15"), tmp_path_factory.mktemp("data")

    def made(name, *shape, factor=1.0):
        (folder / name).mkdir()
        save_file({"latents": factor * torch.randn(4, *shape)}, folder / name / "a.safetensors")
        return f"data.path={folder / name}"

    assert "has no captions: potstill convert latents" in refused(sd, "method.gan=true", f"data.path={place / 'plain'}")
    assert "standard deviation of 9" in refused(sd, made("loud", 4, 8, 8, factor=9.2))
    assert "standard deviation of 0.2" in refused(sd, made("quiet", 4, 8, 8, factor=0.2))
    assert "makes samples [4, 8, 8]" in refused(sd, made("large", 4, 16, 16))
    assert "teacher.size" in refused(sd, made("channels", 16, 8, 8))

    def scaled(path):
        file = path / "vae/config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"scaling_factor": 3.4}))

    assert "latents of another VAE" in refused(changed(scaled), f"data.path={latents}")


def test_prompts_that_cannot_be(pipelines, refused, tmp_path_factory, place, finished):
    sd, folder = pipelines("sd15"), tmp_path_factory.mktemp("prompts")
    (folder / "empty.txt").write_text("\n")
    assert "is empty, wanted at least one prompt" in refused(sd, f"text.prompts={folder}/empty.txt", text=False)
    assert "no prompts at" in refused(sd, f"text.prompts={folder}/none.txt", text=False)
    assert "holds prompts" in refused(pipelines("sd3"), f"text.cache={finished('sd15')}/text")
    assert "holds prompts" in refused(sd, f"text.cache={finished('sd15')}/text", "text.precision=bf16")


def test_what_is_for_nets_of_another_kind(pipelines, refused, tmp_path_factory, place):
    sd, folder = pipelines("sd15"), tmp_path_factory.mktemp("others")
    edm = from_kwargs("EDMPrecond", img_resolution=8, img_channels=1, model_type="SongUNet", model_channels=8, channel_mult=[1], num_blocks=1,
                      attn_resolutions=[])  # fmt: skip
    save_net(folder / "edm.safetensors", edm, kimg=1.0)
    assert "lora" in refused(folder / "edm.safetensors", "lora.rank=2", "method.steps=[]", text=False)
    assert "text.prompts is for teachers" in refused(folder / "edm.safetensors", "method.steps=[]")
    (folder / "plan.json").write_text("{}")
    assert "plan" in refused(sd, f"skipping.plan={folder}/plan.json")
    for method, words in {"sfd_v": "method.step_condition=true wants", "gdd": "data.path"}.items():
        assert words in refused(sd, recipe=recipe_of(place, method))


def test_a_hub_that_is_not_to_be_had(refused, monkeypatch, tmp_path_factory):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))
    sentence = refused("nobody/nothing")
    assert "no file or folder at nobody/nothing, and no pipeline of that name came from the hub" in sentence


@pytest.mark.parametrize("package", ["diffusers", "peft", "transformers"])
def test_without_the_extra(package, pipelines, refused, monkeypatch):
    teacher = pipelines("sd15")
    for place in ("nets.pipelines", "nets.lora"):
        monkeypatch.setattr(f"potstill.engine.{place}.installed", lambda name: name != package)
    sentence = refused(teacher, "lora.rank=2")
    assert f"package {package}" in sentence and "pip install 'potstill[diffusers]'" in sentence
    if package == "diffusers":  # which the hub's own package comes with
        monkeypatch.setitem(sys.modules, "huggingface_hub.errors", None)
        assert "package diffusers" in refused("nobody/nothing")


def test_shards_of_adapters():
    """Ranks are others' matter (test_parallel.py); the sentence is the one that they print."""
    with pytest.raises(UserError, match=r"train.parallel=fsdp cannot be had with lora.rank=2"):
        check_lora(LoraConfig(rank=2), "fsdp")
