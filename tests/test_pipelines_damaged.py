"""Pipelines of diffusers that are damaged, cut off or incomplete are one sentence, before anything is made; whole ones are taken.

Pipelines are tiny, random and made here (diffusers_pipelines.py). What is whole is diffusers' and transformers' own word.
"""

import inspect
import json
import re
import shutil

import pytest

pytest.importorskip("diffusers")

import diffusers
import diffusers_pipelines
import torch
from safetensors.torch import load_file, save_file

from potstill.__main__ import main as potstill
from potstill.engine.common.errors import Damaged, UserError
from potstill.engine.data.embeddings import Encoder, check_encoder, write_embeddings
from potstill.engine.data.pipelines import load_vae
from potstill.engine.nets.diffusers import DiffusersDenoiser

# What libraries warn of while they import one another, and of where they are put together here.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(?!potstill)", "ignore::FutureWarning:(?!potstill)"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning:diffusers"),
]

CPU = torch.device("cpu")
UNET, VAE, CLIP = "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"
T5 = "text_encoder_3/model.safetensors"  # SD3's


@pytest.fixture
def changed(pipelines, tmp_path):
    """A copy of a pipeline, with a change to its folder."""

    def copy(kind, change):
        path = shutil.copytree(pipelines(kind), tmp_path / "changed" / kind)
        change(path)
        return path

    return copy


# Changes


