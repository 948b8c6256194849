"""TLS for the daemon's pages."""

from __future__ import annotations

import ssl
from dataclasses import dataclass

from streamd.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Where the server's certificate is, and who signs those of the clients, where they need one."""

    cert_file: str
    key_file: str
    client_ca_file: str | None = None

    def context(self) -> ssl.SSLContext:
        """Read the files. Raises ConfigError."""
        files = ", ".join(filter(None, (self.cert_file, self.key_file, self.client_ca_file)))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self.cert_file, self.key_file)
            if self.client_ca_file is not None:
                context.load_verify_locations(self.client_ca_file)
                context.verify_mode = ssl.CERT_REQUIRED
        except ssl.SSLError as err:
            raise ConfigError(f"metrics: {err.reason or err}; look at {files}") from err
        except OSError as err:
            raise ConfigError(f"metrics: cannot read one of {files}: {err.strerror}") from err
        return context
