from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nebula_mp.cert import codec, v1, v2
from nebula_mp.cert.identity import Identity
from nebula_mp.cert.keys import parse_signing_key
from nebula_mp.cert.model import Certificate
from nebula_mp.cert.pool import CaPool
from nebula_mp.crypto.dh import PUBLIC_KEY_BYTES, PrivateKey
from nebula_mp.errors import (
    AuthError,
    CertError,
    HandshakeError,
    NebulaError,
    TruncatedError,
    UnknownTypeError,
    WireError,
)
from nebula_mp.handshake.machine import Completed, Initiator, Responder
from nebula_mp.newtypes import CertVersion, Cipher, Curve, Entropy, TunnelIndex
from nebula_mp.noise.ix import IxInitiator, IxResponder
from nebula_mp.wire.nebula_pb2 import NebulaHandshake, NebulaHandshakeDetails
from tests.support import vectors
from tests.support.vectors import Vector

CERTS = vectors.DIRECTORY / "certs"
HANDSHAKES = vectors.load("handshake")
NOW = 1_800_000_000  # unix seconds; the certificates of the vectors are valid from late 2026 on
TIME_NS = NOW * 1_000_000_000
INITIATOR_INDEX = TunnelIndex(0x11223344)
RESPONDER_INDEX = TunnelIndex(0xA1B2C3D4)

SUITES = [
    pytest.param(curve, version, cipher, id=f"{curve.name} v{version} {cipher}")
    for curve in Curve
    for version in CertVersion
    for cipher in Cipher
]


def entropy_of(fill: int) -> Entropy:
    return lambda count: bytes([fill]) * count


def identity_of(*cert_files: str, key_file: str, initiating_version: int | None = None) -> Identity:
    return Identity.from_pem(
        "".join((CERTS / each).read_text() for each in cert_files),
        (CERTS / key_file).read_text(),
        cert_source="cert",
        key_source="key",
        initiating_version=initiating_version,
        at=NOW,
    )


def host(name: str, curve: Curve = Curve.CURVE25519, version: int = 1) -> Identity:
    stem = f"host-{name}-{'P256' if curve is Curve.P256 else '25519'}-v{version}"
    return identity_of(f"{stem}.crt", key_file=f"{stem}.key")


def dual(initiating_version: int | None, curve: Curve = Curve.CURVE25519) -> Identity:
    stem = f"host-dual-{'P256' if curve is Curve.P256 else '25519'}"
    return identity_of(
        f"{stem}-v1.crt", f"{stem}-v2.crt", key_file=f"{stem}.key", initiating_version=initiating_version
    )


def pool_of(*names: str, blocklist: tuple[str, ...] = ()) -> CaPool:
    text = "".join((CERTS / name).read_text() for name in names or ("pool-all.crt",))
    return CaPool.from_pem(text, source="ca", at=NOW, blocklist=blocklist)


POOL = pool_of()


def initiator_of(identity: Identity, cipher: Cipher = Cipher.AES, version: int | None = None) -> Initiator:
    return Initiator(
        identity,
        cipher,
        CertVersion(version or identity.initiating_version),
        entropy_of(1),
        local_index=INITIATOR_INDEX,
        time_ns=TIME_NS,
    )


def answer(initiator: Initiator, identity: Identity, cipher: Cipher = Cipher.AES) -> Completed:
    responder = Responder(identity, cipher, entropy_of(2))
    responder.read_stage1(initiator.stage1, POOL, NOW)
    return responder.write_stage2(RESPONDER_INDEX, TIME_NS + 1)


class Played(NamedTuple):
    """A recorded handshake, ready to be played in either role."""

    initiator: Identity
    responder: Identity
    cipher: Cipher
    at: int


def played(vector: Vector) -> Played:
    sides = [
        identity_of(
            *vector[side]["cert_files"],
            key_file=vector[side]["key_file"],
            initiating_version=vector[side].get("start_version") or vector[side]["default_version"],
        )
        for side in ("initiator", "responder")
    ]
    at = int(vector["payload1"]["time"]) // 1_000_000_000
    return Played(sides[0], sides[1], Cipher(vector["cipher_config"]), at)


