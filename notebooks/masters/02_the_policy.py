# %% [markdown]
# # 02 · The policy: how a small Transformer chooses words, and when it stops
#
# **After this notebook you can** write a Transformer's forward pass in a dozen lines, find the
# attention head that copies the fact, sample at any temperature, and say what it costs a policy
# to go on talking where the reference would have stopped.
#
# **Minutes** 25 · **before** notebook 01 · **runs** in seconds · **seed** 0

# %%
import numpy as np
import torch
import torch.nn.functional as F

from minirlhf.drift import shipped
from minirlhf.lab.panels.next_word import NextWord
from minirlhf.lab.picture import Picture
from minirlhf.lab.plots import attention_figure, bars_figure, token_figure

run = shipped()
desk, reference = run.desk, run.reference
vocabulary, config = desk.vocabulary, reference.config
count = sum(p.numel() for p in reference.parameters())
print(f"{config.n_layer} blocks of {config.n_head} heads, width {config.d_model}:")
print(f"about {count / 1e3:.0f} thousand numbers")

# %% [markdown]
# ## 1 Text in, probabilities out
#
# A prompt and the answer so far are one row of word ids. The model returns, at every position, a
# *logit* for each word of the vocabulary: the next word's probability is their softmax. It also
# returns one scalar a position: the critic of PPO, or a reward model's score.

# %%
prompt = desk.probes(1)[0]
said = desk.concise(prompt)
ids = torch.tensor(vocabulary.encode(f"{prompt.text} {said}"))
with torch.no_grad():
    logits, values = reference(ids[None])
print(f"{prompt.text} {said}")
print(f"logits {tuple(logits.shape)}, scalars {tuple(values.shape)}")

# %% [markdown]
# ## 2 The Transformer, written out
#
# One row, no padding, nothing hidden. Each block adds two things to every word's state `x`: what
# it *read* from earlier words (attention), and what it made of it (a small network). S words, H
# heads: `weights` [H, S, S] says how much of each earlier word a word reads.


# %%
def forward(model, ids):
    """Logits [S, V] of one row of ids [S], and the attention of every block [L, H, S, S]."""
    size, heads, maps = len(ids), model.config.n_head, []
    future = torch.ones(size, size, dtype=torch.bool).triu(1)
    x = model.tokens.weight[ids] + model.positions.weight[:size]
    for block in model.blocks:
        q, k, v = block.qkv(block.attention_norm(x)).view(size, 3, heads, -1).permute(1, 2, 0, 3)
        scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)  # nobody reads ahead
        x = x + block.out((weights @ v).transpose(0, 1).flatten(1))
        x = x + block.down(F.relu(block.up(block.mlp_norm(x))))
        maps.append(weights)
    return model.final_norm(x) @ model.tokens.weight.T, torch.stack(maps)


# %%
with torch.no_grad():
    mine, maps = forward(reference, ids)
assert torch.allclose(mine, logits[0], atol=1e-4)
assert torch.allclose(maps.sum(-1), torch.ones_like(maps.sum(-1)))
print("a dozen lines, and the same logits as the library")

# %% [markdown]
# ## 3 Who reads the fact?
#
# **Predict.** The model is about to say the fact. Which word of the prompt must it read at that
# moment? Name it before you run the next cell: it shows the two heads that read it most.

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
words = f"{prompt.text} {said}".split()
fact = words.index(prompt.value)  # on the record line
at = len(words) - 1 - words[::-1].index(prompt.value)  # in the answer
seen = maps[:, :, at - 1, fact]  # how much each head reads of it, one word before saying it
best = seen.flatten().argsort(descending=True)[:2].tolist()
names = [f"block {i // config.n_head + 1}, head {i % config.n_head + 1}" for i in best]
heads = maps.flatten(0, 1)[best][:, :at, :at]
Picture(attention_figure(heads.numpy(), words[:at], names))

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
for name, i in zip(names, best, strict=True):
    print(f"{name}: {words[at - 1]!r} reads {seen.flatten()[i]:.1f} of {words[fact]!r}")
