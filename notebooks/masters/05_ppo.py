# %% [markdown]
# # 05 · PPO: many small, clipped steps to where the penalty says
#
# **After this notebook you can** turn a score at the end of an answer into an advantage for every
# token, say what a baseline changes and what it cannot change, read the clip case by case, write
# a PPO step yourself, and show that it ends where theory says.
#
# **Minutes** 60 · **before** notebook 04 · **runs** in about half a minute · **seed** 0

# %%
import copy
import math
from dataclasses import replace

import torch
import torch.nn.functional as F

from minirlhf.advantages import gae
from minirlhf.drift import shipped
from minirlhf.lab.panels.updates import ClipDial, CreditDial, clip_figure, clip_share, curves_figure
from minirlhf.lab.picture import Picture
from minirlhf.oracle import ForkChain, clip_steps, net_advantages, two_answer
from minirlhf.ppo import PPO, ppo_policy_loss

# %% [markdown]
# ## 1 Credit: from the TD error to GAE
#
# The reward model scores the whole answer; the gradient needs a number for every token. The
# *advantage* of a token says how much better things went than the critic expected. The book uses
# the **TD error**: the reward now, plus what the critic expects after the token, less what it
# expected before it. Behind the last token nothing is expected.


# %%
def td_errors(rewards, values, gamma):
    """r_t + gamma V_{t+1} - V_t, [B, T]; the state after the last token is worth 0."""
    after = F.pad(values[:, 1:], (0, 1))
    return rewards + gamma * after - values


rewards = torch.tensor([[-0.2, 0.0, 0.0, 0.0, 1.0]])  # KL is paid first, the score comes last
values = torch.tensor([[0.3, 0.3, 0.6, 0.6, 0.8]])  # the critic before each token
for t, delta in enumerate(td_errors(rewards, values, gamma=1.0)[0]):
    print(f"token {t}: TD error {delta:+.1f}")

# %% [markdown]
# The TD error of token 0 knows nothing of the score, except through the critic. If the critic is
# wrong, so is the credit. **GAE** (Schulman et al. 2015, eq. 16) adds the TD errors that follow,
# each discounted by $\gamma\lambda$:
#
# $$A_t = \sum_{k \ge t} (\gamma\lambda)^{k-t}\, \delta_k$$
#
# At $\lambda = 0$ that is the book's TD error. At $\lambda = 1$ (and $\gamma = 1$) the values
# between cancel, and return minus value remains: the critic is asked only once.


# %%
def gae_sum(rewards, values, gamma, lam):
    """The same sum, written down: weights [T, T], token t in row t."""
    steps = torch.arange(rewards.shape[1])
    ahead = steps[None] - steps[:, None]  # k - t
    weights = torch.where(ahead >= 0, (gamma * lam) ** ahead.clamp(min=0), 0.0)
    return td_errors(rewards, values, gamma) @ weights.T


mask = torch.ones_like(rewards, dtype=torch.bool)
for lam in (0.0, 0.95, 1.0):
    mine = gae_sum(rewards, values, 1.0, lam)
    assert torch.allclose(mine, gae(rewards, values, mask, gamma=1.0, lam=lam))
    print(f"lambda {lam:.2f}: " + "  ".join(f"{a:+.2f}" for a in mine[0]))
assert torch.allclose(mine, rewards.flip(1).cumsum(1).flip(1) - values)
print("equal to the library; lambda 1 is return minus value")

# %% [markdown]
# **Exercise 1** (10 minutes). The sum takes T x T weights. One loop from the last token to the
# first does it in T: $A_t = \delta_t + \gamma\lambda A_{t+1}$. Answers of a batch differ in
# length: where `mask` is False there is no token, the advantage is 0, and "the next token" is the
# next one that *is* there. So a hole (a token that somebody else wrote) is skipped, not a stop.


# %% tags=["exercise"]
def backward_gae(rewards, values, mask, gamma, lam):
    """[B, T] advantages, by one backward loop over t; rewards, values, mask are [B, T]."""
    # BEGIN SOLUTION
    advantages = torch.zeros_like(rewards)
    running = next_value = torch.zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        running = torch.where(mask[:, t], delta + gamma * lam * running, running)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        advantages[:, t] = torch.where(mask[:, t], running, 0.0)
    return advantages
    # END SOLUTION


# %% tags=["check"]
from checks.c05 import check_backward_gae

print(check_backward_gae(backward_gae))

