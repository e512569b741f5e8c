"""Our certificate, key and trusted CAs, read from the paths or the text in `pki`.

Data flow: config.load.LoadedConfig -> files -> [workers.pki] -> cert.identity, cert.pool -> Controller
Reads files and nothing else; what makes a certificate good is decided in cert. Reading and judging are apart,
since the process that reads the private key is not the one that uses it (workers.checked). As in config.load,
everything is looked at before anything is said.
Source: slackhq/nebula, examples/config.yml, `pki`.
"""

import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from nebula_mp.cert.identity import Identity, OwnCertificates
from nebula_mp.cert.keys import parse_private_key
from nebula_mp.cert.pool import CaPool
from nebula_mp.config.load import LoadedConfig
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


def load_pki(loaded: LoadedConfig, at: int) -> tuple[PkiTexts, Pki]:
    """Read the files, or take the texts that stand in the configuration, and check them as of unix time `at`.

    Raises ConfigError with every problem of any of the three, each with the place of its key, the file and
    what to do, and with all warnings. Never quotes a private key.
    """
    findings = _Findings()
    config = loaded.config.pki
    texts: dict[str, PemText] = {}
    for key, value in (("pki.ca", config.ca), ("pki.cert", config.cert), ("pki.key", config.key)):
        with findings.about(key):
            texts[key] = _read(key, value)
    pki = _judge(texts, config, at, findings)
    loaded.refuse(findings.problems, findings.warnings)
    assert pki is not None  # there was no problem
    return PkiTexts(certificate=texts["pki.cert"], key=texts["pki.key"], ca=texts["pki.ca"]), pki


def check_pki(texts: PkiTexts, config: PkiConfig, at: int) -> Pki:
    """Check what was read, as of unix time `at`. Raises CertError."""
    findings = _Findings()
    by_key = {"pki.ca": texts.ca, "pki.cert": texts.certificate, "pki.key": texts.key}
    pki = _judge(by_key, config, at, findings)
    if pki is None:
        raise CertError("\n".join(text for _, text in findings.problems))
    return pki


@dataclass(slots=True)
class _Findings:
    """What was found so far, all that is wrong and all that is odd."""

    problems: list[tuple[str, str]] = field(default_factory=list)  # the key, and a line that names it
    warnings: list[str] = field(default_factory=list)

    @contextmanager
    def about(self, key: str) -> Iterator[None]:
        """Take an error as a problem of this key, and go on behind the block."""
        try:
            yield
        except (ConfigError, CertError) as error:
            self.problems += [(key, line) for line in str(error).splitlines()]


def _judge(texts: Mapping[str, PemText], config: PkiConfig, at: int, findings: _Findings) -> Pki | None:
    """Judge each of the `texts` that are there for itself, then all together; None if there is a problem."""
    ca, certificate, key = (texts.get(name) for name in ("pki.ca", "pki.cert", "pki.key"))
    pool = own = private = version = None
    if ca is not None:
        with findings.about("pki.ca"):
            pool = CaPool.from_pem(ca.text, source=ca.source, at=at, blocklist=config.blocklist)
            findings.warnings += pool.warnings
    if certificate is not None:
        with findings.about("pki.cert"):
            own = OwnCertificates.from_pem(certificate.text, certificate.source, at)
    if own is not None and ca is not None and pool is not None:
        findings.warnings += _distrust(own, pool, ca, at)
    if own is not None:
        with findings.about("pki.initiating_version"):
            version = own.choose_initiating_version(config.initiating_version)
    if key is not None:
        if key.readable_by_all:
            findings.warnings.append(
                f"{key.source}: every user of this machine can read the private key: chmod 600 it"
            )
        with findings.about("pki.key"):
            private = parse_private_key(key.text, key.source)
    if own is not None and key is not None and private is not None:
        with findings.about("pki.cert"):
            own.check_pairs(private, key.source)
    if findings.problems or pool is None or own is None or private is None or version is None:
        return None
    return Pki(Identity(private, own.certificates, version), pool, tuple(findings.warnings))


def _distrust(own: OwnCertificates, pool: CaPool, ca: PemText, at: int) -> Iterator[str]:
    for certificate in own.certificates.values():
        try:
            pool.verify(certificate, at)
        except CertError as error:
            yield (
                f"{own.source}: peers that trust the CAs of {ca.source} will refuse certificate"
                f" {certificate.name!r}: {error}"
            )


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
