"""Scenes of digits: what their captions say is what their pictures show, and the judge of that."""

from collections import Counter

import numpy as np
import pytest
import torch

from potstill.engine.common.errors import UserError
from potstill.engine.data import scenes
from potstill.engine.data.images import open_images
from potstill.engine.data.scenes import EMPTY, FAINT, WORDS, Cell
from potstill.engine.measure.scenes import Accuracy, judge
from potstill.engine.measure.scores import open_score
from potstill.engine.models.tensors import hash_of

CPU = torch.device("cpu")


def cells_in(caption):
    """What a caption says, read by hand: the digit and whether it is faint, on the left and on the right; None: nothing."""

    def cell(words):
        article, *words = words.split()
        faint = words[0] == "faint"
        assert article == ("an" if words[0] == "eight" else "a") and len(words) == 1 + faint
        return WORDS.index(words[-1]), faint

    for side in ("left", "right"):
        if caption.endswith(f" on the {side}"):
            one = cell(caption.removesuffix(f" on the {side}"))
            return (one, None) if side == "left" else (None, one)
    left, right = caption.split(" and ")
    return cell(left), cell(right)


def test_every_scene_has_a_caption_of_its_own():
    found = scenes.all_scenes()
    captions = [scenes.caption_of(scene) for scene in found]
    assert len(set(captions)) == len(captions) == 440 and len(scenes.scene_of()) == 440
    for scene, caption in zip(found, captions, strict=True):
        assert cells_in(caption) == tuple(None if cell == EMPTY else tuple(cell) for cell in scene)
        assert scenes.scene_of()[caption] == scene
    assert scenes.caption_of((Cell(8), Cell(8, True))) == "an eight and a faint eight"
    assert scenes.caption_of((EMPTY, Cell(0))) == "a zero on the right"


def test_twenty_pairs_are_held_out_and_every_digit_is_twice_on_each_side_of_them():
    pairs = [(left, right) for left in range(10) for right in range(10) if scenes.is_held_out((Cell(left), Cell(right)))]
    assert len(pairs) == 20
    for side in zip(*pairs, strict=True):
        assert Counter(side) == dict.fromkeys(range(10), 2)
    apart, others = (scenes.all_scenes(held_out=which) for which in (True, False))
    assert {(left.digit, right.digit) for left, right in apart} == set(pairs) and len(apart) == 80  # each digit bright or faint
    assert sorted(apart + others) == sorted(scenes.all_scenes())
    assert {scene for scene in others if EMPTY in scene} == {scene for scene in scenes.all_scenes() if EMPTY in scene}


def test_pictures_of_held_out_pairs_are_never_drawn_and_all_others_are():
    drawn = scenes.drawn_scenes()
    assert len(drawn) == scenes.NUMBER and set(drawn) == set(scenes.all_scenes(held_out=False))
    cells = [cell for scene in drawn for cell in scene if cell != EMPTY]
    counts = np.bincount([cell.digit for cell in cells], minlength=10) / len(cells)
    assert abs(counts - 0.1).max() < 0.01
    assert np.mean([cell.faint for cell in cells]) == pytest.approx(scenes.OF_FAINT, abs=0.01)
    alone = np.mean([EMPTY in scene for scene in drawn])
    pairs = 0.8 * (1 - scenes.ALONE)  # a fifth is drawn again
    assert alone == pytest.approx(scenes.ALONE / (scenes.ALONE + pairs), abs=0.015)
    assert np.mean([right == EMPTY for _, right in drawn]) == pytest.approx(alone / 2, abs=0.015)


