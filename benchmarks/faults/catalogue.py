"""All rows, by number."""

from __future__ import annotations

from benchmarks.faults import bitstream, churn, host, model, network, output, times
from benchmarks.faults.row import Row

ROWS: tuple[Row, ...] = (
    *network.ROWS,
    *bitstream.ROWS,
    *times.ROWS,
    *churn.ROWS,
    *model.ROWS,
    *output.ROWS,
    *host.ROWS,
)
