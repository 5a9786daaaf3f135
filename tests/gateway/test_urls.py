"""Request targets: one spelling, or none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.gateway.urls import split


@pytest.mark.parametrize(
    ("url", "path", "query"),
    [
        ("/", "/", ""),
        ("/v1/chat/completions", "/v1/chat/completions", ""),
        ("/x?", "/x", ""),
        ("/x?a=b?c/../d", "/x", "a=b?c/../d"),
        ("/workers/", "/workers/", ""),
        ("/v1/%63ompletions", "/v1/completions", ""),
        ("/%2D%2e%5F%7E%61x", "/-._~ax", ""),
        ("/v1/models/org%2fname", "/v1/models/org%2Fname", ""),
        ("/v1/models/%C3%a9", "/v1/models/%C3%A9", ""),
        ("/v1/a%2563", "/v1/a%2563", ""),  # not unescaped twice
        ("http://host/x?y", "/x", "y"),
        ("HTTPS://host:8000", "/", ""),
        ("http://host?y/z", "/", "y/z"),
        ("http://host/v1/%63ompletions", "/v1/completions", ""),
    ],
)
def test_there_is_one_spelling(url: str, path: str, query: str) -> None:
    assert split(url) == (path, query)


@pytest.mark.parametrize(
    "url",
    [
        "", "*", "x", "host:80", "ftp://host/x", "http://user@host/x", "//host/x", "/x//y", "/v1//", "/x/./y", "/x/..",
        "/../x", "/x/%2e%2e/y", "/%2E", "/x#y", "/x?y#z", "/x%", "/x%4", "/x%zz", "/x%00", "/x%0d%0a", "/x%7F", "/x\\y",
        "/x y", "/x\"", "/<x>", "/x|y", "/\u00e9", "/.well-known", "http://host//x", "http://host/../x",
    ],
)  # fmt: skip
def test_what_could_be_read_otherwise_is_refused(url: str) -> None:
    with pytest.raises(ValueError):
        split(url)


@given(st.text(st.sampled_from("/.%2eE5cC63#?\\:@ahtp"), max_size=30))
def test_reading_it_again_changes_nothing(url: str) -> None:
    try:
        path, query = split(url)
    except ValueError:
        return
    assert split(f"{path}?{query}" if query else path) == (path, query)
    assert path.startswith("/")
    assert not {"", ".", ".."} & set(path.split("/")[1:-1])
