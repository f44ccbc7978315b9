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
        self.reference = reference
        self.prompts = prompts
        self.score = score
        self.cap = cap
        size = reference.config.vocab_size
        self.words = torch.tensor([i for i in range(size) if i != EOS])
        # The list of answers is a table too: in every state, each token says its own id.
        ids = [torch.arange(size).expand(1, (size - 1) ** t, -1) for t in range(cap)]
        self.responses = self.along(ids)[0]
        self.mask = self.along([torch.ones_like(level) for level in ids])[0].bool()
        self.lengths = self.mask.sum(-1).double()
        self.proxy = self.table(score)
        self.gold = self.table(gold)
        with torch.no_grad():
            self.ref_levels = self.levels(reference)
        self.ref_tokens = self.along(self.ref_levels)
        self.ref = self.ref_tokens.sum(-1)

    def table(self, score: Scorer) -> Tensor:
        """[P, N] of a reward: every answer to every prompt, scored."""
        rows = []
        for prompt in self.prompts:
            same = prompt.expand(len(self.responses), -1)
            rows.append(score(same, self.responses, self.mask))
        return torch.stack(rows).double()

    def levels(self, model: Transformer) -> list[Tensor]:
        """Next-token log-probs in every state: level t is [P, (V - 1)^t, V], the states after t
        words in dictionary order. Differentiable; one pass over the longest prefixes."""
        base = len(self.words)
        # Of the answers that were cut at the cap every base-th: they begin with each prefix of
        # cap - 1 words once, and the last word of an answer is predicted but never read.
        rows = self.responses[-(base**self.cap) :: base]
        # A state after t words comes in so many rows in turn; it is read out in the first of them.
        strides = [base ** (self.cap - 1 - t) for t in range(self.cap)]
        keep = torch.arange(len(rows))[:, None] % torch.tensor(strides) == 0
        count = len(self.prompts)
        logits, _ = response_outputs(
            model,
            self.prompts.repeat_interleave(len(rows), 0),
            rows.repeat(count, 1),
            keep.repeat(count, 1),
        )
        logits = logits.double().unflatten(0, (count, -1))  # (P, rows, cap, V)
        return [logits[:, ::stride, t].log_softmax(-1) for t, stride in enumerate(strides)]

    def along(self, levels: list[Tensor]) -> Tensor:
        """What `levels` say of each token of each answer: [P, N, T], 0 behind the answer's end."""
        going = levels[0].new_zeros(len(levels[0]), 1, 0)  # what was said so far: nothing yet
        ended = []
        for t, level in enumerate(levels):
            stopped = torch.cat([going, level[..., EOS, None]], -1)
            ended.append(F.pad(stopped, (0, len(levels) - t - 1)))
            # Every prefix goes on with every word, which keeps them in dictionary order.
            said = going.repeat_interleave(len(self.words), 1)
            word = level[..., self.words].flatten(1)[..., None]
            going = torch.cat([said, word], -1)
        return torch.cat([*ended, going], 1)

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
        return Standing(
            kl=self.expect(logprobs, logprobs - self.ref),
            proxy=self.expect(logprobs, self.proxy),
            gold=self.expect(logprobs, self.gold),
            length=self.expect(logprobs, self.lengths),
        )

    def optimum(self, beta: float) -> Tensor:
        """Log-probs [P, N] of pi* ~ pi_ref e^(proxy / beta), the best that beta allows."""
        return tilt(self.ref.exp(), self.proxy, beta).log()

    def soft_values(self, beta: float) -> tuple[list[Tensor], list[Tensor]]:
        """The same optimum token by token, by backward induction over the states.

        Values, level t [P, (V - 1)^t] in points, and log pi*(a|s), shaped as `levels`. V of the
        empty answer is beta log Z; E[proxy] - beta KL of pi* equals it.
        """
        base = len(self.words)
        # One part for each t of words that EOS ends, and one for the answers cut at the cap.
        ends = self.proxy.split([base**t for t in range(self.cap + 1)], 1)
        after = ends[-1]  # V of a whole answer is its proxy
        values = []
        policy = []
        for t in reversed(range(self.cap)):
            q = torch.empty_like(self.ref_levels[t])  # V of the state that a token leads to
            q[..., EOS] = ends[t]
            q[..., self.words] = after.unflatten(1, (-1, base))
            # Nachum et al. (2017), with pi_ref where they have the uniform policy:
            # V(s) = beta log sum_a pi_ref(a|s) e^(Q / beta), and pi* ~ pi_ref e^(Q / beta)
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
        kl = torch.as_tensor(kl, dtype=torch.float64)
        betas, log_z = self._log_z
        return (betas * (kl[..., None] + log_z)).amin(-1)

    @cached_property
    def _log_z(self) -> tuple[Tensor, Tensor]:
        """The grid of betas [K], and the mean over prompts of log Z at each [K]."""
        betas = torch.logspace(-2, 2, 400, dtype=torch.float64)
        log_z = [(self.ref + self.proxy / beta).logsumexp(-1).mean() for beta in betas]
        return betas, torch.stack(log_z)

    def best_of(self, n: int) -> Tensor:
        """Log-probs [P, N] of the best of n reference answers by proxy, ties drawn by lot."""
        order = self.proxy.argsort(-1)
        ordered = self.proxy.gather(-1, order)
        below = F.pad(self.ref.exp().gather(-1, order).cumsum(-1), (1, 0))
        # What the reference says worse than an answer, and what it says no better, as chances.
        worse = below.gather(-1, torch.searchsorted(ordered, self.proxy, right=False))
        not_better = below.gather(-1, torch.searchsorted(ordered, self.proxy, right=True))
        # The best of n scores as this answer does if all n are no better and not all are worse.
        # Whoever scores alike shares that chance by what the reference gives it.
        alike = not_better - worse
        gain = (not_better**n - worse**n) / alike
        # Where next to nothing scores alike the difference has no digits left: take its limit.
        limit = n * not_better ** (n - 1)
        return self.ref + torch.where(alike > 1e-9, gain, limit).log()

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
        # The core's estimators take rows of answers: all prompts' below each other.
        per_token = kl_tokens(
            tokens.flatten(0, 1),
            self.ref_tokens.flatten(0, 1),
            self.mask.repeat(len(self.prompts), 1),
            estimator=estimator,
            aggregation=aggregation,
        )
        kl = per_token.sum(-1).view_as(self.proxy)
        net = self.proxy
        if place == "reward":
            net = net - beta * kl.detach()
        logp = tokens.sum(-1)
        p = logp.detach().exp()  # how often each answer is sampled; no gradient goes through that
        net = net - (p * net).sum(-1, keepdim=True)  # a baseline: nothing changes on average
        if scale_by_sd:
            net = net / (p * net.square()).sum(-1, keepdim=True).sqrt()
        charged = beta if place in ("loss", "book_literal") else 0.0
        objective = (p * (net * logp - charged * kl)).sum(-1).mean()
        # The critic's head is no part of it: its gradient is 0.
        found = torch.autograd.grad(
            objective, list(model.parameters()), allow_unused=True, materialize_grads=True
        )
        return torch.cat([gradient.flatten() for gradient in found])


