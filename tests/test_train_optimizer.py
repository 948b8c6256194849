"""Tests of streamd/train/optimizer.py."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from streamd.errors import ConfigError
from streamd.train.optimizer import Average, lr_part, make_optimizer, restore, set_lr
from streamd.train.recipe import OptimizerRecipe


class Vision(nn.Module):
    """The names of a vision transformer with a head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.ModuleDict(
            {
                "net": nn.ModuleDict(
                    {"patch": nn.Linear(2, 2), "blocks": nn.ModuleList(nn.Linear(2, 2) for _ in range(3))}
                )
            }
        )
        self.head = nn.Linear(2, 2)


def factors(network: nn.Module, recipe: OptimizerRecipe) -> dict[str, float]:
    optimizer = make_optimizer(network, recipe)
    by_id = {id(parameter): group["factor"] for group in optimizer.param_groups for parameter in group["params"]}
    return {name: by_id[id(parameter)] for name, parameter in network.named_parameters()}


def test_rate_rises_linearly_and_falls_along_a_cosine() -> None:
    parts = [lr_part(step, 100, 10, 0.1) for step in range(100)]
    assert parts[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert parts[10] == 1.0
    assert parts[55] == pytest.approx(0.1 + 0.9 * 0.5)
    assert parts[99] == pytest.approx(0.1, abs=1e-3)
    assert all(a >= b for a, b in itertools.pairwise(parts[10:]))


def test_rate_without_warm_up_begins_at_its_highest() -> None:
    assert lr_part(0, 10, 0, 0.0) == 1.0


def test_longest_prefix_decides_the_rate() -> None:
    recipe = OptimizerRecipe(lr_factors={"backbone": 0.1, "backbone.net.blocks": 0.5})
    found = factors(Vision(), recipe)
    assert found["head.weight"] == 1.0
    assert found["backbone.net.patch.weight"] == 0.1
    assert found["backbone.net.blocks.0.weight"] == 0.5


def test_each_block_of_a_transformer_has_less_of_the_rate_than_the_next() -> None:
    found = factors(Vision(), OptimizerRecipe(kind="adamw", layer_decay=0.5))
    assert found["head.bias"] == 1.0
    assert [found[f"backbone.net.blocks.{i}.weight"] for i in range(3)] == [0.5**3, 0.5**2, 0.5]
    assert found["backbone.net.patch.weight"] == 0.5**4


def test_biases_and_scales_do_not_decay() -> None:
    optimizer = make_optimizer(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), OptimizerRecipe(weight_decay=0.1))
    decays = {
        parameter.ndim: group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]
    }
    assert decays == {4: 0.1, 1: 0.0}


def test_frozen_parameters_have_no_optimiser() -> None:
    network = nn.Linear(2, 2)
    network.bias.requires_grad_(False)
    optimizer = make_optimizer(network, OptimizerRecipe())
    assert [parameter.ndim for group in optimizer.param_groups for parameter in group["params"]] == [2]
    set_lr(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5]


def test_unknown_prefix_is_refused() -> None:
    with pytest.raises(ConfigError, match="'bakbone'"):
        make_optimizer(Vision(), OptimizerRecipe(lr_factors={"bakbone": 0.1}))


def test_average_follows_the_weights_and_copies_counts() -> None:
    network = nn.BatchNorm1d(2)
    average = Average(network, decay=0.5)
    with torch.no_grad():
        network.weight.fill_(3.0)
    network(torch.randn(4, 2))
    average.update(network, step=10**6)
    assert average.network.get_parameter("weight").tolist() == [2.0, 2.0]
    assert average.network.num_batches_tracked == 1
    assert not average.network.training and not average.network.get_parameter("weight").requires_grad


def test_average_follows_fast_at_first() -> None:
    network = nn.Linear(1, 1)
    average = Average(network, decay=0.999)
    start = network.weight.item()
    with torch.no_grad():
        network.weight += 1.0
    average.update(network, step=0)
    assert math.isclose(average.network.get_parameter("weight").item(), start + 0.9, rel_tol=1e-5)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_run_goes_on_alike_where_the_weights_lie_otherwise_in_memory(kind: str, layout: torch.memory_format) -> None:
    def steps(network: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor) -> None:
        for image in images:
            optimizer.zero_grad()
            network(image).square().mean().backward()
            optimizer.step()

    torch.manual_seed(0)
    chosen = OptimizerRecipe.model_validate({"kind": kind, "lr": 0.01})
    images = torch.randn(4, 1, 5, 9, 9)
    network = nn.Conv2d(5, 8, 3)
    optimizer = make_optimizer(network, chosen)
    steps(network, optimizer, images[:2])
    other = copy.deepcopy(network).to(memory_format=layout)
    resumed = make_optimizer(other, chosen)
    restore(resumed, copy.deepcopy(optimizer.state_dict()))
    steps(network, optimizer, images[2:])
    steps(other, resumed, images[2:])
    torch.testing.assert_close(other.weight, network.weight)
