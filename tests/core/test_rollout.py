"""The carrier of a batch refuses what does not fit and moves as one."""

from dataclasses import replace

import pytest
import torch
from fakes import fake_rollout


def test_lengths_and_last():
    r = fake_rollout(0)
    assert len(r) == 6
    assert r.lengths.tolist() == r.mask.sum(1).tolist()
    assert r.last.tolist() == [int(row.nonzero().max()) for row in r.mask]
    empty = fake_rollout(0, mask=torch.tensor([[False, False], [True, False]]))
    assert empty.last.tolist() == [-1, 0]  # an empty answer is known as such, not scored at 0


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("field", ["mask", "logprobs", "values", "scores"])
def test_wrong_shapes_are_named(field):
    r = fake_rollout(0)
    with pytest.raises(ValueError, match=rf"'{field}' has shape .* expected"):
        replace(r, **{field: getattr(r, field)[:-1]})


@pytest.mark.usefixtures("unchecked")
def test_prompts_of_another_batch_are_refused():
    r = fake_rollout(0)
    with pytest.raises(ValueError, match="'prompts' has shape"):
        replace(r, prompts=r.prompts[:3])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused(value):
    r = fake_rollout(0)
    scores = r.scores.clone()
    scores[2] = value
    with pytest.raises(ValueError, match=r"'scores' holds NaN or infinity; find the step"):
        replace(r, scores=scores)


@pytest.mark.usefixtures("unchecked")
def test_a_mask_of_numbers_is_refused():
    r = fake_rollout(0)
    with pytest.raises(ValueError, match="give a bool tensor"):
        replace(r, mask=r.mask.long())


def test_select_takes_rows_of_every_field():
    r = replace(fake_rollout(0), index=torch.arange(6), finished=torch.arange(6) > 2)
    for rows in (torch.tensor([4, 1]), torch.arange(6) % 2 == 0):
        part = r.select(rows)
        for name, tensor in part.tensors().items():
            assert torch.equal(tensor, getattr(r, name)[rows]), name
    assert part.advantages is None


def test_to_changes_the_type_of_numbers_only():
    r = fake_rollout(0).to(torch.float32)
    kinds = {name: t.dtype for name, t in r.tensors().items()}
    assert kinds["prompts"] == kinds["responses"] == torch.int64
    assert kinds["mask"] == torch.bool
    assert kinds["values"] == kinds["scores"] == torch.float32
    assert torch.equal(r.responses, fake_rollout(0).responses)


def test_it_is_frozen():
    with pytest.raises(AttributeError):
        fake_rollout(0).scores = torch.zeros(6)  # type: ignore[misc]
