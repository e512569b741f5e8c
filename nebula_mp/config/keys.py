"""Which keys Nebula knows beyond those we obey, when they may be passed over in silence, and near misses.

Data flow: keys of a configuration -> [config.keys] -> config.load
Knows names and values that change nothing; knows no type of a key that is obeyed (config.load does).
Source: the keys that slackhq/nebula reads, up to the commit after v1.11.0.
"""

from collections.abc import Iterable, Mapping

from nebula_mp.config.values import parse_bool, parse_duration
from nebula_mp.config.yaml_source import Mapping as MappingNode
from nebula_mp.config.yaml_source import Node, Scalar, Sequence

_SWITCH = ("true", "false")

LATER: Mapping[str, tuple[str, ...]] = {
    "counters.requery_every_packets": ("5000",),
    "counters.try_promote": ("1000",),
    "firewall.conntrack.routine_cache_timeout": ("0s",),
    "handshakes.query_buffer": ("64",),
    "handshakes.trigger_buffer": ("64",),
    "lighthouse.advertise_addrs": (),
    "lighthouse.am_lighthouse": ("false",),
    "lighthouse.calculated_remotes": (),
    "lighthouse.dns.host": (),
    "lighthouse.dns.port": ("53",),
    "lighthouse.hosts": (),
    "lighthouse.interval": ("10",),
    "lighthouse.local_allow_list": (),
    "lighthouse.remote_allow_list": (),
    "lighthouse.remote_allow_ranges": (),
    "lighthouse.serve_dns": ("false",),
    "listen.batch": ("64",),
    "listen.routines": ("0", "1"),
    "local_range": (),
    "logging.timestamp_format": (),
    "preferred_ranges": (),
    "punch_back": ("false",),
    "punchy": ("false",),
    "punchy.delay": ("1s",),
    "punchy.punch": ("false",),
    "punchy.respond": ("false",),
    "punchy.respond_delay": ("5s",),
    "punchy.target_all_remotes": ("false",),
    "relay.am_relay": ("false",),
    "relay.relays": (),
    "relay.use_relays": _SWITCH,  # we never do what it forbids
    "sshd.authorized_users": (),
    "sshd.enabled": ("false",),
    "sshd.host_key": (),
    "sshd.listen": (),
    "sshd.sandbox_dir": (),
    "sshd.trusted_cas": (),
    "stats.host": (),
    "stats.interval": (),
    "stats.lighthouse_metrics": ("false",),
    "stats.listen": (),
    "stats.message_metrics": ("false",),
    "stats.namespace": (),
    "stats.path": (),
    "stats.prefix": ("nebula",),
    "stats.protocol": ("tcp",),
    "stats.subsystem": (),
    "stats.type": ("none",),
    "timers.requery_wait_duration": ("60s",),
    "tun.cpu_affinity": (),
    "tun.pin_threads": ("true",),
    "tun.pin_threads_key": (),
    "tun.routes": (),
    "tun.routines": ("0", "1"),
    "tun.unsafe_routes": (),
    "tun.use_system_route_table": ("false",),
    "tun.use_system_route_table_buffer_size": ("0",),
}
"""Known to Nebula, not obeyed yet, and the values with which that changes nothing. Empty ones never do."""

SWITCHES: Mapping[str, str] = {
    "lighthouse.dns": "lighthouse.serve_dns",
    "sshd": "sshd.enabled",
    "stats": "stats.type",
}
"""Sections that mean nothing while this key has one of its silent values or is absent."""

IGNORED: frozenset[str] = frozenset(
    (
        "firewall.conntrack.max_connections",  # in old examples; nothing ever read it
        "listen.rebind_on_network_change",  # macOS
        "listen.windows_bypass_wdf",
        "tun.network_category",  # Windows
        "tun.windows_bypass_wdf",
    )
)
"""Nebula on Linux does not look at these either."""

RULE_FIELDS: tuple[str, ...] = (
    "port", "code", "proto", "host", "group", "groups", "cidr", "local_cidr", "ca_name", "ca_sha",
)  # fmt: skip
"""The keys of one firewall rule."""


def makes_no_difference(key: str, node: Node) -> bool:
    """Tell whether `key`, one of LATER, has a value with which obeying it would change nothing."""
    if isinstance(node, Scalar):
        return not node.text or any(_same(node.text, silent) for silent in LATER[key])
    if isinstance(node, Sequence):
        return not node.items
    return isinstance(node, MappingNode) and not node.entries


def _same(text: str, silent: str) -> bool:
    """Whether Nebula reads both alike: `no` and `false`, `1000ms` and `1s`."""
    try:
        if silent in _SWITCH:
            return parse_bool(text) == parse_bool(silent)
        if silent[:1].isdigit() and silent.endswith("s"):
            return parse_duration(text) == parse_duration(silent)
    except ValueError:
        return False
    return text == silent


def nearest(word: str, candidates: Iterable[str]) -> str | None:
    """Give the candidate that `word` may be a misspelling of, if one is close; case does not count."""
    from difflib import get_close_matches  # noqa: PLC0415 - needed by messages only

    fold = word.casefold()[:100]
    by_fold = {candidate.casefold(): candidate for candidate in candidates}
    matches = get_close_matches(fold, by_fold, n=1, cutoff=0.6)
    if not matches and len(fold) >= _PREFIX_MIN:
        matches = [candidate for candidate in by_fold if candidate.startswith(fold)]
    return by_fold[matches[0]] if len(matches) == 1 else None


_PREFIX_MIN = 3


def nearest_key(section: str, word: str, known: Iterable[str]) -> str | None:
    """Say what an unknown key was perhaps meant to be, in quotes: a near miss, or a key of another section.

    `section` is empty or ends with a dot.
    """
    known = sorted(known)
    if any(key == word or key.startswith(f"{word}.") for key in known):
        above, _, name = word.rpartition(".")
        return f'"{name}" in the section "{above}"' if above else f'"{name}" at the top level'
    elsewhere = [key for key in known if key.endswith(f".{word}")]
    if len(elsewhere) == 1:
        return f'"{elsewhere[0]}"'
    siblings = {key.removeprefix(section).split(".")[0] for key in known if key.startswith(section)}
    near = nearest(word, sorted(siblings))
    return f'"{near}"' if near else None
