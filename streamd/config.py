"""The configuration: one frozen tree, loaded once by `config_file.load`.

Each field's description is what `streamd config schema` gives to editors.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationInfo, field_validator, model_validator
from pydantic.config import JsonDict

from streamd import curve
from streamd.addresses import is_local_zeromq
from streamd.metrics.endpoint import Endpoint
from streamd.metrics.tls import TlsFiles
from streamd.redact import redact

Auto = Literal["auto"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
_NO_OTHER_NAMES: JsonDict = {"additionalProperties": False}  # or editors would accept what is no Name
REDIS_SCHEMES = (
    *("redis", "rediss", "unix"),
    *("redis+sentinel", "rediss+sentinel"),
    *("redis+cluster", "rediss+cluster"),
)
SCHEMES = ("rtsp", "rtsps", "http", "https", "file", "v4l2")


class Section(BaseModel):
    """A part of a configuration: frozen, no unknown keys, no value of another type, and no secret in its text."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)

    def __repr__(self) -> str:
        return redact(super().__repr__())

    __str__ = __repr__


class GateConfig(Section):
    """What a new version of a model must show before it takes over from the one at work."""

    frames: int = Field(
        8, ge=0, le=1000, description="Live frames of each running stream that both versions are given."
    )
    within_s: float = Field(10, gt=0, le=600, description="The longest wait for these frames.")
    agreement: float | None = Field(
        None, ge=0, le=1, description="Least agreement of the two on them, 0 to 1; null only tells it."
    )
    data: str | None = Field(None, description="A labelled set, as `streamd eval` reads it.")
    min_ap: float | None = Field(None, ge=0, le=1, description="Least AP on `data` (PQ, mIoU of models of segments).")
    pictures: int | None = Field(None, ge=1, description="Pictures of `data`, taken evenly from all; null: all.")

    @model_validator(mode="after")
    def _data_is_judged(self) -> GateConfig:
        if (self.data is None) != (self.min_ap is None):
            raise ValueError("data and min_ap belong together")
        if self.agreement is not None and self.frames == 0:
            raise ValueError("agreement needs frames")
        return self


class ModelConfig(Section):
    """One model and how it is run."""

    path: str = Field(description="An artifact (.pt) made by `streamd export`, or the name of a known model.")
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="auto, cpu, cuda or cuda:N; auto is every GPU, or else the CPU.",
    )
    precision: Literal["auto", "fp32", "fp16", "bf16"] = Field(
        "auto", description="auto: fp16 on a GPU, fp32 on a CPU."
    )
    labels: list[str] | None = Field(None, description="Publish only these labels; all by default.")
    score_threshold: float | None = Field(None, ge=0, le=1, description="Least score; the model's own by default.")
    iou_threshold: float | None = Field(None, ge=0, le=1, description="NMS suppresses above it; the model's own.")
    max_detections: int | None = Field(None, ge=1, le=1000, description="Most objects of a frame; the model's own.")
    max_batch: Auto | Annotated[int, Field(ge=1, le=256)] = Field("auto", description="Most frames of one batch.")
    max_wait_ms: float = Field(
        0, ge=0, le=1000, description="How long an idle worker waits for a fuller batch. On a CPU 0 is best."
    )
    workers: Auto | Annotated[int, Field(ge=1, le=64)] = Field("auto", description="Inference threads on a CPU.")
    threads: Auto | Annotated[int, Field(ge=1, le=256)] = Field("auto", description="CPU threads of each worker.")
    sha256: str | None = Field(
        None, pattern=r"^[0-9a-f]{64}$", description="Of the file, as sha256sum says it; another file is refused."
    )
    gate: GateConfig | None = Field(GateConfig(), description="What a new version must pass; null: only loading.")
    probation_s: float = Field(
        60, ge=0, le=86_400, description="How long the version before stays in memory to take over from a failing one."
    )


