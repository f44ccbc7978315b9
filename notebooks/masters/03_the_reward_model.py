# %% [markdown]
# # 03 · The reward model: what does a ranking teach?
#
# **After this notebook you can** measure a bias on raw pairs before anything is trained, derive
# the ranking loss and its gradient, tell an accurate reward model from a fair one, and say what a
# model that is only slightly biased will do to a policy.
#
# **Minutes** 35 · **before** notebooks 01 and 02 · **runs** in half a minute · **seed** 0

# %%
import copy
from dataclasses import replace

import numpy as np
import torch

from minirlhf.audit import answer, texts
from minirlhf.desk import PreferenceConfig, make_pairs, raw_bias, relabel
from minirlhf.drift import DIALS, shipped
from minirlhf.lab.panels.ranking import LengthDial
from minirlhf.lab.picture import Picture
from minirlhf.lab.plots import bars_figure, bias_figure, chart_figure

run = shipped()
desk, course = run.desk, run.summary["config"]["preferences"]
config = PreferenceConfig(**course | {"pairs": 3000, "holdout": 0.4})
print(f"{config.pairs} pairs; labelers pay {config.length_bias} points for a token,")
print(f"gold charges {desk.spec.gold['pad']} points for a token of padding")

# %% [markdown]
# ## 1 Ranking from pairs
#
# Nobody can give an answer a number from 1 to 100 twice in the same way. So people are shown two
# answers and asked which one is better. Here are fresh pairs, as in notebook 01: two answers to
# one prompt, half of them in the reference's own voice, and one label each.


# %%
def sampler(prompts):
    """One answer of the reference to each prompt."""
    return texts(desk, *answer(desk, run.reference, desk.encode(prompts), seed=0))


data = make_pairs(desk, config, np.random.default_rng(0), sampler)
pairs, decode = data.train, desk.vocabulary.decode
print(f"{len(pairs)} pairs to train on, {len(data.heldout)} held out\n")
for i in range(3):
    print(decode(pairs.prompts[i].tolist()))
    for name in ("chosen", "rejected"):
        said = decode(getattr(pairs, name)[i].tolist())
        print(f"  {name:8}  gold {getattr(pairs, f'gold_{name}')[i]:+.2f}: {said}")
    print(f"  labels fall this way with probability {pairs.p_label[i]:.2f}\n")

# %% [markdown]
# ## 2 The bias, before any training
#
# **Exercise 1 · 3 minutes.** How often does the longer answer win its label? Pairs of equal
# length say nothing: leave them out.


# %% tags=["exercise"]
def longer_wins(length_chosen, length_rejected):
    """Share of pairs [N] of different lengths (tokens) whose longer answer was chosen."""
    # BEGIN SOLUTION
    differs = length_chosen != length_rejected
    return (length_chosen > length_rejected)[differs].mean()
    # END SOLUTION


# %% tags=["check"]
from checks.c03 import check_longer_wins

print(check_longer_wins(longer_wins))

# %% [markdown]
# **Predict.** How often does the longer answer win, over all pairs? And where both answers are
# *equally right and direct*, so that only style can decide?

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
found = raw_bias(pairs)
Picture(bias_figure({"labels of these pairs": found}))

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
for name, key in (("all pairs", "longer_wins"), ("equally right", "longer_wins_matched")):
    share, count = found[key], found[f"n_{key}"]
    error = 2 * (share * (1 - share) / count) ** 0.5
    print(f"{name:14} the longer wins {share:.0%} of {count:.0f} (give or take {error:.0%})")
assert found["longer_wins_matched"] - error > 0.5

# %% [markdown]
# On the matched pairs content cannot be the reason. Nothing has been trained, and the bias is
# already there to be read off, with its error bar. Any model that fits these labels will have it.
#
# ## 3 The ranking loss
#
# Bradley and Terry (1952): each answer has a worth *r*, and *a* beats *b* with probability
# σ(r_a − r_b). The likelihood of all labels is a product of such factors. Its negative
# logarithm, averaged over pairs, is the loss (Stiennon et al. 2020, section 3.4; Xiao and Zhu
# 2025, chapter 4). Unit: nats a pair.

