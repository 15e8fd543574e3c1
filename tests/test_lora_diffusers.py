"""LoRA on diffusers' nets: the start, the training, and weight files that hold adapters alone and name the net they are for."""

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("peft")
diffusers = pytest.importorskip("diffusers")

import diffusers_models as dm  # noqa: E402
from peft import get_peft_model_state_dict  # noqa: E402

from potstill.engine.common.errors import Damaged, UserError  # noqa: E402
from potstill.engine.methods.base import copied, frozen  # noqa: E402
from potstill.engine.methods.dmd import DMDConfig  # noqa: E402
from potstill.engine.methods.sim import SIMConfig  # noqa: E402
from potstill.engine.models.origins import load_origin  # noqa: E402
from potstill.engine.models.tensors import write_tensors  # noqa: E402
from potstill.engine.models.weights import file_hash, load_net, read_metadata, read_tensors, save_net, weights_hash  # noqa: E402
from potstill.engine.nets.diffusers import DiffusersDenoiser  # noqa: E402
from potstill.engine.nets.lora import LoraConfig, base_weights, merged, with_adapters  # noqa: E402
from potstill.engine.training.optim import OptimConfig  # noqa: E402
from potstill.engine.training.run import Run, TrainConfig  # noqa: E402

LORA = LoraConfig(rank=4, alpha=10)
#: Known to have no use for some of what attention projects: the last block of a net for text and image drops the text.
UNUSED = {
    "sd3": ["transformer_blocks.1.attn.add_q_proj"],
    "qwen": ["transformer_blocks.1.attn.add_q_proj", "transformer_blocks.1.attn.to_add_out"],
}
SIGMA = torch.tensor([0.7, 3.0])


def teacher_of(name: str, tmp_path, **options) -> DiffusersDenoiser:
    folder = dm.folder(name, tmp_path / "teacher")
    net = DiffusersDenoiser.from_folder(folder, size=dm.TINY[name].shape[1:], **options)
    net.source, net.lora_of_copies = str(folder), LORA
    return net


def student_of(teacher: DiffusersDenoiser, seed: int = 0) -> DiffusersDenoiser:
    """With adapters that are not zero."""
    torch.manual_seed(seed)
    net = copied(teacher)
    with torch.no_grad():
        for key, p in net.named_parameters():
            if "lora_B" in key:
                p.normal_(std=0.2)
    return net