# %% [markdown]
# ### One fork, thirty tokens
#
# Take the case in miniature. Token 0 decides between a verbose answer (30 tokens) and a concise
# one. The reference opens verbosely with probability 0.02, the policy by now with 0.10. Verbose
# is worth 0.30 reward sd more; KL costs 0.05 reward sd a nat. After the fork nothing is a choice,
# and no KL is paid.

# %%
p, p0, beta, gap = 0.10, 0.02, 0.05, 0.30
chain = ForkChain(p0, gap, beta, steps=30)
rewards = torch.zeros(1, 30).double()
rewards[0, 0] = -beta * math.log(p / p0)
rewards[0, -1] += gap
concise = -beta * math.log((1 - p) / (1 - p0))  # what the other answer nets
start = p * (gap + float(rewards[0, 0])) + (1 - p) * concise  # V before the fork
flat = torch.full_like(rewards, start)  # right about the prompt, blind to the answer
exact = torch.full_like(rewards, gap)  # after the fork the score is certain
exact[0, 0] = start
mask = torch.ones_like(rewards, dtype=torch.bool)
for name, critic in (("flat", flat), ("exact", exact)):
    a = gae(rewards, critic, mask, gamma=1.0, lam=1.0)
    assert torch.allclose(a[0], chain.advantages(p, critic=name)[0])
print("a fork of 30 tokens by hand: the same as the library's chain")

# %% [markdown]
# **Predict.** $\lambda = 1$. On the verbose answer, how many of the 30 tokens have A > 0 with the
# flat critic? With the exact one? Then: what does the flat critic say at $\lambda = 0.95$ and at
# $\lambda = 0$ about the *fork*, the one token that matters?

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("computed:")
for critic in ("flat", "exact"):
    for lam in (1.0, 0.95, 0.0):
        a = chain.advantages(p, critic=critic, lam=lam)[0]
        up = int((a > 1e-9).sum())
        print(f"{critic:5} critic, lambda {lam:.2f}: {up:2d} of 30 above 0, fork {a[0]:+.2f}")

# %% [markdown]
# The flat critic spreads the surprise over tokens that chose nothing. With $\lambda < 1$ it even
# turns the sign at the fork: the early choice of a long answer pays its KL at once and hears
# little of the score. The exact critic says the same at every $\lambda$: only the fork counts.
#
# **Predict.** $\lambda = 0.95$, flat critic: which share of the score reaches the first of 60
# tokens? And the first of 200?

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("computed:")
for tokens in (30, 60, 200):
    score = torch.zeros(1, tokens)
    score[0, -1] = 1.0
    heard = gae(score, torch.zeros_like(score), score > -1, gamma=1.0, lam=0.95)[0, 0]
    print(f"first of {tokens}: {100 * heard:.3f} % of the score")


# %% [markdown]
# **Turn the dials**: $\lambda$, $\gamma$ and the length of the answer. Find a length from which
# on the verbose fork is pushed *down* with the flat critic at $\lambda = 0.95$. Then lower
# $\gamma$: which critic minds now, and why is that no error of its own?


# %% jupyter={"source_hidden": true}
def credit(tokens, gamma, lam):
    """Advantages of the verbose answer under both critics."""
    chain = ForkChain(p0, gap, beta, steps=tokens)
    both = ("flat", "exact")
    return {c: chain.advantages(p, critic=c, gamma=gamma, lam=lam)[0].numpy() for c in both}


panel = CreditDial(credit, limit=0.35)
panel

# %% tags=["smoke"] jupyter={"source_hidden": true}
lam, gamma, tokens = (panel.controls[name] for name in ("lam", "gamma", "tokens"))
for at in (0.0, 1.0):
    lam.value = at
    fork = {critic: float(a[0]) for critic, a in panel.shown.items()}
    print(f"lambda {at:.0f}: fork {fork['flat']:+.2f} (flat), {fork['exact']:+.2f} (exact)")
assert abs(fork["flat"] - fork["exact"]) < 1e-9  # lambda 1: the critic between does not matter
forks = {}
for at in (gamma.min, gamma.max):
    for length in (tokens.min, tokens.max):
        gamma.value, tokens.value = at, length
        assert len(panel.shown["flat"]) == length
        forks[at, length] = fork = float(panel.shown["exact"][0])
        print(f"gamma {at:.1f}, {length} tokens: fork {fork:+.2f} (exact)")
assert forks[0.9, 60] < 0 < forks[0.9, 2] < forks[1.0, 2]  # a discount charges the long answer
assert abs(forks[1.0, 60] - forks[1.0, 2]) < 1e-9  # without one, length does not count
lam.value, gamma.value, tokens.value = 1.0, 1.0, 30

