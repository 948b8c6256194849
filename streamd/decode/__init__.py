"""Turn packets into frames: one protocol, several decoders, and a choice that says why."""

from streamd.decode.choose import Choice, Decoder, choose_decoder

__all__ = ["Choice", "Decoder", "choose_decoder"]
