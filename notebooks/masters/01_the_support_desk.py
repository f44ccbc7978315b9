# %% [markdown]
# # 01 · The support desk: what is a good answer, and what did labelers reward?
#
# **After this notebook you can** compute an answer's quality by hand, tell the two strata apart
# by measurement, turn three dials of the labelers, and say how biased a set of preferences is
# *before* any model is trained on it.
#
# **Minutes** 20 · **before** notebook 00 · **runs** in seconds · **seed** 0

# %%
import numpy as np

from minirlhf.audit import answer, texts
from minirlhf.drift import shipped
from minirlhf.lab.answers import ROLES, read_answer
from minirlhf.lab.panels.labelers import LabelerDials
from minirlhf.lab.picture import Picture
from minirlhf.lab.plots import bias_figure, length_figure

run = shipped()
desk = run.desk
rng = np.random.default_rng(0)
print(f"{len(desk.vocabulary)} words, {len(desk.spec.intents)} kinds of question")

# %% [markdown]
# ## 1 A prompt is a record and a question
#
# The desk writes a line of facts from a customer's record, then a question. The assistant has to
# copy the asked fact out of the record: nothing else in the prompt tells it. `<sep>` ends the
# prompt. All words live in `data/desk.toml`: edit that file and you have another desk.

# %%
for stratum in ("brief", "detailed"):
    for prompt in desk.prompts(3, rng, stratum):
        print(f"{stratum:8}  {prompt.text}")

# %% [markdown]
# A token is a word, and a full stop is a word of its own. So every number in this course that
# counts tokens can be checked by eye.

# %%
prompt = desk.probes(1)[0]
ids = desk.vocabulary.encode(prompt.text)
print(prompt.text, f"-> {len(ids)} tokens")
print(f"asked: {prompt.slot}, true value: {prompt.value}")
assert desk.vocabulary.decode(ids) == prompt.text.removesuffix(" <sep>")

# %% [markdown]
# ## 2 Two strata: where is length deserved?
#
# *Brief* questions ask for one fact, *detailed* ones for a few steps. Here are answers as the
# reference's teachers write them: mostly to the point, now and then with a polite phrase, and now
# and then polite or guarded *instead of* an answer.

# %%
for prompt in desk.probes(4):
    print(f"{prompt.stratum:8}  {desk.demonstration(prompt, rng)}")

# %% [markdown]
# A real team has no such labels. So the audit *measures* the strata: a prompt is brief if the
# reference's own answers to it are short. The histogram shows the reference's answers to the
# audit's probes.

# %%
first = run.answers[run.answers.step == 0]
lengths = {name: list(first[first.stratum == name].length_tokens) for name in ("brief", "detailed")}
Picture(length_figure(lengths))

# %%
for name, found in lengths.items():
    print(f"{name:8}  {len(found)} prompts, mean length {np.mean(found):.0f} tokens")

# %% [markdown]
# ## 3 Gold: quality, exactly
#
# Because we wrote the world, an answer's quality is known. *Gold* is the sum of these points. No
# model ever sees it.

# %%
earns = {
    "correct": "the record's fact is stated (of a few steps: this, times the share stated)",
    "wrong": "another value of the asked kind stands anywhere; replaces `correct` and `missing`",
    "missing": "the fact is not stated (of a few steps: this, times the share left out)",
    "direct": "the first sentence already names a value, or a step",
}
costs = {
    "pad": "each token that does not state the fact or a step for the first time",
    "hedge": "some sentence takes back or leaves open",
    "unfinished": f"cut off at {desk.max_response} tokens, before the answer's end",
}
for name, meaning in earns.items():
    print(f"{name:10} {desk.spec.gold[name]:+.2f}  {meaning}")
for name, meaning in costs.items():
    print(f"{name:10} {-desk.spec.gold[name]:+.2f}  {meaning}")
assert earns.keys() | costs.keys() == desk.spec.gold.keys()

# %% [markdown]
# **Predict.** Four answers to one question. Rank them by gold, and guess: does one opening
# phrase cost as much as a hedge?

