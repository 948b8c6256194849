"""Look before a change whether the process may still make the threads and open the files that it takes.

Some libraries end the process where they get none: libzmq's context, OpenMP's pools.
"""

from __future__ import annotations

import os
import threading

from streamd.errors import StreamdError

NO_THREADS = "no more threads can be had; raise the limit (TasksMax= or `ulimit -u`)"
NO_FILES = "no more files can be opened; raise the limit (LimitNOFILE= or `ulimit -n`)"


def require_room(num_threads: int, num_descriptors: int) -> None:
    """Raise StreamdError where so many more cannot be had now; none is kept."""
    over = threading.Event()
    threads: list[threading.Thread] = []
    descriptors: list[int] = []
    try:
        for _ in range(num_descriptors):
            descriptors.append(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
        for _ in range(num_threads):
            thread = threading.Thread(target=over.wait, name="room", daemon=True)
            thread.start()
            threads.append(thread)
    except RuntimeError as err:
        raise StreamdError(NO_THREADS) from err
    except OSError as err:
        raise StreamdError(NO_FILES) from err
    finally:
        over.set()
        for descriptor in descriptors:
            os.close(descriptor)
        for thread in threads:
            thread.join()
