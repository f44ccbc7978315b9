"""The flat AdamW is torch's AdamW."""

import pytest
import torch
from fakes import tiny_model
from torch import Tensor, nn

from minirlhf.engine import files
from minirlhf.engine.adamw import FlatAdamW


def loss(model: nn.Module, step: int) -> Tensor:
    tokens = torch.randint(1, 5, (3, 4), generator=torch.Generator().manual_seed(step))
    logits, values = model(tokens)
    return logits.square().mean() + (values - step).square().mean()


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_twenty_steps_equal_torch(weight_decay, max_norm):
    ours, theirs = tiny_model(1), tiny_model(1)
    fast = FlatAdamW(ours, lr=1e-2, betas=(0.8, 0.95), weight_decay=weight_decay)
    slow = torch.optim.AdamW(
        theirs.parameters(), lr=1e-2, betas=(0.8, 0.95), weight_decay=weight_decay
    )
    for step in range(20):
        fast.zero_grad()
        loss(ours, step).backward()
        found = fast.clip_grad(max_norm)
        fast.step()
        slow.zero_grad()
        loss(theirs, step).backward()
        expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_norm or 1e9)
        slow.step()
        assert found.item() == pytest.approx(expected.item(), rel=1e-9)
    # what is left: biases of keys, whose true gradient is 0, divide rounding by eps
    torch.testing.assert_close(flat(ours), flat(theirs), rtol=0, atol=1e-8)


def test_the_learning_rate_may_change_between_steps():
    ours, theirs = tiny_model(1), tiny_model(1)
    fast, slow = FlatAdamW(ours, lr=1e-2), torch.optim.AdamW(theirs.parameters(), weight_decay=0)
    for step, lr in enumerate((1e-2, 5e-3, 0.0, 1e-3)):
        fast.lr = slow.param_groups[0]["lr"] = lr
        for model, optimiser in ((ours, fast), (theirs, slow)):
            optimiser.zero_grad()
            loss(model, step).backward()
            optimiser.step()
    torch.testing.assert_close(flat(ours), flat(theirs), rtol=0, atol=1e-8)


def test_clipping_bounds_the_norm_and_reports_the_one_before():
    model = tiny_model(1)
    optimiser = FlatAdamW(model, lr=1e-2)
    loss(model, 50).backward()
    before = optimiser.clip_grad(None)
    assert before > 1.0
    assert optimiser.clip_grad(1.0) == before
    assert optimiser.clip_grad(None).item() == pytest.approx(1.0, abs=1e-5)
    assert optimiser.clip_grad(5.0).item() == pytest.approx(1.0, abs=1e-5)  # shorter: untouched
    assert optimiser.clip_grad(None).item() == pytest.approx(1.0, abs=1e-5)


def test_the_model_still_computes_the_same_and_gradients_land_in_the_flat_vector():
    model, other = tiny_model(1), tiny_model(1)
    optimiser = FlatAdamW(model, lr=1e-2)
    assert loss(model, 0) == loss(other, 0)
    loss(model, 0).backward()
    loss(other, 0).backward()
    expected = torch.cat([p.grad.flatten() for p in other.parameters() if p.grad is not None])
    assert torch.equal(optimiser.grad, expected)
    loss(model, 0).backward()  # gradients add up until they are cleared
    torch.testing.assert_close(optimiser.grad, 2 * expected)
    optimiser.zero_grad()
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def test_state_survives_a_file_bit_for_bit(tmp_path):
    def run(model: nn.Module, optimiser: FlatAdamW, steps: range) -> None:
        for step in steps:
            optimiser.zero_grad()
            loss(model, step).backward()
            optimiser.step()

    model = tiny_model(1, dtype=torch.float32)
    optimiser = FlatAdamW(model, lr=1e-2, weight_decay=0.1)
    run(model, optimiser, range(3))
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    path = files.save_tensors(tmp_path / "o", optimiser.state_dict(), {})
    run(model, optimiser, range(3, 6))

    again = tiny_model(2, dtype=torch.float32)
    resumed = FlatAdamW(again, lr=1e-2, weight_decay=0.1)
    again.load_state_dict(weights)
    resumed.load_state_dict(files.load_tensors(path)[0])
    run(again, resumed, range(3, 6))
    assert torch.equal(flat(model), flat(again))
