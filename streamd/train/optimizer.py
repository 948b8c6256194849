"""The optimiser of a recipe, its learning rate over time, and the averaged weights."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from streamd.errors import ConfigError
from streamd.train.recipe import OptimizerRecipe

_NO_DECAY_NDIM = 1  # biases, and the scales of norms
_BLOCK = re.compile(r"\bblocks\.(\d+)\.")


def make_optimizer(network: nn.Module, recipe: OptimizerRecipe) -> torch.optim.Optimizer:
    """Build the optimiser; each of its groups has `factor`, its part of the learning rate. Raises ConfigError."""
    named = [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]
    for prefix in recipe.lr_factors:
        if not any(name.startswith(prefix) for name, _ in named):
            raise ConfigError(f"optimizer.lr_factors: no trained parameter begins with {prefix!r}")
    num_blocks = 1 + max((int(found[1]) for name, _ in named if (found := _BLOCK.search(name))), default=-1)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in named:
        factor = _factor(name, recipe) * recipe.layer_decay ** _depth_below(name, num_blocks)
        groups.setdefault((factor, parameter.ndim > _NO_DECAY_NDIM), []).append(parameter)
    listed: list[dict[str, Any]] = [
        {"params": group, "factor": factor, "weight_decay": recipe.weight_decay if decays else 0.0}
        for (factor, decays), group in groups.items()
    ]
    # Fused: one pass over the weights instead of one for each operation, on a CPU as on a GPU.
    if recipe.kind == "adamw":
        return torch.optim.AdamW(listed, lr=recipe.lr, betas=(recipe.momentum, 0.999), fused=True)
    return torch.optim.SGD(listed, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.momentum > 0, fused=True)


def restore(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load what `optimizer.state_dict()` gave, also where the weights lay otherwise in memory.

    A fused step takes a weight and what belongs to it as they lie there, element by element: it looks at no strides.
    """
    optimizer.load_state_dict(state)
    for parameter, own in optimizer.state.items():
        for name, value in own.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                own[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _factor(name: str, recipe: OptimizerRecipe) -> float:
    prefixes = [prefix for prefix in recipe.lr_factors if name.startswith(prefix)]
    return recipe.lr_factors[max(prefixes, key=len)] if prefixes else 1.0


def _depth_below(name: str, num_blocks: int) -> int:
    """Count the steps of decay of a parameter: 0 behind the blocks of a vision transformer, most before them."""
    if not num_blocks or not name.startswith("backbone.net."):
        return 0
    found = _BLOCK.search(name)
    return num_blocks - int(found[1]) if found else num_blocks + 1


def lr_part(step: int, num_steps: int, num_warmup: int, final: float) -> float:
    """Return the learning rate of a step, from 0, as a part of the highest one.

    Linear from 0, then half a cosine (SGDR, arXiv:1608.03983) to `final`.
    """
    if step < num_warmup:
        return (step + 1) / num_warmup
    done = (step - num_warmup) / max(1, num_steps - num_warmup)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give each group its part of `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["factor"]


class Average:
    """An exponential moving average of a network's weights (arXiv:2306.00418, section 2), with its own copy."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self._decay = decay

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Move towards the weights after `step`; statistics of norms move alike, counts are copied."""
        decay = min(self._decay, (1 + step) / (10 + step))  # early weights are far from where they will be
        own, theirs = list(_tensors(self.network)), list(_tensors(network))
        floats = [index for index, tensor in enumerate(own) if tensor.is_floating_point()]
        torch._foreach_lerp_([own[i] for i in floats], [theirs[i].detach() for i in floats], 1 - decay)
        for mine, other in zip(own, theirs, strict=True):
            if not mine.is_floating_point():
                mine.copy_(other)


def _tensors(network: nn.Module) -> Iterable[Tensor]:
    return network.state_dict(keep_vars=True).values()
