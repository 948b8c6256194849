"""Make docs/demo.png again: run the demo for 20 s, then draw its live table above a frame of each camera.

python -m tests.make_demo_picture
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont
from rich.color import blend_rgb
from rich.console import Console, RenderableType
from rich.segment import Segment
from rich.terminal_theme import MONOKAI

from streamd.demo import Recording, clip_frames, record
from streamd.draw import annotate, caption, contact_sheet, to_rgb
from streamd.watch import render

PICTURE = Path(__file__).parents[1] / "docs" / "demo.png"
WIDTH_PX = 1080
NUM_COLUMNS = 92
SECONDS = 20.0


def main() -> None:
    recording = record("yolox_nano", SECONDS, Console())
    table = draw_terminal(render(recording.table, recording.last_at_s))
    frames = contact_sheet(busiest_frames(recording), columns=2, width=WIDTH_PX)
    whole = Image.fromarray(np.concatenate([table, frames]))
    # A palette makes a photograph's PNG a third of its size.
    whole.quantize(256, dither=Image.Dither.NONE).save(PICTURE, optimize=True)
    print(f"{PICTURE}: {PICTURE.stat().st_size} bytes")


def busiest_frames(recording: Recording) -> list[np.ndarray]:
    """Draw, of each camera, the frame in which most was seen; the second camera's lies in another part of the clip."""
    halves = {"gate": (0.0, 8.0), "yard": (13.0, 99.0)}
    chosen = {}
    for name, (first_s, end_s) in halves.items():
        seen = {pts_s: found for pts_s, found in recording.streams[name].by_pts.items() if first_s <= pts_s < end_s}
        chosen[name] = max(seen.values(), key=lambda message: len(message.objects))
    pictures = {round(frame.pts_s, 6): to_rgb(frame.picture) for frame in clip_frames()}
    return [
        caption(
            annotate(pictures[message.pts], message), f"{name}  {message.pts:.1f} s  {len(message.objects)} objects"
        )
        for name, message in chosen.items()
    ]


def draw_terminal(renderable: RenderableType) -> np.ndarray:
    """Draw what a terminal of NUM_COLUMNS columns would show, each character in its cell."""
    console = Console(width=NUM_COLUMNS, force_terminal=True, color_system="truecolor")
    lines = [[Segment("$ streamd watch")], *console.render_lines(renderable, console.options)]
    cell_px = WIDTH_PX / (NUM_COLUMNS + 2)
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans Mono"), round(cell_px * 1.6))
    line_px = round(cell_px * 2.1)
    image = Image.new("RGB", (WIDTH_PX, line_px * (len(lines) + 1)), tuple(MONOKAI.background_color))
    pen = ImageDraw.Draw(image)
    for row, line in enumerate(lines):
        column = 1
        for segment in line:
            for character in segment.text:
                pen.text((column * cell_px, (row + 0.5) * line_px), character, colour_of(segment), font)
                column += 1
    return np.asarray(image)


def colour_of(segment: Segment) -> tuple[int, int, int]:
    """Say how a terminal draws a segment's text."""
    style = segment.style
    colour = MONOKAI.foreground_color
    if style is not None and style.color is not None:
        colour = style.color.get_truecolor(MONOKAI)
    if style is not None and style.dim:
        colour = blend_rgb(colour, MONOKAI.background_color, 0.4)
    return colour.red, colour.green, colour.blue


if __name__ == "__main__":
    main()
