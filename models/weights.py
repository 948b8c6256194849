"""Find weights, read checkpoints, and turn them into artifacts."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from streamd.errors import ModelError
from streamd.models import BUILDERS, archive, artifact, coco
from streamd.models.download import Progress, fetch, progress_bar
from streamd.models.misfits import describe_misfits
from streamd.models.spec import Blueprint, MaskRule, ModelSpec, ResizeRule
from streamd.models.yolox import STRIDES, YOLOX

SHIPPED = Path(__file__).parents[1] / "configs" / "models"  # of streamd, where `configs` is linked
MASK_PREFIX = "masks."  # of the parameters that official checkpoints do not have
RELEASE_URL = "https://github.com/Megvii-BaseDetection/YOLOX/releases/download/0.1.1rc0"


@dataclass(frozen=True, slots=True)
class Release:
    """Weights published by the authors of a network."""

    url: str
    sha256: str
    coco_ap: float  # COCO val2017, AP 0.50:0.95, percent, as published
    licence: str = "Apache-2.0 (YOLOX, Megvii Inc.)"


RELEASES = {
    "yolox_nano": Release(
        f"{RELEASE_URL}/yolox_nano.pth", "cd28f55fbbc1829f99d9ac9b38a16d259a22889739c8728ea877610201feff7b", 25.8
    ),
    "yolox_tiny": Release(
        f"{RELEASE_URL}/yolox_tiny.pth", "9de513de589ac98bb92d3bca53b5af7b9acfa9b0bacb831f7999d0f7afaee8f0", 32.8
    ),
    "yolox_s": Release(
        f"{RELEASE_URL}/yolox_s.pth", "f55ded7181e1b0c13285c56e7790b8f0e8f8db590fe4edb37f0b7f345c913a30", 40.5
    ),
    "yolox_m": Release(
        f"{RELEASE_URL}/yolox_m.pth", "60076992b32da82951c90cfa7bd6ab70eba9eda243e08b940a396f60ac2d19b6", 46.9
    ),
    "yolox_l": Release(
        f"{RELEASE_URL}/yolox_l.pth", "1e6b7fa6240375370b2a8a8eab9066b3cdd43fd1d0bfa8d2027fd3a51def2917", 49.7
    ),
    "yolox_x": Release(
        f"{RELEASE_URL}/yolox_x.pth", "5652330b6ae860043f091b8f550a60c10e1129f416edfdb65c259be6caf355cf", 51.1
    ),
}


def locate(name_or_path: str | Path, *, download: bool = True, progress: Progress | None = None) -> Path:
    """Return the file that a model's name or path means: an artifact or a checkpoint. Raises ModelError."""
    path = Path(name_or_path)
    is_name = path.name == str(name_or_path) and path.suffix not in (".pt", ".pth") and not path.exists()
    return find(str(name_or_path), download=download, progress=progress) if is_name else path


def resolve(name_or_path: str | Path, *, download: bool = True, progress: Progress | None = None) -> Path:
    """Return the artifact for a model's name, a `.pt` artifact or a `.pth` checkpoint.

    A checkpoint is exported once and kept in the cache. Raises ModelError.
    """
    path = locate(name_or_path, download=download, progress=progress)
    if path.suffix != ".pth":
        artifact.read_spec(path)
        return path
    made_from = f"{_sha256(path)[:16]}-v{artifact.FORMAT}.pt"
    for kept in cache_directory().glob(f"*-{made_from}"):  # without reading the checkpoint again
        if _is_artifact(kept):
            return kept
    variant = identify(read_checkpoint(path), path)
    kept = cache_directory() / f"{variant}-{made_from}"
    export_checkpoint(variant, path, kept)
    return kept


def _is_artifact(path: Path) -> bool:
    try:
        artifact.read_spec(path)
    except ModelError:
        return False
    return True