def entropy_from(vector: Vector, side: str) -> Entropy:
    left = [bytes.fromhex(vector[side]["ephemeral_private"])]
    return lambda count: left.pop().ljust(count)


def check_packets(vector: Vector, completed: Completed) -> None:
    """Seal what we would send and open what we would receive of the nine packets and the relay frame."""
    mine = "i2r" if completed.is_initiator else "r2i"
    seen = set()
    for each in vector["packets"]:
        packet, plaintext, counter = (
            bytes.fromhex(each["packet"]),
            bytes.fromhex(each["plaintext"]),
            int(each["counter"]),
        )
        seen.add(each["direction"])
        if each["direction"] == mine:
            assert each["remote_index"] == completed.remote_index
            assert completed.send.seal(counter, packet[:16], plaintext) == packet[16:]
        else:
            assert each["remote_index"] == completed.local_index
            assert completed.receive.open(counter, packet[:16], packet[16:]) == plaintext
    assert seen == {"i2r", "r2i"}
    frame = vector["relay_frame"]
    raw = bytes.fromhex(frame["packet"])
    if frame["direction"] == mine:
        assert completed.send.seal(int(frame["counter"]), raw[:-16], b"") == raw[-16:]
    else:
        assert completed.receive.open(int(frame["counter"]), raw[:-16], raw[-16:]) == b""


@pytest.mark.parametrize("vector", HANDSHAKES, ids=lambda each: each["name"])
def test_as_initiator_we_send_what_nebula_sends_and_understand_its_answer(vector: Vector) -> None:
    play = played(vector)
    start_version = CertVersion(vector["initiator"]["start_version"])
    initiator = Initiator(
        play.initiator,
        play.cipher,
        start_version,
        entropy_from(vector, "initiator"),
        local_index=TunnelIndex(vector["initiator"]["local_index"]),
        time_ns=int(vector["payload1"]["time"]),
    )

    assert initiator.stage1.hex() == vector["message1"]
    completed = initiator.read_stage2(bytes.fromhex(vector["message2"]), POOL, play.at)

    assert completed.is_initiator
    assert completed.local_index == vector["initiator"]["local_index"]
    assert completed.remote_index == vector["responder"]["local_index"]
    assert completed.peer_time_ns == int(vector["payload2"]["time"])
    assert completed.own_certificate == play.initiator.certificates[start_version]
    assert completed.peer.certificate in play.responder.certificates.values()
    assert completed.peer.certificate.version == vector["payload2"]["cert_version"]
    assert completed.stage1.hex() == vector["message1"][32:]
    assert completed.stage2 == b""
    check_packets(vector, completed)


@pytest.mark.parametrize("vector", HANDSHAKES, ids=lambda each: each["name"])
def test_as_responder_we_understand_nebula_and_answer_as_it_does(vector: Vector) -> None:
    play = played(vector)
    responder = Responder(play.responder, play.cipher, entropy_from(vector, "responder"))

    stage1 = responder.read_stage1(bytes.fromhex(vector["message1"]), POOL, play.at)

    assert (
        stage1.peer.certificate
        == play.initiator.certificates[CertVersion(vector["payload1"]["cert_version"])]
    )
    assert stage1.initiator_index == vector["initiator"]["local_index"]
    assert stage1.time_ns == int(vector["payload1"]["time"])

    completed = responder.write_stage2(
        TunnelIndex(vector["responder"]["local_index"]), int(vector["payload2"]["time"])
    )

    assert completed.stage2.hex() == vector["message2"]
    assert completed.stage1.hex() == vector["message1"][32:]
    assert not completed.is_initiator
    assert completed.local_index == vector["responder"]["local_index"]
    assert completed.remote_index == vector["initiator"]["local_index"]
    assert completed.peer == stage1.peer
    assert completed.peer_time_ns == stage1.time_ns
    assert completed.own_certificate.version == vector["payload2"]["cert_version"]
    check_packets(vector, completed)


