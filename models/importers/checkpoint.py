"""Read the weights of other projects' files and fit their names to a network of streamd."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from streamd.errors import ModelError
from streamd.models import archive
from streamd.models.importers import caffe2, pickles
from streamd.models.layers import FrozenBatchNorm2d
from streamd.models.weights import load_weights, read_checkpoint


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """Weights by name."""

    path: Path
    sha256: str  # of the file
    state: dict[str, Tensor]
    is_partial: bool = False  # names lack what comes before the part, such as `backbone.bottom_up.`


def read(path: Path) -> Checkpoint:
    """Read a `.pkl` as Detectron2's zoo has them, or a `.pth` as it trains them. Raises ModelError.

    Nothing in the file is executed.
    """
    if path.suffix == ".pkl" and not archive.is_zip(path):
        content = pickles.read(path)
        state = {name: torch.from_numpy(array) for name, array in content.arrays.items()}
        state = caffe2.rename(state) if content.is_caffe2 else state
        is_partial = content.is_partial
    else:
        state, is_partial = read_checkpoint(path), False
    with path.open("rb") as file:
        return Checkpoint(path, hashlib.file_digest(file, "sha256").hexdigest(), state, is_partial)


def load(network: nn.Module, checkpoint: Checkpoint) -> None:
    """Copy the weights into `network`; raise ModelError, which lists what does not fit, and copy nothing then."""
    _copy(network, checkpoint, allow_missing_prefixes=())


def load_pretrained(network: nn.Module, checkpoint: Checkpoint) -> None:
    """Copy the weights of an image classifier, which training starts from, to where `network` has their like.

    Its other parameters keep their values. Raises ModelError if weights find no place.
    """
    _copy(network, replace(checkpoint, is_partial=True), allow_missing_prefixes=("",))


def _copy(network: nn.Module, checkpoint: Checkpoint, allow_missing_prefixes: tuple[str, ...]) -> None:
    own = network.state_dict().keys()
    state = checkpoint.state
    if checkpoint.is_partial:
        state = _add_statistics(_lengthen_names(state, own), network)
    state = {name: value for name, value in state.items() if name in own or not _is_superfluous(name)}
    for name in own:
        if name.endswith("num_batches_tracked") and name.replace("num_batches_tracked", "running_mean") in state:
            state.setdefault(name, torch.tensor(0))  # counts steps of training; weights that are arrays lack it
    try:
        load_weights(network, state, allow_missing_prefixes)
    except ModelError as err:
        raise ModelError(f"{checkpoint.path}: {err}") from err


def _is_superfluous(name: str) -> bool:
    """Say whether older versions of Detectron2 kept a constant of the configuration by this name."""
    return (
        name in ("pixel_mean", "pixel_std")
        or "anchor_generator.cell_anchors" in name
        or name.endswith(".num_batches_tracked")
    )


def _lengthen_names(state: Mapping[str, Tensor], own: Iterable[str]) -> dict[str, Tensor]:
    """Call weights by those of the names `own` that end with theirs; the longest such end counts."""
    lengthened = dict(state)
    for name in own:
        parts = name.split(".")
        ends = (".".join(parts[start:]) for start in range(len(parts)))
        if (end := next((end for end in ends if end in lengthened), None)) is not None:
            lengthened[name] = lengthened.pop(end)
    return lengthened


def _add_statistics(state: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Add the mean and variance of batch norms of which Caffe2 kept scale and shift alone."""
    added = dict(state)
    for name, module in network.named_modules():
        scale = state.get(f"{name}.weight")
        if isinstance(module, FrozenBatchNorm2d) and scale is not None:
            added.setdefault(f"{name}.running_mean", torch.zeros_like(scale))
            added.setdefault(f"{name}.running_var", torch.ones_like(scale))
    return added
