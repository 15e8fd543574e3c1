"""Embedded prompts as a condition: indexed, joined and moved like the tensor of classes that they stand for."""

import pytest
import torch
from torch.utils import _pytree
from torch.utils.checkpoint import checkpoint

from potstill.engine.common.errors import UserError
from potstill.engine.nets.conditions import Text, cat, expanded


def text(n=4, tokens=5, *, mask=True, pooled=True, ids=True, width=3):
    draws = torch.Generator().manual_seed(n + tokens)
    return Text(
        torch.randn(n, tokens, width, generator=draws),
        torch.arange(tokens) < torch.arange(1, n + 1)[:, None] if mask else None,
        torch.randn(n, 2, generator=draws) if pooled else None,
        {"time_ids": torch.arange(6.0 * n).reshape(n, 6)} if ids else {},
    )


def same(a, b):
    tensors = [(a.embeds, b.embeds), (a.mask, b.mask), (a.pooled, b.pooled), *((a.extra[k], b.extra[k]) for k in a.extra)]
    return a.extra.keys() == b.extra.keys() and all(x is y is None or torch.equal(x, y) for x, y in tensors)


@pytest.mark.parametrize("rows", [slice(1, 3), torch.tensor([2, 0, 2]), torch.tensor([True, False, False, True])])
def test_rows_are_every_tensors_rows(rows):
    whole = text()
    part = whole[rows]
    assert len(part) == len(whole.embeds[rows]) and torch.equal(part.embeds, whole.embeds[rows])
    assert torch.equal(part.mask, whole.mask[rows]) and torch.equal(part.pooled, whole.pooled[rows])
    assert torch.equal(part.extra["time_ids"], whole.extra["time_ids"][rows])


@pytest.mark.parametrize("parts", [{}, {"mask": False}, {"pooled": False, "ids": False}, {"mask": False, "pooled": False, "ids": False}])
def test_joining_undoes_slicing(parts):
    whole = text(**parts)
    assert same(cat(whole[:1], whole[1:3], whole[3:]), whole)
    labels = torch.eye(4)
    assert torch.equal(cat(labels[:1], labels[1:]), labels)


def test_masked_prompts_are_filled_up_to_the_longest():
    short, long = text(2, 3), text(3, 5)
    both = cat(short, long)
    assert both.embeds.shape == (5, 5, 3) and torch.equal(both.mask.sum(1), torch.cat([short.mask.sum(1), long.mask.sum(1)]))
    assert torch.equal(both.embeds[both.mask], torch.cat([short.embeds[short.mask], long.embeds[long.mask]]))
    assert torch.equal(both[2:].embeds, long.embeds) and long.filled(5) is long


@pytest.mark.parametrize("other", [text(2, width=4), text(2, mask=False), text(2, pooled=False), text(2, ids=False), torch.eye(4)])
def test_prompts_of_two_encoders_do_not_join(other):
    with pytest.raises(UserError, match=r"one batch want the same tensors.*embeds \[4, 5, 3\].* and "):
        cat(text(), other)


def test_prompts_without_a_mask_do_not_join_in_two_lengths():
    with pytest.raises(UserError, match=r"embeds \[4, 5, 3\].*embeds \[4, 6, 3\].*one number of tokens"):
        cat(text(mask=False), text(tokens=6, mask=False))


def test_one_row_many_times_is_a_view():
    row = text(1)
    many = expanded(row, 3)
    assert same(many, cat(row, row, row)) and many.embeds.data_ptr() == row.embeds.data_ptr()
    assert torch.equal(expanded(torch.eye(2)[:1], 3), torch.eye(2)[[0, 0, 0]])


def test_a_dtype_is_for_numbers_alone():
    half = text().to("cpu", torch.bfloat16)
    assert {half.embeds.dtype, half.pooled.dtype, half.extra["time_ids"].dtype} == {torch.bfloat16} and half.mask.dtype is torch.bool


@pytest.mark.parametrize("parts", [{}, {"mask": False}, {"pooled": False}, {"mask": False, "pooled": False, "ids": False}])
def test_a_tree_of_it_has_all_its_tensors(parts):
    whole = text(**parts)
    leaves, form = _pytree.tree_flatten({"text": whole, "labels": torch.eye(2)})
    assert all(isinstance(leaf, torch.Tensor) for leaf in leaves) and len(leaves) == 5 - len(parts)
    assert same(_pytree.tree_unflatten(leaves, form)["text"], whole)


def test_checkpointing_takes_it():
    whole, weight = text(), torch.ones(3, requires_grad=True)
    checkpoint(lambda t: (t.embeds * weight).sum(), whole, use_reentrant=False).backward()
    assert torch.allclose(weight.grad, whole.embeds.sum((0, 1)))