# %% [markdown]
# $\gamma < 1$ is not a matter of credit: it changes the task. A score that comes 60 tokens later
# is worth less, so a *short* answer is worth more, and an exact critic says so. $\lambda$ leaves
# the task alone. Where does each road end? The chain knows.

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("computed:")
print(f"without discount theory says {two_answer(p0, gap, beta):.2f}")
for critic in ("flat", "exact"):
    ends = (f"{lam:.2f}: {chain.end(critic=critic, lam=lam):.2f}" for lam in (1.0, 0.95, 0.0))
    print(f"{critic:5} critic, lambda " + ", ".join(ends))
print(f"exact critic, gamma 0.95: {chain.end(gamma=0.95):.2f}")

# %% [markdown]
# With $\lambda = 1$ or with an exact critic the end is the same. A flat critic with
# $\lambda < 1$ ends elsewhere: not because a baseline moved the optimum, but because the credit
# never arrived. That is why this course runs $\lambda = 1$.
#
# ## 2 A baseline changes signs, not destinations
#
# Two answers now, one token each. $R_V$ and $R_C$ are what they net after KL. The advantage is
# $R - b$ for *some* baseline b that does not look at the answer. The ascent on logit p is
# $p A_V (1-p) - (1-p) A_C\, p = p(1-p)(A_V - A_C)$: the baseline is gone.

# %%
net = {"V": gap - beta * math.log(p / p0), "C": -beta * math.log((1 - p) / (1 - p0))}
value = p * net["V"] + (1 - p) * net["C"]
baselines = {"exact value": value, "none": 0.0, "too low": -1.0, "too high": 1.0}
for name, b in baselines.items():
    a_v, a_c = net["V"] - b, net["C"] - b
    ascent = p * a_v * (1 - p) - (1 - p) * a_c * p
    print(f"{name:11}: A_V {a_v:+.2f}, A_C {a_c:+.2f}, difference {a_v - a_c:.3f}, ", end="")
    spread = math.sqrt(p * (a_v * (1 - p)) ** 2 + (1 - p) * (a_c * p) ** 2 - ascent**2)
    print(f"ascent {ascent:.4f}, one sample's sd {spread:.2f}")
    assert math.isclose(a_v - a_c, net["V"] - net["C"]) and math.isclose(
        ascent, p * (1 - p) * (net["V"] - net["C"])
    )
a_v, a_c = net_advantages(p, p0, gap, beta)
assert math.isclose(a_v, net["V"] - value) and math.isclose(a_c, net["C"] - value)
biased = -p * (1 - p) / 30 + (1 - p) * p / 1  # -E[s / |y|], answers of 30 tokens and of 1
print(
    f"each answer's loss a mean over its tokens: a baseline of 1 adds {biased:+.3f} to the ascent"
)

# %% [markdown]
# That is so where an answer's tokens are *summed*, and nearly so for a mean over all tokens of a
# batch. Where each answer is averaged over its own length first (`sequence_mean`), $E[s/|y|]$ is
# not 0, and a baseline does push: the last line above, for a fork of 30 tokens against 1.
#
# One sampled answer gives $A_V (1-p)$ or $-A_C\,p$: the same mean under every baseline, but not
# the same spread. So "the advantages are positive" says little before we know the baseline. With
# the exact value it says one thing: the policy is still below the optimum of notebook 04.
#
# **Predict.** The exact critic, KL in the reward. Suppose the policy has gone *too far*, above p*:
# which sign has $A_V$, and which $A_C$? Which of the two is the larger one?

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("computed:")
star = float(two_answer(p0, gap, beta))
for at in (0.5, star, 0.97):
    a_v, a_c = (float(a) for a in net_advantages(at, p0, gap, beta))
    kl = at * math.log(at / p0) + (1 - at) * math.log((1 - at) / (1 - p0))
    said = "both zero" if abs(a_v) + abs(a_c) < 1e-9 else f"A_V {a_v:+.3f}, A_C {a_c:+.3f}"
    print(f"p = {at:.2f}: {said}; KL {kl:.1f} nats")

