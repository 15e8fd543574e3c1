"""potstill export and Student: every format gives the images of our own sampler, in processes that know only the files.

The net of the diffusers folder is a second writing of EDM's U-Nets; it is compared with ours for every kind of net.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from potstill.engine.common.errors import UserError
from potstill.engine.config.tree import load
from potstill.engine.diffusion.sampling import Sampler, few_step, ode, one_step
from potstill.engine.export import Graph, main
from potstill.engine.formats.onnx import program
from potstill.engine.jobs.job import Job
from potstill.engine.models import student as student_file
from potstill.engine.models.generate import generate
from potstill.engine.models.opening import open_models
from potstill.engine.models.partitions import Partition
from potstill.engine.models.router import student_folder, write_manifest
from potstill.engine.models.student import Student
from potstill.engine.models.weights import read_metadata, read_tensors, save_net
from potstill.engine.nets.edm import from_kwargs
from potstill.engine.nets.steps import add_step_condition

ROOT = Path(__file__).parent.parent
SONG = {
    "img_resolution": 8, "img_channels": 1, "label_dim": 3, "model_type": "SongUNet", "model_channels": 8,
    "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4],
}  # fmt: skip
NCSN = SONG | {
    "embedding_type": "fourier", "encoder_type": "residual", "channel_mult_noise": 2, "resample_filter": [1, 3, 3, 1]
}  # fmt: skip
ADM = {
    "img_resolution": 8, "img_channels": 3, "label_dim": 3, "model_type": "DhariwalUNet", "model_channels": 64,
    "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4],
}  # fmt: skip
EDM2 = {
    "img_resolution": 8, "img_channels": 1, "label_dim": 3, "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1,
    "attn_resolutions": [4], "channels_per_head": 4,
}  # fmt: skip
ANCESTRAL = Sampler("ancestral", [80.0, 5.0, 0.5])
LICENSE = "These weights are CC BY-NC-SA 4.0."
SUMMARY = {
    "floor": {"fd": 0.0704}, "teacher": {"fd": 0.24, "nfe": 27},
    "student": {"fd": 0.3789, "nfe": 1, "n": 1797, "seeds": "0-1796", "features": "FD-pixels", "data": "digits",
                "reference_images": 1797, "features_sha256": None},
    "seconds": {"student": 110.2}, "images_seen": {"student": 36000}, "precision": "float32", "seed": 0,
    "versions": {"torch": "2.13.0"}, "device": "cpu x2",
}  # fmt: skip


def net_of(precond="EDMPrecond", **kwargs):
    """A net whose every weight counts: EDM starts some at 0, and a mistake there would not show."""
    torch.manual_seed(1)
    net = from_kwargs(precond, **kwargs).eval()
    for p in net.parameters():
        nn.init.normal_(p, std=0.08 if p.dim() > 1 else 0.3)
    return net


def run_folder(path, net, sampler, summary=SUMMARY, **more):
    """What potstill train leaves behind, as far as an export reads it."""
    path.mkdir(parents=True, exist_ok=True)
    metadata = {"method": "dmd", "data": "digits", "sampler": sampler.to_dict()} | more
    save_net(path / "student.safetensors", net, **metadata)
    (path / "config.yaml").write_text("teacher:\n  checkpoint: null\n")
    if summary is not None:
        (path / "summary.json").write_text(json.dumps(summary))
    return path


def expected(net, sampler, seeds, labels=None):
    """Float images by the sampler itself, one generator a seed."""
    z = [torch.Generator().manual_seed(seed) for seed in seeds]

    class Noise:
        def normal(self, *shape):
            return torch.stack([torch.randn(*shape, generator=g) for g in z])

    classes = torch.tensor([s % net.label_dim for s in seeds] if labels is None else labels) if net.label_dim else None
    with torch.no_grad():
        return sampler(net, torch.eye(net.label_dim)[classes] if net.label_dim else None, Noise())


def export(source, kind, out):
    main([str(source), "--to", kind, "--out", str(out)])
    return out


def refused(*arguments):
    with pytest.raises(UserError) as caught:
        main([str(a) for a in arguments])
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


# Our own formats


def test_a_clean_process_gets_the_same_images_from_file_and_hub_folder(tmp_path):
    net, sampler = net_of(**SONG), one_step(2.5)
    run = run_folder(tmp_path / "run", net, sampler)
    for kind in ("safetensors", "hub"):
        export(run, kind, tmp_path / kind)
    torch.save(expected(net, sampler, range(7)), tmp_path / "wanted.pt")
    torch.save(torch.cat(list(generate(net, sampler, np.arange(7) % 3, range(7)))), tmp_path / "pixels.pt")
    code = """if True:
        import sys, torch
        from potstill.engine.models.student import Student
        wanted, pixels = torch.load("wanted.pt"), torch.load("pixels.pt")
        for place in ("safetensors", "safetensors/student.safetensors", "hub", "hub/model.safetensors", "run"):
            student = Student.from_pretrained(place)
            found = student(range(7), dtype=torch.float32, batch=3)
            assert (found - wanted).abs().max() <= 1e-5, place
            assert torch.equal(student(seeds=range(7)), pixels), place
        assert not {"hydra", "sklearn", "tensorboard"} & set(sys.modules)
    """
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "hub/config.json").read_text())
    assert config["kwargs"] == SONG
    assert config["sampler"] == sampler.to_dict()


def test_a_student_is_a_module_with_a_differentiable_generator(tmp_path):
    net, sampler = net_of(**SONG), one_step(2.5)
    student = Student(run_folder(tmp_path / "run", net, sampler))
    assert not student.training and student.sampler == Student.from_pretrained(tmp_path / "run").sampler
    with pytest.raises(UserError, match=r"how it is sampled: Student\(net, sampler\), or Student\(FOLDER\)"):
        Student(student.net)
    z, labels = torch.randn(4, 1, 8, 8), torch.tensor([2, 0, 1, 1])
    rows = torch.eye(3)[labels]
    torch.testing.assert_close(student.generate(z, labels), net(2.5 * z, torch.tensor(2.5), rows), rtol=0, atol=0)
    torch.testing.assert_close(student.generate(z, rows), student.generate(z, labels), rtol=0, atol=0)
    student.generate(z, labels).sum().backward()
    assert all(p.grad is not None for name, p in student.named_parameters() if "augment" not in name)
    assert student(seeds=[]).shape == (0, 1, 8, 8)
    wanted = expected(net, sampler, [5, 9], [1, 1])
    torch.testing.assert_close(student([5, 9], [1, 1], dtype=torch.float32), wanted, rtol=0, atol=1e-6)
    student.save_pretrained(tmp_path / "again")
    again = Student.from_pretrained(tmp_path / "again")
    assert torch.equal(again([5, 9]), student([5, 9]))
    assert again.metadata == student.metadata


def test_an_ancestral_student_takes_its_noise_in_one_tensor(tmp_path):
    net = net_of(**SONG)
    student = Student(net, ANCESTRAL).eval()
    z = torch.stack([torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(s)) for s in range(4)])
    with torch.no_grad():
        found = student.generate(z, torch.arange(4) % 3)
    torch.testing.assert_close(found, expected(net, ANCESTRAL, range(4)), rtol=0, atol=1e-6)
    with pytest.raises(UserError, match=r"wants noise \['N', 3, 1, 8, 8\], got \[2, 1, 8, 8\]"):
        student.generate(torch.zeros(2, 1, 8, 8))


@pytest.mark.parametrize(
    ("labels", "words"), [([0, 1], "wanted a list of classes, one for each of 3 seeds"), ([0, 1, 3], r"classes are 0 … 2, got 0 … 3"),
                          ([0.5, 1, 1], "a class is a whole number or a name, got 0.5")],
)  # fmt: skip
def test_labels_are_checked(labels, words):
    with pytest.raises(UserError, match=words):
        Student(net_of(**SONG), one_step(80.0))(seeds=[1, 2, 3], labels=labels)


def test_a_net_without_classes_takes_no_labels():
    student = Student(net_of(**SONG | {"label_dim": 0}), one_step(80.0)).eval()
    assert student([1]).shape == (1, 1, 8, 8)
    with pytest.raises(UserError, match="knows no classes"):
        student([1], [0])


def test_what_is_no_student_says_so(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no run folder or weight file"):
        Student.from_pretrained(tmp_path / "nothing")
    monkeypatch.setattr(student_file, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"no folder or file at some/name; .* pip install 'potstill\[hub\]'"):
        Student.from_pretrained("some/name")
    save_net(tmp_path / "teacher.safetensors", net_of(**SONG), method="teacher", sampler=ode("heun", 4).to_dict())
    with pytest.raises(UserError, match="is a teacher's weight file"):
        Student.from_pretrained(tmp_path / "teacher.safetensors")
    run = run_folder(tmp_path / "run", net_of(**SONG), one_step(2.5))
    with pytest.raises(UserError, match=r"load it with DiffusionPipeline\.from_pretrained"):
        Student.from_pretrained(export(run, "diffusers", tmp_path / "d"))


def test_several_students_are_exported_together_or_each_by_its_file(tmp_path):
    run, partition = tmp_path / "run", Partition("blocks", (0, 1, 1))
    for k in range(2):
        net = net_of(**SONG)
        nn.init.normal_(net.model.map_layer0.weight, std=k + 1)
        run_folder(student_folder(run, k), net, one_step(2.5), None, partition=partition.hash, student=k)
    write_manifest(run, partition)
    (run / "summary.json").write_text(json.dumps(SUMMARY))
    with torch.no_grad():
        wanted = Student.from_pretrained(run)(range(6), dtype=torch.float32)
    for kind in ("hub", "safetensors"):
        got = Student.from_pretrained(export(run, kind, tmp_path / kind))(range(6), dtype=torch.float32)
        assert torch.equal(got, wanted)
        assert "2 students, each for its own classes" in (tmp_path / kind / "README.md").read_text()
    for kind in ("diffusers", "onnx"):
        sentence = refused(run, "--to", kind, "--out", tmp_path / "x")
        assert "2 students: export each by its file (student-0/student.safetensors, student-1/" in sentence
        assert not list(tmp_path.glob("x*"))
    export(run / "student-1/student.safetensors", "diffusers", tmp_path / "one")


# diffusers


class Stub(nn.Module):
    """As much of diffusers' classes as the two files use; the real ones are tried where they are installed."""

    dtype, _execution_device = torch.float32, torch.device("cpu")

    def register_modules(self, unet):
        self.unet = unet

    def register_to_config(self, sampler):
        self.config = types.SimpleNamespace(sampler=sampler)