@pytest.mark.parametrize(("curve", "version", "cipher"), SUITES)
def test_two_of_ours_come_together_and_speak(curve: Curve, version: CertVersion, cipher: Cipher) -> None:
    alice, bob = host("a", curve, version), host("b", curve, version)
    initiator = initiator_of(alice, cipher)

    theirs = answer(initiator, bob, cipher)
    ours = initiator.read_stage2(theirs.stage2, POOL, NOW)

    assert ours.peer.certificate == bob.newest
    assert theirs.peer.certificate == alice.newest
    assert (ours.local_index, ours.remote_index) == (INITIATOR_INDEX, RESPONDER_INDEX)
    assert (theirs.local_index, theirs.remote_index) == (RESPONDER_INDEX, INITIATOR_INDEX)
    assert (ours.peer_time_ns, theirs.peer_time_ns) == (TIME_NS + 1, TIME_NS)
    assert theirs.receive.open(3, b"header", ours.send.seal(3, b"header", b"ping")) == b"ping"
    assert ours.receive.open(3, b"header", theirs.send.seal(3, b"header", b"pong")) == b"pong"
    with pytest.raises(AuthError):
        ours.receive.open(3, b"header", ours.send.seal(3, b"header", b"our own packet, reflected"))


@pytest.mark.parametrize(
    ("peer_version", "own_versions", "initiating", "answered"),
    [
        pytest.param(1, {1}, None, 1, id="v1 to v1"),
        pytest.param(2, {2}, None, 2, id="v2 to v2"),
        pytest.param(2, {1}, None, 1, id="v2 to v1 only: mixed"),
        pytest.param(1, {2}, None, 2, id="v1 to v2 only: mixed"),
        pytest.param(1, {1, 2}, 1, 1, id="v1 to both, starting with 1"),
        pytest.param(2, {1, 2}, 1, 2, id="v2 to both, starting with 1"),
        pytest.param(1, {1, 2}, 2, 1, id="v1 to both, starting with 2"),
        pytest.param(2, {1, 2}, 2, 2, id="v2 to both, starting with 2"),
    ],
)
def test_the_responder_shows_the_peers_version_if_it_can_and_else_its_own_first_choice(
    peer_version: int, own_versions: set[int], initiating: int | None, answered: int
) -> None:
    initiator = initiator_of(host("a", version=peer_version))
    identity = dual(initiating) if len(own_versions) == 2 else host("b", version=min(own_versions))

    completed = answer(initiator, identity)

    assert completed.own_certificate is identity.certificates[CertVersion(answered)]
    assert initiator.read_stage2(completed.stage2, POOL, NOW).peer.certificate == completed.own_certificate


def test_the_initiator_shows_the_version_it_was_told_to() -> None:
    for version in CertVersion:
        completed = answer(initiator_of(dual(1), version=version), host("b", version=2))

        assert completed.peer.certificate.version is version


@pytest.mark.parametrize(("has", "wants"), [(1, 2), (2, 1)])
def test_without_a_certificate_of_the_version_no_handshake_is_begun(has: int, wants: int) -> None:
    with pytest.raises(CertError, match=f"no version {wants} certificate"):
        initiator_of(host("a", version=has), version=wants)


# Messages made by hand, to say what no honest host says.

Change = Callable[[NebulaHandshakeDetails], object]


def payload_with(certificate: Certificate, change: Change = lambda details: None, /, **fields: int) -> bytes:
    details = NebulaHandshakeDetails(
        Cert=codec.encode_for_handshake(certificate), Time=TIME_NS, CertVersion=certificate.version, **fields
    )
    change(details)
    return NebulaHandshake(Details=details).SerializeToString()


def stage1_with(payload: bytes, key: PrivateKey) -> bytes:
    noise = IxInitiator(key.curve, Cipher.AES, key, entropy_of(7))
    return bytes.fromhex("10000000 00000000 0000000000000001") + noise.write_message_1(payload)


