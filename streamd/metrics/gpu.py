"""How busy and how full the GPUs are, by NVML: of all GPUs of the machine, in NVML's own order."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector


class GpuCollector(Collector):
    """Ask NVML at each scrape; where there is no driver or no package, there are no series."""

    def __init__(self, nvml: Any = None) -> None:
        """`nvml` is the module `pynvml` of the package nvidia-ml-py by default."""
        self._nvml: Any = nvml or _import_nvml()
        self._gpus: list[tuple[list[str], Any]] = []  # labels and NVML's handle
        if self._nvml is None:
            return
        with contextlib.suppress(self._nvml.NVMLError):  # no driver, or no GPU
            self._nvml.nvmlInit()
            for index in range(self._nvml.nvmlDeviceGetCount()):
                handle = self._nvml.nvmlDeviceGetHandleByIndex(index)
                self._gpus.append(([str(index), self._nvml.nvmlDeviceGetName(handle)], handle))

    def collect(self) -> Iterator[Metric]:
        if not self._gpus:
            return
        labels = ["gpu", "name"]
        used = GaugeMetricFamily("streamd_gpu_memory_used_bytes", "Memory in use, by all processes", labels=labels)
        total = GaugeMetricFamily("streamd_gpu_memory_total_bytes", "Memory of the GPU", labels=labels)
        sm = GaugeMetricFamily("streamd_gpu_sm_load_ratio", "Part of the time in which a kernel ran", labels=labels)
        nvdec = GaugeMetricFamily(
            "streamd_gpu_nvdec_load_ratio", "Part of the time in which the video decoders worked", labels=labels
        )
        for values, handle in self._gpus:
            # Each on its own: a MIG slice tells its memory, but no load.
            with contextlib.suppress(self._nvml.NVMLError):
                memory = self._nvml.nvmlDeviceGetMemoryInfo(handle)
                used.add_metric(values, memory.used)
                total.add_metric(values, memory.total)
            with contextlib.suppress(self._nvml.NVMLError):
                sm.add_metric(values, self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100)
            with contextlib.suppress(self._nvml.NVMLError):
                percent, _period_us = self._nvml.nvmlDeviceGetDecoderUtilization(handle)
                nvdec.add_metric(values, percent / 100)
        yield from (used, total, sm, nvdec)


def _import_nvml() -> Any:
    try:
        return importlib.import_module("pynvml")
    except ImportError:
        return None
