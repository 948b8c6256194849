"""Fuzz one target by atheris: python -m tests.fuzz NAME [-max_total_time=60 and other options of libFuzzer]."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

try:
    import atheris
except ImportError:
    raise SystemExit(
        "atheris is missing: pip install --editable '.[fuzz]' (it has wheels for Python 3.11 to 3.13)"
    ) from None

with atheris.instrument_imports(include=["streamd", "yaml", "redis"]):
    from tests.fuzz.found import FOUND
    from tests.fuzz.target import folder
    from tests.fuzz.targets import TARGETS


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        raise SystemExit(f"{__doc__}\nNames: {', '.join(TARGETS)}")
    name, *options = sys.argv[1:]
    target = TARGETS[name]
    corpus = folder() / "corpus"
    corpus.mkdir()
    for seed in (*target.seeds(), *FOUND.get(name, ())):
        (corpus / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)
    words = folder() / "words"
    words.write_text("".join('"' + "".join(f"\\x{byte:02x}" for byte in word) + '"\n' for word in target.words))
    bounds = ["-timeout=20", "-rss_limit_mb=4096", "-max_len=65536"]
    dictionary = [f"-dict={words}"] if target.words else []  # libFuzzer refuses an empty one
    atheris.Setup([sys.argv[0], *bounds, *options, *dictionary, str(corpus)], target.run)
    atheris.Fuzz()


if __name__ == "__main__":
    assert Path(sys.argv[0]).name == "__main__.py", "is run as a module"
    main()
