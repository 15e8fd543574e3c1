"""Embedded prompts are what the pipeline's own encode_prompt says of each alone, wherever they come from; a cache survives what may happen.

Pipelines are tiny, random and made here (diffusers_pipelines.py).
"""

import json
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("diffusers")

import diffusers_cases as cases
import diffusers_pipelines
from killing import killed, needs_fork
from safetensors.torch import load_file

from potstill.engine.common.checks import BadSetting
from potstill.engine.common.errors import Damaged, UserError
from potstill.engine.config.tree import load
from potstill.engine.config.unused import sentence
from potstill.engine.convert import main as convert
from potstill.engine.data import embeddings
from potstill.engine.data.embeddings import Embeddings, Encoder, write_embeddings
from potstill.engine.data.prompts import Prompts, PromptStream, TextConfig, open_prompts, prepare_prompts
from potstill.engine.nets.conditions import Text

CPU = torch.device("cpu")
TEXTS = ["a cat", "two dogs", "x", "fish, red", "a house", "no", "tree"]
# What libraries warn of while they import one another, and of where they are put together here.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:(?!potstill)", "ignore::FutureWarning:(?!potstill)")


def config(tmp_path, texts=TEXTS, **more):
    (tmp_path / "prompts.txt").write_text("\n".join(texts))
    return TextConfig(prompts=str(tmp_path / "prompts.txt"), **more)


def opened(cfg, folder, cache):
    prepare_prompts(cfg, folder, cache, CPU)
    return open_prompts(cfg, folder, cache, CPU)


