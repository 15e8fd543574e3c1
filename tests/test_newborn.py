"""The pipeline of a teacher of text to image that is trained here: its vectors of words, text encoders from folders, what plain diffusers
reads of it, and what is refused before a run begins.

All encoders are tiny, random and made here.
"""

import json
import shutil
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

import diffusers_pipelines  # noqa: E402

from potstill.__main__ import main as potstill  # noqa: E402
from potstill.engine.common.errors import Damaged, UserError  # noqa: E402
from potstill.engine.data.embeddings import Encoder  # noqa: E402
from potstill.engine.data.pipelines import decodes  # noqa: E402
from potstill.engine.diffusion.tables import scheme_of  # noqa: E402
from potstill.engine.formats.newborn import LONGEST, WIDTH, WORDS, fresh_net, width_of, write_newborn, write_trained  # noqa: E402
from potstill.engine.jobs.job import Job  # noqa: E402
from potstill.engine.nets.diffusers import DiffusersDenoiser  # noqa: E402

# What libraries warn of while they import one another, and of where they are put together here.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(?!potstill)", "ignore::FutureWarning:(?!potstill)"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning:diffusers"),
]
CPU, NET = torch.device("cpu"), "PixArtTransformer2DModel"
TINY = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "patch_size": 4}
CAPTIONS = ["a faint seven on the left", "A three, and a Seven", "two"]


def born(folder, encoder=WORDS, captions=CAPTIONS, prediction="flow", size=(8, 16)):
    """The net, with its pipeline in `folder`."""
    torch.manual_seed(3)
    net = fresh_net(NET, TINY, prediction, (1, *size), width_of(str(encoder)))
    write_newborn(folder, net, str(encoder), captions)
    return net


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("born") / "words"
    born(folder)
    return folder


def embedded(folder, prompts, length=16):
    """Rows of the prompts without their padding, and of the null prompt."""
    encoder = Encoder(folder, CPU, max_length=length)
    text, null = encoder(prompts), encoder.null
    assert text.embeds.shape[1] == text.mask.shape[1] == length
    return [rows[own].numpy() for rows, own in zip(text.embeds, text.mask, strict=True)], null.embeds[null.mask].numpy()


# Vectors of words


def vector(name):
    return np.random.Generator(np.random.Philox(zlib.crc32(name.encode()))).standard_normal(WIDTH, np.float32).astype(np.float64)


def by_hand(*tokens):
    """LayerNorm(vector of the word + vector of its place), float64."""
    rows = np.stack([vector(token) + vector(f"place {i}") for i, token in enumerate(tokens)])
    centred = rows - rows.mean(1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5)


def test_a_prompt_is_the_normed_sum_of_its_words_and_places(words):
    rows, null = embedded(words, ["a faint seven", "A  SEVEN, faint?", "two"])
    wanted = [
        by_hand("<s>", "a", "faint", "seven"), by_hand("<s>", "a", "seven", ",", "faint", "<unk>"), by_hand("<s>", "two"),
    ]  # fmt: skip
    for got, one in zip(rows, wanted, strict=True):
        np.testing.assert_allclose(got, one, rtol=0, atol=1e-6)
    np.testing.assert_allclose(null, by_hand("<s>"), rtol=0, atol=1e-6)


def test_a_word_has_one_vector_in_every_set_of_words(words, tmp_path):
    born(tmp_path / "other", captions=["a seven is the colour of rain", "zebras"])
    assert all(
        np.array_equal(a, b) for a, b in zip(embedded(words, ["a seven"])[0], embedded(tmp_path / "other", ["a seven"])[0], strict=True)
    )
    np.testing.assert_allclose(embedded(words, ["a zebras"])[0][0], by_hand("<s>", "a", "<unk>"), atol=1e-6)
    np.testing.assert_allclose(embedded(tmp_path / "other", ["a zebras"])[0][0], by_hand("<s>", "a", "zebras"), atol=1e-6)


