"""Readers of nets: weight files, run folders, manifests, exports, plans, and other people's pickles."""

import json
import math
import pickle
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import test_convert_edm
import test_convert_edm2
import test_convert_sfd
import torch
from hypothesis import strategies as st
from torch import nn

from potstill.engine import export
from potstill.engine.diffusion.sampling import one_step
from potstill.engine.formats.edm_pickle import read_net
from potstill.engine.models.opening import Model, open_models
from potstill.engine.models.partitions import Partition
from potstill.engine.models.router import Router, student_folder, write_manifest
from potstill.engine.models.student import Student
from potstill.engine.models.weights import load_net, save_net, save_weights, weights_hash
from potstill.engine.nets.edm import from_kwargs
from potstill.engine.skipping.apply import Skipping
from potstill.engine.skipping.blocks import blocks_of
from potstill.engine.skipping.plan import Plan, check_plan, load_plan, save_plan
from potstill.engine.skipping.probe import Probed
from potstill.engine.training.posthoc import profile_file, profiles_in, reconstructed

from .forms import pickle_of, safetensors_of
from .jail import Reader
from .mutations import MARKER, OUTSIDE, json_of, yaml_of

TINY = {
    "img_resolution": 8, "img_channels": 1, "label_dim": 3, "model_type": "SongUNet", "model_channels": 4, "channel_mult": [1],
    "num_blocks": 1, "attn_resolutions": [], "channel_mult_emb": 1,
}  # fmt: skip
SUMMARY = {
    "floor": {"fd": 0.0704}, "teacher": {"fd": 0.24, "nfe": 27}, "seconds": {"student": 110.2}, "images_seen": {"student": 36000},
    "student": {"fd": 0.3789, "nfe": 1, "n": 1797, "seeds": "0-1796", "features": "FD-pixels", "data": "digits", "reference_images": 1797},
    "precision": "float32", "seed": 0, "versions": {"torch": "2.13.0"}, "device": "cpu x2",
}  # fmt: skip
RECIPE = "teacher:\n  checkpoint: teacher.safetensors\ndata:\n  path: digits\n"
WAY = one_step(2.5).to_dict()


def tiny(seed: int = 0, **changes: Any) -> nn.Module:
    """A denoiser of a few hundred numbers, no two of them alike."""
    net = from_kwargs("EDMPrecond", **TINY | changes).eval().requires_grad_(False)
    draw = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.copy_(0.1 * torch.randn(p.shape, generator=draw))
    return net


def manifest_of(data: bytes) -> st.SearchStrategy[bytes]:
    """A manifest with something wrong, or one that is right but for a name that leads out of the folder."""

    def named(k: int, name: str) -> bytes:
        manifest = json.loads(data)
        manifest["students"][k]["file"] = name
        return json.dumps(manifest).encode()

    names = (f"../{OUTSIDE}", f"student-0/../../{OUTSIDE}", "student-0/../student-0/student.safetensors", f"./../in/../{OUTSIDE}")
    return json_of(data) | json_of(data) | json_of(data) | st.builds(named, st.just(0), st.sampled_from(names))


# What a net is, and what it may not be.


