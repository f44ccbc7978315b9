# %% [markdown]
# # 00 · Start here: the case in five minutes
#
# A support assistant was tuned with RLHF. Its dashboard looked better every day. Its customers
# got longer, politer, vaguer answers. This course takes that training run apart.
#
# **After this notebook you can** say what the team saw and what it did not see, name the three
# odd facts of its batches, and find the notebook that explains each.
#
# **Minutes** 5–10 · **before** nothing · **runs** in seconds on a laptop's CPU, from a finished
# training run that ships with the course (`minirlhf drift` makes another one)

# %%
from textwrap import fill

from minirlhf.lab.first_look import FirstLook
from minirlhf.lab.live import Picture
from minirlhf.lab.plots import audits, batch_figure, drift_figure, seeds_figure
from minirlhf.lab.report import examples
from minirlhf.shipped import shipped

run = shipped()
entries = audits(run.summary)
print(f"seed {run.summary['seed']}, {entries[-1]['step']} PPO steps, {len(entries)} audits")
print(f"{len(run.desk.vocabulary)} words; answers of up to {run.desk.max_response} tokens")

# %% [markdown]
# ## 1 What the team saw
#
# A **reward model** (RM) learned from pairwise human preferences what a good answer is. PPO then
# tuned the assistant to score well, with a penalty for moving away from the **reference** it
# started from. The dashboard shows the RM score on fixed prompts, in *reward sd*: 0 is the
# reference's own mean, 1 the standard deviation of its answers. Higher is better.

# %%
for entry in entries:
    print(f"step {entry['step']:3d}   RM score {entry['rm_score_sd']:+.1f} reward sd")

# %% [markdown]
# **Predict before you run on.** An auditor who knows the truth reads the same answers. Take the
# prompts that the reference answers *briefly* ("when will my order arrive ?").
#
# 1. Are the final answers better, as good, or worse than the reference's?
# 2. How many times as long are they?
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
# gets better on the left and worse on the right, and most of all where a brief answer was enough.

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
dial = look.controls["step"]
for step in (dial.options[0], dial.options[-1]):
    dial.value = step
    assert look.shown["now"]["step"] == step
    print(f"step {step}: {look.shown['now']['length_tokens']} tokens")
assert look.shown["now"]["answer"] != look.shown["before"]["answer"]

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
print(f"(a) one courtesy phrase is worth {batch['rm_gap_sd']:+.1f} reward sd to the RM")
print(f"(b) log-ratio to the reference: verbose {batch['kl_verbose_nats']:.1f} nats an answer,")
print(f"    concise {batch['kl_concise_nats']:.1f} nats")

# %% [markdown]
# **Predict.** The *advantage* decides the direction: tokens with a positive advantage are pushed
# up, those with a negative one down. The KL penalty has already been subtracted.
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
# One run proves nothing. The whole pipeline was run from other seeds, and again with *fair*
# labelers: the control. Grey: range over the runs; blue: 95 % interval of the mean; diamond: the
# mean. The settings were chosen while looking at these seeds, so the table describes them; it
# proves nothing about others. Made by `minirlhf seeds` (`docs/seeds.md`).

# %%
claims = [row for row in run.seeds if row["threshold"]]
Picture(seeds_figure([row for row in claims if row["arm"] == "drift"][:8]))

# %%
for arm in ("drift", "control"):
    print(arm)
    for row in (row for row in claims if row["arm"] == arm):
        numbers = f"{row['mean']:6.2f}  {row['held']}/{row['runs']} runs {row['threshold']}"
        print(f"  {row['claim']:64} {numbers}")

# %% [markdown]
# ## 5 The two questions of this course
#
# The RM prefers verbosity only slightly, its KL penalty is large, and still it is made likelier.
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
# | 03 The reward model | What does a ranking teach? | |
# | 04 The KL penalty | What does distance cost, and where is it paid? | |
# | 05 PPO | What does one update do? | |
# | 06 The drift | How does the whole run come about? | |
# | 07 The autopsy | Question 1, in one batch | |
# | 08 The remedies | Question 2, each remedy tried | |
#
# Without a link: not written yet. To train a run of your own: `minirlhf drift --seed 1`.
