"""Load and freeze a model in a process of its own, for a daemon that has streams to serve meanwhile.

torch holds Python's lock while it reads a program and while it freezes it, 0.1 to 0.3 s each, and all streams would
stand still. It does not take a tenth of that to read what is frozen. And a file that makes torch crash ends that
process, not the daemon.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from streamd.errors import ModelError
from streamd.models import artifact

_LIMIT_S = 600.0
_REFUSED = 3  # exit status; what is wrong with the model is on stdout
# It ends with the thread that waits for it (PR_SET_PDEATHSIG), and yields to the threads of streams (nice 5). To import
# torch takes most of the time, so before.
_FIRST = "import ctypes, os, signal; ctypes.CDLL(None).prctl(1, signal.SIGKILL); os.nice(15)"
_WORK = "from streamd.models.apart import main; main()"


@contextmanager
def frozen_apart(path: Path, dtype: torch.dtype, descriptors: tuple[int, ...] = ()) -> Iterator[Path]:
    """Give the path of what `artifact.load` takes as `frozen`, in memory, for the length of the block.

    The model is tried there too. `descriptors` are those that `path` leads through. Raises ModelError.
    """
    made = os.memfd_create("streamd-model", os.MFD_CLOEXEC)
    try:
        _freeze(path, dtype, made, descriptors)
        yield Path(f"/proc/self/fd/{made}")
    finally:
        os.close(made)


def _freeze(path: Path, dtype: torch.dtype, made: int, descriptors: tuple[int, ...]) -> None:
    arguments = (str(path), str(dtype).removeprefix("torch."), str(made))
    command = [sys.executable, "-P", "-c", f"{_FIRST}; {_WORK}", *arguments]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_LIMIT_S,
            pass_fds=(made, *descriptors),
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},  # the same code, from anywhere
            process_group=0,  # an interrupt at the terminal is the daemon's alone
            check=False,
        )
    except OSError as err:
        raise ModelError(f"{path}: no process can be started to load it: {err.strerror}") from err
    except subprocess.TimeoutExpired as err:
        raise ModelError(f"{path}: not loaded within {_LIMIT_S:.0f} s") from err
    if done.returncode == _REFUSED:
        raise ModelError(done.stdout.strip())
    if done.returncode < 0:
        killer = signal.Signals(-done.returncode).name
        raise ModelError(
            f"{path}: the process that loads it was ended by {killer}. The file is probably damaged, or memory is short"
        )
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise ModelError(f"{path}: the process that loads it failed: {said}")


def main() -> None:
    """Be that process: take the arguments from the command line."""
    path, dtype, made = sys.argv[1:]
    torch.set_num_threads(1)
    try:
        artifact.write_frozen(Path(path), getattr(torch, dtype), Path(f"/proc/self/fd/{made}"))
    except ModelError as err:
        print(err)
        sys.exit(_REFUSED)
