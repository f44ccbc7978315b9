"""Direct preference optimisation: the policy learns from ranked pairs, without a reward model.

The optimum of RLHF, pi* ~ pi_ref exp(r / beta), solved for r gives r = beta log(pi / pi_ref) + a
constant of the prompt, which cancels in a pair: the ranking loss of *that* r trains the policy
itself. So this is the reward model's own loop with an implicit reward in it, and what the pairs
prefer (their length, too) is learnt as a reward model learns it. Nothing is sampled. Left out:
variants with another length convention (SimPO, R-DPO).

Source: Rafailov et al. (2023, arXiv 2305.18290, equations 5 to 7).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from minirlhf.config import DPOConfig
from minirlhf.model import Transformer, response_logprobs
from minirlhf.reward import (
    LossAndGaps,
    Progress,
    RankedPairs,
    RewardModel,
    Rows,
    both_answers,
    train_reward,
)


def dpo_loss(
    policy_chosen: Float[Tensor, " B"],
    policy_rejected: Float[Tensor, " B"],
    ref_chosen: Float[Tensor, " B"],
    ref_rejected: Float[Tensor, " B"],
    *,
    beta: float,
) -> Float[Tensor, ""]:
    """Mean of -log sigmoid(beta (log-ratio of the winner - of the loser)), in nats.

    Each argument [B] is the *summed* log-prob of whole answers, nats. At policy = reference it is
    log 2, with gradient -beta / (2 B) on the winner's log-prob and + as much on the loser's.
    """
    # Rafailov et al. (2023, eq. 7): the constant of the prompt is gone, as both rewards have it
    margin = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)
    return -F.logsigmoid(beta * margin).mean()


def answer_logprobs(
    model: Transformer, pairs: RankedPairs, rows: Rows
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Summed log-probs of the winners and of the losers of `rows`, [N] each, nats."""
    prompts, answers, mask = both_answers(pairs, rows)
    logprobs, _ = response_logprobs(model, prompts, answers, mask)
    chosen, rejected = logprobs.sum(1).chunk(2)
    return chosen, rejected


def train_dpo(
    policy: Transformer,
    reference: Transformer,
    pairs: RankedPairs,
    config: DPOConfig,
    *,
    generator: torch.Generator,
    progress: Progress = lambda step, total, metrics: None,
) -> list[dict[str, float]]:
    """Fit `policy` in place; one row of metrics per step.

    `accuracy` is how often beta log(pi / ref), the implicit reward, ranks a pair right. The
    reference, left as it is, is asked once for all pairs. Raises as train_reward does.
    """
    everyone = torch.arange(len(pairs.prompts), device=pairs.prompts.device)
    with torch.no_grad():
        known = [
            torch.stack(answer_logprobs(reference, pairs, rows)) for rows in everyone.split(512)
        ]
    reference_logprobs = torch.cat(known, 1)  # (2, N): winners, losers

    def objective(model: RewardModel, pairs: RankedPairs, rows: Int[Tensor, " B"]) -> LossAndGaps:
        chosen, rejected = answer_logprobs(model.trunk, pairs, rows)
        ref_chosen, ref_rejected = reference_logprobs[:, rows]
        # the implicit rewards' gap without its beta > 0, which changes no sign (eq. 5)
        gaps = (chosen - ref_chosen) - (rejected - ref_rejected)
        loss = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=config.beta)
        return loss, gaps

    # a reward model is a Transformer with a scale: here its head is not read, only its trunk
    return train_reward(
        RewardModel(policy),
        pairs,
        config,
        generator=generator,
        progress=progress,
        objective=objective,
    )
