"""A CA and identities for tests that need certificates but are not about them."""

from collections.abc import Iterable
from functools import cache
from ipaddress import ip_interface
from random import Random

from nebula_mp.cert.identity import Identity
from nebula_mp.cert.pool import CaPool
from nebula_mp.cert.sign import CertificateRequest, self_sign, sign_certificate
from nebula_mp.crypto.dh import PrivateKey
from nebula_mp.crypto.signing import SigningKey
from nebula_mp.newtypes import CertVersion, Curve

ANY_TIME = 1_800_000_000
"""A moment, in unix seconds, at which every certificate made here is valid."""
_HALF_LIFE_S = 365 * 86_400


class Pki:
    """One CA. Everything is made from a seed, so two runs make the same keys."""

    def __init__(self, seed: int = 1, curve: Curve = Curve.CURVE25519) -> None:
        self._entropy = Random(seed).randbytes
        self.curve = curve
        self.key = SigningKey.generate(curve, self._entropy)
        request = CertificateRequest(
            version=CertVersion.V2,
            name=f"ca-{seed}",
            not_before=ANY_TIME - _HALF_LIFE_S,
            not_after=ANY_TIME + _HALF_LIFE_S,
        )
        self.ca = self_sign(request, self.key)

    @staticmethod
    @cache
    def shared() -> "Pki":
        """Give the same CA to everybody who does not care."""
        return Pki()

    @staticmethod
    @cache
    def other_ca() -> "Pki":
        """Give a second CA that nobody else trusts."""
        return Pki(seed=2)

    def pool(self, blocklist: Iterable[str] = ()) -> CaPool:
        return CaPool([self.ca], blocklist)

    def identity(
        self,
        name: str,
        *networks: str,
        groups: tuple[str, ...] = (),
        versions: tuple[CertVersion, ...] = (CertVersion.V2,),
        unsafe: tuple[str, ...] = (),
        key_of: Identity | None = None,
    ) -> Identity:
        """Make a host; a v1 certificate gets the first network only. `key_of`: renew that host's."""
        key = key_of.private_key if key_of else PrivateKey.generate(self.curve, self._entropy)
        certificates = {
            version: sign_certificate(
                CertificateRequest(
                    version=version,
                    name=name,
                    not_before=self.ca.not_before,
                    not_after=self.ca.not_after - 1,
                    networks=tuple(
                        map(ip_interface, networks[:1] if version is CertVersion.V1 else networks)
                    ),
                    unsafe_networks=tuple(map(ip_interface, unsafe)),
                    groups=groups,
                ),
                key.public_key,
                self.ca,
                self.key,
            )
            for version in versions
        }
        return Identity(key, certificates, min(certificates))