class StreamDefaults(Section):
    """What every stream may say, and `defaults:` may say for all of them."""

    model: str | None = Field(None, description="A name under `models:`; not needed where there is only one.")
    fps: float | None = Field(None, gt=0, le=1000, description="Process at most so many frames a second.")
    transport: Literal["tcp", "udp"] = Field("tcp", description="How RTP travels.")
    pace: Literal["realtime", "fast"] = Field(
        "realtime", description="Files only: as a camera would, or as fast as the model can with nothing dropped."
    )
    loop: bool = Field(False, description="Files only: start again at the end.")
    decoder: Literal["auto", "dali", "nvdec", "software"] = Field("auto", description="auto says why in the status.")
    frames: Literal["all", "key"] = Field(
        "all", description="key: decode key frames only; one must come within stall_timeout_s."
    )
    delivery: Literal["live", "stored"] = Field(
        "live", description="stored: into the Redis Stream at least once, through a spool on disk."
    )
    corrupt_frames: Literal["drop", "publish"] = Field("drop", description="What happens to damaged frames.")
    max_latency_ms: float = Field(
        200, gt=0, le=60_000, description="What the stream's user accepts from arrival to result; sizes the batches."
    )
    tls_verify: bool = Field(
        True, description="rtsps and https: check the camera's certificate, and that it is for the URL's host."
    )
    ca_file: str | None = Field(
        None, description="rtsps and https: who signs the camera's certificate; whom the system trusts by default."
    )
    open_timeout_s: float = Field(5, gt=0, le=300, description="For connecting and for the first packets.")
    read_timeout_s: float = Field(5, gt=0, le=300, description="For one read from the connection.")
    stall_timeout_s: float = Field(5, gt=0, le=300, description="Without a frame for so long, the stream reconnects.")


def is_file_url(url: str) -> bool:
    """Tell a file's path or file:// URL from a camera."""
    return "://" not in url or url.startswith("file://")


class StreamConfig(StreamDefaults):
    """One camera, file or device."""

    url: SecretStr = Field(
        description="rtsp://, rtsps://, http(s)://, a file's path, or v4l2:///dev/video0. ${ENV} and ${file:PATH} work."
    )

    @field_validator("url")
    @classmethod
    def _known_scheme(cls, url: SecretStr) -> SecretStr:
        text = url.get_secret_value()
        scheme = urlsplit(text).scheme if "://" in text else "file"
        if scheme not in SCHEMES:
            raise ValueError(f"unknown scheme '{scheme}://'; known are {', '.join(SCHEMES)}, or a file's path")
        if not text.strip():
            raise ValueError("is empty")
        return url

    @property
    def is_file(self) -> bool:
        return is_file_url(self.url.get_secret_value())


class CurveConfig(Section):
    """Keys: what is published is encrypted, and only the listed clients get it."""

    secret_key: SecretStr = Field(
        description="The daemon's secret key, as `streamd keys server` makes it; best as ${file:PATH}."
    )
    clients: str | dict[Name, str] = Field(
        description="A folder with the public keys of those who may subscribe, NAME.public; or the keys by name.",
        json_schema_extra={"additionalProperties": False},
    )

    @field_validator("secret_key")
    @classmethod
    def _is_key(cls, key: SecretStr) -> SecretStr:
        if not curve.is_key(key.get_secret_value()):
            raise ValueError(curve.FORM)
        return key

    @field_validator("clients")
    @classmethod
    def _are_keys(cls, clients: str | dict[str, str]) -> str | dict[str, str]:
        wrong = [] if isinstance(clients, str) else [name for name, key in clients.items() if not curve.is_key(key)]
        if wrong:
            raise ValueError(f"'{wrong[0]}' {curve.FORM}")
        return clients

    @property
    def client_keys(self) -> dict[str, str]:
        """The public keys by name; `config_file.load` has read the folder."""
        assert isinstance(self.clients, dict), "load() replaces a folder by what is in it"
        return self.clients


class ZeroMqConfig(Section):
    insecure: bool = Field(False, description="Allow a `bind` that other machines reach, without keys.")
    curve: CurveConfig | None = Field(
        None, description="Keys (CURVE); null: whoever reaches the address may subscribe."
    )
    bind: str = Field("tcp://127.0.0.1:5555", pattern=r"^(tcp|ipc)://.+", description="Where subscribers connect to.")
    high_water_mark: int = Field(1000, ge=1, description="Messages kept for a slow subscriber before it loses some.")

    @field_validator("bind")
    @classmethod
    def _stays_on_this_machine(cls, bind: str, info: ValidationInfo) -> str:
        has_keys = info.data.get("curve", True) is not None  # wrong ones have an error of their own
        if not (has_keys or info.data.get("insecure") or is_local_zeromq(bind)):
            raise ValueError(
                "other machines reach this address, and whoever does may subscribe; give publish.zeromq.curve (keys "
                "that `streamd keys` makes), use 127.0.0.1 or ipc://, or say insecure: true"
            )
        return bind


