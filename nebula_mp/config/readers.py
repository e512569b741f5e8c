"""From a node of the tree to a checked value; what is wrong goes into the report.

Data flow: yaml_source.Node -> [config.readers] -> values of config.model
Each reader takes a Field and gives a value, or records a problem and raises Unusable. Knows no key.
Source: slackhq/nebula (what each type accepts); Go's net/netip and net.SplitHostPort for addresses.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address, ip_network
from types import MappingProxyType
from typing import TypeVar

from nebula_mp.config import yaml_source
from nebula_mp.config.keys import nearest
from nebula_mp.config.model import HostPort
from nebula_mp.config.report import Report, shown
from nebula_mp.config.values import parse_bool, parse_duration, parse_int
from nebula_mp.config.yaml_source import Node, Scalar, describe
from nebula_mp.newtypes import IPAddress, IPNetwork, Seconds

T = TypeVar("T")

_LABEL = r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)"
_NAME = re.compile(rf"(?:{_LABEL}\.)*{_LABEL}\.?")
_DOTTED_NUMBER = re.compile(r"(?:.*\.)?[0-9]+\.?")
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_DEVICE_BYTES_MAX = 15  # IFNAMSIZ with its closing zero
_HOST_NAME_MAX = 253
_BARE_KEY = re.compile(r"[A-Za-z0-9+/]{40,}={1,2}")  # the middle line of a PEM block
_INT32_MAX = 2**31 - 1


class Unusable(Exception):  # noqa: N818 - no error of the program: the problem is in the report already
    """The value cannot be used."""


@dataclass(frozen=True, slots=True)
class Field:
    """A value with its dotted key, and where to say what is wrong with it.

    `secret` values, paths and PEM text of keys, are never quoted.
    """

    key: str
    node: Node
    report: Report
    secret: bool = False

    def wrong(self, expected: str, hint: str | None = None) -> Unusable:
        """Record what was found and what is expected; gives the exception to raise."""
        found = describe(self.node)
        if self.secret and isinstance(self.node, Scalar):
            found = "a text that is neither" if self.node.text else "nothing"
        text = f"found {found}, expected {expected}"
        if hint is not None and shown(hint) == f'"{hint}"':
            text += f"; did you mean {hint}?"
        return self.refused(text)

    def refused(self, text: str) -> Unusable:
        """Record a problem in one's own words; gives the exception to raise."""
        self.report.problem(self.node.place, self.key, text)
        return Unusable()

    def text(self, expected: str) -> str:
        """Give the string Nebula sees; a list, a map or nothing is a problem."""
        if not isinstance(self.node, Scalar) or self.node.text is None:
            raise self.wrong(expected)
        return self.node.text

    def child(self, key: str, node: Node) -> "Field":
        """Give a value inside this one; `key` is appended as it is."""
        return Field(self.key + key, node, self.report)

    def items(self, expected: str) -> Iterator["Field"]:
        """Give the items of a list."""
        if not isinstance(self.node, yaml_source.Sequence):
            raise self.wrong(expected)
        for index, item in self.node.items:
            yield self.child(f"[{index}]", item)


Reader = Callable[[Field], object]


def boolean(field: Field) -> bool:
    """Read a truth value."""
    expected = "true or false (or yes, no)"
    text = field.text(expected)
    try:
        return parse_bool(text)
    except ValueError:
        hint = {"on": "true", "off": "false"}.get(text.lower()) or nearest(text, ("true", "false"))
        raise field.wrong(expected, hint) from None


def integer(low: int, high: int) -> Callable[[Field], int]:
    """Read a whole number from `low` to `high`, both included."""
    expected = f"a whole number {low}..{high}"

    def read(field: Field) -> int:
        text = field.text(expected)
        try:
            value = parse_int(text)
        except ValueError:
            digits = re.findall(r"[0-9]+", text)
            fits = len(digits) == 1 and len(digits[0]) < 20 and low <= int(digits[0]) <= high
            raise field.wrong(expected, digits[0] if fits else None) from None
        if not low <= value <= high:
            raise field.wrong(expected)
        return value

    return read


def optional_size(field: Field) -> int | None:
    """Read a size in bytes, where 0 means: leave it alone."""
    expected = f"a number of bytes 0..{_INT32_MAX}"
    text = field.text(expected)
    try:
        value = parse_int(text)
    except ValueError:
        match = re.fullmatch(r"([0-9]{1,10}) *([kKmMgG])(?:i?[bB])?", text)
        hint = int(match[1]) << _SHIFTS[match[2].lower()] if match else _INT32_MAX + 1
        raise field.wrong(expected, str(hint) if hint <= _INT32_MAX else None) from None
    if not 0 <= value <= _INT32_MAX:
        raise field.wrong(expected)
    return value or None


