"""`nebula-mp cert`: make CAs, keys and certificates, print and verify them; flags are those of nebula-cert.

Data flow: argv, files, stdin -> [cli.cert] -> cert.sign, cert.keys, cert.codec, cert.pool -> files, stdout
Knows files and prompts. Files are written with mode 0600, all or none, and
never over existing ones.
Source: slackhq/nebula, cmd/nebula-cert, release 1.11.0.
"""

import argparse
import getpass
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_interface
from pathlib import Path

from nebula_mp import __version__, clock
from nebula_mp.cert import codec, keys
from nebula_mp.cert.encrypted_key import Argon2Parameters
from nebula_mp.cert.model import Certificate
from nebula_mp.cert.pool import CaPool
from nebula_mp.cert.sign import CertificateRequest, self_sign, sign_certificate
from nebula_mp.cli.cert_json import describe, encode_json
from nebula_mp.cli.go_flags import GoFlagParser, parse_duration, parse_uint
from nebula_mp.crypto.dh import PrivateKey
from nebula_mp.crypto.signing import SigningKey
from nebula_mp.errors import CertError, NebulaError
from nebula_mp.newtypes import CertVersion, Curve, IPInterface

PASSPHRASE_VARIABLE = "NEBULA_CA_PASSPHRASE"  # noqa: S105 - the name of a variable, not its content

_ABOUT = "make CAs, keys and certificates, print and verify them; same flags as nebula-cert"
_STDIO = "-"
_PROMPTS_MAX = 5
_NS_PER_S = 10**9
_MODE = 0o600
_ARGON2 = Argon2Parameters()
_CURVES = {
    "25519": Curve.CURVE25519,
    "X25519": Curve.CURVE25519,
    "Curve25519": Curve.CURVE25519,
    "CURVE25519": Curve.CURVE25519,
    "P256": Curve.P256,
}
_PREFIX = re.compile(r"[^/%]+/(0|[1-9][0-9]{0,2})")

_NO_QR = "not offered here: give the file to a program such as qrencode"
_NO_PKCS11 = "not offered here: keys are files; sign with a nebula-cert that was built for PKCS#11"


class _UsageError(Exception):
    """The arguments contradict each other or cannot be read: exit 2."""


class _FailedError(NebulaError):
    """It did not work, for the reason given: exit 1."""


@dataclass(frozen=True, slots=True)
class _Output:
    """One thing to write: for which flag, where (`-` is stdout), and how an existing file is called."""

    flag: str
    path: str
    what: str
    text: str


def main(argv: Sequence[str] | None = None) -> int:
    """Be `nebula-mp-cert`, a stand-in for nebula-cert; the exit code."""
    parser = argparse.ArgumentParser(prog="nebula-mp-cert", description=_ABOUT, allow_abbrev=False)
    _add_modes(parser)
    arguments = parser.parse_args(argv)
    run: Callable[[argparse.Namespace], int] = arguments.run
    return run(arguments)


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `cert` to the commands of nebula-mp. The namespace's `run(namespace)` gives the exit code."""
    parser = subparsers.add_parser("cert", help=_ABOUT, description=_ABOUT, allow_abbrev=False)
    _add_modes(parser)


def _add_modes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-version", "--version", action="version", version=f"Version: {__version__}")
    parser.set_defaults(run=partial(_run, parser, _no_mode))
    modes = parser.add_subparsers(title="modes", metavar="MODE", parser_class=GoFlagParser)
    for name, about, declare, action in (
        ("ca", "create a self signed certificate authority", _declare_ca, _ca),
        ("keygen", "create a key pair; the public key can be passed to sign", _declare_keygen, _keygen),
        ("sign", "create and sign a certificate", _declare_sign, _sign),
        ("print", "print details about a certificate", _declare_print, _print),
        (
            "verify",
            "verify that a certificate is valid and was signed by a trusted CA",
            _declare_verify,
            _verify,
        ),
    ):
        mode = modes.add_parser(
            name,
            help=about,
            description=f'{about}. A path of "-" is stdin or stdout.',
            prog=f"{parser.prog} {name}",
        )
        declare(mode)
        mode.set_defaults(run=partial(_run, mode, action))


