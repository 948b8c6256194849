"""What is drawn stands where it was seen, and what is written can be read."""

from __future__ import annotations

from pathlib import Path

import av
import msgspec
import numpy as np
import pytest
import torch
from PIL import Image

from streamd.charts import pack
from streamd.draw import VideoWriter, annotate, caption, contact_sheet, save_jpeg, save_png, to_rgb
from streamd.errors import OutputError, WireError
from streamd.messages import Picture
from streamd.wire import DetectedObject, DetectionsMessage, Mask, Milliseconds, ModelName, Segment, SurfaceChart
from tests.wire_samples import rle

HEIGHT, WIDTH = 120, 160
GREY = np.full((HEIGHT, WIDTH, 3), 90, np.uint8)


def make_message(*objects: DetectedObject) -> DetectionsMessage:
    return DetectionsMessage(
        schema=1,
        stream="gate",
        seq=0,
        epoch=0,
        pts=0.0,
        captured_at="2026-01-31T10:00:00.123456Z",
        clock="arrival",
        width=WIDTH,
        height=HEIGHT,
        model=ModelName(name="people", sha256=""),
        objects=objects,
        ms=Milliseconds(decode=0, wait=0, infer=0, post=0, total=0),
        dropped=0,
    )


def person(box: tuple[float, float, float, float], mask: np.ndarray | None = None) -> DetectedObject:
    lengths = rle(mask) if mask is not None else None
    return DetectedObject(
        label="person",
        label_id=0,
        score=0.87,
        box=box,
        mask=Mask(size=(lengths.height, lengths.width), counts=lengths.counts.decode()) if lengths else None,
    )


def test_a_box_is_drawn_on_its_object_and_the_rest_of_the_picture_stays() -> None:
    drawn = annotate(GREY, make_message(person((60, 50, 100, 110))))
    changed = (drawn != GREY).any(-1)
    assert changed[108:112, 80].any(), "the lower side of the box"
    assert changed[80, 58:63].any() and changed[80, 98:103].any(), "the sides of the box"
    assert not changed[70:100, 66:94].any(), "the inside of the box"
    assert not changed[:, :40].any() and not changed[115:].any(), "what is far from the box"


def test_drawing_leaves_the_given_picture_alone() -> None:
    picture = GREY.copy()
    annotate(picture, make_message(person((60, 50, 100, 110))))
    assert (picture == GREY).all()


def test_a_frame_without_objects_is_given_back_as_it_was() -> None:
    drawn = annotate(GREY, make_message())
    assert (drawn == GREY).all() and drawn is not GREY


def test_a_mask_colours_its_pixels_and_no_others() -> None:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[60:100, 70:90] = True
    drawn = annotate(GREY, make_message(person((60, 50, 100, 110), mask)))
    changed = (drawn != GREY).any(-1)
    assert changed[60:100, 70:90].all()
    assert not changed[70:100, 64:68].any()


def test_a_label_that_is_not_ascii_is_drawn() -> None:
    found = DetectedObject(label="Fußgänger", label_id=1, score=0.5, box=(20, 60, 60, 100), id=7)
    assert (annotate(GREY, make_message(found)) != GREY).any()