_SHIFTS = {"k": 10, "m": 20, "g": 30}


def whole_seconds(field: Field) -> Seconds:
    """Read a number of seconds without a unit, at least 1."""
    expected = f"a whole number of seconds without a unit, 1..{_INT32_MAX}"
    text = field.text(expected)
    try:
        value = parse_int(text)
    except ValueError:
        raise field.wrong(expected, _whole_seconds_hint(text)) from None
    if not 1 <= value <= _INT32_MAX:
        raise field.wrong(expected)
    return Seconds(float(value))


def _whole_seconds_hint(text: str) -> str | None:
    """Give `5` for `5s`."""
    try:
        value, below = divmod(parse_duration(text), 10**9)
    except ValueError:
        return None
    return str(value) if below == 0 and value > 0 else None


def duration(field: Field) -> Seconds:
    """Read a Go duration above zero."""
    expected = "a duration above zero such as 500ms, 30s or 1h30m"
    text = field.text(expected)
    try:
        nanoseconds = parse_duration(text)
    except ValueError:
        raise field.wrong(expected, _duration_hint(text)) from None
    if nanoseconds <= 0:
        raise field.wrong(expected)
    return Seconds(nanoseconds / 1e9)


def _duration_hint(text: str) -> str | None:
    """Give `30s` for `30`, `30 s` and `30sec`: the spellings of those who do not know Go."""
    match = re.fullmatch(
        r"([0-9]{1,9}) *(|ms|s|m|h|sec|secs|second|seconds|min|mins|minute|minutes|hours?|d|days?)",
        text.strip().lower(),
    )
    if match is None or match[1].strip("0") == "":
        return None
    unit = match[2]
    if unit.startswith("d"):
        return f"{int(match[1]) * 24}h"
    return f"{match[1]}{'ms' if unit == 'ms' else unit[:1] or 's'}"


def choice(
    options: Mapping[str, T], *, any_case: bool = False, old: Mapping[str, T] | None = None
) -> Callable[[Field], T]:
    """Read one of some words, exactly as spelled unless `any_case`. `old` ones are accepted, not proposed."""
    expected = "one of " + ", ".join(options)
    accepted = {**options, **(old or {})}

    def read(field: Field) -> T:
        text = field.text(expected)
        word = text.lower() if any_case else text
        if word not in accepted:
            raise field.wrong(expected, nearest(text, options))
        return accepted[word]

    return read


def pem_or_path(what: str) -> Callable[[Field], str]:
    """Read a path or PEM text, which no message quotes: it may hold a private key.

    Text that can be neither is refused here, because whoever opened it as a path would quote it.
    """

    def read(field: Field) -> str:
        field = Field(field.key, field.node, field.report, secret=True)
        text = field.text(what)
        if "-----BEGIN" in text:
            return text
        if text.startswith("pkcs11:"):
            raise field.refused(f"keys in a PKCS#11 token are not supported yet; expected {what}")
        if not text or "\n" in text or "\0" in text or _BARE_KEY.fullmatch(text):
            raise field.wrong(f"{what} with its BEGIN line")
        return text

    return read


def fingerprints(field: Field) -> tuple[str, ...]:
    """Read a list of certificate fingerprints; capitals are folded, since they could never match."""
    return tuple(usable(field.items("a list of certificate fingerprints"), _fingerprint))


def _fingerprint(field: Field) -> str:
    expected = "a certificate fingerprint of 64 hexadecimal digits"
    text = field.text(expected).lower()
    if not _FINGERPRINT.fullmatch(text):
        raise field.wrong(expected)
    return text


def usable(fields: Iterator[Field], read: Callable[[Field], T]) -> list[T]:
    """Read every item, so that each bad one is reported; raises Unusable afterwards if there was any."""
    values = []
    failed = False
    for field in fields:
        try:
            values.append(read(field))
        except Unusable:
            failed = True
    if failed:
        raise Unusable
    return values


def device_name(field: Field) -> str | None:
    """Read the name of a network device; empty lets the kernel choose. `%d` is the kernel's counter."""
    expected = f"a device name of at most {_DEVICE_BYTES_MAX} bytes without spaces, '/' and ':'"
    text = field.text(expected)
    bad = re.search(r"[\s/:\0]", text) or text in {".", ".."} or len(text.encode()) > _DEVICE_BYTES_MAX
    if bad:
        raise field.wrong(expected)
    return text or None