def find(name: str, *, download: bool = True, progress: Progress | None = None) -> Path:
    """Return `<name>.pt` or `<name>.pth` from $STREAMD_MODELS or the cache, else fetch the official release.

    `progress` is told of the download; None draws a bar on stderr. Raises ModelError.
    """
    directories = model_directories()
    for directory in directories:
        for suffix in (".pt", ".pth"):
            path = directory / f"{name}{suffix}"
            if path.is_file():
                return path
    release = RELEASES.get(name)
    if release is None:
        searched = ", ".join(map(str, directories))
        here = sorted({found.stem for directory in directories for found in directory.glob("[!.]*.pt")})
        raise ModelError(
            f"{name}: no such model: looked for {name}.pt and {name}.pth in {searched}. "
            f"Give a path, put the file there, or use one of {', '.join(dict.fromkeys((*here, *RELEASES)))}"
        )
    path = cache_directory() / f"{name}.pth"
    if not download:
        raise ModelError(f"{name}: the weights are not on this machine. {_by_hand(release, path)}")
    _fetch_release(release, path, progress)
    return path


def _fetch_release(release: Release, path: Path, progress: Progress | None) -> None:
    try:
        with nullcontext(progress) if progress else progress_bar(path.name) as report:
            fetch(release.url, release.sha256, path, report)
    except ModelError as err:
        raise ModelError(f"{path.stem}: the weights could not be fetched: {err}. {_by_hand(release, path)}") from err


def _by_hand(release: Release, path: Path) -> str:
    return (
        f"Fetch {release.url} on a machine with a network, put it at {path} (or as {path.name} into a directory "
        f"named in $STREAMD_MODELS), and run the same command again"
    )


def model_directories() -> list[Path]:
    """List where models are looked for: $STREAMD_MODELS (several are separated by ':'), the cache, and what is shipped.

    The first is where one is published.
    """
    named = [Path(part).expanduser() for part in os.environ.get("STREAMD_MODELS", "").split(":") if part]
    return [*named, cache_directory(), SHIPPED]


def cache_directory() -> Path:
    """Say where fetched weights and exported artifacts are kept; it may not exist yet."""
    by_systemd = os.environ.get("CACHE_DIRECTORY", "").split(":")[0]
    if by_systemd:
        return Path(by_systemd) / "models"
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "streamd" / "models"


def export_checkpoint(
    variant: str,
    checkpoint_path: Path,
    out_path: Path,
    *,
    labels: Sequence[str] | None = None,
    num_prototypes: int = 0,
) -> ModelSpec:
    """Write the artifact of a checkpoint of `variant` and return its spec.

    `labels` may be left out for the 80 classes of COCO. `num_prototypes` adds a mask branch, untrained unless the
    checkpoint has one; a checkpoint's own branch is always kept. Raises ModelError.
    """
    if variant not in BUILDERS:
        raise ModelError(f"{variant}: no such network; the networks are {', '.join(BUILDERS)}")
    state = read_checkpoint(checkpoint_path)
    num_classes = _num_outputs(state, "head.cls_preds.0.weight") or len(coco.LABELS)
    num_prototypes = _num_outputs(state, "masks.coefficient_preds.0.weight") or num_prototypes
    labels = _labels(labels, num_classes, checkpoint_path)
    network = BUILDERS[variant](num_classes=num_classes, num_prototypes=num_prototypes)
    try:
        load_weights(network, state, allow_missing_prefixes=(MASK_PREFIX,))
    except ModelError as err:
        raise ModelError(f"{checkpoint_path}: not a checkpoint of {variant}: {err}") from err
    sha256 = _sha256(checkpoint_path)
    # Only the published file earned the published accuracy and is known to have this licence.
    release = next((release for release in RELEASES.values() if release.sha256 == sha256), None)
    spec = msgspec.structs.replace(
        yolox_spec(variant, network, labels),
        weights_sha256=sha256,
        licence=release.licence if release else "",
        metrics={"coco_ap_published": release.coco_ap} if release else {},
    )
    artifact.export(network, spec, out_path)
    return spec


