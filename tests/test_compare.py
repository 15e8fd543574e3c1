"""compare: one teacher, several methods, one summary; and multi-student runs as jobs of their own."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from potstill.engine import compare, evaluate, train
from potstill.engine.common.errors import UserError
from potstill.engine.config.library import find, text_of
from potstill.engine.config.tree import load
from potstill.engine.jobs import comparison, rehearsal

ROOT = Path(__file__).parent.parent
DIGITS = str(ROOT / "configs/digits.yaml")
TINY = [
    "net.model_channels=8", "net.channel_mult=[1,1]", "net.num_blocks=1", "teacher.train.kimg=0.5", "teacher.loss.sampling_steps=2",
    "teacher.train.grid_kimg=1", "train.grid_kimg=100", "train.batch=16", "eval.n=80", "log.tensorboard=false", "precision=fp32",
]  # fmt: skip


HERE = "--no-apart"  # in this process: starting one takes seconds


def test_all_methods_share_a_teacher_and_are_told_in_one_table(tmp_path, capsys):
    compare.main([DIGITS, "--methods", "dmd,gdd,msd", "--seconds", "0.2", "--points", "2", f"run_dir={tmp_path}/c", HERE, *TINY])
    teacher = (tmp_path / "c/teacher.safetensors").read_bytes()
    compare.main([DIGITS, "--methods", "sfd", "--seconds", "0.2", "--points", "2", f"run_dir={tmp_path}/c", HERE, *TINY])
    assert (tmp_path / "c/teacher.safetensors").read_bytes() == teacher
    summary = json.loads((tmp_path / "c/summary.json").read_text())
    assert set(summary) >= {"floor", "teacher", "methods"}
    assert list(summary["methods"]) == ["dmd", "gdd", "msd", "sfd"]
    for name, one in summary["methods"].items():
        assert set(one) >= {"fd", "nfe", "seconds", "images", "images_per_second", "peak_memory_gib"}
        assert one["fd"] > summary["floor"]["fd"]
        assert [point["images"] for point in one["curve"]][:: len(one["curve"]) - 1] == [0, one["images"]]
        assert one["curve"][-1]["scores"] == {"FD-pixels": one["fd"]}
        seconds = [point["seconds"] for point in one["curve"]]
        assert seconds == sorted(seconds)
        assert seconds[-1] == pytest.approx(one["seconds"], abs=0.15)
        assert json.loads((tmp_path / "c" / name / "summary.json").read_text())["student"]["fd"] == one["fd"]
    assert summary["methods"]["sfd"]["nfe"] == 2
    said = capsys.readouterr()
    assert "do nothing" not in said.err, "the teacher's file is the comparison's doing"
    lines = said.out.splitlines()
    assert [line.split()[0] for line in lines[-6:]] == ["floor", "teacher", "dmd", "gdd", "msd", "sfd"]
    assert (tmp_path / "c/table.md").read_text().count("\n") == 8
    assert (tmp_path / "c/msd/manifest.json").exists()
    for name in ("curves.png", "samples.png"):
        with Image.open(tmp_path / "c" / name) as picture:
            assert min(picture.size) > 200


def test_the_final_score_is_what_evaluate_finds(tmp_path, capsys):
    """The one number that matters, by another way: potstill evaluate on the run folder, with generation and reference anew."""
    compare.main([DIGITS, "--methods", "sim", "--seconds", "0.1", "--points", "1", f"run_dir={tmp_path}/c", HERE, *TINY])
    found = json.loads((tmp_path / "c/summary.json").read_text())
    capsys.readouterr()
    evaluate.main([f"{tmp_path}/c/sim"])
    wanted = json.loads(capsys.readouterr().out)
    assert found["methods"]["sim"]["fd"] == pytest.approx(wanted["student"]["fd"], rel=1e-4)
    assert found["teacher"]["fd"] == pytest.approx(wanted["teacher"]["fd"], rel=1e-4)
    assert found["floor"]["fd"] == pytest.approx(wanted["floor"]["fd"], rel=1e-9)


def test_a_process_of_its_own_knows_its_peak_memory_and_hands_on_its_refusal(tmp_path, capfd):
    cfg = load(Path(DIGITS), [*TINY, f"run_dir={tmp_path}/c"])
    comparison.train_apart(cfg, tmp_path / "done.json", True, only_teacher=True)
    peak = json.loads((tmp_path / "done.json").read_text())["peak_memory_gib"]
    assert 0.1 < peak < 8
    assert (tmp_path / "c/teacher.safetensors").exists()
    cfg.data.path = f"{tmp_path}/nothing.zip"
    with pytest.raises(SystemExit) as stopped:
        comparison.train_apart(cfg, tmp_path / "failed.json", True, only_teacher=True)
    assert stopped.value.code == 2
    assert "nothing.zip" in capfd.readouterr().err
    assert not (tmp_path / "failed.json").exists()


def test_the_length_is_remembered_and_only_for_the_same_seconds(tmp_path):
    cfg = load(Path(DIGITS), [*TINY, f"run_dir={tmp_path}/c"])
    (tmp_path / "kimg.json").write_text(json.dumps({"kimg": 1.25, "seconds": 3.0}))
    assert rehearsal.kimg_in(3.0, cfg, tmp_path / "kimg.json", of_teacher=False) == 1.25
    with pytest.raises(UserError, match="holds a run of 3 seconds, got 4"):
        rehearsal.kimg_in(4.0, cfg, tmp_path / "kimg.json", of_teacher=False)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["--methods", "dmd,ddm"], "got 'ddm'"),
        (["--seconds", "-3"], "--seconds wants a number above 0"),
        (["--teacher-seconds", "nan"], "--teacher-seconds wants a number above 0"),
        (["--points", "0"], "--points wants at least 1"),
        (["--features", "pixels,pixels"], "different names"),
        (["--features", "A:nothing.pt"], "nothing.pt"),
        (["seconds=120"], "seconds= is not a setting of a run: wanted --seconds, a flag"),
        (["teacher_seconds=120"], "wanted --teacher-seconds"),
        (["apart=false"], "wanted --apart"),
    ],
)
def test_refusals(tmp_path, settings, words):
    with pytest.raises(UserError, match=words):
        compare.main([DIGITS, f"run_dir={tmp_path}/c", *TINY, *settings])


def test_a_number_that_is_none_is_refused_by_its_flag(capsys):
    with pytest.raises(SystemExit) as stopped:
        compare.main(["digits", "--seconds", "soon"])
    assert stopped.value.code == 2
    assert "--seconds: invalid float value: 'soon'" in capsys.readouterr().err


def test_where_a_comparison_is_written(monkeypatch):
    """run_dir= is a setting as in every other command, but the comparison's own folder by default."""
    folders = []
    monkeypatch.setattr(compare, "compare", lambda recipe, recipes, flags, folder: folders.append(str(folder)))
    compare.main(["digits"])
    compare.main(["digits", "run_dir=2024_10_01", "run_dir=a b/c"])
    assert folders == ["runs/compare-digits", "a b/c"]


