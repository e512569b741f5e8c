"""The programs that are compared: how each is started and what its configuration says.

Data flow: argv -> cli -> [iperf_harness.systems] -> bench
One node's values (`Values`) fill the `$placeholders` of a command and of a template. Knows no namespaces.
Source: examples/config.yml of slackhq/nebula; config/model.py for `mp`.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from ipaddress import ip_address
from pathlib import Path
from string import Template
from typing import Any

from nebula_mp.errors import SystemCallError
from nebula_mp.newtypes import UdpAddr

CLONE = Path(__file__).resolve().parents[2]
RELEASES = ("1.6.1", "1.9.3", "1.11.0")  # those of tools/get-peers
NONE = "none"
OURS = "nebula-mp"
BUFFER_BYTES = 8 << 20
MTU_BYTES = 1300
AES, CHACHAPOLY = "aes", "chachapoly"  # as the key `cipher` spells them
CIPHERS = (AES, CHACHAPOLY)
IPV4, IPV6 = "ipv4", "ipv6"
IP_VERSIONS = (IPV4, IPV6)
_IPV6_OVERLAY_SINCE = (1, 10)
"""The first Nebula with certificates of version 2; those of version 1 have IPv4 addresses only."""
_RELEASE = re.compile(r"nebula-(\d+\.\d+\.\d+)")
_OF_MP = ("kernel", "workers", "drain", "offload")
_START_OURS = (sys.executable, "-m", "nebula_mp", "start", "-config", "$config")
_CHECK_OURS = (sys.executable, "-m", "nebula_mp", "config", "validate", "--strict", "-c", "$config")


class UsageError(Exception):
    """The command line asks for what does not exist; the message is for whoever typed it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tunnel:
    """What holds for the tunnel of every system in a run: its cipher, and the IP versions inside and outside.

    The defaults are what a run had before they could be chosen.
    """

    cipher: str = AES
    overlay: str = IPV4
    underlay: str = IPV4

    def facts(self) -> dict[str, str]:
        """The same as a report says it."""
        return asdict(self)


DEFAULT_TUNNEL = Tunnel()


@dataclass(frozen=True, slots=True, kw_only=True)
class Values:
    """What differs between nodes and runs. Each field is a placeholder of commands and templates."""

    name: str
    folder: Path
    overlay: str
    peer_overlay: str
    underlay: str
    peer_underlay: str
    port: int
    device: str
    workers: int
    mtu: int = MTU_BYTES
    cipher: str = AES

    @property
    def config(self) -> Path:
        """Where the configuration is written."""
        return self.folder / f"{self.name}.yml"

    @property
    def listen(self) -> str:
        """Every address of the underlay's IP version."""
        return "::" if ip_address(self.underlay).version == 6 else "0.0.0.0"  # noqa: S104 - its own namespace

    @property
    def peer_endpoint(self) -> str:
        """Where the peer listens: `192.0.2.2:4242` or `[2001:db8::2]:4242`."""
        return str(UdpAddr(ip_address(self.peer_underlay), self.port))

    def placeholders(self) -> dict[str, str]:
        """Every field, where the peer listens, and the paths of the configuration and of the credentials."""
        fields = {name: str(getattr(self, name)) for name in self.__dataclass_fields__}
        files = {"cert": f"{self.name}.crt", "key": f"{self.name}.key", "ca": "ca.crt"}
        paths = {name: str(self.folder / file) for name, file in files.items()}
        return fields | paths | {"config": str(self.config), "peer_endpoint": self.peer_endpoint}


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """One line of the tables. `command` is empty without a tunnel; `template` None: Nebula's configuration.

    `check` is a command that refuses a configuration which the program would only warn about.
    """

    label: str
    command: tuple[str, ...] = ()
    settings: Mapping[str, object] = field(default_factory=dict)  # dotted key: value
    template: str | None = None
    version: str = ""
    check: tuple[str, ...] = ()

    @property
    def is_tunnel(self) -> bool:
        """Whether anything runs between the two ends."""
        return bool(self.command)

    def argv(self, values: Values) -> list[str]:
        """The command of one node; UsageError for a placeholder that does not exist."""
        return [_filled(word, values, f"the command of {self.label}") for word in self.command]

    def check_argv(self, values: Values) -> list[str]:
        """The command that judges the configuration; empty if there is none."""
        return [_filled(word, values, self.label) for word in self.check]

    def config_text(self, values: Values) -> str:
        """The configuration of one node; UsageError for a placeholder that does not exist."""
        if self.template is not None:
            return _filled(self.template, values, f"the template of {self.label}")
        settings = _nebula_settings(values)
        for key, value in self.settings.items():
            _set(settings, key.split("."), value)
        # A YAML mapping whose values are JSON, which is YAML as well.
        return "".join(f"{key}: {json.dumps(value)}\n" for key, value in settings.items())


def parse_systems(
    names: Sequence[str],
    *,
    workers: int,
    ours: Mapping[str, str],
    commands: Mapping[str, str],
    templates: Mapping[str, str],
) -> list[System]:
    """The systems of `NAME[:KEY=VALUE]...` in that order, then those of `commands`; UsageError.

    `ours` are options of every nebula-mp that does not state them itself; `templates` are texts.
    """
    found = [_parse(name, workers, ours) for name in names]
    found += [_custom(label, command, templates.get(label)) for label, command in commands.items()]
    labels = [system.label for system in found]
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise UsageError(f"system {twice!r} is named twice; give one of them another option or label")
    if strange := next((label for label in templates if label not in commands), None):
        raise UsageError(f"template for {strange!r}, which is no --command")
    if not found:
        raise UsageError(f"no system to measure; there are {', '.join(known_systems())}")
    return found