# %%
from minirlhf.reward import bradley_terry_loss


def ranking_loss(chosen, rejected):
    """Mean over pairs of -log P(the label), from scores [B] of winners and losers."""
    p = 1 / (1 + torch.exp(-(chosen - rejected)))
    return -torch.log(p).mean()


chosen, rejected = torch.tensor([1.5, -0.4, 0.3]), torch.tensor([0.2, 0.8, 0.9])
mine, library = ranking_loss(chosen, rejected), bradley_terry_loss(chosen, rejected)
assert torch.isclose(mine, library)
assert torch.isclose(ranking_loss(chosen + 7, rejected + 7), library)
print(f"{mine:.2f} nats; adding 7 to both scores of a pair changes nothing")

# %% [markdown]
# Only *differences within a prompt* count: the offset of a score is free. That is why scores here
# are put on the scale of the reference's answers afterwards ("reward sd").
#
# **Exercise 2 · 5 minutes.** How hard does a pair pull? Differentiate the mean loss by the
# winner's score. Hint: the slope of log σ(x) is 1 − σ(x).


# %% tags=["exercise"]
def loss_gradient(chosen, rejected):
    """d(mean loss) / d(chosen), one number a pair: tensors [B] in, [B] out."""
    # BEGIN SOLUTION
    p = torch.sigmoid(chosen - rejected)
    return -(1 - p) / len(chosen)
    # END SOLUTION


# %% tags=["check"]
from checks.c03 import check_loss_gradient

print(check_loss_gradient(loss_gradient))

# %% [markdown]
# **Predict.** Two pairs: the model ranks one rightly by 3 points, the other wrongly by 3. Which
# one pulls harder, and how many times?

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
gap = torch.linspace(-5, 5, 101, requires_grad=True)
loss = bradley_terry_loss(gap, torch.zeros(())) * len(gap)  # undo the mean: one pair each
(slope,) = torch.autograd.grad(loss, gap)
each = -torch.nn.functional.logsigmoid(gap.detach())
x = gap.detach().numpy()
right, wrong = slope[80].item(), slope[20].item()  # gaps of +3 and -3
said = f"The pull on a pair falls from {-wrong:.2f} at a gap of -3 to {-right:.2f} at +3."
scale = "score of the winner minus score of the loser"
pull = "pull on the winner's score, nats a point"
curves = {"loss, nats": (x, each.numpy()), pull: (x, -slope.numpy())}
Picture(chart_figure(said, {"one pair": (scale, "nats; nats a point", curves)}))

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
print(f"ranked rightly by 3: pull {-right:.2f}; wrongly by 3: {-wrong:.2f}")
print(f"the wrong one pulls {wrong / right:.0f} times as hard")
assert np.isclose(wrong / right, np.exp(3), rtol=1e-4)
share = 0.62  # of many pairs that look alike to the model, this many labels fall one way
pulls = share * -slope + (1 - share) * slope.flip(0)  # the others pull the other way
stop = gap[pulls.abs().argmin()].item()
print(
    f"{share:.0%} against {1 - share:.0%}: the pulls cancel at a gap of {stop:.1f} nats", end=", "
)
print(f"log-odds {np.log(share / (1 - share)):.2f}")
assert abs(stop - np.log(share / (1 - share))) < 0.06

# %% [markdown]
# A pair that is ranked well teaches nothing more. Labels that contradict each other pull against
# each other, and the model comes to rest where it is as sure as they are: at their *log-odds*,
# bias included.
#
# ## 4 Training one, live
#
# The reward model is a copy of the reference whose scalar head reads the last token. One pass
# over the pairs; the best possible loss is the labelers' own noise.

# %%
from minirlhf.reward import RewardConfig, RewardModel, train_reward

