"""Two datagrams, two certificates, two keys: one handshake with one peer.

Data flow: control.controller -> [handshake.machine] -> noise.ix, cert.codec, cert.pool
           handshake.machine -> Completed -> control.controller
Knows what the two messages hold and what makes a peer acceptable; does not know when to send, where to, which
peer was meant, or whether a stage 1 was seen before. Time and entropy are arguments.
Source: docs/wire-format.md, "Handshake"; slackhq/nebula, package handshake.
"""

from dataclasses import dataclass, field

from google.protobuf.message import DecodeError

from nebula_mp.cert.codec import encode_for_handshake, parse_from_handshake
from nebula_mp.cert.identity import Identity
from nebula_mp.cert.model import Certificate
from nebula_mp.cert.pool import CaPool, VerifiedCertificate
from nebula_mp.crypto.aead import Aead
from nebula_mp.errors import AuthError, CertError, HandshakeError
from nebula_mp.newtypes import CertVersion, Cipher, Entropy, TunnelIndex
from nebula_mp.noise.ix import IxInitiator, IxResponder
from nebula_mp.wire.header import (
    HANDSHAKE_IX,
    HEADER_BYTES,
    STAGE_1_COUNTER,
    STAGE_2_COUNTER,
    Header,
    MessageType,
)
from nebula_mp.wire.nebula_pb2 import NebulaHandshake, NebulaHandshakeDetails

_NO_INDEX = TunnelIndex(0)


@dataclass(frozen=True, slots=True)
class Stage1:
    """What a stage 1 claims. The certificate is genuine, but anyone who has seen it can send it."""

    peer: VerifiedCertificate
    initiator_index: TunnelIndex
    time_ns: int  # the initiator's unix time


@dataclass(frozen=True, slots=True, eq=False)
class SessionKeys:
    """The two keys of a tunnel, until they were handed to the data path: 32 bytes each, or none any more."""

    send: bytearray = field(repr=False)
    receive: bytearray = field(repr=False)

    def wipe(self) -> None:
        """Overwrite and forget them."""
        for key in (self.send, self.receive):
            key[:] = bytes(len(key))
            key.clear()


@dataclass(frozen=True, slots=True, eq=False)
class Completed:
    """A tunnel is ready. Both sides send from counter 3 on; 1 and 2 were the handshake's."""

    local_index: TunnelIndex
    remote_index: TunnelIndex
    peer: VerifiedCertificate
    own_certificate: Certificate
    peer_time_ns: int
    is_initiator: bool
    send: Aead
    receive: Aead
    keys: SessionKeys
    stage1: bytes  # without its header: two stage 1 are the same if these bytes are
    stage2: bytes  # the whole datagram, to be sent again for the same stage 1; empty for the initiator


@dataclass(frozen=True, slots=True)
class _Payload:
    """The content of either message, checked as far as that needs no certificate."""

    certificate: bytes
    version: CertVersion
    initiator_index: int
    responder_index: int
    time_ns: int

    @classmethod
    def parse(cls, data: bytes) -> "_Payload":
        """Parse, or raise HandshakeError. Unknown fields are skipped; of a repeated one the last counts."""
        message = NebulaHandshake()
        try:
            message.ParseFromString(data)
        except DecodeError:
            raise HandshakeError("handshake payload is not the protobuf message expected") from None
        details = message.Details
        if not details.Cert:
            raise HandshakeError("handshake payload holds no certificate")
        try:
            version = CertVersion(details.CertVersion or CertVersion.V1)
        except ValueError:
            raise HandshakeError(f"certificate version {details.CertVersion} is not known") from None
        return cls(details.Cert, version, details.InitiatorIndex, details.ResponderIndex, details.Time)

    def encode(self) -> bytes:
        """Fields ascending, zeros left out."""
        details = NebulaHandshakeDetails(
            Cert=self.certificate,
            InitiatorIndex=self.initiator_index,
            ResponderIndex=self.responder_index,
            Time=self.time_ns,
            CertVersion=self.version,
        )
        return NebulaHandshake(Details=details).SerializeToString(deterministic=True)


def _parse_header(datagram: bytes) -> Header:
    header = Header.parse(datagram)
    if header.type is not MessageType.HANDSHAKE:
        raise AuthError(f"a {header.type.name} packet is no handshake message")
    return header


def _verify_peer(
    payload: _Payload, remote_static: bytes, identity: Identity, pool: CaPool, at: int
) -> VerifiedCertificate:
    """Put the certificate together with the key Noise carried and verify it.

    CertError when it is not trusted, HandshakeError when it is but no tunnel with that host makes sense.
    """
    certificate = parse_from_handshake(payload.version, payload.certificate, remote_static, identity.curve)
    assert certificate.public_key == remote_static  # the codec put it there, so the signature covers it
    verified = pool.verify(certificate, at)
    if not certificate.addresses:
        raise HandshakeError(f"certificate {certificate.fingerprint} of {certificate.name!r} has no address")
    own = {address for each in identity.certificates.values() for address in each.addresses}
    for address in certificate.addresses:
        if address in own:
            raise HandshakeError(f"{certificate.name!r} claims {address}, which is our own address")
    return verified