def check_overlay(systems: Sequence[System], overlay: str) -> None:
    """UsageError naming the first release that has no overlay of that IP version; a command has to know."""
    for system in systems:
        release = _RELEASE.match(system.label)
        if overlay == IPV6 and release and _numbers(release[1])[:2] < _IPV6_OVERLAY_SINCE:
            since = ".".join(map(str, _IPV6_OVERLAY_SINCE))
            raise UsageError(
                f"{system.label} has no IPv6 overlay, which needs certificates of version 2: Nebula {since}; "
                f"leave it out of --systems, or take --overlay {IPV4}"
            )


def known_systems() -> tuple[str, ...]:
    """The names that need no --command."""
    return NONE, OURS, *(f"nebula-{release}" for release in RELEASES)


def fetch_releases(systems: Sequence[System]) -> None:
    """Get the real releases that are wanted and not there; SystemCallError if that fails."""
    wanted = [Path(system.command[0]) for system in systems if _RELEASE.match(system.label)]
    if all(os.access(program, os.X_OK) for program in wanted):
        return
    subprocess.run(
        [str(CLONE / "tools" / "get-peers"), str(peers_directory())], stdout=sys.stderr, check=False
    )
    if missing := [str(program) for program in wanted if not os.access(program, os.X_OK)]:
        raise SystemCallError(f"not there: {', '.join(missing)}. Leave it out of --systems, or put it there")


def peers_directory() -> Path:
    """The directory that holds VERSION/usr/bin/nebula, as for the tests."""
    return Path(os.environ.get("NEBULA_PEERS") or CLONE / ".peers").resolve()


def _parse(text: str, workers: int, ours: Mapping[str, str]) -> System:
    name, *options = text.split(":")
    settings = dict(_option(option, text) for option in options)
    if name == NONE:
        if settings:
            raise UsageError(f"{text!r}: without a tunnel there is nothing to set")
        return System(label=NONE)
    if name == OURS:
        defaults = {"workers": str(workers), **ours}
        settings = _long({key: _scalar(value) for key, value in defaults.items()}) | _long(settings)
        return System(label=text, command=_START_OURS, settings=settings, check=_CHECK_OURS)
    if release := _RELEASE.fullmatch(name):
        program = peers_directory() / release[1] / "usr" / "bin" / "nebula"
        settings = {"routines": workers, **settings}
        return System(label=text, command=(str(program), "-config", "$config"), settings=settings)
    raise UsageError(f"no system {name!r}; there are {', '.join(known_systems())}, and --command")


def _custom(label: str, command: str, template: str | None) -> System:
    try:
        words = tuple(shlex.split(command))
    except ValueError as error:
        raise UsageError(f"the command of {label} cannot be read: {error}") from error
    if not words:
        raise UsageError(f"the command of {label} is empty")
    return System(label=label, command=words, template=template)


def _option(text: str, whole: str) -> tuple[str, object]:
    key, equals, value = text.partition("=")
    if not (key and equals and value):
        raise UsageError(f"{whole!r}: expected KEY=VALUE after a colon, found {text!r}")
    return key, _scalar(value)


def _long(settings: Mapping[str, object]) -> dict[str, object]:
    return {f"mp.{key}" if key.partition(".")[0] in _OF_MP else key: value for key, value in settings.items()}


def _numbers(release: str) -> tuple[int, ...]:
    return tuple(int(number) for number in release.split("."))


def _scalar(text: str) -> object:
    """Numbers, true and false as such; anything else is text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _filled(text: str, values: Values, what: str) -> str:
    try:
        return Template(text).substitute(values.placeholders())
    except KeyError as error:
        known = ", ".join(f"${name}" for name in sorted(values.placeholders()))
        raise UsageError(f"{what} has ${error.args[0]}, which is none of {known}") from error
    except ValueError as error:
        raise UsageError(f"{what} has a $ without a name; write $$ for one that stays") from error


def _nebula_settings(values: Values) -> dict[str, Any]:
    """What every Nebula is given: the same for all. Ours has its run directory, which others ignore."""
    paths = values.placeholders()
    return {
        "pki": {name: paths[name] for name in ("ca", "cert", "key")},
        "static_host_map": {values.peer_overlay: [values.peer_endpoint]},
        "cipher": values.cipher,
        "listen": {
            "host": values.listen,
            "port": values.port,
            "read_buffer": BUFFER_BYTES,
            "write_buffer": BUFFER_BYTES,
        },
        "tun": {"dev": values.device, "mtu": values.mtu},
        "firewall": {
            direction: [{"port": "any", "proto": "any", "host": "any"}]
            for direction in ("inbound", "outbound")
        },
        "logging": {"level": "warn"},
        "mp": {"run_dir": str(values.folder / f"run-{values.name}")},
    }


def _set(settings: dict[str, Any], path: Sequence[str], value: object) -> None:
    *parents, last = path
    for parent in parents:
        settings = settings.setdefault(parent, {})
        if not isinstance(settings, dict):
            raise UsageError(f"{'.'.join(path)} cannot be set: {parent} is no mapping")
    settings[last] = value
