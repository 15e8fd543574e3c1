"""Pipelines of diffusers that are opened after their run, from elsewhere, or from the hub's cache; and nothing that is half there.

Pipelines are tiny, random and made here (diffusers_pipelines.py). The hub is its cache and a stand-in for its downloads.
"""

import json
import shutil

import pytest

pytest.importorskip("diffusers")

import diffusers
import diffusers_pipelines

from potstill.engine.common.errors import UserError
from potstill.engine.models import origins

# What libraries warn of while they import one another, and of where they are put together here.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(?!potstill)", "ignore::FutureWarning:(?!potstill)"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning:diffusers"),
]


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """Pipelines by kind, made when they are asked for."""
    root, made = tmp_path_factory.mktemp("pipelines"), {}

    def folder(kind):
        if kind not in made:
            made[kind] = diffusers_pipelines.folder(kind, root / kind)
        return made[kind]

    return folder


# The hub's cache


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """hub(pipeline, *left_out): the snapshot of me/sd in a cache of its own, without some files. No request gets anywhere."""
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    origins._snapshot.cache_clear()

    def filled(pipeline, *left_out):
        (cache / "models--me--sd/refs").mkdir(parents=True)
        (cache / "models--me--sd/refs/main").write_text("abc")
        snapshot = shutil.copytree(pipeline, cache / "models--me--sd/snapshots/abc")
        for pattern in left_out:
            for path in list(snapshot.glob(pattern)):
                path.unlink()
        return snapshot

    yield filled
    origins._snapshot.cache_clear()


def sharded(folder, part="unet"):
    """The same pipeline with a part in several shards, as diffusers cuts it."""
    kind = getattr(diffusers, json.loads((folder / "model_index.json").read_text())[part][1])
    net = kind.from_pretrained(folder / part)
    shutil.rmtree(folder / part)
    net.save_pretrained(folder / part, max_shard_size="20KB")
    assert len(list((folder / part).glob("*-of-*.safetensors"))) > 1
    return folder


HALVES = {
    "the index alone": (["[!m]*/*", "[!m]*/*/*"], "scheduler/scheduler_config.json"),
    "no weights of the denoiser": (["unet/*.safetensors"], "unet/diffusion_pytorch_model.safetensors"),
    "no encoder": (["text_encoder/*"], "text_encoder/config.json"),
    "no words": (["tokenizer/tokenizer.json"], "tokenizer/tokenizer.json"),
    "no settings of the scheduler": (["scheduler/*"], "scheduler/scheduler_config.json"),
    "no VAE": (["vae/diffusion*"], "vae/diffusion_pytorch_model.safetensors"),
    "one shard too few": (["unet/*-00002-of-*"], "unet/diffusion_pytorch_model-00002-of-"),
    "shards without an index": (["unet/*.index.json"], "unet/diffusion_pytorch_model.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("case", HALVES)
def test_half_a_download_goes_on(case, hub, pipelines, tmp_path, monkeypatch):
    """The rest comes in the stand-in of a download; without one the sentence says what is not there."""
    left_out, missing = HALVES[case]
    whole = shutil.copytree(pipelines("sd15"), tmp_path / "whole")
    whole = sharded(whole) if "shard" in case else whole
    snapshot = hub(whole, *left_out)
    assert not origins.is_there("me/sd") and origins.to_come("me/sd")
    with pytest.raises(UserError, match="is not whole in the hub's cache") as refused:
        origins.fetched("me/sd")
    assert f"lacks {missing}" in str(refused.value) and "\n" not in str(refused.value)

    def download(name, **how):
        assert name == "me/sd" and how["use_safetensors"]
        shutil.copytree(whole, snapshot, dirs_exist_ok=True)
        return snapshot

    monkeypatch.setattr("diffusers.DiffusionPipeline.download", download)
    assert origins.fetched("me/sd") == snapshot and origins.is_there("me/sd") and not origins.to_come("me/sd")


@pytest.mark.parametrize("kind", diffusers_pipelines.PIPELINES)
def test_a_whole_snapshot_asks_for_nothing(kind, hub, pipelines, monkeypatch):
    snapshot = hub(pipelines(kind))
    monkeypatch.setattr("diffusers.DiffusionPipeline.download", lambda *_, **__: pytest.fail("a request"))
    assert origins.is_there("me/sd") and not origins.to_come("me/sd")
    assert origins.fetched("me/sd") == origins.local_path("me/sd") == snapshot


def test_a_whole_snapshot_of_shards_with_other_precisions(hub, pipelines, tmp_path):
    whole = sharded(shutil.copytree(pipelines("sd15"), tmp_path / "whole"))
    (whole / "unet/diffusion_pytorch_model.fp16.safetensors.index.json").write_text('{"weight_map": {"a": "none.safetensors"}}')
    hub(whole)
    assert origins.is_there("me/sd")
