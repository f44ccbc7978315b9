# %% [markdown]
# # 06 · The drift: one run, seen twice
#
# **After this notebook you can** audit a run by strata that are *measured*, put an interval on
# every rate, say how much of a reward gain is length (and what a fair control looks like), read a
# gold-against-KL curve without seeing a law in it, say which prompts move and why, and build an
# alarm whose false-alarm rate you have measured.
#
# **Minutes** 45 · **before** notebooks 03 to 05 · **runs** in about half a minute · **seed** 0

# %%
import numpy as np

from minirlhf.audit import AuditConfig, Auditor
from minirlhf.drift import shipped
from minirlhf.lab.panels.goodhart import DriftDial, arms_figure, audit_figure, tilt_moves
from minirlhf.lab.picture import Picture
from minirlhf.lab.plots import chart_figure

run = shipped()
desk, answers = run.desk, run.answers
first, last = (answers[answers.step == step] for step in (0, run.steps[-1]))
rng = np.random.default_rng(0)
print(f"{answers.probe.nunique()} probe prompts, audited at {answers.step.nunique()} steps of PPO")

# %% [markdown]
# ## 1 Who is brief? Ask the reference
#
# The audit takes prompts apart by how the **reference** answers them: briefly, or not. A label on
# the prompt would be somebody's opinion. There are two ways to measure it. *Sampling*: the mean
# length of some of its answers. *Stopping*: along those answers, add up how sure the model was to
# have ended by a given token,
#
# $$P(\text{stopped by } n) = 1 - \prod_{t \le n}
# \big(1 - \pi_{ref}(\text{EOS} \mid x, y_{<t})\big)$$
#
# **Predict.** Four samples a prompt. On how many of 256 prompts do the two ways disagree? Which
# one do you trust there?

# %%
config = AuditConfig()
auditor = Auditor(desk, run.reference, run.reward_model(), config, seed=1)
border = int(config.brief_below)
brief = auditor.reference_length < border
stopped = auditor.stopped_by(border) >= 0.5
written = np.array([probe.stratum == "brief" for probe in auditor.probes])

# %% tags=["reveal", "nbval-ignore-output"] jupyter={"outputs_hidden": true}
print("measured:")  # answers sampled here may differ between processors: outputs not compared
for name, found in (("mean length below", brief), ("P >= 1/2 to stop by", stopped)):
    same = (found == written).mean()
    print(f"{name:19} {border} tokens: {found.sum()} brief, {same:.0%} as they were written")
print(
    f"the two disagree on {(brief != stopped).sum()} of {len(brief)} prompts; mean lengths there:"
)
print(np.sort(auditor.reference_length[brief != stopped]))
for name, found in (("length", brief), ("stopping", stopped)):
    ends = [t[found].length_tokens.mean() for t in (first, last)]
    print(f"sorted by {name:8} brief answers go from {ends[0]:.1f} to {ends[1]:.1f} tokens")
assert (brief != stopped).mean() < 0.04

# %% [markdown]
# They agree but for a handful near the border. Sorted either way, the drift reads the same. With
# four samples neither is always right: one long answer moves a mean, one odd path a product. The
# shipped audit sorts by sampled length.
#
# ## 2 What the team saw, what an auditor sees
#
# One number a prompt, one answer a prompt, 256 prompts: how sure is a rate? We draw the *prompts*
# anew, with repetition, and look how far the rate moves: a **bootstrap** interval (95 %).
#
# **Predict.** Over training: do direct answers fall in both strata? Does *correctness* fall as
# far as directness? Which stratum ends up longer?

# %%
from minirlhf.audit import nrg, over_prompts, rates, ruler, slopes
from minirlhf.audit.controls import MEANS

probes = desk.probes(answers.probe.max() + 1)
graded = desk.grade_many([probes[i] for i in answers.probe], answers.answer, answers.finished)
assert np.allclose(graded["gold"], answers.gold)
table = rates(answers.assign(courtesy_tokens=graded["courtesy_tokens"]), rng=rng)

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
Picture(audit_figure(table))

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
print("                         before               after, with 95 % intervals")
shown = {(r["measure"], r["stratum"], r["step"]): r for r in table}
for measure in (*MEANS, "courteous"):
    for stratum in ("brief", "detailed"):
        cells = [shown[measure, stratum, step] for step in (0, run.steps[-1])]
        said = [f"{r['value']:6.2f} [{r['low']:5.2f}, {r['high']:5.2f}]" for r in cells]
        print(f"{measure:14} {stratum:9} {said[0]}  {said[1]}")

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
gain = {s: over_prompts(lambda a, b: b["gold"].mean() - a["gold"].mean(),
                        *(t[t.stratum == s] for t in (first, last)), rng=rng)
        for s in ("brief", "detailed")}  # fmt: skip
