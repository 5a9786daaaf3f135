"""Keys: who is who, where keys come from, and that nothing tells them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from baton.base.errors import ConfigError, Forbidden, Unauthorized
from baton.gateway import keys
from baton.gateway.keys import ANY_PRIORITY, Entry, Identity, Keyring, load, parse, read, require, secret
from baton.gateway.ratelimit import RateLimits
from tests.markdown import blocks

ALICE, ROOT = "sk-alice-0123456789", "sk-root-9876543210"


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


FILE = f"""
[[key]]
name = "alice"
key = "{ALICE}"
requests_per_minute = 60
tokens_per_minute = 100000
weight = 2.0
priority_max = 3

[[key]]
name = "root"
sha256 = "{digest(ROOT).upper()}"
role = "admin"
"""


def written(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.fixture
def keyring(tmp_path: Path) -> Keyring:
    return load("", "", str(written(tmp_path / "keys.toml", FILE)), {})


def test_a_key_says_whose_request_it_is(keyring: Keyring) -> None:
    alice = keyring.check([b"Bearer " + ALICE.encode()])
    assert alice == Identity("alice", "user", RateLimits(60, 100_000), 2.0, 3)
    root = keyring.check([], [ROOT.encode()])
    assert root is not None
    assert (root.name, root.role, root.priority_max) == ("root", "admin", 0)


@pytest.mark.parametrize("value", [f"bearer {ALICE}", f"BEARER  {ALICE} ", f" Bearer {ALICE}"])
def test_the_scheme_is_taken_in_any_case(keyring: Keyring, value: str) -> None:
    assert keyring.check([value.encode()]) is not None


@pytest.mark.parametrize(
    ("authorization", "x_api_key"),
    [
        ([], []),
        ([b""], []),
        ([b"Bearer "], []),
        ([b"Bearer"], []),
        ([ALICE.encode()], []),
        ([b"Basic " + ALICE.encode()], []),
        ([b"Bearer " + ALICE.encode()[:-1]], []),
        ([b"Bearer " + ALICE.encode() + b"0"], []),
        ([b"Bearer " + digest(ALICE).encode()], []),
        ([b"Bearer \xff\xfe"], []),
        ([b"Bearer " + ALICE.encode(), b"Bearer " + ROOT.encode()], []),
        ([b"Bearer " + ALICE.encode()], [ROOT.encode()]),
        ([b"Basic x"], [ALICE.encode()]),
        ([], [b""]),
    ],
)
def test_anything_else_is_nobody(keyring: Keyring, authorization: list[bytes], x_api_key: list[bytes]) -> None:
    assert keyring.check(authorization, x_api_key) is None
    assert keyring.check([b"Bearer " + ALICE.encode()]) is not None, "a wrong key changes nothing for the right one"
    assert keyring.check(authorization, x_api_key) is None


def test_the_same_key_in_both_headers_is_one_key(keyring: Keyring) -> None:
    headers = [(b"x-api-key", ALICE.encode()), (b"host", b"here"), (b"authorization", b"Bearer " + ALICE.encode())]
    found = keyring.identify(headers)
    assert found is not None
    assert found.name == "alice"
    assert keyring.identify(headers[1:2]) is None


def test_what_is_remembered_is_bounded_and_right() -> None:
    """More keys than are remembered, in turns: each is still its owner's, and guesses are not remembered."""
    ring = Keyring([(hashlib.sha256(b"%d" % n).digest(), Identity(str(n))) for n in range(200)])
    for _ in range(2):
        for n in range(200):
            found = ring.check([], [b"%d" % n])
            assert found is not None
            assert found.name == str(n)
    for n in range(1000, 2000):
        assert ring.check([], [b"%d" % n]) is None
    assert len(ring._known) == keys.REMEMBERED
    assert all(len(digest) == 32 for digest in ring._known)
    assert {owner.name for owner in ring._known.values()} == {str(n) for n in range(200 - keys.REMEMBERED, 200)}


def test_every_key_is_compared_however_early_one_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []

    def compare(known: bytes, given: bytes) -> bool:
        compared.append(known)
        return known == given

    ring = Keyring([(hashlib.sha256(b"%d" % n).digest(), Identity(str(n))) for n in range(5)])
    monkeypatch.setattr("hmac.compare_digest", compare)
    assert ring.check([], [b"0"]) is not None
    assert len(compared) == 5
    assert ring.check([], [b"x"]) is None
    assert len(compared) == 10


def test_roles() -> None:
    user, admin = Identity("u"), Identity("a", "admin")
    assert require(user, "user") is user
    assert require(admin, "user") is admin
    assert require(admin, "admin") is admin
    with pytest.raises(Forbidden) as forbidden:
        require(user, "admin")
    assert forbidden.value.status == 403
    with pytest.raises(Unauthorized):
        require(None, "user")


def role_of(ring: Keyring, key: str) -> str:
    found = ring.check([b"Bearer " + key.encode()] if key else [])
    return found.role if found else "nobody"


