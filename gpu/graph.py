"""CUDA graphs: what was launched once kernel by kernel is launched again as one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch

Output = TypeVar("Output")

_NUM_WARM_UPS = 3  # TorchScript specialises a graph during its first two runs, cuDNN chooses its algorithms


class Graph(Generic[Output]):
    """A function of tensors that stay where they are, captured on one CUDA stream."""

    def __init__(self, function: Callable[[], Output], stream: torch.cuda.Stream) -> None:
        """Run `function` a few times, then capture it; waits for the stream.

        Raises RuntimeError where the function does what cannot be captured, for example wait for the device.
        """
        with torch.inference_mode(), torch.cuda.stream(stream):
            for _ in range(_NUM_WARM_UPS):
                function()
        stream.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        # "thread_local": decoders' threads may allocate meanwhile.
        with torch.inference_mode(), torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            self._output = function()

    def replay(self) -> Output:
        """Queue the work on the current stream and return the output, which the next replay overwrites."""
        self._graph.replay()
        return self._output