ends = [shown["length_tokens", s, run.steps[-1]]["value"] for s in ("brief", "detailed")]
for stratum, (mean, low, high) in gain.items():
    print(f"gold, {stratum}: changes by {mean:+.1f} points [{low:+.1f}, {high:+.1f}]")
padding = [last[last.stratum == s].padding_tokens.mean() for s in gain]
print(f"both strata end at one length: {ends[0]:.0f} and {ends[1]:.0f} tokens,")
print(f"of which padding is {padding[0]:.0f} and {padding[1]:.0f}")
assert gain["brief"].high < -1 and gain["detailed"].high < 0 and abs(ends[0] - ends[1]) < 4
then, held, gone = [
    shown[what, "detailed", step]["value"]
    for what, step in (("direct", 10), ("correct", 20), ("correct", run.steps[-1]))
]
assert then < 0.4 and held > 0.8 and gone < 0.2

# %% [markdown]
# The last lines say most about *where*. The policy ends with one length for every question: a long
# way from eight tokens, a shorter one from twenty, and padding fills it. And mind what a look at
# the end alone would miss: on detailed prompts directness goes at once, but correct answers hold
# for some twenty steps before they go, too.
#
# ## 3 One run is one run: seeds, and the control arm
#
# The **control arm** is the same pipeline with fair labelers: no bonus for length or for hedging,
# every fact checked. Same seeds, same PPO, same beta. If PPO itself made answers long, it would
# do so here too.
#
# Seeds come in two kinds, and we keep them apart. While looking at seeds 0 to 9 the settings were
# chosen, so they show what was looked for: they are *in-sample*. The **fresh** seeds, from 100 on,
# were run once all was chosen, and nothing was chosen on them.
#
# **Predict.** In the control arm: does the RM score rise? Which way do length and gold go? Do the
# fresh seeds agree?

# %%
from minirlhf.engine.files import read_json
from minirlhf.sweeps.seeds import FRESH

everything = read_json(run.folder / "seeds.json")["runs"]
kinds = [(arm, fresh) for fresh in (False, True) for arm in ("drift", "control")]
arms = {
    f"{arm}, {'fresh seeds' if fresh else 'seeds 0 to 9'}": [
        r["history"] for r in everything if (r["arm"], r["seed"] >= FRESH) == (arm, fresh)
    ]
    for arm, fresh in kinds
}
drift, control = ([r["history"] for r in everything if r["arm"] == a] for a in ("drift", "control"))


def change(histories, stratum, key):
    """Last minus first audit of every run."""
    return np.array([h[-1][stratum][key] - h[0][stratum][key] for h in histories])


# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
print("change from first to last audit: mean (least to most of the runs)")
for arm, runs in arms.items():
    print(f"{arm}, {len(runs)} runs")
    for stratum in ("brief", "detailed"):
        changes = [change(runs, stratum, key) for key in ("length_tokens", "gold")]
        cells = [f"{x.mean():+5.1f} ({x.min():+5.1f} to {x.max():+5.1f})" for x in changes]
        print(f"    {stratum:9} tokens {cells[0]}   gold, points {cells[1]}")
    score = np.array([h[-1]["rm_score_sd"] for h in runs])
    print(f"    RM score at the end, sd {score.mean():+.1f} ({score.min():+.1f} to", end=" ")
    print(f"{score.max():+.1f})")

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
said = (
    "Drift runs: the RM score rises and gold on brief prompts falls, in every run. "
    "Control runs: the RM score rises a little and gold rises with it. Fresh seeds do the same."
)
Picture(arms_figure(arms, "brief", said))

# %%
assert (change(drift, "brief", "gold") < 0).all()
assert (change(control, "brief", "gold") > -0.1).all()
assert (change(control, "brief", "length_tokens") < 1).all()
assert all(h[-1]["rm_score_sd"] > h[0]["rm_score_sd"] for h in drift + control)
print("gold on brief prompts falls in all drift runs, and in no control run by 0.1 or more;")
print("both hold for seeds 0 to 9 and for the fresh ones")

# %% [markdown]
# PPO, KL and clip are the same in both arms. What differs is the *ranking* that the reward model
# learned. All else, we will see, is amplification.
#
# ## 4 How much of the gain is length?
#
# "Answers got longer and the score rose" is not yet a bias. A reward can rise *with* length and
# not *because* of it. Singhal et al. (2023, arXiv 2310.03716) compare answers of equal length:
# sort both models' answers into bins of a few tokens, take the gain inside each bin, and average
# over bins, each counting by its answers (of both models). A bin that one side leaves empty says
# nothing. The result is their *non-length reward gain* (`nrg` in the code); over the whole
# gain it is the share that is **not** length.
#
# **Exercise 1** (10 minutes). Write the gain at equal length.


