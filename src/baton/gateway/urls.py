"""What a request is for: path and query, in the one spelling that everything behind this means by it.

Which route it is decides what is done to a request (its prompt is weighed, its P/D fields are taken out), and a worker
decides once more. Both must come to the same: `/v1/%63ompletions` is `/v1/completions` to a worker.
"""

from __future__ import annotations

import re

PLAIN = re.compile(r"/[A-Za-z0-9._~:@!$&'()*+,;=/-]*")
ORIGIN = re.compile(r"https?://[^/?@]*", re.IGNORECASE)
ESCAPE = re.compile(r"%([0-9A-Fa-f]{2})")
UNRESERVED = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
UNPRINTABLE = frozenset(chr(code) for code in (*range(0x20), 0x7F))


def split(url: str) -> tuple[str, str]:
    """(path, query) of a request target. An absolute one (`http://host/path`, for those who take us for their proxy)
    means its path. Raises `ValueError` for other forms, fragments, `.` and `..`, empty segments, and escapes that hide
    a control character or are none."""
    path, _, query = url.partition("?")
    if _plain(path) and "#" not in query:
        return path, query
    origin = ORIGIN.match(path)
    if origin is not None:
        path = path[origin.end() :] or "/"
    path = ESCAPE.sub(_unescape, path)
    if "#" in query or not _plain(ESCAPE.sub("x", path)):
        raise ValueError(url)
    return path, query


def _plain(path: str) -> bool:
    """No escapes, no empty segments, none that begins with a dot."""
    return PLAIN.fullmatch(path) is not None and "//" not in path and "/." not in path


def _unescape(escape: re.Match[str]) -> str:
    """Written out if it needs no escape (RFC 3986, 6.2.2.2), else in capitals."""
    char = chr(int(escape[1], 16))
    if char in UNPRINTABLE:
        raise ValueError(escape[0])
    return char if char in UNRESERVED else escape[0].upper()
