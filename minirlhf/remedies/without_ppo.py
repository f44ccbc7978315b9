"""What people try in place of PPO: DPO on the pairs, and the best of n answers of the reference.

Each takes a prepared run and leaves its audits behind, as PPO does. Left out: why one would
(remedies/arms.py), and the loss of DPO (dpo.py).

Sources: Rafailov et al. (2023, arXiv 2305.18290); Stiennon et al. (2020, arXiv 2009.01325).
"""

import torch

from minirlhf.dpo import DPOConfig, train_dpo
from minirlhf.drift.run import Drift
from minirlhf.oracle.reweighted import best_of_n_kl_bound


def learn_directly(run: Drift) -> None:
    """DPO on the run's own pairs, from the reference."""
    run.audit(run.reference, 0)
    pairs = run.ruled(run.preferences.train).to(run.device)
    generator = run.generator("dpo")
    train_dpo(run.ppo.policy, run.reference, pairs, DPOConfig(), generator=generator)
    run.audit(run.ppo.policy, run.config.steps)


def choose_best(run: Drift, *, n: int = 16) -> None:
    """The best of `n` answers of the reference by the reward model, for every probe."""
    run.audit(run.reference, 0)
    prompts = run.auditor.prompts
    drawn = []
    masks = []
    rated = []
    for i in range(n):
        seed = run.stream(f"best of n {i}")
        responses, mask, _ = run.auditor.sample(run.reference, seed)
        drawn.append(responses)
        masks.append(mask)
        rated.append(run.ppo.reward_model(prompts, responses, mask))
    scores = torch.stack(rated)  # (n, probes)
    best = scores.argmax(0)
    rows = torch.arange(len(prompts), device=scores.device)
    responses = torch.stack(drawn)[best, rows]
    mask = torch.stack(masks)[best, rows]
    bound = best_of_n_kl_bound(n)  # no policy was trained whose KL could be measured
    run.audit((responses, mask, torch.full_like(scores[0], bound)), run.config.steps)


# What of a recipe each of them makes use of
USES = {
    learn_directly: {"pairs", "preferences", "sft"},
    choose_best: {"pairs", "fit", "scores", "preferences", "reward", "sft"},
}
