"""Several cores give the bits of one: outputs, gradients, whole PPO steps; and fail as one does."""

import threading

import pytest
import torch

from minirlhf.config import PPOConfig
from minirlhf.engine import compute
from minirlhf.model import CHUNK, Transformer, TransformerConfig, response_logprobs
from minirlhf.ppo import PPO

ROWS = 4 * CHUNK + 5  # the last chunk is a short one


@pytest.fixture(autouse=True)
def _one_core_again():
    yield
    compute.use(1)


def model(seed=0):
    config = TransformerConfig(vocab_size=30, context=40, d_model=32)
    made = Transformer(config, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        made.scalar.weight.fill_(0.1)  # at 0 the critic would send no gradient into the trunk
    return made


def batch(seed=1):
    g = torch.Generator().manual_seed(seed)
    prompts = torch.randint(3, 30, (ROWS, 8), generator=g)
    responses = torch.randint(3, 30, (ROWS, 20), generator=g)
    mask = torch.arange(20) < torch.randint(1, 21, (ROWS, 1), generator=g)
    return prompts, responses, mask


def loss_of(made):
    logprobs, values = response_logprobs(made, *batch())
    return logprobs.exp().sum() + values.square().sum()


def gradients(made, count):
    compute.use(count)
    made.zero_grad()
    loss = loss_of(made)
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in made.parameters()]


@pytest.mark.parametrize("count", [2, 3, 8])
def test_values_and_gradients_have_the_bits_of_one_core(count):
    made = model()
    loss, grads = gradients(made, 1)
    again, others = gradients(made, count)
    assert torch.equal(loss, again)
    assert all(g.abs().max() > 0 for g in grads)
    assert all(torch.equal(g, o) for g, o in zip(grads, others, strict=True))


def test_ppo_steps_have_the_bits_of_one_core():
    ends = []
    for count in (1, 2):
        compute.use(count)
        config = PPOConfig(batch=48, max_new_tokens=12, epochs=1, minibatches=1)
        score = lambda p, r, m: m.sum(-1).float()  # noqa: E731
        run = PPO(model(), model(2), score, batch()[0], config, seed=3)
        metrics = [run.step().metrics for _ in range(3)]
        kept = [{k: v for k, v in row.items() if "seconds" not in k} for row in metrics]
        ends.append((kept, run.optimiser.flat.clone()))
    assert ends[0][0] == ends[1][0]
    assert torch.equal(ends[0][1], ends[1][1])


def test_chunks_really_run_on_other_threads_and_one_core_uses_none():
    seen = set()

    def note(x):
        seen.add(threading.current_thread() is threading.main_thread())
        return x

    parts = [(torch.ones(2),)] * 3
    compute.in_chunks(note, parts, [])
    assert seen == {True}
    seen.clear()
    compute.use(2)
    assert torch.equal(compute.in_chunks(note, parts, []), torch.ones(6))
    assert seen == {False}


def test_a_retained_graph_is_walked_again_and_a_freed_one_says_so():
    made = model()
    _, expected = gradients(made, 1)
    compute.use(2)
    loss = loss_of(made)
    for retain in (True, False):
        made.zero_grad()
        loss.backward(retain_graph=retain)
        assert all(torch.equal(p.grad, g) for p, g in zip(made.parameters(), expected, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_only_parameters_that_learn_get_a_gradient_and_none_without_grad():
    made = model()
    made.tokens.requires_grad_(False)
    made.blocks[0].requires_grad_(False)
    loss, grads = [], []
    for count in (1, 2):
        compute.use(count)
        made.zero_grad()
        loss_of(made).backward()
        grads.append([p.grad for p in made.parameters() if p.requires_grad])
        with torch.no_grad():
            loss.append(loss_of(made))
        assert made.tokens.weight.grad is None
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert torch.equal(*loss) and not loss[1].requires_grad
    with torch.inference_mode():
        assert loss_of(made).is_inference()
    assert not loss_of(made.requires_grad_(False)).requires_grad


def test_workers_have_the_gradient_mode_of_who_asks():
    compute.use(2)
    weight, seen = torch.ones(2, requires_grad=True), []

    def note(x):
        seen.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        return weight * x

    parts = [(torch.ones(2),)] * 3
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            compute.in_chunks(note, parts, [weight])
    assert seen == [(True, False)] * 3 + [(False, False)] * 3 + [(False, True)] * 3


def test_what_a_chunk_raises_is_raised():
    compute.use(2)
    prompts, responses, mask = batch()
    with pytest.raises(ValueError, match="context is 40"):
        response_logprobs(model(), prompts.repeat(1, 4), responses, mask)


def test_no_core_is_refused():
    with pytest.raises(ValueError, match="cannot compute on 0 cores"):
        compute.use(0)
