"""AdamW over one flat vector: all parameters of a model live in one buffer, as do gradients.

At this size a step is bound by the number of calls, not by arithmetic, and importing
torch.optim's AdamW costs more than a second of start-up; one vector needs ten calls and nothing
imported. Tested to agree with torch.optim.AdamW. Left out: parameter groups.

Sources: Kingma and Ba (2015, arXiv 1412.6980, algorithm 1); Loshchilov and Hutter (2019, arXiv
1711.05101, algorithm 2).
"""

import torch
from torch import Tensor, nn


def learning_rate(peak: float, step: int, total: int) -> float:
    """The rate of step 0 .. total - 1: up to `peak` in the first tenth, then linearly to 0.

    The warm-up matters most for a trunk that knows something: Adam's first steps are all of size
    lr, whatever the gradient, and would undo it.
    """
    warm_up = max(1, total // 10)
    rising = (step + 1) / warm_up
    falling = (total - step) / (total - warm_up + 1)
    return peak * min(rising, falling)


class FlatAdamW:
    """AdamW whose parameters and gradients are views of two flat vectors."""

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        self.lr = lr
        self.betas = betas
        self.eps = eps
        self.weight_decay = weight_decay
        self.steps = 0

        parameters = list(model.parameters())
        self.flat = torch.cat([p.detach().flatten() for p in parameters])
        self.grad = torch.zeros_like(self.flat)
        self.mean = torch.zeros_like(self.flat)  # of gradients: the first moment m
        self.square = torch.zeros_like(self.flat)  # of their squares: the second, v

        # from here on the model computes with windows into the two vectors
        start = 0
        for p in parameters:
            window = slice(start, start + p.numel())
            p.data = self.flat[window].view_as(p)
            p.grad = self.grad[window].view_as(p)
            start = window.stop

    def zero_grad(self) -> None:
        """Clear the gradients in place; backward() then adds into the flat vector."""
        self.grad.zero_()

    def clip_grad(self, max_norm: float | None) -> Tensor:
        """Scale the gradient down to max_norm if it is longer (None: never); its norm before."""
        norm = self.grad.norm()
        if max_norm is not None:
            # 1e-6 as in torch's clip_grad_norm_; a tensor, so that nothing waits for its value
            shrink = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            self.grad.mul_(shrink)
        return norm

    @torch.no_grad()
    def step(self) -> None:
        """One AdamW update from the gradients gathered since zero_grad()."""
        self.steps += 1
        b1, b2 = self.betas
        self.mean.lerp_(self.grad, 1 - b1)
        self.square.mul_(b2)
        self.square.addcmul_(self.grad, self.grad, value=1 - b2)
        # both moments began at 0 and are too small by these factors (Kingma and Ba, section 3)
        scale = self.lr / (1 - b1**self.steps)
        denominator = (self.square / (1 - b2**self.steps)).sqrt_()
        denominator.add_(self.eps)
        # decay apart from the gradient, so that Adam does not rescale it: the W of AdamW
        if self.weight_decay:
            self.flat.mul_(1 - self.lr * self.weight_decay)
        self.flat.addcdiv_(self.mean, denominator, value=-scale)

    def state_dict(self) -> dict[str, Tensor]:
        """Moments and step count, as tensors (for safetensors)."""
        return {
            "mean": self.mean.clone(),
            "square": self.square.clone(),
            "steps": torch.tensor(self.steps),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what state_dict() gave; later steps are then equal bit for bit."""
        self.mean.copy_(state["mean"])
        self.square.copy_(state["square"])
        self.steps = int(state["steps"])
