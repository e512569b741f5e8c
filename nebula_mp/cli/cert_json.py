"""A certificate as `nebula-cert print` shows it.

Data flow: cert.codec -> [cli.cert_json] -> cli.cert -> stdout
Knows names, order and spelling of the fields; knows nothing of files or flags.
Source: slackhq/nebula, cert, release 1.11.0: the JSON forms of both versions.
"""

import json
from datetime import UTC, datetime
from typing import Any

from nebula_mp.cert.model import Certificate, format_network
from nebula_mp.errors import CertError
from nebula_mp.newtypes import CertVersion

# Go's encoder escapes these inside strings, and they occur nowhere else in JSON.
_GO_ESCAPES = str.maketrans({each: f"\\u{ord(each):04x}" for each in "<>&\u2028\u2029"})


def describe(certificate: Certificate) -> dict[str, Any]:
    """Return the certificate as nebula-cert prints it, times in this machine's time zone.

    CertError when a time has no calendar date, which JSON could not show.
    """
    is_v1 = certificate.version is CertVersion.V1
    nothing: list[str] | None = [] if is_v1 else None
    details: dict[str, Any] = {
        "name": certificate.name,
        "networks": [format_network(each) for each in certificate.networks] or nothing,
        "unsafeNetworks": [format_network(each) for each in certificate.unsafe_networks] or nothing,
        "groups": list(certificate.groups) or nothing,
        "notBefore": _local_time(certificate.not_before),
        "notAfter": _local_time(certificate.not_after),
        "isCa": certificate.is_ca,
        "issuer": certificate.issuer,
    }
    fields: dict[str, Any] = {
        "version": int(certificate.version),
        "details": details,
        "fingerprint": certificate.fingerprint,
        "signature": certificate.signature.hex(),
    }
    (details if is_v1 else fields).update(
        publicKey=certificate.public_key.hex(), curve=certificate.curve.name
    )
    return fields


def _local_time(unix_s: int) -> str:
    """Give RFC 3339 as Go does: whole minutes of offset, and Z for none."""
    try:
        local = datetime.fromtimestamp(unix_s, UTC).astimezone()
    except (ValueError, OverflowError, OSError):
        raise CertError(f"unix time {unix_s} has no calendar date") from None
    offset = local.utcoffset()
    minutes = int(offset.total_seconds() / 60) if offset else 0
    zone = f"{'-' if minutes < 0 else '+'}{abs(minutes) // 60:02}:{abs(minutes) % 60:02}" if minutes else "Z"
    return local.replace(tzinfo=None).isoformat(timespec="seconds") + zone


def encode_json(value: object, indent: str | None = None) -> str:
    """Return JSON with sorted keys, escaped as Go's encoder does."""
    separators = (",", ": ") if indent else (",", ":")
    text = json.dumps(value, indent=indent, separators=separators, sort_keys=True, ensure_ascii=False)
    return text.translate(_GO_ESCAPES)