def test_words_that_are_called_as_special_tokens_are_and_an_order_of_captions_change_nothing(words, tmp_path):
    born(tmp_path / "other", captions=[*CAPTIONS[::-1], CAPTIONS[0]])
    for name in ("tokenizer/tokenizer.json", "text_encoder/model.safetensors"):
        assert (words / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    vocabulary = json.loads((words / "tokenizer/tokenizer.json").read_text())["model"]["vocab"]
    assert [*vocabulary] == ["<pad>", "<unk>", "<s>", ",", "a", "and", "faint", "left", "on", "seven", "the", "three", "two"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(words / "tokenizer")
    assert tokenizer("A Seven")["input_ids"] == [vocabulary[word] for word in ("<s>", "a", "seven")]
    born(tmp_path / "special", captions=["unk s pad <unk> <s> <pad>"])
    rows, _ = embedded(tmp_path / "special", ["unk s pad"])
    np.testing.assert_allclose(rows[0], by_hand("<s>", "unk", "s", "pad"), atol=1e-6)


def test_sides_that_are_none_are_refused(tmp_path):
    write_trained(folder := tmp_path / "pipeline", born(folder))
    config = folder / "transformer/config.json"
    config.write_text(config.read_text().replace('"_sides": [\n    8,', '"_sides": [\n    -8,'))
    with pytest.raises(Damaged, match=r"_sides = \[-8, 16\], wanted height and width"):
        DiffusersDenoiser.from_folder(folder)


# What plain diffusers reads


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon", "flow"])
def test_plain_diffusers_loads_the_folder_and_its_scheduler_is_the_nets(tmp_path, prediction):
    folder = tmp_path / "pipeline"
    net = born(folder, prediction=prediction)
    with pytest.raises(UserError, match="has no weights as safetensors"):
        DiffusersDenoiser.from_folder(folder)
    write_trained(folder, net)
    pipe = diffusers.PixArtAlphaPipeline.from_pretrained(folder, vae=None, local_files_only=True)
    assert scheme_of(type(pipe.scheduler).__name__, pipe.scheduler.config) == net.scheme
    again = DiffusersDenoiser.from_folder(folder)
    assert again.scheme == net.scheme and again.shape == net.shape == (1, 8, 16)
    assert DiffusersDenoiser.from_folder(folder, size=(16, 16)).shape == (1, 16, 16)
    for name, tensor in net.model.state_dict().items():
        assert torch.equal(pipe.transformer.state_dict()[name], tensor) and torch.equal(again.model.state_dict()[name], tensor)
    with torch.no_grad():
        embeds, mask, *_ = pipe.encode_prompt(CAPTIONS, do_classifier_free_guidance=False, max_sequence_length=16)
        text = Encoder(folder, CPU, max_length=16)(CAPTIONS)
        assert torch.equal(text.embeds, embeds) and torch.equal(text.mask, mask.bool())
        x, t = torch.randn(3, 1, 8, 16), torch.tensor([500.0, 999, 3])
        added = {"resolution": None, "aspect_ratio": None}
        wanted = pipe.transformer(x, embeds, timestep=t, encoder_attention_mask=mask, added_cond_kwargs=added).sample
        assert torch.equal(again.family.call(again.model, x, t, text, {}), wanted)


def test_its_vae_hands_pictures_on(words):
    vae = diffusers.AutoencoderTiny.from_pretrained(words / "vae")
    x = torch.linspace(-1, 1, 2 * 8 * 16).view(2, 1, 8, 16)
    with torch.no_grad():
        latents = vae.encode(x).latents * vae.config.scaling_factor
        shown = vae.decode(latents / vae.config.scaling_factor).sample
    np.testing.assert_allclose(shown, x, atol=1e-4)
    assert not decodes(words)


def test_what_was_begun_and_is_not_whole_is_made_anew(words, tmp_path):
    folder = tmp_path / "pipeline"
    shutil.copytree(words / "tokenizer", folder / "tokenizer")
    (folder / "tokenizer/other.json").write_text("{}")
    born(folder)
    assert not (folder / "tokenizer/other.json").exists()
    assert {p.relative_to(folder) for p in folder.rglob("*")} == {p.relative_to(words) for p in words.rglob("*")}


# Text encoders from folders


def bert(folder):
    """A bare folder with its tokenizer."""
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "faint", "seven", "on", "the", "left"])}
    tokenizer = transformers.BertTokenizer(vocab=vocabulary)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=6,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        max_position_embeddings=24,
    )
    return saved(folder, transformers.BertModel(config), tokenizer)


def saved(folder, encoder, tokenizer):
    encoder.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


