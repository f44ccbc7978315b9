"""The PPO loop: it starts at rest, learns what it should, stops safely and resumes exactly."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from fakes import fake_rollout, tiny_model
from tiny_ppo import PROMPTS, SMALL, likes_threes, untimed, weights
from torch import Tensor
from torch.nn.functional import pad

from minirlhf.engine import files
from minirlhf.model import Transformer, TransformerConfig, response_logprobs
from minirlhf.ppo import PPO, PPOConfig, TrainingDiverged
from minirlhf.rollout import Rollout
from minirlhf.sft import SFTConfig, train_sft

try:
    from minirlhf.metrics import summarise
except ImportError:  # before the metrics had a module of their own
    from minirlhf.ppo import summarise  # type: ignore[no-redef]


def start(config: PPOConfig = SMALL, seed: int = 0, *, scorer=likes_threes, model: int = 0) -> PPO:
    reference = tiny_model(model, dtype=torch.float32)
    return PPO(copy.deepcopy(reference), reference, scorer, PROMPTS, config, seed=seed)


# --- at rest ----------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_at_the_start_kl_is_zero_and_the_ratio_one(temperature):
    run = start(replace(SMALL, temperature=temperature, epochs=1, minibatches=1))
    rollout, _ = run.rollout()
    given = (rollout.prompts, rollout.responses, rollout.mask)
    ours = response_logprobs(run.policy, *given, temperature=temperature)[0]
    theirs = response_logprobs(run.reference, *given, temperature=temperature)[0]
    assert torch.equal(ours, theirs)  # one function, equal weights: equal bits
    assert torch.equal(theirs, rollout.ref_logprobs)
    # the sampler reads through its cache: equal up to rounding
    torch.testing.assert_close(rollout.logprobs, ours.detach(), rtol=0, atol=2e-5)
    metrics = run.update(rollout)
    assert metrics["policy/ratio_max"] == pytest.approx(1.0, abs=1e-4)
    assert metrics["policy/clip_share"] == 0
    assert metrics["policy/old_kl_nats_per_token"] == pytest.approx(0.0, abs=1e-8)


def test_a_reference_that_is_the_policy_is_refused():
    model = tiny_model(dtype=torch.float32)
    with pytest.raises(ValueError, match=r"policy and reference share weights.*copy.deepcopy"):
        PPO(model, model, likes_threes, PROMPTS, SMALL)
    other = tiny_model(1, dtype=torch.float32)
    other.tokens = model.tokens  # one shared table is enough
    with pytest.raises(ValueError, match="share weights"):
        PPO(other, model, likes_threes, PROMPTS, SMALL)


def test_the_reference_never_moves_and_the_policy_does():
    run = start()
    reference, policy = weights(run.reference), weights(run.policy)
    for _ in range(3):
        run.step()
    assert torch.equal(weights(run.reference), reference)
    assert not torch.equal(weights(run.policy), policy)


def test_a_second_run_may_start_from_a_copy_of_a_used_reference():
    first = start()
    first.step()
    second = PPO(copy.deepcopy(first.reference), first.reference, likes_threes, PROMPTS, SMALL)
    before = weights(second.policy)
    second.step()
    assert not torch.equal(weights(second.policy), before)


# --- what a rollout is ------------------------------------------------------------------------


def test_a_rollout_knows_where_it_came_from_and_how_it_ended():
    rollout, _ = start().rollout()
    assert rollout.index is not None and rollout.finished is not None
    assert torch.equal(rollout.prompts, PROMPTS[rollout.index])
    ended = [1 in row[m].tolist() for row, m in zip(rollout.responses, rollout.mask, strict=True)]
    assert rollout.finished.tolist() == ended and 0 < sum(ended) < 16
    raw = likes_threes(rollout.prompts, rollout.responses, rollout.mask)
    assert torch.equal(rollout.scores, raw - (~rollout.finished).float())
    assert rollout.ref_eos_logprobs is not None
    chose_eos = (rollout.responses == 1) & rollout.mask
    assert torch.equal(rollout.ref_eos_logprobs[chose_eos], rollout.ref_logprobs[chose_eos])


def test_group_members_answer_one_prompt():
    rollout, _ = start(replace(SMALL, advantage="rloo", group=4)).rollout()
    assert rollout.index is not None
    groups = rollout.index.view(-1, 4)
    assert (groups == groups[:, :1]).all() and groups[:, 0].unique().numel() > 1


def test_the_score_is_the_only_word_of_the_reward_model():
    run = start(scorer=lambda prompts, responses, mask: torch.full((len(mask),), float("nan")))
    before = weights(run.policy)
    with pytest.raises(ValueError, match="'scores' holds NaN or infinity"):
        run.step()
    assert torch.equal(weights(run.policy), before)


# --- one update -------------------------------------------------------------------------------


def test_epochs_and_minibatches_cover_the_batch(monkeypatch):
    run, seen = start(replace(SMALL, epochs=3, minibatches=4)), []
    rollout, _ = run.rollout()
    rollout = replace(rollout, index=torch.arange(16))
    plain = run.loss
    monkeypatch.setattr(run, "loss", lambda part: (seen.append(part.index), plain(part))[1])
    run.update(rollout)
    assert run.optimiser.steps == 12 and [len(rows) for rows in seen] == [4] * 12
    for epoch in range(3):
        rows = torch.cat(seen[4 * epoch : 4 * epoch + 4])
        assert rows.sort().values.tolist() == list(range(16))


def test_progress_is_called_before_every_minibatch():
    run, seen = start(replace(SMALL, epochs=3, minibatches=4)), []
    rollout, _ = run.rollout()
    run.update(rollout, progress=lambda: seen.append(run.optimiser.steps))
    assert seen == list(range(12)) and run.optimiser.steps == 12


def test_what_progress_raises_ends_the_update_there():
    run, seen = start(replace(SMALL, epochs=3, minibatches=4)), []
    rollout, _ = run.rollout()

    def progress() -> None:
        seen.append(weights(run.policy))
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.update(rollout, progress=progress)
    assert run.optimiser.steps == 2 and len(seen) == 3
    assert torch.equal(weights(run.policy), seen[2]) and not torch.equal(seen[1], seen[2])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"value_clip": 0.2, "loss_aggregation": "sequence_mean"},
        {"kl_place": "loss", "kl_estimator": "k2", "temperature": 0.7},
        {"kl_place": "book_literal", "kl_aggregation": "token_mean"},
        {"advantage": "grpo", "clip_style": "book"},
    ],
)
def test_the_loss_of_log_probs_is_the_loss_of_the_policy_that_has_them(options):
    run = start(replace(SMALL, **options))
    rollout, _ = run.rollout()
    run.update(rollout)  # away from the policy that sampled
    logprobs, values = response_logprobs(
        run.policy,
        rollout.prompts,
        rollout.responses,
        rollout.mask,
        temperature=run.config.temperature,
    )
    loss, metrics = run.loss(rollout)
    again, same = run.loss_of(logprobs, values, rollout, beta=run.beta)
    assert torch.equal(loss, again)
    assert metrics.keys() == same.keys()
    assert all(torch.equal(metrics[name], same[name]) for name in metrics)
    gradients = [torch.autograd.grad(x, list(run.policy.parameters()), allow_unused=True)
                 for x in (loss, again)]  # fmt: skip
    for one, other in zip(*gradients, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


@pytest.mark.parametrize("advantage, learns", [("gae", True), ("rloo", False), ("grpo", False)])
def test_only_gae_trains_the_critic(advantage, learns):
    run = start(replace(SMALL, advantage=advantage))
    before = run.policy.scalar.weight.clone()
    metrics = run.step().metrics
    assert torch.equal(run.policy.scalar.weight, before) is not learns
    assert ("value/loss" in metrics) is ("value/explained_variance" in metrics) is learns


def test_the_loss_is_the_sum_of_its_parts():
    config = replace(SMALL, kl_place="loss", kl_estimator="k2", beta=0.3, value_coef=0.7)
    run = start(config)
    rollout, _ = run.rollout()
    run.update(rollout)  # leave the reference, so that the KL is not 0
    total, m = run.loss(rollout)
    expected = m["policy/loss"] + 0.7 * m["value/loss"] + 0.3 * m["policy/kl_loss"]
    assert total.item() == pytest.approx(expected.item(), abs=1e-6)
    assert m["policy/kl_loss"] > 0
    free, _ = start(replace(config, beta=0.0)).loss(rollout)
    assert free.isfinite()


def test_padding_changes_no_metric_and_no_gradient():
    run = start()
    rollout, _ = run.rollout()
    run.update(rollout)
    wide = Rollout(
        **{
            name: t if t.dim() == 1 else pad(t, (3, 0) if name == "prompts" else (0, 40))
            for name, t in rollout.tensors().items()
        }
    )
    found = []
    for batch in (rollout, wide):
        run.optimiser.zero_grad()
        loss, metrics = run.loss(batch)
        loss.backward()
        gradient = run.optimiser.grad.clone()
        plain = {name: float(value) for name, value in metrics.items()}
        found.append(plain | summarise(batch, 0.1) | {"loss": loss.item()})
        found[-1] |= {"gradient": gradient.norm().item(), "first": gradient[:20].sum().item()}
    assert found[0] == pytest.approx(found[1], rel=1e-5, abs=1e-7)


def test_metrics_by_hand():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    rollout = replace(
        fake_rollout(0, mask=mask),
        logprobs=torch.tensor([[-1.0, -2.0, 0], [-3.0, 0, 0]]),
        ref_logprobs=torch.tensor([[-2.0, -2.5, 0], [-2.0, 0, 0]]),
        scores=torch.tensor([1.0, 4.0]),
        values=torch.tensor([[0.0, 1.0, 9], [2.0, 9, 9]]),
        advantages=torch.tensor([[0.5, -0.5, 9], [1.0, 9, 9]]),
        returns=torch.tensor([[1.0, 1.0, 99], [4.0, 99, 99]]),
        finished=torch.tensor([True, False]),
    )
    found = summarise(rollout, 0.05)
    assert found["objective/score_sd"] == 2.5
    assert found["objective/kl_nats"] == pytest.approx((1.5 - 1.0) / 2)  # per answer, k1
    assert found["objective/beta"] == 0.05
    assert found["response/length_tokens"] == 1.5
    assert found["response/finished_share"] == 0.5
    assert found["advantage/positive_share"] == pytest.approx(2 / 3)
    # returns 1, 1, 4 (variance 3) less values 0, 1, 2: left 1, 0, 2 (variance 1)
    assert found["value/explained_variance"] == pytest.approx(1 - 1 / 3)


# --- dials, seeds, resuming -------------------------------------------------------------------


def test_the_seed_decides_the_run():
    first, again, other = (start(seed=s) for s in (0, 0, 1))
    for _ in range(2):
        metrics = [untimed(run.step().metrics) for run in (first, again, other)]
    assert metrics[0] == metrics[1] != metrics[2]
    assert torch.equal(weights(first.policy), weights(again.policy))


@pytest.mark.parametrize(
    "config",
    [
        replace(SMALL, beta=0.1, kl_target=0.5, kl_horizon=100.0),
        replace(SMALL, advantage="grpo", value_clip=0.2),
    ],
)
def test_a_run_resumed_from_a_file_ends_bit_for_bit_the_same(tmp_path, config):
    run = start(config)
    for _ in range(2):
        run.step()
    path = files.save_tensors(tmp_path / "run.safetensors", run.state_dict(), {})
    ahead = [untimed(run.step().metrics) for _ in range(3)]

    again = start(config, seed=99)
    with torch.no_grad():
        for p in again.policy.parameters():
            p.add_(1.0)  # nothing of its own may survive
    again.load_state_dict(files.load_tensors(path)[0])
    assert again.steps == 2
    assert [untimed(again.step().metrics) for _ in range(3)] == ahead
    assert torch.equal(weights(run.policy), weights(again.policy))
    end, same = run.state_dict(), again.state_dict()
    assert end.keys() == same.keys()
    assert all(torch.equal(end[name], same[name]) for name in end)


def test_a_state_is_a_copy_that_later_steps_do_not_touch():
    run = start()
    run.step()
    state = run.state_dict()
    kept = {name: t.clone() for name, t in state.items()}
    run.step()
    assert all(torch.equal(state[name], kept[name]) for name in kept)


@pytest.mark.parametrize(
    "config", [SMALL, replace(SMALL, beta=0.1, kl_target=0.5, kl_horizon=100.0)]
)
def test_a_copy_leaves_the_run_alone_and_goes_the_same_way(config):
    run = start(config)
    run.step()
    before = {name: t.clone() for name, t in run.state_dict().items()}
    copied = run.copy()
    ahead = [untimed(copied.step().metrics) for _ in range(2)]
    assert copied.steps == 3 and run.steps == 1
    after = run.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [untimed(run.step().metrics) for _ in range(2)] == ahead
    assert torch.equal(weights(run.policy), weights(copied.policy))


def test_dials_turned_mid_run_act_from_the_next_step():
    run = start()
    run.step()
    run.config = replace(run.config, beta=0.7, max_new_tokens=3, batch=8, lr=2e-5)
    metrics, rollout = run.step()
    assert metrics["objective/beta"] == run.beta == 0.7
    assert rollout.responses.shape == (8, 3)
    assert run.optimiser.lr == 2e-5
    assert rollout.rewards is not None and rollout.kl is not None
    torch.testing.assert_close(rollout.rewards.sum(1), rollout.scores - 0.7 * rollout.kl.sum(1))


def test_an_adaptive_beta_moves_and_survives_other_dials():
    config = replace(SMALL, beta=0.1, kl_target=5.0, kl_horizon=160.0)
    run = start(config)
    run.step()
    assert run.beta == pytest.approx(0.1 * (1 - 0.2 * 16 / 160))  # KL 0 is far below the target
    moved = run.beta
    run.config = replace(config, lr=1e-4)
    assert run.beta == moved
    run.config = replace(run.config, beta=0.3)
    assert run.beta == 0.3


# --- stopping safely --------------------------------------------------------------------------


def assert_diverges(run: PPO, rollout: Rollout) -> None:
    before, steps = weights(run.policy), run.optimiser.steps
    with pytest.raises(TrainingDiverged, match=r"step 1: the weights of before .* lower ppo.lr"):
        run.update(rollout)
    assert torch.equal(weights(run.policy), before) and run.optimiser.steps == steps
    run.step()  # and the run can go on
    assert weights(run.policy).isfinite().all()


def test_a_loss_that_is_not_finite_leaves_the_weights_of_before():
    run = start()
    rollout, _ = run.rollout()
    assert rollout.returns is not None
    assert_diverges(run, replace(rollout, returns=rollout.returns + 1e30))


def test_a_finite_loss_with_a_nan_gradient_does_too():
    run = start(replace(SMALL, value_coef=0.0))
    rollout, _ = run.rollout()
    # exp(500) overflows; with A > 0 the clipped branch keeps the loss finite, not its gradient
    bad = replace(
        rollout,
        logprobs=torch.where(rollout.mask, rollout.logprobs - 500, 0.0),
        advantages=rollout.mask.float(),
    )
    assert run.loss(bad)[0].isfinite()
    assert_diverges(run, bad)


# --- where it ends ----------------------------------------------------------------------------


def two_answers(model: Transformer) -> tuple[float, float]:
    """Exact probabilities of the answers `3 <eos>` and `4 <eos>`."""
    with torch.no_grad():
        prompts, mask = torch.full((2, 1), 2), torch.ones(2, 2, dtype=torch.bool)
        logprobs, _ = response_logprobs(model, prompts, torch.tensor([[3, 1], [4, 1]]), mask)
    first, second = logprobs.double().sum(1).exp().tolist()
    return first, second


@pytest.fixture(scope="module")
def bandit() -> Transformer:
    """A reference that says `3` in about a tenth of its answers and `4` in the others."""
    config = TransformerConfig(5, 8, d_model=16, n_layer=1, n_head=2)
    model = Transformer(config, generator=torch.Generator().manual_seed(0))
    responses = torch.tensor([[3, 1]] * 10 + [[4, 1]] * 90)
    mask = torch.ones_like(responses, dtype=torch.bool)
    sft = SFTConfig(steps=80, batch=200, lr=1e-2)
    prompts, generator = torch.full((100, 1), 2), torch.Generator().manual_seed(1)
    train_sft(model, prompts, responses, mask, sft, generator=generator)
    return model


@pytest.mark.parametrize(
    "gap, options",
    [
        (0.3, {"beta": 0.1, "whiten_advantages": "none"}),
        (0.1, {"beta": 0.05}),  # 52.5 % of raters prefer it: a tenth becomes four
        (0.3, {"beta": 0.1, "kl_place": "loss", "kl_estimator": "k2", "whiten_advantages": "none"}),
        (0.3, {"beta": 0.1, "advantage": "rloo", "whiten_advantages": "none"}),
    ],
)
def test_two_answers_end_at_the_tilted_reference(bandit, gap, options):
    """logit p* = logit p0 + gap / beta: the drift that a slight preference buys, in closed form."""

    def scorer(prompts: Tensor, responses: Tensor, mask: Tensor) -> Tensor:
        return gap * (responses[:, 0] == 3).float()

    first, second = two_answers(bandit)
    logit = math.log(first / second) + gap / options["beta"]
    config = PPOConfig(
        batch=128, max_new_tokens=2, minibatches=1, lr=3e-3, missing_eos="none", **options
    )
    run = PPO(copy.deepcopy(bandit), bandit, scorer, torch.tensor([[2]]), config)
    shares = []
    for step in range(220):
        if step == 100:
            run.config = replace(config, lr=4e-4)
        run.step()
        if step >= 160:
            first, second = two_answers(run.policy)
            shares.append(first / (first + second))
    assert sum(shares) / len(shares) == pytest.approx(1 / (1 + math.exp(-logit)), abs=0.03)


def test_the_books_penalty_holds_nothing_back(bandit):
    """k1 differentiated in the loss: the same gap and beta as above, and p runs to 1."""

    def scorer(prompts: Tensor, responses: Tensor, mask: Tensor) -> Tensor:
        return 0.3 * (responses[:, 0] == 3).float()

    config = PPOConfig(
        batch=128, max_new_tokens=2, minibatches=1, lr=3e-3, missing_eos="none", beta=0.1,
        kl_place="book_literal",
    )  # fmt: skip
    run = PPO(copy.deepcopy(bandit), bandit, scorer, torch.tensor([[2]]), config)
    for _ in range(100):
        run.step()
    first, second = two_answers(run.policy)
    assert first / (first + second) > 0.95  # the optimum with KL in the reward is .67


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cpu_and_gpu_agree_on_a_step():
    on_cpu, model = start(), tiny_model(0, dtype=torch.float32)
    on_gpu = PPO(
        copy.deepcopy(model).to("cuda"), model.to("cuda"), likes_threes, PROMPTS.to("cuda"), SMALL
    )
    metrics = [untimed(run.step().metrics) for run in (on_cpu, on_gpu)]
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-3, abs=1e-4)
