"""Scores of text-to-image: against computations of their own, in runs, from the command, and what is refused.

The CLIPs are tiny, random and made here; what their scores say of a picture means nothing.
"""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import diffusers_pipelines
import transformers

from potstill.__main__ import main as potstill
from potstill.engine.common.errors import UserError
from potstill.engine.data.images import open_images
from potstill.engine.formats.card import _quality
from potstill.engine.jobs.finish import Gallery
from potstill.engine.measure import scores
from potstill.engine.measure.chart import read_curves
from potstill.engine.measure.resized import resized
from potstill.engine.measure.scores import Tally, figures_of, open_score

CPU = torch.device("cpu")
PROMPTS = ["a cat", "seven birds on a wire, and more words than the tokenizer has room for", "rain"]
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(?!potstill)", "ignore::FutureWarning:(?!potstill)"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning:diffusers"),
]


def clip(folder, width=10, size=24):
    """A folder as transformers writes it. Its cosines have both signs."""
    tokenizer = diffusers_pipelines.clip_tokenizer()
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    sizes = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = sizes | {"vocab_size": len(tokenizer), "max_position_embeddings": diffusers_pipelines.TOKENS} | ids
    vision = sizes | {"image_size": size, "patch_size": 8}
    with torch.random.fork_rng():
        torch.manual_seed(5)
        net = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=width))
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.8)
        net.logit_scale.data.fill_(2.0)
    net.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def copy(folder, tmp_path):
    """One that may be damaged."""
    return shutil.copytree(folder, tmp_path / "clip")


