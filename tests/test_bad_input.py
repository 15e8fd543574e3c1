"""Whatever a user gets wrong ends in one clear sentence and exit code 2, and nothing is lost."""

import io
import json
import os
import pickle
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file

from potstill.engine import evaluate, probe, train
from potstill.engine.common.errors import UserError
from potstill.engine.config.schema import to_yaml
from potstill.engine.config.tree import load
from potstill.engine.data.images import open_images
from potstill.engine.formats.edm_pickle import read_net
from potstill.engine.jobs import finish, job
from potstill.engine.jobs.build import rehearsal_data
from potstill.engine.jobs.folder import prepare
from potstill.engine.measure.networks import features_by_name
from potstill.engine.measure.references import read_reference
from potstill.engine.models.router import load_router
from potstill.engine.models.weights import load_net, read_tensors, save_net
from potstill.engine.nets.edm import from_kwargs

ROOT = Path(__file__).parent.parent
DIGITS = str(ROOT / "configs/digits.yaml")
TINY = {"model_type": "SongUNet", "model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}


def refused(*arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        train.main(list(arguments))
    sentence = str(caught.value)
    assert "Traceback" not in sentence
    return sentence


def teacher_file(path: Path, **kwargs) -> Path:
    save_net(path, from_kwargs("EDMPrecond", **{"img_resolution": 8, "img_channels": 1} | TINY | kwargs), kimg=1.0)
    return path


def test_the_command_prints_one_line_and_exits_with_2(tmp_path):
    command = [sys.executable, "-m", "engine.train", DIGITS, f"run_dir={tmp_path}/x", "train.batchsize=3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: digits.yaml: there is no setting 'train.batchsize'; did you mean train.batch?\n"
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trian.batch=3", ["trian", "did you mean train"]),
        ("method.fake_per_studnt=3", ["did you mean method.fake_per_student"]),
        ("train.batch=many", ["train.batch", "many"]),
        ("train.batch", ["key=value"]),
        ("method=dmdd", ["digits.yaml: there is no method 'dmdd' to take; did you mean dmd or dmd2?"]),
        ("method=xx", ["there is no method 'xx' to take; wanted one of dmd, dmd2, gdd"]),
        (
            "method=sida",
            ["train.kimg = 24 is over before the student", "or take the recipe that is made for it: potstill train ", "digits_sida"],
        ),
        ("precision=fp8", ["precision wants auto, fp32, bf16, got 'fp8'"]),
        ("precision=fp16", ["precision=fp16 cannot train", "use bf16"]),
        ("train.compile=max", ["train.compile wants one of off, blocks, net, got 'max'"]),
        ("train.optimizer=sgd", ["train.optimizer wants one of auto, torch, adam_ema, got 'sgd'"]),
        ("device=tpu0", ["device wants"]),
        ("train.optim.student.name=sgd", ["train.optim.student.name wants one of adam, adamw, got 'sgd'"]),
        ("train.batch=0", ["train.batch wants at least 1, got 0"]),
        ("train.kimg=-1", ["train.kimg wants more than 0"]),
        ("train.activation_checkpointing=all", ["train.activation_checkpointing wants one of off, blocks, got 'all'"]),
        ("train.micro_batch=48", ["micro_batch", "48", "does not divide"]),
        ("net.model_channels=30", ["net:"]),
        ("net.model_type=Transformer", ["SongUNet, DhariwalUNet", "Transformer"]),
        ("data.path=/nowhere.zip", ["1 thing is missing", "/nowhere.zip"]),
        ("teacher.checkpoint=/nowhere.safetensors", ["1 thing is missing", "/nowhere.safetensors"]),
        ("eval.features=/nowhere.pt", ["/nowhere.pt"]),
        ("eval.n=1", ["eval.n wants at least 2, got 1"]),
    ],
)
def test_settings(tmp_path, override, words):
    sentence = refused(DIGITS, f"run_dir={tmp_path}/run", override)
    for word in words:
        assert word in sentence, sentence


def test_unknown_key_in_the_recipe_itself(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("defaults: [schema, {method: dmd}, _self_]\ntrain: {batch: 8, epochs: 3}\n")
    assert refused(str(recipe)).startswith("mine.yaml: there is no setting 'train.epochs'")
    recipe.write_text("defaults: [schema, {method: dmd}, _self_]\nmethod: {fake_per_studnt: 3}\n")
    assert refused(str(recipe)) == "mine.yaml: there is no setting 'method.fake_per_studnt'; did you mean method.fake_per_student?"
    recipe.write_text("defaults: [digitz, _self_]\n")
    assert refused(str(recipe)).startswith("mine.yaml: there is no recipe 'digitz' to take; did you mean digits")


def test_recipes_that_are_not_there_or_no_yaml(tmp_path):
    assert "did you mean digits" in refused("configs/digit.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("train: [unclosed")
    assert "broken.yaml" in refused(str(broken))
    empty = tmp_path / "empty.yaml"
    empty.write_text("")
    assert "schema" in refused(str(empty))


def test_both_missing_things_come_in_one_message(tmp_path):
    sentence = refused(DIGITS, f"run_dir={tmp_path}/r", "data.path=/no.zip", "teacher.checkpoint=/no.safetensors")
    assert sentence.startswith("2 things are missing")
    assert "/no.zip" in sentence
    assert "/no.safetensors" in sentence


def test_empty_folder_and_mixed_sizes(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "empty" in refused(DIGITS, f"run_dir={tmp_path}/r", f"data.path={tmp_path}/empty")
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for name, size in (("a.png", 8), ("b.png", 9)):
        Image.fromarray(np.zeros((size, size), np.uint8)).save(mixed / name)
    sentence = refused(DIGITS, f"run_dir={tmp_path}/r", f"data.path={mixed}")
    assert "b.png" in sentence
    assert "potstill convert images" in sentence


def test_teacher_and_data_of_other_sizes(tmp_path):
    file = teacher_file(tmp_path / "t.safetensors", img_resolution=16)
    sentence = refused(DIGITS, f"run_dir={tmp_path}/r", f"teacher.checkpoint={file}")
    assert "resolution 16" in sentence
    assert "--resolution 16" in sentence


def test_teacher_with_other_classes(tmp_path):
    file = teacher_file(tmp_path / "t.safetensors", label_dim=3)
    assert "knows 3 classes" in refused(DIGITS, f"run_dir={tmp_path}/r", f"teacher.checkpoint={file}")


def test_teacher_of_another_architecture(tmp_path):
    file = teacher_file(tmp_path / "t.safetensors")
    tensors, meta = read_tensors(file)
    del tensors["model.map_layer0.weight"]
    tensors["model.extra"] = torch.zeros(1)
    save_file(tensors, file, metadata={k: v if isinstance(v, str) else json.dumps(v) for k, v in meta.items()})
    with pytest.raises(UserError, match=r"misses model.map_layer0.weight.*has model.extra"):
        load_net(file)


def test_truncated_and_foreign_weight_files(tmp_path):
    file = teacher_file(tmp_path / "t.safetensors")
    whole = file.read_bytes()
    for cut in (0, 7, 100, len(whole) - 1):
        file.write_bytes(whole[:cut])
        with pytest.raises(UserError, match="not a complete safetensors file"):
            load_net(file)
    save_file({"w": torch.zeros(1)}, file)
    with pytest.raises(UserError, match="does not say which net"):
        load_net(file)


def test_another_configuration_in_the_same_folder(tmp_path):
    train.main([DIGITS, f"run_dir={tmp_path}", "--dry-run"])
    other = to_yaml(load(Path(DIGITS), [f"run_dir={tmp_path}", "seed=1"]))
    (tmp_path / "config.yaml").write_text(other)
    assert "other settings: seed was 1, now 0" in refused(DIGITS, f"run_dir={tmp_path}")
    assert (tmp_path / "config.yaml").read_text() == other


@pytest.mark.parametrize(
    "text", ["", "seed: 1\n", "- a\n", "seed: [1\n", "seed: ${oc.env:HOME\n", "\0", "a: &a [*a]\n", "seed: !!python/object:os.x {}\n"]
)
def test_a_damaged_config_is_named(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    assert "config.yaml is" in (sentence := refused(DIGITS, f"run_dir={tmp_path}"))
    assert "restore it, or remove it alone" in sentence
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]


def test_a_run_from_before_a_setting_was_there_goes_on(tmp_path):
    cfg = load(Path(DIGITS), [f"run_dir={tmp_path}"])
    older = OmegaConf.create(to_yaml(cfg))
    del older.data.unlabelled
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(older))
    prepare(cfg)
    assert "unlabelled: false" in (tmp_path / "config.yaml").read_text()
    cfg.data.unlabelled = True
    with pytest.raises(UserError, match=r"data\.unlabelled was False, now True"):
        prepare(cfg)


def test_unwritable_run_folder(tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot write to run folder" in refused(DIGITS, f"run_dir={tmp_path}/file/run")


def test_method_that_needs_data_without_any(tmp_path):
    file = teacher_file(tmp_path / "t.safetensors")
    common = [DIGITS, f"run_dir={tmp_path}/r", "data.path=null"]
    assert "teacher.checkpoint=" in refused(*common)
    assert "looks at real images" in refused(*common, f"teacher.checkpoint={file}", "method.gan=true")


# Sets that lack classes or images


def labelled(path: Path, labels: list[int], pixels: np.ndarray | None = None) -> Path:
    """Noise, or the given images [N, 8, 8], under these labels."""
    noise = np.random.default_rng(0).integers(0, 256, (len(labels), 8, 8), np.uint8)
    np.savez(path, images=noise if pixels is None else pixels, labels=np.array(labels))
    return path


QUICK = [
    "net.model_channels=8", "net.channel_mult=[1]", "net.num_blocks=1", "net.attn_resolutions=[]", "teacher.train.kimg=0.01",
    "teacher.train.batch=8", "teacher.loss.sampling_steps=2", "train.kimg=0.01", "train.batch=8", "method.fake_per_student=1",
    "log.tensorboard=false",
]  # fmt: skip


@pytest.mark.parametrize(
    ("labels", "note"),
    [
        ([1 + k % 3 for k in range(30)], "no images of class 0: left out"),
        ([(0, 2, 40)[k % 3] for k in range(30)], "no images of classes 1, 3, 4, 5, 6 and 33 more: left out"),
        ([5, 5, 5], "no images of classes 0, 1, 2, 3, 4: left out"),
        ([0, 1, 1, 1], ""),
    ],
)
def test_a_run_measures_the_classes_that_have_images(tmp_path, labels, note, capfd):
    data = labelled(tmp_path / "a.npz", labels)
    train.main([DIGITS, *QUICK, f"data.path={data}", f"run_dir={tmp_path}/r"])
    summary = json.loads((tmp_path / "r/summary.json").read_text())
    assert summary["student"]["n"] == len(labels)
    assert np.isfinite(summary["student"]["fd"])
    said = capfd.readouterr().err
    assert note in said if note else "no images of" not in said


def test_a_run_of_equal_images_is_measured(tmp_path):
    data = labelled(tmp_path / "a.npz", [0, 0], np.full((2, 8, 8), 7, np.uint8))
    train.main([DIGITS, *QUICK, f"data.path={data}", f"run_dir={tmp_path}/r"])
    summary = json.loads((tmp_path / "r/summary.json").read_text())
    assert summary["floor"]["fd"] == 0
    assert np.isfinite(summary["student"]["fd"])


def test_a_grid_shows_the_classes_that_have_images(tmp_path, monkeypatch):
    """Real images and samples alike, column by column, in whole rows; of many classes ten of all that have images."""
    some = [5, 9, 13, 17, 21, 27, 31, 35, 39, 43]
    for labels, wanted, columns, n in ([1, 3, 3, 2], [1, 2, 3], 9, 63), (list(range(5, 45, 2)), some, 10, 60), ([4, 4], [4], 10, 60):
        settings = [*QUICK, f"data.path={labelled(tmp_path / 'a.npz', labels)}", f"run_dir={tmp_path}/r"]
        one = job.Job(load(Path(DIGITS), settings), on_paper=True)
        net, asked = from_kwargs("EDMPrecond", img_resolution=8, img_channels=1, label_dim=max(labels) + 1, **TINY), []
        monkeypatch.setattr(
            finish, "generate", lambda net, sampler, labels, *_, asked=asked, **__: asked.append(labels) or [torch.zeros(1)]
        )
        one.gallery.samples(net, None)
        assert asked[0].tolist() == np.resize(wanted, n).tolist()
        assert [labels[i] for i in one.gallery.real_places()] == asked[0].tolist()
        assert one.gallery.columns(net) == columns


def test_too_few_images_are_refused_before_anything_is_trained(tmp_path):
    msd = str(ROOT / "configs/digits_msd.yaml")
    for recipe, labels, more, words in (
        (DIGITS, [0], "seed=0", "a has 1 image, a run wants at least 2"),
        (msd, [0, 0, 1, 9], "students.count=5", "student 1 of 5 has no images: a has none of classes 2, 3; take fewer"),
        (msd, [5, 6, 7, 8, 9], "students.count=2", "student 0 of 2 has no images: a has none of classes 0, 1, 2, 3, 4; take"),
        (
            msd,
            [0, 3, 1, 1],
            "students.partition=kmeans",
            "kmeans wants images of every class, a has none of class 2: take blocks or random",
        ),
    ):
        arguments = [recipe, *QUICK, f"data.path={labelled(tmp_path / 'a.npz', labels)}", f"run_dir={tmp_path}/r", more]
        assert words in refused(*arguments)
        assert not (tmp_path / "r").exists()


def test_a_run_without_the_labels_of_its_data(tmp_path, capsys):
    """Labels that are wrong do not matter to a run, its evaluation or a probe that ignores them."""
    data = labelled(tmp_path / "a.npz", [0, 1, -1, 2, 1, 0])
    train.main([DIGITS, *QUICK, f"data.path={data}", "data.unlabelled=true", f"run_dir={tmp_path}/r"])
    assert load_net(tmp_path / "r/teacher.safetensors")[0].label_dim == 0
    evaluate.main([f"{tmp_path}/r", "--which", "student"])
    conditional = teacher_file(tmp_path / "t.safetensors", label_dim=3)
    capsys.readouterr()
    evaluate.main([str(conditional), "--data", str(data), "--unlabelled", "--steps", "1"])
    assert json.loads(capsys.readouterr().out)["teacher"]["labels"] == "balanced"
    for command in ([evaluate.main, conditional, "--data", data], [probe.main, conditional, "--data", data, "--out", tmp_path / "p.json"]):
        with pytest.raises(UserError, match="the label -1"):
            command[0](list(map(str, command[1:])))
    with pytest.raises(UserError, match="8 bins of noise levels want at least 32 images"):
        probe.main([str(conditional), "--data", str(data), "--unlabelled", "--out", f"{tmp_path}/p.json"])
    with pytest.raises(UserError, match="--unlabelled is about data"):
        evaluate.main([str(conditional), "--unlabelled", "--reference", str(data)])


def test_a_rehearsal_without_labels_has_none():
    for recipe, wanted in (("digits", "synthetic:8x1"), ("imagenet64_sid", "synthetic:64x3")):
        found = load(ROOT / f"configs/{recipe}.yaml", ["data.unlabelled=true"])
        assert rehearsal_data(found) == wanted
        found.data.unlabelled = False
        assert rehearsal_data(found) == f"{wanted}x{10 if recipe == 'digits' else 1000}"


# Files of the wrong kind


class Mean(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean(dim=[2, 3])


@pytest.fixture(scope="module")
def mistaken(tmp_path_factory):
    """Files that somebody might give where another is wanted, by what they are."""
    folder = tmp_path_factory.mktemp("mistaken")
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "png")
    with zipfile.ZipFile(folder / "pictures", "w") as archive:
        archive.writestr("a.png", buffer.getvalue())
    np.savez(folder / "npz", images=np.zeros((2, 8, 8), np.uint8))
    os.replace(folder / "npz.npz", folder / "npz")
    save_file({"unet.weight": torch.zeros(3)}, folder / "safetensors")
    for new in (True, False):
        torch.save({"weight": torch.zeros(3)}, folder / ("torch" if new else "legacy"), _use_new_zipfile_serialization=new)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(Mean()).save(folder / "script")
    contents = {
        "page": b"\n<!DOCTYPE html>\n<html>404</html>", "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "empty": b"",
        "zeros": bytes(999), "pickle": pickle.dumps({"a": 1}), "cut pickle": pickle.dumps({"a": "b" * 99})[:-60],
        "cut zip": (folder / "pictures").read_bytes()[:60], "picture": buffer.getvalue(),
    }  # fmt: skip
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder


WHAT = {
    "page": "it is a web page, such as an error message or a login: remove it and download the file itself",
    "lfs": "it is a Git LFS pointer, which only names the file: `git lfs pull` gets the file itself",
    "empty": "copy or download it again", "zeros": "copy or download it again", "cut zip": "copy or download it again",
    "pictures": "it is a zip of pictures", "npz": "it is an .npz of 'images'", "picture": "it is a picture", "script": "it is a TorchScript file",
    "torch": "it is a file of torch.save", "legacy": "it is a file of torch.save", "pickle": "it is a pickle", "safetensors": "it is a safetensors file",
}  # fmt: skip
CONVERTED = WHAT | {
    "cut pickle": "is cut off: 110 bytes are wanted at byte 11 of 61: copy or download it again", "pickle": "holds no net of EDM's, only 'a': wanted a network pickle",
    "torch": "holds no net of EDM's, only weight: wanted", "legacy": "holds no net of EDM's, only weight: wanted",
}  # fmt: skip
READ = WHAT | {"safetensors": "does not say which net they belong to"}
REFERENCE = WHAT | {
    "cut pickle": "copy or download it again; wanted a pickle of numpy arrays", "pickle": "is a pickle without a reference: wanted EDM2's",
    "legacy": "wanted a pickle of numpy arrays and numbers",
}  # fmt: skip
FEATURES = {name: words for name, words in WHAT.items() if name != "script"}
DATA = {name: words for name, words in WHAT.items() if name in ("page", "lfs", "empty", "cut zip", "pickle", "safetensors", "picture")}
READERS = {
    "convert": (read_net, CONVERTED), "weights": (load_net, READ), "reference": (read_reference, REFERENCE),
    "features": (lambda path: features_by_name(str(path)), FEATURES), "inception": (lambda path: features_by_name(f"inception:{path}"), FEATURES),
    "data": (lambda path: open_images(str(path)), DATA),
}  # fmt: skip


@pytest.mark.parametrize(("reader", "name"), [(reader, name) for reader, (_, words) in READERS.items() for name in words])
def test_a_file_of_another_kind_is_named_for_what_it_is(mistaken, reader, name):
    read, words = READERS[reader]
    with pytest.raises(UserError) as caught:
        read(mistaken / name)
    sentence = str(caught.value)
    assert sentence.startswith(str(mistaken / name)) and sentence.isprintable() and len(sentence) < 600
    known = "is a pickle, which would have to be executed" if (reader, name) == ("inception", "pickle") else words[name]
    assert known in sentence, sentence
    assert "wanted" in sentence or "again" in sentence, sentence
    assert "miniz" not in sentence


def test_what_is_ours_already_wants_no_conversion(tmp_path):
    with pytest.raises(UserError, match="is a weight file of ours already: use it as it is"):
        read_net(teacher_file(tmp_path / "t.safetensors"))


def test_manifests_of_something_else(tmp_path):
    for text in ("{}", "[]", "no", '{"partition": {"kind": "blocks", "student_of": [0], "hash": "x"}, "students": ["a"]}'):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(UserError, match=r"is no manifest of students .*: wanted the manifest\.json of a run or an export"):
            load_router(tmp_path / "manifest.json")
