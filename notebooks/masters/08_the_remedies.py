# %% [markdown]
# # 08 · The remedies: change one thing
#
# **After this notebook you can** propose one concrete change to the ranking or to PPO and its KL
# penalty, say by its effective reward which way the update will push, hold that against what
# trained runs did on brief *and* detailed prompts, name its price and the other style to which the
# pressure may move, and mark an answer to the case's second question.
#
# **Minutes** 75 · **before** notebooks 03 to 07 · **runs** in about half a minute · **seed** 0

# %%
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from IPython.display import HTML

from minirlhf.advantages import price_and_credit
from minirlhf.autopsy import Convention, follow, push, rescored, split
from minirlhf.desk import PreferenceConfig, make_pairs, raw_bias
from minirlhf.drift import Recipe, changed, kinds, shipped
from minirlhf.lab.panels.remedy import (
    distance_figure,
    forest_figure,
    push_figure,
    remedy_table_html,
)
from minirlhf.lab.picture import Picture
from minirlhf.model import response_states
from minirlhf.remedies import REMEDIES, stack
from minirlhf.remedies import pairs as pair_rules
from minirlhf.sweeps.remedy_table import agreement, levels, measured, repaired, summarise

case = shipped()
run, batch = case.run_before(8), case.rollout(8)  # the run as it was, and what it then drew
mask, beta = batch.mask, case.config.ppo.beta
rows = case.remedies  # one row an arm and seed
table = summarise(rows).set_index(["remedy", "measure"])
print(f"{rows.remedy.nunique()} arms, each on {rows.seed.nunique()} seeds")

# %% [markdown]
# ## 1 The question, and what can answer it
#
# > *Propose one concrete change, to the training of the reward model as a ranking problem or to
# > PPO and its KL penalty. Justify it by the advantage-weighted gradient, the effective reward, or
# > both.*
#
# PPO does not see the reward model's score $r$. It sees
#
# $$r_{\mathrm{eff}}(y) = r(y) - \beta L(y), \qquad
# L(y) = \sum_t \log \frac{\pi_\theta(y_t \mid \cdot)}{\pi_{ref}(y_t \mid \cdot)}$$
#
# and lifts what is above what the critic expected of it. Between a verbose and a concise answer to
# the same kind of question, what counts is the **gap**, verbose less concise:
#
# $$\Delta r_{\mathrm{eff}} = \Delta r - \beta\, \Delta L$$
#
# So a remedy has three places to act. **(i)** $\Delta r$: what the ranking teaches, or what PPO is
# told of it. **(ii)** $\beta$: what a nat costs, and to whom. **(iii)** Which samples and tokens
# carry the gradient. One that moves none of them repairs nothing. Here are the two terms in the
# shipped batch, answers to brief prompts:

# %%
asked = case.prompts()
prompts = [asked[i] for i in batch.index.tolist()]
brief = torch.tensor([prompt.stratum == "brief" for prompt in prompts])
verbose, concise = (kind & brief for kind in kinds(case.desk, batch, prompts))
sides = {"verbose": verbose, "concise": concise}
nats = torch.where(mask, batch.logprobs - batch.ref_logprobs, 0.0).sum(1)


def gap(x):
    """Mean of the verbose less mean of the concise answers."""
    return float(x[verbose].double().mean() - x[concise].double().mean())


print(f"{int(verbose.sum())} verbose and {int(concise.sum())} concise answers to brief prompts")
print(f"score {gap(batch.scores):+.1f} sd, log-ratio {gap(nats):+.1f} nats at {beta} sd a nat")
print(f"effective gap {gap(batch.scores) - beta * gap(nats):+.1f} sd")

# %% [markdown]
# What does its sign say? The answers come from a policy that has moved already. At the end of the
# climb $r - \beta L$ would be *equal* for all of them (notebook 04). Above zero: from here the
# climb goes on towards verbose. Below zero: it goes back from *here*, perhaps to a policy that is
# still far more verbose than the reference. So a gap below zero is not yet a repair.
#
# **Exercise 1** (10 minutes). Write the effective gap of a batch and the price of a nat at which
# it is zero. Log-probs are by token; mind the mask.


# %% tags=["exercise"]
def turning_price(scores, logprobs, ref_logprobs, mask, verbose, concise, beta):
    """Two numbers: the effective gap (reward sd), and the beta at which it would be 0."""
    # BEGIN SOLUTION
    nats = ((logprobs - ref_logprobs) * mask).sum(1)
    paid, scored = (x[verbose].mean() - x[concise].mean() for x in (nats, scores))
    return float(scored - beta * paid), float(scored / paid)
    # END SOLUTION


# %% tags=["check"]
from checks.c08 import check_turning_price

print(check_turning_price(turning_price))

# %% [markdown]
# ## 2 Predict
#
# Five remedies. Each is applied to the batch that a drifting run has logged: the same answers, the
# same weights, scored, priced and credited as the remedy would have it. Then one step of Adam is
# taken apart (notebook 07).
#
# | remedy | what is changed |
# |---|---|
# | `larger_beta` | beta is four times as large |
# | `capped` | a score counts up to 1 sd and no further |
# | `ensemble_min` | the worst score of three reward models, two of them on resampled pairs |
# | `balanced` | long winners are dropped until the longer answer wins half of the pairs |
# | `counterfactual` | pairs are added: a concise answer against itself with courtesy or hedges |
#
# **Predict.** Which of them turn the push on *verbose* answers negative? Write down five signs.

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
FIVE = ("larger_beta", "capped", "ensemble_min", "balanced", "counterfactual")
print("brief prompts, means over seeds; pushes in thousandths of a nat a step, 95 % interval")
print("                effective gap   A at forks    push on verbose    push on concise")
for name in ("none", *FIVE):
    worth, fork = (table.loc[(name, m), "mean"] for m in ("gap_effective", "fork_verbose"))
    said = f"{name:15} {worth:+9.1f} sd {fork:+12.1f}"
    for side in sides:
        at = 1e3 * table.loc[(name, f"push_{side}"), ["mean", "low", "high"]].astype(float)
        said += f"     {at['mean']:+4.0f} [{at['low']:+3.0f}, {at['high']:+3.0f}]"
    print(said)
