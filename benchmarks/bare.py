"""How many images a second the model alone does, with nothing around it: the yardstick of the machine's noise.

python -m benchmarks.bare yolox_nano        prints one line of JSON
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
import warnings

from streamd.infer import Model
from streamd.models import weights

BATCH = 8
SECONDS = 1.0  # for each layout


def measure(model: Model) -> tuple[float, str]:
    """Return images/s of the best layout of workers and threads, and that layout in words."""
    cores = len(os.sched_getaffinity(0))
    best = (0.0, "")
    for workers, threads in sorted({(cores, 1), (1, cores)}):
        began = time.monotonic()
        measured = [model.images_per_s(workers, threads, BATCH)]
        while time.monotonic() - began < SECONDS:
            measured.append(model.images_per_s(workers, threads, BATCH))
        best = max(best, (statistics.median(measured), f"{workers} x {threads} thread(s), batch {BATCH}"))
    return best


def main() -> None:
    warnings.simplefilter("ignore")
    path = weights.resolve(sys.argv[1])
    model = Model(path, "cpu")
    images_per_s, layout = measure(model)
    spec = model.spec
    found = {"artifact": str(path), "name": spec.name, "sha256": spec.weights_sha256}
    print(json.dumps({**found, "images_per_s": images_per_s, "layout": layout}))


if __name__ == "__main__":
    main()