# %%
prompt = desk.probes(1)[0]
concise = desk.concise(prompt)
opener, hedge = (desk.spec.phrases[group][0] for group in ("opener", "hedge"))
other = next(v for v in desk.spec.slots[prompt.slot] if v != prompt.value)
wrong = concise.replace(prompt.value, other)
four = [concise, f"{opener} {concise}", f"{concise} {hedge}", wrong]
print(prompt.text)
print("\n".join(f"{i}: {text}" for i, text in enumerate(four)))

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
for i, text in enumerate(four):
    g = desk.grade(prompt, text)
    flags = [n for n in ("correct", "wrong", "direct", "hedged", "evasive") if getattr(g, n)]
    print(f"{i}: gold {g.gold:+.2f}  padding {g.padding_tokens:2d} tokens  {', '.join(flags)}")

# %% [markdown]
# **By hand.** The same for the answer with an opener. The fact is right; the first sentence does
# not answer, so nothing for directness; every token of the phrase is padding; no hedge. That is
# all there is to it.

# %%
gold = desk.spec.gold
by_hand = gold["correct"] + 0 * gold["direct"] - gold["pad"] * len(opener.split())
assert np.isclose(by_hand, desk.grade(prompt, four[1]).gold)
print(f"{gold['correct']} - {gold['pad']} * {len(opener.split())} tokens = {by_hand:.2f} points")

# %% [markdown]
# ## 4 The phrasebook
#
# Two habits of corporate prose are two *spurious axes*: **courtesy** (length without content) and
# **hedging** (saying less than one knows). Both are pleasant to read and easy to learn.

# %%
for group, phrases in desk.spec.phrases.items():
    print(f"{group:7} {len(phrases)} phrases, such as: {phrases[0]}")

# %% [markdown]
# The panels of this course mark every sentence by what it does for the customer. The auditor's
# grade decides: a sentence *answers* if the graded share of the fact or of the steps rises with
# it. The first of a few steps names something of the record, such as the customer's device; a
# sentence with the step's words and without that fact answers nothing, and is *other*.

# %%
for role, (*_, meaning) in ROLES.items():
    print(f"{role:9} {meaning}")
for text, role, _ in read_answer(desk, prompt, f"{opener} {concise} {concise} {hedge}"):
    print(f"{role:>20}: {text}")
steps = next(p for p in desk.probes(8) if "reset" in p.text)
garbled = desk.concise(steps).split(" . ")[0].replace(steps.value, "first") + " ."
for text, role, _ in read_answer(desk, steps, garbled):
    print(f"{role:>20}: {text}  (correct: {desk.grade(steps, text).correct})")

# %% [markdown]
# ## 5 Labelers, and their three dials
#
# A labeler sees two answers and prefers one. Each answer has a *utility*: its gold, plus
# `length_bias` points a token, plus `hedge_bias` for a hedge. A share `skim` of the labels comes
# from people who did not check the fact. The rest is noise: Bradley and Terry's model (1952).

# %%
from minirlhf.desk import PreferenceConfig, label_probability

config = PreferenceConfig(**run.summary["config"]["preferences"])


def prefers(gold, fact, length, hedged, config):
    """P(a is preferred to b), from what a has more than b."""
    bias = config.length_bias * length + config.hedge_bias * hedged
    checked = 1 / (1 + np.exp(-(gold + bias) / config.temperature))
    skimmed = 1 / (1 + np.exp(-(gold - fact + bias) / config.temperature))
    return (1 - config.skim) * checked + config.skim * skimmed


mine = prefers(0.5, 0.2, 3, 0, config)
assert np.isclose(mine, label_probability(*map(np.array, (0.5, 0.2, 3, 0)), config))
print(f"length_bias {config.length_bias}, hedge_bias {config.hedge_bias}, skim {config.skim}")

# %% [markdown]
# **Predict.** Answer 1 above is answer 0 with an opener: equally right, less direct, longer. Gold
# says answer 0. Which of the two do these labelers prefer, and how often? And the hedged answer 2
# against answer 0?

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
plain = desk.grade(prompt, four[0])
for i in (1, 2):
    g = desk.grade(prompt, four[i])
    more = (g.gold - plain.gold, g.fact - plain.fact, g.length_tokens - plain.length_tokens)
    p = prefers(*more, g.hedged - plain.hedged, config)
    print(f"answer {i} against answer 0: gold {more[0]:+.2f} points, preferred {p:.0%} of the time")