print(f"the likeliest next word is {vocabulary.words[int(logits[0, at - 1].argmax())]!r}")
assert vocabulary.words[int(logits[0, at - 1].argmax())] == prompt.value

# %% [markdown]
# ## 4 Temperature
#
# Sampling draws from the probabilities. A *temperature* divides the logits first: below 1 the
# likely words gain, above 1 the unlikely ones do. PPO needs the probabilities at the temperature
# that it sampled with; one function gives both.

# %%
from minirlhf.model import token_logprobs

after = logits[0, at - 1]
p = (after / 2.0).softmax(-1)[ids[at]]
library = token_logprobs(after[None], ids[at][None], temperature=2.0)[0]
assert torch.isclose(p.log(), library)
print(f"at temperature 2, P({words[at]!r}) = {p:.2f}")

# %% [markdown]
# **Predict.** At temperatures 0.5, 1 and 2: how sure is the model of the *fact*, and how sure of
# its *first word*, where many openings would do? Which of the two suffers more from heat?

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
start = len(words) - len(said.split()) - 1  # the state before the answer's first word


def likely(position, temperature, top=6):
    """The likeliest next words after a position: {word: probability}."""
    shares, found = (logits[0, position] / temperature).softmax(-1).topk(top)
    return {vocabulary.words[int(i)]: float(s) for s, i in zip(shares, found, strict=True)}


heat = (0.5, 1.0, 2.0)
Picture(bars_figure({f"first word, T = {t}": likely(start, t) for t in heat}, "probability"))

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
Picture(bars_figure({f"the fact, T = {t}": likely(at - 1, t) for t in heat}, "probability"))

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
for t in heat:
    one, two = (max(likely(where, t).values()) for where in (start, at - 1))
    print(f"T = {t}: likeliest first word {one:.2f}, likeliest fact {two:.2f}")

# %% [markdown]
# The fact loses more probability: a sure word has more to lose. So a hot sampler does not only
# open in odd ways, it states wrong facts.
#
# **Turn the dials**: walk through the answer word by word, at any temperature.

# %% jupyter={"source_hidden": true}
panel = NextWord(reference, desk, prompt, said)
panel

# %% tags=["smoke"] jupyter={"source_hidden": true}
for at_, hot in ((0, 0.2), (len(said.split()), 3.0)):
    panel.controls["at"].value = at_
    panel.controls["temperature"].value = hot
    top = max(panel.shown.values())
    print(f"after {at_} words at temperature {hot}: the likeliest has {top:.1f}")
    assert 0 < sum(panel.shown.values()) <= 1.0001
panel.controls["temperature"].value = 1.0
assert next(iter(panel.shown)) == "<eos>"
panel.controls["at"].value = 0  # leave the panel as it was

# %% [markdown]
# ## 5 Sampling whole answers
#
# An answer grows word by word until the model says `<eos>`. A *cache* keeps what attention needs
# of the earlier words, so that each step reads one new word only. It must change nothing: the
# log-probabilities met while sampling are those of a full pass.

# %%
from minirlhf.generate import sample
from minirlhf.model import response_logprobs

