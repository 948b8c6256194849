"""Open a camera, a file or a device and read its packets: one thread a stream, errors for somebody else to retry."""

from streamd.sources.options import SourceOptions
from streamd.sources.source import Source, Transport, open_source
from streamd.sources.timeline import Timeline

__all__ = ["Source", "SourceOptions", "Timeline", "Transport", "open_source"]