class RedisConfig(Section):
    url: SecretStr = Field(
        description="redis://, rediss:// (TLS), unix://, redis+sentinel:// or redis+cluster://; "
        "${ENV} and ${file:PATH} work."
    )
    pubsub: bool = Field(True, description="PUBLISH to streamd:<stream>:<kind>.")
    streams: bool = Field(True, description="XADD to streamd:<stream>.")
    max_len: int = Field(1000, ge=1, description="Entries kept of each Redis stream, about.")
    ca_file: str | None = Field(None, description="TLS: who signed the server's certificate; the system's by default.")
    cert_file: str | None = Field(None, description="TLS: the daemon's own certificate, where Redis asks for one.")
    key_file: str | None = Field(None, description="TLS: the key of cert_file.")
    sentinel_username: str | None = Field(None, description="How to log in to the sentinels, where they ask for it.")
    sentinel_password: SecretStr | None = Field(None, description="Likewise; the URL's login is the servers'.")

    @field_validator("url")
    @classmethod
    def _known_scheme(cls, url: SecretStr) -> SecretStr:
        if url.get_secret_value().partition("://")[0] not in REDIS_SCHEMES:
            raise ValueError(
                "must begin with redis://, rediss://, unix://, redis[s]+sentinel:// or redis[s]+cluster://"
            )
        return url

    @model_validator(mode="after")
    def _tls_is_whole(self) -> RedisConfig:
        if self.tls_options and not self.url.get_secret_value().startswith("rediss"):
            raise ValueError("ca_file, cert_file and key_file need a URL that begins with rediss")
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("cert_file and key_file belong together")
        return self

    @model_validator(mode="after")
    def _sentinels_have_a_login(self) -> RedisConfig:
        if self.sentinel_username is not None and self.sentinel_password is None:
            raise ValueError("sentinel_username needs sentinel_password")
        if self.sentinel_password is not None and "+sentinel:" not in self.url.get_secret_value().partition("//")[0]:
            raise ValueError("sentinel_username and sentinel_password need a redis[s]+sentinel:// URL")
        return self

    @property
    def tls_options(self) -> dict[str, str]:
        """Return the files as redis-py names them."""
        files = {"ssl_ca_certs": self.ca_file, "ssl_certfile": self.cert_file, "ssl_keyfile": self.key_file}
        return {name: path for name, path in files.items() if path is not None}

    @property
    def client_options(self) -> dict[str, str]:
        """Return what the URL does not say, as `redis_connection.make_client` takes it; it holds a password."""
        password = self.sentinel_password.get_secret_value() if self.sentinel_password else None
        login = {"sentinel_username": self.sentinel_username, "sentinel_password": password}
        return self.tls_options | {name: value for name, value in login.items() if value is not None}


class SpoolConfig(Section):
    """Where the entries of `delivery: stored` wait for Redis."""

    path: str | None = Field(
        None, description="The file; $STATE_DIRECTORY/spool.sqlite by default, or ~/.local/state/streamd/spool.sqlite."
    )
    max_entries: int = Field(200_000, ge=1, description="Most entries that wait; what comes then is lost and counted.")
    max_mb: int = Field(512, ge=1, description="Most MiB of entries that wait.")

    @property
    def file(self) -> Path:
        """Where the file is, with the default filled in."""
        if self.path is not None:
            return Path(self.path)
        folder = os.environ.get("STATE_DIRECTORY", "").partition(":")[0]  # systemd gives a list
        return Path(folder or Path.home() / ".local/state/streamd") / "spool.sqlite"


