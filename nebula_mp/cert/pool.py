"""The CAs we trust, and whether a certificate may be believed because of them.

Data flow: pki.ca, pki.blocklist -> [cert.pool] -> handshake.machine, control.controller, cli
Knows trust; knows nothing of files, sockets or clocks. There are no intermediate certificates.
Source: docs/wire-format.md, "CA pool and verification"; slackhq/nebula, cert/ca_pool.go.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from nebula_mp.cert import codec
from nebula_mp.cert.model import Certificate, check_constraints
from nebula_mp.crypto import signing
from nebula_mp.errors import AuthError, CertError
from nebula_mp.newtypes import Fingerprint

CHECKED_MAX = 4096
"""Certificates whose signature and limits are remembered as good; about 150 bytes each."""


class BlocklistedError(CertError):
    """The certificate is in the block list: its tunnels end whatever `pki.disconnect_invalid` says."""

    def __init__(self) -> None:
        super().__init__("certificate is in the block list")


@dataclass(frozen=True, slots=True)
class VerifiedCertificate:
    """A certificate that was trusted when it was verified, and the CA that signed it."""

    certificate: Certificate
    issuer: Certificate


class CaPool:
    """Trusted CAs by fingerprint. Immutable but for the memory of certificates that were checked."""

    def __init__(self, authorities: Iterable[Certificate], blocklist: Iterable[str] = ()) -> None:
        """Raise CertError for a certificate that is no CA or is not signed by itself."""
        self.warnings: tuple[str, ...] = ()
        self._blocklist = frozenset(blocklist)
        self._authorities: dict[str, Certificate] = {}
        for authority in authorities:
            _check_authority(authority)
            self._authorities[authority.fingerprint] = authority
        # A fingerprint covers the signature and names the issuer, whose fingerprint covers its key and
        # limits. So a certificate that fitted once fits for good, and only time and lists can change.
        self._checked: OrderedDict[Fingerprint, None] = OrderedDict()

    @classmethod
    def from_pem(
        cls,
        text: str,
        *,
        source: str,
        at: int,
        blocklist: Iterable[str] = (),
        allow_expired: bool = False,
    ) -> Self:
        """Read the CAs of a file; `source` names it in errors, `at` is unix time in seconds.

        CAs outside their period are kept and reported in `warnings`. CertError when the file is not
        made of CA certificates, or when none of them is valid (unless `allow_expired`).
        """
        authorities = []
        warnings = []
        for block, certificate in codec.parse_pem(text, source):
            try:
                _check_authority(certificate)
            except CertError as error:
                hint = "" if certificate.is_ca else "; give the certificate that signs those of hosts"
                raise CertError(f"{block.where}: {error}{hint}") from None
            authorities.append(certificate)
            if not certificate.is_valid_at(at):
                warnings.append(
                    f"{block.where}: CA {certificate.name!r} ({certificate.fingerprint}) "
                    f"{certificate.explain_period(at)}"
                )
        if len(warnings) == len(authorities) and not allow_expired:
            raise CertError("\n".join([*warnings, f"{source}: no valid CA certificates present"]))
        pool = cls(authorities, blocklist)
        pool.warnings = tuple(warnings)
        return pool

    @property
    def authorities(self) -> tuple[Certificate, ...]:
        """The trusted CAs, expired ones included, in the order they were added."""
        return tuple(self._authorities.values())

    def verify(self, certificate: Certificate, at: int) -> VerifiedCertificate:
        """Return proof that `certificate` is trusted at unix time `at`, else raise CertError.

        The signature is checked once per certificate; period, CA and block list every time.
        """
        issuer = self._check_current(certificate, at)
        fingerprint = certificate.fingerprint
        if fingerprint in self._checked:
            self._checked.move_to_end(fingerprint)
        else:
            _check_signature(certificate, issuer.public_key)
            check_constraints(issuer, certificate)
            self._checked[fingerprint] = None
            if len(self._checked) > CHECKED_MAX:
                self._checked.popitem(last=False)
        self._check_alternate(certificate)
        return VerifiedCertificate(certificate, issuer)

    def recheck(self, verified: VerifiedCertificate, at: int) -> None:
        """Raise BlocklistedError or CertError when a verified certificate is no longer trusted at `at`.

        For live tunnels, against a pool that may be newer than the one which verified.
        """
        self._check_alternate(verified.certificate)
        issuer = self._check_current(verified.certificate, at)
        if issuer.fingerprint != verified.issuer.fingerprint:
            raise CertError("certificate fingerprint did not match")

    def _check_current(self, certificate: Certificate, at: int) -> Certificate:
        """Return the issuer, after everything that can change while a certificate stays the same."""
        if certificate.fingerprint in self._blocklist:
            raise BlocklistedError
        if not certificate.issuer:
            raise CertError("no issuer in certificate")
        issuer = self._authorities.get(certificate.issuer)
        if issuer is None:
            raise CertError("could not find ca for the certificate")
        if issuer.curve is not certificate.curve:
            raise CertError("certificate curve does not match CA")
        if not issuer.is_valid_at(at):
            raise CertError("root certificate is expired")
        if not certificate.is_valid_at(at):
            raise CertError("certificate is expired")
        return issuer

    def _check_alternate(self, certificate: Certificate) -> None:
        """A P256 signature has two valid forms: listing either blocks both."""
        if self._blocklist and certificate.alternate_fingerprint in self._blocklist:
            raise BlocklistedError


def _check_authority(certificate: Certificate) -> None:
    if not certificate.is_ca:
        raise CertError(f"{certificate.name}: certificate is not a CA")
    try:
        _check_signature(certificate, certificate.public_key)
    except CertError:
        raise CertError(f"{certificate.name}: certificate is not self-signed") from None


def _check_signature(certificate: Certificate, public_key: bytes) -> None:
    try:
        signing.verify(certificate.curve, public_key, certificate.signature, codec.signed_bytes(certificate))
    except AuthError:
        raise CertError("certificate signature did not match") from None
