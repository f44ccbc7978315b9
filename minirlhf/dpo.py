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
from torch import Tensor

from minirlhf.config import DPOConfig
from minirlhf.model import Transformer, response_logprobs
from minirlhf.reward import Progress, RankedPairs, RewardModel, both_answers, train_reward


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float,
) -> Tensor:
    """Mean of -log sigmoid(beta (log-ratio of the winner - of the loser)), in nats.

    Each argument [B] is the *summed* log-prob of whole answers, nats. At policy = reference it is
    log 2, with gradient -beta / (2 B) on the winner's log-prob and + as much on the loser's.
    """
    margin = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)
    return -F.logsigmoid(beta * margin).mean()


def answer_logprobs(
    model: Transformer, pairs: RankedPairs, rows: Tensor | slice
) -> tuple[Tensor, Tensor]:
    """Summed log-probs of the winners and of the losers of `rows`, [N] each, nats."""
    chosen, rejected = response_logprobs(model, *both_answers(pairs, rows))[0].sum(1).chunk(2)
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
    parts = torch.arange(len(pairs.prompts), device=pairs.prompts.device).split(512)
    with torch.no_grad():
        known = [torch.stack(answer_logprobs(reference, pairs, rows)) for rows in parts]
    reference_logprobs = torch.cat(known, 1)  # (2, N)

    def objective(model: RewardModel, pairs: RankedPairs, rows: Tensor) -> tuple[Tensor, Tensor]:
        now, then = answer_logprobs(model.trunk, pairs, rows), reference_logprobs[:, rows]
        gaps = (now[0] - then[0]) - (now[1] - then[1])
        return dpo_loss(*now, *then, beta=config.beta), gaps

    return train_reward(
        RewardModel(policy),
        pairs,
        config,
        generator=generator,
        progress=progress,
        objective=objective,
    )