turned = [name for name in FIVE if table.loc[(name, "push_verbose"), "mean"] < 0]
assert turned == ["counterfactual"]
below = (rows[rows.remedy == "counterfactual"].push_verbose < 0).sum()
print(f"counterfactual: below zero in {below} of {rows.seed.nunique()} seeds")

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
Picture(push_figure(rows, ["none", *FIVE]))

# %% [markdown]
# In the mean only the twins turn it, and they turn the gap furthest. The ensemble leaves
# everything as it is: its members learned from the same labelers. The other three weaken the push,
# at five seeds not surely to either side of zero. Two of them do so although their effective gap
# is *below* zero. There both kinds of answer are pushed up, verbose and concise, at the cost of
# the many that are neither. Which of the two says more about a trained run is a question for
# section 8. A weaker push is no repair yet, either: the run goes the same way, more slowly or less
# far.
#
# ## 3 By hand
#
# Where do such numbers come from? Two of them can be made in a few lines, on the shipped batch:
# another price of KL, and a price on tokens. A third is for comparison: a reward model trained on
# the *same pairs*, ranked by labelers who pay nothing for length.

# %%
config = case.config.ppo
with torch.no_grad():
    states = response_states(run.policy, batch.prompts, batch.responses, mask)


def remedied(scores=batch.scores, beta=beta):
    """The same answers at other scores or another price; the critic follows by a fit."""
    after = replace(config, beta=beta)
    conventions = Convention.of(config), Convention.of(after)
    new = replace(batch, scores=scores)
    change, _ = follow(batch, new, *conventions, states)
    new = replace(new, values=(new.values + change).to(batch.values.dtype))
    return replace(new, **price_and_credit(new, after, beta)), conventions[1]


HAND = {
    "none": {},
    "larger_beta": {"beta": 4 * beta},
    "length_penalty": {"scores": batch.scores - 0.08 * batch.lengths},
    "no length bias": {
        "scores": rescored(batch, case.reward_model(0.0), Convention.of(config)),
    },
}
made = {name: remedied(**changes) for name, changes in HAND.items()}
print("effective gap on brief prompts, reward sd")
for name, changes in HAND.items():
    scores, price = changes.get("scores", batch.scores), changes.get("beta", beta)
    mine = gap(scores) - price * gap(nats)
    library = gap(made[name][0].rewards.sum(1))
    assert abs(mine - library) < 1e-4
    print(f"{name:15} {gap(scores):+.1f} - {price:.2f} x {gap(nats):.1f} = {mine:+.2f}")
    seed0 = rows[(rows.remedy == name) & (rows.seed == 0)]
    for found in seed0.gap_effective:  # the table's first seed is this very batch
        assert abs(mine - found) < 1e-3

# %% [markdown]
# **Predict.** At four times the price most of the effective gap is gone. Is most of the push on
# the verbose ones gone, too? The price on tokens and the other reward model turn the gap. Do they
# turn the push?

# %% tags=["reveal", "nbval-ignore-output"] jupyter={"outputs_hidden": true}
# output not compared: Adam divides by roots of small numbers
print("measured:")
print("push, thousandths of a nat a step, without what earlier batches left in Adam's memory")
pushes = {}
for name, (new, convention) in made.items():
    found = push(run, new, split(new, convention), sides, optimiser="adam")
    pushes[name] = {s: sum(float(x.sum()) for x in f.tokens.values()) for s, f in found.items()}
    said = "   ".join(f"{side} {1e3 * x:+5.1f}" for side, x in pushes[name].items())
    print(f"{name:15} {said}")
    for side, x in pushes[name].items():
        for shipped_push in rows[(rows.remedy == name) & (rows.seed == 0)][f"push_{side}"]:
            assert abs(x - shipped_push) < 5e-4

# %%
assert 0.2 < pushes["larger_beta"]["verbose"] / pushes["none"]["verbose"] < 0.45
taxed = pushes["length_penalty"]
assert abs(taxed["verbose"] - taxed["concise"]) < 0.005 and 0 < taxed["verbose"] < 0.02
assert pushes["no length bias"]["verbose"] < 0 < pushes["no length bias"]["concise"]
print("on this batch: at four times the price verbose answers are pushed up, by about a third of")
print("what it was; with a price on tokens both kinds are, alike; without length bias the verbose")
print("ones are pushed down")
for name in ("larger_beta", "length_penalty"):
    low, high = (1e3 * table.loc[(name, "push_verbose"), k] for k in ("low", "high"))
    print(f"{name}, five batches of five seeds: interval {low:+.0f} to {high:+.0f} thousandths")

