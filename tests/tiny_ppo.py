"""PPO on three prompts of a tiny language."""

import torch
from torch import Tensor

from minirlhf.ppo import PPOConfig
from minirlhf.text import left_pad

# one prompt holds an EOS of its own, which must not count as the end of an answer
PROMPTS = left_pad([[3, 2], [1, 4, 2], [4, 4, 3, 2]])

SMALL = PPOConfig(batch=16, max_new_tokens=5, lr=1e-3)


def likes_threes(prompts: Tensor, responses: Tensor, mask: Tensor) -> Tensor:
    return ((responses == 3) & mask).sum(-1).float()


def weights(model: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def untimed(metrics: dict[str, float]) -> dict[str, float]:
    return {k: v for k, v in metrics.items() if not k.startswith("seconds/")}