# %% tags=["exercise"]
def within_gain(lengths, scores, new_lengths, new_scores, width):
    """Mean gain within bins of `width` tokens (arrays of answers before and after); a float."""
    # BEGIN SOLUTION
    bins, new_bins = lengths // width, new_lengths // width
    gains, weights = [], []
    for shared in np.intersect1d(bins, new_bins):
        here, new_here = bins == shared, new_bins == shared
        gains.append(new_scores[new_here].mean() - scores[here].mean())
        weights.append(here.sum() + new_here.sum())
    return np.average(gains, weights=weights)
    # END SOLUTION


# %% tags=["check"]
from checks.c06 import check_within_gain

print(check_within_gain(within_gain))

# %% [markdown]
# Singhal's own example in small: of ten reference answers eight are short (score 0.10) and two
# long (0.60), of the policy's two (0.15) and eight (0.65). **Predict**: the gain, and the share
# that is not length.

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
small = {"length_tokens": [10] * 8 + [30] * 2, "score": [0.10] * 8 + [0.60] * 2}
large = {"length_tokens": [10] * 2 + [30] * 8, "score": [0.15] * 2 + [0.65] * 8}
worked = nrg(small, large, score="score")
print(f"gain {worked.total:.2f}, at equal length {worked.within:.2f}: {worked.share:.1%}")

# %% [markdown]
# **Predict** for our run: is the early gain (step 10) length? The whole gain (last step)? And
# what happens if the bins are as wide as Singhal's, 20 tokens?

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
print("stratum    step  bins  gain, sd   share not length    answers that compare")
for stratum in ("brief", "detailed"):
    for step in (10, run.steps[-1]):
        then = answers[answers.step == step]
        pair = [t[t.stratum == stratum] for t in (first, then)]
        for width in (4, 8, 20):
            found = nrg(*pair, width=width)
            _, low, high = over_prompts(
                lambda a, b, w=width: nrg(a, b, width=w).share, *pair, rng=rng, draws=300
            )
            said = f"{found.share:+5.1f} [{low:+5.1f}, {high:+5.1f}]"
            print(f"{stratum:9}  {step:4}  {width:4}   {found.total:+5.1f}    {said}", end="")
            print(f"      {found.covered:4.0%}")

# %% [markdown]
# Three lessons. **Early, the gain is length**: at equal length there is little or less than
# nothing. **Late, on brief prompts, much is not, as far as one can see**: that is said of less
# than a third of the answers, those that share a narrow bin with the other model. They are the
# reference's longer and the policy's shorter ones, and of all the others nothing is known. On
# detailed prompts narrow bins do not even tell the sign. **The bins matter**: 20 tokens make the
# share large there, too, since they hide length *inside* a bin (8 and 18 tokens count as equal).
# On brief prompts the two models hardly share a length at the end, and no width mends that.
#
# What else could pay? By then nearly every answer hedges. That hedges pay is a guess so far. Test
# it: regress the score on length, gold *and* hedging, at a step where some answers hedge and some
# do not.

# %%
middle = answers[answers.step == 20]
for stratum in ("brief", "detailed"):
    part = middle[middle.stratum == stratum][["rm_score_sd", "length_tokens", "gold", "hedged"]]
    hedge = lambda t: slopes(t, on=("length_tokens", "gold", "hedged"))["hedged"]  # noqa: E731
    mean, low, high = over_prompts(hedge, part, rng=rng, draws=300)
    print(f"{stratum:9} sd of score per sd of hedging: {mean:+.1f} [{low:+.1f}, {high:+.1f}]")

# %% [markdown]
# At equal length and gold, a hedging answer scores higher on brief prompts; on detailed ones the
# interval holds zero, and nothing is shown. On brief prompts, then, a second style is rewarded,
# so a repair of length alone will not do.
#
# ## 5 Longer is not yet biased: two controls
#
# **Length given gold.** Regress the score on length *and* gold: of two equally good answers, does
# the longer one score higher? The slope is in sd of score per sd of length. Same reference
# answers, six reward models, trained on the *same pairs* with six length dials (points of utility
# a token; gold charges 0.03 for a token of padding).
#
# **Predict.** At dial 0: is the slope 0, below, above? At which dial does it cross 0?

# %%
from minirlhf.drift import DIALS

