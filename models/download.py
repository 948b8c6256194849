"""Fetch a file whose sha256 is known."""

from __future__ import annotations

import hashlib
import http.client
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from streamd.errors import ModelError
from streamd.replacing import replacing

CHUNK_BYTES = 1 << 18
TIMEOUT_S = 30.0  # to connect, and for each read

Progress = Callable[[int, int | None], None]  # bytes so far, bytes in all where the server says


def fetch(url: str, sha256: str, target: Path, progress: Progress) -> None:
    """Fetch `url` to `target`; the file appears there complete and with this sha256, or not at all.

    Raises ModelError that names the URL and the reason.
    """
    digest, num_bytes, total = hashlib.sha256(), 0, None
    try:
        with replacing(target) as new, new.open("wb") as file:
            for chunk, total in _chunks(url):
                file.write(chunk)
                digest.update(chunk)
                num_bytes += len(chunk)
                progress(num_bytes, total)
            if total is not None and num_bytes < total:
                raise ModelError(f"{url}: cut off after {num_bytes} of {total} bytes")
            if (got := digest.hexdigest()) != sha256:
                raise ModelError(f"{url}: its sha256 is {got}, expected {sha256}; the file was not kept")
    except OSError as err:
        raise ModelError(f"cannot write {target}: {err}") from err


def _chunks(url: str) -> Iterator[tuple[bytes, int | None]]:
    """Yield what the server sends, with the length of all of it where it says so. Raises ModelError."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:
            length = response.headers.get("Content-Length")
            total = int(length) if length else None
            while chunk := response.read(CHUNK_BYTES):
                yield chunk, total
    except urllib.error.HTTPError as err:
        raise ModelError(f"{url}: the server answers {err.code} {err.reason}") from err
    except urllib.error.URLError as err:
        raise ModelError(f"{url}: {err.reason}") from err
    except (http.client.HTTPException, OSError) as err:
        raise ModelError(f"{url}: {err or type(err).__name__}") from err


@contextmanager
def progress_bar(title: str) -> Iterator[Progress]:
    """Draw a bar on stderr, so that stdout stays for data."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
