# %% [markdown]
# # 07 · The autopsy: inside one PPO batch
#
# **After this notebook you can** check that a log is what it claims to be, take every token's
# advantage apart into reward model, penalty and baseline, say which tokens push which answer up,
# ask what another price or another reward model would have made of the same batch, and answer the
# case's first question with numbers.
#
# **Minutes** 60 · **before** notebooks 03 to 06 · **runs** in about 40 seconds · **seed** 0

# %%
from dataclasses import replace

import numpy as np
import torch
from IPython.display import HTML

from minirlhf.advantages import gae, shape_rewards
from minirlhf.audit import grade
from minirlhf.autopsy import (
    CLASSES,
    Convention,
    push,
    reconcile,
    reference_entropy,
    rescored,
    split,
    token_classes,
    what_if,
)
from minirlhf.drift import DIALS, kinds, shipped
from minirlhf.lab.heatmap import heat_map, passed_up, token_columns
from minirlhf.lab.panels.batch_plots import (
    fork,
    fork_figure,
    lorenz_figure,
    part_means,
    waterfall_figure,
)
from minirlhf.lab.picture import Picture

case = shipped()
run, batch = case.run_before(8), case.rollout(8)  # the run as it was, and what it then drew
mask = batch.mask

# %% [markdown]
# The shipped run was saved just before its eighth step: weights, Adam's moments, random numbers.
# So the batch can be drawn again, and its update can be taken again. `run.copy()` is a
# copy, and what happens to it leaves the original alone.

# %%
again, _ = run.copy().rollout()
same = (again.responses == batch.responses).all(1).double().mean()
print(f"{len(batch)} answers, {int(mask.sum())} tokens")
assert same > 0.9  # all of them, but for rounding on another processor

# %% [markdown]
# ## 1 The three facts
#
# Verbose answers carry eight tokens of padding or more, concise ones are right and carry none.
# The case says of such a batch: **(a)** the reward model likes the verbose answer *slightly*
# better; **(b)** the verbose answer's KL penalty is *large*; **(c)** its token advantages are
# *positive* all the same.
#
# One batch holds few verbose answers to brief prompts, or few concise ones, so the facts are read
# from three batches together, with 95 % intervals from drawing whole prompts again. We then take
# apart the eighth step's: of the three it is the one in which both kinds are most evenly many, so
# that their means are least a matter of chance.

# %%
for stratum, facts in case.summary["facts"].items():
    of, steps = facts["intervals"], case.summary["batch"]["steps"]
    print(f"{stratum} prompts, steps {steps}: {facts['n_verbose']} verbose answers")
    for said, (mean, low, high) in {
        "(a) one courtesy phrase, reward sd": of["phrase"]["gap"],
        "    score, verbose less concise, sd": of["score"]["gap"],
        "(b) log-ratio, verbose, nats": of["kl"]["verbose"],
        "    the same, less that of concise": of["kl"]["gap"],
        "(c) advantage, verbose": of["advantage"]["verbose"],
        "    advantage, concise": of["advantage"]["concise"],
    }.items():
        print(f"  {said:36} {mean:+.2f}  [{low:+.2f}, {high:+.2f}]")
lowest = {s: f["intervals"]["advantage"]["verbose"][1] for s, f in case.summary["facts"].items()}
assert 0.05 > lowest["brief"] > 0 > lowest["detailed"]
uneven = {b["step"]: abs(b["n_verbose"] - b["n_concise"]) for b in case.summary["batches"]}
assert min(case.batch_steps, key=uneven.get) == 8  # the batch that we take apart

# %% [markdown]
# On brief prompts of *this* run (c) holds, but only just: the interval of the verbose advantage
# begins next to zero. On detailed prompts it reaches below. That is one seed. What do ten say, at
# which the settings of the course were chosen, and five at which nothing was? And the control
# arm, whose labelers are fair?

# %%
for title, table in {"seeds 0 to 9": case.seeds, "fresh seeds": case.fresh_seeds}.items():
    for row in table:
        if "fact" in row["claim"] or "verbose answers to brief" in row["claim"]:
            of = f"{row['mean']:+.2f}  [{row['low']:+.2f}, {row['high']:+.2f}]"
            held = f"{row['threshold']} in {row['held']} of {row['runs']}" * bool(row["threshold"])
            print(f"{title}, {row['arm']}: {row['claim']}\n    {of}  {held}")