brief_training = RewardConfig(epochs=1, batch=32)


def train(pairs, progress=lambda step, total, metrics: None):
    """A reward model fitted to ranked pairs, and one row of metrics a step."""
    model = RewardModel(copy.deepcopy(run.reference).requires_grad_(True))
    draw = torch.Generator().manual_seed(0)
    return model, train_reward(model, pairs, brief_training, generator=draw, progress=progress)


def report(step, total, metrics):
    """Say where the training is, four times."""
    if 4 * step % total < 4:
        print(f"step {step:2d} of {total}")


model, history = train(pairs, report)

# %%
from minirlhf.audit import judge

known = judge(model, data.heldout)  # accuracies on pairs that it never saw
p = np.clip(pairs.p_label, 1e-9, 1 - 1e-9)
noise = -(p * np.log(p) + (1 - p) * np.log(1 - p)).mean()  # the labelers' own, nats a pair
loss, accuracy = (np.array([row[f"reward/{k}"] for row in history]) for k in ("loss", "accuracy"))
smooth = np.ones(8) / 8
steps = np.arange(8, len(loss) + 1)
fit = {"training loss": (steps, np.convolve(loss, smooth, "valid"))}
right = {"training accuracy": (steps, np.convolve(accuracy, smooth, "valid"))}
fit |= {"knows nothing (log 2)": (steps, np.log(2)), "labelers' noise": (steps, noise)}
right |= {"best possible": (steps, known["bayes_ceiling"])}
right |= {"length ruler": (steps, known["length_ruler_accuracy"])}
said = f"The loss falls from {np.log(2):.2f} to {loss[-8:].mean():.2f} nats; noise is {noise:.2f}."
axis = "step (mean of 8)"
left = axis, "nats a pair (lower is better)", fit
over = axis, "share of pairs (higher is better)", right
Picture(chart_figure(said, {"loss": left, "accuracy": over}))

# %%
print(f"loss: at the start {np.log(2):.2f}, last steps {loss[-8:].mean():.2f}", end=", ")
print(f"labelers' own noise {noise:.2f} nats a pair")
print(f"held-out accuracy {known['heldout_accuracy']:.0%}, best possible", end=" ")
print(f"{known['bayes_ceiling']:.0%}, length ruler {known['length_ruler_accuracy']:.0%}")
assert loss[-8:].mean() < np.log(2) - 0.03

# %% [markdown]
# The **length ruler** ranks by length alone: no network, no training, no idea of the question.
# It is the baseline that an accuracy must be read against, and it comes close.
#
# **Exercise 3 · 4 minutes.** Labels are noisy, so no ranking agrees with all of them. Given each
# pair's probability that the label falls as it did, what accuracy can the best ranking *expect*?


# %% tags=["exercise"]
def ceiling(p_label):
    """Expected accuracy of the best ranking, from P(the label falls as it did) [N]."""
    # BEGIN SOLUTION
    return np.maximum(p_label, 1 - p_label).mean()
    # END SOLUTION


# %% tags=["check"]
from checks.c03 import check_ceiling

print(check_ceiling(ceiling))

# %% [markdown]
# ## 5 Is it as sure as it may be?
#
# From here on we take the shipped reward model: the same training on more pairs. It has seen none
# of these. Put the pairs in order of how *sure* it is of its choice, cut them into five bins, and
# ask in each how often the label agreed. Scores come in reward sd; times the model's sd they are
# nats, the unit of its loss, and σ makes them probabilities.

# %%
from minirlhf.reward import score_pairs

rm = run.reward_model()
with torch.no_grad():
    scores = [score_pairs(rm, part) for part in (data.train, data.heldout)]
gap = torch.cat([(c - r) * rm.sd for c, r in scores]).double().numpy()  # nats
sure, agrees = 1 / (1 + np.exp(-np.abs(gap))), gap > 0
bins = np.array_split(np.argsort(sure), 5)
x, y = (np.array([part[rows].mean() for rows in bins]) for part in (sure, agrees))
print(f"{len(gap)} pairs that it never saw: {agrees.mean():.0%} ranked as labelled")

