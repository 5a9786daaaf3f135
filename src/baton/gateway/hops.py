"""Headers that concern one connection only, and are not passed on."""

from __future__ import annotations

from collections.abc import Sequence

from baton.router.call import Header

USUAL = frozenset({b"keep-alive", b"close", b"Keep-Alive", b"Close", b"upgrade", b"Upgrade"})


def dropped(always: frozenset[bytes], headers: Sequence[Header]) -> frozenset[bytes]:
    """`always`, and what `Connection` names (RFC 9110, 7.6.1)."""
    for name, value in headers:
        if name == b"connection" and value not in USUAL:
            always = always | {option.strip().lower() for option in value.split(b",")}
    return always
