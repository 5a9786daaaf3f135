"""The dashboard: one page with everything in it, put together from its parts when it is asked for."""

from __future__ import annotations

import base64
import functools
from dataclasses import dataclass
from hashlib import sha256
from importlib import resources

SCRIPTS = ("dom.js", "flow.js", "picture.js", "page.js")


@dataclass(frozen=True, slots=True)
class Page:
    html: bytes
    policy: str
    """`Content-Security-Policy`: this script and no other, no other origin."""


@functools.cache
def page() -> Page:
    parts = resources.files(__name__)
    style = parts.joinpath("style.css").read_bytes()
    script = b"\n".join(parts.joinpath(name).read_bytes() for name in SCRIPTS)
    html = parts.joinpath("index.html").read_bytes().replace(b"/*style*/", style).replace(b"/*script*/", script)
    digest = base64.b64encode(sha256(script).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return Page(html, policy)