given_gold = {"brief": [], "detailed": []}
for dial in DIALS:
    auditor.reward_model = run.reward_model(dial)
    scored = first.assign(score=auditor.score_texts(probes, list(first.answer)))
    for stratum, found in given_gold.items():
        part = scored[scored.stratum == stratum][["score", "length_tokens", "gold", "probe"]]
        slope = lambda t: slopes(t, score="score")["length_tokens"]  # noqa: E731
        found.append(over_prompts(slope, part, rng=rng, draws=200))

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
print("sd of score per sd of length, gold held fixed")
print("dial     brief                 detailed")
for dial, *pair in zip(DIALS, *given_gold.values(), strict=True):
    cells = (f"{m:+.1f} [{low:+.1f}, {high:+.1f}]" for m, low, high in pair)
    print(f"{dial:.4f}   {'     '.join(cells)}")
assert given_gold["brief"][0].high < 0 < given_gold["brief"][-1].low
assert np.all(np.diff([i.mean for i in given_gold["brief"]]) > 0)

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
curves = {s: (DIALS, [i.mean for i in found]) for s, found in given_gold.items()}
axes = ("labelers' bonus, points a token", "slope given gold, sd per sd")
chart = {"what the reward model pays for length": (*axes, {**curves, "nothing": (DIALS, 0.0)})}
Picture(
    chart_figure(
        "The slope on length given gold rises with the labelers' dial, from below 0 to above.",
        chart,
    )
)

# %% [markdown]
# From row to row differ the dial, the label noise (drawn anew for each dial) and so one training;
# pairs and reference answers are the same. The intervals are over prompts only: how far another
# draw of the labels, or another training, would move a slope is not in them, so single rows are
# not to be compared. What speaks for the dial as the *cause* is that it was set by hand, and that
# on brief prompts six slopes rise with it, from clearly negative to clearly positive. With no bonus
# the slope is negative: labelers who skim do not see the facts, but they see padding, and dislike
# it as gold does. On brief prompts it crosses zero near the 0.03 that gold charges.
#
# **The ruler.** What would a judge have seen who measures length and nothing else? Fit a line of
# score on length to the *reference's* answers, and read it at the policy's lengths.

# %%
print("stratum    step   gain   a ruler says     gold moves   gold's ruler says")
for stratum in ("brief", "detailed"):
    for step in (10, run.steps[-1]):
        then = answers[answers.step == step]
        pair = [t[t.stratum == stratum] for t in (first, then)]
        row = f"{stratum:9}  {step:4}  "
        for score in ("rm_score_sd", "gold"):
            before, after = (t[score].mean() for t in pair)
            row += f"{after - before:+5.1f}   {ruler(*pair, score=score):+5.1f}            "
        print(row.rstrip())

# %% [markdown]
# The RM's ruler points up in both strata, gold's own points down: longer was *not* deserved, not
# even on detailed prompts, where the reference was long enough. Only because gold's slope is
# there to compare with may we say "biased". On detailed prompts the ruler promises *more* than
# the RM paid at step 10: a straight line, read beyond the lengths that it was fitted to.
#
# ## 6 Gold against distance
#
# Gao et al. (2022, arXiv 2210.10760) train against a proxy and plot the true score over
# $d = \sqrt{KL}$: it rises, peaks and falls, as Goodhart's law would have it (a measure that is
# made a target stops being a good measure). They fit $d(\alpha - \beta \log d)$ to RL and
# $d(\alpha - \beta d)$ to best-of-n: of n sampled answers, keep the one that the proxy likes best.
#
# **Predict.** Where is the peak of our runs, on brief prompts? Which of the two forms fits better?

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
for arm, runs in arms.items():
    rises = [max(e["brief"]["gold"] for e in h[1:]) > h[0]["brief"]["gold"] for h in runs]
    print(f"{arm}: some later audit is above the reference in {sum(rises)} of {len(runs)} runs")

print("the two forms, fitted to gold minus the reference's")
for arm, runs in list(arms.items())[::2]:
    audits = [(h[0], entry) for h in runs for entry in h[1:]]
    d = np.sqrt([entry["kl_nats"] for _, entry in audits])
    gold = np.array([entry["brief"]["gold"] - start["brief"]["gold"] for start, entry in audits])
    for name, form in (("d (a - b d)", d**2), ("d (a - b log d)", d * np.log(d))):
        columns = np.stack([d, -form], 1)
        (a, b), *_ = np.linalg.lstsq(columns, gold, rcond=None)
        explained = 1 - ((gold - columns @ [a, b]) ** 2).sum() / ((gold - gold.mean()) ** 2).sum()
        print(f"{arm:20} {name:16} a {a:+.2f}  b {b:+.2f}  R2 {explained:.2f}")
        assert a < 0 and abs(b) < 0.1
    far = gold[(d > 3) & (d < 3.5)]
    print(f"{arm:20} at a distance of 3 to 3.5 gold changed by", end=" ")
    print(f"{far.min():+.1f} to {far.max():+.1f} points")

