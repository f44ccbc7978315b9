"""Columns for a paired timing against other PPO code: one PPO iteration, or one sampled batch.

`factory(shape)` and `sampling(shape)` return `once()`, which does the work of one call through
the public API and says what it did. `shape` has name, d_model, n_layer, n_head, vocab, batch,
prompt, response, epochs and minibatches. Weights are random; `eos_rate` is the chance that a
step ends its answer, which random weights would not give. Nothing is left out that a run does:
values, advantages, gradient clipping and metrics are in. Left out: what it means (README.md).
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minirlhf.engine import compute
from minirlhf.generate import sample
from minirlhf.model import Transformer, TransformerConfig
from minirlhf.ppo import PPO, PPOConfig
from minirlhf.reward import RewardModel
from minirlhf.text import EOS, PAD

Once = Callable[[], dict[str, Any]]


def transformer(shape: Any, seed: int) -> Transformer:
    """A model of `shape` with random weights and a scalar head that is not 0."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (shape.vocab, shape.prompt + shape.response, shape.d_model)
    model = Transformer(TransformerConfig(*sizes, shape.n_layer, shape.n_head), generator=generator)
    scalar = torch.randn(model.scalar.weight.shape, generator=generator) * 0.02
    with torch.no_grad():
        model.scalar.weight.copy_(scalar)
    return model


@torch.no_grad()
def end_at(model: Transformer, eos_rate: float) -> Transformer:
    """Make EOS about this likely at each step (0: never), and padding never.

    The first channel of the final state becomes a constant 1 that only the rows of EOS and PAD
    read, so the logits of the other words do not know of it.
    """
    words = model.config.vocab_size - 2
    model.tokens.weight.mul_(0.02 / model.tokens.weight.std())  # near-uniform over the others
    model.final_norm.weight[0], model.final_norm.bias[0] = 0.0, 1.0
    model.tokens.weight[:, 0] = 0.0
    model.tokens.weight[[EOS, PAD]] = 0.0
    model.tokens.weight[PAD, 0] = -20.0
    odds = math.log(eos_rate * words / (1 - eos_rate)) if eos_rate else -20.0
    model.tokens.weight[EOS, 0] = odds
    return model


def prompt_table(shape: Any, rows: int) -> Tensor:
    """Random full-length prompts [rows, P] without special tokens."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, shape.vocab, (rows, shape.prompt), generator=generator)


def factory(shape: Any, *, eos_rate: float = 0.0) -> Once:
    """One whole PPO.step() a call: rollout, scores, advantages, epochs x minibatches updates.

    Threads given to torch become cores of ours: chunks side by side, one thread an operation.
    """
    compute.use(torch.get_num_threads())
    policy = end_at(transformer(shape, 0), eos_rate)
    config = PPOConfig(
        batch=shape.batch,
        max_new_tokens=shape.response,
        epochs=shape.epochs,
        minibatches=shape.minibatches,
        lr=1e-6,  # the rate of EOS stays where it was set
        value_clip=0.2,
    )
    run = PPO(
        policy,
        copy.deepcopy(policy),
        RewardModel(transformer(shape, 1)).score,
        prompt_table(shape, 4 * shape.batch),
        config,
    )

    def once() -> dict[str, Any]:
        metrics, rollout = run.step()
        phases = {name: metrics[f"seconds/{name}"] for name in ("rollout", "scoring", "update")}
        return {"tokens": int(rollout.mask.sum()), "phases": phases}

    return once


def sampling(shape: Any, *, eos_rate: float = 0.0) -> Once:
    """One batch of answers a call, with the log-probs and values that PPO needs of them."""
    model, prompts = end_at(transformer(shape, 0), eos_rate), prompt_table(shape, shape.batch)
    generator = torch.Generator().manual_seed(0)

    def once() -> dict[str, Any]:
        answers = sample(
            model, prompts, max_new_tokens=shape.response, eos=EOS, generator=generator
        )
        return {"tokens": int(answers.mask.sum())}

    return once