@pytest.fixture
def stubbed(monkeypatch):
    """Loads a diffusers folder without diffusers: a function of the folder."""
    diffusers, configuration = types.ModuleType("diffusers"), types.ModuleType("diffusers.configuration_utils")
    diffusers.ModelMixin = diffusers.DiffusionPipeline = Stub
    diffusers.ConfigMixin = object
    diffusers.ImagePipelineOutput = types.SimpleNamespace
    configuration.register_to_config = lambda function: function
    monkeypatch.setitem(sys.modules, "diffusers", diffusers)
    monkeypatch.setitem(sys.modules, "diffusers.configuration_utils", configuration)

    def loaded(folder):
        from safetensors.torch import load_file

        modules = []
        for file in (folder / "unet/denoiser.py", folder / "pipeline.py"):
            spec = importlib.util.spec_from_file_location(f"exported_{file.stem}", file)
            modules.append(importlib.util.module_from_spec(spec))
            spec.loader.exec_module(modules[-1])
        config = {k: v for k, v in json.loads((folder / "unet/config.json").read_text()).items() if k[0] != "_"}
        unet = modules[0].Denoiser(**config)
        unet.load_state_dict(load_file(folder / "unet/diffusion_pytorch_model.safetensors"))
        return modules[1].StudentPipeline(unet.eval(), json.loads((folder / "model_index.json").read_text())["sampler"])

    return loaded