# %% [markdown]
# **This world disagrees with the picture in the book.** There is no hump: gold falls from the
# first audit on (a hump within the first ten steps would escape us, the audit comes every ten).
# Our labelers' bias is against gold from the first token of padding; in Gao's world proxy and
# gold agree at first. Nor does a fit bring it back. Gao's curve has $\alpha > 0$ (up at first) and
# $\beta > 0$ (down later); here both forms come out with $\alpha < 0$ and $\beta$ near 0: a nearly
# straight fall, not rise and fall. And neither fits well: at one and the same distance runs differ
# widely, so gold is no function of distance alone.
#
# And a warning from theory. Let the proxy $r$ be normal (mean 0, sd 1) and gold $a r - b r^2$ on
# average. The exact tilt by $e^{\lambda r}$ moves $r$ to mean $\lambda$ at $KL = \lambda^2/2$, so
# gold changes by $a \lambda - b \lambda^2 = \sqrt{2}\, a\, d - 2 b\, d^2$: the optimum that RL
# seeks traces exactly the form that was *not* meant for RL.

# %%
r = np.linspace(-12, 12, 4801)
normal, (a, b) = np.exp(-(r**2) / 2), (1.0, 0.2)
normal /= normal.sum()
for strength in (0.5, 1.0, 2.0, 4.0):
    tilted = normal * np.exp(strength * r)
    tilted /= tilted.sum()
    far = np.sqrt((tilted * np.log(tilted / normal)).sum())
    gained = (tilted - normal) @ (a * r - b * r**2)
    assert np.isclose(gained, 2**0.5 * a * far - 2 * b * far**2)
print("four exact tilts of a normal score lie on d (a - b d)")

# %% [markdown]
# A curve over $\sqrt{KL}$ shows a shape. It does not prove a law.
#
# ## 7 Which prompts move?
#
# Notebook 04: a tilt multiplies the odds by $e^k$, whatever they were. So prompts with rare
# verbose answers and with common ones move little, and those in between most, at
# $p_0 = 1/(1 + e^{k/2})$.
#
# **Exercise 2** (5 minutes). Write how far a prompt moves.


# %% tags=["exercise"]
def moved_share(p0, k):
    """Share after the odds of p0 (array) were multiplied by e^k, minus p0."""
    # BEGIN SOLUTION
    odds = p0 / (1 - p0) * np.exp(k)
    return odds / (1 + odds) - p0
    # END SOLUTION


# %% tags=["check"]
from checks.c06 import check_moved_share

print(check_moved_share(moved_share))

# %% [markdown]
# To test it, $p_0$ must be measured for each prompt, from *many* answers: 40 of the reference to
# each of 128 prompts, and 8 of the policy at three steps. "Verbose" needs a definition. First the
# course's: at least 8 tokens of padding.

# %% tags=["nbval-ignore-output"]
from minirlhf.audit import answer, grade

asked = desk.probes(128)
encoded, is_brief = desk.encode(asked), np.array([p.stratum == "brief" for p in asked])


def sample(model, count, rows, seed):
    """Grades [count, prompts] of that many sampled answers to each of the prompts `rows`."""
    chosen = [asked[i] for i in rows] * count
    given = answer(desk, model, encoded[rows].repeat(count, 1), seed)
    return {k: v.reshape(count, -1) for k, v in grade(desk, chosen, *given).items()}


every = np.arange(len(asked))
reference = sample(run.reference, 40, every, seed=11)
later = {step: sample(run.policy(step), 8, every, seed=step) for step in (10, 20, 80)}
padded = reference["padding_tokens"] >= config.verbose_padding
print(f"{padded.size} answers of the reference, {padded.mean():.0%} of them verbose")

# %% [markdown]
# **Predict.** Do prompts differ in $p_0$? A trap: 20 answers a prompt scatter by chance alone.
# Sort the prompts by one half of the answers, and look at the *other* half.

