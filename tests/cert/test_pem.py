from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nebula_mp.cert.pem import Banner, PemBlock, encode_block, parse_blocks
from nebula_mp.errors import CertError
from tests.support import vectors

KEY = encode_block(Banner.X25519_PRIVATE, bytes(32))


@given(st.sampled_from(Banner), st.binary(max_size=300))
def test_what_is_written_is_read_back(banner: Banner, body: bytes) -> None:
    text = encode_block(banner, body)

    assert list(parse_blocks(text, "f")) == [PemBlock(banner, body, "f", 1, 1)]
    assert text.endswith("-----\n")
    assert max(map(len, text.splitlines()[1:-1]), default=0) <= 64


@pytest.mark.parametrize("path", sorted((vectors.DIRECTORY / "certs").iterdir()), ids=lambda path: path.name)
def test_every_file_made_by_nebula_is_read_and_written_alike(path: Path) -> None:
    text = path.read_text()

    blocks = list(parse_blocks(text, "f"))

    assert "".join(encode_block(Banner(each.banner), each.body) for each in blocks) == text


def test_blocks_know_their_number_and_line() -> None:
    text = f"# the old key\n{KEY}\n\n# the new key\n\n{KEY}\n"

    first, second = parse_blocks(text, "/etc/nebula/host.key")

    assert first.where == "/etc/nebula/host.key: block 1 (line 2)"
    assert second.where == "/etc/nebula/host.key: block 2 (line 9)"
    assert second.what == "a host's private key (NEBULA X25519 PRIVATE KEY)"


def test_a_block_of_something_else_says_its_banner() -> None:
    [block] = parse_blocks("-----BEGIN RSA PRIVATE KEY-----\nAAAA\n-----END RSA PRIVATE KEY-----\n", "f")

    assert block.what == '"RSA PRIVATE KEY", which is nothing of Nebula'


def test_line_ends_of_other_systems_and_indentation_do_no_harm() -> None:
    text = "\r\n".join("  " + line for line in KEY.splitlines())

    assert list(parse_blocks(text, "f")) == list(parse_blocks(KEY, "f"))


def test_the_body_never_shows_in_a_repr() -> None:
    [block] = parse_blocks(encode_block(Banner.P256_PRIVATE, b"secret" * 6), "f")

    assert "secret" not in repr(block)


def test_what_follows_the_block_at_which_a_caller_stops_is_not_looked_at() -> None:
    assert next(parse_blocks(KEY + "-----BEGIN cut off", "f")).banner == Banner.X25519_PRIVATE


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        pytest.param("", "f: no PEM block found", id="empty"),
        pytest.param("certificate\n", "f: no PEM block found", id="text only"),
        pytest.param(KEY + "tail\n", "f:4: text after the last PEM block", id="text at the end"),
        pytest.param(KEY + "\n\n# a\n# b\n", "f:6: text after the last PEM block", id="comment at the end"),
        pytest.param(KEY[:-20], "f: block 1 (line 1): BEGIN says", id="END cut off"),
        pytest.param(KEY[:60], "f: block 1 (line 1): has no END line", id="body cut off"),
        pytest.param(KEY[:20], "f: block 1 (line 1): the BEGIN line does not end", id="BEGIN cut off"),
        pytest.param("\n-----END X-----\n", "f:2: END of a block that has no BEGIN", id="no BEGIN"),
        pytest.param(KEY[:60] + "\n" + KEY, "another BEGIN on line 3, before its END", id="END missing"),
        pytest.param(KEY.replace("END NEBULA", "END"), "BEGIN says", id="END of something else"),
        pytest.param(KEY.replace("AAA=", "AA!="), "not base64", id="no base64"),
        pytest.param(KEY.replace("AAA=", "AAA"), "not base64", id="padding missing"),
        pytest.param(KEY.replace("AAA=", "A A="), "not base64", id="blank inside"),
        pytest.param(
            KEY.replace("AAA=", "AA\N{LATIN SMALL LETTER E WITH ACUTE}="), "not base64", id="not ASCII"
        ),
    ],
)
def test_damaged_files_are_refused_with_place_and_reason(text: str, reason: str) -> None:
    with pytest.raises(CertError) as caught:
        list(parse_blocks(text, "f"))

    assert reason in str(caught.value)


@given(
    st.text() | st.lists(st.sampled_from([*KEY.splitlines(), "x", "", "-----BEGIN A-----"])).map("\n".join)
)
def test_any_text_is_made_of_blocks_or_raises_cert_error(text: str) -> None:
    with suppress(CertError):
        assert list(parse_blocks(text, "f"))