ENCODERS = {
    "t5": (diffusers_pipelines.WIDTH, lambda at: saved(at, diffusers_pipelines.t5(), diffusers_pipelines.t5_tokenizer())),
    "clip": (14, lambda at: saved(at, diffusers_pipelines.clip(14), diffusers_pipelines.clip_tokenizer())),
    "bert": (6, bert),
    "pipeline": (diffusers_pipelines.WIDTH, lambda at: diffusers_pipelines.folder("pixart", at)),
}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Kind -> its folder."""
    root, made = tmp_path_factory.mktemp("encoders"), {}

    def folder(kind):
        if kind not in made:
            torch.manual_seed(1)
            made[kind] = ENCODERS[kind][1](root / kind)
        return made[kind]

    return folder


def test_a_bert_may_lack_the_pooler_that_nobody_reads(encoders, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(encoders("bert"), tmp_path / "bert")
    tensors = load_file(folder / "model.safetensors")
    save_file({name: t for name, t in tensors.items() if "pooler" not in name}, folder / "model.safetensors", {"format": "pt"})
    for k, one in enumerate((folder, encoders("bert"))):
        born(tmp_path / str(k), one)
    (first, _), (second, _) = (embedded(tmp_path / str(k), ["a faint seven"]) for k in range(2))
    np.testing.assert_array_equal(first[0], second[0])


@pytest.mark.parametrize("kind", ENCODERS)
def test_prompts_are_what_the_folders_own_encoder_makes_of_them(kind, encoders, tmp_path):
    folder, (width, _) = encoders(kind), ENCODERS[kind]
    assert width_of(str(folder)) == width
    own = folder / "text_encoder" if kind == "pipeline" else folder
    classes = {"t5": "T5EncoderModel", "clip": "CLIPTextModel", "bert": "BertModel", "pipeline": "T5EncoderModel"}
    net = getattr(transformers, classes[kind]).from_pretrained(own)
    words = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer" if kind == "pipeline" else folder)
    born(tmp_path / "pipeline", folder)
    rows, null = embedded(tmp_path / "pipeline", ["a faint seven", "on the left"])
    for got, text in zip([*rows, null], ["a faint seven", "on the left", ""], strict=True):
        tokens = words([text], padding="max_length", max_length=16, truncation=True, return_tensors="pt")
        with torch.no_grad():
            wanted = net(tokens["input_ids"], attention_mask=tokens["attention_mask"])[0][tokens["attention_mask"].bool()]
        assert got.shape[1] == width
        np.testing.assert_allclose(got, wanted.numpy(), atol=1e-5)


# What is refused, before anything is written


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of five, and their captions."""
    root = tmp_path_factory.mktemp("pictures")
    (root / "pictures").mkdir()
    for i in range(5):
        Image.fromarray(np.full((8, 8), 40 * i, np.uint8)).save(root / f"pictures/{i}.png")
    (root / "captions.txt").write_text("\n".join(f"grey {i}" for i in range(5)))
    (root / "few.txt").write_text("grey\nblack\n")
    return root


def begun(job):
    pytest.fail("the run began")


def refused(capsys, tmp_path, *settings):
    """The one line of an error."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Job, "begin", begun)
        with pytest.raises(SystemExit) as caught:
            potstill(["train", "captions", f"run_dir={tmp_path}/run", "device=cpu", *map(str, settings)])
    said = capsys.readouterr().err.strip().splitlines()
    assert caught.value.code == 2 and len([line for line in said if line.startswith("error: ")]) == 1 and "Traceback" not in str(said)
    assert not (tmp_path / "run").exists()
    return said[-1].removeprefix("error: ")


def broken(encoders, tmp_path, kind, change):
    """A copy of an encoder's folder, changed."""
    folder = shutil.copytree(encoders(kind), tmp_path / "encoder")
    change(folder)
    return f"text.encoder={folder}"


def test_a_text_encoder_that_cannot_be_read_is_one_sentence(encoders, tmp_path, capsys):
    assert refused(capsys, tmp_path, f"text.encoder={tmp_path}/none") == (
        f"text.encoder={tmp_path}/none has no config.json: wanted words, or the folder of a text encoder or pipeline"
    )


def pickled(folder):
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def half(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])


def lacking(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    save_file({name: t for name, t in tensors.items() if "layer_norm" not in name}, folder / "model.safetensors", {"format": "pt"})


def widthless(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({name: value for name, value in config.items() if name != "d_model"}))


def padless(folder):
    vocabulary = {letter: i for i, letter in enumerate(diffusers_pipelines.letters())} | {"<|endoftext|>": 256}
    transformers.GPT2Tokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)


