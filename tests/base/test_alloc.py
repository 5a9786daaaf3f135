import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.base.alloc import BACKENDS, Allocation, Dims, Pair, parse
from baton.base.errors import ConfigError

sizes = st.integers(1, 999)
dims = st.builds(Dims, sizes, sizes, sizes, sizes, sizes)
allocations = st.builds(
    Allocation,
    st.sampled_from(BACKENDS),
    dims | st.builds(Pair, dims, dims),
    st.from_regex(r"[A-Za-z_][A-Za-z0-9_]*", fullmatch=True) | st.just(""),
)


@given(allocations)
def test_text_of_an_allocation_parses_to_it(allocation: Allocation) -> None:
    assert parse(str(allocation)) == allocation


@given(allocations, st.sampled_from([" ", "\t", "\n", "  "]))
def test_white_space_between_tokens_means_nothing(allocation: Allocation, space: str) -> None:
    text = str(allocation)
    for sign in "()[]|:":
        text = text.replace(sign, f"{space}{sign}{space}")
    assert parse(f"{space}{text}{space}") == allocation


@pytest.mark.parametrize(
    ("text", "shape", "world_size"),
    [
        ("native(P:d1t1p1|D:d1t1p1)", Pair(Dims(), Dims()), 2),
        ("native:d2t1p1", Dims(d=2), 2),
        ("sglang:d4p2t2", Dims(4, 2, 2), 16),
        ("sglang:t2", Dims(t=2), 2),
        ("vllm(D:d1t1p1|P:d3t2p1)", Pair(Dims(3, 2), Dims()), 7),
        ("native(P:d1c2|D:e4)", Pair(Dims(c=2), Dims(e=4)), 3),
        ("sglang (P : d1 t 1 | D : d1)", Pair(Dims(), Dims()), 2),
    ],
)
def test_shapes(text: str, shape: Dims | Pair, world_size: int) -> None:
    allocation = parse(text)
    assert allocation.shape == shape
    assert allocation.world_size == world_size


def test_a_name() -> None:
    assert parse("native[chat](D:d2|P:d1)").name == "chat"
    assert str(parse("native[chat](D:d2|P:d1)")) == "native[chat](P:d1t1p1|D:d2t1p1)"
    assert str(parse("native[chat]:t2")) == "native[chat]:d1t2p1"


@pytest.mark.parametrize(
    ("text", "column", "words"),
    [
        ("", 0, "expected a backend"),
        ("natve:d2", 0, 'unknown backend "natve"; known: native, sglang, vllm (did you mean "native"?)'),
        ("NATIVE:d2", 0, "unknown backend"),
        ("native", 6, 'expected "(" or ":" or "["'),
        ("native.d4", 6, 'write ":" for "."'),
        ("native:", 7, "expected a dimension"),
        ("native:d", 8, "expected a number from 1"),
        ("native:d0", 8, "expected a number from 1"),
        ("native:d-1", 8, "expected a number from 1"),
        ("native:x2", 7, 'unknown dimension "x"; known: c, d, e, p, t'),
        ("native:D2", 7, 'did you mean "d"?'),
        ("native:d2d4", 9, "dimension d is given twice"),
        ("native:d2)", 9, "expected the end"),
        ("native:d2+fsdp:d4", 9, "one component only"),
        ("native:(P:d1|D:d1)", 7, 'no ":" before "("'),
        ("native(P:d1|D:d1", 16, 'expected ")" or "|"'),
        ("native(P:d1)", 11, "no D (decode) group"),
        ("native(D:d1)", 11, "no P (prefill) group"),
        ("native(P:d1|P:d2)", 12, "P is there already"),
        ("native(P:d1|D:d1|E:d1)", 17, "a group is P (prefill) or D (decode)"),
        ("native(p:d1|D:d1)", 7, 'did you mean "P"?'),
        ("native(prefill:d1|D:d1)", 7, 'did you mean "P"?'),
        ("native(P:|D:d1)", 9, "expected a dimension"),
        ("native[1a]:d2", 7, "expected a name"),
        ("native[]:d2", 7, "expected a name"),
        ("native\n:d1\n t0", 13, "expected a number from 1"),
    ],
)
def test_a_mistake_is_pointed_at(text: str, column: int, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(text)
    message, line, caret = error.value.message.rsplit("\n", 2)
    assert message.startswith("allocation: ")
    assert words in message
    start = text.rfind("\n", 0, column) + 1
    assert line == "    " + text[start:].split("\n")[0]
    assert caret == " " * (4 + column - start) + "^"


@given(st.text(alphabet="nativePD(:|)[]dtp123 +.", max_size=30))
def test_any_text_is_an_allocation_or_a_config_error(text: str) -> None:
    with contextlib.suppress(ConfigError):
        assert parse(str(parse(text))) == parse(text)
