# %% [markdown]
# # 00 · Start here: the case in five minutes
#
# A support assistant was tuned with RLHF: reinforcement learning from human feedback. Its
# dashboard looked better every day. Then somebody read the answers. This course takes that
# training run apart.
#
# **After this notebook you can** say what the team saw and what it did not see, name the three
# odd facts of its batches, and find the notebook that explains each.
#
# **Minutes** 5–10 · **before** nothing · **runs** in seconds on a laptop's CPU, from a finished
# training run that ships with the course (`minirlhf drift` makes another one)

# %%
from textwrap import fill

from minirlhf.drift import shipped
from minirlhf.lab.panels.first_look import FirstLook
from minirlhf.lab.picture import Picture
from minirlhf.lab.plots import audits, batch_figure, drift_figure, seeds_figure
from minirlhf.lab.report import examples

run = shipped()
entries = audits(run.summary)
print(f"seed {run.summary['seed']}, {entries[-1]['step']} PPO steps, {len(entries)} audits")
print(f"{len(run.desk.vocabulary)} words; answers of up to {run.desk.max_response} tokens")

# %% [markdown]
# ## 1 What the team saw
#
# A **reward model** (RM) learned from pairwise human preferences what a good answer is. **PPO**
# (proximal policy optimisation: many small, clipped steps) then tuned the assistant, the
# *policy*, to score well. A **KL penalty** charges it for moving away from the **reference** that
# it started from. KL (Kullback-Leibler divergence) is the mean *log-ratio* of the policy's
# answers: log of their probability under the policy, minus that under the reference. Logs are
# natural ones, their unit is the *nat*: one nat more is e times as likely.
#
# The dashboard shows the RM score on fixed prompts, in *reward sd*: 0 is the mean of the
# reference's own answers, 1 their standard deviation (sd). Higher is better.

# %%
for entry in entries:
    print(f"step {entry['step']:3d}   RM score {entry['rm_score_sd']:+.1f} reward sd")

# %% [markdown]
# **Predict before you run on.** An auditor who knows the truth reads the same answers. Take the
# prompts that the reference answers *briefly* ("when will my order arrive ?").
#
# 1. Are the final answers better, as good, or worse than the reference's?
# 2. How long are they, beside the reference's?
#
# Write both down. Then run the next cell.

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
Picture(drift_figure(run.summary))

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
print("prompts    measure          reference  final")
for stratum in ("brief", "detailed"):
    for key, unit in (("gold", "points"), ("length_tokens", "tokens")):
        a, b = (entry[stratum][key] for entry in (entries[0], entries[-1]))
        print(f"{stratum:9}  {key:13}  {a:9.1f}  {b:6.1f} {unit}")
    for key in ("direct_rate", "evasion_rate"):
        a, b = (entry[stratum][key] for entry in (entries[0], entries[-1]))
        print(f"{stratum:9}  {key:13}  {a:9.0%}  {b:6.0%}")

# %% [markdown]
# The grey column is what the team watched. The rest is the **audit**: *gold* quality is known
# exactly here, because the support desk is a small world whose facts we wrote. The same policy
# gets better on the left and loses gold on the right, most of all where a brief answer was enough.

# %%
first, last = entries[0], entries[-1]
assert last["rm_score_sd"] - first["rm_score_sd"] > 1
assert last["brief"]["gold"] < first["brief"]["gold"] - 0.4
assert last["brief"]["length_tokens"] > 2 * first["brief"]["length_tokens"]
print("RM score up; gold down and length more than doubled on brief prompts")

# %% [markdown]
# ## 2 Read the answers
#
# Numbers say *that* it drifted, answers say *how*. These are the first brief prompts of the
# audit, not chosen by what they show.

# %%
for before, after in examples(run.answers, count=3):
    print(f"customer: {before.prompt.removesuffix(' <sep>')}")
    for name, row in (("before", before), ("after", after)):
        numbers = f"RM {row.rm_score_sd:+.1f} sd, gold {row.gold:+.1f} points"
        print(fill(f"{name}: {row.answer} ({numbers})", 90, subsequent_indent="    "))
    print()

# %% [markdown]
# **Now drag.** Left the reference, right the policy at the training step of the slider. Each
# sentence is marked by what it does: *answers*, *repeats*, *courtesy*, *hedges*, *wrong*,
# *other*. Tab reaches the slider, the arrow keys move it.
#
# - At which step does the first courtesy sentence appear?
# - Does the answer still come first? Does it still come at all?
# - Take a *detailed* prompt from the list. What is different there?

# %% jupyter={"source_hidden": true}
look = FirstLook(run)
look

# %% tags=["smoke"] jupyter={"source_hidden": true}
start, dial = look.values(), look.controls["step"]
for step in (dial.min, dial.max):
    dial.value = step
    assert look.shown["now"]["step"] == step
    print(f"step {step}: {look.shown['now']['length_tokens']} tokens")
assert look.shown["now"]["answer"] != look.shown["before"]["answer"]
for name, value in start.items():  # leave the panel as it was
    look.controls[name].value = value

# %% [markdown]
# ## 3 Inside PPO's batches
#
# Why did it happen, with a penalty in place that was meant to prevent it? Open three batches from
# the middle of the drift and compare two kinds of answers to brief prompts: **concise** (correct,
# without padding) and **verbose** (with at least as much padding as a brief answer
# is long).