@pytest.mark.parametrize(
    ("api_key", "admin_api_key", "roles"),
    [
        ("", "", {"": "admin", "u": "admin", "a": "admin"}),
        ("u", "", {"": "nobody", "u": "admin", "a": "nobody"}),
        ("u", "a", {"": "nobody", "u": "user", "a": "admin"}),
        ("", "a", {"": "user", "u": "user", "a": "admin"}),
        ("a", "a", {"": "nobody", "u": "nobody", "a": "admin"}),
    ],
)
def test_the_two_options(api_key: str, admin_api_key: str, roles: dict[str, str]) -> None:
    ring = load(api_key, admin_api_key, "", {})
    assert {key: role_of(ring, key) for key in roles} == roles


def test_a_file_beside_the_options(tmp_path: Path) -> None:
    path = written(tmp_path / "keys.toml", FILE)
    ring = load("u", "", str(path), {})
    assert {key: role_of(ring, key) for key in (ALICE, ROOT, "u", "", "x")} == {
        ALICE: "user",
        ROOT: "admin",
        "u": "user",
        "": "nobody",
        "x": "nobody",
    }
    with pytest.raises(ConfigError, match="'alice' and 'api-key' have the same key"):
        load(ALICE, "", str(path), {})


def test_own_keys_may_ask_for_any_priority() -> None:
    found = load("u", "", "", {}).check([b"Bearer u"])
    assert found is not None
    assert found.priority_max == ANY_PRIORITY


def test_the_environment_stands_in_for_options(tmp_path: Path) -> None:
    path = written(tmp_path / "key", "from-file\n")
    environ = {"BATON_API_KEY": "from-env", "BATON_ADMIN_API_KEY": f"@{path}"}
    ring = load("", "", "", environ)
    assert role_of(ring, "from-env") == "user"
    assert role_of(ring, "from-file") == "admin"
    assert secret("given", "api_key", environ) == "given"
    assert secret("", "worker_api_key", environ) == ""


@pytest.mark.parametrize("what", ["open", "empty", "missing"])
def test_a_key_file_that_will_not_do(tmp_path: Path, what: str) -> None:
    path = tmp_path / "key"
    if what != "missing":
        written(path, "" if what == "empty" else ALICE, 0o604 if what == "open" else 0o600)
    with pytest.raises(ConfigError, match={"open": "chmod 600", "empty": "is empty", "missing": "No such file"}[what]):
        secret(f"@{path}", "api_key", {})


def test_a_file_that_everybody_reads_may_hold_digests_only(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"chmod 600 .*sha256") as refused:
        read(written(tmp_path / "clear.toml", FILE, 0o644))
    assert ALICE not in str(refused.value)
    text = f'[[key]]\nname = "root"\nsha256 = "{digest(ROOT)}"'
    assert len(read(written(tmp_path / "hashed.toml", text, 0o644))) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no \\[\\[key\\]\\]"),
        ("[[keys]]\nname = 'a'", "unknown table 'keys'"),
        ("[key]\nname = 'a'", "array"),
        ("[[key]]\nname = ?", "line 2"),
        ("[[key]]\nkey = 'sk-x'", "name"),
        ("[[key]]\nname = 'a'", "either key or sha256"),
        (f"[[key]]\nname = 'a'\nkey = 'sk-x'\nsha256 = '{digest('x')}'", "either key or sha256"),
        ("[[key]]\nname = 'a'\nsha256 = 'abc'", "64 hexadecimal"),
        (f"[[key]]\nname = 'a'\nsha256 = '{digest('')}'", "empty key"),
        ("[[key]]\nname = 'a'\nkey = 'sk-x '", "white space"),
        ("[[key]]\nname = 'a'\nkey = 'sk-x'\nrole = 'root'", "root"),
        ("[[key]]\nname = 'a'\nkey = 'sk-x'\nweight = 0", "weight"),
        ("[[key]]\nname = 'a'\nkey = 'sk-x'\nweight = nan", "weight"),
        ("[[key]]\nname = 'a'\nkey = 'sk-x'\nrequests_per_minute = -1", "negative"),
        ("[[key]]\nname = 'a'\nkey = 'sk-x'\nrpm = 1", "rpm"),
    ],
)
def test_what_is_wrong_with_a_file(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        parse(text, "keys.toml")
    assert "sk-x" not in str(refused.value)


def test_names_are_given_once(tmp_path: Path) -> None:
    text = "[[key]]\nname = 'a'\nkey = 'x'\n[[key]]\nname = 'a'\nkey = 'y'"
    with pytest.raises(ConfigError, match="two keys are called 'a'"):
        load("", "", str(written(tmp_path / "keys.toml", text)), {})


def test_no_repr_shows_a_key(keyring: Keyring) -> None:
    keyring.check([b"Bearer " + ALICE.encode()])
    shown = [keyring, keyring.check([b"Bearer " + ALICE.encode()]), *parse(FILE, "keys.toml")]
    for thing in shown:
        for text in (repr(thing), str(thing), f"{thing}"):
            assert ALICE not in text
            assert digest(ROOT) not in text.lower()
    assert repr(Entry("alice", ALICE)) == "<Entry alice user>"


def test_the_example_in_the_documents_is_taken() -> None:
    (example,) = blocks(Path(__file__).parents[2] / "docs" / "overload.md", "toml")
    (entry,) = parse(example, "docs")
    assert entry.identity() == Identity("alice", "user", RateLimits(600, 200_000), 2.0, 0)