(together,) = [row for row in case.seeds if row["arm"] == "drift" and "all three" in row["claim"]]
assert together["held"] >= 9

# %% [markdown]
# In the control arm the reward model charges for a courtesy, and hardly anybody is verbose: there
# is nothing to explain. So the facts belong to the labels, not to PPO as such.
#
# ## 2 Is the log what it says?
#
# Before you explain numbers, make them again. An advantage hangs on a *convention*: where the
# score sits, which estimator is charged, gamma and lambda, what is whitened. `reconcile` computes
# what the stated convention gives, and says how far that is from the log.

# %%
stated = Convention.of(case.config.ppo)
best = reconcile(batch, stated)[0]
for field, gap in best.residuals.items():
    print(f"{field:10} off by less than 1e-5: {gap < 1e-5}")
assert best.explains and not best.changes

# %% [markdown]
# **Predict.** A colleague's note says "lambda 0.95" for this run. The log-probs and scores are
# right. Which of kl, rewards, advantages and returns will not fit? And can the true value be
# found from the batch alone?

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
for note in ({"lam": 0.95}, {"kl_estimator": "k3"}, {"beta": 0.2}, {"whiten_advantages": "none"}):
    found = reconcile(batch, replace(stated, **note))
    off = next(c for c in found if not c.changes).residuals
    wrong = " and ".join(field for field, gap in off.items() if gap > 1e-4)
    print(f"the note says {note}: {wrong} do not fit; explained by {found[0].changes}")
    assert found[0].explains and found[0].changes.keys() == note.keys()

# %% [markdown]
# A residual that is not small comes first in every autopsy. What follows would otherwise explain
# another run.
#
# ## 3 Three parts
#
# GAE is linear in the rewards and in the values. So run it three times: on the score alone, on
# the penalty alone, on the critic alone. The sum is the advantage. Whitening divides by one
# number (here the batch's sd; no mean is taken away), so the parts share it.

# %%
nothing, no_score = torch.zeros_like(batch.values), torch.zeros_like(batch.scores)


def credit(scores, kl, values):
    """Advantages [B, T] of these scores, this KL and this critic; gamma = lambda = 1."""
    rewards = shape_rewards(scores, kl, mask, beta=stated.beta)
    return gae(rewards, values, mask, gamma=1.0, lam=1.0)


mine = {
    "reward": credit(batch.scores, nothing, nothing),
    "kl": credit(no_score, batch.kl, nothing),
    "baseline": credit(no_score, nothing, batch.values),
}
sd = sum(mine.values())[mask].std()
parts = split(batch, stated)
for name, part in mine.items():
    assert torch.allclose(part / sd, vars(parts)[name].float(), atol=1e-5)
gap = ((parts.total - batch.advantages) * mask).abs().max()
print(f"three parts, one sum: off by less than 1e-5: {gap < 1e-5}")

# %% [markdown]
# **Exercise 1** (10 minutes). Write the penalty's part yourself, for any gamma and lambda, and
# before whitening. Token $t$ is charged for its own log-ratio and for those that follow, each
# discounted by $\gamma\lambda$. Mind the sign, and tokens that do not exist.


# %% tags=["exercise"]
def kl_part(logprobs, ref_logprobs, mask, beta, gamma, lam):
    """What the k1 penalty adds to every token's advantage, [B, T]; 0 outside the mask."""
    # BEGIN SOLUTION
    paid = torch.where(mask, -beta * (logprobs - ref_logprobs), 0.0)
    part, running = torch.zeros_like(paid), torch.zeros(len(paid))
    for t in reversed(range(paid.shape[1])):
        running = torch.where(mask[:, t], paid[:, t] + gamma * lam * running, 0.0)
        part[:, t] = running
    return part
    # END SOLUTION


# %% tags=["check"]
from checks.c07 import check_kl_part

print(check_kl_part(kl_part))