prompts = desk.encode([prompt] * 64)
limits = {"max_new_tokens": desk.max_response, "eos": vocabulary.eos}
drawn = sample(reference, prompts, **limits, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    full, _ = response_logprobs(reference, prompts, drawn.responses, drawn.mask)
assert torch.allclose(drawn.logprobs, full, atol=1e-4)
answers = [vocabulary.decode(row) for row in drawn.responses]
grades = [desk.grade(prompt, text) for text in answers]
for text, g in zip(answers[:4], grades, strict=False):
    print(f"{text}  (gold {g.gold:+.2f})")
print(f"{np.mean([g.correct for g in grades]):.0%} of {len(grades)} draws state the fact")

# %% [markdown]
# One question, several answers: sampling is a draw at every word, and a draw can go wrong. The
# reference is good and not perfect.

# %% [markdown]
# ## 6 What fine-tuning taught
#
# The reference imitates demonstrations: cross-entropy on the answer's tokens, the end of the
# answer included. Compare it with the same network before any training, on fresh
# demonstrations. The unit is nats a token: 0 knows every word in advance, log V guesses among all
# V words alike, and more than that is confident and wrong.

# %%
from minirlhf.model import Transformer
from minirlhf.text import right_pad

fresh = desk.prompts(200, np.random.default_rng(1))
rng = np.random.default_rng(2)
rows = [[*vocabulary.encode(desk.demonstration(p, rng)), vocabulary.eos] for p in fresh]
responses, mask = right_pad(rows, desk.max_response)
untrained = Transformer(config, generator=torch.Generator().manual_seed(0))
for name, model in (("untrained", untrained), ("reference", reference)):
    with torch.no_grad():
        found, _ = response_logprobs(model, desk.encode(fresh), responses, mask)
    print(f"{name}: {-found[mask].mean():.1f} nats a token")
print(f"log V: {np.log(len(vocabulary)):.1f} nats")

# %% [markdown]
# What is left is mostly choice, not ignorance: several wordings are right. **Entropy** shows where
# the choices are: the mean of -log p over the words that may come next. A position with much
# entropy is a *fork*; between forks the words follow from what was said.
#
# **Predict.** Where in an answer are the forks?

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
spoken = [*said.split(), "<eos>"]
log_p = logits[0, start:].log_softmax(-1)
entropy = -(log_p.exp() * log_p).sum(-1)  # one for each word of the answer, and its end
Picture(token_figure(spoken, entropy.tolist(), "entropy before each word", "nats"))

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
for word, nats in zip(spoken, entropy, strict=True):
    print(f"{word:10} {nats:.1f} nats")

# %% [markdown]
# ## 7 Will it stop?
#
# After the full stop of a right answer, the policy may end (`<eos>`) or go on. Ending is a word
# like any other, so it can be unlearned. Take the concise right answer to every brief probe and
# ask each checkpoint of the run: how likely is it to stop here?
#
# **Predict.** The reference's probability of stopping, and the final policy's.

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
probes = [p for p in desk.probes(256) if p.stratum == "brief"]
rows = [[*vocabulary.encode(desk.concise(p)), vocabulary.eos] for p in probes]
responses, mask = right_pad(rows, desk.max_response)


def stopping(model):
    """Mean probability of the <eos> that ends these answers."""
    with torch.no_grad():
        found, _ = response_logprobs(model, desk.encode(probes), responses, mask)
    return found[responses == vocabulary.eos].exp().mean().item()


stops = {step: stopping(run.policy(step)) for step in run.steps}
steps = [f"step {step}" for step in stops]
Picture(token_figure(steps, list(stops.values()), "P(stop) after a right answer", "probability"))

# %% tags=["reveal"] jupyter={"outputs_hidden": true}
print("measured:")
for step, share in stops.items():
    print(f"step {step:3d}: stops with probability {share:.2f}")
assert stops[run.steps[-1]] < stops[run.steps[0]] / 2

# %% [markdown]
# How dear is it not to stop? Where the reference goes on with probability 1 - p, a policy that
# *always* goes on pays, once, minus the log of that. What it then says the reference may find
# quite likely; how little that costs is measured in notebook
# [04](04_the_kl_penalty.ipynb), which builds on this number.

# %%
share = stops[run.steps[0]]
price = -np.log(1 - share)
print(f"the reference stops with probability {share:.3f}, and goes on with {1 - share:.3f}")
print(f"never to stop, at that probability: -log {1 - share:.3f} = {price:.1f} nats, paid once")

# %% [markdown]
# **What to take along.** The policy is a table of next-word probabilities, computed by a small
# network; the answer's length is one of its choices. Most positions leave no choice, a few forks
# decide, and the fork at the end of a right answer is the one to watch.
#
# Next: [03 The reward model](03_the_reward_model.ipynb), then
# [04 The KL penalty](04_the_kl_penalty.ipynb) and [05 PPO](05_ppo.ipynb). Back to
# [the map](00_start_here.ipynb).
