"""No command is silent for long: a line every few seconds where there is no terminal, and a bar on any terminal."""

import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from potstill.engine import probe
from potstill.engine.common import progress
from potstill.engine.common.progress import Bar, Pulse
from potstill.engine.data.images import open_images
from potstill.engine.data.shards import Manifest, write_shards
from potstill.engine.diffusion.sampling import one_step
from potstill.engine.measure.networks import features_by_name
from potstill.engine.measure.score import reference, score
from potstill.engine.models.weights import save_net
from potstill.engine.skipping import probe as probing
from potstill.engine.training import log, posthoc
from potstill.engine.training.log import Meter, Progress
from tests.test_phema import profiles
from tests.test_sample import tiny_net

ROOT = Path(__file__).parent.parent


@pytest.fixture
def quick(monkeypatch):
    """Everything a hundred times as fast."""
    monkeypatch.setattr(progress, "FIRST", 0.04)
    monkeypatch.setattr(progress, "EVERY", 0.1)
    monkeypatch.setattr(log, "LOOK", 0.08)


def test_the_first_line_comes_within_five_seconds_and_then_one_every_ten():
    assert progress.FIRST <= 5 and progress.EVERY <= 10 and log.LOOK < progress.EVERY


def until(capsys, pattern, count=1):
    """What stderr says once a line has come so often. Fails where it does not come."""
    said, end = "", time.monotonic() + 20
    while len(re.findall(pattern, said, re.MULTILINE)) < count:
        assert time.monotonic() < end, said
        time.sleep(0.01)
        said += capsys.readouterr().err
    return said


def test_a_bar_speaks_off_a_terminal_even_while_nothing_is_done(quick, capsys):
    with Bar("encoding", 1000, 200, unit="images") as bar:
        until(capsys, r"^encoding: 200 of 1,000 images, 00:0\d$")
        bar.update(400)
        until(capsys, r"^encoding: 600 of 1,000 images, 00:0\d, 00:0\d left$", 2)
    assert not bar.pulse.thread.is_alive()


def test_what_is_short_or_has_no_title_or_is_another_rank_says_nothing(quick, capsys, monkeypatch):
    with Bar("short", 3) as bar:
        bar.update(3)
    monkeypatch.setenv("RANK", "1")
    for title in ("of rank 1", None):
        assert list(Bar(title, 2).over(map(np.zeros, (1, 1)))) == [[0], [0]]
        with Bar(title, 3):
            time.sleep(0.07)
    monkeypatch.delenv("RANK")
    with Bar(None, 3):
        time.sleep(0.07)
    Bar("never begun", 3).over([])
    time.sleep(0.07)
    assert capsys.readouterr().err == ""


def test_a_pulse_ends_with_its_error(quick, capsys):
    with pytest.raises(ValueError, match="wrong"), Bar("x", 3) as bar:
        raise ValueError("wrong")
    assert not bar.pulse.thread.is_alive()
    pulse = Pulse(lambda: None)
    pulse.close()
    assert not pulse.thread.is_alive()


def test_training_shows_losses_from_the_first_iteration_on(capsys, monkeypatch):
    """Between two lines of metrics what this rank has seen so far; the means that are logged stay as they are."""
    monkeypatch.setattr(log, "LOOK", 0.03)
    meter, one = Meter(), Progress("student", 60, 0)
    seen = []
    for step in range(1, 31):
        meter.add({"student/match": torch.tensor(float(step)), "student/grad_norm": torch.tensor(1.0)})
        one.advance()
        if one.due:
            seen.append(step)
            one.glance(step * 0.128, meter.glance())
        time.sleep(0.01)
    one.close()
    lines = capsys.readouterr().err.splitlines()
    assert seen[0] == 1 and 3 <= len(seen) < 30
    assert [line.partition("  00:")[0] for line in lines] == [
        f"student {step}/60  {step * 0.128:.1f} kimg  student/match {(1 + step) / 2:.4g}" for step in seen
    ]
    assert all(line.endswith(" left") for line in lines)
    assert meter.read() == {"student/match": 15.5, "student/grad_norm": 1.0}


def test_a_long_iteration_is_no_silence(quick, capsys):
    one = Progress("student", 60, 12)
    one.back_to(20)
    until(capsys, "^student 20/60  0.0 kimg$")
    one.close()
    other = Progress("student", 60, 12, quiet=True)
    time.sleep(0.2)
    other.close()
    assert not other.due and capsys.readouterr().err == ""


