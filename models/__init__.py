"""Networks, their builders, readers of checkpoints, and the exporter."""

from __future__ import annotations

from streamd.models.yolox import yolox_l, yolox_m, yolox_nano, yolox_s, yolox_tiny, yolox_x

BUILDERS = {
    "yolox_nano": yolox_nano,
    "yolox_tiny": yolox_tiny,
    "yolox_s": yolox_s,
    "yolox_m": yolox_m,
    "yolox_l": yolox_l,
    "yolox_x": yolox_x,
}
