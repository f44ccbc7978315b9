"""What people try in place of PPO: DPO on the pairs, and the best of n answers of the reference.

Each takes a prepared run and leaves its audits behind, as PPO does. Left out: why one would
(remedies/arms.py), and the loss of DPO (dpo.py).

Sources: Rafailov et al. (2023, arXiv 2305.18290); Stiennon et al. (2020, arXiv 2009.01325).
"""

import numpy as np
import torch

from minirlhf.dpo import DPOConfig, train_dpo
from minirlhf.drift.run import Drift


def learn_directly(run: Drift) -> None:
    """DPO on the run's own pairs, from the reference."""
    run.audit(run.reference, 0)
    pairs = run.ruled(run.preferences.train).to(run.device)
    given = (run.ppo.policy, run.reference, pairs, DPOConfig())
    train_dpo(*given, generator=run.generator("dpo"))
    run.audit(run.ppo.policy, run.config.steps)


def choose_best(run: Drift, *, n: int = 16) -> None:
    """The best of `n` answers of the reference by the reward model, for every probe."""
    auditor = run.auditor
    run.audit(run.reference, 0)
    seeds = [run.stream(f"best of n {i}") for i in range(n)]
    drawn = [auditor.sample(run.reference, seed)[:2] for seed in seeds]
    rated = torch.stack([run.ppo.reward_model(auditor.prompts, *each) for each in drawn])
    best, rows = rated.argmax(0), torch.arange(rated.shape[1], device=rated.device)
    said, mask = (torch.stack(part)[best, rows] for part in zip(*drawn, strict=True))
    bound = np.log(n) - (n - 1) / n  # Beirami et al. (2024, arXiv 2401.01879): KL is at most this
    run.audit((said, mask, torch.full_like(rated[0], bound)), run.config.steps)


# What of a recipe each of them makes use of
USES = {
    learn_directly: {"pairs", "preferences", "sft"},
    choose_best: {"pairs", "fit", "scores", "preferences", "reward", "sft"},
}