def _run(
    parser: argparse.ArgumentParser,
    action: Callable[[argparse.Namespace], None],
    arguments: argparse.Namespace,
) -> int:
    try:
        action(arguments)
    except _UsageError as error:
        parser.print_usage(sys.stderr)
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except (_FailedError, CertError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Error: interrupted", file=sys.stderr)
        return 1
    return 0


def _no_mode(_arguments: argparse.Namespace) -> None:
    raise _UsageError("no mode was provided; one of ca, keygen, sign, print, verify")


# --- ca


def _declare_ca(parser: GoFlagParser) -> None:
    parser.add_flag("name", help="required: name of the certificate authority")
    parser.add_flag("version", parse_uint, default=2, help="version of the certificate format: 1 or 2")
    parser.add_flag(
        "duration",
        parse_duration,
        default="8760h",
        help="how long it is valid: 8760h, 90m, 30s",
    )
    parser.add_flag("out-key", default="ca.key", help="path to write the private key to")
    parser.add_flag("out-crt", default="ca.crt", help="path to write the certificate to")
    parser.add_flag("groups", help="comma separated: the only groups that its certificates may have")
    parser.add_flag("networks", help="comma separated, CIDR: the only networks its certificates may have")
    parser.add_flag("unsafe-networks", help="comma separated, CIDR: the only unsafe networks they may have")
    parser.add_switch(
        "encrypt", help=f"encrypt the private key; passphrase from {PASSPHRASE_VARIABLE} or a prompt"
    )
    parser.add_flag("argon-memory", parse_uint, default=_ARGON2.memory_kib, help="for -encrypt, in KiB")
    parser.add_flag("argon-parallelism", parse_uint, default=_ARGON2.parallelism, help="for -encrypt")
    parser.add_flag("argon-iterations", parse_uint, default=_ARGON2.iterations, help="for -encrypt")
    parser.add_flag("curve", default="25519", help="25519 or P256")
    parser.add_flag("ips", help="deprecated, see -networks")
    parser.add_flag("subnets", help="deprecated, see -unsafe-networks")
    parser.add_flag("out-qr", help=_NO_QR)
    parser.add_flag("pkcs11", help=_NO_PKCS11)


def _ca(arguments: argparse.Namespace) -> None:
    _refuse_absent_features(arguments)
    _require(arguments, "name", "out-key", "out-crt")
    parameters = _argon2_parameters(arguments) if arguments.encrypt else None
    if arguments.duration <= 0:
        raise _UsageError("-duration must be greater than 0")
    version = _certificate_version(arguments.version)
    networks = _networks("networks", arguments.networks or arguments.ips, version)
    unsafe_networks = _networks("unsafe-networks", arguments.unsafe_networks or arguments.subnets, version)
    curve = _curve(arguments.curve)
    _claim_stdio(arguments, "out-key", "out-crt")
    _refuse_existing(arguments.out_key, "CA key")
    _refuse_existing(arguments.out_crt, "CA cert")

    passphrase = b""
    if parameters:
        passphrase = _passphrase(
            no_terminal="out-key must be encrypted interactively",
            none_given="no passphrase specified, remove -encrypt flag to write out-key in plaintext",
        )
    now_ns = clock.wall_ns()
    key = SigningKey.generate(curve, clock.entropy)
    request = CertificateRequest(
        version=version,
        name=arguments.name,
        groups=_groups(arguments.groups),
        networks=networks,
        unsafe_networks=unsafe_networks,
        not_before=now_ns // _NS_PER_S,
        not_after=(now_ns + arguments.duration) // _NS_PER_S,
    )
    certificate = _signed(self_sign, request, key)
    if parameters:
        key_text = keys.encrypt_signing_key(key, passphrase, parameters, clock.entropy)
    else:
        key_text = keys.encode_signing_key(key)
    _write(
        _Output("out-key", arguments.out_key, "CA key", key_text),
        _Output("out-crt", arguments.out_crt, "CA cert", codec.encode_pem(certificate)),
    )


def _argon2_parameters(arguments: argparse.Namespace) -> Argon2Parameters:
    try:
        return Argon2Parameters(
            arguments.argon_memory, arguments.argon_iterations, arguments.argon_parallelism
        )
    except CertError as error:
        raise _UsageError(str(error).replace("argon2 ", "-argon-", 1)) from None


# --- keygen


def _declare_keygen(parser: GoFlagParser) -> None:
    parser.add_flag("out-key", help="required: path to write the private key to")
    parser.add_flag("out-pub", help="required: path to write the public key to")
    parser.add_flag("curve", default="25519", help="25519 or P256")
    parser.add_flag("pkcs11", help=_NO_PKCS11)


def _keygen(arguments: argparse.Namespace) -> None:
    _refuse_absent_features(arguments)
    _require(arguments, "out-key", "out-pub")
    key = PrivateKey.generate(_curve(arguments.curve), clock.entropy)
    _claim_stdio(arguments, "out-key", "out-pub")
    _write(
        _Output("out-key", arguments.out_key, "key", keys.encode_private_key(key)),
        _Output("out-pub", arguments.out_pub, "public key", keys.encode_public_key(key)),
    )


# --- sign


def _declare_sign(parser: GoFlagParser) -> None:
    parser.add_flag(
        "version", parse_uint, default=0, help="version of the certificate format; that of the CA if left out"
    )
    parser.add_flag("ca-key", default="ca.key", help="path to the signing CA key")
    parser.add_flag("ca-crt", default="ca.crt", help="path to the signing CA cert")
    parser.add_flag("name", help="required: name of the cert, usually a hostname")
    parser.add_flag(
        "networks", help="required: comma separated, CIDR: addresses of the host with their networks"
    )
    parser.add_flag("unsafe-networks", help="comma separated, CIDR: networks that the host can route for")
    parser.add_flag(
        "duration",
        parse_duration,
        default=0,
        help="how long it is valid; until 1 s before the CA if left out",
    )
    parser.add_flag("in-pub", help="path to an existing public key to sign, instead of a new one")
    parser.add_flag("out-key", help="path to write the private key to; NAME.key if left out")
    parser.add_flag("out-crt", help="path to write the certificate to; NAME.crt if left out")
    parser.add_flag("groups", help="comma separated: groups of the host")
    parser.add_flag("ip", help="deprecated, see -networks")
    parser.add_flag("subnets", help="deprecated, see -unsafe-networks")
    parser.add_flag("out-qr", help=_NO_QR)
    parser.add_flag("pkcs11", help=_NO_PKCS11)


def _sign(arguments: argparse.Namespace) -> None:
    _refuse_absent_features(arguments)
    _require(arguments, "ca-key", "ca-crt", "name")
    if arguments.in_pub and arguments.out_key:
        raise _UsageError("cannot set both -in-pub and -out-key")
    arguments.networks = arguments.networks or arguments.ip
    _require(arguments, "networks")
    version = _certificate_version(arguments.version) if arguments.version else None
    arguments.out_key = arguments.out_key or f"{arguments.name}.key"
    arguments.out_crt = arguments.out_crt or f"{arguments.name}.crt"
    _claim_stdio(arguments, "ca-key", "ca-crt", "in-pub")
    _claim_stdio(arguments, *(("out-crt",) if arguments.in_pub else ("out-key", "out-crt")))

    key = _read_ca_key(arguments.ca_key)
    ca = _read_ca_certificate(arguments.ca_crt)
    if key.public_key != ca.public_key or not ca.is_ca:
        raise _FailedError("refusing to sign, root certificate does not match private key")
    now_ns = clock.wall_ns()
    if not ca.is_valid_at(now_ns // _NS_PER_S):
        raise _FailedError(f"ca certificate is expired: {ca.name!r} {ca.explain_period(now_ns // _NS_PER_S)}")
    version = version or ca.version
    lasts_until_s = (now_ns + arguments.duration) // _NS_PER_S
    request = CertificateRequest(
        version=version,
        name=arguments.name,
        networks=_host_networks(arguments.networks, version),
        unsafe_networks=_networks("unsafe-networks", arguments.unsafe_networks or arguments.subnets, version),
        groups=_groups(arguments.groups),
        not_before=now_ns // _NS_PER_S,
        not_after=lasts_until_s if arguments.duration > 0 else ca.not_after - 1,
    )
    _refuse_existing(arguments.out_crt, "cert")

    if arguments.in_pub:
        public_key = _read_public_key(arguments.in_pub, ca.curve)
        certificate = _signed(sign_certificate, request, public_key, ca, key)
        _write(_Output("out-crt", arguments.out_crt, "cert", codec.encode_pem(certificate)))
        return
    _refuse_existing(arguments.out_key, "key")
    private_key = PrivateKey.generate(ca.curve, clock.entropy)
    certificate = _signed(sign_certificate, request, private_key.public_key, ca, key)
    _write(
        _Output("out-key", arguments.out_key, "key", keys.encode_private_key(private_key)),
        _Output("out-crt", arguments.out_crt, "cert", codec.encode_pem(certificate)),
    )


def _read_ca_key(path: str) -> SigningKey:
    text = _read("ca-key", path)
    ask = partial(
        _passphrase,
        no_terminal="ca-key is encrypted and must be decrypted interactively",
        none_given="cannot open encrypted ca-key without passphrase",
    )
    try:
        return keys.parse_signing_key(text, path, ask)
    except CertError as error:
        raise _FailedError(f"error while parsing ca-key: {error}") from None


def _read_ca_certificate(path: str) -> Certificate:
    text = _read("ca-crt", path)
    try:
        _, certificate = next(codec.parse_pem(text, path))
    except CertError as error:
        raise _FailedError(f"error while parsing ca-crt: {error}") from None
    return certificate


def _read_public_key(path: str, expected: Curve) -> bytes:
    text = _read("in-pub", path)
    try:
        curve, public_key = keys.parse_public_key(text, path)
    except CertError as error:
        raise _FailedError(f"error while parsing in-pub: {error}") from None
    if curve is not expected:
        raise _FailedError("curve of in-pub does not match ca")
    return public_key


def _host_networks(text: str, version: CertVersion) -> tuple[IPInterface, ...]:
    networks = _networks("networks", text, CertVersion.V2)
    if version is CertVersion.V1:
        if sum(each.version == 4 for each in networks) != 1:
            raise _UsageError(
                "invalid -networks definition: v1 certificates can only have a single ipv4 address"
            )
        if len(networks) != 1:
            raise _UsageError("invalid -networks definition: v1 certificates can only contain ipv4 addresses")
    return networks


# --- print


def _declare_print(parser: GoFlagParser) -> None:
    parser.add_flag("path", help="required: path to the certificate")
    parser.add_switch("json", help="print one line of JSON: an array of the certificates")
    parser.add_flag("out-qr", help=_NO_QR)


def _print(arguments: argparse.Namespace) -> None:
    _refuse_absent_features(arguments)
    _require(arguments, "path")
    try:
        text = _read_input(arguments.path)
    except OSError as error:
        raise _FailedError(f"unable to read cert; {_explain(error)}") from None
    printed = []
    try:
        for _, certificate in codec.parse_pem(text, arguments.path):
            fields = describe(certificate)
            if arguments.json:
                printed.append(fields)
            else:
                _to_stdout(encode_json(fields, indent="\t") + "\n")
    except CertError as error:
        raise _FailedError(f"error while unmarshaling cert: {error}") from None
    if arguments.json:
        _to_stdout(encode_json(printed) + "\n")


# --- verify


def _declare_verify(parser: GoFlagParser) -> None:
    parser.add_flag("ca", help="required: path to a file containing one or more ca certificates")
    parser.add_flag("crt", help="required: path to a file containing certificates")


def _verify(arguments: argparse.Namespace) -> None:
    _require(arguments, "ca", "crt")
    _claim_stdio(arguments, "ca", "crt")
    at = clock.wall_s()
    ca_text = _read("ca", arguments.ca)
    try:
        pool = CaPool.from_pem(ca_text, source=arguments.ca, at=at, allow_expired=True)
    except CertError as error:
        raise _FailedError(f"error while adding ca cert to pool: {error}") from None
    text = _read("crt", arguments.crt)
    problems = []
    try:
        for _, certificate in codec.parse_pem(text, arguments.crt):
            problem = _why_not_trusted(pool, certificate, at)
            if problem:
                problems.append(f"error while verifying certificate {problem}")
    except CertError as error:
        raise _FailedError(f"error while parsing crt: {error}") from None
    if problems:
        raise _FailedError("\n".join(problems))


def _why_not_trusted(pool: CaPool, certificate: Certificate, at: int) -> str:
    try:
        pool.verify(certificate, at)
    except CertError as error:
        known = {authority.fingerprint for authority in pool.authorities}
        if certificate.issuer and certificate.issuer not in known:
            return f"v{certificate.version} {certificate.name} with issuer {certificate.issuer}: {error}"
        return f"{encode_json(describe(certificate), indent=chr(9))}: {error}"
    return ""


# --- what the modes share


def _refuse_absent_features(arguments: argparse.Namespace) -> None:
    for flag, why in (("out-qr", _NO_QR), ("pkcs11", _NO_PKCS11)):
        if getattr(arguments, flag.replace("-", "_"), ""):
            raise _FailedError(f"-{flag} is {why}")


def _require(arguments: argparse.Namespace, *flags: str) -> None:
    for flag in flags:
        if not getattr(arguments, flag.replace("-", "_")):
            raise _UsageError(f"-{flag} is required")


def _claim_stdio(arguments: argparse.Namespace, *flags: str) -> None:
    """At most one input may be stdin, at most one output stdout."""
    taken = [flag for flag in flags if getattr(arguments, flag.replace("-", "_")) == _STDIO]
    if len(taken) > 1:
        direction = (
            "output may write to stdout" if taken[0].startswith("out") else "input may read from stdin"
        )
        raise _FailedError(f'-{taken[0]} and -{taken[1]} both set to "-", only one {direction}')


def _certificate_version(number: int) -> CertVersion:
    try:
        return CertVersion(number)
    except ValueError:
        raise _UsageError("-version must be either 1 or 2") from None


def _curve(name: str) -> Curve:
    try:
        return _CURVES[name]
    except KeyError:
        raise _UsageError(f"invalid curve: {name}; 25519 or P256") from None


def _networks(flag: str, text: str, version: CertVersion) -> tuple[IPInterface, ...]:
    networks = []
    for one in filter(None, (part.strip(" ") for part in text.split(","))):
        try:
            network = ip_interface(one)
        except ValueError:
            network = None
        if network is None or not _PREFIX.fullmatch(one):
            raise _UsageError(f"invalid -{flag} definition: {one}")
        if version is CertVersion.V1 and network.version != 4:
            raise _UsageError(f"invalid -{flag} definition: v1 certificates can only be ipv4, have {one}")
        networks.append(network)
    return tuple(networks)


def _groups(text: str) -> tuple[str, ...]:
    return tuple(filter(None, (part.strip() for part in text.split(","))))


def _signed(sign: Callable[..., Certificate], *arguments: object) -> Certificate:
    try:
        return sign(*arguments)
    except CertError as error:
        raise _FailedError(f"error while signing: {error}") from None


def _passphrase(*, no_terminal: str, none_given: str) -> bytes:
    """Give the passphrase of the environment, else ask on the terminal up to five times."""
    given = os.fsencode(os.environ.get(PASSPHRASE_VARIABLE, ""))
    for _ in range(_PROMPTS_MAX):
        if given:
            return given
        if not sys.stdin.isatty():
            raise _FailedError(f"{no_terminal}; or set {PASSPHRASE_VARIABLE}")
        given = os.fsencode(getpass.getpass("Enter passphrase: ", stream=sys.stderr))
    if not given:
        raise _FailedError(none_given)
    return given


def _read(flag: str, path: str) -> str:
    try:
        return _read_input(path)
    except OSError as error:
        raise _FailedError(f"error while reading {flag}: {_explain(error)}") from None


def _read_input(path: str) -> str:
    raw = sys.stdin.buffer.read() if path == _STDIO else Path(path).read_bytes()
    return raw.decode(errors="replace")  # all that counts is ASCII; the rest may be a comment


def _explain(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}"


def _refuse_existing(path: str, what: str) -> None:
    if path != _STDIO and os.path.lexists(path):
        raise _FailedError(f"refusing to overwrite existing {what}: {path}")


def _write(*outputs: _Output) -> None:
    """Create the files, all or none, then write what goes to stdout."""
    created: list[str] = []
    try:
        for output in outputs:
            if output.path != _STDIO:
                _create(output, created)
    except BaseException:
        for path in created:
            Path(path).unlink()
        raise
    _to_stdout("".join(output.text for output in outputs if output.path == _STDIO))


def _create(output: _Output, created: list[str]) -> None:
    try:
        # O_EXCL also refuses to follow a link, so nobody can point the key somewhere else.
        descriptor = os.open(output.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _MODE)
        created.append(output.path)
        with open(descriptor, "w", encoding="ascii") as file:  # noqa: PTH123 - of a descriptor
            file.write(output.text)
    except FileExistsError:
        raise _FailedError(f"refusing to overwrite existing {output.what}: {output.path}") from None
    except OSError as error:
        raise _FailedError(f"error while writing {output.flag}: {_explain(error)}") from None


def _to_stdout(text: str) -> None:
    """Write UTF-8 whatever the locale says, as nebula-cert does."""
    sys.stdout.flush()
    sys.stdout.buffer.write(text.encode())
    sys.stdout.buffer.flush()