def stage2_with(payload: bytes, key: PrivateKey, initiator: Initiator) -> bytes:
    noise = IxResponder(key.curve, Cipher.AES, key, entropy_of(8))
    noise.read_message_1(initiator.stage1[16:])
    header = bytes.fromhex("10000000") + INITIATOR_INDEX.to_bytes(4) + bytes.fromhex("0000000000000002")
    return header + noise.write_message_2(payload)[0]


def read_as_stage1(payload: bytes, peer: Identity, pool: CaPool = POOL) -> Certificate:
    responder = Responder(host("a"), Cipher.AES, entropy_of(2))
    return responder.read_stage1(stage1_with(payload, peer.private_key), pool, NOW).peer.certificate


def read_as_stage2(payload: bytes, peer: Identity, pool: CaPool = POOL) -> Certificate:
    initiator = initiator_of(host("a"))
    stage2 = stage2_with(payload, peer.private_key, initiator)
    return initiator.read_stage2(stage2, pool, NOW).peer.certificate


READERS = [pytest.param(read_as_stage1, id="stage 1"), pytest.param(read_as_stage2, id="stage 2")]
Reader = Callable[[bytes, Identity], Certificate]
BOTH_INDEXES = {"InitiatorIndex": int(INITIATOR_INDEX), "ResponderIndex": int(RESPONDER_INDEX)}


def set_field(name: str, value: object) -> Change:
    return lambda details: setattr(details, name, value)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        pytest.param(set_field("Cert", b""), HandshakeError, "no certificate", id="no certificate"),
        pytest.param(set_field("CertVersion", 3), HandshakeError, "version 3", id="version 3"),
        pytest.param(
            set_field("CertVersion", 2**32 - 1), HandshakeError, "version 4294967295", id="version max"
        ),
        pytest.param(set_field("CertVersion", 2), CertError, "v2 certificate", id="v1 bytes called v2"),
        pytest.param(set_field("Cert", b"\xff"), CertError, "v1 certificate", id="not a certificate"),
        pytest.param(
            set_field("Cert", codec.encode(host("b").newest)), CertError, "unexpected pubkey", id="key in v1"
        ),
    ],
)
def test_payloads_that_break_a_rule_are_refused(
    read: Reader, change: Change, error: type[NebulaError], text: str
) -> None:
    bob = host("b")
    read(payload_with(bob.newest, **BOTH_INDEXES), bob)

    with pytest.raises(error, match=text):
        read(payload_with(bob.newest, change, **BOTH_INDEXES), bob)


@pytest.mark.parametrize("read", READERS)
def test_a_v2_certificate_that_brings_its_own_key_is_refused(read: Reader) -> None:
    bob = host("b", version=2)
    change = set_field("Cert", codec.encode(bob.newest))

    with pytest.raises(CertError, match="unexpected pubkey"):
        read(payload_with(bob.newest, change, **BOTH_INDEXES), bob)


@pytest.mark.parametrize(
    ("read", "missing"),
    [
        pytest.param(read_as_stage1, "InitiatorIndex", id="stage 1"),
        pytest.param(read_as_stage2, "ResponderIndex", id="stage 2"),
    ],
)
def test_the_senders_own_index_must_not_be_zero_and_the_other_does_not_matter(
    read: Reader, missing: str
) -> None:
    bob = host("b")
    present = {name: index for name, index in BOTH_INDEXES.items() if name == missing}
    read(payload_with(bob.newest, **present), bob)

    with pytest.raises(HandshakeError, match="index is zero"):
        read(payload_with(bob.newest, set_field(missing, 0), **BOTH_INDEXES), bob)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    ("payload", "text"),
    [
        pytest.param(b"", "no certificate", id="empty"),
        pytest.param(bytes.fromhex("0a00"), "no certificate", id="empty details"),
        pytest.param(bytes.fromhex("1200"), "no certificate", id="Hmac only"),
        pytest.param(bytes.fromhex("0a05"), "not the protobuf message", id="cut short"),
        pytest.param(bytes.fromhex("0a020a05"), "not the protobuf message", id="details cut short"),
        pytest.param(bytes.fromhex("ffff"), "not the protobuf message", id="endless tag"),
        pytest.param(bytes.fromhex("0b" * 2000), "not the protobuf message", id="groups in groups"),
    ],
)
def test_payloads_that_are_no_handshake_message_are_refused(read: Reader, payload: bytes, text: str) -> None:
    with pytest.raises(HandshakeError, match=text):
        read(payload, host("b"))