def test_measuring_is_not_silent(quick, capsys, monkeypatch):
    """Both sides of a distance, real images and generated ones."""
    digits, pixels = open_images("digits").thinned(40), features_by_name("pixels")
    forward = type(pixels).forward

    def slow(*arguments):
        time.sleep(0.06)
        return forward(*arguments)

    monkeypatch.setattr(type(pixels), "forward", slow)
    against = reference(digits, pixels, n=20, batch=4)
    assert re.search(r"measuring 40 of digits: \d+ of 40 images", capsys.readouterr().err)
    score(tiny_net(), one_step(80), digits, pixels, n=20, batch=4, against=against, progress="measuring the student")
    assert re.search(r"measuring the student: \d+ of 20 images", capsys.readouterr().err)


def test_probing_is_not_silent(quick, capsys, tmp_path, monkeypatch):
    """Measuring the blocks, and choosing among them."""
    save_net(tmp_path / "t.safetensors", tiny_net())
    slow = {name: getattr(probing, name) for name in ("observe", "joint")}
    for name, call in slow.items():
        monkeypatch.setattr(probing, name, lambda *given, call=call: (time.sleep(0.2), call(*given))[1])
    words = ["--data", "digits", "--unlabelled", "--out", f"{tmp_path}/plan.json", "--bins", "2", "--images", "16", "--batch", "4"]
    probe.main([f"{tmp_path}/t.safetensors", *words])
    said = capsys.readouterr().err
    assert re.search(r"^probing: 0 of 2 bins, 00:00$", said, re.MULTILINE) and "bin 2 of 2: σ" in said
    assert re.search(r"^choosing layers: \d+ choices tried, 00:0\d$", said, re.MULTILINE)


def test_averaging_profiles_is_not_silent(quick, capsys, monkeypatch):
    summed = posthoc._tensors
    monkeypatch.setattr(posthoc, "_tensors", lambda *given: (time.sleep(0.06), summed(*given))[1])
    posthoc.reconstructed(profiles()[0], 0.07)
    assert re.search(r"^averaging: \d+ of 12 profiles, 00:0\d", capsys.readouterr().err, re.MULTILINE)


@pytest.mark.parametrize("what", ["latents", "prompts"])
def test_encoding_counts_what_is_done_of_a_shard(quick, capsys, tmp_path, what):
    """A shard may take minutes."""

    def make(rows, done):
        for _ in rows:
            time.sleep(0.02)
            done(1)
        return {what: torch.zeros(len(rows), 2)}

    write_shards(tmp_path, Manifest(what, 20, 20, {}), make, f"encoding {what}")
    counts = [int(n) for n in re.findall(rf"^encoding {what}: (\d+) of 20 {what}", capsys.readouterr().err, re.MULTILINE)]
    assert counts and 0 < counts[-1] < 20


CODE = """
import sys, time, fcntl, struct, termios
fcntl.ioctl(2, termios.TIOCSWINSZ, struct.pack("HHHH", {rows}, {columns}, 0, 0))
from potstill.engine.common.progress import Bar
from potstill.engine.training.log import Progress
progress = Progress("student", 60, 0)
for step in range(1, 4):
    progress.advance()
    progress.glance(step * 0.128, {{"student/match": 0.25}})
    time.sleep(0.15)
progress.close()
with Bar("measuring", 40, unit="images") as bar:
    for _ in range(14):
        bar.update(2)
        time.sleep(0.1)
"""


@pytest.mark.parametrize(("rows", "columns"), [(0, 0), (24, 100)])
def test_a_bar_is_there_on_any_terminal(rows, columns):
    """Also on one that says that it has no columns, as under some tools for CI."""
    ours, theirs = pty.openpty()
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")} | {"PYTHONPATH": str(ROOT)}
    code = CODE.format(rows=rows, columns=columns)
    process = subprocess.Popen([sys.executable, "-c", code], stderr=theirs, stdout=subprocess.DEVNULL, env=environment)
    os.close(theirs)
    said = b""
    try:
        while data := os.read(ours, 4096):
            said += data
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    assert process.wait() == 0
    text = said.decode()
    assert re.search(r"student: +5%\|.+ 3/60 .*student/match=0\.25", text), text
    assert re.search(r"measuring: +\d+%\|.+/40 ", text), text