# %% [markdown]
# Above p* the signs have turned, and the rare concise answer has the large one: the *net* calls
# the policy back. At p* every advantage is zero, and the KL is larger than anywhere on the way. A
# large penalty and positive advantages do not contradict each other on the way; at the end it is
# the net that vanishes.
#
# **Whitening** is an affine map of the advantages: divide by their sd (`scale`, the shipped run's
# choice), or subtract their mean as well (`shift_scale`). The sd is a step size. The shift is one
# more baseline, on the same condition: afterwards some tokens are positive and some negative,
# whatever the critic says. (Dividing the *scores* before KL is charged is another matter: it
# changes the price of KL.)
#
# **Exercise 2** (10 minutes). Write `shift_scale` for a batch with padding.


# %% tags=["exercise"]
def whiten_masked(x, mask):
    """x [B, T] with mean 0 and variance 1 (n - 1 in the variance) over the True entries of mask,
    and 0 elsewhere."""
    # BEGIN SOLUTION
    inside = x[mask]
    return torch.where(mask, (x - inside.mean()) / inside.std(), 0.0)
    # END SOLUTION


# %% tags=["check"]
from checks.c05 import check_whiten_masked

print(check_whiten_masked(whiten_masked))

# %% [markdown]
# A baseline needs no critic. **RLOO** (Ahmadian et al. 2024) samples a few answers to the same
# prompt and compares each with the mean of the *others*: leaving itself out keeps the baseline
# independent of the answer it judges.
#
# **Exercise 3** (5 minutes). Write it. Rows 0 to group - 1 answer one prompt, and so on.


# %% tags=["exercise"]
def leave_one_out(returns, group):
    """returns [B] -> advantages [B]: each return less the mean of its group's other returns."""
    # BEGIN SOLUTION
    r = returns.view(-1, group)
    others = (r.sum(1, keepdim=True) - r) / (group - 1)
    return (r - others).flatten()
    # END SOLUTION


# %% tags=["check"]
from checks.c05 import check_leave_one_out

print(check_leave_one_out(leave_one_out))

# %% [markdown]
# Now real runs: a Transformer with two words, PPO as the library has it, three baselines. The
# "blind" critic says -0.3 before every token and never learns, so that *every* advantage is
# positive for the whole run.
#
# **Predict.** Where does the blind run end: below the optimum, on it, or at 1?

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
from minirlhf.oracle import two_word_policy, verbose_share
from minirlhf.oracle.pocket import anneal, settings

start, price, worth = two_word_policy(0.1), 0.1, 0.26
theory = float(two_answer(0.1, worth, price))
plain = settings(price, batch=256, max_new_tokens=1, lr=0.01)
arms = {
    "critic": plain,
    "critic, shifted": replace(plain, whiten_advantages="shift_scale"),
    "blind critic": replace(plain, value_coef=0.0),
}
baseline_runs = {}
for name, config in arms.items():
    policy = copy.deepcopy(start)
    with torch.no_grad():
        policy.scalar.bias.fill_(-0.3)
    run = PPO(policy, start, lambda _p, r, _m: worth * (r[:, 0] == 0), torch.tensor([[1]]), config)
    up = [step.metrics["advantage/positive_share"] for step in anneal(run, 40)]
    baseline_runs[name] = verbose_share(policy), sum(up) / len(up)
print(f"theory {theory:.1f}")
for name, (end, up) in baseline_runs.items():
    print(f"{name:15}: ends at {end:.1f}; positive advantages {'all' if up == 1 else 'some'}")
    assert abs(end - theory) < 0.06
assert baseline_runs["blind critic"][1] == 1

# %% [markdown]
# Every advantage positive, from the first rollout to the last, and the policy stops at the same
# place. What a bad baseline costs is noise: the sd in the table above.
#
# ## 3 The clip, case by case
#
# PPO takes more than one optimiser step on a batch, so the policy moves away from the one that
# sampled it. The *ratio* $\rho = \pi_\theta / \pi_{old}$ says how far, token by token. The clip
# takes away the reward for moving further. Schulman et al. (2017, eq. 7) take
# $\min(\rho A,\ \mathrm{clip}(\rho, 1-\epsilon, 1+\epsilon)\, A)$; the book bounds the ratio from
# above only: $\min(\rho, 1+\epsilon)\, A$.
#
# **Predict.** Four ratios (below the band, inside it on either side of 1, above it) and two signs
# of A make eight cases, each in two forms. Where is the gradient 0? Where do the forms differ?

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("computed (epsilon 0.2), from the library's loss by autograd:")


def surrogate(ratio, advantage, style):
    """Value of one token's surrogate, and its gradient by log-prob."""
    new, old = torch.tensor([[math.log(ratio)]], requires_grad=True), torch.zeros(1, 1)
    one = torch.ones(1, 1, dtype=torch.bool)
    loss = ppo_policy_loss(new, old, advantage * torch.ones(1, 1), one, clip=0.2, style=style)
    loss.backward()
    return -loss.item(), -new.grad.item() + 0.0


