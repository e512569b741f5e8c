"""Our certificate, key and trusted CAs, read from the paths or the text in `pki`.

Data flow: config.model.PkiConfig -> files -> [workers.pki] -> cert.identity, cert.pool -> Controller
Reads files and nothing else; what makes a certificate good is decided in cert. Reading and judging are apart,
since the process that reads the private key is not the one that uses it (workers.checked).
Source: slackhq/nebula, examples/config.yml, `pki`.
"""

import os
import stat
from dataclasses import dataclass

from nebula_mp.cert.identity import Identity
from nebula_mp.cert.pool import CaPool
from nebula_mp.config.model import PkiConfig
from nebula_mp.errors import CertError, ConfigError

_FILE_BYTES_MAX = 1024 * 1024
_BEGIN = "-----BEGIN"
_HINTS = {
    "pki.ca": "make a CA with `nebula-mp cert ca`",
    "pki.cert": "sign one with `nebula-mp cert sign`",
    "pki.key": "`nebula-mp cert sign` or `nebula-mp cert keygen` writes it",
}


@dataclass(frozen=True, slots=True)
class Pki:
    """What a gateway needs to prove who it is and to judge others."""

    identity: Identity
    pool: CaPool
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PemText:
    """PEM text, and what to call it in messages."""

    text: str
    source: str
    readable_by_all: bool = False

    def __repr__(self) -> str:
        return f"PemText(source={self.source!r})"  # the text may be a private key


@dataclass(frozen=True, slots=True, kw_only=True)
class PkiTexts:
    """All of `pki` that may stand in files."""

    certificate: PemText
    key: PemText
    ca: PemText


def load_pki(config: PkiConfig, at: int) -> Pki:
    """Read and check everything under `pki` as of unix time `at`.

    Raises ConfigError for a file that cannot be read and CertError for content that cannot be used; the
    text names the key, the file and what to do, and never quotes a private key.
    """
    return check_pki(read_texts(config), config, at)


def read_texts(config: PkiConfig) -> PkiTexts:
    """Read the files, or take the texts that stand in the configuration itself. Raises as `load_pki` does."""
    return PkiTexts(
        certificate=_read("pki.cert", config.cert),
        key=_read("pki.key", config.key),
        ca=_read("pki.ca", config.ca),
    )


def check_pki(texts: PkiTexts, config: PkiConfig, at: int) -> Pki:
    """Check what was read, as of unix time `at`. Raises CertError."""
    certificate, key, ca = texts.certificate, texts.key, texts.ca
    identity = Identity.from_pem(
        certificate.text,
        key.text,
        cert_source=certificate.source,
        key_source=key.source,
        initiating_version=config.initiating_version,
        at=at,
    )
    pool = CaPool.from_pem(ca.text, source=ca.source, at=at, blocklist=config.blocklist)
    warnings = list(pool.warnings)
    for own in identity.certificates.values():
        try:
            pool.verify(own, at)
        except CertError as error:
            warnings.append(
                f"{certificate.source}: peers that trust the CAs of {ca.source} will refuse certificate"
                f" {own.name!r}: {error}"
            )
    if key.readable_by_all:
        warnings.append(f"{key.source}: every user of this machine can read the private key: chmod 600 it")
    return Pki(identity, pool, tuple(warnings))


def _read(key: str, value: str) -> PemText:
    if _BEGIN in value:
        return PemText(value, f"{key} (inline)")
    source = f"{key} {value}"
    if not value.strip():
        raise ConfigError(f"{key}: is empty: give a path or the PEM text itself; {_HINTS[key]}")
    if value.startswith("pkcs11:"):
        raise ConfigError(f"{source}: keys in a PKCS#11 token are not supported: give a path")
    try:
        # Not blocking, since a path that names a pipe by mistake would wait for ever.
        descriptor = os.open(value, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ConfigError(f"{source}: is not a regular file; {_HINTS[key]}")
            raw = file.read(_FILE_BYTES_MAX + 1)
    except OSError as error:
        reason = error.strerror or str(error)
        hint = _HINTS[key] if isinstance(error, FileNotFoundError) else _permission_hint(error)
        raise ConfigError(f"{source}: {reason}: {hint}") from None
    except ValueError:
        raise ConfigError(f"{key}: {value!r} is neither a path nor PEM text; {_HINTS[key]}") from None
    if len(raw) > _FILE_BYTES_MAX:
        raise ConfigError(f"{source}: more than {_FILE_BYTES_MAX} bytes, so this is no PEM file of Nebula")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise CertError(f"{source}: not PEM: the file holds binary data; {_HINTS[key]}") from None
    return PemText(text, source, readable_by_all=bool(status.st_mode & stat.S_IROTH))


def _permission_hint(error: OSError) -> str:
    if isinstance(error, PermissionError):
        return f"run as root, or let uid {os.geteuid()} read it"
    return "give the path of a PEM file"