def cut(file):
    return lambda path: (path / file).write_bytes((path / file).read_bytes()[: (path / file).stat().st_size // 2])


def rewritten(file, change):
    def rewrite(path):
        weights = load_file(path / file)
        change(weights)
        save_file(weights, path / file, metadata={"format": "pt"})

    return rewrite


def without(file, name):
    return rewritten(file, lambda weights: weights.pop(name))


def as_shape(file, name, *shape):
    return rewritten(file, lambda weights: weights.update({name: torch.zeros(shape)}))


def written(file, text):
    return lambda path: (path / file).write_text(text)


def gone(name):
    return lambda path: shutil.rmtree(path / name) if (path / name).is_dir() else (path / name).unlink()


def set_to(file, **values):
    return lambda path: (path / file).write_text(json.dumps(json.loads((path / file).read_text()) | values))


def as_variant(path):
    for file in list(path.rglob("*.safetensors")):
        file.rename(file.with_suffix(".fp16.safetensors"))


def sharded(path):
    """The transformer in several files, as diffusers itself writes it."""
    net = diffusers.SD3Transformer2DModel.from_pretrained(path / "transformer")
    shutil.rmtree(path / "transformer")
    net.save_pretrained(path / "transformer", max_shard_size="40KB")
    assert len(list((path / "transformer").glob("*.safetensors"))) > 2


def of_shards(change):
    def both(path):
        sharded(path)
        change(sorted((path / "transformer").glob("*.safetensors"))[1])

    return both


#: The kind of pipeline, what is done to it, and what is said: found on paper.
ON_PAPER = {
    "a denoiser cut off": ("sd15", cut(UNET), f"{UNET} is not a complete safetensors file"),
    "a transformer cut off": ("sd3", cut("transformer/diffusion_pytorch_model.safetensors"), "is not a complete safetensors file"),
    "a text encoder cut off": ("sd15", cut(CLIP), f"{CLIP} is not a complete safetensors file"),
    "another text encoder cut off": ("sd3", cut(T5), f"{T5} is not a complete safetensors file"),
    "a VAE cut off": ("sd15", cut(VAE), f"{VAE} is not a complete safetensors file"),
    "a web page": ("sd15", written(UNET, "<html>404"), "it is a web page"),
    "an LFS pointer": ("sd15", written(CLIP, "version https://git-lfs.github.com/spec/v1\n"), "it is a Git LFS pointer"),
    "a weight less": ("sd15", without(UNET, "conv_in.bias"), "unet are not those of the UNet2DConditionModel of its config.json: they miss conv_in.bias;"),
    "a weight less of the VAE": ("sd15", without(VAE, "encoder.conv_in.bias"), "they miss encoder.conv_in.bias;"),
    "a weight more": ("sd15", rewritten(UNET, lambda w: w.update(more=torch.zeros(1))), "they hold more that it lacks"),
    "another shape": ("sd15", as_shape(UNET, "conv_in.weight", 8, 4, 1, 1), "conv_in.weight is [8, 4, 1, 1], wanted [8, 4, 3, 3]"),
    "another shape of the VAE": ("sd15", as_shape(VAE, "decoder.conv_in.bias", 3), "decoder.conv_in.bias is [3], wanted [4]"),
    "quantised": ("sd15", rewritten(UNET, lambda w: w.update({"conv_in.bias": torch.zeros(8, dtype=torch.uint8)})), "holds conv_in.bias as U8"),
    "fewer layers": ("sd15", set_to("unet/config.json", layers_per_block=2), "they miss"),
    "a weight less of the text": ("sd15", without(CLIP, "final_layer_norm.weight"), "they miss final_layer_norm.weight (1 in all);"),
    "another shape of the text": ("sd3", as_shape(T5, "shared.weight", 90, 12), "shared.weight is [90, 12], wanted [98, 12];"),
    "a config that is no JSON": ("sd15", written("unet/config.json", "{"), "unet/config.json is not readable as JSON"),
    "a config that is no JSON of the text": ("sd15", written("text_encoder/config.json", ""), "text_encoder/config.json is not readable as JSON"),
    "a config that is no JSON of the VAE": ("sd15", written("vae/config.json", "[]"), "vae/config.json holds a list"),
    "a config of nonsense": ("sd15", set_to("unet/config.json", block_out_channels="x"), "unet cannot be read as UNet2DConditionModel"),
    "no denoiser": ("sd15", gone("unet"), "no unet/ in "),
    "no scheduler": ("sd15", gone("scheduler"), "no scheduler/ in "),
    "no VAE": ("sd15", gone("vae"), "no vae/ in "),
    "no text encoder": ("sd3", gone("text_encoder_2"), "no text_encoder_2/ in "),
    "no tokenizer": ("sd15", gone("tokenizer"), "no tokenizer/ in "),
    "no other tokenizer": ("sd3", gone("tokenizer_3"), "no tokenizer_3/ in "),
    "a tokenizer without words": ("sd15", gone("tokenizer/tokenizer.json"), "tokenizer has no vocab.json, the words of a CLIPTokenizer"),
    "another without words": ("sd3", gone("tokenizer_3/tokenizer.json"), "tokenizer_3 has no spiece.model, the words of a T5Tokenizer"),
    "a tokenizer without settings": ("sd15", gone("tokenizer/tokenizer_config.json"), "cannot read "),
    "a tokenizer of no length": ("sd15", written("tokenizer/tokenizer_config.json", "{}"), "takes at most 16"),
    "words that are no JSON": ("sd15", written("tokenizer/tokenizer.json", "{"), "tokenizer cannot be read as CLIPTokenizer"),
    "a variant only": ("sd15", as_variant, "unet has weights of the variant fp16 only (diffusion_pytorch_model.fp16.safetensors), wanted"),
    "weights of another name": ("sd15", lambda p: (p / UNET).rename(p / "unet/mine.safetensors"), "unet has mine.safetensors, wanted diffusion_py"),
    "a shard less": ("sd3", of_shards(lambda file: file.unlink()), "files of weights that its diffusion_pytorch_model.safetensors.index.json names"),
    "a shard cut off": ("sd3", of_shards(lambda file: file.write_bytes(file.read_bytes()[:-1])), "is not a complete safetensors file"),
    "shards of none": ("sd3", written("transformer/diffusion_pytorch_model.safetensors.index.json", "{}"), "does not say which weights"),
    "shards elsewhere": ("sd3", written("transformer/diffusion_pytorch_model.safetensors.index.json", '{"weight_map": {"a": "../b"}}'), "does not say"),
}  # fmt: skip


@pytest.fixture
def refused(tmp_path, capsys):
    """The sentence of a command that ends with exit code 2 and has written nothing."""
    diffusers_pipelines.write_recipe(tmp_path, "steps: [999], fake_per_student: 2, start: unit", "kimg: 0.008, grid_kimg: 0.008")

    def sentence(*command):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as stopped:
            potstill(list(map(str, command)))
        said = capsys.readouterr()
        assert stopped.value.code == 2, said
        *_, last = said.err.splitlines()
        assert last.startswith("error: ") and sorted(tmp_path.rglob("*")) == before
        return last

    return sentence


def training(folder, place, *more):
    return (
        "train",
        place / "tiny.yaml",
        f"run_dir={place}/run",
        f"text.prompts={place}/prompts.txt",
        f"teacher.checkpoint={folder}",
        *more,
    )


@pytest.mark.parametrize("more", [["--dry-run"], []], ids=["on paper", "for real"])
@pytest.mark.parametrize("case", ON_PAPER)
def test_what_is_damaged_is_said_before_anything_is_made(case, more, changed, refused, tmp_path):
    kind, change, words = ON_PAPER[case]
    assert words in refused(*training(changed(kind, change), tmp_path, *more))


@pytest.mark.parametrize(
    "case", [case for case, (_, _, words) in ON_PAPER.items() if "text" in case or "tokenizer" in case or "words" in case]
)
def test_and_before_prompts_are_embedded(case, changed, refused, tmp_path):
    kind, change, words = ON_PAPER[case]
    folder = changed(kind, change)
    assert words in refused("convert", "prompts", tmp_path / "prompts.txt", tmp_path / "out", "--pipeline", folder)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_are_refused_where_they_are_read(bad, changed, tmp_path):
    def spoilt(file, name):
        return rewritten(file, lambda weights: weights[name].view(-1)[-1:].fill_(bad))

    with pytest.raises(Damaged, match=r"unet holds numbers that are not finite in conv_in\.bias"):
        DiffusersDenoiser.from_folder(changed("sd15", spoilt(UNET, "conv_in.bias")))
    with pytest.raises(Damaged, match=r"vae holds numbers that are not finite in encoder\.conv_in\.bias"):
        load_vae(changed("dit", spoilt(VAE, "encoder.conv_in.bias")), CPU)
    shared = "shared.weight"
    with pytest.raises(Damaged, match=r"text_encoder_3 holds numbers that are not finite in "):
        write_embeddings(tmp_path / "out", ["a"], changed("sd3", spoilt(T5, shared)), CPU)
    assert not (tmp_path / "out").exists()


def test_the_names_of_released_text_encoders_are_taken_as_transformers_takes_them(pipelines, changed):
    """Files of earlier versions have a prefix, and the numbers of positions."""

    def released(weights):
        for name in list(weights):
            weights[f"text_model.{name}"] = weights.pop(name)
        weights["text_model.embeddings.position_ids"] = torch.arange(16)[None]

    one, other = (Encoder(folder, CPU)(["a cat"]) for folder in (pipelines("sd15"), changed("sd15", rewritten(CLIP, released))))
    assert torch.equal(one.embeds, other.embeds)


@pytest.mark.parametrize("kind", diffusers_pipelines.PIPELINES)
def test_whole_pipelines_are_taken(kind, pipelines):
    folder = pipelines(kind)
    size = diffusers_pipelines.diffusers_models.TINY[kind].shape[1:]
    planned, net = (DiffusersDenoiser.from_folder(folder, size=size, planned=planned) for planned in (True, False))
    assert {name: t.shape for name, t in planned.state_dict().items()} == {name: t.shape for name, t in net.state_dict().items()}
    index = json.loads((folder / "model_index.json").read_text())
    if "text_encoder" in index:
        check_encoder(folder, None)
        text = Encoder(folder, CPU)(["a cat"])
        assert text.embeds.isfinite().all()
    if "vae" in index:
        load_vae(folder, CPU)


def test_a_tokenizer_in_the_files_of_earlier_versions_is_taken(pipelines, changed):
    """Released pipelines have CLIP's words and merges in two files, without a tokenizer.json."""

    def in_two(path):
        words = json.loads((path / "tokenizer/tokenizer.json").read_text())["model"]["vocab"]
        (path / "tokenizer/vocab.json").write_text(json.dumps(words))
        (path / "tokenizer/merges.txt").write_text("#version: 0.2\n")
        (path / "tokenizer/tokenizer.json").unlink()

    one, other = (Encoder(folder, CPU)(["a cat"]) for folder in (pipelines("sd15"), changed("sd15", in_two)))
    assert torch.equal(one.embeds, other.embeds)


def test_shards_are_what_one_file_is(pipelines, changed):
    one, several = (DiffusersDenoiser.from_folder(folder, size=(8, 8)) for folder in (pipelines("sd3"), changed("sd3", sharded)))
    assert all(map(torch.equal, one.state_dict().values(), several.state_dict().values()))


def test_older_names_of_attention_and_buffers_are_taken_as_diffusers_takes_them(changed):
    def older(weights):
        for name in list(weights):
            for new, old in (("to_q.", "query."), ("to_k.", "key."), ("to_v.", "value."), ("to_out.0.", "proj_attn.")):
                if "mid_block.attentions.0." in name and f".{new}" in name:
                    weights[name.replace(new, old)] = weights.pop(name)
        assert "encoder.mid_block.attentions.0.query.weight" in weights

    folder = changed("sd15", rewritten(VAE, older))
    wanted = diffusers.AutoencoderKL.from_pretrained(folder / "vae").state_dict()
    found = load_vae(folder, CPU).state_dict()
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[name], found[name]) for name in wanted)
    more = rewritten("transformer/diffusion_pytorch_model.safetensors", lambda w: w.update({"pos_embed.pos_embed": torch.zeros(1, 4, 8)}))
    DiffusersDenoiser.from_folder(changed("pixart", more), size=(8, 8))  # a buffer that earlier versions saved


