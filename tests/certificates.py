"""Certificates for a camera that speaks TLS, made by openssl."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest


def self_signed(folder: Path, *, host: str = "127.0.0.1") -> tuple[Path, Path]:
    """Return a certificate for a host, which is its own authority, and its key; skip where openssl is missing."""
    if not shutil.which("openssl"):
        pytest.skip("openssl is missing (Debian: openssl)")
    certificate, key = folder / f"{host}.pem", folder / f"{host}.key"
    kind = "IP" if host[0].isdigit() else "DNS"
    new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", str(key)]
    names = ["-subj", f"/CN={host}", "-addext", f"subjectAltName={kind}:{host}"]
    command = ["openssl", "req", "-x509", "-days", "2", *new_key, *names, "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    return certificate, key
