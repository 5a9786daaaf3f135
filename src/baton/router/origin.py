"""The address of a worker."""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import urlsplit

from baton.base.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a worker listens."""

    host: str
    port: int
    tls: bool
    authority: str = field(init=False)
    """host:port, as it stands in URLs and in the Host header."""

    def __post_init__(self) -> None:
        host = f"[{self.host}]" if ":" in self.host else self.host
        object.__setattr__(self, "authority", f"{host}:{self.port}")  # frozen: said once, read for every request

    @classmethod
    def parse(cls, url: str) -> Origin:
        """Raises `ConfigError` for anything but http(s)://host[:port]."""
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            port = parts.port
        except ValueError as error:
            raise ConfigError(f"worker URL {url!r} is not valid: {error}") from error
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path not in ("", "/") or parts.query:
            raise ConfigError(f"worker URL {url!r} must look like http://host:port")
        if any(ord(c) <= 32 or ord(c) > 126 for c in url):
            raise ConfigError(f"worker URL {url!r} has characters that no host name has")
        tls = parts.scheme == "https"
        return cls(parts.hostname, port or (443 if tls else 80), tls)

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.authority}"