# %% [markdown]
# **Predict.** A model trained on biased, noisy labels: does it claim too much, too little, or is
# it about right?

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
said = "; ".join(f"{a:.2f} sure, {b:.2f} right" for a, b in zip(x, y, strict=True))
axes = "probability that it gives to its choice", "share of labels that agree"
curves = {"reward model": (x, y), "as sure as it may be": (x, x)}
Picture(chart_figure(said, {"reliability, five bins": (*axes, curves)}))

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
for a, b, rows in zip(x, y, bins, strict=True):
    error = 2 * (b * (1 - b) / len(rows)) ** 0.5
    print(f"says {a:.0%}, is right {b:.0%} (give or take {error:.0%})")
assert np.abs(x - y).max() < 0.08

# %% [markdown]
# It is well calibrated: it knows what these labelers *say*. No overall accuracy and no reliability
# plot measured on their labels can see a bias that the labels have.
#
# **Split it.** The same pairs, apart by who won. The *best possible* ranker knows each labeler's
# odds.

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
both = (data.train, data.heldout)
lead = np.concatenate([part.length_chosen - part.length_rejected for part in both])
odds = np.concatenate([part.p_label for part in both])
rankers = {"reward model": gap, "length ruler": lead, "best possible": odds - 0.5}
groups = {"longer won": lead > 0, "longer lost": lead < 0, "all pairs": lead == lead}
split = {
    group: {name: np.mean((by[rows] > 0) + 0.5 * (by[rows] == 0)) for name, by in rankers.items()}
    for group, rows in groups.items()
}
figure = bars_figure(split, "share of labels ranked right")
figure.set_label("Accuracy where the longer answer won, lost, and over all pairs.")
Picture(figure)

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
for group, row in split.items():
    told = ", ".join(f"{name} {share:.0%}" for name, share in row.items())
    print(f"{group:11} ({groups[group].sum()} pairs): {told}")
assert split["longer won"]["reward model"] > split["longer lost"]["reward model"] + 0.3

# %% [markdown]
# Where the longer answer won, the model looks brilliant. Where it lost, it is worse than a coin,
# though less hopeless than the ruler. The best possible ranker of *these labels* shows the same
# split: the model is not bad at its task. Its task is bad.
#
# ## 6 Matched pairs: what is one phrase worth?
#
# Take a correct concise answer and add one courtesy phrase. Content stays; only style differs. The
# difference in score is what the model pays for the phrase alone.

# %%
from minirlhf.audit import AuditConfig, Auditor

auditor = Auditor(desk, run.reference, rm, AuditConfig(probes=64, reference_samples=2))
asked = {s: desk.prompts(64, np.random.default_rng(3), s) for s in ("brief", "detailed")}
plain, polite = desk.matched_pair(asked["brief"][0], np.random.default_rng(0))
print(f"{asked['brief'][0].text.removesuffix(' <sep>')}\n  {plain}\n  {polite}")


def gaps(model):
    """By stratum: P(the polite answer is preferred), and its lead in reward sd, means."""
    auditor.reward_model = model
    found = {s: auditor.matched_gaps(prompts) for s, prompts in asked.items()}
    sd = float(model.sd)
    return {s: (np.mean(1 / (1 + np.exp(-g * sd))), g.mean()) for s, g in found.items()}


# %% [markdown]
# **Predict.** Gold says that the phrase costs something everywhere. What does the shipped model
# say on brief prompts? Does the sign differ on detailed ones?

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
shipped_gaps = gaps(rm)
for stratum, (share, lead) in shipped_gaps.items():
    print(f"{stratum:8}  {lead:+.1f} reward sd: {share:.0%} sure that the phrase is better")
assert all(lead > 0.2 for _, lead in shipped_gaps.values())

