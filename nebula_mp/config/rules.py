"""Firewall rules: checked in full, and accepted if they are the `any` rule.

Data flow: a list of rules -> [config.rules] -> config.model.FirewallRule
A rule that narrows protocol, port or peer is refused and never half obeyed. So is one with a misspelt
selector, which Nebula would read as a wider rule than was meant.
Source: slackhq/nebula firewall.go (convertRule, AddFirewallRulesFromConfig, parsePort, isAny).
"""

import re
from collections.abc import Callable, Mapping
from typing import Literal, cast

from nebula_mp.config import yaml_source
from nebula_mp.config.keys import RULE_FIELDS, nearest
from nebula_mp.config.model import FirewallRule
from nebula_mp.config.readers import Field, Unusable, choice, network, usable
from nebula_mp.config.yaml_source import describe, key_shown
from nebula_mp.newtypes import IPNetwork

_PEERS = ("host", "group", "groups", "cidr")
_NEEDED = ("host", "group", "groups", "cidr", "local_cidr", "ca_name", "ca_sha")
_PROTOCOLS = {word: word for word in ("any", "tcp", "udp", "icmp")}
_PORT = 'a port 0..65535, a range such as 200-901, "any" or "fragment"'
_PORT_MAX = 65535


def firewall_rules(field: Field) -> tuple[FirewallRule, ...]:
    """Read `firewall.inbound` or `firewall.outbound`."""
    return tuple(usable(field.items("a list of rules"), _rule))


def _rule(field: Field) -> FirewallRule:
    if not isinstance(field.node, yaml_source.Mapping):
        raise field.wrong("a rule such as {port: any, proto: any, host: any}")
    failed = not _names_are_right(field, field.node)
    given = {
        name: field.child(f".{name}", entry.value)
        for name, entry in field.node.entries.items()
        if name in _READERS and not (_is_empty(entry.value) and name != "groups")
    }
    values: dict[str, object] = {}
    for name, value in given.items():
        if name in {"port", "code"} and _is_icmp(given):
            continue  # Nebula does not look at it
        try:
            values[name] = _READERS[name](value)
        except Unusable:
            failed = True
    failed = not _combination_is_right(field, given) or failed
    if failed:
        raise Unusable
    values = {name: value for name, value in values.items() if value != ()}
    return _any_rule(field, given, values)


def _any_rule(field: Field, given: Mapping[str, Field], values: Mapping[str, object]) -> FirewallRule:
    """Refuse a correct rule that is narrower than `any`; warn where `any` hides a narrower selector."""
    peers = [name for name in _PEERS if name in values]
    wildcard = next((name for name in peers if _has_any(values[name])), None)
    narrow = [name for name in ("proto", "port", "code") if values.get(name, "any") != "any"]
    narrow += [] if wildcard else peers
    narrow += [name for name in ("ca_name", "ca_sha") if name in values]
    if narrow:
        found = ", ".join(_shown(name, given[name]) for name in narrow)
        raise field.refused(
            f"found {found}, which is not supported yet; "
            "expected proto any, port any, and any as host, group or cidr"
        )
    hidden = [name for name in peers if values[name] not in {"any", ("any",)}]
    if hidden:
        field.report.warning(
            field.node.place,
            field.key,
            f"{wildcard} any admits every peer, so {' and '.join(hidden)} narrows nothing",
        )
    local = values.get("local_cidr")
    return FirewallRule(local_cidr=cast('IPNetwork | Literal["any"] | None', local))


def _shown(name: str, field: Field) -> str:
    return f"{name} {describe(field.node)}" if isinstance(field.node, yaml_source.Scalar) else name


def _is_empty(node: yaml_source.Node) -> bool:
    """Tell whether Nebula takes the field as absent. Null it does not: there that is a name like others."""
    return isinstance(node, yaml_source.Scalar) and node.text == ""


def _has_any(value: object) -> bool:
    return value == "any" or (isinstance(value, tuple) and "any" in value)


def _names_are_right(field: Field, rule: yaml_source.Mapping) -> bool:
    """Report unknown names: near misses of a selector as problems, others as warnings (no effect)."""
    right = True
    for name, entry in rule.entries.items():
        if name in _READERS:
            continue
        key = f"{field.key}.{key_shown(name)}"
        near = nearest(name, RULE_FIELDS)
        if near is None:
            field.report.warning(entry.key_place, key, "unknown key of a rule; it has no effect")
        else:
            field.report.problem(entry.key_place, key, f'unknown key of a rule; did you mean "{near}"?')
            right = False
    return right


def _combination_is_right(field: Field, given: Mapping[str, Field]) -> bool:
    right = True

    def problem(key: str, text: str) -> None:
        nonlocal right
        right = False
        field.report.problem(field.node.place, field.key + key, text)

    if "proto" not in given:
        problem(".proto", "required: any, or a protocol")
    if "port" not in given and "code" not in given and not _is_icmp(given):
        problem(".port", "required: any, or a port")
    for one, other in (("port", "code"), ("group", "groups")):
        if one in given and other in given:
            problem("", f"found both {one} and {other}, expected one of them")
    if not any(name in given for name in _NEEDED):
        problem("", f"expected at least one of {', '.join(_NEEDED)}")
    return right


def _is_icmp(given: Mapping[str, Field]) -> bool:
    """Tell whether the rule is for ICMP, of which Nebula ignores the port."""
    node = given["proto"].node if "proto" in given else None
    return isinstance(node, yaml_source.Scalar) and node.text == "icmp"


def _port(field: Field) -> str:
    """Give `any` for every spelling of it: `0` and every range that starts with 0 among them."""
    text = field.text(_PORT)
    if text in {"any", "fragment"}:
        return text
    match = re.fullmatch(r"([0-9]{1,10})| *([0-9]{1,10}) *- *([0-9]{1,10}) *", text)
    if match is None:
        raise field.wrong(_PORT, nearest(text, ("any", "fragment")))
    low, high = (int(match[1]), int(match[1])) if match[1] else (int(match[2]), int(match[3]))
    if max(low, high) > _PORT_MAX or high < low:
        raise field.wrong(_PORT)
    return "any" if low == 0 else text


def _name(field: Field) -> str:
    return field.text("a name")


def _network_or_any(field: Field) -> IPNetwork | str:
    text = field.text("a network, or any")
    return text if text == "any" else network(field)


def _group(field: Field) -> str:
    """Read one group; a list of one is the same."""
    if not isinstance(field.node, yaml_source.Sequence):
        return _name(field)
    groups = usable(field.items("a group"), _name)
    if len(groups) != 1:
        raise field.refused(f"found a list of {len(groups)} groups, expected one; did you mean groups?")
    return groups[0]


def _groups(field: Field) -> tuple[str, ...]:
    if isinstance(field.node, yaml_source.Sequence):
        return tuple(usable(field.items("a list of groups"), _name))
    return (_name(field),)


_READERS: Mapping[str, Callable[[Field], object]] = {
    "port": _port,
    "code": _port,
    "proto": choice(_PROTOCOLS),
    "host": _name,
    "group": _group,
    "groups": _groups,
    "cidr": _network_or_any,
    "local_cidr": _network_or_any,
    "ca_name": _name,
    "ca_sha": _name,
}
