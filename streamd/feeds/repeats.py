"""Know the entries that "at least once" delivers a second time."""

from __future__ import annotations

from collections import OrderedDict

MAX_EPOCHS = 8  # remembered of each key: only what the last daemon could not confirm is ever sent again


class Repeats:
    """Tell repeats by their ids, `<epoch>-<seq>`: within an epoch, seq rises from entry to entry.

    An epoch is one life of one daemon. Epochs are not compared, so that no clock can make new entries look old.
    """

    def __init__(self) -> None:
        self._last: dict[str, OrderedDict[str, int]] = {}  # key -> epoch -> seq

    def has(self, key: str, entry_id: str) -> bool:
        """Tell whether the entry came before, and remember it; an id of another form is never a repeat."""
        epoch, _, number = entry_id.rpartition("-")
        if not epoch or not (number.isascii() and number.isdigit()):
            return False
        epochs = self._last.setdefault(key, OrderedDict())
        seq = int(number)
        if seq <= epochs.get(epoch, -1):
            return True
        epochs[epoch] = seq
        epochs.move_to_end(epoch)
        if len(epochs) > MAX_EPOCHS:
            epochs.popitem(last=False)
        return False