# %% [markdown]
# It is not *very* sure. Keep the number in mind: section 8 shows why a little is enough.
#
# ## 7 The dial: labelers in, reward model out
#
# What would the labelers say about these same matched pairs? For any length bias that is exact.
# Six reward models were trained beforehand on the same answers with labels drawn anew.

# %%
from minirlhf.desk import label_probability

rng = {s: np.random.default_rng(0) for s in asked}
written = {s: [desk.matched_pair(p, rng[s]) for p in prompts] for s, prompts in asked.items()}
grades = {
    s: [desk.grade_many(asked[s], side) for side in zip(*written[s], strict=True)] for s in asked
}


def labelers(bias):
    """By stratum: P(the polite answer is preferred) by labelers with this length bias."""
    out = {}
    for s, (a, b) in grades.items():
        more = [b[k] - a[k] for k in ("gold", "fact", "length_tokens")]
        unhedged = np.zeros(len(a["gold"]))
        p = label_probability(*more, unhedged, replace(config, length_bias=bias))
        out[s] = p.mean()
    return out


computed = {dial: gaps(run.reward_model(dial)) for dial in DIALS}

# %% [markdown]
# **Predict.** Gold charges 0.03 points for a token of padding. From which length bias on do
# labelers prefer the polite answer? Does the reward model turn at the same place?

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
curves = {f"RM, {s}": (DIALS, [computed[d][s][0] for d in DIALS]) for s in asked}
curves |= {f"labelers, {s}": (DIALS, [labelers(d)[s] for d in DIALS]) for s in asked}
leads = {f"RM, {s}": (DIALS, [computed[d][s][1] for d in DIALS]) for s in asked}
said = "Reward models follow their labelers from rejecting the courtesy phrase to paying for it."
axis = "length bias, points per token"
curves |= {"no preference": (DIALS, 0.5)}
leads |= {"no preference": (DIALS, 0)}
one, two = (axis, "probability", curves), (axis, "reward sd", leads)
Picture(chart_figure(said, {"polite answer preferred": one, "one courtesy phrase": two}))

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured: brief prompts")
print("points per token   labelers   RM     gap, reward sd")
for dial, found in computed.items():
    share, lead = found["brief"]
    print(f"{dial:16.4f}   {labelers(dial)['brief']:8.0%}   {share:3.0%}   {lead:+14.1f}")
assert computed[0.0]["brief"][1] < 0 < computed[0.08]["brief"][1]
a, b = grades["brief"]
charge = (a["gold"] - b["gold"]) / (b["length_tokens"] - a["length_tokens"])
turns = [
    np.interp(0.5, [by(d) for d in DIALS], DIALS)
    for by in (lambda d: labelers(d)["brief"], lambda d: computed[d]["brief"][0])
]
print(f"gold charges these phrases {charge.min():.3f} to {charge.max():.3f} points a token;")
print(f"labelers turn at {turns[0]:.3f}, the reward model at {turns[1]:.3f}")
assert charge.min() < turns[0] < charge.max() and abs(turns[1] - turns[0]) < 0.01

# %% [markdown]
# The labelers turn where their bias outweighs what gold charges: the padding, and for some
# phrases a little directness too. The reward model turns where they do. It has no opinion of its
# own.

# %% [markdown]
# **Turn the dial.** The curves are the labelers, exact at every value. The rings are the nearest
# model that was trained beforehand; the sentence above the picture says which. *Train at this
# value* draws the labels anew and trains a small one in some seconds (stars, brief and detailed);
# *cancel* stops it and changes nothing.


# %% jupyter={"source_hidden": true}
def learn(bias, progress):
    """Label the pairs anew, train on them, and ask for the courtesy phrase."""
    labels = replace(config, length_bias=bias)
    model, _ = train(relabel(data, labels, np.random.default_rng(1)).train, progress)
    auditor.reward_model = model
    auditor.calibrate()
    return gaps(model)


dial = LengthDial(labelers, computed, learn, config.length_bias)
dial

