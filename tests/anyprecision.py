"""AnyPrecisionAdamW in PyTorch's operators: AdamW whose moments and Kahan buffer have formats of their own.

Written from the algorithm of torchdistx, which is not on a package index: moments and weights are each changed
in place, in their own formats, and the bias corrections are float32 tensors.
"""

import dataclasses
from typing import Any

import torch


@dataclasses.dataclass
class AnyPrecisionAdamW:
    """One weight tensor and its state.

    Attributes:
        weight: changed by every step.
        beta1, beta2, epsilon, weight_decay: Python numbers.
        first, second: dtypes of the moments.
        kahan: what rounding the weight loses is kept, in the weight's dtype, and added to the next update.
    """

    weight: torch.Tensor
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    first: torch.dtype
    second: torch.dtype
    kahan: bool

    def __post_init__(self) -> None:
        like: Any = torch.zeros_like
        self.state = {
            "exp_avg": like(self.weight, dtype=self.first),
            "exp_avg_sq": like(self.weight, dtype=self.second),
        }
        if self.kahan:
            self.state["compensation"] = like(self.weight)
        self.count = torch.zeros(())

    @torch.no_grad()
    def step(self, gradient: torch.Tensor, rate: float) -> None:
        m, v, c = (self.state.get(name) for name in ("exp_avg", "exp_avg_sq", "compensation"))
        self.count += 1
        if self.weight_decay:
            self.weight.mul_(1 - rate * self.weight_decay)
        m.mul_(self.beta1)
        m.add_(gradient, alpha=1 - self.beta1)
        v.mul_(self.beta2)
        v.addcmul_(gradient, gradient, value=1 - self.beta2)
        size = rate / (1 - self.beta1**self.count)
        divisor = v.sqrt() / (1 - self.beta2**self.count) ** 0.5
        divisor.add_(self.epsilon)
        if c is None:
            self.weight.addcdiv_(m, divisor, value=-size)
            return
        c.addcdiv_(m, divisor, value=-size)
        before = self.weight.clone()
        self.weight.add_(c)
        c.add_(before - self.weight)
