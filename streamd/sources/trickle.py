"""Tell a connection that brings less than the camera makes from one that is merely slow to be read."""

from __future__ import annotations

from streamd.errors import SourceError


class Trickle:
    """Compare, over windows, how far presentation times got with how long it took.

    Only a window of which most was spent waiting for the network counts: where the reader is slow, a new connection
    would not help.
    """

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._epoch = -1
        self._began_s = self._first_pts_s = 0.0
        self.waited_s = 0.0  # for the network, in this window

    def note(self, epoch: int, pts_s: float, now_s: float) -> None:
        """Take a picture that came. Raises SourceError where less than half of what was due has come."""
        passed_s = now_s - self._began_s
        if epoch == self._epoch and passed_s < self._window_s:
            return
        played_s = pts_s - self._first_pts_s
        if epoch == self._epoch and played_s < passed_s / 2 < self.waited_s:
            raise SourceError(f"only {played_s:.1f} s of video came in {passed_s:.1f} s", "stalled")
        self._epoch, self._began_s, self._first_pts_s, self.waited_s = epoch, now_s, pts_s, 0.0