def test_an_object_outside_the_picture_does_no_harm() -> None:
    assert annotate(GREY, make_message(person((-50, -50, 900, 900)), person((0, 0, 0, 0)))).shape == GREY.shape


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_a_picture_comes_out_upright(rotation: int) -> None:
    stored = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    picture = Picture((torch.from_numpy(stored),), "rgb", "bt709", True, rotation)  # type: ignore[arg-type]
    assert (to_rgb(picture) == np.rot90(stored, rotation // 90)).all()


def test_luma_and_chroma_become_the_colour_that_the_standard_says() -> None:
    planes = [
        torch.full(shape, value, dtype=torch.uint8) for shape, value in (((4, 4), 63), ((2, 2), 102), ((2, 2), 240))
    ]
    picture = Picture(tuple(planes), "yuv", "bt709", full_range=False, rotation=0)
    assert np.abs(to_rgb(picture).astype(int) - (255, 0, 0)).max() <= 2, "100 % red in BT.709 is 63, 102, 240"


def test_a_contact_sheet_has_its_width_and_a_tile_for_each_picture() -> None:
    pictures = [np.full((90, 160, 3), 40 * index, np.uint8) for index in range(1, 6)]
    sheet = contact_sheet(pictures, columns=3, width=324)
    assert sheet.shape == (2 * 59 + 4, 324, 3)
    top, bottom = sheet.shape[0] // 4, 3 * sheet.shape[0] // 4
    assert [sheet[top, x, 0] for x in (50, 160, 270)] == [40, 80, 120]
    assert [sheet[bottom, x, 0] for x in (50, 160, 270)] == [160, 200, 255]


def test_a_picture_of_another_shape_is_fitted_into_its_tile_and_not_stretched() -> None:
    wide, tall = np.full((90, 160, 3), 200, np.uint8), np.full((160, 90, 3), 200, np.uint8)
    sheet = contact_sheet([wide, tall], columns=2, width=324)
    tile = sheet[:, 164:]
    assert (tile[45, :40] == 0).all() and (tile[45, 75:85] == 200).all() and (tile[45, -40:] == 0).all()


def test_a_caption_covers_the_lower_edge_only() -> None:
    changed = (caption(GREY, "gate  3.2 s") != GREY).any(-1)
    assert changed[-5:].all() and not changed[: HEIGHT * 3 // 4].any()


def test_pictures_are_written_and_read_again(tmp_path: Path) -> None:
    picture = annotate(GREY, make_message(person((60, 50, 100, 110))))
    save_png(picture, tmp_path / "new folder" / "a.png")
    save_jpeg(picture, tmp_path / "a.jpg")
    assert (np.asarray(Image.open(tmp_path / "new folder" / "a.png")) == picture).all()
    assert np.abs(np.asarray(Image.open(tmp_path / "a.jpg")).astype(int) - picture).mean() < 8


@pytest.mark.parametrize("size", [(64, 96), (65, 97)])
def test_a_video_keeps_the_time_the_size_and_the_colour_of_its_pictures(tmp_path: Path, size: tuple[int, int]) -> None:
    times_s = [10.0, 10.1, 10.15, 10.4, 11.0]  # not even: a camera that lost frames
    with VideoWriter(tmp_path / "a: b.mp4") as writer:  # what FFmpeg could take for a protocol
        for pts_s in times_s:
            picture = np.zeros((*size, 3), np.uint8)
            picture[..., 0] = 220
            writer.write(picture, pts_s)
    with av.open(f"file:{tmp_path}/a: b.mp4") as container:
        frames = list(container.decode(video=0))
    assert [frame.time for frame in frames] == pytest.approx([0.0, 0.1, 0.15, 0.4, 1.0], abs=1e-3)
    assert (frames[0].height, frames[0].width) == (size[0] + size[0] % 2, size[1] + size[1] % 2)
    assert np.abs(frames[0].to_ndarray(format="rgb24").reshape(-1, 3).mean(0) - (220, 0, 0)).max() < 6


def test_a_video_without_pictures_leaves_no_file(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "none.mp4"):
        pass
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_is_said_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    for write in (save_png, save_jpeg, lambda picture, path: VideoWriter(path).write(picture, 0.0)):
        with pytest.raises(OutputError, match=r"file/a\.out: cannot write"):
            write(GREY, tmp_path / "file" / "a.out")


COCO_POINTS = 17


def standing_person(score: float = 0.9) -> DetectedObject:
    """Make a person whose points stand on two vertical lines, left and right ones in turn, from head to feet."""
    points = [(70.0 if index % 2 else 90.0, 20.0 + 5 * index, score) for index in range(COCO_POINTS)]
    return msgspec.structs.replace(person((60, 15, 100, 112)), keypoints=tuple(points))


def test_keypoints_and_the_limbs_between_them_are_drawn() -> None:
    drawn = annotate(GREY, make_message(standing_person()))
    boxed = annotate(GREY, make_message(person((60, 15, 100, 112))))
    changed = (drawn != boxed).any(-1)
    for index in range(COCO_POINTS):
        assert changed[20 + 5 * index, 70 if index % 2 else 90], f"point {index}"
    assert changed[77:79, 80].any(), "the line from hip to hip, points 11 and 12"


def test_points_that_are_not_sure_are_left_out_with_their_limbs() -> None:
    drawn = annotate(GREY, make_message(standing_person(score=0.01)))
    assert (drawn == annotate(GREY, make_message(person((60, 15, 100, 112))))).all()


def test_points_of_an_unknown_kind_are_drawn_without_limbs() -> None:
    found = msgspec.structs.replace(person((60, 15, 100, 112)), keypoints=((70.0, 40.0, 0.9), (90.0, 90.0, 0.9)))
    changed = (annotate(GREY, make_message(found)) != annotate(GREY, make_message(person((60, 15, 100, 112))))).any(-1)
    assert changed[40, 70] and changed[90, 90] and not changed[65, 80]


def dancer(box: tuple[int, int, int, int]) -> DetectedObject:
    """Make an object whose chart has part 1 above, part 2 below, and background on the right."""
    planes = np.zeros((3, 4, 4), np.uint8)
    planes[0, :2, :3], planes[0, 2:, :3] = 1, 2
    x, y, width, height = box
    chart = SurfaceChart(box=box, size=(4, 4), data=pack(planes))
    return msgspec.structs.replace(person((x, y, x + width, y + height)), densepose=chart)


def test_the_parts_of_a_chart_have_colours_of_their_own_and_its_background_none() -> None:
    drawn = annotate(GREY, make_message(dancer((40, 20, 80, 80))))
    above, below, beside = drawn[45:55, 50:90], drawn[65:90, 50:90], drawn[45:90, 105:115]
    for part in (above, below):
        assert (part != GREY[0, 0]).any(-1).all() and (part == part[0, 0]).all()
    assert (above[0, 0] != below[0, 0]).any()
    assert (beside == GREY[0, 0]).all()


def test_a_chart_that_reaches_out_of_the_picture_is_cut() -> None:
    drawn = annotate(GREY, make_message(dancer((-40, -40, 80, 80)), dancer((WIDTH + 9, 5, 20, 20))))
    assert (drawn[10:30, 0:15] != GREY[0, 0]).any(-1).all()


def test_a_damaged_chart_is_a_wire_error() -> None:
    found = dancer((40, 20, 80, 80))
    assert found.densepose is not None
    chart = msgspec.structs.replace(found.densepose, size=(4, 5))
    with pytest.raises(WireError, match="damaged chart"):
        annotate(GREY, make_message(msgspec.structs.replace(found, densepose=chart)))


def segment(pixels: np.ndarray, label: str, thing: bool) -> Segment:
    lengths = rle(pixels)
    mask = Mask(size=(lengths.height, lengths.width), counts=lengths.counts.decode())
    return Segment(label=label, label_id=1, thing=thing, area=int(pixels.sum()), object=0 if thing else None, mask=mask)


def test_segments_colour_the_frame_and_stuff_has_its_name_written() -> None:
    left, right = np.zeros((HEIGHT, WIDTH), bool), np.zeros((HEIGHT, WIDTH), bool)
    left[:, :60], right[:, 80:] = True, True
    stuff = (segment(left, "sky", thing=False), segment(right, "road", thing=False))
    things = (segment(left, "sky", thing=True), segment(right, "road", thing=True))
    named = annotate(GREY, msgspec.structs.replace(make_message(), segments=stuff))
    silent = annotate(GREY, msgspec.structs.replace(make_message(), segments=things))
    changed = (silent != GREY).any(-1)
    assert changed[left].all() and changed[right].all() and not changed[:, 60:80].any()
    written = (named != silent).any(-1)
    assert written[:, :60].any() and written[:, 80:].any() and written.mean() < 0.2


def test_a_frame_without_segments_is_given_back_as_it_was() -> None:
    drawn = annotate(GREY, msgspec.structs.replace(make_message(), segments=()))
    assert (drawn == GREY).all()