KINDS = {
    "ddpm++": ("EDMPrecond", SONG), "ncsn++": ("VEPrecond", NCSN), "vp": ("VPPrecond", SONG | {"label_dim": 0}),
    "skip": ("EDMPrecond", NCSN | {"encoder_type": "skip", "decoder_type": "skip", "augment_dim": 9, "label_dim": 0}),
    "adm": ("EDMPrecond", ADM | {"augment_dim": 2}), "iddpm": ("iDDPMPrecond", ADM | {"M": 20, "label_dim": 0}),
    "sfd-v": ("EDMPrecond", SONG | {"step_condition": True}),
    "gdd": ("GDDPrecond", SONG), "ect": ("ECMPrecond", SONG), "ect0.01": ("ECMPrecond", SONG | {"sigma_min": 0.01}),
    "edm2": ("EDM2Precond", EDM2),
    "edm2, other": ("EDM2Precond", EDM2 | {"resample_filter": [1, 3, 3, 1], "clip_act": None, "label_dim": 0, "channel_mult_noise": 2}),
    "sigma_data": ("EDMPrecond", SONG | {"sigma_data": 0.7, "use_fp16": False}),
}  # fmt: skip
WALKS = {
    "one": one_step(2.5), "unit": Sampler("one_step", [2.5], start="unit"), "ancestral": ANCESTRAL,
    "two": Sampler("renoise", [17.5, 0.9]), "four": Sampler("renoise", [80.0, 17.5, 2.5, 0.17], start="unit"),
    "afs": few_step(4), "plain": few_step(3, afs=False),
}  # fmt: skip


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "sfd-v"])  # which is sampled below
def test_the_standalone_net_is_ours_for_every_kind(kind, tmp_path, stubbed):
    precond, kwargs = KINDS[kind]
    net = net_of(precond, **kwargs)
    run = run_folder(tmp_path / "run", net, one_step(2.5))
    unet = stubbed(export(run, "diffusers", tmp_path / "out")).unet
    x, sigma = torch.randn(5, net.img_channels, 8, 8), torch.tensor([0.01, 0.3, 1.0, 7.0, 80.0])
    x = x * (1 + sigma[:, None, None, None])
    labels = torch.eye(3)[torch.arange(5) % 3] if net.label_dim else None
    with torch.no_grad():
        wanted, found = net(x, sigma, labels), unet(x, sigma, labels)
        assert (wanted - x).abs().max() > 0.1
        size = wanted.abs().amax((1, 2, 3), keepdim=True)  # of each image: D = x - σ F is as large as σ
        assert ((found - wanted).abs() / size).max() < 1e-5
        torch.testing.assert_close(unet(x, 0.3), net(x, torch.tensor(0.3)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("walk", WALKS)
def test_the_pipeline_samples_as_we_do(walk, tmp_path, stubbed):
    net = net_of(**SONG)
    pipe = stubbed(export(run_folder(tmp_path / "run", net, WALKS[walk]), "diffusers", tmp_path / "out"))
    seeds = [3, 0, 11]
    found = pipe(seeds=seeds, output_type="raw").images
    torch.testing.assert_close(found, expected(net, WALKS[walk], seeds), rtol=0, atol=1e-5)
    assert pipe.nfe == WALKS[walk].nfe
    found = pipe(seeds=seeds, class_labels=[2, 2, 1], output_type="raw", return_dict=False)[0]
    torch.testing.assert_close(found, expected(net, WALKS[walk], seeds, [2, 2, 1]), rtol=0, atol=1e-5)
    pixels = torch.cat(list(generate(net, WALKS[walk], np.array(seeds) % 3, seeds)))
    pictures = pipe(seeds=seeds).images
    assert np.abs(np.stack([np.array(p) for p in pictures]).astype(int) - pixels[:, 0].numpy()).max() <= 1
    with pytest.raises(ValueError, match="trained for"):
        pipe(num_inference_steps=9)
    with pytest.raises(ValueError, match="class_labels want one class among 0 … 2"):
        pipe(seeds=seeds, class_labels=[0, 1, 3])


@pytest.mark.parametrize("walk", WALKS)
def test_the_pipeline_walks_over_an_iddpm_nets_own_levels(walk, tmp_path, stubbed):
    precond, kwargs = KINDS["iddpm"]
    net, sampler = net_of(precond, **kwargs), WALKS[walk]
    pipe = stubbed(export(run_folder(tmp_path / "run", net, sampler), "diffusers", tmp_path / "out"))
    wanted = expected(net, sampler, [3, 0])
    torch.testing.assert_close(pipe(seeds=[3, 0], output_type="raw").images, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())
    known = [net.round_sigma(s) for s in sampler.sigmas]
    assert [pipe.unet.round_sigma(s) for s in sampler.sigmas] == known != sampler.sigmas
    assert set(known) <= set(net.u.tolist())


@pytest.mark.parametrize(
    ("kind", "where"),
    [("ncsn++", "model.map_noise.freqs"), ("iddpm", "u"), ("sfd-v", "model.map_steps.waves.freqs"), ("edm2", "unet.emb_fourier.phases")],
)
def test_frequencies_and_levels_are_not_rounded_with_the_weights(kind, where, tmp_path, stubbed):
    precond, kwargs = KINDS[kind]
    net = net_of(precond, **kwargs)
    unet = stubbed(export(run_folder(tmp_path / "run", net, one_step(2.5)), "diffusers", tmp_path / "out")).unet
    exact = unet.get_buffer(where).clone()
    assert not torch.equal(exact, exact.bfloat16().float())
    for rounded in (unet.to(torch.bfloat16), unet.half()):
        assert rounded.get_buffer(where).dtype == torch.float32
        assert torch.equal(rounded.get_buffer(where), exact)
        assert next(rounded.parameters()).dtype != torch.float32


@pytest.mark.parametrize("kwargs", [SONG, ADM, NCSN], ids=["ddpm++", "adm", "ncsn++"])
def test_a_student_that_knows_of_steps_is_sampled_with_several_numbers(kwargs, tmp_path, stubbed):
    net = add_step_condition(net_of(**kwargs))
    for p in net.parameters():
        nn.init.normal_(p, std=0.08 if p.dim() > 1 else 0.3)
    walk = few_step(5, step_condition=True, rho=5.0)
    pipe = stubbed(export(run_folder(tmp_path / "run", net, walk), "diffusers", tmp_path / "out"))
    for nfe in (3, 2, 4):
        found = pipe(seeds=[1, 2], num_inference_steps=nfe, output_type="raw").images
        torch.testing.assert_close(found, expected(net, walk.with_nfe(nfe), [1, 2]), rtol=0, atol=1e-5)


def test_latents_and_generators_are_taken_as_diffusers_does(tmp_path, stubbed):
    net = net_of(**SONG)
    pipe = stubbed(export(run_folder(tmp_path / "run", net, one_step(2.5)), "diffusers", tmp_path / "out"))
    z = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(4))
    wanted = net(2.5 * z, torch.tensor(2.5), torch.eye(3)[[1, 1]])
    by_latents = pipe(latents=z, class_labels=1, output_type="raw").images
    by_generator = pipe(2, class_labels=1, generator=torch.Generator().manual_seed(4), output_type="raw").images
    torch.testing.assert_close(by_latents, wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(by_generator, wanted, rtol=0, atol=1e-5)
    shown = pipe(latents=z, class_labels=1, output_type="pt").images
    torch.testing.assert_close(shown, (wanted / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)


@pytest.mark.skipif(find_spec("diffusers") is None, reason="diffusers is not installed: pip install diffusers")
def test_diffusers_itself_loads_it_in_a_process_without_us(tmp_path):
    for name, walk in (("one", one_step(2.5)), ("few", few_step(4)), ("again", WALKS["four"])):
        net = net_of(**SONG)
        export(run_folder(tmp_path / f"run-{name}", net, walk), "diffusers", tmp_path / name)
        torch.save(expected(net, walk, range(4)), tmp_path / f"{name}.pt")
    precond, kwargs = KINDS["ncsn++"]
    waves = net_of(precond, **kwargs)
    export(run_folder(tmp_path / "run-waves", waves, one_step(2.5)), "diffusers", tmp_path / "waves")
    torch.save(waves.model.map_noise.freqs, tmp_path / "freqs.pt")
    code = """if True:
        import sys, torch
        from diffusers import DiffusionPipeline
        pipes = {d: DiffusionPipeline.from_pretrained(d, custom_pipeline=d, trust_remote_code=True) for d in ("one", "few", "again")}
        for name, pipe in pipes.items():
            found = pipe(seeds=range(4), output_type="raw").images
            assert (found - torch.load(f"{name}.pt")).abs().max() <= 1e-5
        given = {"custom_pipeline": "waves", "trust_remote_code": True, "torch_dtype": torch.bfloat16}
        unet = DiffusionPipeline.from_pretrained("waves", **given).unet
        assert unet.dtype == torch.bfloat16
        assert torch.equal(unet.model.map_noise.freqs, torch.load("freqs.pt"))  # not rounded
        assert not {"engine", "kernels", "potstill"} & set(sys.modules)
    """
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed: pip install transformers")
def test_diffusers_and_transformers_import_beside_our_kernels():
    code = "import potstill.kernels, diffusers, transformers; from diffusers import UNet2DModel; print(potstill.kernels.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).parent == ROOT / "potstill" / "kernels"


# Graphs


SMALL = SONG | {"channel_mult": [1], "attn_resolutions": []}  # tracing takes its time, for every layer


@pytest.mark.parametrize(
    ("walk", "kwargs"),
    [(one_step(2.5), SMALL), (Sampler("ancestral", [80.0, 1.0]), SMALL | {"label_dim": 0}), (few_step(3), SMALL),
     (few_step(3), SMALL | {"precond": "iDDPMPrecond"}), (WALKS["two"], SMALL), (WALKS["four"], SMALL),
     (WALKS["two"], EDM2 | {"precond": "EDM2Precond"})],
    ids=["one", "ancestral", "afs", "iddpm", "two", "four", "edm2"],
)  # fmt: skip
def test_the_exported_program_is_the_generator_for_any_batch(walk, kwargs):
    net = net_of(**kwargs)
    graph = Graph(Student(net, walk).eval())
    exported = program(graph, graph.example())
    assert "potstill" not in str(exported.graph)
    made = exported.module()
    for n in (1, 5):
        shape = (graph.student.draws, *graph.student.shape)[graph.student.draws == 1 :]
        inputs = (torch.randn(n, *shape), torch.arange(n) % 3)[: 2 if net.label_dim else 1]
        with torch.no_grad():
            torch.testing.assert_close(made(*inputs), graph(*inputs), rtol=0, atol=1e-5)


def test_a_graph_for_other_programs_has_no_op_of_ours():
    """The nets may run on kernels.norm_silu, which no other program knows."""
    from potstill.kernels import norm_silu

    class Norm(nn.Module):
        def forward(self, x, w):
            return norm_silu(x, w, w, 2, 1e-5, add=x.mean((2, 3)))

    inputs = torch.randn(2, 8, 4, 4), torch.randn(8)
    made = torch.export.export(Norm(), inputs)
    assert "potstill" not in str(made.graph)
    torch.testing.assert_close(made.module()(*inputs), Norm()(*inputs), rtol=0, atol=1e-6)


ONNX = all(map(find_spec, ("onnx", "onnxscript", "onnxruntime")))


@pytest.mark.skipif(not ONNX, reason="onnx, onnxscript, onnxruntime are not all installed: pip install 'potstill[onnx]'")
@pytest.mark.parametrize("walk", ["one", "afs", "ancestral", "four"])
def test_onnxruntime_gives_the_same_images(walk, tmp_path):
    import onnxruntime

    net = net_of(**SONG)
    out = export(run_folder(tmp_path / "run", net, WALKS[walk]), "onnx", tmp_path / "out")
    session = onnxruntime.InferenceSession(out / "student.onnx", providers=["CPUExecutionProvider"])
    draws = [WALKS[walk].nfe] if WALKS[walk].solver in ("ancestral", "renoise") else []
    z = torch.stack([torch.randn(*draws, 1, 8, 8, generator=torch.Generator().manual_seed(s)) for s in range(5)])
    (found,) = session.run(None, {"z": z.numpy(), "labels": np.arange(5) % 3})
    torch.testing.assert_close(torch.from_numpy(found), expected(net, WALKS[walk], range(5)), rtol=0, atol=1e-5)


@pytest.mark.skipif(ONNX, reason="onnx is installed: its absence cannot be seen")
def test_without_onnx_the_extra_is_named(tmp_path):
    run = run_folder(tmp_path / "run", net_of(**SONG), one_step(2.5))
    assert "pip install 'potstill[onnx]'" in refused(run, "--to", "onnx", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# The card, and what can be wrong


def test_the_card_is_filled_from_the_run(tmp_path):
    teacher = {"source": "https://host/edm.pkl", "sha256": "ab" * 32}
    run = run_folder(tmp_path / "my-run", net_of(**SONG), one_step(2.5), license=LICENSE, teacher=teacher)
    texts = {kind: (export(run, kind, tmp_path / kind) / "README.md").read_text() for kind in ("safetensors", "hub", "diffusers")}
    for text in texts.values():
        for words in (
            "license: cc-by-nc-sa-4.0", "# my-run", "DMD/DMD2", "https://host/edm.pkl (sha256 abab", "| 27 | 0.240 |",
            "| student | 1 | 0.379 |", "| 0.070 |", "FD-pixels, n = 1,797", "FD-pixels is no FID", "one_step, noise levels 2.5",
            "images seen: 36,000", "torch 2.13.0", LICENSE,
        ):  # fmt: skip
            assert words in text, words
    assert "library_name: diffusers" in texts["diffusers"]
    assert "Student.from_pretrained" in texts["hub"]
    file = export(run / "student.safetensors", "safetensors", tmp_path / "file")
    assert "| student | 1 | 0.379 |" in (file / "README.md").read_text()


def code_in(folder):
    """The Python of a card, as it stands there."""
    return re.search(r"```python\n(.*?)\n```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL).group(1)


@pytest.mark.parametrize("classes", [0, 1, 3, 10])
@pytest.mark.parametrize("kind", ["safetensors", "hub", "diffusers"])
def test_the_code_of_a_card_runs_as_it_stands(kind, classes, tmp_path):
    if kind == "diffusers" and find_spec("diffusers") is None:
        pytest.skip("diffusers is not installed: pip install diffusers")
    names = {"classes": ["it's `a`", 'b "\\', *"cdefghij"][:classes]} if classes else {}
    export(run_folder(tmp_path / "run", net_of(**SONG | {"label_dim": classes}), one_step(2.5), **names), kind, tmp_path / kind)
    code = code_in(tmp_path / kind) + "\nprint(len(images))\n"
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / kind, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ("4\n" if classes or kind == "diffusers" else "16\n")


@pytest.mark.parametrize("classes", [0, 1, 3, 10])
def test_the_graphs_code_asks_for_classes_that_there_are(classes, tmp_path, monkeypatch):
    """With a stand-in for onnxruntime, which looks at what it is given, where the packages are missing."""
    student, asked = net_of(**SONG | {"label_dim": classes}), []

    class InferenceSession:
        def __init__(self, path):
            assert path == "student.onnx"

        def run(self, outputs, given):
            asked.append(given)
            return [given["z"]]

    monkeypatch.setattr("potstill.engine.export.write_onnx", lambda *_: None)
    monkeypatch.setattr("potstill.engine.export.largest_difference", lambda *_: None)
    export(run_folder(tmp_path / "run", student, one_step(2.5)), "onnx", tmp_path / "onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", types.SimpleNamespace(InferenceSession=InferenceSession))
    exec(code_in(tmp_path / "onnx"), {})
    assert asked[0]["z"].shape == (16, 1, 8, 8) and asked[0]["z"].dtype == np.float32
    assert asked[0].keys() == ({"z", "labels"} if classes else {"z"})
    if classes:
        assert asked[0]["labels"].dtype.kind == "i" and sorted(set(asked[0]["labels"].tolist())) == list(range(classes))


def test_a_card_names_the_classes(tmp_path):
    many = [f"kind {k}" for k in range(998)] + ["crane", "crane"]
    for names, said, labels in (
        (
            ["roses", "sun_flowers", "<b>"],
            r"Classes: 0 roses; 1 sun\_flowers; 2 \<b\>.",
            "labels=['roses', 'roses', 'sun_flowers', '<b>'])",
        ),
        (many, "19 kind 19 … and 980 more (`classes` in the metadata).", "labels=['kind 0', 'kind 250', 'kind 500', 'kind 750'])"),
        (None, None, "labels=[0, 0, 1, 2])"),
    ):
        place = tmp_path / f"run-{len(names or ())}"
        net = net_of(**SONG | {"label_dim": len(names or "abc")})
        text = (
            export(run_folder(place, net, one_step(2.5), **({"classes": names} if names else {})), "hub", place / "hub") / "README.md"
        ).read_text()
        assert labels in text and (said in text if said else "Classes:" not in text)
    assert json.loads((tmp_path / "run-3/hub/config.json").read_text())["classes"] == ["roses", "sun_flowers", "<b>"]


def test_a_file_without_a_run_is_not_measured_and_its_licence_not_known(tmp_path):
    save_net(tmp_path / "sid.safetensors", net_of(**SONG), method="converted", sampler=one_step(2.5).to_dict())
    text = (export(tmp_path / "sid.safetensors", "hub", tmp_path / "out") / "README.md").read_text()
    assert "# sid\n" in text
    assert "Not measured" in text
    assert "Nothing is recorded about the licence" in text
    assert "license:" not in text


def test_licence_and_teacher_travel_from_the_pickle_to_the_student(tmp_path):
    teacher = tmp_path / "teacher.safetensors"
    kwargs = SONG | {"label_dim": 10}
    save_net(teacher, net_of(**kwargs), license=LICENSE, source="https://host/edm.pkl", sha256="ab")
    for stage in ("first", "second"):  # the second distils the first's student: the licence stays, and who it all came from
        cfg = load(ROOT / "configs/digits.yaml", [f"teacher.checkpoint={teacher}", f"run_dir={tmp_path / stage}"])
        job = Job(cfg, on_paper=True)
        method = types.SimpleNamespace(sampler=one_step(2.5), product="student")
        run = types.SimpleNamespace(average=lambda: net_of(**kwargs), method=method, kimg=1, seconds=1.0)
        teacher = tmp_path / f"{stage}.safetensors"
        job.save(run, teacher)
        assert read_metadata(teacher)["license"] == LICENSE
        assert read_metadata(teacher)["teacher"] == {"source": "https://host/edm.pkl", "sha256": "ab"}
    assert open_models(teacher, "student")[0].metadata["license"] == LICENSE


def test_what_cannot_be_exported_is_one_sentence(tmp_path):
    net, out = net_of(**SONG), ("--to", "hub", "--out", tmp_path / "out")
    assert "no run folder or weight file" in refused(tmp_path / "none", *out)
    (tmp_path / "empty").mkdir()
    assert "is no finished run (it has no summary.json)" in refused(tmp_path / "empty", *out)
    run = run_folder(tmp_path / "run", net, one_step(2.5), None)
    assert "or export the file student.safetensors in it" in refused(run, *out)
    (run / "summary.json").write_text("{")
    assert "is not readable as JSON" in refused(run, *out)
    (run / "summary.json").write_text("{}")
    (tmp_path / "there").mkdir()
    assert "there exists: choose a folder that does not" in refused(run, "--to", "hub", "--out", tmp_path / "there")
    (tmp_path / "file").write_text("")
    assert "cannot write" in refused(run, "--to", "hub", "--out", tmp_path / "file/out")
    save_net(tmp_path / "heun.safetensors", net, method="sfd", sampler=ode("heun", 4).to_dict())
    sentence = refused(tmp_path / "heun.safetensors", "--to", "diffusers", "--out", tmp_path / "out")
    assert "samples by one_step, ancestral, renoise, euler, this file wants heun" in sentence
    (run / "student.safetensors").write_bytes(b"damaged")
    assert "is not a complete safetensors file" in refused(run, *out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file", "heun.safetensors", "run", "there"]


def test_the_command_ends_with_2(tmp_path, capsys):
    done = subprocess.run(
        [sys.executable, "-m", "engine.export", "none", "--to", "hub", "--out", "o"], cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: no run folder or weight file at none")
    assert done.stderr.count("\n") == 1
    with pytest.raises(SystemExit) as ended:
        main(["none", "--to", "gguf", "--out", "o"])
    assert ended.value.code == 2
    assert "invalid choice: 'gguf'" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["safetensors", "hub"])
def test_sixteen_bits_are_half_the_bytes_and_nearly_the_same_images(kind, tmp_path):
    file, net = tmp_path / "student.safetensors", net_of(**NCSN)
    save_net(file, net, method="dmd", sampler=one_step(2.5).to_dict())
    main([str(file), "--to", kind, "--out", str(tmp_path / "out"), "--bits", "16"])
    (written,) = (tmp_path / "out").glob("*.safetensors")
    (whole, _), (short, _) = read_tensors(file), read_tensors(written)
    for name, weight in whole.items():
        assert torch.equal(short[name], weight.half() if weight.ndim > 1 else weight), name
    assert {t.dtype for t in short.values()} == {torch.float16, torch.float32}
    assert read_metadata(written) == read_metadata(file)
    z = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    wanted, got = (Student.from_pretrained(one).generate(z, torch.tensor([0, 1, 2, 0])) for one in (file, written))
    assert 0 < (wanted - got).abs().max() < 5e-3 * wanted.abs().max()


def test_sixteen_bits_are_refused_where_they_cannot_be(tmp_path):
    net = net_of(**SONG)
    with torch.no_grad():
        next(p for name, p in net.named_parameters() if name == "model.enc.8x8_conv.weight")[0, 0, 0, 0] = 1e6
    save_net(tmp_path / "s.safetensors", net, method="dmd", sampler=one_step(2.5).to_dict())
    with pytest.raises(UserError, match=r"enc.8x8_conv.weight has numbers beyond float16's 65,504"):
        main([f"{tmp_path}/s.safetensors", "--to", "hub", "--out", f"{tmp_path}/out", "--bits", "16"])
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="--bits 16 is for --to safetensors and hub, got --to onnx"):
        main([f"{tmp_path}/s.safetensors", "--to", "onnx", "--out", f"{tmp_path}/out", "--bits", "16"])
