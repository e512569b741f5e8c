from typing import Annotated

import pytest
from cryptography.hazmat import asn1
from hypothesis import example, given
from hypothesis import strategies as st

from nebula_mp.errors import TruncatedError, WireError
from nebula_mp.wire import der


@asn1.sequence
class Numbers:
    """What the second implementation calls a SEQUENCE of an INTEGER, an OCTET STRING and a [5] INTEGER."""

    first: int
    second: bytes
    third: Annotated[int, asn1.Implicit(5)]


numbers = st.integers(-(2**70), 2**70)
contents = st.binary(max_size=300) | st.sampled_from([127, 128, 255, 256, 65_535, 65_536]).map(bytes)
tags = st.integers(0, 255).filter(lambda tag: tag & 0x1F != 0x1F)


@given(numbers, contents, numbers)
def test_what_we_write_is_what_a_second_der_implementation_writes(
    first: int, second: bytes, third: int
) -> None:
    ours = der.encode(
        der.SEQUENCE,
        der.encode(der.INTEGER, der.encode_integer(first)),
        der.encode(der.OCTET_STRING, second),
        der.encode(der.CONTEXT | 5, der.encode_integer(third)),
    )

    assert ours == asn1.encode_der(Numbers(first=first, second=second, third=third))


@given(st.binary(max_size=12) | contents.map(lambda content: der.encode(der.OCTET_STRING, content)))
@example(bytes.fromhex("3080"))
@example(bytes.fromhex("308100"))
@example(bytes.fromhex("30817f"))
@example(bytes.fromhex("0482007f") + bytes(0x7F))
@example(bytes.fromhex("0485000000000100"))
def test_a_single_element_is_accepted_exactly_when_a_second_der_implementation_accepts_it(
    data: bytes,
) -> None:
    def ours() -> tuple[bytes, bytes] | None:
        try:
            reader = der.Reader(data)
            tag, content = reader.read_any()
            reader.finish()
        except WireError:
            return None
        return bytes([tag]), content

    def theirs() -> tuple[bytes, bytes] | None:
        try:
            element = asn1.decode_der(asn1.TLV, data)
        except ValueError:
            return None
        # The one thing we leave out on purpose: tag numbers that need a second byte.
        return (element.tag_bytes, bytes(element.data)) if len(element.tag_bytes) == 1 else None

    assert ours() == theirs()


@given(st.binary(min_size=1, max_size=12))
@example(b"\x00\x7f")
@example(b"\xff\x80")
def test_an_integer_is_read_exactly_as_by_a_second_der_implementation(content: bytes) -> None:
    def ours() -> int | None:
        try:
            return der.parse_integer(content)
        except WireError:
            return None

    def theirs() -> int | None:
        try:
            return asn1.decode_der(int, bytes([der.INTEGER, len(content)]) + content)
        except ValueError:
            return None

    assert ours() == theirs()


@given(numbers)
def test_an_integer_is_read_back(number: int) -> None:
    assert der.parse_integer(der.encode_integer(number)) == number


def test_an_integer_needs_at_least_one_byte() -> None:
    with pytest.raises(WireError, match="no bytes"):
        der.parse_integer(b"")


@given(st.lists(st.tuples(tags, contents), max_size=4))
def test_elements_are_read_back_in_order_and_then_the_reader_is_at_its_end(
    elements: list[tuple[int, bytes]],
) -> None:
    reader = der.Reader(b"".join(der.encode(tag, content) for tag, content in elements))

    read = [reader.read_any() for _ in elements]

    assert read == elements
    assert reader.at_end
    reader.finish()


@given(st.binary(max_size=40))
def test_any_bytes_are_read_or_raise_wire_error_and_nothing_else(data: bytes) -> None:
    reader = der.Reader(data)
    try:
        while not reader.at_end:
            reader.read_any()
    except WireError:
        pass


@given(tags, contents)
def test_an_element_cut_short_anywhere_is_truncated(tag: int, content: bytes) -> None:
    whole = der.encode(tag, content)

    for size in {0, 1, len(whole) // 2, len(whole) - 1}:
        with pytest.raises(TruncatedError):
            der.Reader(whole[:size]).read_any()


@pytest.mark.parametrize(
    ("encoding", "reason"),
    [
        pytest.param("3080", "indefinite", id="indefinite length"),
        pytest.param("308100", "shortest", id="long form of a short length"),
        pytest.param("30820080", "shortest", id="leading zero in the length"),
        pytest.param("3085000000000a", "too long", id="length of five bytes"),
        pytest.param("30ff", "too long", id="reserved length byte"),
        pytest.param("1f2000", "above 30", id="tag number in further bytes"),
    ],
)
def test_encodings_that_are_ber_but_not_der_are_refused(encoding: str, reason: str) -> None:
    with pytest.raises(WireError, match=reason):
        der.Reader(bytes.fromhex(encoding)).read_any()


def test_an_element_of_another_tag_is_refused_by_name() -> None:
    with pytest.raises(WireError, match="expected tag 0x30, found 0x04"):
        der.Reader(bytes.fromhex("0400")).read(der.SEQUENCE)


def test_an_optional_element_is_taken_when_it_is_next_and_else_left_where_it_is() -> None:
    reader = der.Reader(bytes.fromhex("8101aa 820100".replace(" ", "")))

    assert reader.read_optional(0x83) is None
    assert reader.read_optional(0x81) == b"\xaa"
    assert reader.read_optional(0x81) is None
    assert reader.read(0x82) == b"\x00"
    assert reader.read_optional(0x82) is None


def test_a_whole_element_is_given_with_tag_and_length() -> None:
    reader = der.Reader(bytes.fromhex("a003800161") + b"rest")

    assert reader.read_element(0xA0).hex() == "a003800161"


def test_bytes_after_the_last_element_are_refused() -> None:
    reader = der.Reader(bytes.fromhex("040000"))
    reader.read(der.OCTET_STRING)

    with pytest.raises(WireError, match="1 bytes too many"):
        reader.finish()
