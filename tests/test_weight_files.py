"""Weight files: their hash says which tensors are in them and nothing else, and who may read them the umask says."""

import hashlib
import os
import shutil
import stat
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from potstill.engine.common.errors import UserError
from potstill.engine.diffusion.sampling import one_step
from potstill.engine.formats.diffusers import write_diffusers
from potstill.engine.jobs.folder import write_atomically
from potstill.engine.models.generate import write_pairs
from potstill.engine.models.partitions import Partition
from potstill.engine.models.router import load_router, student_folder, write_manifest
from potstill.engine.models.student import write_hub
from potstill.engine.models.weights import file_hash, load_net, save_net, weights_hash
from potstill.engine.nets.edm import from_kwargs
from potstill.engine.skipping.plan import Plan, check_plan, save_plan
from potstill.engine.training.checkpoint import save_checkpoint

KWARGS = {"img_resolution": 8, "img_channels": 1, "model_type": "SongUNet", "model_channels": 8, "num_blocks": 1, "channel_mult": [1, 1]}
TENSORS = {"b": torch.arange(4.0), "a": torch.ones(2, 3, dtype=torch.bfloat16), "c": torch.tensor(3), "d": torch.zeros(0, 2)}


def net_of(seed=0, precond="EDMPrecond"):
    torch.manual_seed(seed)
    return from_kwargs(precond, **KWARGS).eval()


def written(path, tensors, **metadata):
    save_file({name: t.contiguous() for name, t in tensors.items()}, path, metadata)
    return file_hash(path)


def by_hand(tensors):
    digest = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name].contiguous()
        digest.update(f"{name} {str(t.dtype)[6:]} {list(t.shape)}\n".encode())
        digest.update(bytes(t.untyped_storage())[: t.nbytes])
    return digest.hexdigest()


def test_equal_weights_have_one_hash(tmp_path):
    """Whatever the metadata say, and in whichever order safetensors writes them, which differs from call to call."""
    net = net_of()
    files = [tmp_path / f"{k}.safetensors" for k in range(8)]
    for k, file in enumerate(files):
        save_net(file, net, source="x", license="y", sha256="z", method="dmd", **({"note": "more"} if k > 6 else {}))
    assert len({file.read_bytes() for file in files}) > 1
    assert (
        {file_hash(file) for file in files} == {weights_hash(net)} == {weights_hash(load_net(files[0])[0])} == {by_hand(net.state_dict())}
    )
    iddpm = net_of(precond="iDDPMPrecond")
    save_net(files[0], iddpm)
    assert file_hash(files[0]) == weights_hash(iddpm)


def test_a_hash_knows_name_dtype_shape_and_bytes(tmp_path):
    path = tmp_path / "a.safetensors"
    others = [
        TENSORS, TENSORS | {"b": -TENSORS["b"]}, TENSORS | {"b": TENSORS["b"].double()}, TENSORS | {"b": TENSORS["b"].view(2, 2)},
        TENSORS | {"e": TENSORS["c"].clone()}, {name + "x": t for name, t in TENSORS.items()}, TENSORS | {"a": TENSORS["a"].half()},
    ]  # fmt: skip
    hashes = [written(path, tensors) for tensors in others]
    assert len(set(hashes)) == len(others)
    assert hashes == [by_hand(tensors) for tensors in others]
    assert written(path, dict(reversed(TENSORS.items())), one="1", two="2") == hashes[0]


def before(net):
    """What a plan of an earlier potstill calls its teacher."""
    digest = hashlib.sha256()
    for name, t in sorted(net.state_dict().items()):
        digest.update(f"{name} {list(t.shape)}\n".encode() + t.float().numpy().tobytes())
    return digest.hexdigest()


def test_plans_of_an_earlier_potstill_know_their_teacher():
    net = net_of()
    plan = Plan(weights_hash(net), 8, [0.002, 80.0], [], [0], 0.02)
    check_plan(plan, net, "plan.json")
    check_plan(replace(plan, teacher=before(net)), net, "plan.json")
    with pytest.raises(UserError, match="another teacher"):
        check_plan(replace(plan, teacher=before(net_of(1))), net, "plan.json")


@pytest.fixture
def manifest(tmp_path):
    partition = Partition("block", (0, 1))
    for k in range(2):
        student_folder(tmp_path, k).mkdir()
        save_net(
            student_folder(tmp_path, k) / "student.safetensors", net_of(k), partition=partition.hash, student=k, sampler={}, method="dmd"
        )
    write_manifest(tmp_path, partition)
    return tmp_path / "manifest.json"


def test_a_manifest_takes_the_same_student_written_again_and_one_of_an_earlier_potstill(manifest):
    text, file = manifest.read_text(), student_folder(manifest.parent, 1) / "student.safetensors"
    whole_file = hashlib.sha256(file.read_bytes()).hexdigest()
    manifest.write_text(text.replace(file_hash(file), whole_file))
    load_router(manifest)
    manifest.write_text(text)
    save_net(file, net_of(1), partition=Partition("block", (0, 1)).hash, student=1, note="again")
    load_router(manifest)
    save_net(file, net_of(2), partition=Partition("block", (0, 1)).hash, student=1)
    with pytest.raises(UserError, match="has changed since"):
        load_router(manifest)


def diffusers(path):
    shutil.rmtree(path, ignore_errors=True)  # an export is a new folder
    path.mkdir()
    write_diffusers(net_of(), one_step(2.5).to_dict(), path, {})


def hub(path):
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    save_net(path / "from.safetensors", net_of(), sampler=one_step(2.5).to_dict())
    write_hub(path / "from.safetensors", path)


WRITERS = {
    "net": lambda path: save_net(path, net_of()),
    "pairs": lambda path: write_pairs(path, net_of(), one_step(2.5), None, 1, 1, "cpu"),
    "text": lambda path: write_atomically(path, "a: 1\n"),
    "plan": lambda path: save_plan(path, Plan("", 8, [0.002, 80.0], [], [0], 0.02)),
    "checkpoint": lambda path: save_checkpoint(path, 1, {"a": torch.ones(1)}, 1),
    "diffusers": diffusers,
    "hub": hub,
}


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077], ids=oct)
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_who_may_read_a_file_the_umask_says(write, umask, tmp_path):
    """Also of one that replaces another, or what a killed process has left."""
    path, outer = tmp_path / "made", os.umask(umask)
    try:
        for _ in range(2):
            write(path)
            made = [f for f in [*tmp_path.rglob("*")] if f.is_file()]
            assert made and {stat.S_IMODE(f.stat().st_mode) for f in made} == {0o666 & ~umask}
            for file in made:
                file.chmod(0o600)
            if path.is_file():
                path.with_name("made.part").touch(0o600)
    finally:
        os.umask(outer)