def total_variation(logprobs: Tensor, other: Tensor) -> Tensor:
    """Half the summed difference of two policies' tables [..., N]: the most by which the chance
    of any set of answers differs, [...] between 0 and 1."""
    return 0.5 * (logprobs.exp() - other.exp()).abs().sum(-1)


def train_reference(*, cap: int = CAP, d_model: int = 16, seed: int = 0) -> Transformer:
    """A one-block Transformer fitted to demonstrations drawn from a hand-made chain (seconds).

    A demonstration begins with the prompt's word with chance RIGHT and stops after each word
    with its prompt's chance STOP: the first prompt is answered briefly, the last at length.
    """
    rng = np.random.default_rng(seed)
    rows = 6_000
    asked = rng.integers(len(PROMPTS), size=rows)
    words = np.array(PROMPTS)[asked]
    said = rng.choice(len(WORDS), size=(rows, cap), p=FILL)
    said[:, 0] = np.where(rng.random(rows) < RIGHT, words, said[:, 0])
    # How many words come before EOS; a demonstration of `cap` words or more has none.
    lengths = rng.geometric(np.array(STOP)[asked])[:, None]
    place = np.arange(cap)
    responses = np.where(place < lengths, said, EOS)
    mask = place <= lengths

    generator = torch.Generator().manual_seed(seed)
    config = TransformerConfig(len(WORDS), 1 + cap, d_model=d_model, n_layer=1, n_head=2)
    model = Transformer(config, generator=generator)
    train_sft(
        model,
        torch.from_numpy(words)[:, None],
        torch.from_numpy(responses),
        torch.from_numpy(mask),
        SFTConfig(steps=200, batch=96, lr=0.02),
        generator=generator,
    )
    return model


def pocket_desk(
    slope: float = 0.3, *, gold_per_word: float = -0.2, reference: Transformer | None = None
) -> Pocket:
    """The desk of the course: a proxy that pays `slope` points a word, and the gold that charges
    for words. Without a `reference` one is trained (seconds); hand it on to build others."""
    model = train_reference() if reference is None else reference
    return Pocket(
        model,
        torch.tensor(PROMPTS)[:, None],
        score=Score(slope),
        gold=Score(gold_per_word),
        cap=model.config.context - 1,  # the prompt is one word, the rest is the answer's
    )


def settings(beta: float, **changes: Any) -> PPOConfig:
    """PPO as theory has it: nothing whitened, nothing charged for the cap, each token in full;
    `changes` are fields of PPOConfig."""
    plain = PPOConfig(
        beta=beta,
        batch=128,
        max_new_tokens=CAP,
        lr=0.01,
        epochs=2,
        minibatches=1,
        value_coef=0.5,
        # A division by an sd would rescale beta, and a mean over tokens each answer.
        whiten_advantages="none",
        loss_aggregation="sequence_sum",
        # An answer that is cut at the cap is one of the list, and no fault.
        missing_eos="none",
    )
    return replace(plain, **changes)


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
        logits = model(torch.tensor([[1]]))[0][0, 0]
        missing = x0 - logits[0] + logits[1]
        # Embeddings are tied: a bias of c * apart moves the gap of the logits by c * |apart|^2.
        apart = model.tokens.weight[0] - model.tokens.weight[1]
        model.final_norm.bias += missing * apart / apart.square().sum()
    return model


@torch.no_grad()
def verbose_share(policy: Transformer) -> float:
    """The exact p of a two_word_policy, trained or not."""
    logits, _ = policy(torch.tensor([[1]]))
    return logits[0, 0].double().softmax(-1)[0].item()