print(f" A  ratio   {'schulman':22}book")
flat_cases = {"schulman": [], "book": []}
for advantage in (1, -1):
    for ratio in (0.5, 0.9, 1.1, 1.5):
        cells = {style: surrogate(ratio, advantage, style) for style in flat_cases}
        for style, (_, gradient) in cells.items():
            flat_cases[style] += [(advantage, ratio)] if gradient == 0 else []
        print(f"{advantage:+d}  {ratio}   ", end="  ")
        print("   ".join(f"{v:+.1f}, gradient {g:+.1f}" for v, g in cells.values()))
assert flat_cases == {"schulman": [(1, 1.5), (-1, 0.5)], "book": [(1, 1.5), (-1, 1.5)]}

# %% [markdown]
# The gradient is by the token's log-prob, and to be followed *up*. Read the two outer cases of
# A < 0 in both forms. Below the band the token has been pushed
# down far enough: Schulman's form stops, the book's pushes on without end. Above the band a bad
# token has become *likelier*: Schulman's form pulls it back, the book's has no gradient at all.
# For A > 0 the two are the same.
#
# **Exercise 4** (10 minutes). Write Schulman's surrogate, one term a token, to be maximised.


# %% tags=["exercise"]
def clipped_surrogate(logprobs, old_logprobs, advantages, clip):
    """[B, T] terms min(rho A, clip(rho) A) of Schulman et al., before any mean; higher = better."""
    # BEGIN SOLUTION
    ratio = (logprobs - old_logprobs).exp()
    bounded = ratio.clamp(1 - clip, 1 + clip)
    return torch.minimum(ratio * advantages, bounded * advantages)
    # END SOLUTION


# %% tags=["check"]
from checks.c05 import check_clipped_surrogate

print(check_clipped_surrogate(clipped_surrogate))

# %% [markdown]
# ### The clip bounds a step, not the journey
#
# The ratio is measured against the policy of *this* rollout. The next rollout starts at 1 again:
# the clip does not know the reference. Suppose each rollout is optimised until no sample pushes
# on.
#
# **Predict.** How many rollouts from p = 0.001 to 0.5 at $\epsilon = 0.2$, and at 0.1, if only
# the verbose samples act (p grows by 1 + $\epsilon$)? And if the concise ones are pushed down too
# (1 - p shrinks by 1 - $\epsilon$)?

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("computed:")
for eps in (0.2, 0.1):
    growth = math.ceil(math.log(0.5 / 0.001) / math.log(1 + eps))
    alone = clip_steps(0.001, 0.5, eps, verbose_only=True)
    both = clip_steps(0.001, 0.5, eps)
    assert alone == growth
    print(f"epsilon {eps}: {alone} rollouts by the verbose side alone, {both} by both")

# %% [markdown]
# The concise side is the loose one: taking a fifth away from what has nearly all the probability
# sets free a lot. "At most 20 percent a step" is said of the ratio of a *sampled* token. The
# probability of a whole mode is not bounded so. (Section 5: not even the ratio is.)
#
# ## 4 A PPO step in one sitting
#
# Four pieces. **Roll out**: sample, and keep the log-probs of the sampler, of the reference, and
# the critic's values. **Price and credit**: KL in the reward, GAE. **Loss**. **Update**: some
# epochs over the batch. We run it on the pocket desk: a Transformer with eight words and answers
# of at most four tokens, whose 2801 answers to each prompt can all be listed.

# %%
from minirlhf.generate import sample
from minirlhf.model import response_logprobs
from minirlhf.oracle import pocket_desk
from minirlhf.oracle.pocket import total_variation

desk = pocket_desk(slope=0.3)
c = settings(beta=0.5)
print(f"{len(desk.prompts)} prompts, {len(desk.responses)} answers to each")


# %%
def roll_out(policy, generator):
    """One batch of answers: who said what, how likely, and what it scored."""
    index = torch.randint(len(desk.prompts), (c.batch,), generator=generator)
    prompts = desk.prompts[index]
    limits = {"max_new_tokens": c.max_new_tokens, "eos": 1}
    responses, mask, old, values = sample(policy, prompts, **limits, generator=generator)
    with torch.no_grad():
        ref, _ = response_logprobs(desk.reference, prompts, responses, mask)
    return (prompts, responses, mask), old, ref, values, desk.score(prompts, responses, mask)


