"""The pocket desk: a real Transformer so small that every answer it can give is listed.

Eight words, answers of at most four tokens: 2801 answers to a prompt. So the best policy that a
price of KL allows, its expected reward and KL, and the gradient of any objective are sums, not
estimates, and PPO, RLOO and GRPO can be held against them. All tables are float64:

    desk = pocket_desk(slope=0.3)                 # P prompts, N answers, T tokens at most
    best = desk.optimum(beta=0.3)                 # [P, N] log-probs of pi* ~ pi_ref e^(r / beta)
    run = PPO(deepcopy(desk.reference), desk.reference, desk.score, desk.prompts, settings(0.3))
    for step in anneal(run, 200): ...
    total_variation(desk.logprobs(run.policy), best)              # [P]

An answer is a sequence of words up to and including EOS, or cut at the cap; each prompt is one
word, and the right answer says it again. The proxy reward pays for that and for every word; the
gold reward pays for it and charges for every word. Left out: padding (every id is a word or EOS,
and the prompts are of one length), discounting, sampling at other temperatures.

Sources: Korbak et al. (2022, arXiv 2205.11275) and Rafailov et al. (2023, arXiv 2305.18290, eq. 4)
for the optimum; Nachum et al. (2017, arXiv 1702.08892) for soft values; Tang and Munos (2025,
arXiv 2506.09477) for gradients of the estimators.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minirlhf.config import PPOConfig
from minirlhf.kl import Estimator, kl_tokens
from minirlhf.model import Transformer, TransformerConfig, response_outputs
from minirlhf.oracle.closed_form import as_double, tilt
from minirlhf.ppo import PPO, Scorer, Step
from minirlhf.sft import SFTConfig, train_sft
from minirlhf.text import EOS

WORDS = ("well", "<eos>", "yes", "no", "soon", "later", "so", "very")  # ids 0 to 7
CAP = 4  # tokens in the longest answer, EOS included
PROMPTS = (2, 3, 4, 5)  # one word each; none is id 0, which would read as padding
STOP = (0.9, 0.7, 0.45, 0.2)  # per prompt: chance that a demonstration ends after each word
RIGHT = 0.75  # chance that a demonstration begins with the prompt's word
FILL = (0.06, 0.0, 0.01, 0.01, 0.01, 0.01, 0.15, 0.75)  # what else it says: few ways to be long


@dataclass(frozen=True)
class Score:
    """A reward that is a plain function of the tokens: a call gives scores [B], in points."""

    per_word: float
    """points for every word, EOS not counted: positive = longer is better"""
    right: float = 1.0
    """points for an answer that says the prompt's word"""

    def __call__(self, prompts: Tensor, responses: Tensor, mask: Tensor) -> Tensor:
        """Scores [B] of responses [B, T] with their mask to prompts [B, P]."""
        words = mask & (responses != EOS)
        said = (words & (responses == prompts[:, -1:])).any(-1)
        return self.right * said + self.per_word * words.sum(-1)


class Standing(NamedTuple):
    """Where a policy stands: exact expectations over its answers, [P] each (or [K, P])."""

    kl: Tensor
    """KL(policy || reference) of whole answers, nats"""
    proxy: Tensor
    """the reward that is optimised, points"""
    gold: Tensor
    """the reward that is meant, points"""
    length: Tensor
    """tokens, EOS included"""