# %% [markdown]
# The gap is one contrast, of some thirty answers with some thirty. The push is what *all* tokens
# of the batch do to those answers, through weights that they share: verbose answers to detailed
# prompts, answers that are neither verbose nor concise, right answers with one courtesy. So the two
# often have one sign, and need not: a price on tokens turns the gap, and over five seeds leaves the
# push on neither side of zero. One batch of one seed says little about so small a thing.
#
# ## 4 Choose a remedy
#
# Every remedy is a function from recipe to recipe that changes one thing, and a row that says
# where it acts, by which equation, and at what price.

# %%
for place in dict.fromkeys(remedy.acts for remedy in REMEDIES.values()):
    print(place)
    for name, remedy in REMEDIES.items():
        if remedy.acts == place:
            print(f"    {name:22} {remedy.equation}")

# %% [markdown]
# And all of what they did, on the batch and at the end of a trained run. Each number is a mean
# over seeds with its 95 % interval (Student's t). Scroll to the right for the batch. Arms that
# only repair a fault we do not have (`placement`, `sequence_sum`, `dr_grpo`) are held against runs
# that have that fault (`book_literal`, `token_mean`, `grpo`).

# %%
HTML(remedy_table_html(rows))  # no script in it, every text escaped

# %% [markdown]
# **Turn to one.** The left figure is the push on the logged batch, before and after; the right one
# the end of the trained runs. Compare two.

# %% jupyter={"source_hidden": true}
from minirlhf.lab.panels.remedy import RemedyPanel

panel = RemedyPanel(rows)
panel

# %% tags=["smoke"] jupyter={"source_hidden": true}
start = panel.values()
for name, control in panel.controls.items():
    options = [getattr(o, "value", o[1] if isinstance(o, tuple) else o) for o in control.options]
    for value in (options[0], options[-1]):
        control.value = value
        assert panel.live.alt
    control.value = start[name]
print("every choice at both ends is drawn")

# %% [markdown]
# ## 5 The outcome, on both sides
#
# A fix that shortens *every* answer has failed, too: detailed questions need their steps. So the
# test has two sides. On **brief** prompts the length must come back to within 30 % of the
# reference's, with gold at most 0.05 points below it. On **detailed** prompts at least 80 % of the
# reference's steps must stay.
#
# **Predict.** Which of the five pass?

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
test = repaired(rows).set_index("remedy")
print("                 brief: length    gold   detailed: steps   repaired")
for name in ("none", *FIVE, "fair"):
    at = test.loc[name]
    figures = f"x {at.brief_length_ratio:4.2f}   {at.brief_gold_change:+6.2f}"
    print(f"{name:17}  {figures}         x {at.detailed_steps_kept:4.2f}   {at.repaired}")
each = measured(rows)
each["alone"] = (each.brief_length_ratio - 1).abs() <= 0.3
each["alone"] &= (each.brief_gold_change >= -0.05) & (each.detailed_steps_kept >= 0.8)
alone = each.groupby("remedy").alone.sum()
print("all that pass in the mean, and the seeds in which they pass by themselves:")
for name in test.index[test.repaired]:
    print(f"    {name:32} {alone[name]} of {rows.seed.nunique()}")
assert test.repaired["counterfactual"] and not test.repaired[["none", *FIVE[:4]]].any()
steps = test.detailed_steps_kept
assert steps[test.repaired].min() > 0.9 and steps[list(REMEDIES)].min() >= steps["none"]
assert alone[["covariate", "odin", "matched+larger_beta"]].min() == 5
assert alone["counterfactual"] == 4 and alone["covariate_length"] == 3
twins = each[each.remedy == "counterfactual"].set_index("seed").brief_length_ratio
assert twins.idxmax() == 0 and 1.5 < twins[0] < 1.7 and twins.drop(0).max() < 1.3

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
Picture(forest_figure(rows), dpi=72)

# %% [markdown]
# Few pass. Four times the price, the cap and balanced pairs each take much of the drift in length
# away, and still leave about twice the reference's length or more, and less gold in the mean. The
# ensemble ends where the default does. What passes acts on *the reward model's training*: twins in
# both styles, a length term in the ranking loss that is dropped for PPO, two heads of which one is
# dropped, and two stacks (section 6). In the mean, that is: the twins leave one run of five, that
# of seed 0, at more than one and a half times the length, and the term for length alone misses in
# two. ODIN, the term for both styles and `matched+larger_beta` pass in each.
#
# On the other side it is the drift that fails: in the mean the default run loses a quarter of the
# steps of detailed answers. No remedy loses more, and those that pass keep them. In toys a dearer
# KL takes deserved length. Here the reference gives the steps already, so to hold on to it is to
# keep them.
# A dearer KL costs where the reference *lacks* what is wanted. In this table it does less. (Steps
# are the test, not the whole: gold and hedging on detailed prompts stand in the table above.)
#
# ### The other bias stays
#
# Our labelers pay for two styles: length, and hedging. A repair of one leaves the other.
#
# **Predict.** `counterfactual_length` adds twins that differ in courtesies alone, `matched_length`
# balances winners by length alone, `covariate_length` takes length alone out of the ranking loss.
# Each has a sibling (without `_length`) that does the same for hedging as well. What are the
# answers like at the end, with the one and with the other: short, and direct?

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
BOTH = ("none", "counterfactual_length", "counterfactual", "balanced", "matched_length", "matched")
BOTH += ("covariate_length", "covariate", "odin", "length_penalty", "fair")
print("                        worth, reward sd         at the end      hedging, change of share")
print("                        courtesy   hedge      brief: length     brief   detailed")
for name in (n for n in BOTH if n in test.index):
    phrase, hedge, length, hedging, other = (
        table.loc[(name, m), "mean"]
        for m in ("gap_courtesy_brief_sd", "gap_hedge_brief_sd",
                  "brief_length_ratio", "brief_hedged_change", "detailed_hedged_change")
    )  # fmt: skip
    said = f"x {length:3.1f}         {hedging:+5.1f}      {other:+.1f}"
    print(f"{name:22} {phrase:+9.1f}   {hedge:+5.1f}           {said}")