def price_and_credit(mask, old, ref, values, scores):
    """Advantages and the critic's targets, [B, T]: KL in the reward, score on the last token."""
    rewards = torch.where(mask, -c.beta * (old - ref), 0.0)
    rewards[torch.arange(len(mask)), mask.sum(1) - 1] += scores
    advantages = gae(rewards, values, mask, gamma=c.gamma, lam=c.lam)
    return advantages, advantages + values


# %%
def ppo_loss(policy, given, old, advantages, returns):
    """Clipped surrogate, summed over each answer, and the critic's squared error."""
    mask = given[2]
    new, values = response_logprobs(policy, *given)
    ratio = (new - old).exp()
    bounded = ratio.clamp(1 - c.clip, 1 + c.clip)
    terms = torch.minimum(ratio * advantages, bounded * advantages)
    surrogate = torch.where(mask, terms, 0.0).sum(1).mean()
    error = 0.5 * (values - returns).square()[mask].mean()
    return -surrogate + c.value_coef * error


def ppo_step(policy, adam, generator):
    """Roll out, credit, and `epochs` optimiser steps; the batch's mean score."""
    given, old, ref, values, scores = roll_out(policy, generator)
    advantages, returns = price_and_credit(given[2], old, ref, values, scores)
    for _ in range(c.epochs):
        torch.randperm(c.batch, generator=generator)  # the library shuffles: keep in step with it
        loss = ppo_loss(policy, given, old, advantages, returns)
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), c.max_grad_norm)
        adam.step()
    return scores.mean()


# %%
mine, generator = copy.deepcopy(desk.reference).requires_grad_(True), torch.Generator()
adam = torch.optim.Adam(mine.parameters(), lr=c.lr)
generator.manual_seed(0)
library = PPO(copy.deepcopy(desk.reference), desk.reference, desk.score, desk.prompts, c, seed=0)
for _ in range(3):
    score = ppo_step(mine, adam, generator)
    theirs = library.step().metrics["objective/score_sd"]
    assert math.isclose(score, theirs, rel_tol=1e-4)
with torch.no_grad():
    far = total_variation(desk.logprobs(mine), desk.logprobs(library.policy))
assert far.max() < 1e-3
print("three steps: the same batches, the same scores, the same policy as the library's")

# %% [markdown]
# ## 5 The dial: epsilon on a real batch
#
# Back to the support desk. The shipped run was saved as it was before its eighth step, and so was
# the batch of 128 answers that it then drew. So the real update, one pass in two minibatches,
# can be taken again and again from the same weights and the same Adam: only epsilon differs. This
# trains, so it takes a few seconds.
#
# **Predict.** From $\epsilon = 0.2$ to 0.02: more tokens outside the band or fewer? A larger
# move or a smaller one? And: can a ratio leave the band at all?

# %%
from minirlhf.kl import kl_k3

EPSILONS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8)


def real_updates(run, rollout):
    """For each epsilon the update of a copy: (epsilon, ratios [tokens], KL nats/answer)."""
    mask = rollout.mask
    for eps in EPSILONS:
        copied = run.copy()
        copied.config = replace(run.config, clip=eps)
        copied.update(rollout)
        with torch.no_grad():
            new, _ = response_logprobs(copied.policy, rollout.prompts, rollout.responses, mask)
        kl = torch.where(mask, kl_k3(rollout.logprobs, new), 0.0).sum(1).mean()  # KL(old || new)
        yield eps, (new - rollout.logprobs)[mask].exp().numpy(), kl.item()


# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
support = shipped()
run, batch = support.run_before(8), support.rollout(8)
sweep = {}
for eps, ratios, kl in real_updates(run, batch):
    sweep[eps] = ratios, kl
    share = clip_share(eps, ratios)
    print(f"epsilon {eps:.2f}: {100 * share:3.0f} % of the tokens outside, {kl:.2f} nats an answer")

# %% [markdown]
# And the end point? On two answers the whole road can be followed: exact expectations in place of
# samples, the library's loss, Adam on two logits, eight epochs a rollout (with a single step
# there would be nothing to clip).
#
# **Predict.** With $\epsilon = 0.02$ in place of 0.2: how much longer is the road, and where does
# it end?


# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("computed:")