def pictures(n=3, size=40, channels=3):
    return torch.randint(0, 256, (n, channels, size, size), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def by_hand(folder, shown, prompts):
    """Embeddings of both, float64, and exp(logit_scale): prompts one by one and without padding, pictures through Pillow."""
    net = transformers.CLIPModel.from_pretrained(folder).double()
    words = transformers.CLIPTokenizer.from_pretrained(folder)
    with torch.no_grad():
        tokens = [
            words([text], truncation=True, max_length=diffusers_pipelines.TOKENS, return_tensors="pt")["input_ids"] for text in prompts
        ]
        texts = torch.cat([net.get_text_features(input_ids=ids).pooler_output for ids in tokens]).numpy()
        seen = torch.from_numpy(np.stack([preprocessed(one) for one in shown]))
        images = net.get_image_features(pixel_values=seen).pooler_output.numpy()
    return images, texts, net.logit_scale.exp().item()


def preprocessed(picture, size=24):
    """As CLIP's authors do: Pillow's bicubic filter to the short side, the middle, mean and deviation. [3, size, size] float64."""
    whole = Image.fromarray(picture.permute(1, 2, 0).numpy())
    whole = whole.resize([round(side * size / min(whole.size)) for side in whole.size], Image.Resampling.BICUBIC)
    left, top = (whole.width - size) // 2, (whole.height - size) // 2
    pixels = np.asarray(whole.crop((left, top, left + size, top + size)), np.float64) / 255
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    return ((pixels - mean) / std).transpose(2, 0, 1)


def cosines(a, b):
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def test_clip_score_and_pickscore_are_those_of_the_models_own_features(folder):
    shown = pictures(6)
    shown[2:] //= torch.tensor([1, 3, 9, 81]).view(-1, 1, 1, 1)  # darker and darker
    shown[5, 0] = 255
    images, texts, scale = by_hand(folder, shown, 2 * PROMPTS)
    wanted = cosines(images, texts)
    assert wanted.min() < 0 < wanted.max()  # that clipping shows
    assert np.allclose(open_score(f"clip:{folder}", CPU)(shown, 2 * PROMPTS), 100 * wanted.clip(0), atol=1e-3)
    assert np.allclose(open_score(f"pickscore:{folder}", CPU)(shown, 2 * PROMPTS), scale * wanted, atol=1e-4)


@pytest.mark.parametrize("size", [(24, 24), (40, 40), (13, 13), (50, 37)])
def test_pictures_are_prepared_as_transformers_and_the_authors_do(folder, size):
    shown = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    own = transformers.CLIPImageProcessorPil.from_pretrained(folder)
    wanted = own([Image.fromarray(one.permute(1, 2, 0).numpy()) for one in shown], return_tensors="pt")["pixel_values"]
    seen = []
    score = open_score(f"clip:{folder}", CPU)
    score.clip.net.get_image_features = lambda pixels: (
        seen.append(pixels) or transformers.modeling_outputs.BaseModelOutputWithPooling(pooler_output=torch.ones(2, 10))
    )
    score(shown, ["a", "b"])
    assert torch.equal(seen[0], wanted)
    if size[0] == size[1]:
        assert np.allclose(seen[0], np.stack([preprocessed(one) for one in shown]), atol=1e-5)


def test_grey_pictures_are_repeated_and_others_refused(folder):
    score, grey = open_score(f"clip:{folder}", CPU), pictures(channels=1)
    seen = []

    def looking(shown, prompts):
        seen.append(shown)
        return torch.zeros(3)

    looking.name = "x:y"
    assert figures_of(looking, grey, PROMPTS).keys() == {"x"} and torch.equal(seen[0], grey.expand(-1, 3, -1, -1))
    with pytest.raises(UserError, match="grey or RGB pictures, got 4 channels"):
        figures_of(score, pictures(channels=4), PROMPTS)


def test_a_score_does_not_depend_on_the_batch(folder):
    score, shown = open_score(f"pickscore:{folder}", CPU), pictures(6)
    each = torch.cat([score(one[None], [text]) for one, text in zip(shown, 2 * PROMPTS, strict=True)])
    assert torch.allclose(score(shown, 2 * PROMPTS), each, atol=1e-5)
    assert torch.allclose(score(shown.flip(0), (2 * PROMPTS)[::-1]).flip(0), each, atol=1e-5)


def linear(path, width=10, out=1):
    save_file({"weight": torch.randn(out, width), "bias": torch.randn(out)}, path)
    return path


def laion(path, widths=(10, 8, 6, 4, 2, 1), layers=(0, 2, 4, 6, 7)):
    tensors = {}
    for layer, before, after in zip(layers, widths[:-1], widths[1:], strict=True):
        tensors |= {f"layers.{layer}.weight": torch.randn(after, before), f"layers.{layer}.bias": torch.randn(after)}
    save_file(tensors, path)
    return path


def test_aesthetic_heads(folder, tmp_path):
    shown = pictures()
    x, _, _ = by_hand(folder, shown, PROMPTS)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    head = load_file(linear(tmp_path / "one.safetensors"))
    found = open_score(f"aesthetic:{tmp_path}/one.safetensors:{folder}", CPU)(shown, PROMPTS)
    assert np.allclose(found, x @ head["weight"].double().numpy()[0] + head["bias"].item(), atol=1e-4)
    head = load_file(laion(tmp_path / "five.safetensors"))
    for layer in (0, 2, 4, 6, 7):
        x = x @ head[f"layers.{layer}.weight"].double().numpy().T + head[f"layers.{layer}.bias"].double().numpy()
    found = open_score(f"aesthetic:{tmp_path}/five.safetensors:{folder}", CPU)(shown, PROMPTS)
    assert found.shape == (3,) and np.allclose(found, x[:, 0], atol=1e-3)


def test_the_hash_is_of_weights_words_and_head(folder, copy, tmp_path):
    first = open_score(f"clip:{folder}", CPU).sha256
    assert open_score(f"pickscore:{copy}", CPU).sha256 == first and len(first) == 64
    (copy / "preprocessor_config.json").write_text(
        (copy / "preprocessor_config.json").read_text().replace('"resample": 3', '"resample": 2')
    )
    assert open_score(f"clip:{copy}", CPU).sha256 != first
    a, b = (open_score(f"aesthetic:{linear(tmp_path / name)}:{folder}", CPU).sha256 for name in ("a.safetensors", "b.safetensors"))
    assert len({a, b, first}) == 3


class Colours:
    """A kind of somebody else's: two figures."""

    title, sha256 = "colours", "0" * 64

    def __init__(self, where, device):
        pass

    @staticmethod
    def check(where):
        pass

    def __call__(self, shown, prompts):
        return {"red": shown[:, 0].float().mean((1, 2)), "letters": torch.tensor([float(len(text)) for text in prompts])}


def test_another_kind_is_a_line_and_may_have_several_figures(monkeypatch):
    monkeypatch.setitem(scores.KINDS, "colours", Colours)
    tally, shown = Tally([open_score("colours", CPU)]), pictures(5)
    texts = ["a", "bb", "ccc", "dddd", "eeeee"]
    assert torch.equal(torch.cat(list(tally.over(shown.split(2), texts))), shown)
    found = tally.result()
    assert found["scores"] == {"colours/red": pytest.approx(shown[:, 0].double().mean().item()), "colours/letters": 3}
    assert found["scores_of"] == {"n": 5, "sha256": {"colours": "0" * 64}}


# What is refused


def no_weights(folder):
    net = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(net, folder / "pytorch_model.bin")


def nan(folder):
    net = load_file(folder / "model.safetensors")
    net["visual_projection.weight"][0, 0] = torch.nan
    save_file(net, folder / "model.safetensors", {"format": "pt"})


def incomplete(folder):
    net = load_file(folder / "model.safetensors")
    del net["visual_projection.weight"]
    save_file(net, folder / "model.safetensors", {"format": "pt"})


def cut_off(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def another_model(folder):
    (folder / "config.json").write_text('{"model_type": "clip_text_model", "auto_map": {"AutoModel": "evil.Evil"}}')


def another_size(folder):
    (folder / "preprocessor_config.json").write_text((folder / "preprocessor_config.json").read_text().replace("24", "16"))


def without(name):
    return lambda folder: (folder / name).unlink()


BROKEN = [
    (shutil.rmtree, "no CLIP at"), (no_weights, "no pickle is read"), (nan, "not finite in visual_projection.weight"),
    (incomplete, "they miss visual_projection.weight"), (cut_off, "model.safetensors"), (another_model, "wanted a whole CLIP"),
    (another_size, "cannot be read as CLIPModel"),
    (without("preprocessor_config.json"), "no preprocessor_config.json"), (without("tokenizer.json"), "the words of a CLIPTokenizer"),
]  # fmt: skip


@pytest.mark.parametrize(("harm", "said"), BROKEN, ids=lambda one: getattr(one, "__name__", ""))
def test_a_broken_clip_is_refused_before_the_training(copy, harm, said, place, pipelines, capsys):
    harm(copy)
    assert said in refused(capsys, *training(place, place / "never", pipelines("sd15"), f"eval.scores=['clip:{copy}']"))
    assert not (place / "never").exists()


def test_heads_that_do_not_fit(folder, tmp_path):
    def said(path, at=folder):
        with pytest.raises(UserError) as error:
            open_score(f"aesthetic:{path}:{at}", CPU)
        return str(error.value)

    assert "lead from 10 numbers" in said(linear(tmp_path / "wide.safetensors", width=11))
    assert "to one" in said(linear(tmp_path / "two.safetensors", out=2))
    assert "lead from 10 numbers" in said(laion(tmp_path / "gap.safetensors", widths=(10, 8, 6, 4, 2, 2)))
    assert "wanted weight and bias" in said(laion(tmp_path / "relu.safetensors", layers=(0, 3, 6, 9, 11)))
    (tmp_path / "pickle.safetensors").write_bytes(b"\x80\x02}.")
    assert "it is a pickle" in said(tmp_path / "pickle.safetensors")
    assert "no head" in said(tmp_path / "missing.safetensors")
    save_file({"weight": torch.full((1, 10), torch.nan), "bias": torch.zeros(1)}, tmp_path / "nan.safetensors")
    assert "not finite in 0.weight" in said(tmp_path / "nan.safetensors")
    with pytest.raises(UserError, match=r"aesthetic:HEAD.safetensors:FOLDER, got aesthetic:x"):
        open_score("aesthetic:x", CPU)


# Runs


@pytest.fixture(autouse=True)
def few_pictures(monkeypatch):
    monkeypatch.setattr(Gallery, "count", 10)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    diffusers_pipelines.write_recipe(folder, train="kimg: 0.008, grid_kimg: 0.008, checkpoint_kimg: 0.008, eval_kimg: 0.004")
    return folder


def training(place, out, teacher, *more, text=True):
    prompts = [f"text.prompts={place}/prompts.txt"] if text else []
    return ["train", str(place / "tiny.yaml"), f"run_dir={out}", f"teacher.checkpoint={teacher}", *prompts, "device=cpu", *more]


def refused(capsys, *command):
    """The one line on stderr of a command that ends with code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        potstill([str(one) for one in command])
    said = capsys.readouterr().err.strip()
    assert error.value.code == 2 and said.count("\n") == 0
    return said


def evaluated(capsys, *arguments):
    """Its JSON, and what it says."""
    capsys.readouterr()
    potstill(["evaluate", *map(str, arguments), "--device", "cpu"])
    out = capsys.readouterr()
    return json.loads(out.out), out.err


@pytest.fixture(scope="module")
def run(place, pipelines, folder):
    """Without data, and with scores."""
    mp = pytest.MonkeyPatch()
    mp.setattr(Gallery, "count", 10)
    potstill(training(place, place / "run", pipelines("sd15"), f"eval.scores=['clip:{folder}']", "eval.n=5", "eval.batch=3"))
    mp.undo()
    return place / "run"


def samples(capsys, run, tmp_path, role, prompts, n):
    """The pictures that `potstill sample` makes."""
    potstill(["sample", str(run), "--which", role, "--prompts", str(prompts), "--seeds", f"0-{n - 1}", "--out", f"{tmp_path}/{role}.npz"])
    capsys.readouterr()
    return torch.from_numpy(np.load(tmp_path / f"{role}.npz")["images"]).permute(0, 3, 1, 2)


def test_a_run_without_data_is_scored_at_its_end_and_within_it(run, folder, capsys, tmp_path):
    summary = json.loads((run / "summary.json").read_text())
    score = open_score(f"clip:{folder}", CPU)
    for role in ("teacher", "student"):
        assert summary[role]["n"] == 5 and summary[role]["labels"] == "prompts" and "fd" not in summary[role]
        assert summary[role]["scores_of"] == {"n": 5, "sha256": {f"clip:{folder}": score.sha256}}
        shown = samples(capsys, run, tmp_path, role, run.parent / "prompts.txt", 5)
        wanted = score(shown, diffusers_pipelines.WORDS[:5]).mean().item()
        assert summary[role]["scores"] == {"clip": pytest.approx(wanted, abs=0.05)}
    curve = read_curves(run / "metrics.jsonl")["score/clip"]
    assert [kimg for kimg, _ in curve] == [0.004, 0.008]
    assert curve[-1][1] == summary["student"]["scores"]["clip"]  # the same pictures
    assert f"the student clip {summary['student']['scores']['clip']:.3f}" in _quality(SimpleNamespace(summary=summary))
    page = (run / "report.html").read_text()
    assert "student, clip" in page and "teacher, clip" in page and "score/clip" in page and "The student reaches clip" in page


def test_a_run_with_captions_is_scored_beside_its_distance(place, pipelines, folder, tmp_path, capsys):
    pictures_in(tmp_path / "pictures", 6, 64)
    teacher, latents = pipelines("sd15"), tmp_path / "latents"
    command = ["convert", "latents", f"{tmp_path}/pictures", str(latents), "--pipeline", str(teacher), "--device", "cpu"]
    potstill(command)
    given = [f"data.path={latents}", f"eval.scores=['clip:{folder}']", "eval.n=4"]
    capsys.readouterr()
    made = []
    generate = diffusers_generate(made)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("potstill.engine.measure.score.generate", generate)
        potstill(training(place, tmp_path / "run", teacher, *given, text=False))
    said = capsys.readouterr().out
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert made == [4] * 4  # twice within, student and teacher: the scores wanted no pictures of their own
    assert summary["real"]["scores_of"]["n"] == 6 and {"fd", "scores"} <= summary["student"].keys()
    lines = [line.split() for line in said.splitlines()[:4]]
    assert [line[0] for line in lines] == ["floor", "real", "teacher", "student"] and "clip" in lines[1] and "clip" in lines[3]
    metrics = read_curves(tmp_path / "run/metrics.jsonl")
    assert {"fd@4", "score/clip"} <= metrics.keys()
    assert "real pictures with their captions, clip" in (tmp_path / "run/report.html").read_text()
    found, _ = evaluated(capsys, tmp_path / "run")  # the scores of the run, too
    assert found["student"]["scores"] == summary["student"]["scores"]
    assert found["real"]["scores"] == {"clip": pytest.approx(summary["real"]["scores"]["clip"], rel=1e-6)}


def diffusers_generate(made):
    from potstill.engine.models.generate import generate

    def counted(net, sampler, labels, seeds, **more):
        made.append(len(seeds))
        return generate(net, sampler, labels, seeds, **more)

    return counted


def test_scores_of_nets_without_prompts(place, folder, pipelines, capsys):
    scores = f"eval.scores=['clip:{folder}']"
    said = refused(capsys, *training(place, place / "never", pipelines("unet"), scores, text=False))
    assert "eval.scores are of pictures and their prompts" in said
    said = refused(capsys, "train", "digits", f"run_dir={place}/never", scores)
    assert "is told none" in said and not (place / "never").exists()


def test_names_that_cannot_be_meant(place, folder, pipelines, run, capsys):
    for given, said in (
        (f"['clop:{folder}']", f"no score 'clop:{folder}': wanted clip:FOLDER, pickscore:FOLDER"),
        (f"['clip:{folder}','clip:{folder}']", "different kinds, got clip 2 times"),
        ("['clip:']", "no CLIP at"),
    ):
        assert said in refused(capsys, *training(place, place / "never", pipelines("sd15"), f"eval.scores={given}"))
        names = given.strip("[]").replace("'", "")
        assert said in refused(capsys, "evaluate", run, "--scores", names)
    assert not (place / "never").exists()


# The command


def pictures_in(folder, n, *sizes):
    """Noise with captions, of some sizes in turn; every third is wider than high."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(n):
        height = sizes[i % len(sizes)]
        width = height + (i % 3) * (len(sizes) > 1)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(folder / f"{i:02}.png")
    lines = [json.dumps({"file_name": f"{i:02}.png", "text": f"noise number {i}"}) for i in range(n)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def test_evaluate_asks_with_other_prompts_in_turn(run, folder, tmp_path, capsys):
    (tmp_path / "two.txt").write_text("a stone\na tree\n")
    found, said = evaluated(capsys, run, "--prompts", tmp_path / "two.txt", "--n", 5)
    shown = samples(capsys, run, tmp_path, "student", tmp_path / "two.txt", 5)
    wanted = open_score(f"clip:{folder}", CPU)(shown, ["a stone", "a tree", "a stone", "a tree", "a stone"]).mean().item()
    assert found["student"]["scores"] == {"clip": pytest.approx(wanted, abs=0.05)} and "student: clip" in said
    assert found["student"]["prompts"]["number"] == 2 and "floor" not in found
    assert found["student"]["prompts"] != json.loads((run / "summary.json").read_text())["student"]["prompts"]
    assert evaluated(capsys, run, "--n", 2, "--scores", f"pickscore:{folder}")[0]["student"]["scores"].keys() == {"pickscore"}


def test_evaluate_refuses(run, folder, pipelines, tmp_path, capsys):
    assert "no prompts at" in refused(capsys, "evaluate", run, "--prompts", tmp_path / "no.txt")
    assert "--features is about distances" in refused(capsys, "evaluate", run, "--features", "pixels")
    assert "does not say which data" in refused(capsys, "evaluate", run, "--scores", "")
    assert "at least 1 pixel" in refused(capsys, "evaluate", run, "--resize", 0)
    unconditional = pipelines("unet")
    assert "is told none" in refused(capsys, "evaluate", unconditional, "--scores", f"clip:{folder}", "--data", "digits")
    nothing = ["evaluate", "--data", "digits", "--save-reference", tmp_path / "a.npz"]
    assert "name a run" in refused(capsys, *nothing, "--scores", f"clip:{folder}")
    assert "name a run" in refused(capsys, *nothing, "--prompts", "x.txt")


def test_resizing_cuts_the_middle_and_is_pillows():
    shown = torch.randint(0, 256, (2, 1, 20, 26), dtype=torch.uint8)
    (found,) = resized([shown], 8)
    for before, after in zip(shown, found, strict=True):
        wanted = Image.fromarray(before[0].numpy()).convert("RGB").crop((3, 0, 23, 20)).resize((8, 8), Image.Resampling.LANCZOS)
        assert torch.equal(after, torch.from_numpy(np.array(wanted)).permute(2, 0, 1))
    assert torch.equal(next(resized([shown], None)), shown)


def test_zero_shot_on_pictures_of_any_size(run, folder, tmp_path, capsys):
    """The command for COCO, with stand-ins for pictures, Inception and CLIP."""
    coco = pictures_in(tmp_path / "coco", 12, 30, 41, 64)
    (tmp_path / "coco30k.txt").write_text("".join(f"noise number {i}\n" for i in range(12)))

    class Means(torch.nn.Module):
        def forward(self, x):
            return x.float().mean((2, 3)).flatten(1)

    torch.jit.script(Means()).save(str(tmp_path / "means.pt"))
    command = [run, "--prompts", tmp_path / "coco30k.txt", "--data", coco, "--resize", 32, "--features", tmp_path / "means.pt"]
    found, said = evaluated(capsys, *command, "--n", 12, "--scores", f"clip:{folder}", "--which", "student")
    one = found["student"]
    assert one["resize"] == {"size": 32, "law": "RGB, the square in the middle, Pillow's Lanczos filter on 8 bits"}
    assert one["reference_images"] == 12 and found["real"]["scores_of"]["n"] == 12 and "real: clip" in said
    fake = next(resized([samples(capsys, run, tmp_path, "student", tmp_path / "coco30k.txt", 12)], 32))
    opened = [Image.open(coco / f"{i:02}.png") for i in range(12)]
    real = torch.stack([next(resized([torch.from_numpy(np.array(p)).permute(2, 0, 1)[None]], 32))[0] for p in opened])
    texts = [f"noise number {i}" for i in range(12)]
    score = open_score(f"clip:{folder}", CPU)
    assert one["scores"]["clip"] == pytest.approx(score(fake, texts).mean().item(), abs=0.05)
    assert found["real"]["scores"]["clip"] == pytest.approx(score(real, texts).mean().item(), abs=1e-4)
    a, b = (x.double().mean((2, 3)).numpy() for x in (real, fake))
    from scipy.linalg import sqrtm

    distance = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * sqrtm(np.cov(a.T) @ np.cov(b.T)).real)
    assert one["fd"] == pytest.approx(distance, rel=1e-2)
    (pictures_in(tmp_path / "same", 4, 64) / "metadata.jsonl").unlink()
    assert "--resize R compares pictures" in refused(capsys, "evaluate", run, "--data", tmp_path / "same", "--scores", "")


def test_latents_are_resized_as_pictures(run, pipelines, tmp_path, capsys):
    potstill(
        [
            "convert",
            "latents",
            str(pictures_in(tmp_path / "p", 4, 64)),
            f"{tmp_path}/latents",
            "--pipeline",
            str(pipelines("sd15")),
            "--device",
            "cpu",
        ]
    )
    assert open_images(str(tmp_path / "latents")).latent
    found, _ = evaluated(capsys, run, "--data", tmp_path / "latents", "--resize", 16, "--n", 4, "--scores", "")
    assert found["student"]["resize"]["size"] == 16 and "scores" not in found["student"] and found["student"]["num_features"] == 768
