"""Draw what was seen onto the pictures it was seen in, and write pictures and videos."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import av
import av.error
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from streamd.errors import OutputError
from streamd.gpu.reference import preprocess
from streamd.messages import Letterbox, Picture

if TYPE_CHECKING:
    import supervision as sv

    from streamd.wire import DetectedObject, DetectionsMessage, SurfaceChart

_TIME_BASE = Fraction(1, 90_000)  # the clock of MPEG and RTP: exact for every usual frame rate
_NOMINAL_RATE = 25  # what the encoder plans with; the pictures' own times are what is written
_X264 = {
    "preset": "veryfast",
    "crf": "22",
    # Without the tags players guess the colour matrix from the size.
    "x264-params": "log-level=none:colorprim=bt709:transfer=bt709:colormatrix=bt709",
}
# By class. Bright, because cameras look at grass, asphalt and brick.
_PALETTE = ("#00b0ff", "#ffb000", "#8cff66", "#ff6fae", "#c9a6ff", "#fff066", "#4de8c2", "#ff8a4c")
# Which points a line joins, by the number of points: COCO's 17 of a person, from nose to right ankle.
_LIMBS = {
    17: (
        *((15, 13), (13, 11), (16, 14), (14, 12), (11, 12), (5, 11), (6, 12), (5, 6), (5, 7), (6, 8), (7, 9), (8, 10)),
        *((1, 2), (0, 1), (0, 2), (1, 3), (2, 4), (3, 5), (4, 6)),
    )
}
_MIN_POINT_SCORE = 0.05  # a point below it may be anywhere
_OPACITY = 0.45  # of masks and segments
_CHART_OPACITY = 0.7
_HUE_STEP = 97  # of 256, from a body's part to the next in number, which is often its neighbour
_GAP_PX = 4  # between the tiles of a contact sheet


def load_library() -> None:
    """Import supervision now, which takes about a second, instead of at the first picture."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="OpenCV", category=UserWarning)  # it does without
        import supervision  # noqa: F401


def to_rgb(picture: Picture) -> np.ndarray:
    """Return the picture upright as uint8 [H, W, 3] at source size, with the colours that the model sees."""
    height, width = picture.planes[0].shape[:2]
    if picture.rotation in (90, 270):
        height, width = width, height
    image = torch.empty(1, 3, height, width, device=picture.planes[0].device)
    whole = Letterbox(scale_x=1.0, scale_y=1.0, left=0, top=0, width=width, height=height)
    preprocess([picture], [whole], image, colour="rgb", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), pad=(0.0, 0.0, 0.0))
    return image[0].permute(1, 2, 0).round_().to("cpu", torch.uint8).contiguous().numpy()


def annotate(picture: np.ndarray, message: DetectionsMessage) -> np.ndarray:
    """Return a copy of the frame's picture, uint8 RGB [H, W, 3], with all that was seen drawn onto it.

    Segments, or else masks, then charts, boxes, keypoints and labels.
    """
    import supervision as sv

    found = message.to_supervision()
    palette = sv.ColorPalette.from_hex(list(_PALETTE))
    drawn = picture[..., ::-1].copy()  # supervision's colours are for OpenCV's order
    if message.segments:
        drawn = _draw_segments(drawn, message, palette)
    elif found.mask is not None:
        drawn = sv.MaskAnnotator(palette, opacity=_OPACITY).annotate(drawn, found)
    for one in message.objects:
        if one.densepose:
            _draw_chart(drawn, one.densepose)
    if len(found):
        size = min(picture.shape[:2])
        drawn = sv.BoxAnnotator(palette, thickness=max(1, round(size / 300))).annotate(drawn, found)
        if any(one.keypoints for one in message.objects):
            drawn = _draw_keypoints(drawn[..., ::-1], message)[..., ::-1].copy()
        names = [_title(one) for one in message.objects]
        drawn = _label_annotator(palette, size, smart_position=True).annotate(drawn, found, names)
    return np.ascontiguousarray(drawn[..., ::-1])


