"""Small CAs and hosts with keys that are the same in every run."""

import hashlib
import itertools
from dataclasses import dataclass
from ipaddress import ip_interface
from typing import Any

from nebula_mp.cert import codec, keys
from nebula_mp.cert.model import Certificate
from nebula_mp.cert.sign import CertificateRequest, self_sign, sign_certificate
from nebula_mp.crypto.dh import PrivateKey
from nebula_mp.crypto.signing import SigningKey
from nebula_mp.newtypes import CertVersion, Curve, Entropy, IPInterface

AT = 1_800_000_000
DAY = 86_400


def entropy(seed: str) -> Entropy:
    """A stream of bytes that depends on `seed` only."""
    numbers = itertools.count()

    def take(count: int) -> bytes:
        return hashlib.shake_256(f"{seed}/{next(numbers)}".encode()).digest(count)

    return take


def networks(*texts: str) -> tuple[IPInterface, ...]:
    return tuple(map(ip_interface, texts))


@dataclass(frozen=True)
class Authority:
    certificate: Certificate
    key: SigningKey

    @property
    def pem(self) -> str:
        return codec.encode_pem(self.certificate)


@dataclass(frozen=True)
class Host:
    certificate: Certificate
    key: PrivateKey

    @property
    def pem(self) -> str:
        return codec.encode_pem(self.certificate)

    @property
    def key_pem(self) -> str:
        return keys.encode_private_key(self.key)


def make_ca(
    name: str = "ca", *, curve: Curve = Curve.CURVE25519, version: int = 2, **fields: Any
) -> Authority:
    """A CA that is valid for a year around AT."""
    key = SigningKey.generate(curve, entropy(f"ca {name}"))
    defaults: dict[str, Any] = {"not_before": AT - 180 * DAY, "not_after": AT + 180 * DAY}
    request = CertificateRequest(version=CertVersion(version), name=name, **defaults | fields)
    return Authority(self_sign(request, key), key)


def make_host(authority: Authority, name: str = "host", *, version: int = 2, **fields: Any) -> Host:
    """A host that is valid for two days around AT. Hosts of one name and curve share their key."""
    key = PrivateKey.generate(authority.certificate.curve, entropy(f"host {name}"))
    defaults: dict[str, Any] = {
        "not_before": AT - DAY,
        "not_after": AT + DAY,
        "networks": networks("10.0.0.1/8"),
    }
    request = CertificateRequest(version=CertVersion(version), name=name, **defaults | fields)
    return Host(sign_certificate(request, key.public_key, authority.certificate, authority.key), key)
