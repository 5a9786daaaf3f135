"""Who asks: API keys, whose they are and what they allow.

    keyring = load(config.api_key, config.admin_api_key, config.api_keys, os.environ)
    identity = require(keyring.identify(headers), "user")      Unauthorized, Forbidden

Only SHA-256 digests of keys are kept, and nothing here shows a key in its `repr` or in an error.
"""

from __future__ import annotations

import hmac
import math
import os
import re
import stat
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import msgspec

from baton.base.errors import ConfigError, Forbidden, Unauthorized
from baton.gateway.ratelimit import UNLIMITED, RateLimits

Header = tuple[bytes, bytes]
Role = Literal["user", "admin"]
"""An admin may do all that a user may."""

ANY_PRIORITY = 2**31
REMEMBERED = 64
"""Keys whose owner is known without looking at all of them."""
OPTIONS = {
    "api_key": "BATON_API_KEY",
    "admin_api_key": "BATON_ADMIN_API_KEY",
    "worker_api_key": "BATON_WORKER_API_KEY",
}
"""Options that are keys, and the environment variables that stand for them."""
NO_KEY = sha256().hexdigest()
READABLE = "is readable by everybody on this machine, and holds keys in clear; chmod 600 it"


@dataclass(frozen=True, slots=True)
class Identity:
    """Whose request it is."""

    name: str
    role: Role = "user"
    limits: RateLimits = UNLIMITED
    weight: float = 1.0
    """Share of the capacity while requests wait, relative to other keys'."""
    priority_max: int = ANY_PRIORITY
    """Requests with a higher priority are served as if they had this one."""


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[[key]]` in the file: `key`, or `sha256`, its digest in hexadecimal."""

    name: str
    key: str = ""
    sha256: str = ""
    role: Role = "user"
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    weight: float = 1.0
    priority_max: int = 0

    def __repr__(self) -> str:
        return f"<Entry {self.name} {self.role}>"

    def identity(self) -> Identity:
        limits = RateLimits(self.requests_per_minute, self.tokens_per_minute)
        return Identity(self.name, self.role, limits, self.weight, self.priority_max)


class Keyring:
    """Digests of keys and their owners.

    A check hashes what was given and compares the digest with every one there is, each in constant time, so its
    duration tells nothing about how near a guess is. Digests that were right are remembered: those take one look-up,
    which tells only that the key is right. Linear in the number of keys, which is meant for hundreds.
    """

    __slots__ = ("_anonymous", "_keys", "_known")

    def __init__(self, keys: Iterable[tuple[bytes, Identity]] = (), anonymous: Identity | None = None) -> None:
        """`keys`: (SHA-256 digest, owner). `anonymous`: who asks without a key, or with one that is not known; None:
        nobody may."""
        self._keys = tuple(keys)
        self._anonymous = anonymous
        self._known: dict[bytes, Identity] = {}

    def __repr__(self) -> str:
        return f"<Keyring {len(self._keys)} keys>"

    def identify(self, headers: Sequence[Header]) -> Identity | None:
        """`check` with the headers of a request; their names are in lower case."""
        if not self._keys:
            return self._anonymous
        return self.check(
            [value for name, value in headers if name == b"authorization"],
            [value for name, value in headers if name == b"x-api-key"],
        )

    def check(self, authorization: Sequence[bytes], x_api_key: Sequence[bytes] = ()) -> Identity | None:
        """Whose key these headers' values carry. None: there is none, it is wrong, or they do not agree."""
        if not self._keys:
            return self._anonymous
        given = {bearer(value) for value in authorization} if authorization else set()
        given.update(x_api_key)
        if len(given) != 1:
            return self._anonymous if not given else None
        digest = sha256(given.pop()).digest()
        return self._known.get(digest) or self._find(digest) or self._anonymous

    def _find(self, digest: bytes) -> Identity | None:
        found = None
        for known, identity in self._keys:
            if hmac.compare_digest(known, digest):
                found = identity  # and on: the position of a key is nobody's business
        if found is not None:
            if len(self._known) >= REMEMBERED:
                del self._known[next(iter(self._known))]
            self._known[digest] = found
        return found


def bearer(authorization: bytes) -> bytes:
    """The token; empty, which is nobody's, if the scheme is another one."""
    scheme, _, token = authorization.strip().partition(b" ")
    return token.strip() if scheme.lower() == b"bearer" else b""


def require(identity: Identity | None, role: Role) -> Identity:
    """Raises `Unauthorized` for nobody, `Forbidden` for a user who wants what is an admin's."""
    if identity is None:
        raise Unauthorized("an API key is missing or wrong; send it as: Authorization: Bearer KEY, or x-api-key: KEY")
    if role == "admin" and identity.role != "admin":
        raise Forbidden("this needs the API key of an admin")
    return identity


def load(api_key: str, admin_api_key: str, file: str, environ: Mapping[str, str]) -> Keyring:
    """What the options say, and the environment where they say nothing. Raises `ConfigError`.

    `api_key` is an admin's as long as there is no other key for admins. Without any key everybody is an admin; with
    `admin_api_key` alone everybody is a user.
    """
    user, admin = secret(api_key, "api_key", environ), secret(admin_api_key, "admin_api_key", environ)
    keys = read(Path(file)) if file else []
    admins = bool(admin) or any(identity.role == "admin" for _, identity in keys)
    if admin:
        keys.append((_digest(admin), Identity("admin-api-key", "admin")))
    if user and user != admin:
        keys.append((_digest(user), Identity("api-key", "user" if admins else "admin")))
    _check_unique(keys)
    if user or file:
        return Keyring(keys)
    return Keyring(keys, Identity("", "user" if admins else "admin"))


def secret(value: str, option: str, environ: Mapping[str, str]) -> str:
    """The key itself: `value`, else the option's environment variable; both may be @/path/to/file. "": there is none.
    Raises `ConfigError`."""
    value = value or environ.get(OPTIONS[option], "")
    if not value.startswith("@"):
        return value
    path = Path(value[1:])
    text, private = _read(path)
    if not private:
        raise ConfigError(f"{option}: {path} {READABLE}")
    if not text.strip():
        raise ConfigError(f"{option}: {path} is empty")
    return text.strip()


def read(path: Path) -> list[tuple[bytes, Identity]]:
    """The file of `--api-keys`. Raises `ConfigError` that says what is wrong with which entry."""
    text, private = _read(path)
    entries = parse(text, str(path))
    if not private and any(entry.key for entry in entries):
        raise ConfigError(f"api_keys: {path} {READABLE}, or write sha256 instead of key")
    return [
        (bytes.fromhex(entry.sha256) if entry.sha256 else _digest(entry.key), entry.identity()) for entry in entries
    ]


def parse(text: str, where: str) -> list[Entry]:
    """The entries of a file's text, checked. Raises `ConfigError`."""
    try:
        table: dict[str, Any] = tomllib.loads(text)
        unknown = set(table) - {"key"}
        if unknown:
            raise ConfigError(f"api_keys: {where}: unknown table {min(unknown)!r}; entries are written [[key]]")
        entries = msgspec.convert(table.get("key", []), list[Entry])
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"api_keys: {where}: {error}") from None
    except msgspec.ValidationError as error:
        raise ConfigError(f"api_keys: {where}: {error} (in [[key]])") from None
    if not entries:
        raise ConfigError(f"api_keys: {where} has no [[key]]")
    for entry in entries:
        wrong = _wrong(entry)
        if wrong:
            raise ConfigError(f"api_keys: {where}: key of {entry.name!r}: {wrong}")
    return entries


def _wrong(entry: Entry) -> str:
    if not entry.name:
        return "it needs a name"
    if bool(entry.key) == bool(entry.sha256):
        return "it needs either key or sha256"
    if entry.sha256 and not re.fullmatch(r"[0-9a-fA-F]{64}", entry.sha256):
        return "sha256 must be 64 hexadecimal digits"
    if entry.sha256.lower() == NO_KEY:
        return "sha256 is that of an empty key"
    if entry.key != entry.key.strip():
        return "key begins or ends with white space"
    if not 0 < entry.weight < math.inf:
        return "weight must be greater than 0"
    if min(entry.requests_per_minute, entry.tokens_per_minute) < 0:
        return "limits must not be negative; 0 is unlimited"
    return ""


def _check_unique(keys: list[tuple[bytes, Identity]]) -> None:
    names, digests = set[str](), dict[bytes, str]()
    for digest, identity in keys:
        if identity.name in names:
            raise ConfigError(f"api_keys: two keys are called {identity.name!r}")
        if digest in digests:
            raise ConfigError(f"api_keys: {digests[digest]!r} and {identity.name!r} have the same key")
        names.add(identity.name)
        digests[digest] = identity.name


def _digest(key: str) -> bytes:
    return sha256(key.encode()).digest()


def _read(path: Path) -> tuple[str, bool]:
    """A file's text, and whether it is hidden from others. Raises `ConfigError`."""
    try:
        with path.open(encoding="utf-8") as file:
            mode = os.fstat(file.fileno()).st_mode
            return file.read(), os.name != "posix" or not mode & stat.S_IROTH
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(f"cannot read keys from {path}: {reason}") from None
