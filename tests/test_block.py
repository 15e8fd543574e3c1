"""A residual block as one node of autograd, and attention as one or two, in Python and in C++, against the same net layer by layer."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from potstill.engine.nets import attention, block, ops
from potstill.engine.nets.edm import from_kwargs
from potstill.engine.nets.layers import BlockStyle, Init, UNetBlock
from potstill.kernels import native

SMALL = {"img_resolution": 16, "img_channels": 3, "model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [8]}
NETS = {
    "DDPM++": {"model_type": "SongUNet"},
    "NCSN++": {"model_type": "SongUNet", "embedding_type": "fourier", "encoder_type": "residual", "resample_filter": [1, 3, 3, 1]},
    "ADM": {"model_type": "DhariwalUNet", "model_channels": 64},
}
FROZEN = {"none": (), "convolutions": ("conv", "skip"), "skips and norms": ("skip", "norm"), "all": ("",)}

needs_native = pytest.mark.skipif(not native.used(), reason="without csrc/'s C++ a CPU takes the layers")


@pytest.fixture(params=["C++", "Python"])
def written_in(request, monkeypatch):
    """What float32 blocks run in; NCSN++'s that resample always run in Python."""
    ran, takes = [], block._in_one_op
    monkeypatch.setattr(block, "_in_one_op", lambda *given: ran.append(request.param == "C++" and takes(*given)) or ran[-1])
    monkeypatch.setattr(attention, "FEW", attention.FEW if request.param == "C++" else 0)
    yield
    assert any(ran) == (request.param == "C++")


def unet(name, dropout=0.2):
    torch.manual_seed(0)
    model = from_kwargs("EDMPrecond", **SMALL | {"dropout": dropout} | NETS[name]).model.train()
    with torch.no_grad():
        for p in model.parameters():  # none of them 0, as some begin
            p.copy_(torch.randn_like(p) * p.numel() ** -0.25 / 2 + (p.ndim == 1) / 10)
    return model


def outputs(model, n, dtype=torch.float32):
    torch.manual_seed(1)  # also of the dropout
    x = torch.randn(n, 3, 16, 16).to(dtype).requires_grad_()
    y = model(x, torch.rand(n))
    y.float().square().sum().backward()
    found = {"y": y.detach(), "x": x.grad, **{name: p.grad for name, p in model.named_parameters() if p.requires_grad}}
    model.zero_grad()
    return found