DAMAGES = {
    "padding": (padless, "has no token for padding: set its pad_token and save it again"),
    "tokenizer": (
        lambda at: (at / "tokenizer_config.json").unlink(),
        "has no tokenizer_config.json: wanted the folder of a text encoder with",
    ),
    "words": (lambda at: (at / "tokenizer.json").unlink(), "has no .*, the words of a T5Tokenizer"),
    "pickle": (pickled, "has no weights as safetensors, and no pickle is read"),
    "half": (half, "model.safetensors"),
    "lacking": (lacking, "they miss .*layer_norm"),
    "width": (widthless, "does not say how wide its text encoder is"),
    "config": (lambda at: (at / "config.json").write_text("{"), "config.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_text_encoder_is_one_sentence(damage, encoders, tmp_path, capsys):
    change, said = DAMAGES[damage]
    with pytest.raises((UserError, Damaged), match=said):
        raise UserError(refused(capsys, tmp_path, broken(encoders, tmp_path, "t5", change)))


def test_prompts_are_no_longer_than_the_encoder_takes(encoders, tmp_path, capsys):
    at_most = "takes at most {} tokens of a prompt, got {}: set text.max_length (--max-length) to that or less"
    for kind, given, most in (("clip", None, diffusers_pipelines.TOKENS), ("bert", 25, 24), (None, LONGEST + 1, LONGEST)):
        encoder = [f"text.encoder={encoders(kind)}"] if kind else []
        said = refused(capsys, tmp_path, *encoder, f"text.max_length={given or 'null'}")
        assert said.endswith(at_most.format(most, given or 120)), said


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["+net.config.caption_channels=9"], "net.config.caption_channels follows from the data and the text encoder: leave it out"),
        (["+net.config.sample_size=9"], "net.config.sample_size follows from the data and the text encoder: leave it out"),
        (["+net.config.num_layer=3"], "net.config.num_layer is no setting of PixArtTransformer2DModel"),
        (["net.config.num_layers=many"], "net.config.num_layers wants a whole number from 1, got 'many'"),
        (["net.config.num_layers=0"], "net.config.num_layers wants a whole number from 1, got 0"),
        (["data.flips=true"], "data.flips mirrors pictures, and captions of scenes say what is left and right"),
        (["data.captions='a photo of a {}'"], 'data.captions="a photo of a {}" wants the names of classes, and scenes has no labels'),
        (["net.config.patch_size=3"], r"sides are multiples of \[3, 3\], got \[8, 16\]"),
        (
            ["students.net={model_type: PixArtTransformer2DModel, config: {caption_channels: 8}}"],
            "students.net.config.caption_channels follows",
        ),
        (["students.net={model_type: PixArtTransformer2DModel, config: {layers: 1}}"], "students.net.config.layers is no setting of Pix"),
        (["students.net={model_type: DiTTransformer2DModel}"], "cannot learn from a PixArtTransformer2DModel"),
        (["net.model_type=FluxTransformer2DModel"], f"net.model_type=FluxTransformer2DModel cannot be trained from nothing here: .* {NET}"),
        (["net.model_type=PixArt"], "PixArt"),
        (["net.prediction=epsilom"], "net.prediction wants one of v_prediction, epsilon, flow, got 'epsilom'"),
        (["text.encoder=''"], "text.encoder wants words, a folder, or null for words, got ''"),
        (["data.path=digits"], f"{NET} is told what its pictures show, and digits has no captions: set data.captions=FILE"),
    ],
)
def test_what_cannot_be_trained_is_one_sentence(settings, said, tmp_path, capsys):
    with pytest.raises(UserError, match=said):
        raise UserError(refused(capsys, tmp_path, *settings))


def test_captions_of_another_number_and_none_at_all_are_one_sentence(pictures, tmp_path, capsys):
    data = f"data.path={pictures}/pictures"
    assert "few.txt has 2 captions, wanted one for each of the 5 images" in refused(
        capsys, tmp_path, data, f"data.captions={pictures}/few.txt"
    )
    assert "has no captions: set data.captions=FILE" in refused(capsys, tmp_path, data)
    assert f"no prompts at {pictures}/none.txt" in refused(capsys, tmp_path, data, f"data.captions={pictures}/none.txt")
