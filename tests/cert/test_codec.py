from contextlib import suppress
from ipaddress import ip_interface

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nebula_mp.cert import codec, v1, v2
from nebula_mp.cert.model import Certificate
from nebula_mp.cert.pem import Banner, PemBlock
from nebula_mp.cert.pool import CaPool
from nebula_mp.errors import CertError
from nebula_mp.newtypes import CertVersion, Curve
from tests.cert.helpers import AT, make_ca, make_host
from tests.support import vectors
from tests.support.vectors import Vector

CERTIFICATES = vectors.load("certs")["certs"]
HOSTS = [each for each in CERTIFICATES if "handshake_bytes" in each]
GENERATED_AT = vectors.load("certs")["generated_at"]
FILES = vectors.DIRECTORY / "certs"
POOL = CaPool(
    [codec.parse_block(PemBlock(_banner, bytes.fromhex(each["raw"]), each["file"], 1, 1))
     for each in CERTIFICATES if each["is_ca"]
     for _banner in [Banner.CERTIFICATE_V1 if each["version"] == 1 else Banner.CERTIFICATE_V2]]
)  # fmt: skip

each_certificate = pytest.mark.parametrize("vector", CERTIFICATES, ids=lambda each: each["file"])
each_host = pytest.mark.parametrize("vector", HOSTS, ids=lambda each: each["file"])


def parse(vector: Vector) -> Certificate:
    [(_, certificate)] = codec.parse_pem((FILES / vector["file"]).read_text(), vector["file"])
    return certificate


def test_there_are_vectors_of_both_versions_and_curves_and_none_is_left_out() -> None:
    kinds = {(each["version"], each["curve"], each["is_ca"]) for each in CERTIFICATES}

    assert len(kinds) == 8
    assert {each["file"] for each in CERTIFICATES} == {
        path.name
        for path in FILES.glob("*.crt")
        if path.name != "pool-all.crt" and not path.name.endswith("-bundle.crt")
    }


@each_certificate
def test_every_field_of_a_certificate_made_by_nebula_is_read(vector: Vector) -> None:
    assert parse(vector) == Certificate(
        version=CertVersion(vector["version"]),
        curve=Curve[vector["curve"]],
        name=vector["name"],
        networks=tuple(map(ip_interface, vector["networks"] or ())),
        unsafe_networks=tuple(map(ip_interface, vector["unsafe_networks"] or ())),
        groups=tuple(vector["groups"] or ()),
        is_ca=vector["is_ca"],
        not_before=vector["not_before"],
        not_after=vector["not_after"],
        issuer=vector["issuer"],
        public_key=bytes.fromhex(vector["public_key"]),
        signature=bytes.fromhex(vector["signature"]),
        details=parse(vector).details,
    )


@each_certificate
def test_a_certificate_made_by_nebula_is_written_byte_for_byte(vector: Vector) -> None:
    certificate = parse(vector)

    assert codec.encode(certificate).hex() == vector["raw"]
    assert codec.encode_pem(certificate) == (FILES / vector["file"]).read_text()


@each_certificate
def test_both_fingerprints_are_those_of_nebula(vector: Vector) -> None:
    certificate = parse(vector)

    assert certificate.fingerprint == vector["fingerprint"]
    assert certificate.alternate_fingerprint == vector.get("alternate_fingerprint")


@each_host
def test_the_form_for_handshakes_is_that_of_nebula_and_is_rebuilt_with_the_noise_key(vector: Vector) -> None:
    certificate = parse(vector)

    encoded = codec.encode_for_handshake(certificate)
    rebuilt = codec.parse_from_handshake(
        vector["version"], encoded, certificate.public_key, certificate.curve
    )

    assert encoded.hex() == vector["handshake_bytes"]
    assert rebuilt == certificate
    assert rebuilt.fingerprint == vector["fingerprint"]


@each_host
def test_a_handshake_certificate_that_brings_its_own_key_is_refused(vector: Vector) -> None:
    certificate = parse(vector)

    with pytest.raises(CertError, match=r"^certificate has unexpected pubkey present$"):
        codec.parse_from_handshake(
            vector["version"], bytes.fromhex(vector["raw"]), certificate.public_key, certificate.curve
        )


def test_files_with_several_certificates_give_them_in_order() -> None:
    names = [each.name for _, each in codec.parse_pem((FILES / "pool-all.crt").read_text(), "pool")]
    versions = [
        each.version
        for _, each in codec.parse_pem((FILES / "host-dual-P256-bundle.crt").read_text(), "bundle")
    ]

    printed = vectors.load("print_json")["pool-all.crt"]["head"]
    assert names == [each["details"]["name"] for each in printed]
    assert versions == [CertVersion.V1, CertVersion.V2]


