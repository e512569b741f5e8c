"""The CA and the host certificates of the demonstration.

Data flow: demo.story -> [demo.credentials] -> cert.sign, cert.keys -> files in the demonstration's folder
The CA's key exists only while this runs: it is never written.
"""

import os
from collections.abc import Mapping
from ipaddress import ip_interface
from pathlib import Path

from nebula_mp import clock
from nebula_mp.cert import codec, keys
from nebula_mp.cert.sign import CertificateRequest, self_sign, sign_certificate
from nebula_mp.crypto.dh import PrivateKey
from nebula_mp.crypto.signing import SigningKey
from nebula_mp.newtypes import CertVersion, Curve

_VALID_S = 24 * 3600  # long enough for a look around with --keep


def write_credentials(folder: Path, networks: Mapping[str, str]) -> None:
    """Write ca.crt, and NAME.crt and NAME.key for each `name: address with prefix length` of `networks`.

    Version 1, which every Nebula reads, unless one of the addresses is IPv6: those need version 2.
    """
    now = clock.wall_s()
    only_ipv4 = all(ip_interface(address).version == 4 for address in networks.values())
    version = CertVersion.V1 if only_ipv4 else CertVersion.V2

    def request(name: str, *addresses: str) -> CertificateRequest:
        return CertificateRequest(
            version=version,
            name=name,
            networks=tuple(ip_interface(address) for address in addresses),
            not_before=now,
            not_after=now + _VALID_S,
        )

    ca_key = SigningKey.generate(Curve.CURVE25519, clock.entropy)
    ca = self_sign(request("demo"), ca_key)
    (folder / "ca.crt").write_text(codec.encode_pem(ca))
    for name, address in networks.items():
        key = PrivateKey.generate(ca.curve, clock.entropy)
        certificate = sign_certificate(request(name, address), key.public_key, ca, ca_key)
        (folder / f"{name}.crt").write_text(codec.encode_pem(certificate))
        _write_private(folder / f"{name}.key", keys.encode_private_key(key))


def _write_private(path: Path, text: str) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
