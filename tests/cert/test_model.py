from dataclasses import replace

import pytest

from nebula_mp.cert.model import format_network, format_time
from nebula_mp.newtypes import Curve
from tests.cert.helpers import AT, DAY, make_ca, make_host, networks


@pytest.mark.parametrize("version", [1, 2])
def test_the_other_form_of_the_other_form_of_a_p256_signature_is_the_first(version: int) -> None:
    certificate = make_host(make_ca(curve=Curve.P256), version=version).certificate
    other = replace(certificate, signature=_other_form(certificate.signature))

    assert other.fingerprint == certificate.alternate_fingerprint
    assert other.alternate_fingerprint == certificate.fingerprint
    assert other.fingerprint != certificate.fingerprint


def _other_form(signature: bytes) -> bytes:
    """Written out once more, with the order of the group from SEC 2."""
    order = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
    size_r = signature[3]
    r, s = signature[2 : 4 + size_r], int.from_bytes(signature[6 + size_r :])
    raw = (order - s).to_bytes(33).lstrip(b"\0")
    raw = b"\0" + raw if raw[0] & 0x80 else raw
    body = r + bytes([2, len(raw)]) + raw
    return bytes([0x30, len(body)]) + body


def test_ed25519_certificates_have_one_fingerprint() -> None:
    assert make_ca().certificate.alternate_fingerprint is None


def test_a_malformed_p256_signature_has_no_other_form() -> None:
    certificate = replace(make_ca(curve=Curve.P256).certificate, signature=b"\x30\x00")

    assert certificate.alternate_fingerprint is None


@pytest.mark.parametrize(
    ("at", "valid"),
    [(AT - DAY - 1, False), (AT - DAY, True), (AT, True), (AT + DAY, True), (AT + DAY + 1, False)],
)
def test_both_ends_of_the_period_belong_to_it(at: int, valid: bool) -> None:
    certificate = make_host(make_ca(), not_before=AT - DAY, not_after=AT + DAY).certificate

    assert certificate.is_valid_at(at) is valid


def test_operators_are_told_the_dates_and_the_clock() -> None:
    certificate = make_host(make_ca(), not_before=AT - DAY, not_after=AT + DAY).certificate

    assert certificate.explain_period(AT - DAY - 1) == (
        "is not valid before 2027-01-14 08:00:00 UTC; this machine's clock says 2027-01-14 07:59:59 UTC"
    )
    assert certificate.explain_period(AT + DAY + 1) == (
        "expired at 2027-01-16 08:00:00 UTC; this machine's clock says 2027-01-16 08:00:01 UTC"
    )


@pytest.mark.parametrize("unix_s", [-(2**63), 2**63 - 1])
def test_a_time_no_calendar_has_is_shown_as_a_number(unix_s: int) -> None:
    assert format_time(unix_s) == f"unix time {unix_s}"


def test_addresses_are_in_certificate_order() -> None:
    host = make_host(make_ca(), networks=networks("10.0.0.9/8", "fd00::1/64", "10.0.0.1/8"))

    assert [str(each) for each in host.certificate.addresses] == ["10.0.0.1", "10.0.0.9", "fd00::1"]


@pytest.mark.parametrize("text", ["10.0.0.1/8", "fd00::1/64", "::ffff:10.0.0.1/120", "2001:db8:0:1::/64"])
def test_networks_are_written_as_nebula_writes_them(text: str) -> None:
    assert format_network(networks(text)[0]) == text