def D(net, name: str) -> torch.Tensor:
    """What a net makes of two states, without gradients for weights."""
    x = 3 * torch.randn(2, *dm.TINY[name].shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return frozen(net)(x, SIGMA, dm.condition(name, 2))


@pytest.mark.parametrize("name", dm.TINY)
def test_every_family(name, tmp_path):
    """At first the teacher bit for bit; all adapters take part; features have them, too; merged is the same net."""
    teacher = teacher_of(name, tmp_path)
    net = copied(teacher)
    assert {p.data_ptr() for p in teacher.parameters()} <= {p.data_ptr() for p in net.parameters()}
    assert base_weights(net).keys() == teacher.state_dict().keys()
    assert torch.equal(D(net, name), D(teacher, name))
    x, condition = torch.randn(2, *dm.TINY[name].shape), dm.condition(name, 2)
    net(x, SIGMA, condition).square().mean().backward()
    trained = {key: p.grad for key, p in net.named_parameters() if p.requires_grad}
    assert trained.keys() == net.state_dict().keys()
    idle = [
        key.removeprefix("model.").partition(".lora_B")[0] for key, g in trained.items() if "lora_B" in key and (g is None or not g.any())
    ]
    assert idle == UNUSED.get(name, [])
    moved = student_of(teacher)
    assert (D(moved, name) - D(teacher, name)).abs().max() > 1e-3
    torch.testing.assert_close(D(merged(moved), name), D(moved, name), rtol=1e-4, atol=1e-4)
    assert not torch.equal(frozen(moved).features(x, SIGMA, condition), frozen(teacher).features(x, SIGMA, condition))


@pytest.mark.parametrize("name", ["sd15", "pixart", "sd3", "flux", "dit"])
def test_a_file_of_adapters_is_the_student_again(name, tmp_path):
    """With alpha ≠ rank, and metadata that say so: rank, alpha, targets, and whose weights they are for."""
    teacher = teacher_of(name, tmp_path)
    student, path = student_of(teacher), tmp_path / "student.safetensors"
    save_net(path, student, method="sim", kimg=1.5)
    net, meta = load_net(path)
    assert torch.equal(D(net, name), D(student, name))
    said = meta["lora"]
    assert (said["rank"], said["alpha"]) == (4, 10) and "to_q" in said["targets"] and meta["diffusers"]["class"] == dm.TINY[name].name
    assert said["base"] == {"source": teacher.source, "sha256": weights_hash(teacher), "dtype": "float32"}
    tensors, _ = read_tensors(path)
    assert all("lora_" in key for key in tensors) and file_hash(path) == weights_hash(net) == weights_hash(student)
    ours = {key.removeprefix("model.").replace(".default.", "."): t for key, t in tensors.items()}
    theirs = get_peft_model_state_dict(student.model)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    save_net(tmp_path / "again.safetensors", net, **{key: meta[key] for key in ("method", "kimg")})
    assert read_metadata(tmp_path / "again.safetensors") == meta


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_over_16_bit_weights(name, tmp_path):
    """Adapters are float32, the start is the teacher's, and a file is loaded over the same 16 bits."""
    teacher = teacher_of(name, tmp_path, dtype=torch.bfloat16)
    student, path = student_of(teacher), tmp_path / "student.safetensors"
    assert {p.dtype for p in student.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in student.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert torch.equal(D(copied(teacher), name), D(teacher, name))
    save_net(path, student)
    net, meta = load_net(path)
    assert meta["lora"]["base"]["dtype"] == "bfloat16"
    assert torch.equal(D(net, name), D(student, name))


def test_a_base_that_is_not_there_or_another(tmp_path):
    teacher = teacher_of("pixart", tmp_path)
    path = tmp_path / "run" / "student.safetensors"
    path.parent.mkdir()
    save_net(path, student := student_of(teacher))
    (tmp_path / "teacher").rename(tmp_path / "moved")
    with pytest.raises(
        UserError, match=r"holds the adapters \(LoRA\) of .*teacher, which is not at .*teacher or .*run/teacher: wanted"
    ) as error:
        load_net(path)
    assert "\n" not in str(error.value)
    assert torch.equal(D(load_net(path, base=tmp_path / "moved")[0], "pixart"), D(student, "pixart"))
    (tmp_path / "moved").rename(path.parent / "teacher")
    assert torch.equal(D(load_net(path)[0], "pixart"), D(student, "pixart"))  # it is found beside the file, too
    with pytest.raises(UserError, match="wanted the very net that they were trained on"):
        load_net(path, base=dm.folder("pixart", tmp_path / "other", seed=1))
    with pytest.raises(UserError, match="wanted the very net that they were trained on"):
        load_net(path, base=dm.folder("dit", tmp_path / "dit"))


def test_a_base_in_a_weight_file_with_adapters_of_its_own(tmp_path):
    """A student is the teacher of a second stage: merged, it is a net like any other."""
    first = student_of(teacher_of("dit", tmp_path))
    save_net(tmp_path / "first.safetensors", first)
    whole = load_origin(tmp_path / "first.safetensors")
    whole.lora_of_copies = LORA
    second = student_of(whole, seed=1)
    save_net(tmp_path / "second.safetensors", second)
    assert torch.equal(D(load_net(tmp_path / "second.safetensors")[0], "dit"), D(second, "dit"))
    whole.lora_of_copies = None
    save_net(tmp_path / "whole.safetensors", whole)
    net, meta = load_net(tmp_path / "whole.safetensors")
    assert torch.equal(D(net, "dit"), D(whole, "dit")) and "lora" not in meta and net.source == str(tmp_path / "whole.safetensors")


@pytest.mark.parametrize(
    ("where", "value", "wanted"),
    [
        (("lora", "rank"), 0, r"lora\.rank = 0, wanted a whole number from 1"),
        (("lora", "rank"), 5, "is of another architecture"),
        (("lora", "alpha"), None, r"lora\.alpha = None, wanted"),
        (("lora", "targets"), [], r"lora\.targets = \[\], wanted"),
        (("lora", "targets"), ["to_x"], "no layer 'to_x'"),
        (("lora", "base"), {}, r"lacks lora\.base\.source"),
        (("diffusers", "class"), "Evil", "Evil is no denoiser that potstill knows"),
        (("diffusers", "config", "num_layers"), 10**6, r"diffusers\.config\.num_layers = 1000000, which no net has"),
        (("diffusers", "config", "num_layers"), "two", "describes a net that cannot be built|cannot be built from these settings"),
        (("diffusers", "size"), [8], r"diffusers\.size = \[8\], wanted two or three numbers"),
        (("diffusers", "scheme"), {}, "describes a net that cannot be built"),
        (("diffusers",), None, "has diffusers = None, wanted names and values"),
    ],
)
def test_metadata_that_cannot_be(where, value, wanted, tmp_path):
    save_net(tmp_path / "a.safetensors", student_of(teacher_of("pixart", tmp_path)))
    tensors, meta = read_tensors(tmp_path / "a.safetensors")
    inside = meta
    for key in where[:-1]:
        inside = inside[key]
    inside[where[-1]] = value
    write_tensors(tmp_path / "b.safetensors", tensors, {k: v if isinstance(v, str) else json.dumps(v) for k, v in meta.items()})
    with pytest.raises((UserError, Damaged), match=wanted):
        load_net(tmp_path / "b.safetensors")


@pytest.mark.parametrize(
    ("name", "cfg"), [("sd15", DMDConfig(gan=True, fake_per_student=1)), ("pixart", SIMConfig()), ("flux", SIMConfig())]
)
def test_training_moves_adapters_alone(name, cfg, tmp_path):
    """Five iterations, then what a run saves, the average: its adapters over the teacher's own file."""
    teacher = teacher_of(name, tmp_path)
    teacher.lora_of_copies = replace(LORA, dropout=0.1)
    before = {key: t.clone() for key, t in teacher.state_dict().items()}
    method = cfg.build(teacher, teacher)
    run = Run(method, TrainConfig(kimg=0.01, batch=2, optim={"student": OptimConfig(lr=1e-2)}), 0, torch.device("cpu"))
    for step in range(5):
        images = torch.randn(2, *dm.TINY[name].shape, generator=torch.Generator().manual_seed(step))
        run.take(images, prompts := dm.condition(name, 2, seed=step), (prompts,) * method.asks)
    assert all(torch.equal(t, before[key]) for key, t in teacher.state_dict().items())
    for net in (*method.nets.values(), run.ema.net):
        idle = {key for key, t in net.state_dict().items() if "lora_B" in key and not t.any()}
        assert {key for key in net.state_dict() if "lora_" not in key and not key.startswith("head.")} == idle == set()
    dropouts = {m.p for m in method.nets["student"].modules() if isinstance(m, torch.nn.Dropout)}
    assert 0.1 in dropouts  # DMD has set that of the net to 0
    save_net(tmp_path / "student.safetensors", run.average())
    assert torch.equal(D(load_net(tmp_path / "student.safetensors")[0], name), D(run.average(), name))


CONFIGS = {
    "sd15": ("UNet2DConditionModel", {"sample_size": 64, "cross_attention_dim": 768}),
    "pixart": (
        "PixArtTransformer2DModel",
        {"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28, "cross_attention_dim": 1152, "caption_channels": 4096}
        | {"sample_size": 64, "use_additional_conditions": False},
    ),
}


@pytest.mark.parametrize(("name", "rank", "adapters", "base"), [("sd15", 4, 797_184, 859_520_964), ("pixart", 8, 4_128_768, 610_856_096)])
def test_a_file_at_the_true_sizes(name, rank, adapters, base, tmp_path):
    """At most 1 % of the base, written as such a file: in SD1.5 up to rank 43, in PixArt up to 11; rank 64 has 1.48 % and 5.41 %.

    797,184 is the number that diffusers' own example for SD1.5 trains.
    """
    kind, config = CONFIGS[name]
    with torch.device("meta"):
        model = getattr(diffusers, kind).from_config(config)
        net = DiffusersDenoiser(model, {"prediction": "flow", "steps": 1000, "shift": 1.0})
        with_adapters(net, LoraConfig(rank=rank))
    count = sum(t.numel() for t in net.state_dict().values())
    assert count == adapters and sum(t.numel() for t in base_weights(net).values()) == base
    assert round(100 * 64 / rank * adapters / base, 2) == {"sd15": 1.48, "pixart": 5.41}[name]
    tensors = {key: torch.empty(t.shape) for key, t in net.state_dict().items()}
    write_tensors(tmp_path / "a.safetensors", tensors, {})
    assert (tmp_path / "a.safetensors").stat().st_size <= 0.01 * 4 * base