def test_release_1_6_1_leaves_out_the_version_and_means_1() -> None:
    bob = host("b")
    payload = payload_with(bob.newest, set_field("CertVersion", 0), InitiatorIndex=9)
    responder = Responder(host("a"), Cipher.AES, entropy_of(2))

    stage1 = responder.read_stage1(stage1_with(payload, bob.private_key), POOL, NOW)

    assert stage1.peer.certificate == bob.newest


@pytest.mark.parametrize(
    ("extra", "index", "time_ns"),
    [
        pytest.param("", 9, TIME_NS, id="nothing more"),
        pytest.param("2007", 9, TIME_NS, id="Cookie"),
        pytest.param("3007 3a0161 a80601", 9, TIME_NS, id="unknown fields"),
        pytest.param("1005 2863", 5, 99, id="fields again: the last counts"),
        pytest.param("1206 610000000000", 9, TIME_NS, id="a known number of another wire type"),
        pytest.param("1085 8080 8010", 5, TIME_NS, id="an index beyond 32 bits is cut"),
    ],
)
def test_unknown_fields_are_skipped_and_the_last_of_a_repeated_field_counts(
    extra: str, index: int, time_ns: int
) -> None:
    bob = host("b")
    details = NebulaHandshake.FromString(
        payload_with(bob.newest, InitiatorIndex=9)
    ).Details.SerializeToString()
    details += bytes.fromhex(extra)
    payload = (
        b"\x0a" + bytes([len(details) & 127 | 128, len(details) >> 7]) + details + bytes.fromhex("1203616263")
    )
    responder = Responder(host("a"), Cipher.AES, entropy_of(2))

    stage1 = responder.read_stage1(stage1_with(payload, bob.private_key), POOL, NOW)

    assert (stage1.initiator_index, stage1.time_ns) == (index, time_ns)
    assert stage1.peer.certificate == bob.newest


@pytest.mark.parametrize("read", READERS)
def test_a_certificate_shown_with_another_key_is_refused(read: Reader) -> None:
    mallory = host("min")

    with pytest.raises(CertError, match="certificate signature did not match"):
        read(payload_with(host("b").newest, **BOTH_INDEXES), mallory)


@pytest.mark.parametrize("read", [read_as_stage1, read_as_stage2])
@pytest.mark.parametrize(
    ("pool", "text"),
    [
        pytest.param(pool_of("ca-25519-v2.crt"), "could not find ca", id="another CA"),
        pytest.param(
            pool_of(blocklist=(host("b").newest.fingerprint,)),
            "certificate is in the block list",
            id="blocked",
        ),
    ],
)
def test_whom_the_pool_does_not_trust_we_do_not_either(
    read: Callable[[bytes, Identity, CaPool], Certificate], pool: CaPool, text: str
) -> None:
    bob = host("b")

    with pytest.raises(CertError, match=text):
        read(payload_with(bob.newest, **BOTH_INDEXES), bob, pool)


def test_the_certificate_is_judged_at_the_time_given() -> None:
    bob = host("b")
    initiator = initiator_of(host("a"))
    stage2 = answer(initiator, bob).stage2

    for at in (bob.newest.not_before - 1, bob.newest.not_after + 1):
        with pytest.raises(CertError, match="expired"):
            initiator.read_stage2(stage2, POOL, at)
        with pytest.raises(CertError, match="expired"):
            Responder(bob, Cipher.AES, entropy_of(2)).read_stage1(initiator.stage1, POOL, at)

    initiator.read_stage2(stage2, POOL, NOW)