# %% [markdown]
# **Predict.** On brief prompts the verbose answers of this batch have paid 5.1 nats each, on
# average. Which part of their advantage does that cost: a tenth of what the reward model gives,
# a half, or more than all of it?

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
table = case.prompts()
prompts = [table[i] for i in batch.index.tolist()]
strata = np.array([prompt.stratum for prompt in prompts])
brief = torch.from_numpy(strata == "brief")
verbose, concise = kinds(case.desk, batch, prompts)
sides = {"verbose": verbose & brief, "concise": concise & brief}
means = part_means(parts, mask, sides)
for side, of in means.items():
    said = "   ".join(f"{k} {v:+.2f}" for k, v in of.items() if k != "shift")
    print(f"{int(sides[side].sum())} {side:8} {said}")
assert 1 / 9 < -means["verbose"]["kl"] / means["verbose"]["reward"] < 1 / 7
Picture(waterfall_figure(means))

# %% [markdown]
# About an eighth of it. The penalty has the right sign, on both sides, and it is small. The critic
# takes more: after a courtesy it expects a good score, and what was expected earns nothing. It
# favours nobody by that; it is the same score seen earlier. Now in the unit in which the run was
# set up, reward sd, per answer:

# %%
log_ratio = torch.where(mask, batch.logprobs - batch.ref_logprobs, 0.0).sum(1)
score, nats = ({k: float(x[rows].mean()) for k, rows in sides.items()}
               for x in (batch.scores, log_ratio))  # fmt: skip
gap = score["verbose"] - score["concise"]
charge = stated.beta * (nats["verbose"] - nats["concise"])
for side in sides:
    print(f"{side}: score {score[side]:+.2f} sd, {nats[side]:+.1f} nats")
print(f"gap {gap:.2f} sd; the penalty takes {stated.beta} x nats = {charge:.2f} sd of it")
assert 0.2 * gap < charge < 0.24 * gap and round(nats["verbose"], 1) == 5.1

# %% [markdown]
# This is the answer to "how can it be positive in spite of a large penalty": the two numbers have
# different units. In nats the penalty is large. Times beta, it is little more than a fifth of what
# the reward model pays. And that gap is not one phrase's: verbose answers carry several, and are
# not alike in other things, either.

# %%
grades = grade(case.desk, prompts, batch.responses, mask)
for side, rows in sides.items():
    of = {name: grades[name][rows.numpy()].mean() for name in ("correct", "hedged", "evasive")}
    said = ", ".join(f"{share:.0%} {name}" for name, share in of.items())
    print(f"{side}: {grades['padding_tokens'][rows.numpy()].mean():.0f} tokens of padding, {said}")

# %% [markdown]
# Padding, hedges and missing facts come together in this batch. What a phrase is worth by itself,
# a matched pair says (fact a); what the batch did is said by the batch.
#
# **Exercise 2** (5 minutes). At which beta would a verbose and a concise answer be worth the same,
# all answers being as they are?


# %% tags=["exercise"]
def break_even(score_verbose, score_concise, nats_verbose, nats_concise):
    """The price of a nat (reward sd) at which both answers net the same."""
    # BEGIN SOLUTION
    return (score_verbose - score_concise) / (nats_verbose - nats_concise)
    # END SOLUTION


# %% tags=["check"]
from checks.c07 import check_break_even

print(check_break_even(break_even))

# %% [markdown]
# ## 4 Token by token
#
# One verbose and one concise answer. Blue words are pushed up, orange ones down; a black bar stands
# where the reference would have stopped with a probability of one half or more (in these two
# nowhere, in most answers of the list further down at least once). Point at a word, or tab to it,
# for its number; the table below has every part.


