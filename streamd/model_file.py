"""One version of a model's file: which it is, whether it is the one that was asked for, and how to load it again."""

from __future__ import annotations

import hashlib
import os
import weakref
import zipfile
import zlib
from pathlib import Path

from streamd.config import ModelConfig
from streamd.errors import ModelError
from streamd.infer import Model, Precision, find_device, find_dtype
from streamd.models import weights
from streamd.models.apart import frozen_apart

Identity = tuple[int, int, int, int]  # device, inode, bytes, time of the last change in ns


class ModelFile:
    """The artifact of a configuration as it was when this was made.

    It is held open, so that the version can be loaded again after another file got its name, as `streamd train
    --publish` gives it. That costs a descriptor, and the disk space of a file whose name is gone.
    """

    def __init__(self, config: ModelConfig) -> None:
        """Find and open the file. Raises ModelError where it is missing, foreign, or not the one that is pinned."""
        self.named = weights.locate(config.path)  # what `path` means, which may be a checkpoint
        if not self.named.is_file():
            weights.resolve(self.named)  # raises, and says what to do
        self.identity = _identity(self.named)
        if config.sha256 is not None:
            _check_hash(self.named, config.sha256)
        self.path = weights.resolve(self.named)
        _check_whole(self.path)
        try:
            self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as err:
            raise ModelError(f"{self.path}: cannot be read: {err.strerror}") from err
        weakref.finalize(self, os.close, self._descriptor)
        self._opened = _of_stat(os.fstat(self._descriptor))
        if _identity(self.named) != self.identity:
            raise ModelError(f"{self.named}: was replaced while it was read; try again")

    def load(self, device: str, precision: Precision, *, beside: bool = False) -> Model:
        """Load this version, whatever has its name by now. Raises ModelError and ConfigError.

        `beside` others that are at work: on a CPU they do not stand still meanwhile (models/apart.py).
        """
        held = Path(f"/proc/self/fd/{self._descriptor}")
        path = held if held.exists() else self.path
        found = find_device(device)
        try:
            if not beside or found.type != "cpu":
                model = Model(path, device, precision)
            else:
                with frozen_apart(path, find_dtype(found, precision), (self._descriptor,)) as frozen:
                    model = Model(path, device, precision, frozen=frozen)
        except ModelError as err:
            raise ModelError(str(err).replace(str(held), str(self.path))) from err
        if _of_stat(os.fstat(self._descriptor)) != self._opened:
            raise ModelError(f"{self.path}: was overwritten since it was opened; put the file back, or give another")
        model.path = self.path
        return model

    def is_same_as(self, other: ModelFile) -> bool:
        """Tell whether both are one file with one content."""
        return self.identity == other.identity


def is_replaced(file: ModelFile, config: ModelConfig) -> bool:
    """Tell whether the configuration's path means another file by now, or one that was written anew.

    A file that is gone is no new version.
    """
    try:
        return _identity(weights.locate(config.path, download=False)) != file.identity
    except ModelError:
        return False


def _check_hash(path: Path, wanted: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wanted:
        raise ModelError(
            f"{path}: its sha256 is {found}, and the configuration wants {wanted}: this is another file than the one "
            "that was meant, or it is damaged"
        )


def _check_whole(path: Path) -> None:
    """Compare the checksums in the file, which torch does not look at: a wrong weight would only detect worse."""
    try:
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
    except (OSError, ValueError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error) as err:
        raise ModelError(f"{path}: the file is damaged ({err}); copy it or export it again") from err
    if wrong is not None:
        raise ModelError(f"{path}: the file is damaged: the checksum of {wrong} is wrong; copy it or export it again")


def _identity(path: Path) -> Identity:
    try:
        return _of_stat(path.stat())
    except OSError as err:
        raise ModelError(f"{path}: cannot be read: {err.strerror}") from err


def _of_stat(found: os.stat_result) -> Identity:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