class Seen(TorchDispatchMode):
    """As a counter of FLOPs looks at every operation."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **kwargs or {})


def both(model, monkeypatch, *given):
    fused = outputs(model, *given)
    with monkeypatch.context() as patch:
        patch.setattr(ops, "fuses", lambda x: False)
        return fused, outputs(model, *given)


@needs_native
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("name", NETS)
def test_values_and_gradients_are_those_of_the_layers(name, frozen, n, written_in, monkeypatch):
    model = unet(name)
    for key, p in model.named_parameters():
        p.requires_grad_(not any(word in key for word in FROZEN[frozen]))
    fused, layers = both(model, monkeypatch, n)
    assert fused.keys() == layers.keys()
    for key in fused:
        assert (fused[key] is None) == (layers[key] is None), key
        if fused[key] is not None:
            assert (fused[key] - layers[key]).norm() <= 5e-6 * layers[key].norm(), key


@needs_native
@pytest.mark.parametrize("name", NETS)
def test_bfloat16_within_a_hundredth(name, monkeypatch):
    model = unet(name, dropout=0.0)
    fused, layers = both(model, monkeypatch, 3, torch.bfloat16)
    exact = outputs(model, 3)
    for key in ("y", "x"):
        far = [(found[key].float() - exact[key].float()).norm() / exact[key].float().norm() for found in (fused, layers)]
        assert far[0] <= max(1e-2, 1.2 * far[1]), key


@needs_native
def test_a_mask_is_of_its_seed_and_of_its_block():
    model = unet("DDPM++")
    first, again = outputs(model, 2), outputs(model, 2)
    assert all(torch.equal(first[key], again[key]) for key in first)
    blocks = [m for m in model.modules() if isinstance(m, UNetBlock)]
    keys = [block._key(torch.device("cpu")) for block in blocks]
    assert len({int(key) for key in keys}) == len(blocks)
    assert model.eval() and blocks[0]._key(torch.device("cpu")) is None


@needs_native
@pytest.mark.parametrize("joined", [False, True])
def test_a_frozen_block_keeps_what_its_norms_read(joined, written_in):
    model = unet("DDPM++").requires_grad_(False)
    block = model.dec["16x16_block0"]
    x, beside = (torch.randn(2, c, 16, 16, requires_grad=True) for c in (32, block.in_channels - 32))
    x, beside = (torch.cat([x, beside], 1), None) if joined else (x, beside)
    emb, kept = torch.randn(2, model.map_layer0.out_features), []
    parameters = {p.data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        block(x, emb, beside)
    images = [t.shape for t in kept if t.ndim == 4 and t.data_ptr() not in parameters]
    assert sorted(images) == sorted([torch.Size([2, block.in_channels, 16, 16]), torch.Size([2, block.out_channels, 16, 16])])
    assert sum(t.numel() for t in kept if t.ndim != 4 and t.data_ptr() not in parameters) < 500


@needs_native
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_gradients_lie_like_their_weights(name, layout, written_in):
    model = unet(name)
    for p in model.parameters():
        p.data = p.data.contiguous(memory_format=layout) if p.ndim == 4 else p.data
    outputs_of = {key: p for key, p in model.named_parameters() if p.ndim == 4 and ".conv" in key}
    model(torch.randn(2, 3, 16, 16), torch.rand(2)).square().sum().backward()
    assert all(p.grad.stride() == p.stride() for p in outputs_of.values())


@needs_native
@pytest.mark.parametrize("odd", ["conv0 in bfloat16", "skip in bfloat16", "proj in bfloat16", "8 channels"])
def test_what_the_cpp_does_not_know_runs_in_python(odd, monkeypatch):
    init = Init("xavier_uniform")
    style = BlockStyle(
        16, 0.0, heads=1, skip_scale=0.7, eps=1e-5, resample_filter=(1, 1), resample_proj=True, adaptive_scale=False,
        init=init, init_zero=init, init_attn=init,
    )  # fmt: skip
    torch.manual_seed(0)
    one = UNetBlock(8 if odd == "8 channels" else 16, 32, style, attention=True)
    if "bfloat16" in odd:
        getattr(one, odd.split()[0]).to(torch.bfloat16)
    x, emb = torch.randn(2, one.in_channels, 4, 4, requires_grad=True), torch.randn(2, 16)

    def outcome():
        y = one(x, emb)
        return y, *torch.autograd.grad(y.square().sum(), [x, *one.parameters()])

    found = outcome()
    monkeypatch.setattr(ops, "fuses", lambda x: False)
    for ours, exact in zip(found, outcome(), strict=True):
        assert (ours.float() - exact.float()).norm() <= (1e-2 if "bfloat16" in odd else 5e-6) * exact.float().norm()


@needs_native
def test_no_two_gradients_are_one_tensor():
    """Clipping and averaging write into them."""
    model = unet("DDPM++")
    model(torch.randn(2, 3, 16, 16), torch.rand(2)).square().sum().backward()
    places = [(p.grad.untyped_storage().data_ptr(), p.grad.storage_offset()) for p in model.parameters() if p.grad is not None]
    assert len(set(places)) == len(places)


@needs_native
def test_what_is_not_for_these_images_is_refused(written_in):
    """The kernels would read past its end."""
    model = unet("DDPM++")
    with pytest.raises(ValueError, match="for each of 4 images, got 2"):
        model(torch.randn(4, 3, 16, 16), torch.rand(2))
    one = model.dec["16x16_block0"]
    with pytest.raises(ValueError, match="beside"):
        one(torch.randn(4, 32, 16, 16), torch.randn(4, 64), torch.randn(4, one.in_channels - 32, 8, 16))
    outputs(model, 1)


@needs_native
def test_a_dispatch_mode_sees_blocks_of_which_a_part_trains():
    model = unet("DDPM++")
    for key, p in model.named_parameters():
        p.requires_grad_("norm" not in key)
    plain = outputs(model, 2)
    with Seen():
        found = outputs(model, 2)
    assert all(torch.equal(found[key], t) for key, t in plain.items())