class Pocket:
    """Prompts, every answer, and the exact log-probs of the reference. Tables list answers in
    one order: those of one token, two, ..., then those cut at the cap.

    responses, mask [N, T]; proxy, gold [P, N] points; ref [P, N] and ref_tokens [P, N, T] nats.
    """

    def __init__(
        self, reference: Transformer, prompts: Tensor, score: Scorer, gold: Scorer, cap: int = CAP
    ):
        """prompts [P, W] without padding. Raises ValueError where an id 0 would read as such."""
        if bool((prompts == 0).any()):
            raise ValueError("a prompt holds id 0, which is read as padding: use ids from 1")
        size = reference.config.vocab_size
        self.reference, self.prompts, self.score, self.cap = reference, prompts, score, cap
        self.words = torch.tensor([i for i in range(size) if i != EOS])
        ids = [torch.arange(size).expand(1, (size - 1) ** t, -1) for t in range(cap)]
        self.responses = self.along(ids)[0]
        self.mask = self.along([torch.ones_like(level) for level in ids])[0].bool()
        self.lengths = self.mask.sum(-1).double()
        self.proxy, self.gold = self.table(score), self.table(gold)
        with torch.no_grad():
            self.ref_levels = self.levels(reference)
        self.ref_tokens = self.along(self.ref_levels)
        self.ref = self.ref_tokens.sum(-1)

    def table(self, score: Scorer) -> Tensor:
        """[P, N] of a reward: every answer to every prompt, scored."""
        n = len(self.responses)
        rows = [score(p.expand(n, -1), self.responses, self.mask) for p in self.prompts]
        return torch.stack(rows).double()

    def levels(self, model: Transformer) -> list[Tensor]:
        """Next-token log-probs in every state: level t is [P, (V - 1)^t, V], the states after t
        words in dictionary order. Differentiable; one pass over the longest prefixes."""
        base, cap = len(self.words), self.cap
        rows = self.responses[-(base**cap) :: base]  # every prefix of cap - 1 words, and one more
        strides = [base ** (cap - 1 - t) for t in range(cap)]
        # each state is read out once, though many rows go through it
        keep = torch.arange(len(rows))[:, None] % torch.tensor(strides) == 0
        count = len(self.prompts)
        prompts = self.prompts.repeat_interleave(len(rows), 0)
        given = (prompts, rows.repeat(count, 1), keep.repeat(count, 1))
        logits = response_outputs(model, *given)[0].double().unflatten(0, (count, -1))
        return [logits[:, ::s, t].log_softmax(-1) for t, s in enumerate(strides)]

    def along(self, levels: list[Tensor]) -> Tensor:
        """What `levels` say of each token of each answer: [P, N, T], 0 behind the answer's end."""
        open_, ended = levels[0].new_zeros(len(levels[0]), 1, 0), []
        for t, level in enumerate(levels):
            stop = torch.cat([open_, level[..., EOS, None]], -1)
            ended.append(F.pad(stop, (0, len(levels) - t - 1)))
            step = level[..., self.words].flatten(1)[..., None]
            open_ = torch.cat([open_.repeat_interleave(len(self.words), 1), step], -1)
        return torch.cat([*ended, open_], 1)

    def logprobs(self, model: Transformer) -> Tensor:
        """Exact log-probs [P, N] of every answer, nats; differentiable."""
        return self.along(self.levels(model)).sum(-1)

    def expect(self, logprobs: Tensor, values: Tensor) -> Tensor:
        """E over a policy's answers: logprobs [..., N] and values that broadcast with it -> [...].
        An answer of probability 0 counts for nothing, whatever its value."""
        p = logprobs.exp()
        return (p * torch.where(p > 0, values, 0.0)).sum(-1)

    def standing(self, logprobs: Tensor) -> Standing:
        """Exact KL, proxy, gold and length of a policy given by its table [..., P, N]."""
        values = (logprobs - self.ref, self.proxy, self.gold, self.lengths)
        return Standing(*(self.expect(logprobs, v) for v in values))

    def optimum(self, beta: float) -> Tensor:
        """Log-probs [P, N] of pi* ~ pi_ref e^(proxy / beta), the best that beta allows."""
        return tilt(self.ref.exp(), self.proxy, beta).log()

    def soft_values(self, beta: float) -> tuple[list[Tensor], list[Tensor]]:
        """The same optimum token by token, by backward induction over the states.

        V(s) = beta log sum_a pi_ref(a|s) e^(V(s, a) / beta), where V of a whole answer is its
        proxy. Values, level t [P, (V - 1)^t] in points, and log pi*(a|s), shaped as `levels`.
        V of the empty answer is beta log Z; E[proxy] - beta KL of pi* equals it.
        """
        base, cap = len(self.words), self.cap
        ends = self.proxy.split([base**t for t in range(cap)] + [base**cap], 1)
        after, values, policy = ends[-1], [], []
        for t in reversed(range(cap)):
            q = torch.empty_like(self.ref_levels[t])
            q[..., EOS], q[..., self.words] = ends[t], after.unflatten(1, (-1, base))
            tilted = self.ref_levels[t] + q / beta
            after = beta * tilted.logsumexp(-1)
            values.insert(0, after)
            policy.insert(0, tilted.log_softmax(-1))
        return values, policy

    def frontier(self, betas: Tensor) -> Standing:
        """The optimum of each of K betas, [K] each, means over prompts: the curve of the most
        reward that a mean KL can buy. No policy stands above it (`ceiling`)."""
        found = self.standing(torch.stack([self.optimum(float(b)) for b in betas]))
        return Standing(*(x.mean(-1) for x in found))

    def ceiling(self, kl: float | Tensor) -> Tensor:
        """The mean proxy that no policy of mean KL `kl` [...] nats can exceed, points [...].

        E[r] <= beta KL + beta E[log Z(beta)] for every beta > 0; the least of these bounds over
        a grid of betas is never below the frontier, and touches it at each beta of the grid.
        """
        kl, (betas, log_z) = torch.as_tensor(kl, dtype=torch.float64), self._log_z
        return (betas * (kl[..., None] + log_z)).amin(-1)

    @cached_property
    def _log_z(self) -> tuple[Tensor, Tensor]:
        betas = torch.logspace(-2, 2, 400, dtype=torch.float64)
        worths = [(self.ref + self.proxy / b).logsumexp(-1).mean() for b in betas]
        return betas, torch.stack(worths)

    def best_of(self, n: int) -> Tensor:
        """Log-probs [P, N] of the best of n reference answers by proxy, ties drawn by lot."""
        order = self.proxy.argsort(-1)
        below = F.pad(self.ref.exp().gather(-1, order).cumsum(-1), (1, 0))
        ordered = self.proxy.gather(-1, order)
        ranks = (torch.searchsorted(ordered, self.proxy, right=r) for r in (False, True))
        worse, not_better = (below.gather(-1, rank) for rank in ranks)
        p = not_better - worse  # of all answers that score alike; they share the chance to win
        gain = torch.where(p > 1e-9, (not_better**n - worse**n) / p, n * not_better ** (n - 1))
        return self.ref + gain.log()

    def gradient(
        self,
        model: Transformer,
        *,
        beta: float,
        place: Literal["reward", "loss", "book_literal", "none"] = "reward",
        estimator: Estimator = "k1",
        aggregation: Literal["sequence_sum", "token_mean"] = "sequence_sum",
        scale_by_sd: bool = False,
    ) -> Tensor:
        """The exact expected ascent direction of one on-policy step, flat as model.parameters().

        What PPO's loss gives on average at ratio 1, with answers summed over their tokens and
        prompts drawn evenly: in the `reward` the estimate is a number that credit multiplies, in
        the `loss` it is differentiated on the sampled tokens. scale_by_sd divides each prompt's
        rewards by their sd, as GRPO's advantages do in the limit of a large group.
        """
        tokens = self.along(self.levels(model))
        logp = tokens.sum(-1)
        ref, mask = self.ref_tokens, self.mask
        kl = kl_tokens(tokens, ref, mask, estimator=estimator, aggregation=aggregation).sum(-1)
        net = self.proxy - beta * kl.detach() if place == "reward" else self.proxy
        p = logp.detach().exp()
        net = net - (p * net).sum(-1, keepdim=True)  # a baseline: nothing changes on average
        if scale_by_sd:
            net = net / (p * net.square()).sum(-1, keepdim=True).sqrt()
        charged = beta if place in ("loss", "book_literal") else 0.0
        objective = (p * (net * logp - charged * kl)).sum(-1).mean()
        parameters = list(model.parameters())
        found = torch.autograd.grad(objective, parameters, allow_unused=True)
        pairs = zip(found, parameters, strict=True)
        return torch.cat([(torch.zeros_like(w) if g is None else g).flatten() for g, w in pairs])


