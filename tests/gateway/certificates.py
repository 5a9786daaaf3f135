"""Throw-away certificates for localhost, made by the openssl program."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Certificates:
    """Paths: an authority, and a certificate that it signed, with its key."""

    authority: Path
    cert: Path
    key: Path


def make(directory: Path, name: str = "one") -> Certificates:
    directory.mkdir(exist_ok=True)
    made = Certificates(directory / "ca.pem", directory / f"{name}.pem", directory / f"{name}.key")
    ca_key, request = directory / "ca.key", directory / f"{name}.csr"
    if not made.authority.exists():
        _openssl(
            "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=authority"
            " -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign",
            "-keyout", ca_key, "-out", made.authority,
        )  # fmt: skip
    _openssl(
        "req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=localhost"
        " -addext subjectAltName=DNS:localhost,IP:127.0.0.1",
        "-keyout", made.key, "-out", request,
    )  # fmt: skip
    _openssl(
        "x509 -req -days 2 -copy_extensions copy -CAcreateserial",
        "-in", request, "-CA", made.authority, "-CAkey", ca_key, "-out", made.cert,
    )  # fmt: skip
    return made


def _openssl(words: str, *paths: str | Path) -> None:
    subprocess.run(["openssl", *words.split(), *map(str, paths)], check=True, capture_output=True)