def signed(template: Certificate, version: CertVersion, **fields: object) -> Certificate:
    """A certificate of the test CA with content that `nebula-cert sign` would refuse."""
    authority = codec.parse_pem((CERTS / "ca-25519-v1.crt").read_text(), "ca")
    issuer = next(authority)[1].fingerprint
    key = parse_signing_key((CERTS / "ca-25519-v1.key").read_text(), "ca key", lambda: b"")
    unsigned = replace(template, version=version, issuer=issuer, details=b"", signature=b"-", **fields)  # type: ignore[arg-type]
    encode = v1.signed_bytes if version is CertVersion.V1 else v2.signed_bytes
    return replace(unsigned, signature=key.sign(encode(unsigned)))


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("version", CertVersion)
def test_a_trusted_certificate_without_an_address_makes_no_tunnel(read: Reader, version: CertVersion) -> None:
    bob = host("b")
    # Only a certificate marked as CA may have no network at all.
    certificate = signed(bob.newest, version, networks=(), unsafe_networks=(), is_ca=True)

    with pytest.raises(HandshakeError, match="no address"):
        read(payload_with(certificate, **BOTH_INDEXES), bob)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("version", CertVersion)
def test_a_peer_that_claims_our_address_is_refused(read: Reader, version: CertVersion) -> None:
    bob, own = host("b"), host("a").newest
    networks = tuple(sorted([*bob.newest.networks, *own.networks]))
    certificate = signed(bob.newest, version, networks=networks)

    with pytest.raises(HandshakeError, match=f"claims {own.addresses[0]}, which is our own address"):
        read(payload_with(certificate, **BOTH_INDEXES), bob)


def test_we_do_not_shake_hands_with_ourselves() -> None:
    alice = host("a")

    with pytest.raises(HandshakeError, match="our own address"):
        Responder(alice, Cipher.AES, entropy_of(2)).read_stage1(initiator_of(alice).stage1, POOL, NOW)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        pytest.param(lambda raw: raw[:15], TruncatedError, id="cut within the header"),
        pytest.param(lambda raw: raw[: 16 + 63], TruncatedError, id="cut within the keys"),
        pytest.param(lambda raw: b"\x10\x01" + raw[2:], UnknownTypeError, id="subtype xx"),
        pytest.param(lambda raw: b"\x20" + raw[1:], UnknownTypeError, id="version 2"),
        pytest.param(lambda raw: b"\x11" + raw[1:], AuthError, id="a data packet"),
        pytest.param(lambda raw: raw[:4] + b"\0\0\0\1" + raw[8:], AuthError, id="index not 0"),
        pytest.param(lambda raw: raw[:8] + bytes(8) + raw[16:], AuthError, id="counter 0"),
        pytest.param(lambda raw: raw[:15] + b"\2" + raw[16:], AuthError, id="counter 2"),
        pytest.param(lambda raw: raw[:8] + b"\1" + raw[9:], AuthError, id="counter 2**56 + 1"),
        pytest.param(lambda raw: raw + bytes(65536), AuthError, id="longer than Noise allows"),
    ],
)
def test_a_stage_1_with_another_header_or_length_is_refused_and_the_next_one_read(
    change: Callable[[bytes], bytes], error: type[WireError]
) -> None:
    initiator = initiator_of(host("a"))
    responder = Responder(host("b"), Cipher.AES, entropy_of(2))

    with pytest.raises(error):
        responder.read_stage1(change(initiator.stage1), POOL, NOW)

    assert responder.read_stage1(initiator.stage1, POOL, NOW).initiator_index == INITIATOR_INDEX
    initiator.read_stage2(responder.write_stage2(RESPONDER_INDEX, TIME_NS).stage2, POOL, NOW)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        pytest.param(lambda raw: raw[:15], TruncatedError, id="cut within the header"),
        pytest.param(lambda raw: raw[:16], AuthError, id="header only"),
        pytest.param(lambda raw: b"\x10\x01" + raw[2:], UnknownTypeError, id="subtype xx"),
        pytest.param(lambda raw: b"\x12" + raw[1:], AuthError, id="a recv_error"),
        pytest.param(lambda raw: raw[:4] + bytes(4) + raw[8:], AuthError, id="index 0"),
        pytest.param(lambda raw: raw[:7] + bytes([raw[7] ^ 1]) + raw[8:], AuthError, id="another index"),
        pytest.param(lambda raw: raw[:15] + b"\1" + raw[16:], AuthError, id="counter 1"),
        pytest.param(lambda raw: raw[:15] + b"\3" + raw[16:], AuthError, id="counter 3"),
        pytest.param(lambda raw: raw + b"\0", AuthError, id="one byte more"),
        pytest.param(lambda raw: raw + bytes(65536), AuthError, id="longer than Noise allows"),
    ],
)
def test_a_stage_2_with_another_header_or_length_is_ignored_and_the_real_one_read(
    change: Callable[[bytes], bytes], error: type[WireError]
) -> None:
    initiator = initiator_of(host("a"))
    stage2 = answer(initiator, host("b")).stage2

    with pytest.raises(error) as caught:
        initiator.read_stage2(change(stage2), POOL, NOW)

    assert not isinstance(caught.value, HandshakeError)
    assert initiator.read_stage2(stage2, POOL, NOW).remote_index == RESPONDER_INDEX


