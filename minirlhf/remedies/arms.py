"""The remedies: each one a function that changes exactly one thing, and a row that says what.

    recipe = REMEDIES["matched"].change(Recipe(DriftConfig(seed=3)))
    recipe = stack("counterfactual+larger_beta", DriftConfig())          # two of them

What a remedy must move is the effective reward, r_eff = r - beta * L with L the log-ratio to the
reference: the sign of its gap between verbose and concise on brief prompts, or what one of the two
terms weighs. To add a remedy, write a function Recipe -> Recipe and give it a row.
Left out: what they do (sweeps/remedy_runs.py measures it; a row promises nothing).

Sources: one in each row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from minirlhf.desk.preferences import Pairs
from minirlhf.drift.config import DriftConfig
from minirlhf.drift.recipe import Recipe, changed
from minirlhf.drift.run import Drift
from minirlhf.remedies import pairs, scores
from minirlhf.remedies.ranking import fit_odin, fit_with_covariates, length_difference
from minirlhf.remedies.without_ppo import USES, choose_best, learn_directly

Change = Callable[[Recipe], Recipe]
Place = Literal["pairs", "RM loss", "reward", "KL", "advantage", "update", "instead of PPO"]


@dataclass(frozen=True)
class Remedy:
    """A fix: what it changes, where, by which equation, at what price, and who says so."""

    title: str
    change: Change
    acts: Place
    equation: str
    cost: str
    source: str
    fault: str = "none"
    """the arm that it repairs; "none": the default run"""


def keep(recipe: Recipe) -> Recipe:
    """Nothing is changed."""
    return recipe


def fair(recipe: Recipe) -> Recipe:
    """Labelers without a bias who check every fact: the pairs that one would like to have."""
    return Recipe(recipe.config.control(), recipe.rules, recipe.names)


def on_pairs(rule: Callable[..., Any], **options: Any) -> Change:
    """A change of the training pairs."""
    return lambda recipe: recipe.rule(pairs=_with(rule, options))


def on_scores(rule: Callable[..., Any], **options: Any) -> Change:
    """A change of the scores that PPO sees."""
    return lambda recipe: recipe.rule(scores=_with(rule, options))


def on_ppo(**settings: Any) -> Change:
    """A change of PPO's settings."""
    return lambda recipe: recipe.ppo(**settings)