def road(eps, rollouts=50, epochs=8):
    """P(verbose) after each rollout, from p0 with KL in the reward."""
    ref, score = torch.tensor([p0, 1 - p0]).log(), torch.tensor([gap, 0.0])
    logits, one = ref.clone().requires_grad_(True), torch.ones(2, 1, dtype=torch.bool)
    adam, path = torch.optim.Adam([logits], lr=0.02), [p0]
    for _ in range(rollouts):
        old = logits.detach().log_softmax(0)
        net = score - beta * (old - ref)
        # a surrogate is linear in A, so an answer's probability may weigh its advantage
        weighted = 2 * old.exp() * (net - (old.exp() * net).sum())
        for _ in range(epochs):
            new = logits.log_softmax(0)[:, None]
            loss = ppo_policy_loss(new, old[:, None], weighted[:, None], one, clip=eps)
            adam.zero_grad()
            loss.backward()
            adam.step()
        path.append(logits.detach().softmax(0)[0].item())
    return path


paths = {eps: road(eps) for eps in EPSILONS}
for eps, path in paths.items():
    half = next(n for n, at in enumerate(path) if at > star / 2)
    print(f"epsilon {eps:.2f}: half way after {half} rollouts, ends at {path[-1]:.2f}")
print(f"theory: {star:.2f}")

# %% [markdown]
# All of it in one figure: outside the band, the size of the move, the road.

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
Picture(clip_figure(sweep, paths, star))

# %% [markdown]
# Turn it. The dial stops at the six values that were computed.

# %% jupyter={"source_hidden": true}
panel = ClipDial(sweep, paths, star)
panel

# %% tags=["smoke"] jupyter={"source_hidden": true}
ends = {}
for eps in (EPSILONS[0], EPSILONS[-1]):
    panel.controls["eps"].value = eps
    ends[eps] = dict(panel.shown)
small, large = ends.values()
assert small["clip_share"] > large["clip_share"] and small["kl_nats"] < large["kl_nats"]
assert small["half_way"] > large["half_way"] and abs(small["end"] - large["end"]) < 0.01
print("smaller epsilon: more tokens outside, a smaller move, a longer road, the same end")
panel.controls["eps"].value = 0.2

# %%
outside = max(sweep[0.02][0].max(), 1 / sweep[0.02][0].min())
print(f"epsilon 0.02 means 2 % either way; the largest move was by a factor of {outside:.1f}")
assert outside > 1.4 and sweep[0.02][1] > 0.4 * sweep[0.8][1]  # the move: a part of it is left

# %% [markdown]
# The clip is no fence. The first step on a batch starts where every ratio is 1 and nothing is
# clipped, so no epsilon makes it shorter; here it is one of two. From then on the clip takes a
# token's *own* gradient away once its ratio is outside; the other tokens share the weights and
# carry it further, and Adam's momentum goes on. A small epsilon bounds the move only in part. And
# it leaves the end alone: where all advantages are 0 there is nothing to clip.
#
# **Recall.** Notebook 04 (section 5) found: the penalty as the book writes it, differentiated, has
# no gradient on average *in the first step on a batch*, and pushes on in those that follow; at
# $\beta = 1$ the drift was faster than with no penalty.
#
# **Predict.** A quarter of that price, $\beta = 0.25$: is it faster, too, or does a small penalty
# hold back after all?

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("computed:")


def literal_road(beta, rollouts=40, epochs=10, lr=0.5):
    """Final p with the book's penalty in the loss: exact gradients, plain ascent on logit p."""
    x = math.log(p0 / (1 - p0))
    for _ in range(rollouts):
        old = 1 / (1 + math.exp(-x))
        for _ in range(epochs):
            p = 1 / (1 + math.exp(-x))
            # E_old[-beta grad log pi] = -beta (old - p): zero at first, then away from old
            x += lr * (p * (1 - p) * gap + beta * (p - old))
    return 1 / (1 + math.exp(-x))


roads = {b: literal_road(b) for b in (0.0, 0.25, 1.0)}
for b, end in roads.items():
    print(f"beta {b:.2f}: p = {end:.2f} after 40 rollouts")
assert roads[0.0] < roads[0.25] < roads[1.0]

# %% [markdown]
# Faster, too, only by less: on a batch that is no longer fresh, the term pushes away from the
# policy that sampled it, in whatever direction the policy has begun to move, and beta is how hard.
#
# ## 6 PPO against the exact optimum
#
# On the pocket desk the best policy for a price of KL is a table: $\pi^* \propto
# \pi_{ref}\, e^{r/\beta}$. PPO never sees it. Every few steps we list all answers of the policy
# and compute, exactly: the proxy, the gold quality, KL, the pull of the KL term, and the *total
# variation* to $\pi^*$: the most by which the probability of any set of answers differs.