def test_siblings_of_a_recipe_by_name_are_in_the_package_and_of_a_path_beside_it(tmp_path):
    ours = compare.siblings(find("digits"), "all")
    assert list(ours) == [
        "dmd", "four", "gdd", "gdd_four", "gdd_two", "moment_matching", "msd", "sfd", "sid", "sida", "sim", "sim_four", "sim_two", "two",
    ]  # fmt: skip  # sid2a goes on from a run of sid's
    assert list(compare.siblings(find("digits"), "sid2a")) == ["sid2a"]
    for name in ("digits", "digits_sim"):
        (tmp_path / f"{name}.yaml").write_text(text_of(ours["dmd" if name == "digits" else "sim"]))
    with (tmp_path / "digits.yaml").open("a") as file:
        file.write(f"--- # digits_gdd\n{text_of(ours['gdd'])}")
    assert list(compare.siblings(tmp_path / "digits.yaml", "all")) == ["dmd", "gdd", "sim"]


def test_students_as_independent_jobs_become_one_model(tmp_path, capsys):
    """student=1 and student=0 apart give what one command gives, down to the weights; then the run is measured as one."""
    small = [*TINY, "train.kimg=0.1"]
    recipe = str(ROOT / "configs/digits_msd.yaml")
    train.main([recipe, f"run_dir={tmp_path}/apart", *small, "student=1"])
    assert not (tmp_path / "apart/summary.json").exists()
    train.main([recipe, f"run_dir={tmp_path}/apart", *small, "student=0"])
    teacher = f"teacher.checkpoint={tmp_path}/apart/teacher.safetensors"
    train.main([recipe, f"run_dir={tmp_path}/together", *small, teacher])
    for k in range(2):
        files = [tmp_path / run / f"student-{k}/student.safetensors" for run in ("apart", "together")]
        from potstill.engine.models.weights import read_tensors

        a, b = (read_tensors(file)[0] for file in files)
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    capsys.readouterr()
    evaluate.main([f"{tmp_path}/apart", "--which", "student"])
    measured = json.loads(capsys.readouterr().out)["student"]
    assert measured["fd"] == pytest.approx(json.loads((tmp_path / "together/summary.json").read_text())["student"]["fd"], rel=1e-4)


def test_adm_goes_on_from_dm(tmp_path):
    """Stage ADM: students.start takes student and fake net of stage DM; the new head starts fresh. At lr ~ 0 nothing moves."""
    small = [*TINY, "train.kimg=0.1"]
    recipe = str(ROOT / "configs/digits_msd.yaml")
    train.main([recipe, f"run_dir={tmp_path}/dm", *small])
    teacher, still = f"teacher.checkpoint={tmp_path}/dm/teacher.safetensors", "1e-12"
    lr = [f"train.optim.student.lr={still}", f"train.optim.fake.lr={still}"]
    train.main([recipe, f"run_dir={tmp_path}/adm", *small, teacher, f"students.start={tmp_path}/dm", "method.gan=true", *lr])
    import torch

    from potstill.engine.training.checkpoint import load_newest

    for k in range(2):
        dm, adm = (load_newest(tmp_path / run / f"student-{k}/checkpoints", "cpu") for run in ("dm", "adm"))
        assert dm is not None
        assert adm is not None
        for name, tensors in dm["nets"].items():
            for key, value in tensors.items():
                torch.testing.assert_close(adm["nets"][name][key], value, rtol=0, atol=1e-8)
        assert any(key.startswith("head.") for key in adm["nets"]["fake"])
