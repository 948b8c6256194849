"""Detectors of Hugging Face's transformers, which is an optional extra: pip install 'streamd[hf]'."""

from __future__ import annotations

import hashlib
import importlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from streamd.errors import ModelError
from streamd.models.detr import Detr
from streamd.models.misfits import list_names
from streamd.models.spec import ModelSpec, NmsRule, ResizeRule, just_above

FAMILIES = ("rt_detr", "rt_detr_v2", "d_fine", "rf_detr")  # the `model_type` of a config.json
SCORE_THRESHOLD = 0.5  # of transformers' own post-processing
_WEIGHTS_FILE = "model.safetensors"


def load(source: str, labels: Sequence[str] | None = None) -> tuple[Detr, ModelSpec]:
    """Build a network with the weights of a repository on the hub, or of a directory, ready for inference.

    Weights are read from safetensors alone, and no code that lies beside them runs. Without `labels` they are those of
    the configuration. Raises ModelError.
    """
    network, processor, report, weights = _read(source)
    wrong = {what: sorted(map(str, keys)) for what, keys in report.items() if keys}
    if wrong:
        listed = "; ".join(
            f"{len(keys)} {what.replace('_', ' ')} ({', '.join(list_names(keys))})" for what, keys in wrong.items()
        )
        raise ModelError(f"{source}: the weights do not fit the configuration: {listed}")
    with weights.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return wrap(network, processor, name=Path(source).name, labels=labels, sha256=sha256)


def _read(source: str) -> tuple[nn.Module, Any, dict[str, set[Any]], Path]:
    """Return the network, its image processor, which weights did not fit, and the file of the weights."""
    transformers = _transformers()
    log = transformers.utils.logging
    verbosity = log.get_verbosity()
    log.set_verbosity_error()  # a table of the weights that do not fit, which the caller says in one line
    try:
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
        _check_family(config.model_type, source)
        processor = transformers.AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
        network, report = transformers.AutoModelForObjectDetection.from_pretrained(
            source,
            config=config,
            trust_remote_code=False,
            use_safetensors=True,
            dtype="float32",
            output_loading_info=True,
        )
        return network, processor, report, Path(transformers.utils.cached_file(source, _WEIGHTS_FILE))
    except (OSError, ValueError, RuntimeError, ImportError) as err:
        raise ModelError(f"{source}: cannot be read as a detector of transformers: {err}") from err
    finally:
        log.set_verbosity(verbosity)


def wrap(
    network: nn.Module, processor: Any, *, name: str, labels: Sequence[str] | None = None, sha256: str = ""
) -> tuple[Detr, ModelSpec]:
    """Wrap a network of transformers as its image processor feeds it. Raises ModelError."""
    # Tracing looks at every property of a module, also at this one.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    config: Any = network.config
    _check_family(config.model_type, name)
    own = tuple(config.id2label[index] for index in range(config.num_labels))
    if labels is not None and len(labels) != len(own):
        raise ModelError(f"{name}: has {len(own)} classes, so it needs as many labels, got {len(labels)}")
    input_size = _input_size(processor, name)
    mean, std = _normalisation(processor)
    spec = ModelSpec(
        name=name,
        task="detect",
        labels=own if labels is None else tuple(labels),
        input_size=input_size,
        colour="rgb",
        mean=mean,
        std=std,
        resize=ResizeRule(kind="stretch", antialias=True),
        # No pair overlaps another one by more than all of it, so that each stays.
        nms=NmsRule(score_threshold=just_above(SCORE_THRESHOLD), iou_threshold=1.0, max_detections=config.num_queries),
        weights_sha256=sha256,
    )
    return Detr(network.eval(), input_size), spec


def _transformers() -> ModuleType:
    try:
        return importlib.import_module("transformers")
    except ImportError as err:
        raise ModelError(
            f"transformers cannot be imported ({err}); install it with: pip install 'streamd[hf]'"
        ) from err


def _check_family(model_type: str, source: str) -> None:
    if model_type not in FAMILIES:
        raise ModelError(f"{source}: its model_type is {model_type!r}; streamd imports {', '.join(FAMILIES)}")


def _input_size(processor: Any, source: str) -> tuple[int, int]:
    """Return (height, width) of the input, to which frames are stretched."""
    size = processor.size
    if not (processor.do_resize and size.get("height") and size.get("width")):
        raise ModelError(f"{source}: its image processor resizes to {dict(size)}; want a height and a width")
    return int(size["height"]), int(size["width"])


def _normalisation(processor: Any) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Return mean and deviation in 0..255, of an image processor that works in 0..1."""
    scale = 1 / processor.rescale_factor if processor.do_rescale else 1.0
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ((0.0,) * 3, (1.0,) * 3)
    red, green, blue = (value * scale for value in mean)
    red_std, green_std, blue_std = (value * scale for value in std)
    return (red, green, blue), (red_std, green_std, blue_std)