def test_no_changed_byte_of_stage_2_gets_through_or_spoils_the_handshake() -> None:
    initiator = initiator_of(host("a"))
    stage2 = answer(initiator, host("b")).stage2
    before = initiator.stage1

    for position in range(16, len(stage2)):
        forged = bytearray(stage2)
        forged[position] ^= 0x40
        with pytest.raises(AuthError):
            initiator.read_stage2(bytes(forged), POOL, NOW)

    assert initiator.stage1 == before
    assert initiator.read_stage2(stage2, POOL, NOW).remote_index == RESPONDER_INDEX


def test_an_answer_of_someone_who_only_saw_stage_1_does_not_spoil_the_handshake() -> None:
    initiator = initiator_of(host("a"))
    stage2 = answer(initiator, host("b")).stage2
    stranger = PrivateKey.generate(Curve.CURVE25519, entropy_of(5))

    for payload in (b"", b"\xff", payload_with(host("b").newest, **BOTH_INDEXES)):
        with pytest.raises((HandshakeError, CertError)):
            initiator.read_stage2(stage2_with(payload, stranger, initiator), POOL, NOW)

    assert initiator.read_stage2(stage2, POOL, NOW).remote_index == RESPONDER_INDEX


def test_reserved_header_bytes_are_ignored_in_both_messages() -> None:
    initiator = initiator_of(host("a"))
    responder = Responder(host("b"), Cipher.AES, entropy_of(2))

    responder.read_stage1(initiator.stage1[:2] + b"\xab\xcd" + initiator.stage1[4:], POOL, NOW)
    stage2 = responder.write_stage2(RESPONDER_INDEX, TIME_NS).stage2

    initiator.read_stage2(stage2[:2] + b"\xab\xcd" + stage2[4:], POOL, NOW)


def test_an_answer_to_another_stage_1_of_ours_is_ignored() -> None:
    first = initiator_of(host("a"))
    second = Initiator(
        host("a"), Cipher.AES, CertVersion.V1, entropy_of(3), local_index=INITIATOR_INDEX, time_ns=TIME_NS
    )

    with pytest.raises(AuthError):
        second.read_stage2(answer(first, host("b")).stage2, POOL, NOW)


@pytest.mark.parametrize("curve", Curve)
def test_an_all_zero_ephemeral_key_of_the_initiator_ends_the_attempt(curve: Curve) -> None:
    stage1 = initiator_of(host("a", curve)).stage1
    size = PUBLIC_KEY_BYTES[curve]
    responder = Responder(host("b", curve), Cipher.AES, entropy_of(2))
    responder.read_stage1(stage1[:16] + bytes(size) + stage1[16 + size :], POOL, NOW)

    with pytest.raises(AuthError):
        responder.write_stage2(RESPONDER_INDEX, TIME_NS)


