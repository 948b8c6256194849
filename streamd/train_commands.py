"""`streamd train` and `streamd data`. Heavy imports stand inside the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from streamd.errors import ConfigError

data_app = typer.Typer(help="About data sets.", no_args_is_help=True, rich_markup_mode=None)

Split = Annotated[str | None, typer.Option(help="train, val, test ..., where one folder holds several.")]
Images = Annotated[Path | None, typer.Option(help="Where the pictures are, if not where the format has them.")]
Format = Annotated[
    Literal["auto", "coco", "panoptic", "voc", "yolo"], typer.Option("--format", help="auto looks at the files.")
]


def train(
    recipe: Annotated[Path | None, typer.Argument(help="The YAML file.", metavar="RECIPE")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="Such as epochs=50 or optimizer.lr=0.02.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder; runs/NAME by default.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in that folder, if there is one.")
    ] = False,
    publish: Annotated[
        str | None, typer.Option(help="Put the artifact where the daemon finds it by this name.")
    ] = None,
    keys: Annotated[bool, typer.Option("--keys", help="List every key of a recipe, and leave.")] = False,
) -> None:
    """Fine-tune a model: data, losses, evaluation through the daemon's own code, and the artifact.

    Several processes: torchrun --nproc-per-node 2 -m streamd train RECIPE --out runs/two

    Example: streamd train person.yaml epochs=20 --publish person
    """
    from streamd import logs
    from streamd.train import recipe as recipes

    logs.set_up("warning")
    console = Console()
    if keys:
        recipes.show_keys(console)
        return
    if recipe is None:
        raise typer.BadParameter("give a recipe, or --keys for what may stand in one")
    read = recipes.load(recipe, overrides or ())
    if publish is not None and ("/" in publish or publish.endswith((".pt", ".pth"))):
        raise ConfigError(f"--publish {publish}: want a plain name, by which a configuration then has it as path:")
    from streamd.train.loop import train as run

    raise SystemExit(run(read, out or Path("runs") / read.name, console, resume=resume, publish=publish))


@data_app.command()
def check(
    path: Annotated[Path, typer.Argument(help="A COCO JSON file, or a folder in COCO's, VOC's or YOLO's layout.")],
    images: Images = None,
    data_format: Format = "auto",
    split: Split = None,
    picture: Annotated[Path | None, typer.Option(help="Draw counts, sizes and twelve samples here (PNG).")] = None,
    deep: Annotated[bool, typer.Option("--deep", help="Decode every picture.")] = False,
) -> None:
    """Read a data set as training would: what there is, and what is wrong and where.

    Exits with 1 if anything is wrong.

    Example: streamd data check annotations/train.json --picture train.png
    """
    from streamd.datasets import check as checks
    from streamd.datasets import data

    dataset = data.read(path, images=images, format=data_format, split=split, deep=deep)
    raise SystemExit(checks.show(dataset, Console(), picture))