def files_of(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


# Against the pipeline itself


@cache
def whole_pipeline(folder):
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(folder)


def alone(folder, text, null):
    """Embeds [1, L, C], mask and pooled of one prompt (or, with `null`, of none), by diffusers' whole pipeline."""
    pipe = whole_pipeline(folder)
    kind = type(pipe).__name__
    with torch.no_grad():
        if kind == "StableDiffusionPipeline":
            return pipe.encode_prompt(text, "cpu", 1, null)[null], None, None
        if kind == "StableDiffusionXLPipeline":
            found = pipe.encode_prompt(text, do_classifier_free_guidance=null)
            return found[null], None, found[2 + null]
        if kind == "PixArtAlphaPipeline":
            found = pipe.encode_prompt(text, do_classifier_free_guidance=null)
            return found[2 * null], found[2 * null + 1], None
        embeds, mask = pipe.encode_prompt(" " if null else text)
        return embeds, torch.ones(embeds.shape[:2]) if mask is None else mask, None


@pytest.mark.parametrize("how", ["cached", "live"])
@pytest.mark.parametrize("kind", ["sd15", "sdxl", "pixart", "qwen"])
def test_rows_are_those_of_the_pipelines_own_encode_prompt(kind, how, folders, tmp_path):
    found = opened(config(tmp_path, how=how, batch=3), folders(kind), tmp_path / "cache")
    chosen = [5, 0, 3, 3]
    rows = found.rows(torch.tensor(chosen))
    assert (len(found), len(rows), rows.embeds.dtype) == (len(TEXTS), 4, torch.float32)
    tolerance = 2e-3 if how == "cached" else 2e-6  # of 16 bit, and of a sum in another order
    for row, text in [*((rows[i : i + 1], TEXTS[k]) for i, k in enumerate(chosen)), (found.null, None)]:
        embeds, mask, pooled = alone(folders(kind), text or TEXTS[0], text is None)
        length = embeds.shape[1]
        if mask is None:
            torch.testing.assert_close(row.embeds, embeds, rtol=tolerance, atol=tolerance)
        else:
            assert torch.equal(row.mask[:, :length], mask.bool()) and not row.mask[:, length:].any()
            torch.testing.assert_close(row.embeds[row.mask], embeds[mask.bool()], rtol=tolerance, atol=tolerance)
        if pooled is not None:
            torch.testing.assert_close(row.pooled, pooled, rtol=tolerance, atol=tolerance)


def test_a_cache_keeps_16_bit_of_unmasked_tokens_only(folders, tmp_path):
    write_embeddings(tmp_path / "cache", TEXTS, folders("pixart"), CPU)
    tensors = load_file(tmp_path / "cache/00000.safetensors")
    tokens = sum(int(alone(folders("pixart"), text, False)[1].sum()) for text in TEXTS)
    assert (tensors["embeds"].dtype, tensors["embeds"].shape) == (torch.float16, (tokens, diffusers_pipelines.WIDTH))
    assert tokens < 0.2 * len(TEXTS) * 120


def test_sdxl_has_zeros_as_its_null_prompt_and_flux_none(folders, tmp_path):
    found = opened(config(tmp_path, TEXTS[:1]), folders("sdxl"), tmp_path / "xl")
    assert not found.null.embeds.any() and not found.null.pooled.any()
    for how in ("cached", "live"):
        assert opened(config(tmp_path, TEXTS[:1], how=how), folders("flux"), tmp_path / "flux").null is None


def test_max_length_cuts_and_clip_takes_none(folders, tmp_path):
    for how in ("cached", "live"):
        found = opened(config(tmp_path, how=how, max_length=5), folders("pixart"), tmp_path / "cache")
        assert found.rows([3]).embeds.shape[1] == found.null.embeds.shape[1] == 5 and found.rows([3]).mask.all()
    with pytest.raises(UserError, match=r"leave text\.max_length out"):
        opened(config(tmp_path, max_length=5), folders("sd15"), tmp_path / "clip")


def test_a_subset_is_these_prompts(folders, tmp_path):
    found = opened(config(tmp_path), folders("sd15"), tmp_path / "cache")
    part = found.subset([6, 2, 4]).subset([0, 2])
    assert (len(part), part.text(0), part.text(1)) == (2, TEXTS[6], TEXTS[4])
    assert torch.equal(part.rows([1, 0]).embeds, found.rows([4, 6]).embeds)
    with pytest.raises(UserError, match="no prompts are left"):
        found.subset([])


# The cache


def small_shards(monkeypatch):
    monkeypatch.setattr(embeddings, "SHARD_BYTES", 600)  # one or two of these prompts


@needs_fork
def test_a_cache_that_was_killed_becomes_the_same_bytes(folders, tmp_path, monkeypatch):
    folder = folders("pixart")
    small_shards(monkeypatch)
    killed(lambda: write_embeddings(tmp_path / "killed", TEXTS, folder, CPU, batch=2), 4)
    assert {"00000.safetensors", "00001.safetensors", "00002.safetensors.part"} <= files_of(tmp_path / "killed").keys()
    with pytest.raises(UserError, match="is unfinished"):
        Embeddings(tmp_path / "killed")

    kept = os.stat(tmp_path / "killed/00001.safetensors").st_mtime_ns
    for out in ("killed", "whole"):
        write_embeddings(tmp_path / out, TEXTS, folder, CPU, batch=2)
    whole = files_of(tmp_path / "whole")
    assert len(whole) > 6 and files_of(tmp_path / "killed") == whole
    assert os.stat(tmp_path / "killed/00001.safetensors").st_mtime_ns == kept  # it was not made again


def test_a_whole_cache_loads_no_encoder(folders, tmp_path, monkeypatch):
    cfg = config(tmp_path)
    first = opened(cfg, folders("pixart"), tmp_path / "cache").rows([1])
    monkeypatch.setattr(embeddings, "load_text", lambda *_: pytest.fail("an encoder was loaded"))
    assert torch.equal(opened(cfg, folders("pixart"), tmp_path / "cache").rows([1]).embeds, first.embeds)


def test_a_damaged_shard_is_named_and_made_again(folders, tmp_path, monkeypatch):
    small_shards(monkeypatch)
    cfg, cache = config(tmp_path), tmp_path / "cache"
    whole = opened(cfg, folders("pixart"), cache).rows(range(7))
    path = cache / "00002.safetensors"
    good = path.read_bytes()
    for bad in (good[:-1], good[:-1] + bytes([good[-1] ^ 1]), good[:9] + b"?" + good[10:]):
        path.write_bytes(bad)
        with pytest.raises(Damaged, match=r"00002\.safetensors is no shard as it was written .*: remove it") as error:
            open_prompts(cfg, folders("pixart"), cache, CPU).rows(range(7))
        assert "\n" not in str(error.value)
        path.unlink()
        assert torch.equal(opened(cfg, folders("pixart"), cache).rows(range(7)).embeds, whole.embeds)
        assert path.read_bytes() == good
    path.write_bytes(good[:-1])  # what is cut short is made again without being removed
    opened(cfg, folders("pixart"), cache)
    assert path.read_bytes() == good
    path.write_bytes((cache / "00001.safetensors").read_bytes())
    with pytest.raises(Damaged, match="it belongs to another folder, or to another place in it"):
        open_prompts(cfg, folders("pixart"), cache, CPU).rows(range(7))


def test_every_byte_of_a_row_counts(folders, tmp_path):
    """Also of masks and lengths: whatever bit flips behind the header is found when all rows are read."""
    cfg, cache = config(tmp_path, TEXTS[:2]), tmp_path / "cache"
    opened(cfg, folders("pixart"), cache)
    path = cache / "00000.safetensors"
    good = path.read_bytes()
    start = 8 + int.from_bytes(good[:8], "little")
    for at in range(start, len(good), 7):
        path.write_bytes(good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :])
        with pytest.raises(Damaged):
            open_prompts(cfg, folders("pixart"), cache, CPU).rows([0, 1])


