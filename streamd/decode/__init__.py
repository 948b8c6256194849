"""Turn packets into frames: one protocol, several decoders, and a choice that says why."""

from streamd.decode.choose import Choice, Decoders, Wish
from streamd.decode.decoder import Decoder

__all__ = ["Choice", "Decoder", "Decoders", "Wish"]