many = rows[(rows.remedy == "covariate_length") & (rows.final_detailed_hedged_rate > 0.5)]
print(f"covariate_length: most detailed answers hedge in {len(many)} of 5 seeds")

# %% [markdown]
# With courteous twins alone the reward model charges for a courtesy and still pays for a hedge:
# less than before, and enough. The policy goes on hedging, far more than the reference, though not
# more than the default: the other bias *stays*, it does not grow. Whoever checks the worth of a
# courtesy on matched answers sees a repaired reward model. A price on tokens that just cancels a
# courtesy leaves a hedge worth its tokens, too. Twins in both styles leave neither.
#
# But `covariate_length` and `odin` know of length alone, and pass without more hedges on brief
# prompts. (On *detailed* ones, where the test does not look for hedges, the first lets them in.)
# A hedge has tokens, too. The price on tokens tells how many, and so what a hedge would
# be worth if a remedy charged for tokens and for nothing else:

# %%
worth = {
    name: table.xs(f"gap_{name}_brief_sd", level="measure")["mean"]
    for name in ("courtesy", "hedge")
}
lost = {name: of["none"] - of for name, of in worth.items()}
tokens = {name: of["length_penalty"] / 0.08 for name, of in lost.items()}
print("tokens:", ", ".join(f"a {name} {n:.1f}" for name, n in tokens.items()))
print("worth of a hedge, sd   if tokens alone were charged   found")
for name in ("counterfactual_length", "matched_length", "covariate_length", "odin"):
    alike = worth["hedge"]["none"] - lost["courtesy"][name] * tokens["hedge"] / tokens["courtesy"]
    print(f"{name:22} {alike:+17.1f} {worth['hedge'][name]:+20.1f}")

# %% [markdown]
# Twins that differ in courtesies teach *words*: a hedge keeps far more than its tokens would leave
# it. A term for length teaches tokens, and takes more than those; why it takes so much, we have
# not taken apart. So "a repair of length" is not one thing. What is left of the second axis has to
# be measured.
#
# ### Why balancing leaves a slope
#
# Notebook 03 balanced the pairs of an exact toy: long winners reweighted until the longer answer
# won half of all pairs, and about half of the slope survived. A more careful way is to balance *at
# every length difference by itself* (`matched_length`); another is to add twins. The toy again:
# quality and length of two answers differ by standard normals, the label's log-odds are $\Delta q
# + \tfrac12 \Delta\ell$, pairs are without number.
#
# **Predict.** The slope on length was 0.5. What does the ranking loss find among pairs matched at
# every difference: 0, or more? And with as many twins as pairs (same quality, the lengths as
# before), if twins tie? If the shorter twin wins?

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
x = torch.linspace(-6, 6, 121, dtype=torch.float64)
q, length = torch.meshgrid(x, x[60:-1] + 0.05, indexing="ij")  # of the longer answer's lead
share = torch.exp(-(q**2 + length**2) / 2)
wins = share * torch.sigmoid(q + 0.5 * length)  # pairs that the longer one wins, and loses
losses = share - wins
twins = torch.where(q.abs() < 1e-9, share.sum(0), 0.0)  # as many, all at equal quality


def slope(wins, losses):
    """Of the ranking loss of these pairs, on length; quality is fitted too (Newton's method)."""
    pair, w = torch.stack([q, length]), torch.zeros(2, dtype=torch.float64)
    for _ in range(25):
        p = torch.sigmoid(torch.tensordot(w, pair, 1))
        pull = (pair * ((1 - p) * wins - p * losses)).sum((1, 2))
        curve = torch.einsum("iab,jab,ab->ij", pair, pair, p * (1 - p) * (wins + losses))
        w = w + torch.linalg.solve(curve, pull)
    return float(w[1])


left = {
    "every pair": slope(wins, losses),
    "balanced over all": slope(wins * losses.sum() / wins.sum(), losses),
    "at every difference": slope(wins * losses.sum(0) / wins.sum(0), losses),
    "twins that tie": slope(wins + twins / 2, losses + twins / 2),
    "twins that lose": slope(wins, losses + twins),
}
for name, found in left.items():
    print(f"{name:20} slope on length {found:+.3f}")
assert left["balanced over all"] > left["at every difference"] > 0 > left["twins that lose"]

# %% [markdown]
# Matching is better than balancing and not enough. Who won decides which pairs are kept, and who
# won depends on both: a long winner *needed* less quality. Selecting on a common effect ties its
# causes together (a *collider*). The arithmetic is short: keeping a share $s$ of the long winners
# adds $\log s$ to the log-odds of "the longer one wins", and nothing else:
#
# $$\Delta q + \tfrac12 \Delta\ell + \log s, \qquad \Delta\ell > 0$$
#
# Balancing over all takes a constant away where a slope should be. At every difference by itself
# the constant becomes a curve $\log s(\Delta\ell)$, and that undoes the odds of winning *averaged
# over quality*. Averaged odds are flatter than those at equal quality, so it undoes too little.
# The wider quality spreads, the flatter they are, and the more is left. A twin holds quality fixed
# *by making it*, and leaves nothing to average over; twins that lose turn the slope, and a tie
# cannot do more than flatten it.
#
# And in our world? Matching leaves a fifth of a courtesy's worth, as in the toy, and more than two
# fifths of a hedge's, and the policy lives on that. Balancing over all does *more* than the toy
# says: a courtesy is worth about nothing afterwards. Not that it sees better. One share is dropped
# from all pairs, and long answers win for different reasons:

# %%
pairs = make_pairs(case.desk, PreferenceConfig(pairs=4000), np.random.default_rng(0)).train
for stratum in ("brief", "detailed"):
    found = raw_bias(pairs.select(pairs.stratum == stratum))["longer_wins"]
    print(f"{stratum:9} the longer answer wins {found:.0%}")
print(f"all prompts                     {raw_bias(pairs)['longer_wins']:.0%}")

# %% [markdown]
# To detailed questions the longer answer wins more often, since it often has a step more. So the
# share dropped over all is too large for brief prompts and too small for detailed ones. Two errors
# meet on brief prompts, of opposite sign. `matched` works in either stratum by itself and does not
# have that luck. Either leaves about two fifths of a hedge's worth.
#
# Is it only the second bias that matching fails on? The same labelers, but for hedges, which they
# pay nothing for now (`--preferences.hedge-bias 0`; the command is in `data/MANIFEST.json`):
#
# **Predict.** With one bias left, does matching by length bring brief answers back?

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured, one bias only:")
print("                        brief: length, and its seeds      gold    detailed: steps")
only = case.one_axis.assign(fault="none")
once = repaired(only).set_index("remedy")
for name in ("none", "larger_beta", "balanced", "matched_length", "covariate_length"):
    of = only[only.remedy == name]
    seeds = of.final_brief_length_tokens / of.reference_brief_length_tokens
    at = once.loc[name]
    said = f"x {at.brief_length_ratio:.2f}  [{seeds.min():.2f} to {seeds.max():.2f}]"
    print(f"{name:22}  {said:30}  {at.brief_gold_change:+.2f}   x {at.detailed_steps_kept:.2f}")
at = once.loc["counterfactual_length"]
print(f"and twins that lose: x {at.brief_length_ratio:.2f}, gold {at.brief_gold_change:+.2f}")
print("pass:", ", ".join(once.index[once.repaired]))
assert once.brief_length_ratio["matched_length"] > 1.3 > once.brief_length_ratio["covariate_length"]

# %% [markdown]
# Nearer, and not there: what the collider leaves is enough to drift by. The covariate and the twins
# pass. So of three repairs of the ranking that do well in toys (twins that lose, a covariate,
# matching by length) this world confirms two.
#
# **Exercise 2** (10 minutes). Write that pair rule on a toy list. A pair is (prompt, winner,
# loser).


# %% tags=["exercise"]
def add_twins(pairs, concise, pad, tie):
    """`pairs` and, for every (prompt, answer) of `concise`, its twin pad(answer), which loses.

    With `tie` neither wins: both orders are added, so that each wins half of the time.
    """
    # BEGIN SOLUTION
    added = []
    for prompt, answer in concise:
        added.append((prompt, answer, pad(answer)))
        if tie:
            added.append((prompt, pad(answer), answer))
    return pairs + added
    # END SOLUTION


# %% tags=["check"]
from checks.c08 import check_add_twins

print(check_add_twins(add_twins))

# %% [markdown]
# ## 6 The price, and two at once
#
# Distance from the reference is what every remedy spends or saves; gold is what it buys. One point
# is one arm: **gold against KL**. An arm that only stops earlier slides along the curve of the
# default run. One that repairs the score leaves the curve.
#
# **Predict.** Which arms lie *above* the default's curve on brief prompts: those that act on KL,
# or those that act on pairs?

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
Picture(distance_figure(rows), dpi=72)

# %%
first, *later = case.summary["history"]
print("the default run (seed 0) on its way: KL of all answers, and gold on brief prompts")
for entry in (e for e in later if e["step"] in (10, 20, 40, 60)):
    gained = entry["brief"]["gold"] - first["brief"]["gold"]
    print(f"    step {entry['step']}: {entry['kl_nats']:4.1f} nats, {gained:+.1f} points")
print("seed 0 of other arms, at their end")
for name in ("larger_beta", "per_stratum_beta", "early_stop", "par", "counterfactual"):
    (one,) = rows[(rows.remedy == name) & (rows.seed == 0)].to_dict("records")
    gained = one["final_brief_gold"] - one["reference_brief_gold"]
    print(f"    {name:18} {one['kl_nats']:4.1f} nats, {gained:+.1f} points")
print("at the end, means over seeds   brief: gold    brief: KL  detailed: steps   price feared")
for name in ("larger_beta", "per_stratum_beta", "early_stop", "length_penalty", "counterfactual"):
    gold, far = (table.loc[(name, m), "mean"] for m in ("brief_gold_change", "brief_kl_nats"))
    said = f"{gold:+.1f}         {far:4.1f}      x {test.detailed_steps_kept[name]:.2f}"
    print(f"    {name:20}            {said}          {REMEDIES[name].cost}")

# %% [markdown]
# Four times the price, four times where the reference is brief, and stopping early end in about
# the same place on brief prompts: as far from the reference, and as much gold lost. On seed 0,
# whose way is printed, a larger beta and the early stop lie about on the default's own curve; a
# price by stratum spends its nats on detailed prompts, and lies above it. The curve falls from the
# first steps on, so the best that a stop can do is to stay at its start. The twins leave the
# curve: they end nearer *and* better, and so do the covariates, ODIN and `fair`. In part `par` and
# a price on tokens do, too.
#
# **Two at once.** Recipes are values, so remedies stack: `stack("a+b", config)` calls one function
# after the other, and `changed` lists what differs. On a batch the gaps of two that act on
# different terms add up.