def test_a_cache_of_something_else_is_refused(folders, tmp_path):
    cfg, cache = config(tmp_path), tmp_path / "cache"
    opened(cfg, folders("pixart"), cache)
    shutil.copytree(folders("pixart"), tmp_path / "moved")
    opened(cfg, tmp_path / "moved", cache)  # the same wherever it lies

    def refused(what, cfg=cfg, folder=folders("pixart")):
        for call in (opened, open_prompts):
            with pytest.raises(UserError, match=rf"cache holds prompts of another {what} .*name another folder") as error:
                call(cfg, folder, cache, CPU) if call is open_prompts else call(cfg, folder, cache)
            assert "\n" not in str(error.value)

    refused("encoder", folder=folders("pixart", 1))
    refused("number", config(tmp_path, TEXTS[:3]))
    refused("prompts", config(tmp_path, TEXTS[::-1]))
    refused("max_length", config(tmp_path, max_length=60))
    refused("precision", config(tmp_path, precision="bf16"))
    words = tmp_path / "moved/tokenizer/tokenizer.json"
    words.write_text(words.read_text() + " ")
    refused("tokenizer", config(tmp_path), tmp_path / "moved")


def test_one_changed_weight_is_another_encoder(folders, tmp_path):
    shutil.copytree(folders("sd15"), tmp_path / "changed")
    path = tmp_path / "changed/text_encoder/model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    names = [embeddings.hash_of_part(folder, "text_encoder") for folder in (folders("sd15"), tmp_path / "changed")]
    assert names[0] != names[1]


def test_a_folder_with_other_files_is_no_cache(folders, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        write_embeddings(tmp_path / "mine", TEXTS, folders("sd15"), CPU)
    assert files_of(tmp_path / "mine") == {"notes.txt": b"mine"}
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed/shards.json.part").write_text("{")  # at its very beginning
    write_embeddings(tmp_path / "killed", TEXTS, folders("sd15"), CPU)
    assert len(Embeddings(tmp_path / "killed")([0, 6])) == 2


def test_too_many_prompts_or_too_little_room(folders, tmp_path, monkeypatch):
    each = 2 * 16 * diffusers_pipelines.WIDTH  # bytes: 16 bit, tokens, width
    monkeypatch.setattr(embeddings, "MOST", 6)
    with pytest.raises(
        UserError, match=rf"7 prompts are {7 * each:,} bytes of embeddings.*at most 6 prompts: take fewer, or give text.how=live"
    ):
        write_embeddings(tmp_path / "cache", TEXTS, folders("sd15"), CPU)
    monkeypatch.setattr(embeddings, "MOST", 7)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=7 * each - 1))
    with pytest.raises(UserError, match=rf"{7 * each:,} bytes of embeddings, and .* has {7 * each - 1:,} bytes of room.*text.how=live"):
        write_embeddings(tmp_path / "cache", TEXTS, folders("sd15"), CPU)
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=7 * each))
    write_embeddings(tmp_path / "cache", TEXTS, folders("sd15"), CPU)


def test_embeddings_that_16_bit_cannot_hold(folders, tmp_path, monkeypatch):
    large = Text(torch.full((1, 2, 3), 1e5))
    with pytest.raises(UserError, match="too large for float16"):
        embeddings._packed(large, torch.float32)
    assert embeddings._packed(large, torch.bfloat16)["embeds"].dtype == torch.bfloat16
    with pytest.raises(UserError, match="no numbers"):
        embeddings._packed(Text(torch.full((1, 2, 3), torch.nan)), torch.bfloat16)