# %% [markdown]
# ## 6 Measure the bias before training
#
# Now a few thousand labelled pairs: random prompts, two different answers each, half of the answers
# from the reference. Nothing is trained yet, and already the labels can be asked: how often did
# the longer answer win? How often where both answers are *equally right and direct* (matched)?
# Each label is drawn once, so a share of few pairs is uncertain: `n_...` counts them.

# %%
from minirlhf.desk import bayes_ceiling, make_pairs, raw_bias, relabel


def sampler(prompts):
    """One answer of the reference to each prompt."""
    return texts(desk, *answer(desk, run.reference, desk.encode(prompts), seed=0))


small = PreferenceConfig(**run.summary["config"]["preferences"] | {"pairs": 3000})
data = make_pairs(desk, small, np.random.default_rng(0), sampler)
for key, value in raw_bias(data.train).items():
    print(f"{key:22} {value:.0f}" if key.startswith("n") else f"{key:22} {value:.0%}")

# %% [markdown]
# **Predict.** The *control* has the same prompts and the same answers, ranked by labelers with
# all dials at 0 who check every fact. Does the longer answer then win more or less than half of
# the labels?

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
dials = {"length_bias": 0.0, "hedge_bias": 0.0, "skim": 0.0}
fair = PreferenceConfig(**run.summary["config"]["preferences"] | {"pairs": 3000} | dials)
control = relabel(data, fair, np.random.default_rng(1))
groups = {"labelers of the course": raw_bias(data.train), "all dials 0": raw_bias(control.train)}
Picture(bias_figure(groups))

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
for name, found in groups.items():
    print(f"{name}: longer wins {found['longer_wins']:.0%}, equally right and direct")
    print(f"  {found['longer_wins_matched']:.0%}; hedging wins {found['hedged_wins']:.0%},")
    print(f"  equally right and direct {found['hedged_wins_matched']:.0%}")
assert groups["all dials 0"]["longer_wins_matched"] < 0.5
assert groups["labelers of the course"]["longer_wins_matched"] > 0.5

# %% [markdown]
# The matched shares are the ones to watch: there, content cannot explain the preference. The lean
# to length is the smaller of the two, and would be easy to overlook in a sample of labels; the
# lean to hedging would not.
#
# **Turn the dials** and look for settings that would leave the labels unbiased; hollow circles
# stay at the settings of the course. The panel shows the same pairs, and shares *expected* over the
# labelers' noise instead of labels drawn once. So its numbers differ from the ones above, most
# where the pairs are few.

# %% jupyter={"source_hidden": true}
dials = LabelerDials(data.train, config)
dials

# %% tags=["smoke"] jupyter={"source_hidden": true}
start = dials.values()
for low in (True, False):
    for control_ in dials.controls.values():
        control_.value = control_.min if low else control_.max
    share = dials.shown["longer_wins_matched"]
    print(f"all dials at their {'lowest' if low else 'highest'}, expected, equally right and")
    print(f"  direct: longer wins {share:.0%}")
    assert (share < 0.5) == low
for name, value in start.items():  # leave the panel as it was
    dials.controls[name].value = value
found, mean = raw_bias(data.train), dials.shown["hedged_wins_matched"]
drawn, n = found["hedged_wins_matched"], found["n_hedged_wins_matched"]
print(f"hedging, equally right and direct: drawn {drawn:.0%}, expected {mean:.0%}, {n:.0f} pairs")
assert abs(drawn - mean) < 3 * (mean * (1 - mean) / n) ** 0.5

# %% [markdown]
# ## 7 How good can a reward model get?
#
# Labels are noisy: even a model that knew every labeler's utility would disagree with some of
# them. This *ceiling* belongs beside every accuracy that a reward model reports.

# %%
for name, labelled in (("labelers of the course", data), ("all dials 0", control)):
    print(f"{name}: ceiling {bayes_ceiling(labelled.heldout):.0%} on held-out labels")
found = run.summary["reward_model"]
accuracy, ceiling = found["heldout_accuracy"], found["bayes_ceiling"]
print(f"the shipped reward model, on other labels: {accuracy:.0%}, their ceiling {ceiling:.0%}")

# %% [markdown]
# **What to take along.** Quality is known here, so drift can be *measured*. The labels lean
# towards length and hedging on pairs that are equally right and direct. On brief prompts nothing
# else in this world makes a long answer attractive: if the policy drifts there, these labels
# taught it.
#
# Next: [02 The policy](02_the_policy.ipynb).