@pytest.mark.parametrize("curve", Curve)
def test_an_all_zero_ephemeral_key_of_the_responder_is_ignored(curve: Curve) -> None:
    initiator = initiator_of(host("a", curve))
    stage2 = answer(initiator, host("b", curve)).stage2
    size = PUBLIC_KEY_BYTES[curve]

    with pytest.raises(AuthError):
        initiator.read_stage2(stage2[:16] + bytes(size) + stage2[16 + size :], POOL, NOW)

    initiator.read_stage2(stage2, POOL, NOW)


def test_hosts_with_keys_of_different_curves_refuse_each_other() -> None:
    stage1 = initiator_of(host("a", Curve.P256)).stage1

    with pytest.raises(WireError):
        Responder(host("b"), Cipher.AES, entropy_of(2)).read_stage1(stage1, POOL, NOW)
    with pytest.raises(WireError):
        Responder(host("b", Curve.P256), Cipher.AES, entropy_of(2)).read_stage1(
            initiator_of(host("a")).stage1, POOL, NOW
        )


def test_a_v1_certificate_of_another_curve_is_refused_even_with_a_key_that_fits() -> None:
    bob = host("b")
    payload = payload_with(replace(bob.newest, curve=Curve.P256), InitiatorIndex=9)

    with pytest.raises(CertError, match="P256"):
        read_as_stage1(payload, bob)


def test_hosts_with_different_ciphers_do_not_come_together() -> None:
    initiator = initiator_of(host("a"), Cipher.AES)

    with pytest.raises(AuthError):
        initiator.read_stage2(answer(initiator, host("b"), Cipher.CHACHAPOLY).stage2, POOL, NOW)


def test_reading_stage_1_does_no_diffie_hellman_and_draws_no_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    stage1 = initiator_of(host("a")).stage1

    def refuse(*_: object) -> bytes:
        raise AssertionError("work for a stranger")

    monkeypatch.setattr(PrivateKey, "exchange", refuse)

    assert Responder(host("b"), Cipher.AES, refuse).read_stage1(stage1, POOL, NOW).time_ns == TIME_NS


BOBS = {version: host("b", version=version) for version in CertVersion}
IDENTITIES = {curve: (host("a", curve), host("b", curve)) for curve in Curve}
BYTES = st.one_of(
    st.binary(max_size=300),
    st.binary(max_size=300).map(lambda body: bytes.fromhex("10000000000000000000000000000001") + body),
    st.binary(max_size=300).map(lambda body: bytes.fromhex("10000000112233440000000000000002") + body),
)


@pytest.mark.parametrize("curve", Curve)
@settings(max_examples=100)
@given(datagram=BYTES)
def test_any_bytes_are_refused_with_a_wire_error_or_a_cert_error(curve: Curve, datagram: bytes) -> None:
    alice, bob = IDENTITIES[curve]

    with pytest.raises((WireError, CertError)):
        Responder(bob, Cipher.AES, entropy_of(2)).read_stage1(datagram, POOL, NOW)
    with pytest.raises(WireError):
        initiator_of(alice).read_stage2(datagram, POOL, NOW)


@pytest.mark.parametrize("version", CertVersion)
@settings(max_examples=150)
@given(data=st.data())
def test_a_damaged_payload_is_refused_or_still_says_who_the_peer_is(
    version: CertVersion, data: st.DataObject
) -> None:
    bob = BOBS[version]
    payload = bytearray(payload_with(bob.newest, **BOTH_INDEXES))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(payload)))
        end = data.draw(st.integers(start, min(start + 4, len(payload))))
        payload[start:end] = data.draw(st.binary(max_size=4))

    for read in (read_as_stage1, read_as_stage2):
        try:
            certificate = read(bytes(payload), bob)
        except (HandshakeError, CertError):
            continue
        assert certificate == bob.newest


def test_a_repr_of_what_was_completed_shows_no_key() -> None:
    alice = host("a")
    initiator = initiator_of(alice)
    completed = initiator.read_stage2(answer(initiator, host("b")).stage2, POOL, NOW)

    assert alice.private_key.to_bytes().hex() not in repr(completed)
    assert "Aead object" in repr(completed)