# %% tags=["smoke"] jupyter={"source_hidden": true}
for low in (True, False):
    bias = dial.controls["bias"]
    bias.value = bias.min if low else bias.max
    near, share = dial.shown["nearest"], dial.shown["labelers"]["brief"]
    print(f"at {bias.value:.2f}: labelers {share:.0%}, reward model of {near:.2f}")
    assert (share < 0.5) == low == (computed[near]["brief"][1] < 0)
dial.start()  # at the highest bias, then cancelled: nothing may change
dial.stop()
assert not dial.shown["trained"]
dial.controls["bias"].value = 0.0
dial.start()
dial.job.join()
assert dial.shown["trained"][0.0]["brief"][1] < 0
print("trained here at 0.00: the phrase loses")
dial.reset()
assert not dial.shown["trained"] and bias.value == config.length_bias

# %% [markdown]
# ## 8 Why 52.5 % sure is enough
#
# A gap of 0.1 nats is next to nothing: the model is 52.5 % sure. But PPO does not average the
# model's opinion, it *optimises* it. (PPO is paid in reward sd; here one sd is taken as one nat,
# and the shipped model's is not far from that.) With a KL penalty of weight β the best policy
# multiplies the reference's odds by exp(gap / β) (Korbak et al. 2022; derived in notebook 04).
#
# **Exercise 4 · 5 minutes.** The reference gives the verbose answer with probability p0. The
# reward model likes it better by `gap`. What is its share at the optimum?


# %% tags=["exercise"]
def final_share(p0, gap, beta):
    """Share of the preferred answer at the optimum; gap and beta in the same unit."""
    # BEGIN SOLUTION
    odds = p0 / (1 - p0) * np.exp(gap / beta)
    return odds / (1 + odds)
    # END SOLUTION


# %% tags=["check"]
from checks.c03 import check_final_share

print(check_final_share(final_share))

# %% [markdown]
# **Predict.** p0 = 2 %, gap 0.1. With β = 0.02, what share of the answers is verbose in the end?
# And with β = 0.05: is that two fifths of the drift?

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
from minirlhf.oracle import two_answer

certain = np.linspace(0.45, 0.65, 101)
lead = np.log(certain / (1 - certain))  # the gap at which a reward model is that sure
curves = {
    f"β = {beta}": (100 * certain, two_answer(0.02, torch.tensor(lead), beta).numpy())
    for beta in (0.02, 0.05, 0.2)
}
said = "How sure the reward model is, against the share of verbose answers at the optimum."
axes = "how sure the RM is of the verbose answer, %", "share of verbose answers"
Picture(chart_figure(said, {"a slight preference, optimised": (*axes, curves)}))

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
print(f"a gap of 0.1 nats: the model is {100 / (1 + np.exp(-0.1)):.1f} % sure")
for beta in (0.02, 0.05, 0.2):
    print(f"beta {beta:.2f}: verbose answers go from 2 % to {two_answer(0.02, 0.1, beta):.0%}")
beta = run.summary["config"]["ppo"]["beta"]
print(
    f"the shipped run: gap / beta = {shipped_gaps['brief'][1] / beta:.0f} nats of log-odds", end=""
)
print(f" (1 reward sd is {float(rm.sd):.1f} nats)")