def total_variation(logprobs: Tensor, other: Tensor) -> Tensor:
    """Half the summed difference of two policies' tables [..., N]: the most by which the chance
    of any set of answers differs, [...] between 0 and 1."""
    return 0.5 * (logprobs.exp() - other.exp()).abs().sum(-1)


def train_reference(*, cap: int = CAP, d_model: int = 16, seed: int = 0) -> Transformer:
    """A one-block Transformer fitted to demonstrations drawn from a hand-made chain (seconds).

    A demonstration begins with the prompt's word with chance RIGHT and stops after each word
    with its prompt's chance STOP: the first prompt is answered briefly, the last at length.
    """
    rng, rows = np.random.default_rng(seed), 6_000
    asked = rng.integers(len(PROMPTS), size=rows)
    said = rng.choice(len(WORDS), size=(rows, cap), p=FILL)
    said[:, 0] = np.where(rng.random(rows) < RIGHT, np.array(PROMPTS)[asked], said[:, 0])
    words = rng.geometric(np.array(STOP)[asked])[:, None]
    place = np.arange(cap)[None]
    responses = torch.from_numpy(np.where(place < words, said, EOS))
    mask = torch.from_numpy(place <= words)
    config = TransformerConfig(len(WORDS), 1 + cap, d_model=d_model, n_layer=1, n_head=2)
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(config, generator=generator)
    prompts = torch.tensor(PROMPTS)[asked][:, None]
    training = SFTConfig(steps=200, batch=96, lr=0.02)
    train_sft(model, prompts, responses, mask, training, generator=generator)
    return model