class Initiator:
    """Build it, send `stage1` as often as needed, and give every possible answer to `read_stage2`."""

    def __init__(
        self,
        identity: Identity,
        cipher: Cipher,
        version: CertVersion,
        entropy: Entropy,
        *,
        local_index: TunnelIndex,
        time_ns: int,
    ) -> None:
        """`version` chooses which of our certificates is sent; CertError when we have none of it.

        `time_ns` is unix time and must be larger than in any earlier handshake with the same peer.
        """
        assert local_index != 0
        certificate = identity.certificates.get(version)
        if certificate is None:
            raise CertError(f"no version {version.value} certificate is loaded, and this peer needs one")
        self.local_index = local_index
        self._identity = identity
        self._cipher = cipher
        self._certificate = certificate
        self._noise = IxInitiator(identity.curve, cipher, identity.private_key, entropy)
        payload = _Payload(encode_for_handshake(certificate), version, local_index, 0, time_ns)
        header = Header(MessageType.HANDSHAKE, HANDSHAKE_IX, _NO_INDEX, STAGE_1_COUNTER)
        self.stage1: bytes = header.encode() + self._noise.write_message_1(payload.encode())

    def read_stage2(self, datagram: bytes, pool: CaPool, at: int) -> Completed:
        """Return the tunnel this answer makes; `at` is unix time in seconds.

        AuthError, or another WireError for a bad header: no answer to our stage 1, ignore it.
        HandshakeError and CertError: an answer to it, but one that cannot be used. As stage 1 travels in
        clear, whoever saw it can make such an answer with a key of his own; only a verified certificate
        says who spoke. No call changes the object, so after any error it may go on waiting.
        """
        header = _parse_header(datagram)
        if header.remote_index != self.local_index or header.counter != STAGE_2_COUNTER:
            raise AuthError(f"index {header.remote_index} counter {header.counter}: not an answer to us")
        raw, remote_static, keys = self._noise.read_message_2(datagram[HEADER_BYTES:])
        payload = _Payload.parse(raw)
        if payload.responder_index == 0:
            raise HandshakeError("responder index is zero")
        peer = _verify_peer(payload, remote_static, self._identity, pool, at)
        return Completed(
            local_index=self.local_index,
            remote_index=TunnelIndex(payload.responder_index),
            peer=peer,
            own_certificate=self._certificate,
            peer_time_ns=payload.time_ns,
            is_initiator=True,
            send=Aead(self._cipher, keys.initiator_to_responder),
            receive=Aead(self._cipher, keys.responder_to_initiator),
            keys=SessionKeys(
                send=bytearray(keys.initiator_to_responder), receive=bytearray(keys.responder_to_initiator)
            ),
            stage1=self.stage1[HEADER_BYTES:],
            stage2=b"",
        )


class Responder:
    """One for each stage 1: `read_stage1`, then, if the peer is welcome, `write_stage2`, once."""

    def __init__(self, identity: Identity, cipher: Cipher, entropy: Entropy) -> None:
        self._identity = identity
        self._cipher = cipher
        self._entropy = entropy
        self._read: tuple[bytes, IxResponder, Stage1] | None = None

    def read_stage1(self, datagram: bytes, pool: CaPool, at: int) -> Stage1:
        """Return what the initiator claims; `at` is unix time in seconds.

        Checks go from cheap to dear and stop short of any Diffie-Hellman. WireError or CertError: no answer
        is due, and the object may be used for another datagram.
        """
        header = _parse_header(datagram)
        if header.remote_index != _NO_INDEX or header.counter != STAGE_1_COUNTER:
            raise AuthError(f"index {header.remote_index} counter {header.counter}: not a first message")
        identity = self._identity
        noise = IxResponder(identity.curve, self._cipher, identity.private_key, self._entropy)
        message = datagram[HEADER_BYTES:]
        raw, remote_static = noise.read_message_1(message)
        payload = _Payload.parse(raw)
        if payload.initiator_index == 0:
            raise HandshakeError("initiator index is zero")
        peer = _verify_peer(payload, remote_static, identity, pool, at)
        stage1 = Stage1(peer, TunnelIndex(payload.initiator_index), payload.time_ns)
        self._read = message, noise, stage1
        return stage1

    def write_stage2(self, local_index: TunnelIndex, time_ns: int) -> Completed:
        """Return the answer, in `Completed.stage2`, and the tunnel; `time_ns` is our unix time.

        AuthError when the initiator's ephemeral key is no good: nothing to send. Either way the object is
        spent.
        """
        assert local_index != 0
        assert self._read is not None
        message, noise, stage1 = self._read
        self._read = None
        certificate = self._certificate_for(stage1.peer.certificate.version)
        payload = _Payload(
            encode_for_handshake(certificate),
            certificate.version,
            stage1.initiator_index,
            local_index,
            time_ns,
        )
        sealed, keys = noise.write_message_2(payload.encode())
        header = Header(MessageType.HANDSHAKE, HANDSHAKE_IX, stage1.initiator_index, STAGE_2_COUNTER)
        return Completed(
            local_index=local_index,
            remote_index=stage1.initiator_index,
            peer=stage1.peer,
            own_certificate=certificate,
            peer_time_ns=stage1.time_ns,
            is_initiator=False,
            send=Aead(self._cipher, keys.responder_to_initiator),
            receive=Aead(self._cipher, keys.initiator_to_responder),
            keys=SessionKeys(
                send=bytearray(keys.responder_to_initiator), receive=bytearray(keys.initiator_to_responder)
            ),
            stage1=message,
            stage2=header.encode() + sealed,
        )

    def _certificate_for(self, peer_version: CertVersion) -> Certificate:
        """Return our certificate of the peer's version if we have one, else the one we would start with."""
        certificates = self._identity.certificates
        return certificates.get(peer_version) or certificates[self._identity.initiating_version]