# %%
batch = run.summary["batch"]
verbose, concise = batch["n_verbose"], batch["n_concise"]
print(f"around step {batch['step']}: {verbose} verbose answers, {concise} concise ones")
gap, beta = batch["rm_gap_sd"], run.summary["config"]["ppo"]["beta"]
charge = beta * batch["kl_verbose_nats"]
print(f"(a) one courtesy phrase is worth {gap:+.2f} reward sd to the RM")
print(f"(b) log-ratio to the reference: verbose {batch['kl_verbose_nats']:.1f} nats an answer,")
print(f"    concise {batch['kl_concise_nats']:.1f} nats")
print(
    f"    PPO charges beta = {beta} reward sd a nat: {charge:.2f} reward sd for a verbose answer,"
)
print(f"    {charge / gap:.1f} of what one phrase earns")
assert 0.5 * gap < charge < 1.5 * gap

# %% [markdown]
# So the penalty is large in nats and small in the unit that it is paid in. A verbose answer has
# become many times likelier than it was; what that costs is about what one courtesy phrase earns,
# and a verbose answer holds more than a phrase. (A log-ratio below 0, as the concise answers have
# it, is no charge but a small bonus.)
#
# **Predict.** The *advantage* of a token says how much better its answer turned out than PPO
# expected at that point, the KL penalty already subtracted. It decides the direction: tokens with
# a positive advantage are pushed up, those with a negative one down.
#
# Is the mean advantage of the verbose answers positive or negative? And of the concise ones?

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
Picture(batch_figure(batch))

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
print(f"(c) advantage: verbose {batch['advantage_verbose']:+.2f},")
print(f"    concise {batch['advantage_concise']:+.2f}")
print(f"    {batch['positive_token_share_verbose']:.0%} of the verbose tokens are pushed up")
print(
    f"    a tenth of the batch's tokens holds {batch['kl_share_top_decile']:.0%} of all |log-ratio|"
)
assert batch["advantage_verbose"] > 0 > batch["advantage_concise"]

# %% [markdown]
# ## 4 Not one lucky seed
#
# One run proves nothing. The whole pipeline was run from ten seeds, and again with *fair*
# labelers, who have no bias and check every fact: the **control**. Grey: range over the runs;
# blue: 95 % interval of the mean; diamond: the mean. The settings were chosen while looking at
# these seeds, so the table describes them; it proves nothing about others. Made by
# `minirlhf seeds`; `docs/seeds.md` has every interval, and fresh seeds at which nothing was chosen.
# (*k1* says how KL was estimated: notebook 04. The *Bayes ceiling* is the best accuracy that the
# noise of the labels allows: notebook 01.)

# %%
Picture(seeds_figure([row for row in run.seeds if row["arm"] == "drift"][:8]))

# %%
for arm in ("drift", "control"):
    print(f"{arm + ': claim':66} {'mean':>6}  held in     threshold")
    for row in (row for row in run.seeds if row["arm"] == arm):
        held = f"{row['held']}/{row['runs']} runs" if row["threshold"] else "-"
        print(f"  {row['claim']:64} {row['mean']:6.2f}  {held:10}  {row['threshold'] or 'none'}")

# %% [markdown]
# Held to the same thresholds, is the run of this notebook a typical one?

# %%
from minirlhf.sweeps.seeds import DRIFT

bounds = [row["claim"] for row in run.seeds if row["arm"] == "drift" and row["threshold"]]
claims = [claim for claim in DRIFT if claim.name in bounds]
missed = [c.name for c in claims if not c.low <= c.value(run.summary) <= c.high]
print(f"seed {run.summary['seed']} misses {len(missed)} of {len(claims)}:", *missed, sep="\n  ")

# %% [markdown]
# ## 5 The two questions of this course
#
# To the RM one phrase is worth less than the sd of the reference's answers. Verbose answers carry
# a far larger log-ratio than concise ones and are charged for it. Still they are made likelier.
#
# 1. **By what mechanism** does PPO keep raising the probability of these answers, although the
#    penalty is there?
# 2. **What one change**, to the RM's ranking or to PPO and its KL, would repair it, and how does
#    that change the sign of the advantage or the effective reward?

# %% [markdown]
# ## 6 The map
#
# | notebook | its question | minutes |
# |---|---|---|
# | [01 The desk](01_the_support_desk.ipynb) | What is good? What did labelers reward? | 20 |
# | [02 The policy](02_the_policy.ipynb) | How are words chosen, and when does it stop? | 25 |
# | [03 The reward model](03_the_reward_model.ipynb) | What does a ranking teach? | 35 |
# | [04 The KL penalty](04_the_kl_penalty.ipynb) | What does distance cost, and where? | 50 |
# | [05 PPO](05_ppo.ipynb) | Where do many small, clipped steps end? | 60 |
# | [06 The drift](06_the_drift.ipynb) | How does the whole run come about? | 45 |
# | [07 The autopsy](07_the_autopsy.ipynb) | Question 1, in one batch | 60 |
# | [08 The remedies](08_the_remedies.ipynb) | Question 2, each remedy tried | 75 |
#
# To train a run of your own: `minirlhf drift --seed 1`.