# %%
def middling(rows):
    """The answer of middling length among these rows."""
    found = rows.nonzero().squeeze(1)
    return int(found[batch.lengths[found].argsort()[len(found) // 2]])


names = case.desk.vocabulary.words
words = [[names[i] for i in row] for row in batch.responses.tolist()]
shown = torch.tensor([middling(rows) for rows in sides.values()])
bars = (passed_up(batch) >= 0.5).any(1)
assert not bars[shown].any() and bars.double().mean() > 0.5
columns = token_columns(batch, parts, stated)
HTML(  # no script in it, every text of the batch escaped
    heat_map(
        [words[row] for row in shown.tolist()],
        parts.total[shown],
        mask[shown],
        unit="unit of advantages",
        limit=float(parts.total[mask].abs().quantile(0.95)),
        titles=list(sides),
        stops=passed_up(batch)[shown],
        columns={name: x[shown] for name, x in columns.items()},
    )
)

# %% [markdown]
# **Any other answer.** Sort the batch by any column and choose a line: the map follows.

# %% jupyter={"source_hidden": true}
import ipywidgets as widgets

from minirlhf.lab.panels.batch_table import BatchTable

one = widgets.HTML()


def show_map(row):
    """The map of one answer, below the list."""
    rows = torch.tensor([row])
    limit, stops = float(parts.total[mask].abs().quantile(0.95)), passed_up(batch)[rows]
    given = {"unit": "unit of advantages", "limit": limit, "stops": stops}
    given["titles"] = [f"answer {row}"]
    one.value = heat_map([words[row]], parts.total[rows], mask[rows], **given)


answers = BatchTable(batch, strata, on_choose=show_map, below=one)
show_map(answers.row)
answers

# %% tags=["smoke"] jupyter={"source_hidden": true}
answers.by.value, answers.down.value = "kl", True
answers.choose(int(answers.order[0]))
assert words[answers.row][0] in one.value and log_ratio[answers.row] == log_ratio.max()
print(f"the answer that paid most has {int(batch.lengths[answers.row])} tokens")
up = ((parts.total > 0) & mask).sum(1) / mask.sum(1)
assert ((up - 0.5).abs() >= 0.4).double().mean() > 0.5  # most answers: nine words in ten agree
answers.by.value, answers.down.value = "row", False
answers.choose(0)

# %% [markdown]
# In most answers nearly every word has the same sign. At $\lambda = 1$ the whole score is carried
# back to each word, and the critic takes the same expectation from all of them, more or less. The
# words did not earn it one by one; the answer did. Where signs mix, it was about as good as
# expected.
#
# The penalty is another matter: in notebook 04 a few tokens of a batch paid nearly all of it.
#
# **Predict.** Which words of the verbose answer above are they?

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
row = int(shown[0])
paid = torch.where(mask, batch.logprobs - batch.ref_logprobs, 0.0)
for t in paid[row].abs().argsort(descending=True)[:3].tolist():
    print(f"token {t:2}, {words[row][t]!r}: {paid[row, t]:+.1f} nats of {paid[row].sum():.1f}")
sizes = paid[mask].abs().sort(descending=True).values
tenth = float(sizes[: len(sizes) // 10].sum() / sizes.sum())
print(f"in the whole batch the top tenth of the tokens holds {tenth:.0%} of all |log-ratio|")
assert tenth > 0.6
Picture(lorenz_figure(paid[mask]))

# %% [markdown]
# They are the **forks**: where the reference was undecided, or would rather have stopped. (A minus:
# the policy says that word more rarely than the reference, and gets something back.) Take the
# largest one.

# %%
at = int(paid[row].argmax())
policy, reference, earned = fork(run.policy, case.reference, batch, row, at)
print(f"after: {' '.join(words[row][:at]) or '(the start of the answer)'}")
print(f"the policy said {words[row][at]!r}: {policy[batch.responses[row, at]]:.2f},", end=" ")
print(f"reference {reference[batch.responses[row, at]]:.2f}")
print(f"to stop here: policy {policy[run.eos]:.2f}, reference {reference[run.eos]:.2f}")
assert reference.argmax() == run.eos and paid[row, at + 1 :].abs().median() < 0.01
Picture(fork_figure(names, policy, reference, earned))

# %% [markdown]
# Here everything has been said. To stop is what the reference would most likely do; the policy
# hardly ever does, and goes on with a courtesy.
#
# The penalty is paid there, once. Most tokens that follow are nearly free, and are still paid the
# score. That is why a *mean over tokens* shows so little of the penalty.
#
# ## 5 The push: what the update does
#
# Advantages are not yet a change of the policy: tokens share weights. To first order, a step of
# plain gradient descent moves the log-probability of an answer $y$ by
#
# $$\Delta \log \pi(y) \approx \sum_t w_t\, \eta\,
# \langle \nabla \log \pi(y_t),\ \nabla \log \pi(y) \rangle$$
#
# where $w_t$, linear in the advantage, is what the loss lays on token $t$ of the batch. So the
# change splits by part, and by token.
#
# **Exercise 3** (10 minutes). Given the gradients of every token's log-prob, the sum above token
# by token.


# %% tags=["exercise"]
def token_pushes(gradients, weights, target, lr):
    """What each of N tokens adds to the change of log pi(y), [N].

    gradients [N, P] of the tokens' log-probs; weights [N]: the loss is minus the sum of weight
    times log-prob; target [P]: the gradient of log pi(y); one step of descent with rate lr.
    """
    # BEGIN SOLUTION
    return lr * weights * (gradients @ target)
    # END SOLUTION


# %% tags=["check"]
from checks.c07 import check_token_pushes

print(check_token_pushes(token_pushes))

# %% [markdown]
# **Predict.** One step on this batch. Does it lift the verbose answers, or the concise ones, or
# both? Which part does the lifting? And what does the penalty do to each?

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
pushes = push(run, batch, parts, sides, optimiser="sgd", lr=1e-3)
for side, found in pushes.items():
    share = {k: 1e3 * v for k, v in found.parts.items() if abs(v) > 1e-9}
    said = "  ".join(f"{k} {v:+.1f}" for k, v in share.items())
    print(f"{side}: {1e3 * found.total:+.1f} thousandths of a nat = {said}")
    off = abs(found.measured / found.total - 1)
    print(f"  a real step, taken on a copy, within 2 % of it: {off < 0.02}")
    assert off < 0.02
verbose_push, concise_push = pushes.values()
assert verbose_push.total > 0 > concise_push.total
assert verbose_push.parts["reward"] > 0 > verbose_push.parts["kl"]
assert concise_push.parts["reward"] < 0 < concise_push.parts["kl"]
force = [-found.parts["kl"] / found.parts["reward"] for found in pushes.values()]
assert 0.18 < force[0] < 0.22 and 0.22 < force[1] < 0.28

# %% [markdown]
# The reward model's part lifts verbose answers and lowers concise ones. The penalty works against
# both, with a fifth to a quarter of the force. PPO itself uses Adam, which rescales every
# coordinate and remembers earlier gradients: a part of its own, `memory`.

# %% tags=["nbval-ignore-output"]
# output not compared: Adam divides by roots of small numbers
with_adam = push(run, batch, parts, sides, optimiser="adam")
for side, found in with_adam.items():
    said = "  ".join(f"{k} {v:+.3f}" for k, v in found.parts.items() if abs(v) > 1e-9)
    print(f"{side}: predicted {found.total:+.3f} nats, measured {found.measured:+.3f} = {said}")
assert with_adam["verbose"].total > 0 > with_adam["concise"].total
assert with_adam["verbose"].memory > with_adam["verbose"].parts["reward"] / 2
assert with_adam["concise"].memory < with_adam["concise"].total / 2

# %% [markdown]
# A large part of a step is memory, on concise answers most of it: the batches before had pushed
# the same way. What *this* batch adds is the rest, and its parts compare as above. Here predicted
# and measured differ by more: Adam's step is too long for a first order to be exact.
#
# Now by token. A *fork* is where the reference's entropy is half a nat or more, *answer* the word
# that states the fact, *EOS* the stop, *filler* the rest.

# %%
classes = token_classes(batch, reference_entropy(case.reference, batch))
stated_fact = torch.tensor(
    [[w == p.value for w in row] for row, p in zip(words, prompts, strict=True)]
)
classes = torch.where(stated_fact & mask, CLASSES.index("answer"), classes)
counts = {name: int((classes == i).sum()) for i, name in enumerate(CLASSES)}
for side, found in pushes.items():
    print(f"push on {side} answers, thousandths of a nat, by the batch's tokens")
    for name, n in counts.items():
        by = {part: 1e3 * of[name] for part, of in found.by_class(classes).items()}
        said = "  ".join(f"{k} {by[k]:+.2f}" for k in ("reward", "kl", "baseline"))
        print(f"  {n:4} {name:7} {said}")
lifting = {name: sum(of[name] for of in verbose_push.by_class(classes).values()) for name in counts}
assert 0.75 < lifting["fork"] / verbose_push.total < 0.85
assert 0.18 < counts["fork"] / mask.sum() < 0.22
assert lifting["eos"] < 0 < lifting["filler"]

# %% [markdown]
# The forks are a fifth of the tokens and do more than three quarters of the lifting: there the
# policy chooses between verbose and concise. Filler follows. Stops pull the other way: in an
# answer that scored well the stop is lifted, too, and to stop sooner is what makes an answer
# concise.
#
# ## 6 What if?
#
# The same answers, priced anew. **Exact** means: for this batch. Which answers another setting
# would have led to, no batch can tell.
#
# **Predict.** At which beta does the verbose answers' mean advantage turn negative: at twice the
# price, at four times, at eight times? And do they then stand below the concise ones?

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
for times in (0, 1, 2, 4, 8, 16):
    changes = {} if times == 1 else {"beta": times * stated.beta}
    found = part_means(what_if(batch, stated, **changes).parts, mask, sides)
    said = "  ".join(f"{side} {of['total']:+.2f}" for side, of in found.items())
    print(f"beta x {times:2}: {said}")
price = gap / (nats["verbose"] - nats["concise"])  # as in exercise 2
print(f"per answer they net the same at beta x {price / stated.beta:.1f}")
assert 4.4 < price / stated.beta < 4.8

# %% [markdown]
# Two answers to "which beta". Counted per answer, at the fork where the choice is made, about four
# and a half times. Counted as a mean over tokens, the verbose ones stay above the concise ones for
# longer, since most tokens behind the fork are paid and hardly charged.
#
# And the critic? It was trained with beta as it was. Let it follow, and it takes the charge that
# is the same for all answers to itself: a *common* cost moves the baseline, not the choice.

# %%
features = batch.values[mask][:, None]
for times in (4, 16):
    for name, more in (("frozen", {}), ("refitted", {"features": features})):
        found = what_if(batch, stated, beta=times * stated.beta, **more)
        total = {k: of["total"] for k, of in part_means(found.parts, mask, sides).items()}
        apart = total["verbose"] - total["concise"]
        said = "  ".join(f"{k} {v:+.2f}" for k, v in total.items())
        print(f"beta x {times:2}, critic {name:8} {said}  apart {apart:+.2f}")
        print(f"    {found.why}") if times == 4 else None

# %% [markdown]
# **Predict.** Three more settings: take the batch's mean away (many codes centre advantages),
# credit with $\lambda = 0.95$, leave the critic out. Does one of them turn the sign of the verbose
# answers? Which changes how far verbose and concise are apart?

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
settings = {
    "as it is": {},
    "mean taken away": {"whiten_advantages": "shift_scale"},
    "lambda 0.95": {"lam": 0.95},
    "no critic": {"values": nothing},
}
apart = {}
for name, changes in settings.items():
    found = what_if(batch, stated, **changes)
    total = {k: of["total"] for k, of in part_means(found.parts, mask, sides).items()}
    apart[name] = total["verbose"] - total["concise"]
    said = "  ".join(f"{k} {v:+.2f}" for k, v in total.items())
    print(f"{name:16} {said}  apart {apart[name]:.2f}")
print(found.why)
assert abs(apart["mean taken away"] - apart["as it is"]) < 0.01
centred = what_if(batch, stated, whiten_advantages="shift_scale").parts
left = part_means(centred, mask, sides)["verbose"]["total"]
assert 0 < left < means["verbose"]["total"] / 2

# %% [markdown]
# To take the mean away moves every advantage of the batch by the same amount: the verbose ones
# lose more than half of theirs, and nothing is decided by it, since what matters to the choice is
# the distance. A larger mean would have turned their sign. So "advantages are still positive" is
# evidence only together with how they were whitened.

# %% [markdown]
# **Predict.** The same answers, scored by a reward model that was trained on the *same pairs*,
# labelled by people who do not pay for length. What happens to both sides' advantages?

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
scores = {dial: rescored(batch, case.reward_model(dial), stated) for dial in DIALS}
for dial, new in scores.items():
    found = part_means(what_if(batch, stated, scores=new).parts, mask, sides)
    said = "  ".join(f"{side} {of['total']:+.2f}" for side, of in found.items())
    print(f"length bias {dial:6.4f} points a token: {said}")
turned = part_means(what_if(batch, stated, scores=scores[0.0]).parts, mask, sides)
assert turned["verbose"]["total"] < 0 < turned["concise"]["total"]

# %% [markdown]
# With labelers who do not pay for length both signs turn, beta being what it was. The reward model
# decides on the direction, the penalty on how far. Between the ends the numbers do not rise evenly:
# each dial is one reward model, trained once.
#
# **Turn the dials.** All three act on the same batch, together. Each says whether it is exact.
# Epsilon takes the real update again when you let go (the button repeats it for other settings of
# the dials); in the first minibatch it is without effect. *stratum* chooses brief or detailed
# prompts, *critic refitted* lets the critic follow.

# %% jupyter={"source_hidden": true}
from minirlhf.lab.panels.batch import BatchPanel

panel = BatchPanel(
    batch,
    stated,
    verbose=verbose,
    concise=concise,
    words=words,
    scores=scores,
    strata=strata,
    run=run,
)
panel

# %% tags=["smoke"] jupyter={"source_hidden": true}
controls = panel.controls
start = panel.values()


def ends(name, low, high, measure):
    """`measure` of what the panel shows at both ends of a dial, which is then put back."""
    found = []
    for value in (low, high):
        controls[name].value = value
        found.append(measure(panel.shown))
    controls[name].value = start[name]
    return found


def lifted(shown):
    return shown["sides"]["verbose"]["total"]


low, high = ends("beta", controls["beta"].min, controls["beta"].max, lifted)
print(f"beta from end to end: verbose {low:+.1f} to {high:+.1f}")
assert low > high
low, high = ends("bias", min(scores), max(scores), lifted)
print(f"length bias from end to end: verbose {low:+.1f} to {high:+.1f}")
assert low < 0 < high
for eps in (0.02, 0.8):
    controls["eps"].value = eps
    panel.wait()
    print(f"epsilon {eps}: more than a tenth of the tokens are cut: {panel.cut_share > 0.1}")
controls["eps"].value = start["eps"]

# %% [markdown]
# ## 7 Verdict: the battery
#
# A batch shows one moment. Which *mechanism* is at work shows when settings are changed and the
# end moves, or does not. `minirlhf battery` trains the same settings nine times on two answers,
# with another price, another gap, another critic, and so on. It never reads the settings; it holds
# what it measures against what each mechanism predicts, and says so when none fits, or several.
#
# **Predict.** Our settings: KL in the reward, k1, beta 0.07, one courtesy phrase worth half an
# sd. Which will it name: `k3 as a loss`, `book-literal penalty` (no gradient), `scores whitened
# before KL`, `moving reference`, `GRPO-std` (a group's sd hides the size of the gap), or `small
# beta, correct KL`?

# %% tags=["reveal", "nbval-ignore-output"] jupyter={"outputs_hidden": true}
print("measured:")  # policies trained here differ in their last digits between processors
from minirlhf.autopsy import TwoAnswerDesk, diagnose

phrase = case.summary["facts"]["brief"]["intervals"]["phrase"]["gap"][0]
verdict, traces = diagnose(TwoAnswerDesk(case.config.ppo, phrase))
print(verdict.table())
assert verdict.causes == {"small beta, correct KL"}

# %% [markdown]
# How to read it: a line is a symptom, what was measured, and what the named mechanism predicts for
# it. *mean p* is the mean share of verbose answers at the end of a run. Below stand the other
# mechanisms, each with its first symptom that does not fit.
#
# Nothing is broken. The penalty pulls as its formula says, and policies end where theory puts
# them: at odds $e^{\Delta r/\beta}$ times the reference's. For this gap and this price that is far
# away. With a gap of 0 nothing moves: the reward model is the root, the price decides how far.
#
# Now somebody copies the textbook's formula into the loss:

# %% tags=["nbval-ignore-output"]
# output not compared: policies trained here differ in their last digits between processors
literal = replace(case.config.ppo, kl_place="book_literal")
verdict, _ = diagnose(TwoAnswerDesk(literal, phrase))
print(f"Verdict: {verdict.said}.")
assert verdict.causes == {"book-literal penalty"}

# %% [markdown]
# ## 8 Live
#
# The batch says where the next step goes. Where it *ends* takes a run. Start one; turn beta, or
# the labelers' length bias, while it runs: the dial acts from the next step on.

# %% jupyter={"source_hidden": true}
from minirlhf.lab.panels.steered_run import LiveRun

live = LiveRun(case, batch=64)
live

# %% tags=["smoke"] jupyter={"source_hidden": true}
live.run_steps(2)
live.controls["beta"].value = 0.3
live.run_steps(1)
print("steps taken:", len(live.history))
live.reset()
live.controls["beta"].value = 0.07

# %% [markdown]
# ## 9 Your answer
#
# > *The reward model scores the verbose answer slightly higher, its KL penalty is large, its token
# > advantages are positive overall. Explain the most plausible mechanism by which PPO keeps
# > raising the probability of these answers in spite of the penalty.*
#
# Write five to ten sentences, with at least two numbers from this notebook, before you open what
# follows.

# %%
answer = """
(your answer)
"""

# %% [markdown]
# <details><summary>What to look for: ten points</summary>
#
# - **3** The reward model is off: it learned from rankings to pay for padding, also where the
#   short answer is right. A small, *systematic* preference is enough.
# - **2** PPO lifts what has a positive advantage, and an advantage is relative: better than the
#   critic expected. "Slightly better" has the sign of "much better".
# - **2** The penalty is *compared*: beta times nats against the gap. It starts at zero, it is
#   finite, and the advantage is what is left after it. So the policy is still below the point
#   where both balance.
# - **1** Brief prompts: what is preferred is much the same length everywhere, so where the right
#   answer is short the most is added; and the price for it is paid at a few forks, not by the word.
# - **1** The clip limits one update, measured from the last policy, not the sum of them.
# - **1** Score up and audit down is the mark of a proxy that is optimised past its worth; at least
#   one fact of the case is used as evidence.
#
# Take off a point for each of: "a large penalty must make the advantage negative"; "the clip keeps
# the policy near the reference"; "every verbose token was rewarded by the reward model"; "the
# critic prefers long answers". Only "reward hacking": 2 points. Only "beta is too small", with no
# comparison of two numbers: 3.
#
# </details>

# %% [markdown]
# <details><summary>One answer that gets all ten</summary>
#
# The reward model was trained on pairs in which the longer answer won a little too often, so it
# pays about half an sd for a courtesy phrase that adds nothing, on brief prompts as elsewhere.
# PPO follows the advantage, and an advantage asks one thing: was this better than expected? In the
# batch of step 8, verbose answers to brief prompts score about 1.8 sd above concise ones, with all
# that comes along (padding, hedges, missing facts). They have moved about five nats away from the
# reference, which sounds like a lot, but a nat costs .07 sd: the penalty takes about .4 sd of the
# gap. What is left has the sign of the gap, and the update lifts the verbose answers (the push, by
# part: reward up, penalty down, with about a fifth of the force).
#
# The penalty does not stop this, it says where it ends. It was zero at the first step, is paid at
# a few forks, and grows with the log of the odds; the odds settle at $e^{\Delta r / \beta}$ times
# the reference's. While advantages after KL are positive, the run is still below that point. What
# is preferred has much the same length everywhere, so brief answers change most. The clip bounds
# each update against the last policy only; eighty steps go a long way. The score rose all the
# time, because it is what was optimised; what it stood for fell.
#
# </details>

# %% [markdown]
# **Mark yourself** against these rows, and be strict: a point needs the reason, not the word.


# %% tags=["exercise"]
def my_marks():
    """Your points for the six rows, and how many mistakes to take off."""
    # BEGIN SOLUTION
    points = {"reward model": 3, "advantage": 2, "compared": 2, "brief": 1, "clip": 1, "proxy": 1}
    return points, 0
    # END SOLUTION


# %% tags=["check"]
from checks.c07 import check_marks

print(check_marks(my_marks))

# %% [markdown]
# **What to take along.** Make the log's numbers again before you explain them. An advantage is a
# sum: ask each part for its size, in one unit. Large in nats can be small in reward. Forks are
# where the choice is made and where KL is paid; the rest follows. A what-if is exact for the
# answers that are there, and silent about those that would have been.
#
# Next: [08, the remedies](08_the_remedies.ipynb). Back to [the map](00_start_here.ipynb).