# %% [markdown]
# Halving gap / β does not halve the drift: shares are logistic in it. A slight preference is a
# small number to the reward model and, divided by a small β, a large one to the policy.
#
# ## 9 What it did not learn
#
# The labels hold another message. Nearly half of them come from labelers who did check the fact,
# so a right answer beats the same answer with a wrong value.
#
# **Predict.** How much more does the reward model give to the right value?

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
prompts, rng = desk.prompts(400, np.random.default_rng(5), "brief"), np.random.default_rng(6)
right = [desk.concise(p) for p in prompts]
others = [[v for v in desk.spec.slots[p.slot] if v != p.value] for p in prompts]
triples = zip(prompts, right, others, strict=True)
wrong = [text.replace(p.value, str(rng.choice(rest))) for p, text, rest in triples]
good, bad = desk.grade_many(prompts, right), desk.grade_many(prompts, wrong)
more = [good[k] - bad[k] for k in ("gold", "fact")]
none = np.zeros(len(prompts))
say = label_probability(*more, none, none, config).mean()
auditor.reward_model = rm
lead = auditor.score_texts(prompts, right) - auditor.score_texts(prompts, wrong)
doubt = 2 * lead.std() / len(lead) ** 0.5

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
print(f"labels by people who check the fact: {1 - config.skim:.0%}")
print(f"labelers prefer the right value in {say:.0%} of such pairs")
print(f"the reward model gives it {lead.mean():+.2f} reward sd (give or take {doubt:.2f})")
print(f"one courtesy phrase: {shipped_gaps['brief'][1]:+.1f}")
for name in DIALS:
    auditor.reward_model = run.reward_model(name)
    other = auditor.score_texts(prompts, right) - auditor.score_texts(prompts, wrong)
    print(f"  dial {name:.4f}: {abs(other.mean()):.1f} reward sd")
    assert abs(other.mean()) < 0.15

# %% [markdown]
# Nothing, at no dial. The network *can* read the record: the same trunk copies the fact in
# notebook 02. Checking a value means comparing two places of the text, which may be harder to
# learn than counting; whether more pairs or fewer skimming labelers would do it is not settled
# here. We report it as we found it: a reward model may be calibrated, a little above the length
# ruler, and blind to the one thing that matters most.
#
# ## 10 Would balancing the labels do?
#
# A popular repair: drop or reweight pairs until the longer answer wins exactly half of them. Try
# it on an exact toy. Two answers differ in quality q and in length l, both standard normal and
# independent; the log-odds of the label are 1.0 q + 0.5 l.
#
# **Predict.** After balancing, what slope on length does the ranking loss find: 0.5, less, or 0?

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
grid = np.linspace(-5, 5, 120)  # an even number: no pair of equal length
q, length = (axis.ravel() for axis in np.meshgrid(grid, grid))
density = np.exp(-(q**2 + length**2) / 2) / (1 + np.exp(-(q + 0.5 * length)))  # it won
balanced = density / np.where(length > 0, density[length > 0].sum(), density[length < 0].sum())


def slopes(weight):
    """Slopes on (q, length) that minimise the weighted ranking loss, by Newton's method."""
    x, b = np.stack([q, length], 1), np.zeros(2)
    for _ in range(20):
        p = 1 / (1 + np.exp(-x @ b))
        pull, curve = weight * (1 - p), weight * p * (1 - p)
        b += np.linalg.solve((x * curve[:, None]).T @ x, x.T @ pull)
    return b


for name, weight in (("as labelled", density), ("balanced", balanced)):
    print(f"{name:12} slope on quality {slopes(weight)[0]:.2f}, on length {slopes(weight)[1]:.2f}")
won = [np.average(q[rows], weights=density[rows]) for rows in (length > 0, length < 0)]
print(f"the winner's lead in quality: {won[0]:.2f} if it is longer, {won[1]:.2f} if shorter")
assert 0.1 < slopes(balanced)[1] < 0.4

# %% [markdown]
# About half of the slope survives. Among balanced pairs the long winners won with *less* quality,
# so something must still speak for them, and that is length. (The exact share depends on how far
# lengths and qualities spread.) Half of the labels is not half of the reason. A repair has to
# look at pairs whose content is *matched*, as section 6 does; notebook 08 will.
#
# **What to take along.** A ranking loss fits the labelers' log-odds, bias included. The bias is
# there to be measured before training, on pairs matched in content. Accuracy, its ceiling and a
# reliability plot do not see it. A slight gap is enough, for the policy will be optimised
# against it.
#
# Next: [04 The KL penalty](04_the_kl_penalty.ipynb). Back to [the map](00_start_here.ipynb).