class PublishConfig(Section):
    """Where results go."""

    format: Literal["json", "msgpack"] = Field("json", description="How messages are encoded.")
    queue_size: int = Field(1000, ge=1, description="Messages kept for a publisher that is down or slow.")
    zeromq: ZeroMqConfig | None = Field(ZeroMqConfig(), description="null switches it off.")
    redis: RedisConfig | None = Field(None, description="Redis pub/sub and Streams; off by default.")
    spool: SpoolConfig = SpoolConfig()


class MetricsConfig(Section):
    """What the daemon says of itself."""

    log_interval_s: float = Field(60, gt=0, description="Seconds between the summary lines in the log.")
    insecure: bool = Field(False, description="Allow `listen` beyond this machine, with neither password nor TLS.")
    cert_file: str | None = Field(None, description="TLS: the certificate of these pages.")
    key_file: str | None = Field(None, description="TLS: the key of cert_file.")
    client_ca_file: str | None = Field(None, description="TLS: who signs the certificates that clients then need.")
    listen: str | None = Field(
        "auto",
        description="Where /metrics, /healthz and /readyz are: tcp://ADDRESS:PORT, unix:///PATH or null for nowhere; "
        "auto is tcp://127.0.0.1:9464 unless it is taken.",
    )

    @field_validator("listen")
    @classmethod
    def _stays_on_this_machine(cls, listen: str | None, info: ValidationInfo) -> str | None:
        if listen in (None, "auto"):
            return listen
        endpoint = Endpoint.parse(listen)
        if not (endpoint.is_local or info.data.get("cert_file") or info.data.get("insecure")):
            raise ValueError(
                f"{endpoint.host} is reached from other machines, and the exporter has neither password nor TLS; "
                "give cert_file and key_file, use 127.0.0.1 or unix://, or say insecure: true"
            )
        return listen

    @model_validator(mode="after")
    def _tls_is_whole(self) -> MetricsConfig:
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("cert_file and key_file belong together")
        if self.client_ca_file is not None and self.cert_file is None:
            raise ValueError("client_ca_file needs cert_file and key_file")
        return self

    @property
    def tls(self) -> TlsFiles | None:
        if self.cert_file is None or self.key_file is None:
            return None
        return TlsFiles(self.cert_file, self.key_file, self.client_ca_file)


class ControlConfig(Section):
    """The socket of `streamd status`, `top`, `streams` and `reload`."""

    path: str = Field(
        "auto",
        description="A Unix socket, for the daemon's own user and root alone; auto is $RUNTIME_DIRECTORY/control.sock, "
        "else $XDG_RUNTIME_DIR/streamd/control.sock, else none.",
    )


class Config(Section):
    """The whole file."""

    defaults: StreamDefaults = Field(StreamDefaults(), description="For every stream.")
    models: dict[Name, ModelConfig] = Field(
        min_length=1, description="The models, by name.", json_schema_extra=_NO_OTHER_NAMES
    )
    streams: dict[Name, StreamConfig] = Field(
        min_length=1, description="The cameras, by name.", json_schema_extra=_NO_OTHER_NAMES
    )
    publish: PublishConfig = PublishConfig()
    metrics: MetricsConfig = MetricsConfig()
    control: ControlConfig | None = Field(ControlConfig(), description="null switches it off.")

    @property
    def stored_streams(self) -> frozenset[str]:
        """The streams whose messages reach Redis at least once."""
        return frozenset(name for name, stream in self.streams.items() if stream.delivery == "stored")

    def model_of(self, stream: str) -> str:
        """Name the model of a stream; `config_file.load` has checked that it exists."""
        named = self.streams[stream].model
        return named if named is not None else next(iter(self.models))

    def streams_of(self, model: str) -> list[str]:
        """Name the streams of a model."""
        return [stream for stream in self.streams if self.model_of(stream) == model]


def with_defaults(tree: Any) -> Any:
    """Copy the keys of `defaults:` into each stream that does not say otherwise, before validation."""
    if not isinstance(tree, dict):
        return tree
    defaults, streams = tree.get("defaults"), tree.get("streams")
    if not isinstance(defaults, dict) or not isinstance(streams, dict):
        return tree
    known = {key: value for key, value in defaults.items() if key in StreamDefaults.model_fields}
    merged = {name: {**known, **stream} if isinstance(stream, dict) else stream for name, stream in streams.items()}
    return {**tree, "streams": merged}
