"""The gateway's end of TLS."""

from __future__ import annotations

import ssl
from pathlib import Path

from baton.base.config import GatewayConfig
from baton.base.errors import ConfigError


def context(config: GatewayConfig) -> ssl.SSLContext | None:
    """None: plain HTTP. Raises `ConfigError` for files that cannot be used."""
    if not config.tls_cert:
        return None
    made = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)  # TLS 1.2 at least
    made.set_alpn_protocols(["http/1.1"])
    for option, path in (("tls_cert", config.tls_cert), ("tls_key", config.tls_key)):
        if not Path(path).is_file():
            raise ConfigError(f"{option}: {path} is no file")
    try:
        made.load_cert_chain(config.tls_cert, config.tls_key, password=_refuse)
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(
            f"tls_cert {config.tls_cert} and tls_key {config.tls_key} do not work: {_why(error)}"
        ) from error
    if config.tls_client_ca:
        try:
            made.load_verify_locations(config.tls_client_ca)
        except (ssl.SSLError, OSError) as error:
            raise ConfigError(f"tls_client_ca {config.tls_client_ca} does not work: {_why(error)}") from error
        made.verify_mode = ssl.CERT_REQUIRED
    return made


def scheme(config: GatewayConfig) -> str:
    return "https" if config.tls_cert else "http"


def _refuse() -> str:
    """Instead of asking the terminal."""
    raise ssl.SSLError("the key wants a password; decrypt it")


def _why(error: OSError) -> str:
    return str(getattr(error, "reason", None) or error.strerror or error)
