"""The few errors of streamd; library errors are translated into these where the library is called."""


class StreamdError(Exception):
    """Anything that streamd itself raises on purpose. The message says what failed, on what, and what to do."""


class ConfigError(StreamdError):
    """The configuration is wrong; nothing was started. The process exits with 78 and systemd does not restart it."""


class ModelError(StreamdError):
    """A model file is missing, truncated, foreign, or does not do what its description says."""


class PublishError(StreamdError):
    """A publisher could not be set up, for example because its port is taken, or its far side fails."""


class SourceError(StreamdError):
    """One stream failed; its supervisor tries again and no other stream notices.

    `state` is the state that the stream enters (see `messages.StreamState`); `permanent` says that
    trying again soon is useless (a wrong password, a missing file), so the longest delay is used.
    """

    def __init__(self, message: str, state: str = "failed", *, permanent: bool = False) -> None:
        super().__init__(message)
        self.state = state
        self.permanent = permanent


class DataError(StreamdError):
    """A data set cannot be read: the message names the file, the place in it, and what to do."""


class OutputError(StreamdError):
    """A picture or video could not be written."""


class WireError(StreamdError):
    """A payload is not a message of streamd, or is one of a schema that is not ours."""


class SubscribeError(StreamdError):
    """A subscriber cannot reach what it asked for, or hears nothing from it."""
