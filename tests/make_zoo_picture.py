"""Make docs/zoo.jpg again: boxes, masks, key points and panoptic segments on photographs, through `streamd predict`.

    python -m tests.make_zoo_picture

Boxes and masks are streamd-person's, on photographs that it never saw. No trained network for key points and segments
is shipped, so two small ones learn twelve photographs of ../shared/data/persons by heart (`streamd train`, some
minutes), and are shown on these: the picture says what is drawn and on the wire, not how well a network does.
"""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from rich.console import Console

from streamd.datasets import data, masks
from streamd.datasets.records import DataSet, Record
from streamd.draw import caption, contact_sheet
from streamd.predict import predict
from streamd.train import recipe as recipes
from streamd.train.loop import train
from tests.test_train_overfit import RECIPE, SMALL_RCNN

ROOT = Path(__file__).parents[1]
PERSONS = ROOT.parent / "shared/data/persons"
PICTURE = ROOT / "docs/zoo.jpg"
NUM_LEARNT, NUM_SHOWN, WIDTH_PX = 12, 4, 1300
EPOCHS = 60


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        learnt = choose(data.read(PERSONS / "train.json"), NUM_LEARNT)
        unseen = choose(data.read(PERSONS / "val.json"), NUM_SHOWN)
        person = str(ROOT / "configs/models/streamd-person.pt")
        rows = [
            drawn(person, unseen, folder / "masks", "boxes and masks: streamd-person"),
            drawn(str(learn_keypoints(learnt, folder)), learnt[:NUM_SHOWN], folder / "points", "key points, by heart"),
            drawn(str(learn_segments(learnt, folder)), learnt[:NUM_SHOWN], folder / "panoptic", "segments, by heart"),
        ]
    sheet = contact_sheet([picture for row in rows for picture in row], columns=NUM_SHOWN, width=WIDTH_PX)
    Image.fromarray(sheet).save(PICTURE, quality=82)
    print(f"{PICTURE}: {PICTURE.stat().st_size} bytes; photographs {[one.file.stem for one in unseen + learnt[:4]]}")


def choose(dataset: DataSet, count: int) -> list[Record]:
    """Take wide photographs with the mask of one person of middle size, most of whose points are to be seen."""

    def fits(record: Record) -> bool:
        objects = record.objects
        if objects.masks is None or objects.keypoints is None or len(objects.boxes) != 1:
            return False
        part = float(np.prod(objects.boxes[0, 2:] - objects.boxes[0, :2])) / (record.width * record.height)
        return 0.1 < part < 0.4 and record.width > record.height and int((objects.keypoints[0, :, 2] > 0).sum()) >= 13

    return [record for record in dataset.records if fits(record)][:count]


def drawn(model: str, records: Sequence[Record], folder: Path, title: str) -> list[np.ndarray]:
    """Return what `streamd predict` draws."""
    folder.mkdir()
    code = predict(
        model, [one.file for one in records], out=folder, score_threshold=0.3, console=Console(file=io.StringIO())
    )
    assert code == 0, f"predict ended with {code}"
    files = [next(folder.glob(f"{one.file.stem}*")) for one in records]
    return [caption(np.asarray(Image.open(file).convert("RGB")), title) for file in files]


def learn_keypoints(records: Sequence[Record], folder: Path) -> Path:
    content = json.loads((PERSONS / "train.json").read_text())
    wanted = {one.image_id for one in records}
    content["images"] = [one for one in content["images"] if one["id"] in wanted]
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] in wanted]
    file = folder / "points.json"
    file.write_text(json.dumps(content))
    heads = {"CONV_DIMS": [64] * 4, "POOLER_RESOLUTION": 14, "NUM_KEYPOINTS": 17}
    return learn(file, {"KEYPOINT_ON": True, "ROI_KEYPOINT_HEAD": heads}, folder, "points-by-heart")


def learn_segments(records: Sequence[Record], folder: Path) -> Path:
    """Make a panoptic data set of the persons' masks, in which all the rest is one kind of stuff."""
    file = folder / "segments.json"
    (folder / "segments").mkdir()
    annotations = []
    for record in records:
        ids = np.ones((record.height, record.width), np.int64)
        infos = [{"id": 1, "category_id": 2, "iscrowd": 0}]
        for number, rle in enumerate(record.objects.masks or (), start=2):
            ids[masks.decode(rle) > 0] = number
        infos += [{"id": int(number), "category_id": 1, "iscrowd": 0} for number in np.unique(ids) if number > 1]
        pixels = np.stack([ids % 256, ids // 256, np.zeros_like(ids)], axis=-1).astype(np.uint8)
        name = f"{record.file.stem}.png"
        Image.fromarray(pixels).save(folder / "segments" / name)
        annotations.append({"image_id": record.image_id, "file_name": name, "segments_info": infos})
    images = [
        {"id": one.image_id, "file_name": one.file.name, "width": one.width, "height": one.height} for one in records
    ]
    categories = [{"id": 1, "name": "person", "isthing": 1}, {"id": 2, "name": "surroundings", "isthing": 0}]
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    switches = {
        "META_ARCHITECTURE": "PanopticFPN",
        "MASK_ON": True,
        "SEM_SEG_HEAD": {"NUM_CLASSES": 2, "CONVS_DIM": 32, "IN_FEATURES": ["p2", "p3", "p4", "p5"]},
    }
    return learn(file, switches, folder, "segments-by-heart")


def learn(file: Path, switches: Mapping[str, Any], folder: Path, name: str) -> Path:
    """Train a small network on a file until it knows it by heart, and return the artifact."""
    config = folder / f"{name}.yaml"
    size = {"INPUT": {"MIN_SIZE_TEST": 256, "MAX_SIZE_TEST": 352}}
    anchors = {"SIZES": [[16], [32], [64], [128], [256]], "ASPECT_RATIOS": [[0.5, 1.0, 2.0]]}
    model: dict[str, Any] = {**SMALL_RCNN["MODEL"], "ANCHOR_GENERATOR": anchors, **switches}  # type: ignore[dict-item]
    config.write_text(yaml.safe_dump({**SMALL_RCNN, **size, "MODEL": model}))
    sets = {"path": str(file), "images": str(PERSONS / "images")}
    recipe = {
        **RECIPE,
        "name": name,
        "model": {"start": str(config)},
        "data": {"train": sets, "val": sets, "workers": 0, "cache": True},
        "batch_size": 6,
        "epochs": EPOCHS,
        "evaluate_every": EPOCHS,
    }
    path = folder / f"{name}-recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    train(recipes.load(path), folder / name, Console())
    return folder / name / f"{name}.pt"


if __name__ == "__main__":
    main()
