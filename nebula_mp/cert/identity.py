"""Who we are: our certificates and the private key they belong to.

Data flow: pki.cert, pki.key -> [cert.identity] -> handshake.machine, control.controller, firewall
Knows what a node needs before it may start or reload; knows nothing of files, clocks or whom we trust.
Source: docs/wire-format.md, "Which certificate is sent"; slackhq/nebula, pki.go.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from nebula_mp.cert import codec
from nebula_mp.cert.keys import parse_private_key
from nebula_mp.cert.model import Certificate, format_network
from nebula_mp.cert.pem import PemBlock
from nebula_mp.crypto.dh import PrivateKey
from nebula_mp.errors import CertError
from nebula_mp.newtypes import CertVersion, Curve, IPInterface


@dataclass(frozen=True, slots=True)
class OwnCertificates:
    """What `pki.cert` holds: one certificate, or one of each version; each may be used at its time."""

    certificates: Mapping[CertVersion, Certificate]
    blocks: Mapping[CertVersion, PemBlock]
    source: str

    @classmethod
    def from_pem(cls, text: str, source: str, at: int) -> "OwnCertificates":
        """Read and check all that needs no key; the rest as in `Identity.from_pem`."""
        blocks: dict[CertVersion, PemBlock] = {}
        certificates: dict[CertVersion, Certificate] = {}
        for block, certificate in codec.parse_pem(text, source):
            version = certificate.version
            if version in blocks:
                raise CertError(
                    f"{block.where}: v{version} certificate already found at line {blocks[version].line}; "
                    "keep one of each version"
                )
            _check_own(block, certificate, at)
            blocks[version] = block
            certificates[version] = certificate
        _check_together(certificates, source)
        return cls(MappingProxyType(certificates), blocks, source)

    def check_pairs(self, key: PrivateKey, key_source: str) -> None:
        """Raise CertError for the first certificate that is not made for this key."""
        for version, certificate in self.certificates.items():
            _check_pair(self.blocks[version], certificate, key, key_source)

    def choose_initiating_version(self, asked: int | None) -> CertVersion:
        """Give v1 where both exist and nothing was asked for, as Nebula does. Raises CertError."""
        match asked:
            case None:
                return min(self.certificates)
            case CertVersion.V1:
                if CertVersion.V1 not in self.certificates:
                    raise CertError(f"pki.initiating_version is 1, but {self.source} holds no v1 certificate")
                return CertVersion.V1
            case CertVersion.V2:
                return max(self.certificates)
            case _:
                raise CertError(f"unknown pki.initiating_version: {asked}")


@dataclass(frozen=True, slots=True)
class Identity:
    """One private key, and one or two certificates for it. If it exists, they fit together."""

    private_key: PrivateKey
    certificates: Mapping[CertVersion, Certificate]
    initiating_version: CertVersion  # the one we offer when we start a handshake; always present

    @classmethod
    def from_pem(
        cls,
        cert_text: str,
        key_text: str,
        *,
        cert_source: str,
        key_source: str,
        initiating_version: int | None,
        at: int,
    ) -> "Identity":
        """Read and check `pki.cert` and `pki.key`; the sources name them in errors.

        `initiating_version` is `pki.initiating_version`, None when the key is absent. `at` is unix time
        in seconds. CertError says which file, which block of it, why, and what to do.
        """
        private_key = parse_private_key(key_text, key_source)
        own = OwnCertificates.from_pem(cert_text, cert_source, at)
        own.check_pairs(private_key, key_source)
        return cls(private_key, own.certificates, own.choose_initiating_version(initiating_version))

    @property
    def newest(self) -> Certificate:
        """The v2 certificate if there is one: it says all that the v1 certificate does."""
        return self.certificates.get(CertVersion.V2) or self.certificates[CertVersion.V1]

    @property
    def networks(self) -> tuple[IPInterface, ...]:
        """Our overlay addresses with their networks, in certificate order."""
        return self.newest.networks

    @property
    def curve(self) -> Curve:
        """That of the key and of every certificate."""
        return self.private_key.curve

    def check_replaces(self, old: "Identity") -> None:
        """Raise CertError when a running node must not go over from `old` to this.

        Addresses and curve are fixed while it runs. A version may be added; v2 may go when v1 has the
        same networks.
        """
        for version, certificate in self.certificates.items():
            before = old.certificates.get(version)
            if before is None:
                continue
            if before.networks != certificate.networks:
                raise CertError(
                    f"networks in the new v{version} certificate are {_join(certificate.networks)}, "
                    f"in the old {_join(before.networks)}; restart to change addresses"
                )
            if before.curve is not certificate.curve:
                raise CertError(
                    f"curve of the new v{version} certificate is {certificate.curve.name}, of the old "
                    f"{before.curve.name}; restart to change the curve"
                )
        if CertVersion.V2 in old.certificates and CertVersion.V2 not in self.certificates:
            before = old.certificates[CertVersion.V2]
            if before.networks != self.networks:
                raise CertError(
                    "removing the v2 certificate is not permitted unless the v1 certificate has the same "
                    f"networks: v1 has {_join(self.networks)}, v2 had {_join(before.networks)}"
                )


def _check_own(block: PemBlock, certificate: Certificate, at: int) -> None:
    named = f"{block.where}: v{certificate.version} certificate {certificate.name!r}"
    if certificate.is_ca:
        raise CertError(f"{named} is a CA certificate; pki.cert needs one that the CA signed for this host")
    if at < certificate.not_before:
        raise CertError(f"{named} {certificate.explain_period(at)}; check the clock")
    if at > certificate.not_after:
        raise CertError(
            f"{named} {certificate.explain_period(at)}; sign a new one: "
            "nebula-mp cert sign -in-pub HOST.pub, or check the clock"
        )


def _check_pair(block: PemBlock, certificate: Certificate, key: PrivateKey, key_source: str) -> None:
    named = f"{block.where}: v{certificate.version} certificate {certificate.name!r}"
    if certificate.curve is not key.curve:
        raise CertError(
            f"{named} is for curve {certificate.curve.name}, but {key_source} holds a {key.curve.name} key"
        )
    if certificate.public_key != key.public_key:
        raise CertError(
            f"{named} is not a pair with {key_source}: the certificate is for public key "
            f"{certificate.public_key.hex()}, the private key has {key.public_key.hex()}; "
            "use the key made with this certificate, or sign the other public key"
        )


def _check_together(certificates: Mapping[CertVersion, Certificate], source: str) -> None:
    if len(certificates) == len(CertVersion):
        v1, v2 = certificates[CertVersion.V1], certificates[CertVersion.V2]
        if v1.networks[0] != v2.networks[0]:
            raise CertError(
                f"{source}: v1 and v2 networks are not the same: the first of v1 is "
                f"{_join(v1.networks[:1])}, of v2 {_join(v2.networks[:1])}"
            )


def _join(networks: tuple[IPInterface, ...]) -> str:
    return ", ".join(map(format_network, networks))
