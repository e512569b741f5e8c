"""A certificate as its fields, whatever it was encoded in.

Data flow: cert.v1, cert.v2 -> [cert.model] -> cert.pool, cert.identity, firewall, handshake, control
Knows what every certificate must satisfy; knows nothing of encodings, files, clocks or trust.
Source: docs/wire-format.md, "Certificates and keys"; slackhq/nebula, package cert.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property

from nebula_mp.crypto.dh import PUBLIC_KEY_BYTES
from nebula_mp.crypto.signing import with_other_s
from nebula_mp.errors import AuthError, CertError
from nebula_mp.newtypes import CertVersion, Curve, Fingerprint, IPAddress, IPInterface

FINGERPRINT_BYTES = 32


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """What a CA says about a host, or about itself. No slots: fingerprints are computed once and kept.

    Networks and unsafe networks keep their host bits, because version 1 signatures cover them;
    `.network` of each is the range. Version 2 certificates have both sorted, version 1 as issued.
    """

    version: CertVersion
    curve: Curve
    name: str
    networks: tuple[IPInterface, ...]
    unsafe_networks: tuple[IPInterface, ...]
    groups: tuple[str, ...]
    is_ca: bool
    not_before: int  # unix seconds, inclusive
    not_after: int  # unix seconds, inclusive
    issuer: str  # hex fingerprint of the CA; "" means self-signed
    public_key: bytes  # X25519 or P256 for hosts, Ed25519 or P256 for CAs
    signature: bytes
    # Version 2 only: the signed element exactly as received, which may hold elements we do not know.
    # Empty: build it from the fields. Must be emptied when a field is changed.
    details: bytes = field(default=b"", repr=False)

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """SHA-256 over everything the certificate says, signature included."""
        from nebula_mp.cert import codec  # noqa: PLC0415 - the encodings import this module

        return Fingerprint(hashlib.sha256(codec.fingerprint_bytes(self)).hexdigest())

    @cached_property
    def alternate_fingerprint(self) -> Fingerprint | None:
        """That of the same P256 certificate with the other valid form of its signature; None for 25519.

        None too when the signature is malformed: then there is no other form.
        """
        if self.curve is not Curve.P256:
            return None
        try:
            return replace(self, signature=with_other_s(self.signature)).fingerprint
        except AuthError:
            return None

    @cached_property
    def addresses(self) -> tuple[IPAddress, ...]:
        """The overlay addresses, in certificate order."""
        return tuple(network.ip for network in self.networks)

    def is_valid_at(self, at: int) -> bool:
        """Whether unix time `at` lies within the period, both ends included."""
        return self.not_before <= at <= self.not_after

    def explain_period(self, at: int) -> str:
        """Why the certificate is not valid at `at`, with both dates: for operators."""
        clock = f"this machine's clock says {format_time(at)}"
        if at < self.not_before:
            return f"is not valid before {format_time(self.not_before)}; {clock}"
        return f"expired at {format_time(self.not_after)}; {clock}"


def format_time(unix_s: int) -> str:
    """`2026-11-22 19:18:47 UTC`, or the bare number when no calendar has that date."""
    try:
        return f"{datetime.fromtimestamp(unix_s, UTC):%Y-%m-%d %H:%M:%S} UTC"
    except (ValueError, OverflowError, OSError):
        return f"unix time {unix_s}"


def format_network(network: IPInterface) -> str:
    """Address and prefix length as Nebula writes them: IPv4-mapped IPv6 keeps its dotted half."""
    mapped = network.ip.ipv4_mapped if network.ip.version == 6 else None
    return f"::ffff:{mapped}/{network.network.prefixlen}" if mapped else network.with_prefixlen


def check_properties(certificate: Certificate) -> None:
    """Raise CertError unless the fields are possible in every version."""
    expected = PUBLIC_KEY_BYTES[certificate.curve]
    if len(certificate.public_key) != expected:
        raise CertError(
            f"invalid public key: {certificate.curve.name} keys are {expected} bytes, "
            f"got {len(certificate.public_key)}"
        )
    if len(certificate.issuer) not in (0, 2 * FINGERPRINT_BYTES):
        raise CertError(f"the issuer must be {FINGERPRINT_BYTES} bytes, got {len(certificate.issuer) // 2}")
    if not certificate.is_ca and not certificate.networks:
        raise CertError("non-CA certificates must contain at least one network")
    for network in certificate.networks:
        if network.ip.is_unspecified:
            raise CertError(f"certificates must not use the zero address as a network: {network}")


def parse_curve(number: int) -> Curve:
    """CertError for a number that names no curve."""
    try:
        return Curve(number)
    except ValueError:
        raise CertError(f"unknown curve {number}") from None


def check_groups_allowed(ca: Certificate, groups: Iterable[str]) -> None:
    """Raise CertError for a group outside those of the CA; a CA without groups allows any."""
    for group in groups:
        if ca.groups and group not in ca.groups:
            raise CertError(f"certificate contained a group not present on the signing ca: {group}")


def check_networks_allowed(
    allowed: tuple[IPInterface, ...], networks: Iterable[IPInterface], kind: str
) -> None:
    """Raise CertError for a network not inside one of `allowed`, of which none means any.

    `kind` is how the error calls them: "a network" or "an unsafe network".
    """
    for network in networks:
        inside = (
            network.ip in one.network and one.network.prefixlen <= network.network.prefixlen
            for one in allowed
        )
        if allowed and not any(inside):
            raise CertError(
                f"certificate contained {kind} assignment outside the limitations of the signing ca: "
                f"{format_network(network)}"
            )


def check_constraints(ca: Certificate, certificate: Certificate) -> None:
    """Raise CertError when `certificate` says more than `ca` may sign."""
    if certificate.not_after > ca.not_after:
        raise CertError("certificate expires after signing certificate")
    if certificate.not_before < ca.not_before:
        raise CertError("certificate is valid before the signing certificate")
    check_groups_allowed(ca, certificate.groups)
    check_networks_allowed(ca.networks, certificate.networks, "a network")
    check_networks_allowed(ca.unsafe_networks, certificate.unsafe_networks, "an unsafe network")