def test_a_bf16_encoder(folders, tmp_path):
    cache = tmp_path / "cache"
    found = opened(config(tmp_path, precision="bf16"), folders("sd15"), cache)
    assert load_file(cache / "00000.safetensors")["embeds"].dtype == torch.bfloat16
    embeds, _, _ = alone(folders("sd15"), TEXTS[4], False)
    torch.testing.assert_close(found.rows([4]).embeds, embeds, rtol=0.05, atol=0.05)
    opened(config(tmp_path), folders("sd15"), cache)  # auto takes what is there


def test_pipelines_that_cannot_be_asked(folders, tmp_path):
    def refused(said, folder):
        with pytest.raises(UserError, match=said) as error:
            write_embeddings(tmp_path / "cache", TEXTS, folder, CPU)
        assert "\n" not in str(error.value)

    refused("has no text encoder", folders("dit"))
    refused("no pipeline at", tmp_path / "nowhere")
    shutil.copytree(folders("sd15"), tmp_path / "strange")
    index = json.loads((tmp_path / "strange/model_index.json").read_text())
    (tmp_path / "strange/model_index.json").write_text(json.dumps(index | {"text_encoder": ["my_module", "Mine"]}))
    refused("names 'Mine' of 'my_module' as text_encoder", tmp_path / "strange")
    (tmp_path / "strange/model_index.json").write_text(json.dumps(index | {"_class_name": "MyPipeline"}))
    refused("names 'MyPipeline'", tmp_path / "strange")
    (tmp_path / "strange/model_index.json").write_text(json.dumps(index))
    weights = tmp_path / "strange/text_encoder/model.safetensors"
    torch.save(load_file(weights), tmp_path / "strange/text_encoder/pytorch_model.bin")
    weights.unlink()
    refused("text_encoder has no weights as safetensors, and no pickle is read", tmp_path / "strange")


# A stream


class Numbers(Prompts):
    """Prompts whose embedding is their number."""

    def __init__(self, n):
        super().__init__([str(i) for i in range(n)], self.numbered, None, CPU)
        self.calls = []

    def numbered(self, ids):
        self.calls.append((threading.current_thread().name, ids))
        return Text(torch.tensor(ids, dtype=torch.float32).reshape(-1, 1, 1))


def seen(stream, step):
    return [text.embeds.flatten().int().tolist() for text in stream.at(step)]


def streamed(n, **how):
    return PromptStream(Numbers(n), **how)


