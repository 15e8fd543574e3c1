"""What a run refuses and what it says of settings that do nothing: before it trains, and in --dry-run as in the run."""

import dataclasses
import math
import operator
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from potstill.engine import train
from potstill.engine.common.checks import BadSetting
from potstill.engine.common.errors import UserError
from potstill.engine.config import unused
from potstill.engine.config.schema import Config, to_yaml
from potstill.engine.config.tree import load
from potstill.engine.diffusion.sampling import Sampler
from potstill.engine.jobs.folder import check_settings
from potstill.engine.methods.dmd import DMDConfig
from potstill.engine.methods.table import METHODS
from potstill.engine.models.weights import save_net
from potstill.engine.nets.edm import from_kwargs

CONFIGS = Path(__file__).parent.parent / "configs"
TINY = {"model_type": "SongUNet", "model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}

# recipe, settings, and the sentence's beginning or a part of it.
WRONG = [
    # the method's
    ("digits", "method.fake_per_student=0", "method.fake_per_student wants at least 1, got 0"),
    ("digits", "method.match_index=[5]", "method.match_index wants two whole numbers, first <= last, from 0 to 999, got [5]"),
    ("digits", "method.match_index=[100,5000]", "method.match_index wants two"),
    ("digits", "method.match_index=[700,100]", "method.match_index wants two"),
    ("digits", "method.fake_index=[-1,999]", "method.fake_index wants two"),
    ("digits", "method.gan_index=[0,5000]", "method.gan_index wants two"),
    ("digits", "method.sigma=-1", "method.sigma wants more than 0, got -1.0"),
    ("digits", "method.sigma=nan", "method.sigma wants a finite number, got nan"),
    ("digits", "method.gan_student=inf", "method.gan_student wants a finite number, got inf"),
    ("digits", "method.guidance=nan", "method.guidance wants a finite number"),
    ("digits", "method.guidance=0", "method.guidance wants more than 0, got 0.0"),
    ("digits", "method.fake_guidance=-1", "method.fake_guidance wants more than 0, got -1.0"),
    ("digits_sim", "method.guidance=-1", "method.guidance wants more than 0"),
    ("digits_sim", "method.fake_guidance=0", "method.fake_guidance wants more than 0"),
    ("digits_moment_matching", "method.guidance=0", "method.guidance wants more than 0"),
    ("digits_sfd", "method.guidance=0", "method.guidance wants more than 0"),
    ("digits", "teacher.embedded_guidance=-3", "teacher.embedded_guidance wants at least 0"),
    ("digits", "method.regression=-0.25", "method.regression wants at least 0"),
    ("digits", "method.regression_metric=l3", "method.regression_metric wants one of lpips, l2"),
    ("digits", "method.pairs=0", "method.pairs wants at least 1"),
    ("digits", "method.regression=0.25", "package lpips"),
    ("digits_sim", "method.distance=l1", "method.distance wants one of huber, l2"),
    ("digits_sim", "method.t_max=0", "method.t_max wants a share"),
    ("digits_sim", "method.P_std=0", "method.P_std wants more than 0"),
    ("digits_sim", "method.scale=-inf", "method.scale wants a finite number"),
    ("digits_sim", "method.dropout=1", "method.dropout wants a probability in [0, 1), got 1.0"),
    ("digits_gdd", "method.freeze=4", "method.freeze wants one of 0, 1, 2, 3, got 4"),
    ("digits_gdd", "method.features=[]", "method.features wants at least one"),
    ("digits_gdd", "method.features=[vgg]", "method.features wants teacher, teacher:SIGMA"),
    ("digits_gdd", "method.features=['teacher:nan']", "teacher features want a noise level above 0"),
    ("digits_gdd", "method.freeze_plan=/nowhere.json method.freeze=1", "/nowhere.json"),
    ("digits_gdd", "method.r1_gamma=nan", "method.r1_gamma wants a finite number"),
    ("digits_moment_matching", "method.steps=0", "method.steps wants at least 1"),
    ("digits_moment_matching", "method.sigma_max=0.001", "method.sigma_max wants more than sigma_min"),
    ("digits_moment_matching", "method.rho=0", "method.rho wants more than 0"),
    ("digits_moment_matching", "method.levels=linear", "method.levels wants one of"),
    ("digits_sfd", "method.num_steps=[2]", "method.num_steps wants at least 3 noise levels"),
    ("digits_sfd", "method.solver=rk4", "method.solver wants one of"),
    ("digits_sfd", "method.lpips=-1", "method.lpips wants at least 0"),
    # optimisers
    ("digits", "train.optim.student.lr=nan", "train.optim.student.lr wants a finite number, got nan"),
    ("digits", "train.optim.student.lr=0", "train.optim.student.lr wants more than 0"),
    ("digits", "train.optim.fake.betas=[0.9]", "train.optim.fake.betas wants two numbers in [0, 1)"),
    ("digits", "train.optim.fake.betas=[0.9,nan]", "train.optim.fake.betas wants finite numbers"),
    ("digits", "train.optim.fake.eps=-1e-8", "train.optim.fake.eps wants at least 0"),
    ("digits", "train.optim.student.schedule=cosine", "train.optim.student.schedule wants one of constant"),
    ("digits", "teacher.train.optim.teacher.warmup=-1", "teacher.train.optim.teacher.warmup wants at least 0"),
    ("digits", "train.optim.fkae.lr=1e-3", "train.optim wants fake or student, which are trained here, got 'fkae'"),
    ("digits", "teacher.train.optim.fake.lr=1e-3", "teacher.train.optim wants student or teacher"),
    # training
    ("digits", "train.batch=64 train.micro_batch=24", "train.micro_batch = 24 does not divide batch = 64"),
    ("digits", "train.micro_batch=most", "train.micro_batch wants a number, auto or null, got 'most'"),
    ("digits", "train.kimg=inf", "train.kimg wants a finite number"),
    ("digits", "train.eval_kimg=-1", "train.eval_kimg wants at least 0"),
    ("digits", "train.checkpoint_kimg=-1", "train.checkpoint_kimg wants more than 0"),
    ("digits", "train.grid_kimg=nan", "train.grid_kimg wants a finite number"),
    ("digits", "train.ema_ramp_up=-0.1", "train.ema_ramp_up wants at least 0"),
    ("digits", "teacher.train.keep=0", "teacher.train.keep wants at least 1"),
    ("digits", "teacher.train.batch=0", "teacher.train.batch wants at least 1"),
    ("digits", "train.graphs=always", "train.graphs wants one of auto, on, off, got 'always'"),
    ("digits", "train.graphs=on device=cpu", "train.graphs=on wants a CUDA device"),
    ("digits", "train.compile=max", "train.compile wants one of off, blocks, net"),
    ("digits", "train.fsdp.replicas=0", "train.fsdp.replicas wants at least 1"),
    ("digits", "train.parallel=dp", "train.parallel wants one of ddp, fsdp"),
    ("digits", "students.tsm.batch=0", "students.tsm.batch wants at least 1"),
    # sampling, data, measuring, skipping
    ("digits", "teacher.loss.sampling_steps=0", "teacher.loss.sampling_steps wants at least 1"),
    ("digits", "teacher.loss.P_mean=nan", "teacher.loss.P_mean wants a finite number"),
    ("digits", "data.workers=-1", "data.workers wants at least 0"),
    ("digits", "data.resolution=0", "data.resolution wants at least 1"),
    ("digits", "data.path=synthetic:28x1 net.channel_mult=[1,1,1,1]", "net: 28x28 images cannot be halved 3 times"),
    ("digits", "data.path=synthetic:9x1", "net: 9x9 images cannot be halved 1 times"),
    ("digits", "net.channel_mult=[]", "net.channel_mult wants a list"),
    ("digits", "net.dropout=nan", "net.dropout wants a finite number"),
    ("digits", "net.num_blocks=0", "net.num_blocks wants at least 1"),
    ("digits", "net.model_channels=-8", "net.model_channels wants at least 1"),
    ("digits", "eval.batch=0", "eval.batch wants at least 1"),
    ("digits", "eval.seed=-1", "eval.seed wants a whole number from 0"),
    ("digits", "eval.features=/nowhere.pt", "/nowhere.pt"),
    ("digits", "skipping.cosine=nan", "skipping.cosine wants a finite number"),
    ("digits", "skipping.cache=2", "skipping.cache is for teachers that walk"),
    ("digits", "precision=fp8", "precision wants auto, fp32, bf16, got 'fp8'"),
    ("digits", "seed=-1", "seed wants a whole number from 0"),
    ("digits", "data.path=null", "data.path=null wants teacher.checkpoint"),
    ("digits_msd", "students.count=3", "does not divide the 10 classes"),
    ("digits_msd", "student=7", "student wants 0 … 1, got 7"),
    ("digits_msd", "students.net.num_blocks=0", "students.net.num_blocks wants at least 1"),
]  # fmt: skip


# What Hydra has words of its own for, or none: a part of the sentence.
ODD = [
    ("+train.foo=1", "there is no setting 'train.foo'"),
    ("+foo=1", "there is no setting 'foo'"),
    ("++students.foo=1", "there is no setting 'students.foo'"),
    ("teacher.checkpoint=", "teacher.checkpoint wants a weight file or pipeline, or null"),
    ("method.name=sim", "method.name wants one of dmd, dmd2, got 'sim'"),
    ("~method=dmd", "method wants one of dmd"),
    ("method=null", "ethod"),
    ("net=null", "net"),
    ("train.kimg=1e306", "train.kimg wants at most 1e12"),
    ("eval.n=1000000000000000", "eval.n wants at most 10,000,000 images"),
]


@pytest.mark.parametrize(("setting", "words"), ODD)
def test_what_hydra_would_swallow_or_trip_over_is_a_sentence(tmp_path, setting, words):
    sentence = refused(str(CONFIGS / "digits.yaml"), f"run_dir={tmp_path}/run", setting)
    assert words in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize("text", ["defaults: schema\n", "train: {batch: \udcff}\n", "- a\n- b\n", "3\n"])
def test_recipes_that_are_none(tmp_path, text):
    (tmp_path / "odd.yaml").write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(str(tmp_path / "odd.yaml"))


def refused(*arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        train.main(list(arguments))
    return str(caught.value)


@pytest.mark.parametrize(("recipe", "settings", "words"), WRONG, ids=[f"{recipe} {settings}" for recipe, settings, _ in WRONG])
def test_the_run_and_the_dry_run_refuse_alike_and_nothing_is_trained(tmp_path, recipe, settings, words):
    command = [str(CONFIGS / f"{recipe}.yaml"), f"run_dir={tmp_path}/run", *settings.split()]
    sentence = refused(*command)
    assert words in sentence
    assert not (tmp_path / "run").exists()
    if "missing" not in sentence:  # what can be fetched is listed by a dry run, and is no error of it
        assert refused(*command, "--dry-run") == sentence


def test_the_dry_run_asks_the_run_folder_too(tmp_path):
    digits = str(CONFIGS / "digits.yaml")
    (tmp_path / "file").write_text("")
    (tmp_path / "old").mkdir()
    (tmp_path / "old/config.yaml").write_text(to_yaml(load(digits, ["seed=1"])))
    for folder, words in (("file/run", "cannot write to run folder"), ("file", "cannot write"), ("old", "holds a run with other settings")):
        sentence = refused(digits, f"run_dir={tmp_path}/{folder}", "--dry-run")
        assert words in sentence
        assert refused(digits, f"run_dir={tmp_path}/{folder}") == sentence


@pytest.mark.parametrize(
    ("branch", "damaged", "said"),
    [
        (("students",), [1], "students was [1], now None"),
        (("train",), 7, "train was 7, now None"),
        (("train", "optim"), [5, 6], "train.optim was [5, 6], now None"),
        (("train", "optim", "student"), 5, "train.optim.student was 5, now None"),
        (("train", "optim", "student", "lr"), None, "train.optim.student.lr was None, now 0.0005"),
    ],
)
def test_settings_of_a_run_that_are_of_another_kind(branch, damaged, said, tmp_path):
    now = to_yaml(load(CONFIGS / "digits.yaml", []))
    before = yaml.safe_load(now)
    parent = before
    for name in branch[:-1]:
        parent = parent[name]
    parent[branch[-1]] = damaged
    with pytest.raises(UserError, match=re.escape(said)):
        check_settings(yaml.safe_dump(before), now, tmp_path)


def test_what_an_old_run_did_not_know_is_its_default(tmp_path):
    now = to_yaml(load(CONFIGS / "digits.yaml", []))
    before = yaml.safe_load(now)
    for optim in (before["train"]["optim"], before["teacher"]["train"]["optim"]):
        for net in optim:
            assert optim[net].pop("forced_norm") and optim[net].pop("clip_value", 0) is None
    del before["train"]["phema"], before["teacher"]["guide"], before["method"]["gan"], before["students"]["start"]
    assert check_settings(yaml.safe_dump(before), now, tmp_path) == []


@pytest.mark.parametrize(
    "kind",
    [*METHODS.values(), *(f.default_factory for f in dataclasses.fields(Config) if f.default_factory is not dataclasses.MISSING)],
)
def test_no_number_of_any_config_may_be_nan_or_infinite(kind):
    """Every dataclass of the tree checks its own floats, whoever makes it."""
    for field in dataclasses.fields(kind):
        if "float" in str(field.type):
            for bad in (math.nan, math.inf, -math.inf):
                with pytest.raises(BadSetting, match=f"^{field.name} wants a finite number, got {bad}"):
                    kind(**{field.name: bad})


def test_a_bad_setting_is_named_by_its_path_in_a_recipe_and_by_its_name_in_code(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("defaults: [schema, {data: digits}, {net: digits}, {method: dmd}, _self_]\ntrain: {optim: {fake: {lr: .nan}}}\n")
    assert "train.optim.fake.lr" in refused(str(recipe))
    with pytest.raises(BadSetting, match=r"^sigma wants more than 0, got -1\.0$"):
        DMDConfig(sigma=-1.0)


@pytest.mark.parametrize(("side", "levels", "fitting"), [(28, 4, 32), (9, 2, 10), (14, 3, 16), (1, 2, 2)])
@pytest.mark.parametrize("model_type", ["SongUNet", "DhariwalUNet"])
def test_sides_that_cannot_be_halved(model_type, side, levels, fitting):
    shape = TINY | {"model_type": model_type, "channel_mult": [1] * levels, "img_channels": 1}
    with pytest.raises(ValueError, match=f"{side}x{side} images cannot be halved {levels - 1} times.* use images of {fitting}x{fitting}"):
        from_kwargs("EDMPrecond", img_resolution=side, **shape)
    net = from_kwargs("EDMPrecond", img_resolution=fitting, **shape)
    assert net(torch.zeros(1, 1, fitting, fitting), torch.ones(())).shape == (1, 1, fitting, fitting)


@pytest.mark.parametrize(
    ("solver", "sigmas"),
    [("one_step", []), ("one_step", [80.0, 1.0]), ("one_step", [0.0]), ("heun", [80.0]), ("euler", [math.nan, 0.0]), ("euler", [math.inf, 1.0]),
     ("ancestral", []), ("heun", [1.0, 80.0]), ("euler", [80.0, -1.0])],
)  # fmt: skip
def test_samplers_refuse_levels_that_are_no_walk(tmp_path, solver, sigmas):
    with pytest.raises(BadSetting, match=r"^sigmas wants"):
        Sampler(solver, sigmas)
    file = tmp_path / "student.safetensors"
    save_net(
        file,
        from_kwargs("EDMPrecond", img_resolution=8, img_channels=1, **TINY),
        method="sim",
        sampler={"solver": solver, "sigmas": sigmas},
    )
    sentence = refused(str(CONFIGS / "digits.yaml"), f"teacher.checkpoint={file}", f"run_dir={tmp_path}/r")
    assert sentence.startswith(f"{file} names a way of sampling that this version does not know: sigmas wants")


# text


@pytest.mark.parametrize(
    "text",
    [
        "2024_10_01",
        "1e3",
        "+5",
        "010",
        "12:30",
        "off",
        "true",
        "~/x",
        "Größe/模型",
        "a b",
        "it's",
        "end\\",
        "a,b",
        "[x]",
        "{a: 1}",
        "#7",
        "a=b",
        "$5",
        "?",
    ],
)
def test_text_is_kept_as_written(tmp_path, text):
    keys = ("run_dir", "data.path", "teacher.checkpoint", "log.wandb", "skipping.plan", "students.start", "method.freeze_plan")
    cfg = load(CONFIGS / "digits_gdd.yaml", [f"{key}={text}" for key in keys])
    assert [operator.attrgetter(key)(cfg) for key in keys] == [text] * len(keys)
    if text.isprintable() and not set(text) & set("[]{},#:'\\?"):
        recipe = tmp_path / "mine.yaml"
        recipe.write_text(
            f"defaults: [schema, {{data: digits}}, {{net: digits}}, {{method: dmd}}, _self_]\nrun_dir: {text}\nlog: {{wandb: {text}}}\n"
        )
        cfg = load(recipe, [])
        assert (cfg.run_dir, cfg.log.wandb) == (text, text)


def test_what_yaml_takes_for_something_else_is_what_the_schema_says(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "defaults: [schema, {data: digits}, {net: digits}, {method: gdd}, _self_]\n"
        "run_dir: 12:30\nmethod: {features: [010, teacher]}\nlog: {tensorboard: off, wandb: null}\n"
        "train: {graphs: off, compile: off, kimg: 1_000, batch: 010, micro_batch: 5, optim: {student: {lr: 1e-3, betas: [0, .9]}}}\n"
    )
    cfg = load(recipe, [])
    assert (cfg.run_dir, cfg.method.features, cfg.log.tensorboard, cfg.log.wandb) == ("12:30", ["010", "teacher"], False, None)
    assert (cfg.train.graphs, cfg.train.compile, cfg.train.kimg, cfg.train.batch, cfg.train.micro_batch) == ("off", "off", 1000.0, 10, 5)
    assert (cfg.train.optim["student"].lr, cfg.train.optim["student"].betas) == (1e-3, [0.0, 0.9])
    assert load(recipe, ["train.micro_batch=auto", "log.wandb=null", "run_dir='2024_10'"]).run_dir == "2024_10"
    assert load(recipe, ["method.features=[1e3, 'timm:a,b', torchscript:~/ä.pt]"]).method.features == [
        "1e3",
        "timm:a,b",
        "torchscript:~/ä.pt",
    ]


def test_a_tilde_is_the_home_folder_where_it_is_used(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_net(tmp_path / "t.safetensors", from_kwargs("EDMPrecond", img_resolution=8, img_channels=1, **TINY), kimg=1.0)
    small = ["train.kimg=0.008", "train.batch=8", "eval.n=8", "log.tensorboard=false", "method.fake_per_student=1"]
    train.main([str(CONFIGS / "digits.yaml"), "run_dir=~/run", "teacher.checkpoint=~/t.safetensors", *small])
    assert (tmp_path / "run/student.safetensors").exists()
    assert not Path("~").exists()


# settings that do nothing


def said(capsys, *arguments: str) -> str:
    train.main([*arguments, "--dry-run"])
    return next((line for line in capsys.readouterr().err.splitlines() if "do nothing" in line), "")


def test_settings_beside_a_teachers_file_are_listed_once(tmp_path, capsys):
    file = tmp_path / "t.safetensors"
    save_net(file, from_kwargs("EDMPrecond", img_resolution=8, img_channels=1, label_dim=10, **TINY), kimg=1.0)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("defaults: [schema, {method: dmd}, _self_]\nnet: {model_channels: 8, channel_mult: [1]}\n")
    common = [str(recipe), f"run_dir={tmp_path}/r", f"teacher.checkpoint={file}"]
    assert said(capsys, *common) == ""  # what the file says too is no contradiction
    line = said(
        capsys,
        *common,
        "net.model_channels=64",
        "net.dropout=0.5",
        "net.conditional=false",
        "teacher.train.kimg=3",
        "teacher.train.optim.teacher.lr=1",
        "teacher.loss.P_mean=0",
        "teacher.loss.sampling_steps=9",
    )
    assert line.startswith("these settings do nothing here: ")
    net, _, training = line.removeprefix("these settings do nothing here: ").partition("; ")
    assert net == f"net.conditional, net.model_channels, net.dropout (the net in {file} is another)"
    assert training == f"teacher.loss.P_mean, teacher.train.kimg, teacher.train.optim.teacher.lr (teacher.checkpoint={file})"
    few = ["a.b.c", "net.x", "a.b.d", "a.e"]
    assert unused.short(few) == ["a.b.c", "a.b.d", "net.x", "a.e"]
    assert unused.short([*few, "a.b.f", "a.b.c.d"]) == ["a.b.… (4 settings)", "net.x", "a.e"]


def test_branches_that_the_recipe_leaves_out_can_be_given(tmp_path):
    given = [
        "train.optim.fake.lr=1e-2",
        "train.optim.other={lr: 3, name: adamw}",
        "students.net.num_blocks=2",
        "students.net.precond=EDMPrecond",
    ]
    cfg = load(CONFIGS / "digits_sim.yaml", given)
    assert (cfg.train.optim["fake"].lr, cfg.train.optim["other"].lr, cfg.train.optim["other"].name) == (1e-2, 3.0, "adamw")
    assert (cfg.students.net.num_blocks, cfg.students.net.model_channels) == (2, None)
    with pytest.raises(UserError, match=r"there is no setting 'train\.optim\.fake\.rate'"):
        load(CONFIGS / "digits_sim.yaml", ["train.optim.fake.rate=1"])


@pytest.mark.parametrize(
    ("recipe", "settings", "words"),
    [
        ("digits", "method.gan_student=1", "method.gan_student (method.gan=false)"),
        ("digits", "method.pairs=5 method.pair_steps=3", "method.pairs, method.pair_steps (method.regression=0)"),
        ("digits_sim", "method.distance=l2 method.c=0.1", "method.c (method.distance=l2)"),
        (
            "digits_moment_matching",
            "method.variant=alternating method.measure_every=7",
            "method.measure_every (method.variant=alternating)",
        ),
        ("digits_gdd", "method.r1_gamma=0 method.r1_every=3", "method.r1_every (method.r1_gamma=0)"),
        ("digits_sfd", "method.metric=l1 method.huber_c=0.1", "method.huber_c (method.metric=l1)"),
        (
            "digits",
            "teacher.train.optim.student.lr=5",
            "these settings do nothing here: teacher.train.optim.student.lr (teacher.train.optim.teacher is given)",
        ),
        ("digits", "students.partition=random", "students.partition (students.count=1)"),
        ("digits", "students.tsm.kimg=3", "students.tsm.kimg (students.net=null)"),
        ("digits", "skipping.cosine=0.5", "skipping.cosine (neither skipping.plan nor skipping.cache)"),
        ("digits", "train.parallel=fsdp train.fsdp.mixed=false", "train.parallel, train.fsdp.mixed (one process; torchrun starts several)"),
    ],
)
def test_settings_that_do_nothing_are_named(tmp_path, capsys, recipe, settings, words):
    assert words in said(capsys, str(CONFIGS / f"{recipe}.yaml"), f"run_dir={tmp_path}/r", *settings.split())


def test_image_files_the_net_cannot_halve_are_refused_before_training(tmp_path):
    for k in range(4):
        Image.fromarray(np.full((9, 9), 40 * k, np.uint8)).save(tmp_path / f"{k}.png")
    sentence = refused(str(CONFIGS / "digits.yaml"), f"data.path={tmp_path}", f"run_dir={tmp_path}/run")
    assert sentence.startswith("net: 9x9 images cannot be halved 1 times")
