"""Keep out of a trace what belongs to the export alone: its device, and the type of its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from streamd.errors import ModelError

_CASTS = frozenset((Tensor.float, Tensor.to, Tensor.type, Tensor.type_as))


class FreshCasts(TorchFunctionMode):
    """Let every cast return a new tensor, so that a traced model can be loaded with weights of another type.

    A cast to the type that a tensor has returns that tensor, and a trace would take the result of the cast for the
    tensor itself wherever it is used from then on.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _CASTS:
            args = (args[0].view_as(args[0]), *args[1:])
        return func(*args, **(kwargs or {}))


def follow_device(module: torch.jit.ScriptModule, path: Path) -> None:
    """Let what a trace wrote down as a fixed device be the device of an input.

    Tracing turns `torch.arange(n, device=x.device)` into a call for the device of the export.
    """
    for name, part in module.named_modules():
        for method in part._c._method_names():
            graph = part._c._get_method(method).graph
            tensors = [value for value in graph.inputs() if value.type().isSubtypeOf(torch._C.TensorType.get())]
            for constant in graph.findAllNodes("prim::Constant"):
                if constant.output().type().kind() != "DeviceObjType":
                    continue
                if not tensors:
                    raise ModelError(
                        f"{path}: not written: {name or 'the network'} makes tensors of nothing but numbers, so that "
                        "they would stay on the CPU; keep them as buffers or derive them from an input"
                    )
                device = graph.create("prim::device", [tensors[0]], 1)
                device.output().setType(torch._C.DeviceObjType.get())
                constant.output().replaceAllUsesWith(device.insertBefore(constant).output())