def yolox_spec(variant: str, network: YOLOX, labels: Sequence[str]) -> ModelSpec:
    """Describe a YOLOX of BUILDERS."""
    return ModelSpec(
        name=variant,
        task="segment" if network.num_prototypes else "detect",
        labels=tuple(labels),
        input_size=network.input_size,
        size_multiple=STRIDES[-1],
        colour="bgr",
        resize=ResizeRule(anchor="top_left", pad=114.0),
        masks=MaskRule() if network.num_prototypes else None,
        blueprint=Blueprint(
            kind="yolox",
            variant=variant,
            numbers={
                "num_classes": network.num_classes,
                "num_prototypes": network.num_prototypes,
                "input_size": list(network.input_size),  # as it is read back
            },
        ),
    )


def _labels(labels: Sequence[str] | None, num_classes: int, path: Path) -> Sequence[str]:
    if labels is None and num_classes == len(coco.LABELS):
        return coco.LABELS
    if labels is None or len(labels) != num_classes:
        raise ModelError(
            f"{path}: has {num_classes} classes, so it needs {num_classes} label names, "
            f"got {'none' if labels is None else len(labels)}"
        )
    return labels


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Read the parameters of a checkpoint: a state dict, alone or under "ema", "model" or "state_dict".

    Nothing in the file is executed. Raises ModelError.
    """
    _need_file(path)
    if archive.is_zip(path):
        archive.check_sizes(path)
    try:
        with torch.serialization.safe_globals(_numpy_scalars()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as err:  # a foreign or damaged file can make the unpickler raise nearly anything
        raise ModelError(
            f"{path}: cannot be read as a checkpoint: it is truncated, from another program, "
            f"or holds more than tensors ({str(err).split('.')[0].strip() or type(err).__name__})"
        ) from err
    found = content if isinstance(content, dict) else {}
    for key in ("ema", "model", "state_dict"):
        if isinstance(found.get(key), dict):
            found = found[key]
            break
    if not found or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items()):
        raise ModelError(f'{path}: holds no state dict, neither alone nor under "ema", "model" or "state_dict"')
    return found


def _numpy_scalars() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """List what a pickled numpy number needs: YOLOX's trainer keeps the best AP beside the weights as one."""
    scalar: Any = np.float64(0).__reduce__()[0]
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")  # before and since numpy 2
    dtypes = [type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64)]
    return [*((scalar, name) for name in names), np.dtype, *dtypes]


def load_weights(network: nn.Module, state: dict[str, Tensor], allow_missing_prefixes: tuple[str, ...] = ()) -> None:
    """Copy a state dict into `network`; raise ModelError, and copy nothing, if they do not fit each other.

    Parameters that begin with one of `allow_missing_prefixes` may be missing and keep their values.
    """
    if misfits := describe_misfits(network.state_dict(), state, allow_missing_prefixes):
        raise ModelError(f"the parameters do not fit the network: {misfits}")
    network.load_state_dict(state, strict=False)


def identify(state: dict[str, Tensor], path: Path) -> str:
    """Say which YOLOX a checkpoint is of, by the width of its first convolution."""
    width = _num_outputs(state, "backbone.backbone.stem.conv.conv.weight")
    variants = {16: "yolox_nano", 24: "yolox_tiny", 32: "yolox_s", 48: "yolox_m", 64: "yolox_l", 80: "yolox_x"}
    if width not in variants:
        raise ModelError(f"{path}: not a checkpoint of a network that streamd knows ({', '.join(BUILDERS)})")
    return variants[width]


def _num_outputs(state: dict[str, Tensor], key: str) -> int:
    """Return the first dimension of a parameter, 0 if there is none of that name."""
    return state[key].shape[0] if key in state and state[key].ndim else 0


def _need_file(path: Path) -> None:
    if not path.is_file():
        raise ModelError(f"{path}: {'is a directory' if path.is_dir() else 'no such file'}; give a checkpoint (.pth)")


def _sha256(path: Path) -> str:
    _need_file(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