def contents(net: nn.Module, metadata: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Of a net that was read: its weights by their hash, its words, and what is wrong with either."""
    state = net.state_dict()
    strange = [name for name, t in state.items() if not t.isfinite().all()]
    kinds = [name for name, t in state.items() if t.dtype != torch.float32]
    return {
        "weights": weights_hash(net),
        "metadata": json.dumps(metadata, sort_keys=True),
        "not finite": strange,
        "not float32": kinds,
        **more,
    }


def false_net(found: dict[str, Any], right: dict[str, Any], damaged: bool) -> str | None:
    if found["not finite"]:
        return "weights that are not finite"
    if found["not float32"]:
        return "weights of another type"
    if damaged and found["weights"] != right["weights"]:
        return "damaged weights"
    return "damaged metadata" if damaged and found["metadata"] != right["metadata"] else false_model(found.get("model"))


def false_model(model: Model | None) -> str | None:
    if model is None:
        return None
    levels, net = model.sampler.sigmas, model.net
    if not all(type(s) in (int, float) and math.isfinite(s) for s in levels):
        return f"noise levels {levels!r:.60}"
    if any(type(getattr(net, name)) is not int for name in ("img_resolution", "img_channels", "label_dim")):
        return "a size that is no whole number"
    return None


# Weight files


def _weights(folder: Path) -> None:
    save_net(
        folder / "net.safetensors", tiny(), method="dmd", data="digits", sampler=WAY, kimg=1.5, teacher={"source": "x", "sha256": "0" * 64}
    )


def _load(folder: Path) -> dict[str, Any]:
    net, metadata = load_net(folder / "net.safetensors")
    return contents(net, metadata)


def _open(folder: Path) -> dict[str, Any]:
    """As `potstill sample FILE` does: an image too."""
    model = open_models(folder / "net.safetensors")[0]
    image = Student(model.net, model.sampler, model.metadata).eval()(seeds=[0])
    return contents(model.net, model.metadata, model=model, image=image)


# Averages that a run has kept


def _profiles(folder: Path) -> None:
    for k, (images, std) in enumerate(((100, 0.05), (100, 0.1), (200, 0.05), (200, 0.1))):
        save_net(profile_file(folder, images, std), tiny(k), method="dmd", sampler=WAY, phema={"std": std, "images": images})


def _reconstructed(folder: Path) -> dict[str, Any]:
    """As `potstill convert phema` does, and then the net."""
    made = reconstructed(profiles_in(folder), 0.07)
    save_weights(folder / "net.safetensors", made.tensors, made.metadata)
    return _load(folder)


# Run folders and manifests


def _run(folder: Path) -> None:
    save_net(folder / "teacher.safetensors", tiny(1))
    save_net(folder / "student.safetensors", tiny(2), method="dmd", data="digits", sampler=WAY)
    (folder / "config.yaml").write_text(RECIPE)
    (folder / "summary.json").write_text(json.dumps(SUMMARY))


def _run_read(folder: Path) -> list[str]:
    return [weights_hash(model.net) for model in open_models(folder)]


def _students(folder: Path) -> None:
    partition = Partition("blocks", (0, 1, 1))
    for k in range(2):
        save_net(student_folder(folder, k) / "student.safetensors", tiny(k), method="msd", sampler=WAY, partition=partition.hash, student=k)
    write_manifest(folder, partition)
    (folder / "config.yaml").write_text(RECIPE)
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    shutil.copyfile(student_folder(folder, 0) / "student.safetensors", folder.parent / OUTSIDE)


def _manifest_read(folder: Path) -> dict[str, Any]:
    (model,) = open_models(folder, "student")
    assert isinstance(model.net, Router)
    image = Student(model.net, model.sampler, model.metadata).eval()(seeds=[0, 1, 2])
    names = [one["file"] for one in json.loads((folder / "manifest.json").read_text())["students"]]
    return {"weights": weights_hash(model.net), "names": names, "classes": model.net.partition.student_of, "image": image, "model": model}


def _false_manifest(found: dict[str, Any], right: dict[str, Any], damaged: bool) -> str | None:
    if any(".." in name or name.startswith("/") for name in found["names"]):
        return "a name outside of the folder"
    if any(type(k) is not int for k in found["classes"]):
        return f"students of classes {found['classes']!r:.60}"
    if len(found["classes"]) != found["model"].net.label_dim:
        return "students of other classes than the net has"
    same = (found["weights"], found["classes"]) == (right["weights"], right["classes"])
    return false_model(found["model"]) if same else "other students, or for other classes"


def _exported(kind: str) -> Callable[[Path], dict[str, bytes]]:
    def read(folder: Path) -> dict[str, bytes]:
        out = folder / f"out-{kind}"
        shutil.rmtree(out, ignore_errors=True)
        before = _snapshot(folder.parent)
        export.main([str(folder), "--to", kind, "--out", str(out)])
        found = {str(f.relative_to(out)): f.read_bytes() for f in out.rglob("*") if f.is_file()}
        shutil.rmtree(out)
        after = _snapshot(folder.parent)
        for new in after - before:
            (folder.parent / new[0]).unlink()
        return found | {"changed": repr(after - before).encode() if after != before else b""}

    return read


def _snapshot(folder: Path) -> set[tuple[str, int]]:
    """The files below a folder, and when they were written."""
    return {(str(f.relative_to(folder)), f.stat().st_mtime_ns) for f in folder.rglob("*") if f.is_file()}


def _false_export(found: dict[str, bytes], right: dict[str, bytes], damaged: bool) -> str | None:
    if found["changed"]:
        return "an export that writes files outside of its folder"
    card = found["README.md"].decode()
    if any(ord(c) < 32 and c != "\n" for c in card):
        return "control characters in a model card"
    if sorted(found) != sorted(right):
        return "an export of other files"
    weights = [name for name in right if name.endswith(".safetensors")]
    return None if all(found[name] == right[name] for name in weights) else "an export of other weights"


def _hub_folder(folder: Path) -> None:
    run = folder.parent / "run"
    run.mkdir()
    _run(run)
    export.main([str(run), "--to", "hub", "--out", str(folder / "hub")])
    for file in (folder / "hub").iterdir():
        file.rename(folder / file.name)


def _pretrained(folder: Path) -> dict[str, Any]:
    student = Student.from_pretrained(folder)
    return contents(student.net, student.metadata, image=student(seeds=[0]))


# Plans


def _plan_of(net: nn.Module) -> Plan:
    order, channels = list(blocks_of(net.model)), {n: b.out_channels for n, b in Probed(net).parts.items()}
    draw = torch.Generator().manual_seed(0)
    rows = {n: {k: torch.randn(2, channels[n], generator=draw).tolist() for k in "ab"} for n in order[:2]}
    return Plan(weights_hash(net), 8, [0.002, 1.0, 80.0], order, [2, 1], 0.01, rows, {"cost": [0.1, 0.2], "say": "x"})


def _plan(folder: Path) -> None:
    save_plan(folder / "plan.json", _plan_of(tiny()))


def _follow(folder: Path) -> Plan:
    """As a run does that skips by it: one evaluation in every bin."""
    plan, net = load_plan(folder / "plan.json"), tiny()
    check_plan(plan, net, "plan.json")
    skipping = Skipping(net, plan).eval()
    for sigma in (0.5, 2.0):
        skipping(torch.zeros(2, 1, 8, 8), torch.tensor(sigma), torch.eye(3)[:2])
    return plan


def _false_plan(found: Plan, right: Plan, damaged: bool) -> str | None:
    a, b = asdict(found) | {"report": None}, asdict(right) | {"report": None}
    if not all(type(e) in (int, float) and math.isfinite(e) for e in found.edges):
        return "noise levels of a plan that are no finite numbers"
    if (
        any(type(p) is not int for p in found.prefix)
        or any(type(n) is not str for n in found.order)
        or len(set(found.order)) < len(found.order)
    ):
        return "prefixes or blocks of a plan that are none, or come twice"
    numbers = [x for one in found.affine.values() for rows in one.values() for row in rows for x in row]
    if not all(type(x) in (int, float) and abs(x) < 3e38 for x in numbers):
        return "a calibration of a plan that is not finite"
    return "a damaged plan" if damaged and a != b else None


# Other people's files


@contextmanager
def pretended(modules: dict[str, dict[str, Any]]) -> Iterator[None]:
    """Modules with these classes, importable while a pickle is written."""
    made = {title: types.ModuleType(title) for title in modules}
    for title, classes in modules.items():
        for name, one in classes.items():
            one.__module__, one.__qualname__ = title, name
            setattr(made[title], name, one)
    with patch.dict(sys.modules, made), patch.object(test_convert_edm._Persistent, "source", f"open('../{MARKER}', 'w')"):
        yield


def _easy() -> dict[str, dict[str, Any]]:
    return {"dnnlib": {}, "dnnlib.util": {"EasyDict": type("EasyDict", (dict,), {})}}


def _persistence() -> dict[str, dict[str, Any]]:
    def _reconstruct_persistent_obj(meta: Any) -> None:
        raise AssertionError("executed")

    return _easy() | {"torch_utils": {}, "torch_utils.persistence": {"_reconstruct_persistent_obj": _reconstruct_persistent_obj}}


def _edm_pickle(folder: Path) -> None:
    with pretended(_persistence()):
        (folder / "net.pkl").write_bytes(pickle.dumps(test_convert_edm.snapshot(tiny()), protocol=4))


def _edm2_pickle(folder: Path) -> None:
    with pretended(_persistence()):
        (folder / "net.pkl").write_bytes(pickle.dumps(test_convert_edm2.snapshot2(test_convert_edm2.tiny2()), protocol=4))


def _edm2_state(folder: Path) -> None:
    net = test_convert_edm2.tiny2()
    save_net(folder / "like.safetensors", net)
    averages = {"stds": [0.05, 0.1], "emas": [net.state_dict(), net.state_dict()]}
    with pretended(_easy()):
        state = sys.modules["dnnlib.util"].EasyDict(cur_nimg=8192)
        torch.save({"state": state, "ema": averages}, folder / "net.pkl", _use_new_zipfile_serialization=False)


def _sfd_pickle(folder: Path) -> None:
    names = ("EDMPrecond", "SongUNet", "UNetBlock", "Conv2d", "Linear", "GroupNorm", "PositionalEmbedding")
    classes = {name: type(name, (nn.Module,), {}) for name in names}
    with pretended(_easy() | {"models": {}, "models.networks_edm": classes}):
        net = test_convert_sfd.student_of(**TINY | {"label_dim": 0, "img_channels": 3})
        (folder / "net.pkl").write_bytes(pickle.dumps(test_convert_sfd.released(net), protocol=4))


def _state_dict(zipped: bool) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        net = tiny()
        save_net(folder / "like.safetensors", net)
        torch.save(net.state_dict(), folder / "net.pkl", _use_new_zipfile_serialization=zipped)

    return make


def _converted(folder: Path, net: str | None = None) -> dict[str, Any]:
    like = folder / "like.safetensors"
    found = read_net(folder / "net.pkl", net=net, like=like if like.is_file() else None)
    return contents(found.net, found.net.kwargs | {"encoder": found.encoder})


def _false_conversion(found: dict[str, Any], right: dict[str, Any], damaged: bool) -> str | None:
    """A changed weight in somebody else's file is still a weight, as long as it is a number: their files have no checksums."""
    if found["not finite"]:
        return "weights that are not finite"
    arguments, wanted = (json.loads(one["metadata"]) for one in (found, right))
    odd = [key for key in wanted if key in arguments and type(arguments[key]) is not type(wanted[key])]
    return f"an argument {odd[0]} of another type" if odd else None


def _false_run(found: list[str], right: list[str], damaged: bool) -> str | None:
    return None if found and set(found) <= set(right) else "other nets than the run's"


NET, TABLE = {"net.safetensors": safetensors_of}, {"manifest.json": manifest_of}
SUMMED = {"summary.json": json_of, "config.yaml": yaml_of}
READERS = [
    Reader("weight file", _weights, _load, NET, false_net, 700),
    Reader("weight file, sampled", _weights, _open, NET, false_net, 100, both=0.0),
    Reader("profiles", _profiles, _reconstructed, {"phema/0000000200-0.050.safetensors": safetensors_of}, false_net, 100),
    Reader("run folder", _run, _run_read, {"config.yaml": yaml_of}, _false_run, 70),
    Reader("manifest", _students, _manifest_read, TABLE, _false_manifest, 200),
    Reader("export to hub", _students, _exported("hub"), TABLE, _false_export, 100),
    Reader("export of a run", _run, _exported("safetensors"), SUMMED, _false_export, 70),
    Reader("folder of the hub", _hub_folder, _pretrained, {"model.safetensors": safetensors_of, "config.json": json_of}, false_net, 80),
    Reader("plan", _plan, _follow, {"plan.json": json_of}, _false_plan, 500),
    Reader("EDM's pickle", _edm_pickle, _converted, {"net.pkl": pickle_of}, _false_conversion, 400),
    Reader("EDM2's snapshot", _edm2_pickle, _converted, {"net.pkl": pickle_of}, _false_conversion, 300),
    Reader(
        "EDM2's training state", _edm2_state, lambda folder: _converted(folder, "ema.0.100"), {"net.pkl": pickle_of}, _false_conversion, 150
    ),
    Reader("SFD's pickle", _sfd_pickle, _converted, {"net.pkl": pickle_of}, _false_conversion, 200),
    Reader("torch.save, zip", _state_dict(True), _converted, {"net.pkl": None}, _false_conversion, 300),
    Reader("torch.save, older", _state_dict(False), _converted, {"net.pkl": pickle_of}, _false_conversion, 300),
]
