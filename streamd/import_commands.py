"""`streamd import`: artifacts from other projects' networks. Heavy imports stand inside the commands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from streamd.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from streamd.models.spec import ModelSpec

import_app = typer.Typer(
    help="Make artifacts of other projects' networks.", no_args_is_help=True, rich_markup_mode=None
)

Out = Annotated[Path, typer.Option("--out", "-o", help="The artifact to write.")]
Labels = Annotated[Path | None, typer.Option(help="A text file, one label a line; the data set's by default.")]
InputSize = Annotated[
    str | None,
    typer.Option(
        help="HEIGHTxWIDTH in pixels of the network's input; the configuration's by default. Not for a network of one "
        "size: ViTDet, SSD."
    ),
]


@import_app.command()
def detectron2(
    config: Annotated[Path, typer.Option(help="config.yaml; for a ViTDet a JSON file with its numbers.")],
    weights: Annotated[Path, typer.Option(help="model_final.pkl or .pth.")],
    out: Out,
    labels: Labels = None,
    input_size: InputSize = None,
) -> None:
    """Import a network of Detectron2 from its configuration and checkpoint; nothing in either is executed.

    Example: streamd import detectron2 --config config.yaml --weights model_final.pkl -o model.pt
    """
    from streamd.models.importers import detectron2 as importer

    is_vitdet = config.suffix == ".json"
    if is_vitdet and input_size is not None:
        raise ConfigError(
            f"--input-size cannot be given for a ViTDet: its positions are laid out for the size of {config}; "
            "change square_pad there"
        )
    load = importer.load_vitdet if is_vitdet else importer.load
    _export(*load(config, weights, read_labels(labels)), out, input_size)


@import_app.command()
def torchvision(
    name: Annotated[str, typer.Argument(help="For example maskrcnn_resnet50_fpn_v2; see `streamd models`.")],
    out: Out,
    weights: Annotated[str, typer.Option(help="Published weights (DEFAULT, COCO_V1) or a checkpoint.")] = "DEFAULT",
    labels: Labels = None,
    input_size: InputSize = None,
) -> None:
    """Import a detector of torchvision.

    Example: streamd import torchvision fasterrcnn_resnet50_fpn_v2 -o gate.pt
    """
    from streamd.models.importers import torchvision as importer

    _export(*importer.load(name, weights, read_labels(labels)), out, input_size)


@import_app.command()
def yolox(
    weights: Annotated[Path, typer.Argument(help="A checkpoint in the official layout (.pth).")],
    out: Out,
    labels: Labels = None,
) -> None:
    """Import a YOLOX of any size; which one it is stands in its weights.

    Example: streamd import yolox my_yolox_s.pth -o gate.pt
    """
    from streamd.models.weights import export_checkpoint, identify, read_checkpoint

    names = read_labels(labels)
    variant = identify(read_checkpoint(weights), weights)
    _say(export_checkpoint(variant, weights, out, labels=names), out)


@import_app.command()
def hf(
    source: Annotated[str, typer.Argument(help="A folder, or the name of a repository of Hugging Face's hub.")],
    out: Out,
    labels: Labels = None,
) -> None:
    """Import a detector of transformers: RT-DETR, D-FINE, RF-DETR. Needs `pip install 'streamd[hf]'`.

    Its input has the one size of its image processor.

    Example: streamd import hf ./my-rtdetr -o gate.pt
    """
    from streamd.models.importers import hf as importer

    _export(*importer.load(source, read_labels(labels)), out, None)


def read_labels(path: Path | None) -> list[str] | None:
    """Read one label a line. Raises ConfigError."""
    if path is None:
        return None
    try:
        return [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(f"{path}: cannot read labels: {err}") from err


def _export(network: nn.Module, spec: ModelSpec, out: Path, input_size: str | None) -> None:
    import msgspec

    from streamd.models import artifact

    if input_size is not None:
        if spec.resize.kind == "stretch":
            height, width = spec.input_size
            raise ConfigError(
                f"--input-size cannot be given for {spec.name}: it is built for {height}x{width}, "
                "to which each frame is stretched"
            )
        numbers = re.fullmatch(r"(\d+)x(\d+)", input_size)
        if numbers is None:
            raise ConfigError(f"--input-size is {input_size!r}, not HEIGHTxWIDTH such as 800x1344")
        spec = msgspec.structs.replace(spec, input_size=(int(numbers[1]), int(numbers[2])))
    artifact.export(network, spec, out)
    _say(spec, out)


def _say(spec: ModelSpec, out: Path) -> None:
    height, width = spec.input_size
    print(f"{out}: {spec.name}, {spec.task}, {len(spec.labels)} labels, input {width}x{height}")
