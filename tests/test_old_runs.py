"""What was made before the packages had one name loads as it did then: tests/golden/run is a run folder of commit f3e47b7.

run_images.safetensors are the images of that code for seeds 0 … 7, went_on.jsonl its metrics of the same run continued.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from potstill import Student

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
SETTINGS = [
    "net.model_channels=8", "net.num_blocks=1", "net.channel_mult=[1]", "net.channel_mult_emb=1", "net.attn_resolutions=[]",
    "train.batch=32", "train.keep=1", "train.log_iterations=1", "teacher.train.kimg=0.128", "teacher.train.batch=32", "teacher.train.keep=1",
    "teacher.train.ema_kimg=5", "train.ema_kimg=3", "train.optim.student.lr=3e-4", "train.optim.fake.lr=1e-3", "teacher.loss.sampling_steps=2",
    "eval.n=16", "precision=fp32", "device=cpu", "train.grid_kimg=100", "log.tensorboard=false",
]  # fmt: skip


def test_an_old_student_gives_its_images():
    images = Student.from_pretrained(GOLDEN / "run")(seeds=range(8))
    wanted = load_file(GOLDEN / "run_images.safetensors")["images"]
    assert wanted.float().std() > 10
    assert (images.int() - wanted.int()).abs().max() <= 1


def test_an_old_run_goes_on(tmp_path):
    shutil.copytree(GOLDEN / "run", tmp_path / "run")
    command = [sys.executable, "-m", "engine.train", "configs/digits.yaml", f"run_dir={tmp_path}/run", *SETTINGS, "train.kimg=0.256"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours, theirs = (
        [json.loads(line) for line in file.read_text().splitlines()] for file in (tmp_path / "run/metrics.jsonl", GOLDEN / "went_on.jsonl")
    )
    ours = [line for line in ours if "alarm" not in line]  # which that version did not know
    assert [line["step"] for line in ours] == list(range(1, 9))
    for line, wanted in zip(ours, theirs, strict=True):
        for key in wanted.keys() - {"seconds", "images_per_second"}:
            assert line[key] == pytest.approx(wanted[key], rel=1e-3, abs=1e-6), (line["step"], key)
    before, after = (load_file(folder / "student.safetensors") for folder in (GOLDEN / "run", tmp_path / "run"))
    assert [name for name in before if not torch.equal(before[name], after[name])] != []  # it was trained further