# %%
for name in ("larger_beta", "length_penalty", "larger_beta+length_penalty"):
    print(f"{name:28} changes {sorted(changed(Recipe(case.config), stack(name, case.config)))}")
both, _ = remedied(**HAND["larger_beta"], **HAND["length_penalty"])
nothing = gap(made["none"][0].rewards.sum(1))
moved = {name: gap(new.rewards.sum(1)) - nothing for name, (new, _) in made.items()}
together = gap(both.rewards.sum(1)) - nothing
print(
    f"effective gap: moved by {moved['larger_beta']:+.2f} and {moved['length_penalty']:+.2f},",
    end=" ",
)
print(f"by both {together:+.2f}")
assert abs(together - moved["larger_beta"] - moved["length_penalty"]) < 1e-4

# %% [markdown]
# **Predict.** `matched` ends at twice the reference's length, `larger_beta` at two and a half
# times. And both together?

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
print("                                  gap in the batch   push on verbose   brief: length   gold")
for pair in (n for n in test.index if "+" in n):
    for name in (*pair.split("+"), pair):
        at, worth = test.loc[name], table.loc[(name, "gap_effective"), "mean"]
        pushed = 1e3 * table.loc[(name, "push_verbose"), "mean"]
        print(f"{name:32}  {worth:+13.1f} sd {pushed:+17.0f}", end="        ")
        print(f"x {at.brief_length_ratio:.2f}   {at.brief_gold_change:+.2f}")
assert test.repaired["matched+larger_beta"]
assert not test.repaired[["matched", "larger_beta"]].any()

# %% [markdown]
# Two that fail alone pass together. Matching takes most of $\Delta r$ away and leaves a rest; at
# the old price the rest is enough to drift, at four times the price it is not. A price that was
# too small for the default's gap need not be large for a small one: what counts is $\Delta r /
# \beta$.
#
# **Would an offline number have told?** Held-out pairs are ranked by the same labelers.
#
# **Predict.** Beside the default's, is the reward model of the twins better or worse on held-out
# pairs? And by the auditor's ranking of the same pairs?

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
print("                     agrees with: labels   gold     brief: length   gold")
for name in ("none", "balanced", "matched", "counterfactual", "equal_style", "fair"):
    mean = rows[rows.remedy == name][["heldout_accuracy", "gold_accuracy"]].mean()
    at = test.loc[name]
    print(f"{name:15} {mean.iloc[0]:21.0%} {mean.iloc[1]:6.0%}", end="           ")
    print(f"x {at.brief_length_ratio:.1f}   {at.brief_gold_change:+.1f}")

# %% [markdown]
# Held-out accuracy falls with each of these repairs, since the labels it counts have the bias in
# them (in the `fair` arm the labels are others). Ranked by gold the order is turned round. But
# gold accuracy on pairs does not decide either: of those that rank the usual labels `equal_style`
# has the best, and its runs end badly. It has seen no pair that differs in style, so what it
# thinks of style is an extrapolation, and PPO finds out where it errs.
#
# **Exercise 3** (10 minutes). Add a remedy of your own: a function that changes *exactly one*
# thing of the recipe it is given. `recipe.ppo(...)` changes a setting of PPO, `recipe.rule(...)`
# puts something in at a joint: `pairs`, `fit`, `scores`, `prices`, `stop`.


# %% tags=["exercise"]
def my_remedy(recipe):
    """The recipe with one thing changed."""
    # BEGIN SOLUTION
    return recipe.rule(pairs=partial(pair_rules.counterfactual, weight=0.25))
    # END SOLUTION


# %% tags=["check"]
from checks.c08 import check_remedy

print(check_remedy(my_remedy))

# %% [markdown]
# To have it measured like the others, give it a row in `minirlhf/remedies/arms.py` and run
# `minirlhf remedies` (CONTRIBUTING.md says how).
#
# ## 7 Where the literature disagrees
#
# Three conflicts, and what this small world adds. It is one desk, one small Transformer and one
# kind of labeler; it cannot decide them. It can show which *conditions* make each side right.
#
# **A length head.** Chen et al. (2024, arXiv 2402.07319, ODIN) bring the correlation of score and
# length from 0.45 to about 0, at one point of validation accuracy less, and their policies get
# better. In the comparison of Fu et al. (2025, arXiv 2502.18770) the same method is reported to
# lose every length-controlled comparison and to end *longer* than plain PPO. (That figure we have
# at second hand.)
#
# **Ensembles.** Coste et al. (2023, arXiv 2310.02743) find that the minimum or a variance penalty
# over reward models prevents over-optimisation. Eisenstein et al. (2023, arXiv 2312.09244) find
# that it helps, and that what *all* members get wrong goes through.
#
# **KL.** Ziegler et al. (2019, arXiv 1909.08593) need it: without, the policy goes to gibberish.
# Gao et al. (2022, arXiv 2210.10760) find that it does not move the curve of gold against KL: it
# acts like stopping earlier.
#
# **Predict** for our runs: does the two-head model repair the drift? Does the worst of three
# reward models pay less for a courtesy than one alone? Is gold at four times the price higher than
# the best that the default run passed through?

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
print("                   worth of a courtesy, sd     brief: length   gold, points")
for name in (
    "none",
    "larger_beta",
    "book_literal",
    "odin",
    "covariate_length",
    "ensemble_mean",
    "ensemble_min",
    "ensemble_uwo",
    "par",
):
    if name in test.index:
        phrase = table.loc[(name, "gap_courtesy_brief_sd"), ["mean", "low", "high"]].astype(float)
        worth = f"{phrase['mean']:+.1f} [{phrase['low']:+.1f}, {phrase['high']:+.1f}]"
        at = test.loc[name]
        print(f"{name:16}   {worth:24}    x {at.brief_length_ratio:3.1f}", end="      ")
        print(f"{at.brief_gold_change:+.1f}")

