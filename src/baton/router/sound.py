"""Is a complete reply what it should be? HTTP says that it ended; not that all of it came, nor from whom."""

from __future__ import annotations

import msgspec

from baton.router.call import Call

_VALID = msgspec.json.Decoder(msgspec.Raw)


def is_sound(call: Call) -> bool:
    """Of a good status: an event stream (whose end is looked after elsewhere), or whole JSON. What was taken out of the
    call already is not judged."""
    if call.status >= 300 or call.events or call.held != call.received:
        return True
    try:
        _VALID.decode(call.chunks[0] if len(call.chunks) == 1 else b"".join(call.chunks))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return True
