"""macOS and Windows, as far as Linux can play them: without the modules and functions that they lack, and in their ways."""

import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from test_old_runs import SETTINGS
from test_without_triton import HIDDEN

from potstill.engine.data.files import _seek_and_read
from potstill.engine.formats.images import dataset_zip, png
from potstill.engine.jobs.machine import peak_gib

ROOT = Path(__file__).parent.parent
#: No Triton, what the standard library has on Unix alone, files in the system's own encoding, and processes that are not forked.
ELSEWHERE = """
import multiprocessing, os, warnings
sys.modules.update(dict.fromkeys(("fcntl", "resource", "pwd", "grp", "termios")))
for name in ("pread", "fork", "sched_getaffinity", "getuid"):
    delattr(os, name)
warnings.filterwarnings("error", category=EncodingWarning, module=r"potstill\\.")
multiprocessing.set_start_method("spawn")
from potstill.engine.data import images
images.IN_MEMORY_BYTES = 0  # so that other processes read them
"""
COMMANDS = """
from potstill.engine import evaluate, sample, train
data, folder, *settings = sys.argv[1:]
train.main(["configs/digits.yaml", f"data.path={data}", f"run_dir={folder}", *settings])
sample.main([folder, "--seeds", "0-3", "--out", f"{folder}/four.npz"])
evaluate.main([folder, "--images", "16"])
print([name for name, module in sys.modules.items() if name.split(".")[0] in ("triton", "fcntl", "resource") and module])
"""


def test_a_run_from_a_zip_to_its_images(tmp_path):
    """With a file name in it that is not ASCII, and pictures that a worker process reads."""
    generator = np.random.default_rng(0)
    with dataset_zip(tmp_path / "bilder-größer.zip") as data:
        for i in range(64):
            data.add(png(Image.fromarray(generator.integers(0, 256, (8, 8), np.uint8))), i % 10)
    command = [sys.executable, "-X", "warn_default_encoding", "-c", HIDDEN + ELSEWHERE + COMMANDS, tmp_path / "bilder-größer.zip"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    settings = [*SETTINGS, "train.kimg=0.128", "data.workers=1"]
    done = subprocess.run([*command, tmp_path / "run", *settings], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert np.load(tmp_path / "run/four.npz")["images"].shape == (4, 8, 8, 1)
    assert (tmp_path / "run/report.html").exists()


def test_what_an_encoding_lacks_is_printed_in_another_way():
    """Into a file or pipe Windows writes the code page of the country."""
    command = [sys.executable, "-m", "potstill", "probe", "--help"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONIOENCODING": "cp1252"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "\\u03c3" in done.stdout


def test_a_file_is_read_at_many_places_at_once_without_pread(tmp_path):
    content = np.random.default_rng(0).bytes(1 << 16)
    (tmp_path / "file").write_bytes(content)
    fd, wrong = os.open(tmp_path / "file", os.O_RDONLY), []

    def read(seed):
        for at in np.random.default_rng(seed).integers(0, 1 << 16, 3000).tolist():
            if _seek_and_read(fd, 100, at) != content[at : at + 100]:
                wrong.append(at)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.close(fd)
    assert not wrong


def test_peak_memory_is_in_each_systems_own_unit(monkeypatch):
    import resource

    cpu = torch.device("cpu")
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=3 << 20))
    assert peak_gib(cpu) == 3.0
    monkeypatch.setattr(sys, "platform", "darwin")
    assert peak_gib(cpu) == 0.003
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_gib(cpu) is None
