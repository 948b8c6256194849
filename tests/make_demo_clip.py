"""Make configs/media/pedestrians.mp4 again from OpenCV's sample video.

apt-get install opencv-doc
python -m tests.make_demo_clip /usr/share/doc/opencv-doc/examples/data/vtest.avi
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.rtsp import encode_clip

CLIP = Path(__file__).parents[1] / "configs" / "media" / "pedestrians.mp4"


def main() -> None:
    # One thread, so that the same encoder gives the same bytes on every machine.
    quality = {"preset": "veryslow", "crf": "28", "threads": "1"}
    encode_clip(Path(sys.argv[1]), CLIP, fps=10, gop=20, seconds=25, options=quality)
    print(f"{CLIP}: {CLIP.stat().st_size} bytes")


if __name__ == "__main__":
    main()