def _with(rule: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    # a partial without options is another object: a rule that is kept would count as changed
    return partial(rule, **options) if options else rule


def style_difference(pairs: Pairs) -> Tensor:
    """Winner's minus loser's length, tokens, and hedging: [N, 2]."""
    length = length_difference(pairs)
    doubt = torch.from_numpy(pairs.hedged_chosen.astype(int) - pairs.hedged_rejected)
    return torch.cat([length, doubt[:, None].to(length.device)], 1)


def covariate_length(recipe: Recipe) -> Recipe:
    """A length term in the ranking loss, dropped when PPO asks for scores."""
    return recipe.rule(fit=fit_with_covariates)


def covariate(recipe: Recipe) -> Recipe:
    """The same with a term for hedging as well."""
    return recipe.rule(fit=partial(fit_with_covariates, differences=style_difference))


def odin(recipe: Recipe) -> Recipe:
    """Two heads, of which the one that correlates with length is dropped."""
    return recipe.rule(fit=fit_odin)


def larger_beta(recipe: Recipe, *, times: float = 4.0) -> Recipe:
    """A dearer KL, for every prompt."""
    return recipe.ppo(beta=times * recipe.config.ppo.beta)


def dearer_if_brief(run: Drift, *, times: float = 4.0) -> Tensor:
    """Multiples of beta [N]: `times` where the reference's own answers are brief, else 1."""
    usual = scores.Usual(run.reward_model.score, run)
    lengths = usual.look_up(run.desk.encode(run.prompts))[:, 1]
    return torch.where(lengths < run.config.audit.brief_below, times, 1.0)


def per_stratum(recipe: Recipe) -> Recipe:
    """A dearer KL where the reference is brief."""
    return recipe.rule(prices=dearer_if_brief)


def too_far(metrics: dict[str, float], *, nats: float = 2.0) -> bool:
    """Whether a batch's answers are further from the reference than this."""
    return metrics["objective/kl_nats"] > nats


def early_stop(recipe: Recipe) -> Recipe:
    """PPO ends once it has gone so far."""
    return recipe.rule(stop=too_far)


def dpo(recipe: Recipe) -> Recipe:
    """No reward model and no PPO: the pairs move the policy."""
    return recipe.rule(policy=learn_directly)


def best_of_n(recipe: Recipe) -> Recipe:
    """No training at all: sample more, keep the best."""
    return recipe.rule(policy=choose_best)


def stack(names: str, config: DriftConfig) -> Recipe:
    """The recipe of one arm, or of several joined by "+", first to last.

    Raises ValueError for a name that is no arm, and for a stack of which a part would do nothing.
    What repairs a fault does not ask whether the fault is there.
    """
    recipe = Recipe(config)
    wanted = names.split("+")
    for name in wanted:
        if name not in ARMS:
            raise ValueError(f"no remedy {name!r}: there are {', '.join(sorted(ARMS))}")
        recipe = ARMS[name](recipe)
    policy = recipe.rules.policy
    if policy is not None:
        idle = changed(Recipe(config), recipe) - USES[policy] - {"policy"}
        if idle:
            what = f"what is done in place of PPO makes no use of {sorted(idle)}"
            raise ValueError(f"{names}: {what}")
    if recipe.rules.prices is not None and recipe.config.ppo.kl_place != "reward":
        raise ValueError(f"{names}: prices for prompts need kl_place reward")
    left = tuple(name for name in wanted if name != "none")
    return Recipe(recipe.config, recipe.rules, left)


counter = partial(on_pairs, pairs.counterfactual)
FAULTS: dict[str, Change] = {
    "book_literal": on_ppo(kl_place="book_literal"),
    "token_mean": on_ppo(kl_aggregation="token_mean"),
    "grpo": on_ppo(advantage="grpo", loss_aggregation="sequence_mean"),
}
REMEDIES: dict[str, Remedy] = {
    # ------------------------------------------------------------ which pairs are ranked
    "balanced": Remedy(
        "as many long winners as short ones", on_pairs(pairs.balance), "pairs",
        "keep pairs until P(longer wins) = 1/2", "drops pairs; lowers a slope only",
        "Singhal et al. 2023, arXiv 2310.03716",
    ),
    "matched_length": Remedy(
        "the same within bins of |length difference|", on_pairs(pairs.match, hedges=False),
        "pairs", "P(longer wins | bin of |dlen|, stratum) = 1/2",
        "drops more pairs; blind to the second axis",
        "Singhal et al. 2023, arXiv 2310.03716",
    ),
    "matched": Remedy(
        "the same within bins of |length difference| and of hedging", on_pairs(pairs.match),
        "pairs", "P(longer wins | bin of |dlen|, stratum, who hedges) = 1/2",
        "drops most pairs; needs a detector of hedges",
        "Singhal et al. 2023, arXiv 2310.03716; two axes are ours",
    ),
    "equal_style": Remedy(
        "only pairs of equal length and hedging", on_pairs(pairs.equal), "pairs",
        "|dlen| < 3, both hedge or neither", "drops nearly all pairs",
        "ours",
    ),
    "counterfactual_tie": Remedy(
        "padded twins that tie", counter(tie=True), "pairs",
        "+ (x, y) and (x, padded y), each wins half the time", "as many pairs again to write",
        "Kaushik et al. 2019, arXiv 1909.12434, for counterfactual pairs",
    ),
    "counterfactual_length": Remedy(
        "courteous twins that lose", counter(hedges=False), "pairs",
        "+ (x, y) > (x, courteous y)", "as many pairs again; blind to the second axis",
        "Kaushik et al. 2019, arXiv 1909.12434, for counterfactual pairs",
    ),
    "counterfactual": Remedy(
        "courteous or hedged twins that lose", counter(), "pairs",
        "+ (x, y) > (x, padded y)", "as many pairs again; may undervalue wanted courtesy",
        "Kaushik et al. 2019, arXiv 1909.12434, for counterfactual pairs",
    ),
    "other_prompts": Remedy(
        "answers to other prompts lose (RRM)", on_pairs(pairs.other_prompts), "pairs",
        "+ (x, y) > (x, y' of x'); y', y'' tie", "two and a half times the pairs to train on",
        "Liu et al. 2024, arXiv 2409.13156, section 3",
    ),
    "ties": Remedy(
        "slight wins of the longer one are ties", on_pairs(pairs.ties), "pairs",
        "slight and longer: each wins half the time", "annotators must say how sure they are",
        "Lin et al. 2024, arXiv 2406.04770, length-tie rule",
    ),
    # ------------------------------------------------------------ how they are ranked
    "covariate_length": Remedy(
        "length covariate, dropped for PPO", covariate_length, "RM loss",
        "sigma(dr + phi tanh(dlen / s)); PPO gets r",
        "takes deserved length if quality tracks it; blind to the second axis",
        "form of Dubois et al. 2024, arXiv 2404.04475, in the ranking loss",
    ),
    "covariate": Remedy(
        "covariates for length and hedging, dropped for PPO", covariate, "RM loss",
        "sigma(dr + phi tanh(dlen / s) + psi tanh(dhedge / s')); PPO gets r",
        "needs a detector of hedges; takes what quality shares with style",
        "form of Dubois et al. 2024, arXiv 2404.04475, in the ranking loss",
    ),
    "odin": Remedy(
        "two heads, the length head dropped (ODIN)", odin, "RM loss",
        "r_Q + r_L, |corr(r_Q, len)| -> 0; PPO gets r_Q", "two weights to choose; over-corrects",
        "Chen et al. 2024, arXiv 2402.07319",
    ),
    # ------------------------------------------------------------ what PPO is told
    "calibrated": Remedy(
        "score minus its fit over lengths", on_scores(scores.calibrated), "reward",
        "r - f(|y|)", "takes deserved length too; fitted once, the policy moves on",
        "Huang et al. 2024, arXiv 2409.17407",
    ),
    "ensemble_mean": Remedy(
        "mean of three reward models", on_scores(scores.ensemble, how="mean"), "reward",
        "(r1 + r2 + r3) / 3", "three trainings, three scorings",
        "Coste et al. 2023, arXiv 2310.02743",
    ),
    "ensemble_min": Remedy(
        "the worst of three reward models", on_scores(scores.ensemble, how="min"), "reward",
        "min(r1, r2, r3)", "three trainings, three scorings",
        "Coste et al. 2023, arXiv 2310.02743",
    ),
    "ensemble_uwo": Remedy(
        "mean minus half the variance of three", on_scores(scores.ensemble, how="uwo"), "reward",
        "mean - var / 2 (over n - 1)", "three trainings, three scorings",
        "Coste et al. 2023, arXiv 2310.02743",
    ),
    "par": Remedy(
        "a sigmoid around the reference's score (PAR)", on_scores(scores.par), "reward",
        "sigma(r - b(x))", "reference answers to every prompt; acts as a larger beta too",
        "Fu et al. 2025, arXiv 2502.18770",
    ),
    "capped": Remedy(
        "score cut at 1 sd", on_scores(scores.capped), "reward",
        "min(r, 1)", "blind above the cap, unchanged below",
        "clipping as compared in Fu et al. 2025, arXiv 2502.18770",
    ),
    "centred": Remedy(
        "score minus the reference's on that prompt", on_scores(scores.centred), "reward",
        "r - b(x)", "reference answers to every prompt",
        "Ziegler et al. 2019, arXiv 1909.08593 (zero mean); per prompt here",
    ),
    "length_penalty": Remedy(
        "a price on tokens", on_scores(scores.length_penalty), "reward",
        "r - 0.08 |y|", "taxes deserved length; to be set anew for every reward model",
        "Singhal et al. 2023, arXiv 2310.03716",
    ),
    "soft_overlong": Remedy(
        "a price on the last sixteen tokens before the cap", on_scores(scores.soft_overlong),
        "reward", "- max(0, |y| - 32) / 16", "acts on the longest answers only",
        "Yu et al. 2025, arXiv 2503.14476, eq. 13",
    ),
    # ------------------------------------------------------------ what KL costs
    "larger_beta": Remedy(
        "beta four times as large", larger_beta, "KL",
        "r - 4 beta L", "holds every prompt back, also where length is deserved",
        "Ziegler et al. 2019, arXiv 1909.08593, eq. 2",
    ),
    "adaptive_beta": Remedy(
        "beta that chases 3 nats", on_ppo(kl_target=3.0, kl_horizon=1280.0), "KL",
        "beta (1 + 0.1 clip(KL / 3 - 1, +-0.2)) a batch", "slower than the drift; sees the mean",
        "Ziegler et al. 2019, arXiv 1909.08593, section 2.2",
    ),
    "per_stratum_beta": Remedy(
        "beta four times as large where the reference is brief", per_stratum, "KL",
        "r - beta(x) L", "reference answers to every prompt; treats the amplifier",
        "ours, from the tilt's largest move",
    ),
    "early_stop": Remedy(
        "stop after the first batch beyond 2 nats", early_stop, "update",
        "no step once KL > 2", "stops what was wanted as well",
        "Gao et al. 2022, arXiv 2210.10760: proxy and gold over distance",
    ),
    "placement": Remedy(
        "KL into the reward", on_ppo(kl_place="reward"), "KL",
        "-beta sum(l_t) in r, not beta grad of it in the loss", "none",
        "Tang and Munos 2025, arXiv 2506.09477", fault="book_literal",
    ),
    "sequence_sum": Remedy(
        "KL summed over the answer", on_ppo(kl_aggregation="sequence_sum"), "KL",
        "sum(l_t), not sum(l_t) / |y|", "none at this length: beta must be set for sums",
        "Tang and Munos 2025, arXiv 2506.09477", fault="token_mean",
    ),
    # ------------------------------------------------------------ how credit is given
    "rloo": Remedy(
        "the other three answers as baseline (RLOO)", on_ppo(advantage="rloo"), "advantage",
        "r_i - mean of the others", "four answers a prompt, a quarter of the prompts",
        "Ahmadian et al. 2024, arXiv 2402.14740",
    ),
    "dr_grpo": Remedy(
        "neither 1/sd of a group nor 1/|y| (Dr. GRPO)",
        on_ppo(advantage="rloo", loss_aggregation="sequence_sum"), "advantage",
        "r_i - mean, summed over tokens", "as any group baseline",
        "Liu et al. 2025, arXiv 2503.20783", fault="grpo",
    ),
    # ------------------------------------------------------------ no PPO at all
    "dpo": Remedy(
        "DPO on the same pairs", dpo, "instead of PPO",
        "-log sigma(beta' (dlogratio_w - dlogratio_l))", "learns the pairs' bias without a score",
        "Rafailov et al. 2023, arXiv 2305.18290, eq. 7",
    ),
    "best_of_n": Remedy(
        "the best of 16 reference answers", best_of_n, "instead of PPO",
        "argmax of r over 16 draws", "sixteen answers for each one given",
        "Stiennon et al. 2020, arXiv 2009.01325; KL bound: arXiv 2401.01879",
    ),
}  # fmt: skip
ARMS: dict[str, Change] = {
    "none": keep,
    "fair": fair,
    **FAULTS,
    **{name: remedy.change for name, remedy in REMEDIES.items()},
}
