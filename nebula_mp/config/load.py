"""From configuration files to a checked Config, or to every reason why not.

Data flow: config.yml or a directory -> yaml_source -> [config.load] -> config.model.Config
Everything is looked at before anything is said: ConfigError carries all problems, each with file, line and
key. A value that Nebula would silently replace by its default is a problem here. Knows what the keys are,
and nothing of the files that the configuration names (workers.pki reads those).
Source: slackhq/nebula examples/config.yml and the code that reads each key.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

from nebula_mp.config import readers, yaml_source
from nebula_mp.config.keys import IGNORED, LATER, SWITCHES, makes_no_difference, nearest, nearest_key
from nebula_mp.config.model import WORKERS_MAX, Config, DrainMode, KernelChoice, LogLevel, RecvErrorPolicy
from nebula_mp.config.readers import Field, Reader, Unusable
from nebula_mp.config.report import Place, Report, path_shown
from nebula_mp.config.rules import firewall_rules
from nebula_mp.config.values import parse_bool, parse_int
from nebula_mp.config.yaml_source import Entry, describe, is_unset, key_shown
from nebula_mp.newtypes import Cipher

# The largest inner packet that fits one UDP datagram over IPv4: 65535 less 20 IP, 8 UDP, 16 header, 16 tag.
MTU_MAX = 65475
MTU_MIN = 68  # RFC 791

_U32_MAX = 2**32 - 1
_I32_MAX = 2**31 - 1


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """A configuration that can be used, what to tell the operator about it, and the files it came from."""

    config: Config
    warnings: tuple[str, ...]
    sources: tuple[Path, ...]
    places: Mapping[str, Place]  # of the value of each key that is set

    def refuse(self, problems: Iterable[tuple[str, str]], warnings: Iterable[str] = ()) -> None:
        """Raise ConfigError if there are `problems`, each a key that is set and what is wrong with its value.

        For those who look at what the configuration names. A text may begin with the key; it is said once.
        The error carries the warnings of the configuration and `warnings`.
        """
        report = Report()
        for key, text in problems:
            report.problem(self.places[key], key, text.removeprefix(key).lstrip(": "))
        for warning in (*self.warnings, *warnings):
            report.note(warning)
        report.raise_problems()


def _recv_error(field: Field) -> RecvErrorPolicy:
    """Read a policy word or, as older files have it, a truth value."""
    words = {policy.value: policy for policy in RecvErrorPolicy}
    text = field.text("one of always, never, private")
    try:
        return RecvErrorPolicy.ALWAYS if parse_bool(text) else RecvErrorPolicy.NEVER
    except ValueError:
        return readers.choice(words)(field)


def _initiating_version(field: Field) -> int:
    return readers.integer(1, 2)(field)


def _routines(field: Field) -> int | None:
    """Read what Nebula calls its number of threads. Files with more than we can use must still start."""
    count = readers.integer(0, _I32_MAX)(field)
    if count > WORKERS_MAX:
        text = f"found {count}, but there are {WORKERS_MAX} workers at most"
        field.report.warning(field.node.place, field.key, text)
        return WORKERS_MAX
    return count or None


def _workers(field: Field) -> int | None:
    """Read a number of workers; None for `auto`."""
    expected = f"auto or a whole number 1..{WORKERS_MAX}"
    text = field.text(expected)
    if text == "auto":
        return None
    try:
        count = parse_int(text)
    except ValueError:
        raise field.wrong(expected, nearest(text, ("auto",))) from None
    if not 1 <= count <= WORKERS_MAX:
        raise field.wrong(expected)
    return count


def _user(field: Field) -> str:
    """Read the name of a user; whether there is one of that name is seen at the start."""
    expected = "the name of a user"
    text = field.text(expected)
    if not _USER.fullmatch(text):
        raise field.wrong(expected)
    return text


_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,31}\$?")  # useradd(8), and what directories add to it
_OLD_LEVELS = {"warning": LogLevel.WARN, "fatal": LogLevel.ERROR, "panic": LogLevel.ERROR}

_REQUIRED = {
    "pki.ca": "the path of a file of CA certificates, or their PEM text",
    "pki.cert": "the path of this host's certificate file, or its PEM text",
    "pki.key": "the path of this host's private key file, or its PEM text",
}

READERS: Mapping[str, Reader] = {
    **{key: readers.pem_or_path(what) for key, what in _REQUIRED.items()},
    "pki.blocklist": readers.fingerprints,
    "pki.disconnect_invalid": readers.boolean,
    "pki.initiating_version": _initiating_version,
    "cipher": readers.choice({cipher.value: cipher for cipher in Cipher}),
    "static_host_map": readers.static_host_map,
    "static_map.cadence": readers.duration,
    "static_map.network": readers.choice({word: word for word in ("ip4", "ip6", "ip")}),
    "static_map.lookup_timeout": readers.duration,
    "listen.host": readers.listen_host,
    "listen.port": readers.integer(0, 65535),
    "listen.read_buffer": readers.optional_size,
    "listen.write_buffer": readers.optional_size,
    "listen.so_mark": readers.integer(0, _U32_MAX),
    "listen.udp_offloads": readers.boolean,
    "listen.send_recv_error": _recv_error,
    "listen.accept_recv_error": _recv_error,
    "tun.dev": readers.device_name,
    "tun.mtu": readers.integer(MTU_MIN, MTU_MAX),
    "tun.tx_queue": readers.integer(0, _I32_MAX),
    "tun.drop_local_broadcast": readers.boolean,
    "tun.drop_multicast": readers.boolean,
    "tun.use_offloads": readers.boolean,
    "firewall.inbound": firewall_rules,
    "firewall.outbound": firewall_rules,
    "firewall.default_local_cidr_any": readers.boolean,
    "firewall.conntrack.tcp_timeout": readers.duration,
    "firewall.conntrack.udp_timeout": readers.duration,
    "firewall.conntrack.default_timeout": readers.duration,
    "handshakes.try_interval": readers.duration,
    "handshakes.retries": readers.integer(1, _I32_MAX),
    "tunnels.drop_inactive": readers.boolean,
    "tunnels.inactivity_timeout": readers.duration,
    "timers.connection_alive_interval": readers.whole_seconds,
    "timers.pending_deletion_interval": readers.whole_seconds,
    "logging.level": readers.choice(
        {level.value: level for level in LogLevel}, any_case=True, old=_OLD_LEVELS
    ),
    "logging.format": readers.choice({word: word for word in ("text", "json")}, any_case=True),
    "logging.disable_timestamp": readers.boolean,
    "routines": _routines,
    "mp.run_dir": readers.absolute_path,
    "mp.workers": _workers,
    "mp.drain": readers.choice({mode.value: mode for mode in DrainMode}),
    "mp.kernel": readers.choice({choice.value: choice for choice in KernelChoice}),
    "mp.user": _user,
    "mp.offload.tso": readers.boolean,
    "mp.offload.uso": readers.boolean,
    "mp.offload.udp_segment": readers.boolean,
    "mp.offload.udp_gro": readers.boolean,
    "mp.offload.multiqueue": readers.boolean,
}
"""The keys we obey. A test compares them with the fields of Config."""


def _must_drop(field: Field) -> None:
    words = {"drop": "drop", "reject": "reject"}
    if readers.choice(words)(field) == "reject":
        raise field.refused('found "reject", which is not supported yet; expected drop')


def _must_be_enabled(field: Field) -> None:
    if readers.boolean(field):
        raise field.refused("a gateway without a device is not supported yet; expected false")


REFUSALS: Mapping[str, Reader] = {
    "firewall.inbound_action": _must_drop,
    "firewall.outbound_action": _must_drop,
    "tun.disabled": _must_be_enabled,
}
"""Keys of which only one value may pass: to ignore another one would be dangerous."""

_KNOWN = frozenset((*READERS, *REFUSALS, *LATER, *IGNORED))
_SECTIONS = frozenset(
    ".".join(parts[:count]) for parts in (key.split(".") for key in _KNOWN) for count in range(1, len(parts))
)


def load_config(path: Path, *, strict: bool = False) -> LoadedConfig:
    """Load a file, or all .yml and .yaml files below a directory, merged as Nebula does.

    Raises ConfigError with every problem. With `strict` an unknown key is one; otherwise it is a warning.
    """
    report = Report()
    sources = yaml_source.find_files(path, report)
    parsed = [yaml_source.read_file(file, number, report) for number, file in enumerate(sources)]
    if not sources or None in parsed:
        report.raise_problems()  # without the whole tree, keys would be reported as missing that are not
    merged: yaml_source.Mapping | None = None
    for tree in parsed:
        assert tree is not None
        merged = tree if merged is None else yaml_source.merge(merged, tree, report)
    assert merged is not None  # no source at all is a problem, and raised above
    flat, sections = _flatten(merged, report, strict=strict)
    config = _build(Config, "", flat, sections, report)
    for key in REFUSALS.keys() & flat.keys():
        _read(REFUSALS[key], key, flat, report)
    _warn_of_later(flat, report)
    report.raise_problems()
    assert isinstance(config, Config)
    config = _with_offloads(config, flat)
    places = {key: entry.value.place for key, entry in flat.items()}
    return LoadedConfig(config, report.warnings(), sources, places)


def _flatten(
    root: yaml_source.Mapping, report: Report, *, strict: bool
) -> tuple[dict[str, Entry], dict[str, Place]]:
    """Give every known key that is set, by its dotted name, and where each section starts."""
    flat: dict[str, Entry] = {}
    sections = {"": root.place}
    say = report.problem if strict else report.warning

    def walk(mapping: yaml_source.Mapping, prefix: str) -> None:
        for name, entry in mapping.entries.items():
            key = prefix + name if "." not in name else ""  # `listen.port: 1` is not `listen: {port: 1}`
            if key in _SECTIONS and isinstance(entry.value, yaml_source.Mapping):
                sections[key] = entry.key_place
                walk(entry.value, f"{key}.")
            elif key in _SECTIONS and is_unset(entry.value):
                sections[key] = entry.key_place
            elif key in _KNOWN:
                if not is_unset(entry.value):
                    flat[key] = entry
            elif key in _SECTIONS:
                text = f"found {describe(entry.value)}, expected a map of settings"
                report.problem(entry.value.place, key, text)
            else:
                near = nearest_key(prefix, name, _KNOWN)
                hint = f"; did you mean {near}?" if near else ""
                say(entry.key_place, prefix + key_shown(name), f"unknown key{hint}")

    walk(root, "")
    return flat, sections


def _build(
    model: type[Any], prefix: str, flat: Mapping[str, Entry], sections: Mapping[str, Place], report: Report
) -> Any:
    """Give an instance of `model` from the keys below `prefix`; None if a required one is missing."""
    hints = get_type_hints(model)
    values: dict[str, Any] = {}
    complete = True
    for member in fields(model):
        key = prefix + member.name
        if is_dataclass(hints[member.name]):
            values[member.name] = _build(hints[member.name], f"{key}.", flat, sections, report)
        elif key in flat:
            values[member.name] = _read(READERS[key], key, flat, report)
        elif member.default is MISSING and member.default_factory is MISSING:
            place = sections.get(prefix.removesuffix("."), sections[""])
            report.problem(place, key, f"required: {_REQUIRED[key]}")
            complete = False
    return model(**values) if complete else None


def _read(reader: Reader, key: str, flat: Mapping[str, Entry], report: Report) -> Any:
    """Give the value of one key; None after a problem, which `load_config` raises in the end."""
    try:
        return reader(Field(key, flat[key].value, report))
    except Unusable:
        return None


def _with_offloads(config: Config, flat: Mapping[str, Entry]) -> Config:
    """Let Nebula's two switches decide on the offloads that `mp.offload` says nothing about."""
    switches = {
        "tso": config.tun.use_offloads,
        "uso": config.tun.use_offloads,
        "udp_segment": config.listen.udp_offloads,
        "udp_gro": config.listen.udp_offloads,
    }
    unsaid = {name: value for name, value in switches.items() if f"mp.offload.{name}" not in flat}
    return replace(config, mp=replace(config.mp, offload=replace(config.mp.offload, **unsaid)))


def _warn_of_later(flat: Mapping[str, Entry], report: Report) -> None:
    """Name in one warning all keys of Nebula that would change something and are not obeyed yet."""
    listed = {key: flat[key].key_place for key in LATER.keys() & flat.keys()}
    listed = {key: at for key, at in listed.items() if not makes_no_difference(key, flat[key].value)}
    for section, switch in SWITCHES.items():
        if switch not in listed:
            listed = {key: at for key, at in listed.items() if not key.startswith(f"{section}.")}
    if listed:
        places = sorted((place, key) for key, place in listed.items())
        names = ", ".join(f"{key} ({path_shown(place.file)}:{place.line})" for place, key in places)
        report.note(f"known to Nebula but without effect here yet: {names}")
