"""What routing knows of a request: sizes as estimates, the prompt as bytes nobody has parsed."""

from __future__ import annotations

import msgspec


class Ask(msgspec.Struct, frozen=True):
    """What routing knows of a request. Made once per request and handed on, so caches may key on its identity."""

    prompt_tokens: int
    """Estimate: a token is about four bytes."""
    max_tokens: int
    """Tokens that may be generated."""
    prompt: bytes = b""
    """The JSON value of `messages`, `prompt`, `text` or `input_ids`, as the client wrote it. Prompts that begin alike
    have bytes that begin alike."""
    key: bytes = b""
    """From a header: requests with the same key belong together. Empty: none."""
    salt: bytes = b""
    """Prompts with different salts share no cache."""