# %% [markdown]
# *Ensembles*: ours side with Eisenstein. The members learned from resampled pairs of the same
# labelers, and price a courtesy alike; the minimum of three equal numbers is that number. An
# ensemble removes what its members disagree on. In Coste et al. the labels come from a gold model,
# with noise: errors are what a member made of its own sample. Here the fault is in the labels.
#
# *KL*: with Gao as far as a larger beta goes: it is a point on the default's curve (section 6).
# With Ziegler, too: where KL has no pull at all (`book_literal`) the run goes several times as far
# as the default, and loses more gold on brief and on detailed prompts than any remedy.
#
# *The length head*: with Chen. `odin` passes, as `covariate_length` does. The condition that we
# can name is above: here hedges go along with length, and detailed answers keep their steps since
# labelers see and rank them. Take one of both away, and it could end like the comparison. One desk
# cannot say which case a large model is.
#
# `par` is in between: a sigmoid is also a smaller score at the same price, so a larger beta.
#
# ## 8 Does the prediction hold?
#
# The push was read off *one* logged batch, before any run was remedied. It can be read in two
# ways.
#
# *Modestly*: if a remedy lowers the push on verbose answers, its runs end shorter on brief prompts
# than the runs it repairs. *Boldly*: the sign alone says where the run will go from that batch.
# Above zero, the policy of that moment is less verbose than the remedied objective wants it, and
# runs end with *more* verbose answers than it gave; below zero, with fewer.
#
# An outcome that lies on no side of zero over five seeds (95 % interval) has no sign to predict.
#
# **Predict.** Of the arms with a sign: for what share is each reading right?

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
readings = {"modestly": agreement(rows), "boldly": levels(rows)}
for name, found in readings.items():
    told = found[found.told]
    print(
        f"{name}: {int(told.agrees.sum())} of {len(told)} arms, {told.agrees.mean():.0%}", end=" "
    )
    print(f"(all arms: {int(found.agrees.sum())} of {len(found)}); told otherwise:")
    for arm in told[~told.agrees].itertuples():
        at = 1e3 * table.loc[(arm.remedy, "push_verbose"), ["mean", "low", "high"]].astype(float)
        pushed = f"push {at['mean']:+5.1f} [{at['low']:+5.1f}, {at['high']:+5.1f}]"
        if name == "modestly":
            end = f"changed by {1e3 * arm.push:+.0f}, length by {arm.moved:+.1f} tokens"
        else:
            end = f"share of verbose answers {arm.moved:+.2f}"
        print(f"    {arm.remedy:18} {pushed}; {end}")
told = readings["boldly"].query("told").set_index("remedy").moved
gaps = table.xs("gap_effective", level="measure")["mean"].astype(float)[told.index]
print(f"boldly, by the sign of the effective gap: {int((gaps * told > 0).sum())} of {len(told)}")
found = agreement(rows)
shorter, rank = found[found.told].moved < 0, found[["push", "moved"]].corr("spearman").iloc[0, 1]
print(f"modestly, by answering 'shorter' each time: {int(shorter.sum())} of {len(shorter)}")
worth = table.xs("gap_effective", level="measure")["mean"].astype(float)
repairs = dict(zip(rows.remedy, rows.fault, strict=True))
fall = found.remedy.map(lambda name: worth[name] - worth[repairs[name]])
print(
    f"rank correlation with the change of length, {len(found)} arms: change of push {rank:.1f},",
    end=" ",
)
print(f"of the effective gap {found.moved.corr(fall, method='spearman'):.1f}")
assert readings["modestly"].query("told").agrees.mean() >= 0.9 and rank > 0.6

# %% [markdown]
# The modest reading holds, and that says less than it seems: every remedy with a sign to predict
# ends shorter. The *order* is informative: the more the push falls, the shorter answers get. The
# plain gap orders them as well; what the push adds is *through what* (reward, KL, baseline). (This
# reading was settled on after the bold one had been seen.) Its exceptions say what a batch
# cannot know. `adaptive_beta`: up to that batch the run had been nearer than the target, so the
# controller had *lowered* beta; it raised it later. `dr_grpo`: it lays other weights on long
# answers, so its pushes have another scale than those of `grpo`; both end in nearly the same
# place.
#
# The bold reading asks more of a batch with some fifty of the answers in question. Here it does as
# well, and so does the sign of the plain effective gap. Each has its own misses: the pushes of
# `covariate` and its sibling lie around zero, on either side of it, and both end with far fewer
# verbose answers; their gap is clearly below. At that moment they push concise answers up more than
# verbose ones, at the cost of answers that are neither. A guess, not tested: once those are gone,
# the contrast between the two is all there is.
#
# The one clear exception is worth a look: `equal_style` is pushed down and ends verbose. But not
# with the verbose answers of the batch:

