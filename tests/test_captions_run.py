"""Whole runs whose teacher of text to image is trained in them, by the commands' own entry: what they leave behind, how they go on, and
what its training is, by hand.
"""

import io
import json
import random
import re
import shutil
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import diffusers
from killing import killed, killed_in, needs_fork
from safetensors.torch import load_file

from potstill.__main__ import main as potstill
from potstill.engine.common.errors import UserError
from potstill.engine.data import scenes
from potstill.engine.data.captions import read_prompts
from potstill.engine.data.images import open_images
from potstill.engine.diffusion.sampling import SeedNoise
from potstill.engine.formats.newborn import fresh_net
from potstill.engine.jobs.finish import Gallery
from potstill.engine.methods.base import Draws
from potstill.engine.methods.teacher import EDMLoss, Teacher
from potstill.engine.models.origins import load_origin
from potstill.engine.models.student import Student
from potstill.engine.models.weights import load_net
from potstill.engine.nets.conditions import Text
from potstill.engine.nets.discriminators import Critic
from potstill.engine.train import main as train

# What libraries warn of while they import one another, and of where they are put together here.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(?!potstill)", "ignore::FutureWarning:(?!potstill)"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning:diffusers"),
]
NET, CONFIG = "PixArtTransformer2DModel", {"num_attention_heads": 1, "attention_head_dim": 8, "num_layers": 2, "patch_size": 4}
NUMBER = 96  # pictures
TINY = [
    "device=cpu", "net.config={num_attention_heads: 1, attention_head_dim: 8, num_layers: 2, patch_size: 4}", "text.max_length=8",
    "teacher.loss.sampling_steps=2", "eval.n=24", "eval.scores=[scenes]", "eval.held_out=scenes", "teacher.train.kimg=0.016",
    "teacher.train.batch=4", "teacher.train.checkpoint_kimg=0.008", "train.kimg=0.008", "train.batch=2", "train.checkpoint_kimg=0.004",
    "train.grid_kimg=0.008", "teacher.train.grid_kimg=0.016",
]  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(Gallery, "count", 8)
    monkeypatch.setattr(scenes.drawn_scenes, "__defaults__", (NUMBER,))


def run(folder, *more, recipe="captions"):
    train([recipe, f"run_dir={folder}", *TINY, *more])
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Gallery, "count", 8)
        patch.setattr(scenes.drawn_scenes, "__defaults__", (NUMBER,))
        return run(tmp_path_factory.mktemp("runs") / "captions")


