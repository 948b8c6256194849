"""Networks of Detectron2, from its own configurations and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
from torch import nn

from streamd.errors import ModelError
from streamd.models import panoptic, proposal_network, rcnn, retinanet, semantic, vitdet
from streamd.models.importers import checkpoint, config
from streamd.models.importers.checkpoint import Checkpoint
from streamd.models.importers.config import Config
from streamd.models.spec import Blueprint, ModelSpec

# By MODEL.META_ARCHITECTURE.
FAMILIES: dict[str, Callable[[Config], tuple[nn.Module, ModelSpec]]] = {
    "GeneralizedRCNN": rcnn.build,
    "PanopticFPN": panoptic.build,
    "ProposalNetwork": proposal_network.build,
    "RetinaNet": retinanet.build,
    "SemanticSegmentor": semantic.build,
}


def load(config_path: Path, weights_path: Path, labels: Sequence[str] | None = None) -> tuple[nn.Module, ModelSpec]:
    """Build the network of a configuration with the weights of a `.pkl` or `.pth`, ready for inference.

    Without `labels` they are those of the data set that the configuration names, if they are known and as many, else
    class_0, class_1, ... A `.json` in the place of a configuration describes a ViTDet. Raises ModelError.
    """
    if config_path.suffix == ".json":
        return load_vitdet(config_path, weights_path, labels)
    network, spec = build(config_path)
    weights = checkpoint.read(weights_path)
    checkpoint.load(network, weights)
    return network.eval(), _complete(spec, weights, labels)


def load_vitdet(
    architecture_path: Path, weights_path: Path, labels: Sequence[str] | None = None
) -> tuple[nn.Module, ModelSpec]:
    """Build a ViTDet as `load` does, from a JSON file in the place of a configuration, which Detectron2 has in Python.

    Raises ModelError.
    """
    architecture = vitdet.read(architecture_path)
    weights = checkpoint.read(weights_path)
    try:
        network, spec = vitdet.build(architecture, weights.state)
    except ModelError as err:
        raise ModelError(f"{architecture_path} with {weights_path}: {err}") from err
    checkpoint.load(network, weights)
    described = Blueprint(kind="vitdet", numbers=msgspec.to_builtins(architecture))
    return network.eval(), _complete(msgspec.structs.replace(spec, blueprint=described), weights, labels)


def build(config_path: Path) -> tuple[nn.Module, ModelSpec]:
    """Build the network of a configuration, untrained. Raises ModelError."""
    given = config.read(config_path)
    family = given["MODEL"]["META_ARCHITECTURE"]
    if family not in FAMILIES:
        raise ModelError(f"{config_path}: MODEL.META_ARCHITECTURE is {family!r}; streamd builds {', '.join(FAMILIES)}")
    try:
        network, spec = FAMILIES[family](given)
    except KeyError as err:
        raise ModelError(f"{config_path}: no network can be made of it: nothing in it is called {err}") from err
    except (ModelError, ValueError, TypeError, IndexError) as err:  # words and numbers that do not fit each other
        raise ModelError(f"{config_path}: no network can be made of it: {err}") from err
    return network, msgspec.structs.replace(spec, blueprint=Blueprint(kind="detectron2", numbers=given))


def _complete(spec: ModelSpec, weights: Checkpoint, labels: Sequence[str] | None) -> ModelSpec:
    if labels is not None and len(labels) != len(spec.labels):
        raise ModelError(
            f"{weights.path}: has {len(spec.labels)} classes, so it needs as many labels, got {len(labels)}"
        )
    return msgspec.structs.replace(
        spec, labels=spec.labels if labels is None else tuple(labels), weights_sha256=weights.sha256
    )