@pytest.fixture(scope="module")
def sklearns():
    """All digits as scikit-learn has them: bytes of 0 … 255 in a cell, and what they are."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return found.images, found.target


@pytest.mark.parametrize("tests", [False, True])
def test_pictures_show_what_their_captions_say(sklearns, tests):
    images, targets = sklearns
    allowed = {}  # the bytes of a cell: what it may show
    for faint in (False, True):
        for image, digit in zip(np.rint(images / 16 * (FAINT if faint else 1) * 255).astype(np.uint8), targets, strict=True):
            allowed.setdefault(image.tobytes(), set()).add((int(digit), faint))
    wanted = scenes.drawn_scenes(600, seed=7)
    pictures = scenes.pictures_of(wanted, tests=tests, seed=4)
    assert pictures.shape == (600, 1, 8, 16) and pictures.dtype == np.uint8
    for picture, scene in zip(pictures, wanted, strict=True):
        for cell, said in zip((picture[0, :, :8], picture[0, :, 8:]), cells_in(scenes.caption_of(scene)), strict=True):
            assert not cell.any() if said is None else said in allowed[np.ascontiguousarray(cell).tobytes()]


def test_digits_of_pictures_and_of_tests_are_all_of_them_and_none_is_both(sklearns):
    (own, own_digit), (other, other_digit) = scenes.digits(), scenes.digits(tests=True)
    assert len(own) == scenes.TRAIN and len(own) + len(other) == 1797
    mine, theirs = ({image.tobytes() for image in some} for some in (own, other))
    assert not mine & theirs
    shown = {(image * 16).tobytes(): digit for image, digit in zip([*own, *other], [*own_digit, *other_digit], strict=True)}
    assert shown == {image.tobytes(): digit for image, digit in zip(*sklearns, strict=True)}
    assert min(np.bincount(own_digit).min(), np.bincount(other_digit).min()) > 20


def test_scenes_and_pictures_are_the_same_at_every_call():
    drawn = scenes.drawn_scenes(50)
    assert drawn == scenes.drawn_scenes(50) == scenes.drawn_scenes(400)[:50] != scenes.drawn_scenes(50, seed=2)
    np.testing.assert_array_equal(scenes.pictures_of(drawn), scenes.pictures_of(drawn))
    assert (scenes.pictures_of(drawn) != scenes.pictures_of(drawn, seed=1)).any()


def test_the_data_set_brings_its_captions_along():
    images, drawn = open_images("scenes"), scenes.drawn_scenes()
    assert (len(images), images.shape, images.labels) == (scenes.NUMBER, (1, 8, 16), None)
    assert images.captions == [scenes.caption_of(scene) for scene in drawn]
    np.testing.assert_array_equal(images.pixels(), scenes.pictures_of(drawn))
    part = images.part(np.array([5, 3]))
    assert part.captions == [images.captions[5], images.captions[3]]
    np.testing.assert_array_equal(part.read(0), images.read(5))


# The judge


def test_the_judge_is_right_of_digits_it_has_not_seen_and_always_the_same():
    before = torch.get_rng_state()
    first = judge.__wrapped__()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    with torch.no_grad():  # as measuring is
        second = judge.__wrapped__()
    assert first.own_accuracy == second.own_accuracy >= 0.93
    assert hash_of(first.net.state_dict()) == hash_of(second.net.state_dict()) == open_score("scenes", CPU).sha256


def shown(*captions, tests=True, seed=0):
    """Real pictures [N, 3, 8, 16] of scenes, as scores get them."""
    pictures = scenes.pictures_of([scenes.scene_of()[caption] for caption in captions], tests=tests, seed=seed)
    return torch.from_numpy(pictures).expand(-1, 3, -1, -1)


def test_a_picture_is_right_only_where_both_cells_are():
    score, pictures = open_score("scenes", CPU), shown("a six and a faint zero", "a one on the left", "a four on the right", tests=False)
    right = ["a six and a faint zero", "a one on the left", "a four on the right"]
    assert score(pictures, right)["accuracy"].tolist() == [1, 1, 1]
    for wrong in (
        ["a five and a faint zero", "a two on the left", "a nine on the right"],
        ["a six and a zero", "a faint one on the left", "a faint four on the right"],
        ["a six and a faint one", "a one on the right", "a four on the left"],
        ["a faint zero and a six", "a one and a four", "a one and a four"],
        ["a six on the left", "a one and a faint one", "a four and a four"],
        ["a faint zero on the right", "a zero on the left", "a zero on the right"],
    ):
        assert score(pictures, wrong)["accuracy"].tolist() == [0, 0, 0], wrong
    assert score(pictures.flip(3), ["a six and a faint zero"] * 3)["accuracy"].sum() == 0
    assert score(torch.zeros(1, 3, 8, 16, dtype=torch.uint8), ["a zero and a zero"])["accuracy"].item() == 0


def test_the_score_of_real_pictures_is_the_judges_own():
    drawn = scenes.drawn_scenes(2000, seed=2)
    captions = [scenes.caption_of(scene) for scene in drawn]
    accuracy = open_score("scenes", CPU)(shown(*captions, seed=3), captions)["accuracy"]
    assert accuracy.dtype == torch.float64 and accuracy.mean().item() == judge().own_accuracy
    assert open_score("scenes", CPU)(shown(*captions, seed=3), captions[1:] + captions[:1])["accuracy"].mean() < 0.02


def test_what_the_judge_cannot_judge_is_one_sentence():
    score = Accuracy("", CPU)
    with pytest.raises(UserError, match=r"^score scenes is for pictures of 8x16, got 16x8$"):
        score(torch.zeros(1, 3, 16, 8, dtype=torch.uint8), ["a one on the left"])
    with pytest.raises(UserError, match=r"^score scenes knows no scene 'a cat': wanted captions such as 'a three and a faint seven'$"):
        score(torch.zeros(2, 3, 8, 16, dtype=torch.uint8), ["a one on the left", "a cat"])
    with pytest.raises(UserError, match=r"^score scenes takes no file, got 'judge.safetensors'"):
        open_score("scenes:judge.safetensors", CPU)