# %%
def pull(policy):
    """Gradient norm of beta KL over that of the proxy, both exact."""
    standing = desk.standing(desk.logprobs(policy))
    weights = [w for name, w in policy.named_parameters() if not name.startswith("scalar")]
    norms = []
    for term in (c.beta * standing.kl.mean(), standing.proxy.mean()):
        grads = torch.autograd.grad(term, weights, retain_graph=True)
        norms.append(math.sqrt(sum(g.square().sum().item() for g in grads)))
    return norms[0] / norms[1]


# %%
best = desk.optimum(c.beta)
run = PPO(copy.deepcopy(desk.reference), desk.reference, desk.score, desk.prompts, c, seed=0)
rows = []


def measure():
    """Where the policy stands now, exactly."""
    with torch.no_grad():
        table = desk.logprobs(run.policy)
    now = desk.standing(table)
    far = total_variation(table, best).mean().item()
    means = [x.mean().item() for x in (now.proxy, now.gold, now.kl)]
    rows.append([run.steps, *means, pull(run.policy), far])


# %%
measure()
for _ in anneal(run, 96):
    if run.steps % 8 == 0:
        measure()
steps, proxy, gold, kl, pulls, far = map(list, zip(*rows, strict=True))
for name, values in (("first", rows[0]), ("last", rows[-1])):
    print(f"{name}: step {values[0]}, total variation to the optimum {values[-1]:.1f}")
assert far[-1] < 0.1 < far[0]

# %% [markdown]
# **Four curves, always together**: what is optimised, what is meant, what the penalty *says* (KL)
# and what it *does* (its gradient, as a share of the proxy's). The last one tells a penalty that
# works from one that is only logged: a penalty without gradient stays at 0 while KL grows.
#
# **Predict.** Where does the fourth curve start, and where does it end?

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
goal = [x.mean().item() for x in (desk.standing(best))]  # kl, proxy, gold, length
Picture(
    curves_figure(
        steps,
        {
            "proxy": ("points", proxy, goal[1]),
            "gold": ("points", gold, goal[2]),
            "KL": ("nats per answer", kl, goal[0]),
            "KL gradient": ("share of the proxy's", pulls, 1.0),
        },
    )
)

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
points = desk.frontier(torch.logspace(-1, 1.5, 60))
for name, curve, end in (
    ("proxy", proxy, goal[1]),
    ("gold", gold, goal[2]),
    ("KL", kl, goal[0]),
):
    print(f"{name:5}: {curve[0]:.1f} -> {curve[-1]:.1f}, exact optimum {end:.1f}")
print(f"KL gradient: {pulls[0]:.1f} -> within a fifth of 1")
assert pulls[0] < 0.01 and 0.8 < pulls[-1] < 1.2
top = points.gold.argmax()
print(f"most gold of any exact optimum: at KL {points.kl[top]:.1f}; at KL ", end="")
print(f"{points.kl[0]:.1f} it is {points.gold[top] - points.gold[0]:.1f} points lower")

# %% [markdown]
# At 0 it starts, whatever the reference thinks of anything: there is no KL to shrink yet. At 1
# it ends: the two gradients cancel, which is what an optimum is. And gold rises with the proxy only
# while the two want the same: beyond a small KL, more proxy is less gold.
#
# Every KL buys at most so much proxy reward: the **frontier**. No policy stands above it, and
# PPO, from one side, falls into place on it.

# %%
from minirlhf.lab.panels.updates import frontier_figure

Picture(frontier_figure(points.kl.tolist(), points.proxy.tolist(), kl, proxy))

# %%
below = desk.ceiling(torch.tensor(kl)) - torch.tensor(proxy)
print(f"points below the frontier: at most {below.max():.1f}, at the end {below[-1]:.1f}")
assert below.min() > -1e-6 and below[-1] < 0.05

# %% [markdown]
# **What to take along.** GAE carries the score back, and $\lambda = 1$ carries all of it. A
# baseline and a whitening change the signs that you see and the noise, not the destination (as
# long as no answer is averaged over its own length). The
# clip makes steps smaller and roads longer; it knows nothing of the reference. Where the road
# ends is decided by the reward and by the price of KL: the same exact optimum that notebook 04
# wrote down, reached by a Transformer that never saw it.
#
# Next: [06 The drift](06_the_drift.ipynb), all of it in one run. Back to
# [the map](00_start_here.ipynb).