# %% tags=["reveal", "nbval-ignore-output"] jupyter={"outputs_hidden": true}
print("measured:")
halves = padded[::2].mean(0), padded[1::2].mean(0)
after = (later[10]["padding_tokens"] >= config.verbose_padding).mean(0)
order = np.argsort(halves[0], kind="stable")
print("sorted by one half   that half   other half   moves by step 10")
quarters = np.split(order, (len(order) // 4, 3 * len(order) // 4))
for name, rows in zip(("lowest quarter", "middle", "highest quarter"), quarters, strict=True):
    half, other, then = (x[rows].mean() for x in (*halves, after))
    print(f"{name:16}       {half:.2f}        {other:.2f}         {then - other:+.2f}")
for name, rows in (("brief", is_brief), ("detailed", ~is_brief)):
    before = padded[:, rows].mean()
    print(f"{name:9} prompts: p0 {before:.2f}, moves by {after[rows].mean() - before:+.2f}")

# %% [markdown]
# In the other half the order is all but gone. So measured, padding has nearly *one* $p_0$ in this
# desk, in both strata, and all prompts move alike. Had we plotted the first half on both axes,
# chance would have drawn us a slope. So $p_0$ of padding does **not** explain why brief prompts
# suffer more.
#
# Length does. Call an answer long if it has more than $n$ *tokens*: then the detailed prompts,
# whose answers are long anyway, have a high $p_0$ and the brief ones a low one. The line is the
# tilt with *one* $k$ for all prompts of a step, **fitted to their mean**: how far prompts move on
# average is put in, only how the move is spread over $p_0$ is tested. A rival has one number too:
# of the answers that were not long, every prompt turns the same part $c$, and so moves by
# $c (1 - p_0)$: room, and nothing else. It is fitted to the same mean. Bars are two standard
# errors.
#
# **Predict**, for $n = 20$ at step 10: who moves more, a prompt with $p_0$ of 0.04, 0.33 or 0.96?
# And where does the fitted peak go as training goes on?

# %% tags=["reveal", "nbval-ignore-output"] jupyter={"outputs_hidden": true}
print("measured:")
lengths = {step: found["length_tokens"] for step, found in later.items()}
dial = DriftDial(reference["length_tokens"], lengths, is_brief)
for step in lengths:
    dial.controls["step"].value = step
    print(f"step {step:2d}: k {dial.shown['k']:.1f}, the fitted peak is {dial.shown['peak']:.2f}")
dial.controls["step"].value = 10
bins = sorted(dial.shown["bins"], key=lambda row: row[1])
p0, moved, error, count = (np.array([row[i] for row in bins]) for i in (1, 2, 3, 4))
tilt = tilt_moves(p0, dial.shown["k"])
room = (1 - p0) * (count @ moved) / (count @ (1 - p0))
for (is_brief_one, *_), *row in zip(bins, count, p0, moved, error, tilt, room, strict=True):
    print(f"  {'brief' if is_brief_one else 'detailed':9}{row[0]:3} prompts  p0", end=" ")
    print("{:.2f}  moved {:+.2f}, se {:.2f}  tilt {:+.2f}  room alone {:+.2f}".format(*row[1:]))


def mean_of(rows):
    """Mean move of the bins `rows`, each counting by its prompts, and its standard error."""
    part = count[rows] / count[rows].sum()
    return part @ moved[rows], np.sqrt(part**2 @ error[rows] ** 2)


rare, between, full = (mean_of(r) for r in (p0 < 0.1, (p0 > 0.1) & (p0 < 0.9), p0 > 0.9))
for name, a, b in (("full minus between", full, between), ("between minus rare", between, rare)):
    print(f"{name}: {a[0] - b[0]:+.2f}, se {np.hypot(a[1], b[1]):.2f}")
assert between[0] - full[0] > 5 * np.hypot(between[1], full[1])
assert rare[0] - full[0] > 5 * np.hypot(rare[1], full[1])
assert np.abs(moved - tilt).max() < 0.2 and abs(dial.shown["peak"] - 0.1) < 0.03
assert abs(between[0] - rare[0]) < 0.15
assert ((moved - room) > 2 * error)[(p0 > 0.1) & (p0 < 0.9)].all()

# %% tags=["reveal", "nbval-ignore-output"] jupyter={"outputs_hidden": true}
print("measured:")
curves, grid = {}, np.linspace(0.005, 0.995, 199)
for step in (10, 80):
    dial.controls["step"].value = step
    shares, moves = np.array(sorted(row[1:3] for row in dial.shown["bins"])).T
    curves[f"step {step}, measured"] = (shares, moves)
    curves[f"step {step}, tilt of one k"] = (grid, tilt_moves(grid, dial.shown["k"]))
dial.controls["step"].value = 10
chart = {"more than 20 tokens": ("share before, p0", "share after minus before", curves)}
said = "Near p0 = 1 there is no room. At step 80 the others used up all of theirs."
figure = chart_figure(said, chart)
ax = figure.axes[0]
for groups, line in zip(ax.lines[::2], ax.lines[1::2], strict=True):
    groups.set(ls="none", ms=10)  # nothing was measured between the groups
    line.set(marker="")
ax.legend(fontsize=11, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
Picture(figure)

# %% [markdown]
# One contrast is clear: prompts with $p_0$ near 1 have **no room**, all others move far. The rising
# side of the tilt is **not resolved**. Its fitted peak lies near 0.10, where this desk has no
# prompts at this limit, and the groups on its two sides, near 0.03 and near 0.33, move about
# equally far. So they do on the line, but they are two *strata* that may differ in more than
# $p_0$. Room alone does not do it: it promises the groups near 0.33 too little (again between
# strata). So the tilt of one $k$ is not refuted at this limit; that is all.
#
# **Turn the dials.** Each mark is a group of prompts.
#
# - At step 10, raise the limit from 8 to 28 tokens. Brief prompts go down the left side: do they
#   stay on the line? Where do detailed ones stand?
# - Go to the last step. Everything that can be long is long: what is left is $1 - p_0$, and that
#   line would fit *any* strong push. Which step tests the theory?
# - At 28 tokens there are groups on both sides of the peak. Who is above the line, who below?
#   Then one $k$ is not the whole truth.

# %% jupyter={"source_hidden": true}
dial

# %% tags=["smoke", "nbval-ignore-output"] jupyter={"source_hidden": true}
step, tokens = dial.controls["step"], dial.controls["tokens"]
start, seen = dial.values(), {}
for limit in (tokens.min, tokens.max):
    for at in (step.options[0], step.options[-1]):
        tokens.value, step.value = limit, at
        seen[limit, at] = {**dial.shown, "picture": dial.live.data}
        print(f"more than {limit} tokens, step {at}: k {min(dial.shown['k'], 15):.0f}")
assert len({found["picture"] for found in seen.values()}) == 4
for limit in (tokens.min, tokens.max):  # more training: a larger k, a peak at a rarer answer
    early, late = seen[limit, step.options[0]], seen[limit, step.options[-1]]
    assert early["k"] < late["k"] and early["peak"] > late["peak"]
mean_p0 = [np.mean([b[1] for b in seen[limit, 10]["bins"]]) for limit in (tokens.min, tokens.max)]
assert mean_p0[0] > mean_p0[1]  # more tokens: rarer
for name, value in start.items():
    dial.controls[name].value = value

# %% [markdown]
# So the answer to "why on brief prompts?" has two parts here. Many a detailed answer was long
# before: it has nowhere to go. And since every answer heads for one length, a brief question
# leaves most room for padding, and padding is what gold charges.
#
# A caution: $\mathrm{logit}\,p$ moves by $\Delta r / \beta$ at the *optimum*. A policy on its way
# need not be a tilt at all. One fitted number a step describes it roughly at one limit and misses
# at others: a sketch, not a law.
#
# ## 8 After deployment: an alarm
#
# An audit looks back. In service, a monitor asks the same 24 brief probes every day and charts
# mean length and evasion. How large must a deviation be for an alarm? Small shifts that last
# matter more than one odd day, so deviations are **summed**: with $z$ a day's mean in units of
# its day-to-day sd,
#
# $$S_t = \max(0,\ S_{t-1} + z_t - \text{slack}), \qquad S_0 = 0$$
#
# (CUSUM, Page 1954.) The maximum forgets good days; the slack forgives small excess.
#
# **Exercise 3** (5 minutes). Write it.


# %% tags=["exercise"]
def cusum(z, slack):
    """S of every day, [D], from the days' z [D]."""
    # BEGIN SOLUTION
    total, sums = 0.0, []
    for today in z:
        total = max(0.0, total + today - slack)
        sums.append(total)
    return np.array(sums)
    # END SOLUTION


# %% tags=["check"]
from checks.c06 import check_cusum

print(check_cusum(cusum))

# %% [markdown]
# The threshold comes from the reference: record 20 answers a probe, let days be drawn from them,
# and take what only 10 % of 20-day watches exceed. A **false-alarm rate** is then measured on
# *other* answers of the reference, never on those that set the threshold.
#
# **Predict.** 10 % were asked for. What do you get if you ignore that the record itself is a
# sample, more or fewer alarms?

# %%
from minirlhf.audit import calibrate, stream

watched = np.flatnonzero(is_brief)[:24]
names = ("length_tokens", "evasive")
more = sample(run.reference, 100, watched, seed=12)
pool = np.stack([np.r_[reference[n][:, watched], more[n]] for n in names], -1).astype(float)


def split(record=20):
    """The record, and all other answers [rest, probes, M]: shuffled by probe."""
    order = rng.permuted(np.tile(np.arange(len(pool))[:, None], len(watched)), axis=0)
    drawn = np.take_along_axis(pool, order[..., None], 0)
    return {n: drawn[:record, :, i] for i, n in enumerate(names)}, drawn[record:]


def watches(rest, days):
    """Those answers as watches [W, days, probes, M]: one answer a probe and day, none twice."""
    return rest.reshape(-1, days, *rest.shape[1:])


monitors, alarms, careless = [], [], []
for _ in range(30):
    recorded, rest = split()
    monitor = calibrate(recorded, rng=rng, rate=0.10, days=20, watches=200)
    fresh = watches(rest, 20).mean(2)
    alarms += (monitor.alarm(fresh) > 0).tolist()
    same = monitor.charts(stream(recorded, 20, rng=rng, runs=200)).max((1, 2))  # record = truth
    careless += (monitor.charts(fresh).max((1, 2)) > np.quantile(same, 0.90)).tolist()
    monitors.append((monitor, watches(rest, 30)))

# %% tags=["reveal", "nbval-ignore-output"] jupyter={"outputs_hidden": true}
print("measured:")
print(f"10 % were asked for; in {len(alarms)} fresh watches there were false alarms in")
print(
    f"{np.mean(alarms):.0%} with the record drawn anew, {np.mean(careless):.0%} if it is the truth"
)
assert 0.02 < np.mean(alarms) < 0.22 and np.mean(careless) > np.mean(alarms)

# %% [markdown]
# Now the drift. The policy of step 10 is rolled out to a part of the traffic, from day 11 of 30
# on. Each of the 30 monitors watches answers that did *not* set its threshold (all records come
# from one stock of answers, so the monitors are not independent). A watch with an alarm before
# the change says nothing about it: we drop it, and say how many. And we need the row for **no**
# traffic: what would have gone off anyway. It is measured, since the threshold was set for watches
# of 20 days from their start, not for these.
#
# **Predict.** At 0 %, 5 %, 20 % and 100 % of the traffic: in how many watches does the alarm go
# off by day 30, and when?

# %%
policy = sample(run.policy(10), 40, watched, seed=13)
policy = np.stack([policy[n] for n in names], -1).astype(float)


def rolled_out(quiet, part):
    """Days' means [W, days, M] if from day 11 on the policy answers that part of the traffic."""
    drawn = policy[rng.integers(len(policy), size=quiet.shape[:3]), np.arange(len(watched))]
    new = rng.random(quiet.shape[:3]) < part
    new[:, :10] = False
    return np.where(new[..., None], drawn, quiet).mean(2)


parts, traffic, dropped = (0.0, 0.05, 0.2, 1.0), {}, 0
first_alarm = {part: [] for part in parts}
for monitor, quiet in monitors:
    before = monitor.alarm(quiet[:, :10].mean(2)) > 0
    dropped += before.sum()
    for part in parts:
        days = rolled_out(quiet[~before], part)
        first_alarm[part] += monitor.alarm(days).tolist()
        if len(days):  # the chart keeps the last monitor that has one
            charted = monitor.charts(days[0])[:, 0], monitor.threshold
            traffic[f"{part:.0%} of the traffic"] = (range(1, 31), charted[0])

# %% tags=["reveal", "nbval-ignore-output"] jupyter={"outputs_hidden": true}
print("measured:")
rows = {part: np.array(found) for part, found in first_alarm.items()}
print(f"{dropped} of {dropped + len(rows[0.0])} watches had an alarm before the change, dropped")
for part, found in rows.items():
    rang = found > 0
    print(
        f"{part:4.0%} of the traffic: alarm in {rang.mean():.0%} of {len(found)} watches", end=", "
    )
    print(f"half of these within {np.median(found[rang]) - 10:.0f} days")
assert all(found[found > 0].min() > 10 for found in rows.values())
shares = [(found > 0).mean() for found in rows.values()]
assert shares[0] < 0.25 and 0.75 < shares[1] < shares[2] <= shares[3] and shares[2] > 0.95
assert np.median(rows[1.0][rows[1.0] > 0]) < np.median(rows[0.05][rows[0.05] > 0])

# %% [markdown]
# Only what is above the row of no traffic is *found*; the rest of the alarms were chance. So 5 %
# of the traffic is found in most watches, but not in all, and days later; a fifth or more nearly
# at once.

# %% tags=["reveal", "nbval-ignore-output"] jupyter={"outputs_hidden": true}
print("measured:")
lines = {**traffic, "threshold": (range(1, 31), charted[1])}
chart = {"length: one watch each": ("day (rollout from day 11)", "CUSUM, day sds (log)", lines)}
figure = chart_figure("One watch of each: the more traffic, the steeper the climb.", chart)
figure.axes[0].set(yscale="symlog", ylim=(0, None))
Picture(figure)

# %% [markdown]
# The alarm **diagnoses**: something that is charted has changed. It does not foretell, it names
# no cause, and it is blind to what is not on the chart: wrong facts at the same length would
# pass. Fixed probes can also be learned; keep them secret.
#
# **What to take along.** The score rose in every run, and gold fell in every run with biased
# labelers and in none with fair ones. Early on the gain is length; later a second style, hedging,
# pays too. "Biased" needs a control: gold's own slope, a fair labeler, a ruler. Prompts whose
# answers were long before had no room to move; the others all did.
#
# *Why* PPO kept going although every step was charged for: that is inside the batches.
#
# Next: [07 The autopsy](07_the_autopsy.ipynb). Back to [the map](00_start_here.ipynb).