@pytest.mark.parametrize(("n", "batch", "asks"), [(12, 3, 2), (7, 4, 1), (5, 8, 3), (1, 4, 2), (1, 1, 1)])
def test_every_prompt_comes_once_an_epoch(n, batch, asks):
    stream = streamed(n, batch=batch, asks=asks, seed=3)
    steps = -(-3 * n // (batch * asks))
    order = [i for step in range(steps) for ask in seen(stream, step) for i in ask]
    assert [sorted(order[k * n : (k + 1) * n]) for k in range(3)] == [list(range(n))] * 3
    if n == 12:
        assert order[:12] != order[12:24]
    stream.close()


def test_a_step_is_a_function_of_seed_and_step():
    n = 11
    first = streamed(n, batch=4, asks=2, seed=5)
    steps = [seen(first, step) for step in range(9)]
    again = streamed(n, batch=4, asks=2, seed=5)
    assert [seen(again, step) for step in (8, 3, 4, 0)] == [steps[step] for step in (8, 3, 4, 0)]
    assert seen(streamed(n, batch=4, asks=2, seed=6), 3) != steps[3]


def test_ranks_and_their_windows_share_the_batch():
    whole = streamed(20, batch=6, asks=2)
    windows = [slice(0, 2), slice(2, 6)], [slice(0, 6, 2), slice(1, 6, 2)]
    for step in range(4):
        wanted = seen(whole, step)
        for parts in windows:
            found = [seen(streamed(20, batch=6, asks=2, window=window), step) for window in parts]
            for ask in range(2):
                put_together = [None] * 6
                for window, part in zip(parts, found, strict=True):
                    put_together[window] = part[ask]
                assert put_together == wanted[ask]


def test_the_order_is_that_of_images():
    """One ask takes the prompts that a `Stream` of as many images takes."""
    from potstill.engine.data.sampler import Order

    order = Order(9, batch=4, seed=2, flips=False, window=slice(1, 4), device=CPU)
    stream = streamed(9, batch=4, seed=2, window=slice(1, 4))
    assert all(seen(stream, step) == [order.at(step)[0].tolist()] for step in range(6))


def test_the_coming_step_is_embedded_by_a_thread_meanwhile():
    stream = streamed(8, batch=2, asks=2)
    prompts, (first, second) = stream.prompts, (stream.indices(0), stream.indices(1))
    seen(stream, 0)
    stream._next[1].result()
    assert [ids for _, ids in prompts.calls] == [torch.cat(first).tolist(), torch.cat(second).tolist()]
    assert all(name.startswith("prompts") for name, _ in prompts.calls)
    seen(stream, 1)
    stream.close()
    assert len(prompts.calls) <= 3  # step 1 was not embedded twice


def test_what_goes_wrong_a_step_ahead_is_raised_at_that_step():
    stream = streamed(8, batch=2)

    def broken(ids):
        raise UserError("broken")

    good, texts = stream.prompts.embed, seen(stream, 0)
    stream._next[1].result()
    stream.prompts.embed = broken
    seen(stream, 1)  # embedded before
    with pytest.raises(UserError, match="broken"):
        stream.at(2)
    stream.prompts.embed = good
    assert texts and seen(stream, 2) == [stream.indices(2)[0].tolist()]


@pytest.mark.parametrize("how", ["cached", "live"])
def test_a_stream_of_a_pipelines_prompts(how, folders, tmp_path):
    """One prompt, and a batch larger than their number."""
    for texts in (TEXTS, TEXTS[:1]):
        prompts_ = opened(config(tmp_path, texts, how=how), folders("pixart"), tmp_path / f"cache{len(texts)}")
        stream = PromptStream(prompts_, batch=9, asks=2)
        for step in range(2):
            for text, ids in zip(stream.at(step), stream.indices(step), strict=True):
                wanted = prompts_.rows(ids)
                assert len(text) == 9 and torch.equal(text.mask, wanted.mask)
                torch.testing.assert_close(text.embeds[text.mask], wanted.embeds[wanted.mask], rtol=2e-6, atol=2e-6)
        stream.close()


def test_an_encoder_serves_one_thread_at_a_time(folders, monkeypatch):
    encoder, busy, most = Encoder(folders("pixart"), CPU), [], []
    encode = encoder.family.encode

    def watched(pipe, prompts):
        busy.append(prompts)
        most.append(len(busy))
        time.sleep(0.01)  # the other thread's turn
        text = encode(pipe, prompts)
        busy.remove(prompts)
        return text

    monkeypatch.setattr(encoder, "family", SimpleNamespace(encode=watched))
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(encoder, [[text] for text in TEXTS]))
    assert most == [1] * len(TEXTS) and [len(text) for text in found] == most


# Settings and the command


def test_settings():
    assert TextConfig().unused().keys() == {"how", "cache", "max_length", "precision", "batch"}
    assert TextConfig(prompts="p", how="live").unused().keys() == {"cache", "batch"}
    assert TextConfig(prompts="p").unused() == {}
    for bad in ({"how": "both"}, {"max_length": 0}, {"prompts": ""}, {"cache": ""}, {"batch": 0}, {"precision": "fp8"}):
        with pytest.raises(BadSetting, match=next(iter(bad))):
            TextConfig(**bad)


def test_settings_of_a_cache_that_is_never_made_are_named():
    """Also where the prompts are the captions of the data."""
    teacher = cases.denoiser("sd15")
    more = ["teacher.checkpoint=pipeline", "text.how=live", "text.cache=x", "text.batch=7"]
    for given in ("text.prompts=a.txt", "data.path=latents"):
        assert "text.cache, text.batch (text.how=live)" in sentence(load("dmd2_sd15", ["text.prompts=null", given, *more]), teacher)
    assert "text." not in sentence(load("dmd2_sd15", ["text.max_length=9", "text.cache=x"]), teacher)


def test_the_command_makes_the_cache_of_a_run(folders, tmp_path, capsys, monkeypatch):
    cfg = config(tmp_path)
    command = ["prompts", cfg.prompts, str(tmp_path / "cache"), "--pipeline", str(folders("pixart")), "--device", "cpu"]
    convert(command)
    assert "cache: 7 prompts, 0.0 MiB" in capsys.readouterr().out
    monkeypatch.setattr(embeddings, "load_text", lambda *_: pytest.fail("an encoder was loaded"))
    opened(cfg, folders("pixart"), tmp_path / "cache")
    convert(command)
    with pytest.raises(UserError, match="--max-length of at least 1"):
        convert([*command, "--max-length", "0"])