@pytest.mark.parametrize(
    ("version", "data", "key", "reason"),
    [
        pytest.param(1, b"x", b"", "no peer static key was present", id="no key"),
        pytest.param(2, b"", bytes(32), "provided payload was empty", id="no certificate"),
        pytest.param(3, b"x", bytes(32), "certificate version unrecognized", id="version 3"),
        pytest.param(-1, b"x", bytes(32), "certificate version unrecognized", id="version -1"),
    ],
)
def test_a_handshake_without_key_certificate_or_known_version_is_refused(
    version: int, data: bytes, key: bytes, reason: str
) -> None:
    with pytest.raises(CertError, match=f"^{reason}$"):
        codec.parse_from_handshake(version, data, key, Curve.CURVE25519)


def test_a_handshake_that_leaves_the_version_out_means_version_1() -> None:
    host = make_host(make_ca(version=1), version=1).certificate

    rebuilt = codec.parse_from_handshake(0, codec.encode_for_handshake(host), host.public_key, host.curve)

    assert rebuilt == host


def test_a_v2_handshake_certificate_is_taken_for_our_curve_and_then_trusted_by_no_ca_of_another() -> None:
    ca = make_ca(curve=Curve.P256)
    host = make_host(ca).certificate

    rebuilt = codec.parse_from_handshake(2, codec.encode_for_handshake(host), bytes(32), Curve.CURVE25519)

    assert rebuilt.curve is Curve.CURVE25519
    with pytest.raises(CertError, match=r"^certificate curve does not match CA$"):
        CaPool([ca.certificate]).verify(rebuilt, AT)


def test_a_block_that_is_no_certificate_is_named_with_its_place() -> None:
    text = make_ca().pem + (FILES / "keygen-25519.key").read_text()

    with pytest.raises(CertError) as caught:
        list(codec.parse_pem(text, "/etc/nebula/host.crt"))

    assert str(caught.value) == (
        "/etc/nebula/host.crt: block 2 (line 6) is a host's private key (NEBULA X25519 PRIVATE KEY), "
        "where a certificate is expected; are the certificate and the key swapped?"
    )


def test_a_damaged_certificate_is_named_with_its_place() -> None:
    with pytest.raises(CertError, match=r"^x: block 1 \(line 1\): v1 certificate: not a protobuf message$"):
        codec.parse_block(PemBlock(Banner.CERTIFICATE_V1, b"\xff", "x", 1, 1))


@given(st.binary(max_size=200), st.sampled_from([0, 1, 2]), st.sampled_from(Curve))
def test_any_bytes_from_a_peer_are_a_certificate_or_raise_cert_error(
    data: bytes, version: int, curve: Curve
) -> None:
    with suppress(CertError):
        codec.parse_from_handshake(version, data, bytes(32), curve)
    for parser in (v1.parse, v2.parse):
        with suppress(CertError):
            parser(data)


@given(st.text(max_size=200) | st.sampled_from([each["file"] for each in CERTIFICATES]).flatmap(
    lambda name: st.integers(0, 400).map(lambda cut: (FILES / name).read_text()[:cut])))  # fmt: skip
def test_any_text_is_made_of_certificates_or_raises_cert_error(text: str) -> None:
    with suppress(CertError):
        assert list(codec.parse_pem(text, "any"))


@given(st.data())
def test_a_certificate_changed_anywhere_is_never_trusted_as_something_else(data: st.DataObject) -> None:
    vector = data.draw(st.sampled_from([each for each in HOSTS if each["verify_against_all_cas"] == "ok"]))
    raw = bytearray.fromhex(vector["raw"])
    kind = data.draw(st.sampled_from(["flip", "delete", "insert"]))
    at = data.draw(st.integers(0, len(raw) - 1))
    if kind == "flip":
        raw[at] ^= data.draw(st.integers(1, 255))
    elif kind == "delete":
        del raw[at : at + data.draw(st.integers(1, 8))]
    else:
        raw[at:at] = data.draw(st.binary(min_size=1, max_size=8))

    parser = v1.parse if vector["version"] == 1 else v2.parse
    try:
        trusted = POOL.verify(parser(bytes(raw)), GENERATED_AT).certificate
    except CertError:
        return

    # Protobuf has many encodings of one message; all mean the certificate that was signed.
    assert trusted.version is CertVersion.V1
    assert trusted.fingerprint == vector["fingerprint"]


def test_the_manifest_of_the_vectors_lists_the_files_these_tests_use() -> None:
    manifest = vectors.load("manifest")

    assert manifest["ca_passphrase"] == vectors.load("certs")["encrypted_ca_keys"][0]["passphrase"]
    for name in ("certs.json", "print_json.json", "cli_verify.json"):
        assert name in manifest["files"]
        assert (vectors.DIRECTORY / name).is_file()
