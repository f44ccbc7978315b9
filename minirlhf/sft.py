"""Supervised fine-tuning: the reference model learns the desk's demonstrations.

Cross-entropy on the response tokens only, EOS included: the model learns when to stop as it
learns what to say. What comes out is the policy PPO starts from and, frozen, the reference that
the KL penalty measures against. Left out: validation-based stopping (fresh demonstrations are
free here, so over-fitting is not the risk).

Source: Ouyang et al. (2022, arXiv 2203.02155, section 3.5).
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from minirlhf.config import SFTConfig
from minirlhf.engine.adamw import FlatAdamW, learning_rate
from minirlhf.model import Transformer, response_heads, token_logprobs


def train_sft(
    model: Transformer,
    prompts: Int[Tensor, "N P"],
    responses: Int[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    config: SFTConfig,
    *,
    generator: torch.Generator,
    progress: Callable[[int, int, dict[str, float]], None] = lambda step, total, metrics: None,
) -> list[dict[str, float]]:
    """Fit `model` in place to N prompts -> responses; one row of metrics per step.

    Raises FloatingPointError if the loss stops being finite.
    """
    # a short memory of squared gradients: the loss falls tenfold within the first 100 steps
    optimiser = FlatAdamW(model, lr=config.lr, betas=(0.9, 0.98))
    history: list[dict[str, float]] = []
    for step in range(config.steps):
        rows = torch.randint(len(prompts), (config.batch,), generator=generator)
        rows = rows.to(prompts.device)
        said = responses[rows]
        learnt = mask[rows]
        logits, _ = response_heads(model, prompts[rows], said, learnt)
        # a token counts the same in a short answer and in a long one
        loss = -token_logprobs(logits, said[learnt]).mean()
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"reference loss is {loss.item()} at step {step}; lower sft.lr ({config.lr})"
            )
        optimiser.lr = learning_rate(config.lr, step, config.steps)
        optimiser.zero_grad()
        loss.backward()
        optimiser.clip_grad(config.max_grad_norm)
        optimiser.step()
        history.append({"sft/loss_nats": loss.item()})
        progress(step + 1, config.steps, history[-1])
    return history