def absolute_path(field: Field) -> str:
    """Read a path that starts with a slash."""
    expected = "an absolute path"
    text = field.text(expected)
    if not text.startswith("/") or "\0" in text:
        raise field.wrong(expected)
    return text


def listen_host(field: Field) -> str:
    """Read the address or name to bind. `[::]` is an old spelling of `::`."""
    expected = "an IP address or a host name"
    text = field.text(expected)
    if text == "[::]":
        return "::"
    if (host := _host(text)) is None:
        hint = text[1:-1] if text.startswith("[") and text.endswith("]") else None
        raise field.wrong(expected, hint if hint and _host(hint) else None)
    return host


def _host(text: str) -> str | None:
    """Give the canonical form of an address (IPv4 in IPv6 form becomes IPv4) or a name; None for neither."""
    try:
        address = ip_address(text)
    except ValueError:
        # 10.0.0.256 is a mistyped address and not a name: no top-level domain is a number.
        if len(text) > _HOST_NAME_MAX or not _NAME.fullmatch(text) or _DOTTED_NUMBER.fullmatch(text):
            return None
        return text
    return str(_unmapped(address))


def _unmapped(address: IPAddress) -> IPAddress:
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


def host_port(field: Field) -> HostPort:
    """Read `192.0.2.1:4242`, `[2001:db8::1]:4242` or `name:4242`."""
    expected = "host:port such as 192.0.2.1:4242, [2001:db8::1]:4242 or gateway.example.org:4242"
    text = field.text(expected)
    match = re.fullmatch(r"(?:\[([^][]*)\]|([^][:]*)):([+]?[0-9]{1,10})", text)
    if match is None:
        raise field.wrong(expected, _host_port_hint(text))
    bracketed, bare, port = match.groups()
    host = _host(bare if bracketed is None else bracketed)
    if host is None or "%" in host or not 1 <= int(port) <= 65535:
        raise field.wrong(expected)
    return HostPort(host=host, port=int(port))


def _host_port_hint(text: str) -> str | None:
    """Give `[2001:db8::1]:4242` when only the brackets are missing and nothing else can be meant."""
    address, _, port = text.rpartition(":")
    if text.count(":") == 8 and _host(address) and port.isdecimal():
        return f"[{address}]:{port}"
    return None


def static_host_map(field: Field) -> Mapping[IPAddress, tuple[HostPort, ...]]:
    """Read the map from overlay addresses to one or several `host:port`."""
    if not isinstance(field.node, yaml_source.Mapping):
        raise field.wrong('a map such as "10.42.0.1": ["192.0.2.1:4242"]')
    hosts: dict[IPAddress, tuple[HostPort, ...]] = {}
    failed = False
    for name, entry in field.node.entries.items():
        key = f".{yaml_source.key_shown(name)}"
        try:
            address = _overlay_address(field.child(key, Scalar(entry.key_place, name)))
            if address in hosts:
                again = field.child(key, Scalar(entry.key_place, name))
                raise again.refused("found the same address a second time, in another spelling")
            value = field.child(key, entry.value)
            is_list = isinstance(entry.value, yaml_source.Sequence)
            values = value.items("") if is_list else iter((value,))
            hosts[address] = tuple(usable(values, host_port))
        except Unusable:
            failed = True
    if failed:
        raise Unusable
    return MappingProxyType(hosts)


def _overlay_address(field: Field) -> IPAddress:
    expected = "the overlay address of a peer"
    text = field.text(expected)
    try:
        address = ip_address(text)
    except ValueError:
        raise field.wrong(expected, text.split("/")[0] if _is_address(text.split("/")[0]) else None) from None
    if _unmapped(address) != address or "%" in text:
        # Nebula compares these as they are, so they would never match the address of a certificate.
        raise field.wrong(expected, str(_unmapped(address)).split("%")[0])
    return address


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def network(field: Field) -> IPNetwork:
    """Read an address with a prefix length; host bits are cleared."""
    expected = "a network such as 10.42.0.0/16 or fd00::/8"
    text = field.text(expected)
    if not re.fullmatch(r"[0-9A-Fa-f:.]+/(?:0|[1-9][0-9]{0,2})", text):
        hint = None
        if _is_address(text):
            hint = f"{text}/{32 if '.' in text else 128}"
        raise field.wrong(expected, hint)
    try:
        return ip_network(text, strict=False)
    except ValueError:
        raise field.wrong(expected) from None