def test_the_advice_on_variants_works(changed, tmp_path):
    folder = changed("sd15", as_variant)
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, variant="fp16")
    pipe.save_pretrained(tmp_path / "other")
    check_encoder(tmp_path / "other", None)
    DiffusersDenoiser.from_folder(tmp_path / "other", planned=True)


@pytest.mark.parametrize("kind", ["sd3", "flux", "lumina2", "qwen", "pixart", "wan", "flux2"])
def test_prompts_are_as_long_as_the_pipeline_takes(kind, pipelines, refused, tmp_path):
    folder = pipelines(kind)
    name = json.loads((folder / "model_index.json").read_text())["_class_name"]
    said = re.findall(r"max_sequence_length > (\d+)", inspect.getsource(getattr(diffusers, name).check_inputs))
    most = int(said[0]) if said else 4096
    check_encoder(folder, most)
    with pytest.raises(UserError, match=f"{name} takes at most {most:,} tokens of a prompt, got {most + 1:,}: set text.max_length"):
        check_encoder(folder, most + 1)
    if kind == "sd3":
        for more in (["--dry-run"], []):
            assert "at most 512" in refused(*training(folder, tmp_path, "text.max_length=100000", *more))
        given = ("convert", "prompts", tmp_path / "prompts.txt", tmp_path / "out", "--max-length", "100000", "--pipeline", folder)
        assert "at most 512" in refused(*given)
