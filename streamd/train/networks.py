"""The network that training starts from, made for the classes of a data set."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch
from torch import Tensor, nn

from streamd.datasets.records import DataSet
from streamd.errors import ConfigError, ModelError
from streamd.models import BUILDERS, artifact, deeplab, rebuild, weights
from streamd.models.importers import checkpoint, detectron2
from streamd.models.importers import torchvision as importer
from streamd.models.rebuild import Names
from streamd.models.spec import Blueprint, ModelSpec
from streamd.train.recipe import ModelRecipe

Batch = TypeVar("Batch")

_NONE = "none"  # `weights: none`


@dataclass(frozen=True, slots=True, eq=False)
class Start:
    """What a run begins with."""

    network: nn.Module
    spec: ModelSpec
    num_carried: int  # parameters and buffers that come from the weights named
    fresh: tuple[str, ...]  # those that begin with random values


@dataclass(frozen=True, slots=True, eq=False)
class _Source:
    spec: ModelSpec
    state: Mapping[str, Tensor]  # empty: random weights


def start(recipe: ModelRecipe, dataset: DataSet) -> Start:
    """Build the network of `recipe` for the names of `dataset`; classes that its weights know keep what they learnt.

    Raises ConfigError and ModelError.
    """
    source = _find(recipe)
    blueprint = source.spec.blueprint
    if blueprint is None:
        raise ModelError(
            f"{recipe.start}: does not say how its network was built, so it cannot be trained; "
            "import or export it again with this streamd"
        )
    old = Names.of(source.spec)
    new = _names(source.spec, dataset)
    blueprint = rebuild.rename(_with_options(blueprint, recipe), new)
    network, built = rebuild.build(blueprint, rebuild.shapes_for(source.state, old, new))
    fresh = network.state_dict()
    state = rebuild.carry_over(source.state, old, new, fresh) if source.state else fresh
    network.load_state_dict(state)
    not_carried = tuple(name for name in fresh if state[name] is fresh[name])
    if recipe.backbone_weights:
        checkpoint.load_pretrained(network, checkpoint.read(Path(recipe.backbone_weights)))
    spec = msgspec.structs.replace(
        _resized(source.spec, recipe.input_size),
        blueprint=blueprint,
        masks=source.spec.masks or built.masks,
        metrics={},
    )
    if built.masks and spec.task == "detect":
        spec = msgspec.structs.replace(spec, task="segment")
    return Start(network, rebuild.rename_spec(spec, new), len(fresh) - len(not_carried), not_carried)


def _names(spec: ModelSpec, dataset: DataSet) -> Names:
    if spec.task == "semantic":
        return Names(dataset.stuff_labels)
    return Names(
        dataset.labels,
        dataset.keypoint_names if spec.keypoints else (),
        dataset.stuff_labels if spec.panoptic else (),
    )


def _find(recipe: ModelRecipe) -> _Source:
    name, suffix = recipe.start, Path(recipe.start).suffix
    if suffix in (".yaml", ".yml", ".json"):
        return _of_detectron2(Path(name), recipe.weights)
    if name in importer.NAMES or name in deeplab.VARIANTS:
        network, spec = importer.load(name, None if recipe.weights == _NONE else recipe.weights)
        return _Source(spec, network.state_dict() if recipe.weights not in (None, _NONE) else {})
    if recipe.weights not in (None, _NONE):
        raise ConfigError(
            f"model.weights is {recipe.weights!r}, but {name} brings its own; name that checkpoint as model.start"
        )
    if recipe.weights == _NONE and name in BUILDERS:
        network = BUILDERS[name]()
        return _Source(weights.yolox_spec(name, network, [f"class_{i}" for i in range(network.num_classes)]), {})
    path = weights.resolve(name)
    spec = artifact.read_spec(path)
    return _Source(spec, {} if recipe.weights == _NONE else artifact.read_state(path))


def _of_detectron2(config: Path, weights_path: str | None) -> _Source:
    if weights_path in (None, _NONE):
        if config.suffix == ".json":
            raise ConfigError(f"{config}: a ViTDet needs model.weights, whose shapes say how wide it is")
        _, spec = detectron2.build(config)
        return _Source(spec, {})
    network, spec = detectron2.load(config, Path(str(weights_path)))
    return _Source(spec, network.state_dict())


def _with_options(blueprint: Blueprint, recipe: ModelRecipe) -> Blueprint:
    numbers: dict[str, Any] = dict(blueprint.numbers)
    if blueprint.kind == "yolox":
        numbers["num_prototypes"] = recipe.prototypes or numbers["num_prototypes"]
        numbers["input_size"] = recipe.input_size or numbers["input_size"]
    elif recipe.prototypes:
        raise ConfigError(f"model.prototypes is for YOLOX alone; {recipe.start} is another network")
    if blueprint.kind == "vitdet" and recipe.input_size:
        raise ConfigError("model.input_size cannot be given for a ViTDet, whose positions are for one size")
    return msgspec.structs.replace(blueprint, numbers=numbers)


def _resized(spec: ModelSpec, input_size: tuple[int, int] | None) -> ModelSpec:
    if input_size is None:
        return spec
    if any(side % spec.size_multiple for side in input_size):
        raise ConfigError(f"model.input_size is {list(input_size)}: both must be multiples of {spec.size_multiple}")
    resize = spec.resize
    if resize.kind == "shortest_edge":
        resize = msgspec.structs.replace(resize, min_size=min(input_size), max_size=max(input_size))
    return msgspec.structs.replace(spec, input_size=input_size, resize=resize)


def freeze(network: nn.Module, recipe: ModelRecipe, fresh: Collection[str] = ()) -> list[nn.Module]:
    """Stop the gradients of what the recipe freezes, and return the batch norms whose statistics are to stay.

    `fresh` are the parameters that began with random values. Raises ConfigError for a name that nothing begins with.
    """
    names = [name for name, _ in network.named_parameters()]
    prefixes = tuple(recipe.freeze)
    for prefix in prefixes:
        if not any(name.startswith(prefix) for name in names):
            stems = sorted({name.split(".")[0] for name in names})
            raise ConfigError(f"model.freeze: no parameter begins with {prefix!r}; they begin with {', '.join(stems)}")
    for name, parameter in network.named_parameters():
        if name.startswith(prefixes):
            parameter.requires_grad_(False)
    frozen: list[nn.Module] = []
    for name, module in network.named_modules():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            continue
        was_carried = f"{name}.running_mean" not in fresh
        if name.startswith(prefixes) or (recipe.norms == "freeze" and was_carried):
            frozen.append(module.requires_grad_(False))
    return frozen


def norms(network: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """List the batch norms that have statistics to learn."""
    return [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


@torch.no_grad()
def recalibrate(network: nn.Module, forward: Callable[[Batch], object], batches: Iterable[Batch]) -> int:
    """Give batch norms that were folded into a bias the statistics of `batches`; return how many there were.

    `forward` takes a batch through the network.

    A folded one has mean 0 and one variance for all channels. Afterwards it has those of its input, and a scale and
    shift with which it computes what it did before: weight = s, bias = old bias + mean, where s is the deviation (with
    epsilon taken into account).
    """
    folded = [norm for norm in norms(network) if _is_folded(norm)]
    sums: dict[nn.Module, list[Tensor]] = {norm: [] for norm in folded}

    def collect(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].double()
        dims = [dim for dim in range(x.ndim) if dim != 1]
        sums[module].append(torch.stack((x.mean(dims), x.square().mean(dims))))

    handles = [norm.register_forward_pre_hook(collect) for norm in folded]
    network.eval()
    for batch in batches:
        forward(batch)
    for handle in handles:
        handle.remove()
    for norm in folded:
        mean, square = torch.stack(sums[norm]).mean(0)
        variance = square - mean.square()
        assert norm.running_mean is not None and norm.running_var is not None
        scale = norm.weight / (norm.running_var[0] + norm.eps).sqrt()
        norm.bias.add_((scale * mean).float())
        norm.weight.copy_(scale * (variance + norm.eps).sqrt())
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
    return len(folded)


def _is_folded(norm: nn.modules.batchnorm._BatchNorm) -> bool:
    if norm.running_mean is None or norm.running_var is None:
        return False
    # 1, or 1 - epsilon, with which the norm adds its bias and does nothing else.
    return not norm.running_mean.any() and bool((norm.running_var == norm.running_var[0]).all())