def _draw_chart(drawn: np.ndarray, chart: SurfaceChart) -> None:
    """Colour the parts of a body in a BGR picture, in place: each has a hue, which U pales and V darkens.

    Raises WireError where the chart is damaged.
    """
    part, (u, v) = chart.decode()
    hsv = np.stack((part.astype(int) * _HUE_STEP % 256, 255 - 120 * u, 255 - 120 * v), axis=-1).astype(np.uint8)
    colours = np.asarray(Image.frombytes("HSV", hsv.shape[1::-1], hsv.tobytes()).convert("RGB"))[..., ::-1]
    left, top, width, height = chart.box
    y = np.arange(max(top, 0), min(top + height, drawn.shape[0]))
    x = np.arange(max(left, 0), min(left + width, drawn.shape[1]))
    if not len(y) or not len(x):
        return
    cells = np.ix_((y - top) * part.shape[0] // height, (x - left) * part.shape[1] // width)
    pixels = np.ix_(y, x)
    opacity = _CHART_OPACITY * (part[cells] > 0)[..., None]
    drawn[pixels] = drawn[pixels] * (1 - opacity) + colours[cells] * opacity


def _draw_segments(drawn: np.ndarray, message: DetectionsMessage, palette: sv.ColorPalette) -> np.ndarray:
    """Colour all segments of a BGR picture, and name those that are no objects, for objects have a box with a name."""
    import supervision as sv

    segments = message.segments or ()
    masks = np.stack([segment.mask.decode() for segment in segments])
    class_id = np.array([segment.label_id for segment in segments])
    regions = sv.Detections(sv.mask_to_xyxy(masks).astype(np.float32), masks, class_id=class_id)
    drawn = sv.MaskAnnotator(palette, opacity=_OPACITY).annotate(drawn, regions)
    is_stuff = np.array([not segment.thing for segment in segments])
    if not is_stuff.any():
        return drawn
    stuff = sv.Detections(regions.xyxy[is_stuff], masks[is_stuff], class_id=class_id[is_stuff])
    names = [segment.label for segment in segments if not segment.thing]
    annotator = _label_annotator(palette, min(drawn.shape[:2]), text_position=sv.Position.CENTER_OF_MASS)
    return annotator.annotate(drawn, stuff, names)


def _label_annotator(palette: sv.ColorPalette, size: int, **placing: Any) -> sv.RichLabelAnnotator:
    """Make what writes names, as large as suits a picture whose shorter side has `size` pixels."""
    import supervision as sv

    return sv.RichLabelAnnotator(  # "rich": with PIL's font, which knows more than ASCII
        palette,
        text_color=sv.Color.BLACK,
        font_size=max(9, round(size / 52)),
        text_padding=max(2, round(size / 250)),
        **placing,
    )


def _draw_keypoints(picture: np.ndarray, message: DetectionsMessage) -> np.ndarray:
    """Return an RGB picture with the points of each object, joined where it is known how."""
    image = Image.fromarray(picture)
    pen = ImageDraw.Draw(image)
    radius = max(1.5, min(image.size) / 160)
    for found in message.objects:
        points = found.keypoints or ()
        sure = {index: point[:2] for index, point in enumerate(points) if point[2] >= _MIN_POINT_SCORE}
        colour = _PALETTE[found.label_id % len(_PALETTE)]
        for first, second in _LIMBS.get(len(points), ()):
            if first in sure and second in sure:
                pen.line((*sure[first], *sure[second]), fill=colour, width=max(1, round(radius)))
        for x, y in sure.values():
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour, outline="#101418")
    return np.asarray(image)


def _title(found: DetectedObject) -> str:
    name = found.label if found.id is None else f"{found.label} #{found.id}"
    return f"{name} {found.score:.2f}"


def caption(picture: np.ndarray, text: str) -> np.ndarray:
    """Return a copy of a uint8 RGB picture with a line of text on its lower edge."""
    image = Image.fromarray(picture)
    size = max(10, round(min(image.size) / 24))
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, image.height - 1.6 * size, image.width, image.height), fill="#101418")
    middle = image.height - 0.8 * size
    pen.text((0.6 * size, middle), text, fill="#ffffff", font=ImageFont.load_default(size), anchor="lm")
    return np.asarray(image)