def same(one, other, name="student"):
    a, b = (load_file(folder / f"{name}.safetensors") for folder in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def captions():
    return [scenes.caption_of(scene) for scene in scenes.drawn_scenes()]


# What a run leaves behind


def test_a_run_trains_its_teacher_and_measures_both(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["real"]["scores"]["scenes/accuracy"] > 0.9
    for role, evaluations in (("teacher", 3), ("student", 1)):
        one = summary[role]
        assert one["nfe"] == evaluations and one["n"] == 24 and 0 < one["fd"] < float("inf") and one["labels"] == "prompts"
        assert 0 <= one["scores"]["scenes/accuracy"] <= 1 and 0 <= one["held_out"]["scores"]["scenes/accuracy"] <= 1
        assert one["held_out"]["n"] == 24 and "fd" not in one["held_out"]
    assert summary["images_seen"] == {"teacher": 16, "student": 8}
    assert (finished / "report.html").is_file() and (finished / "student.safetensors").is_file()
    assert read_prompts(finished / "captions.jsonl") == captions()
    held_out = read_prompts(finished / "held-out.jsonl")
    assert len(held_out) == 80 and not set(held_out) & set(captions())
    with Image.open(finished / "samples.png") as sheet:
        assert sheet.width > 3 * 4 * 112


def test_its_pipeline_is_the_teacher_bit_for_bit_and_a_second_run_goes_the_same_way(finished, tmp_path):
    teacher, own = load_origin(finished / "pipeline", size=(8, 16)), load_net(finished / "teacher.safetensors")[0]
    assert teacher.state_dict().keys() == own.state_dict().keys() and teacher.description() == own.description()
    assert all(torch.equal(tensor, own.state_dict()[name]) for name, tensor in teacher.state_dict().items())
    second = run(tmp_path / "second", f"teacher.checkpoint={finished}/pipeline")
    assert not (second / "pipeline").exists() and not (second / "teacher.safetensors").exists() and same(finished, second)
    first, again = (json.loads((folder / "summary.json").read_text()) for folder in (finished, second))
    for role in ("teacher", "student"):
        assert first[role]["fd"] == again[role]["fd"] and first[role]["held_out"]["scores"] == again[role]["held_out"]["scores"]


def test_a_finished_run_does_nothing(finished):
    before = {path: load_file(path) for path in finished.rglob("*.safetensors")}
    kept = {path: path.stat().st_mtime_ns for path in [*finished.glob("text*/*"), *finished.glob("*.jsonl"), *finished.glob("teacher.*")]}
    run(finished)
    assert before.keys() == set(finished.rglob("*.safetensors")) and len(kept) > 6
    assert all(torch.equal(tensor, load_file(path)[name]) for path, tensors in before.items() for name, tensor in tensors.items())
    assert [path.name for path, when in kept.items() if path.stat().st_mtime_ns != when] == []


def test_it_is_drawn_and_measured_by_its_folder(finished, tmp_path, capsys):
    asked = ["a three and a faint seven", "an eight on the left"]
    (tmp_path / "asked.txt").write_text("\n".join(asked))
    images = {}
    for role in ("student", "teacher"):
        out = tmp_path / f"{role}.npz"
        potstill(["sample", str(finished), "--which", role, "--prompts", str(tmp_path / "asked.txt"), "--seeds", "3-6", "--out", str(out)])
        images[role] = np.load(out)["images"]
        assert images[role].shape == (4, 8, 16, 1)
    made = Student(finished)(seeds=range(3, 7), prompts=2 * asked)
    assert torch.equal(made, Student.from_pretrained(finished)(seeds=range(3, 7), prompts=2 * asked))
    assert made.shape == (4, 1, 8, 16)
    np.testing.assert_array_equal(made.permute(0, 2, 3, 1).numpy(), images["student"])
    assert (images["student"] != images["teacher"]).any()
    capsys.readouterr()
    potstill(["evaluate", str(finished), "--device", "cpu"])
    found, summary = json.loads(capsys.readouterr().out), json.loads((finished / "summary.json").read_text())
    for role in ("student", "teacher"):
        assert found[role]["fd"] == pytest.approx(summary[role]["fd"], rel=1e-5)
        assert found[role]["scores"] == summary[role]["scores"]


# How it goes on


@needs_fork
def test_plain_diffusers_makes_the_students_images(finished, tmp_path):
    """The exported folder, its pipeline and its call as the model card has it, from the noise of the same seeds."""
    potstill(["export", str(finished), "--to", "diffusers", "--out", str(tmp_path / "out")])
    card = (tmp_path / "out/README.md").read_text()
    prompt, call = re.search(r"images = pipe\(prompt='([^']*)', (.*)\)\.images", card).groups()
    assert prompt == captions()[0], "one that this teacher has seen"
    asked, seeds = ["a three and a faint seven", "an eight on the left", "a faint zero and a one"], [3, 4, 5]
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out", local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    arguments = eval(f"dict({call})")
    made = pipe(prompt=asked, latents=SeedNoise(seeds).normal(1, 8, 16), output_type="np", **arguments).images
    wanted = Student(finished)(seeds=seeds, prompts=asked)
    assert wanted.float().std() > 10
    np.testing.assert_allclose(255 * made[..., 0], wanted[:, 0], atol=0.5 + 1e-3)
    again = diffusers.DiffusionPipeline.from_pretrained(finished / "pipeline", local_files_only=True)  # the teacher's own folder, too
    again.set_progress_bar_config(disable=True)
    size = {"height": 8, "width": 16, "use_resolution_binning": False}
    assert again(prompt=asked[0], num_inference_steps=2, guidance_scale=1.0, **size).images[0].size == (16, 8)


def test_held_out_prompts_may_change_when_a_run_goes_on(finished, tmp_path):
    """As all of eval.: nothing that is trained depends on them. Those of before are there still."""
    folder, others = tmp_path / "run", tmp_path / "others.txt"
    shutil.copytree(finished, folder)
    others.write_text("a two and a two\na faint one on the left\n")
    run(folder, f"eval.held_out={others}")
    found = json.loads((folder / "summary.json").read_text())["student"]["held_out"]
    assert found["prompts"]["number"] == 2
    others.write_text("a nine and a two\n")  # and another time, under the same name
    run(folder, f"eval.held_out={others}")
    assert json.loads((folder / "summary.json").read_text())["student"]["held_out"]["prompts"]["number"] == 1
    assert same(finished, folder) and len(list(folder.glob("text-held-out-*"))) == 3


@needs_fork
@pytest.mark.parametrize("step", [4, 7])  # of four of the teacher's training, and of four of the student's
def test_a_run_that_is_killed_goes_on_exactly(step, finished, tmp_path, capsys):
    folder = tmp_path / "run"
    killed_in(lambda: run(folder), step)
    assert (folder / "teacher.safetensors").exists() == (step > 4) and not (folder / "student.safetensors").exists()
    assert list((folder / "checkpoints" if step > 4 else folder / "teacher/checkpoints").iterdir())
    run(folder)
    assert f"{'student' if step > 4 else 'teacher'}: going on from iteration 2 of 4" in capsys.readouterr().err
    assert same(finished, folder) and same(finished, folder, "teacher")


@needs_fork
def test_a_run_that_is_killed_before_its_pipeline_is_whole_goes_on(finished, tmp_path):
    folder = tmp_path / "run"
    killed(lambda: run(folder), 2)  # while it embeds
    assert (folder / "text").is_dir() and not (folder / "teacher").exists()
    for name in ("model_index.json", "scheduler/scheduler_config.json"):
        (folder / "pipeline" / name).unlink()
    run(folder)
    assert same(finished, folder) and same(finished, folder, "teacher")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Twelve of three classes in folders of their own, and an EDM zip of them."""
    root = tmp_path_factory.mktemp("pictures")
    (root / "pictures").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (12, 8, 8), np.uint8)
    with zipfile.ZipFile(root / "labelled.zip", "w") as archive:
        for i, pixels in enumerate(noise):
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            (root / f"pictures/{i:02}.png").write_bytes(buffer.getvalue())
            archive.writestr(f"{i:02}.png", buffer.getvalue())
        archive.writestr("dataset.json", json.dumps({"labels": [[f"{i:02}.png", i % 3] for i in range(12)]}))
    (root / "each.txt").write_text("\n".join(f"noise of kind {i}" for i in range(12)))
    (root / "classes.txt").write_text("a cat\na dog\nrain\n")
    return root


PLAIN = ["eval.scores=[]", "eval.held_out=null"]


def test_captions_that_are_others_by_now_are_refused(pictures, tmp_path):
    words = tmp_path / "each.txt"
    shutil.copy(pictures / "each.txt", words)
    given = [f"data.path={pictures}/pictures", f"data.captions={words}", *PLAIN]
    folder = run(tmp_path / "run", *given)
    assert read_prompts(folder / "captions.jsonl") == words.read_text().splitlines()
    finished_as = load_file(folder / "student.safetensors")
    words.write_text(words.read_text().replace("kind 7", "kind 8"))
    with pytest.raises(UserError, match="begun with another file of prompts"):
        run(folder, *given)
    shutil.copy(pictures / "each.txt", words)
    run(folder, *given)
    assert all(torch.equal(tensor, finished_as[name]) for name, tensor in load_file(folder / "student.safetensors").items())


def test_the_folder_of_a_text_encoder_may_go_once_the_run_has_its_own(finished, tmp_path):
    encoder = shutil.copytree(finished / "pipeline", tmp_path / "encoder")
    folder = run(tmp_path / "run", f"text.encoder={encoder}")
    assert same(finished, folder)  # the same words
    shutil.rmtree(encoder)
    (folder / "student.safetensors").unlink()
    run(folder, f"text.encoder={encoder}")
    assert same(finished, folder)


def test_a_labelled_set_has_a_caption_for_each_class(pictures, tmp_path, taken):
    folder = run(tmp_path / "run", f"data.path={pictures}/labelled.zip", f"data.captions={pictures}/classes.txt", *PLAIN)
    assert read_prompts(folder / "captions.jsonl") == 4 * ["a cat", "a dog", "rain"]
    images, student = open_images(pictures / "labelled.zip"), Student.from_pretrained(folder)
    of = {images.seen(torch.from_numpy(images.read(i)[None].copy())).numpy().tobytes(): i % 3 for i in range(12)}
    words = student.encode(["a cat", "a dog", "rain"])
    assert len(taken) == 8
    for seen, told, _ in taken[:4]:  # the teacher's
        wanted = words[torch.tensor([of[one[None].numpy().tobytes()] for one in seen])]
        assert torch.equal(told.mask, wanted.mask) and torch.allclose(
            told.embeds, wanted.embeds * wanted.mask[..., None], atol=2e-3
        )  # 16 bit


# Other students


def test_a_student_of_fewer_layers_learns_the_teachers_scores_first(finished, tmp_path):
    folder = run(
        tmp_path / "run", f"teacher.checkpoint={finished}/pipeline",
        f"students.net={{model_type: {NET}, config: {{num_layers: 1, num_attention_heads: 2}}}}", "students.tsm.kimg=0.004",
        "students.tsm.batch=2", "students.tsm.grid_kimg=0.004",
    )  # fmt: skip
    net = load_net(folder / "student.safetensors")[0]
    assert len(net.model.transformer_blocks) == 1 and net.config["num_attention_heads"] == 2 and net.config["caption_channels"] == 32
    assert (folder / "tsm.safetensors").is_file()
    assert Student.from_pretrained(folder)(seeds=[0], prompts=["a one on the left"]).shape == (1, 1, 8, 16)


def test_two_students_have_a_share_of_the_captions_each(finished, tmp_path, taken):
    folder = run(tmp_path / "run", "students.count=2", "students.partition=kmeans")
    assert same(finished, folder, "teacher")
    kept = json.loads((folder / "partition.json").read_text())
    student = Student.from_pretrained(folder)
    assert student.net.partition.of(student.encode(captions())).tolist() == kept["prompts"] == kept["captions"]
    for i, (_, _, prompts) in enumerate(taken[4:]):
        assert all(set(student.net.partition.of(one).tolist()) == {i // 4} for one in prompts)
    assert json.loads((folder / "summary.json").read_text())["student"]["held_out"]["n"] == 24


GANS = {"gdd": ["captions_gdd", "method.width=8"], "dmd": ["captions", "method.gan=true"], "dmd2": ["captions_dmd2"]}


@pytest.mark.parametrize("method", GANS)
def test_gans_judge_maps_that_are_not_square(method, finished, tmp_path):
    recipe, *more = GANS[method]
    folder = run(tmp_path / "run", f"teacher.checkpoint={finished}/pipeline", *more, recipe=recipe)
    before, after = load_net(finished / "teacher.safetensors")[0].state_dict(), load_net(folder / "student.safetensors")[0].state_dict()
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert any(not torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_a_gans_head_gives_one_logit_of_a_map_that_is_not_square():
    net, (y, text) = teacher("v_prediction").net, batch(3)
    assert net.taps() == [(8, 2, 4)]
    assert Critic(net, with_head=True).logits(y, torch.ones(3), text).shape == (3, 1)


# The teacher's training


def teacher(prediction, **settings):
    torch.manual_seed(5)
    net = fresh_net(NET, CONFIG, prediction, (1, 8, 16), 6)
    with torch.no_grad():  # what it begins with may say 0
        for p in net.parameters():
            p.add_(0.05 * torch.randn(p.shape))
    net.null = Text(torch.randn(1, 2, 6), torch.ones(1, 2, dtype=torch.bool))
    return Teacher(EDMLoss(P_mean=0.0, **settings), net)


def draws(n=16):
    return Draws(torch.Generator().manual_seed(9), n, slice(0, n), random.Random(0))


def batch(n=16):
    mask = torch.ones(n, 5, dtype=torch.bool)
    mask[::2, 3:] = False
    return torch.randn(n, 1, 8, 16).clamp(-1, 1), Text(torch.randn(n, 5, 6) * mask[..., None], mask)


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon", "flow"])
def test_its_loss_is_the_mean_square_of_what_it_predicts(prediction):
    method, (y, text), drawn = teacher(prediction, prompt_dropout=0.0), batch(), draws()
    drawn.uniform()  # whose prompts are forgotten
    sigma, noise = method.net.told((1.2 * drawn.normal()).exp()).double(), drawn.normal(1, 8, 16)
    if prediction == "flow":
        t = sigma / (1 + sigma)
        x, time = (1 - t).view(-1, 1, 1, 1) * y.double() + t.view(-1, 1, 1, 1) * noise, 1000 * t
        target = noise.double() - y
    else:
        betas = np.linspace(1e-4, 0.02, 1000)
        alpha_bar = torch.from_numpy(np.cumprod(1 - betas))
        time = (((1 - alpha_bar) / alpha_bar).sqrt()[None] - sigma[:, None]).abs().argmin(1)
        signal, rest = alpha_bar[time].sqrt().view(-1, 1, 1, 1), (1 - alpha_bar[time]).sqrt().view(-1, 1, 1, 1)
        x = signal * y + rest * noise
        target = noise.double() if prediction == "epsilon" else signal * noise - rest * y
    net = method.net.model.double()
    with torch.no_grad():
        added = {"resolution": None, "aspect_ratio": None}
        said = net(x, text.embeds.double(), timestep=time, encoder_attention_mask=text.mask, added_cond_kwargs=added).sample
        wanted = ((said - target) ** 2).mean().item()
        net.float()
        loss, logs = method.loss((y, text, draws()))
    assert loss.item() == pytest.approx(wanted, rel=1e-4) and logs["nonfinite"].sum() == 0


def test_forgotten_prompts_are_the_null_prompt():
    y, text = batch()

    def loss(told, p):
        with torch.no_grad():
            method = teacher("v_prediction")
            method.cfg.prompt_dropout = p
            return method.loss((y, told, draws()))[0].item()

    null = teacher("v_prediction").net.null
    alone = Text(null.embeds.expand(16, -1, -1), null.mask.expand(16, -1))
    assert loss(text, 1.0) == pytest.approx(loss(alone, 0.0), rel=1e-6)
    assert loss(text, 0.0) == pytest.approx(loss(text[:], 0.0)) != pytest.approx(loss(text, 1.0), rel=1e-3)
    method, forgotten = teacher("v_prediction", prompt_dropout=0.5), draws().uniform() < 0.5
    mixed = method.forgetful(text, draws())
    assert 0 < forgotten.sum() < 16
    for i in range(16):
        own = null if forgotten[i] else text[i : i + 1]
        assert torch.equal(mixed.embeds[i][mixed.mask[i]], own.embeds[0][own.mask[0]])


def test_no_prompt_is_forgotten_where_none_shall_be():
    method, (_, text) = teacher("flow", prompt_dropout=0.0), batch()
    mixed = method.forgetful(text, draws())
    assert torch.equal(mixed.embeds, text.embeds) and torch.equal(mixed.mask, text.mask)