def pocket_desk(
    slope: float = 0.3, *, gold_per_word: float = -0.2, reference: Transformer | None = None
) -> Pocket:
    """The desk of the course: a proxy that pays `slope` points a word, and the gold that charges
    for words. Without a `reference` one is trained (seconds); hand it on to build others."""
    model = train_reference() if reference is None else reference
    prompts = torch.tensor(PROMPTS)[:, None]
    return Pocket(model, prompts, Score(slope), Score(gold_per_word), model.config.context - 1)


def settings(beta: float, **changes: Any) -> PPOConfig:
    """PPO as theory has it: nothing whitened, nothing charged for the cap, each token in full;
    `changes` are fields of PPOConfig."""
    plain: dict[str, Any] = {"whiten_advantages": "none", "missing_eos": "none", "beta": beta}
    plain |= {"batch": 128, "max_new_tokens": CAP, "lr": 0.01}
    plain |= {"epochs": 2, "minibatches": 1}
    plain |= {"value_coef": 0.5, "loss_aggregation": "sequence_sum"}
    return PPOConfig(**plain | changes)


def anneal(run: PPO, steps: int) -> Iterator[Step]:
    """`steps` PPO steps whose learning rate falls linearly from the config's towards 0: a last
    rate that is not small leaves the policy trembling about where it would end."""
    peak = run.config.lr
    for done in range(steps):
        run.config = replace(run.config, lr=peak * (1 - done / steps))
        yield run.step()


def two_word_policy(p0: float, *, seed: int = 0) -> Transformer:
    """A Transformer for the prompt [[1]] whose one-token answer is 0 (verbose) with probability p0.

    Vocabulary {0, 1}; use it with max_new_tokens=1, eos=1, missing_eos "none". The last norm's
    bias is solved for; the word 1 (concise) is EOS, 0 is cut at the cap.
    """
    x0 = as_double("p0", p0, "between 0 and 1").logit().item()
    config = TransformerConfig(2, 1, d_model=8, n_layer=1, n_head=1)
    model = Transformer(config, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        apart = model.tokens.weight[0] - model.tokens.weight[1]
        logits = model(torch.tensor([[1]]))[0][0, 0]
        model.final_norm.bias += (x0 - logits[0] + logits[1]) * apart / apart.square().sum()
    return model


@torch.no_grad()
def verbose_share(policy: Transformer) -> float:
    """The exact p of a two_word_policy, trained or not."""
    return policy(torch.tensor([[1]]))[0][0, 0].double().softmax(-1)[0].item()