# %%
for name in ("none", "equal_style"):
    of = rows[rows.remedy == name]
    words = ("verbose", "hedging", "evasive")
    shares = (of[f"final_brief_{k}_rate"].mean() for k in ("verbose", "hedged", "evasion"))
    said = ", ".join(f"{x:.0%} {k}" for x, k in zip(shares, words, strict=True))
    print(f"{name:12} at the end, brief prompts: {said}")
earlier = rows[rows.remedy == "adaptive_beta"].beta_then
print(f"adaptive_beta at its batch: beta {earlier.min():.3f} to {earlier.max():.3f}, from {beta}")

# %% [markdown]
# They evade, with words that neither hedge nor answer. The reward model has never seen a pair that
# differs in style; the policy found a style that it likes. The push was asked about answers that
# the *default* had found. No batch knows of answers that nobody has given yet.
#
# ## 9 All dials at once
#
# Beta, epsilon and the labelers' length bias, over a grid of trained runs of 40 steps, five seeds
# a cell. (Labelers pay for hedges in all of them.) Over each lies the closed form of notebook 04,
# odds times $e^{\Delta r / \beta}$, with the worth of one courtesy phrase as the gap.
#
# **Predict.** Which dial moves the share of verbose answers to brief prompts most, from end to
# end: beta (ten times), epsilon (four times), or the bias? And where will the formula be off?

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
from minirlhf.lab.panels.explorer import SweepExplorer, closed_form

sweep = case.sweep.assign(form=closed_form(case.sweep))
cells = sweep.groupby(["length_bias", "beta", "clip"])[["final_brief_verbose_rate", "form"]].mean()
print("length bias   beta   verbose at epsilon 0.05, 0.2   formula")
for (bias, price), of in cells.groupby(level=[0, 1]):
    shares = "  ".join(f"{x:5.0%}" for x in of.final_brief_verbose_rate)
    print(f"{bias:11.4f}   {price:4.2f}   {shares:>25}       {of.form.iloc[0]:5.0%}")

# %% [markdown]
# The labels decide whether there is drift, beta how much of it, epsilon next to nothing. At the
# dearest price the formula says too little: it knows of one phrase, and a verbose answer of a run
# carries several and a hedge, all of which pay.
#
# The explorer never interpolates: it goes to the nearest cell that was computed, and says which.

# %% jupyter={"source_hidden": true}
explorer = SweepExplorer(case.sweep, case.trajectories, case)
explorer

# %% tags=["smoke"] jupyter={"source_hidden": true}
first = dict(explorer.cell)
for name, control in explorer.controls.items():
    ends = []
    for _, value in (control.options[0], control.options[-1]):
        control.value = value
        ends.append(explorer.shown["final_brief_verbose_rate"])
    control.value = first[name]
    print(f"{name} from end to end: verbose share {ends[0]:.1f} to {ends[1]:.1f}")
    assert name == "clip" or (ends[0] > ends[1]) == (name == "beta")
explorer.run_live()
explorer.cancel()  # after the step in flight
explorer.wait()
assert not explorer.busy

# %% [markdown]
# ## 10 Your answer
#
# First mark one of somebody else's. **Exercise 4** (5 minutes): here is an answer and the rubric.
# Give points for each criterion, and list the wrong claims that the answer makes, by their text.

# %%
from checks.rubric2 import CALIBRATION, MODEL_ANSWER, RUBRIC

from minirlhf.lab.marking import Marking, rubric_html

print(CALIBRATION[3].answer)
HTML(rubric_html(RUBRIC))


# %% tags=["exercise"]
def marks_of_d():
    """Points by criterion, and a list of the wrong claims, by their text in the rubric."""
    # BEGIN SOLUTION
    wrong = "half of the wins go to the longer answer: so being verbose does not pay"
    return {"change": 3, "sign": 1, "price": 0, "measure": 0}, [wrong]
    # END SOLUTION


# %% tags=["check"]
from checks.c08 import check_marks

print(check_marks(marks_of_d))

# %% [markdown]
# Now write your own, five to ten sentences, with at least two numbers from this notebook. Then
# mark the five answers (the difference to their author's marks is shown), mark your own by the
# same rubric, and only then open the model answer. What you write stays in this notebook's kernel:
# it is not saved and not sent anywhere.

# %% jupyter={"source_hidden": true}
marking = Marking(RUBRIC, CALIBRATION, MODEL_ANSWER)
marking

# %% tags=["smoke"] jupyter={"source_hidden": true}
trial = Marking(RUBRIC, CALIBRATION, MODEL_ANSWER)  # not yours
trial.answer.value = "word " * 40
trial.finish()
assert trial.result.value == ""  # nothing is shown before everything is done
trial.submit()
for name in trial.choice.options:
    trial.choice.value = name
    trial.compare()
for control in trial.own.points.values():
    control.value = control.options[-1][1]
print("all points:", trial.own.total)
next(iter(trial.own.caps.values())).value = True
print("with the cap of a bare coefficient:", trial.own.total)
trial.finish()
assert trial.result.value
trial.close()

# %% [markdown]
# **What to take along.** Say what a change does to the gap of the effective reward, and then,
# since tokens share weights, to the push. Look at trained runs on both sides, brief and detailed,
# and at the style that was *not* repaired. What acts on KL moves about along the curve; what acts
# on the ranking can leave it. A pair that differs in one thing only teaches that thing; a
# selection by who won ties causes together. Held-out accuracy has the labelers' bias in it. And no
# logged batch knows of the answers that a new reward will find.
#
# Back to [the map](00_start_here.ipynb).
