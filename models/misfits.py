"""Say which parameters of a checkpoint do not fit a network: each by name, or where they are many, by module."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

MAX_NAMES = 20  # of one kind; more are counted by the module that they belong to


def describe_misfits(
    own: Mapping[str, Tensor], state: Mapping[str, Tensor], allow_missing_prefixes: tuple[str, ...] = ()
) -> str:
    """List what a network's `own` parameters and a checkpoint's `state` do not share; "" where all fits.

    Parameters that begin with one of `allow_missing_prefixes` may be missing.
    """
    shapes = {
        key: f"{key} is {list(state[key].shape)} instead of {list(tensor.shape)}"
        for key, tensor in own.items()
        if key in state and state[key].shape != tensor.shape
    }
    missing = [key for key in own if key not in state and not key.startswith(allow_missing_prefixes)]
    kinds = {"missing": missing, "unknown": state.keys() - own.keys(), "of another shape": shapes.keys()}
    return "; ".join(
        f"{len(keys)} {what} ({', '.join(list_names(keys, shapes))})" for what, keys in kinds.items() if keys
    )


def list_names(names: Collection[str], words: Mapping[str, str] | None = None) -> list[str]:
    """Sort names; of more than MAX_NAMES, those of a module become one entry such as `backbone.res2.* (45)`.

    Modules are as small as leaves no more than MAX_NAMES entries. `words` says more of a name that stands alone.
    """
    described = words or {}
    parts = [name.split(".") for name in sorted(names)]
    deepest = max((len(name) for name in parts), default=0)
    depths = range(deepest, 0, -1)
    depth = next((depth for depth in depths if len(_modules(parts, depth)) <= MAX_NAMES), 1)
    return [
        f"{'.'.join(module)}.* ({count})" if count > 1 else _only(module, parts, described)
        for module, count in _modules(parts, depth).items()
    ]


def _modules(names: Sequence[Sequence[str]], depth: int) -> Counter[tuple[str, ...]]:
    """Count the names by their first parts; a name that is no longer than `depth` stands for itself."""
    return Counter(tuple(name[:depth]) for name in names)


def _only(module: tuple[str, ...], names: Sequence[Sequence[str]], words: Mapping[str, str]) -> str:
    """Return the one name that begins with these parts, or what is said of it."""
    name = ".".join(next(name for name in names if tuple(name[: len(module)]) == module))
    return words.get(name, name)