def contact_sheet(pictures: Sequence[np.ndarray], columns: int, width: int) -> np.ndarray:
    """Tile uint8 RGB pictures onto one sheet of `width` pixels; each is fitted into a tile of the first one's shape."""
    if not pictures:
        raise ValueError("a contact sheet needs a picture")
    height_px, width_px = pictures[0].shape[:2]
    columns = min(columns, len(pictures))
    tile_width = (width - _GAP_PX * (columns - 1)) // columns
    tile_height = max(1, round(tile_width * height_px / width_px))
    rows = -(-len(pictures) // columns)
    sheet = np.full((rows * (tile_height + _GAP_PX) - _GAP_PX, width, 3), 255, np.uint8)
    for index, picture in enumerate(pictures):
        top = index // columns * (tile_height + _GAP_PX)
        left = index % columns * (tile_width + _GAP_PX)
        sheet[top : top + tile_height, left : left + tile_width] = _fit(picture, tile_width, tile_height)
    return sheet


def _fit(picture: np.ndarray, width: int, height: int) -> np.ndarray:
    """Scale a picture into the middle of a black tile, its shape kept."""
    scale = min(width / picture.shape[1], height / picture.shape[0])
    scaled_width, scaled_height = max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale))
    scaled = Image.fromarray(picture).resize((scaled_width, scaled_height), Image.Resampling.LANCZOS)
    tile = Image.new("RGB", (width, height))
    tile.paste(scaled, ((width - scaled_width) // 2, (height - scaled_height) // 2))
    return np.asarray(tile)


def save_png(picture: np.ndarray, path: Path) -> None:
    """Write uint8 RGB [H, W, 3]. Raises OutputError."""
    _save(picture, path, "PNG", optimize=True)


def save_jpeg(picture: np.ndarray, path: Path) -> None:
    """Write uint8 RGB [H, W, 3]. Raises OutputError."""
    _save(picture, path, "JPEG", quality=92)


def _save(picture: np.ndarray, path: Path, file_format: str, **options: object) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path, file_format, **options)
    except OSError as err:
        raise OutputError(f"{path}: cannot write the picture: {err.strerror or err}") from err


class VideoWriter:
    """Write an H.264 MP4 that any player shows; each picture keeps its time. Leave its `with` block to finish it.

    The file is made at the first picture, which gives the size; without a picture there is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._container: av.container.OutputContainer | None = None
        self._stream: av.VideoStream | None = None
        self._last_pts = -1
        self._first_pts_s = 0.0

    def write(self, picture: np.ndarray, pts_s: float) -> None:
        """Add uint8 RGB [H, W, 3], shown from `pts_s` on, in seconds of any clock. Raises OutputError."""
        try:
            if self._stream is None:
                self._first_pts_s = pts_s
                self._stream = self._open(*picture.shape[:2])
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
                self._stream.width, self._stream.height, "yuv420p", dst_colorspace="ITU709"
            )
            frame.pts = max(self._last_pts + 1, round((pts_s - self._first_pts_s) / _TIME_BASE))
            frame.time_base = _TIME_BASE
            self._last_pts = frame.pts
            self._mux(frame)
        except (av.error.FFmpegError, OSError) as err:
            raise self._error(err) from err

    def close(self) -> None:
        """Finish the file. Raises OutputError."""
        container, self._container = self._container, None
        if container is None:
            return
        try:
            with container:
                assert self._stream is not None
                container.mux(self._stream.encode(None))
        except (av.error.FFmpegError, OSError) as err:
            raise self._error(err) from err

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _open(self, height: int, width: int) -> av.VideoStream:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # FFmpeg takes "name:" at the front of a path for a protocol.
        self._container = av.open(f"file:{os.fspath(self.path)}", "w", format="mp4", options={"movflags": "faststart"})
        stream = self._container.add_stream("libx264", rate=_NOMINAL_RATE, options=_X264)
        stream.width, stream.height = width + width % 2, height + height % 2  # 4:2:0 has no odd sizes
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = _TIME_BASE
        return stream

    def _mux(self, frame: av.VideoFrame) -> None:
        assert self._container is not None and self._stream is not None
        self._container.mux(self._stream.encode(frame))

    def _error(self, err: Exception) -> OutputError:
        return OutputError(f"{self.path}: cannot write the video: {getattr(err, 'strerror', None) or err}")
