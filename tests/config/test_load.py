"""Good configurations, warnings, secrets, and anything at all."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from nebula_mp import shm_table
from nebula_mp.config.keys import IGNORED, LATER, RULE_FIELDS, SWITCHES
from nebula_mp.config.load import READERS, REFUSALS, LoadedConfig, load_config
from nebula_mp.config.model import (
    WORKERS_MAX,
    Config,
    DrainMode,
    FirewallRule,
    HostPort,
    KernelChoice,
    LogLevel,
    Offloads,
    PkiConfig,
    RecvErrorPolicy,
)
from nebula_mp.config.report import Place
from nebula_mp.errors import ConfigError
from nebula_mp.newtypes import Cipher

PKI = "pki: {ca: a, cert: b, key: c}\n"
DEFAULT = Config(pki=PkiConfig(ca="a", cert="b", key="c"))

KEY_BODY = "c3VwZXJzZWNyZXRzdXBlcnNlY3JldHN1cGVyc2Vjcg=="
PEM = f"-----BEGIN NEBULA X25519 PRIVATE KEY-----\n{KEY_BODY}\n-----END NEBULA X25519 PRIVATE KEY-----\n"


@pytest.fixture
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("config")


def load(directory: Path, text: str, *, strict: bool = False) -> LoadedConfig:
    file = directory / "c.yml"
    file.write_text(text, encoding="utf-8")
    return load_config(file, strict=strict)


def value_of(config: Config, key: str) -> object:
    value: object = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def leaves(model: type[Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of the model with the type of its value."""
    hints = get_type_hints(model)
    for member in fields(model):
        hint = hints[member.name]
        if is_dataclass(hint):
            yield from leaves(hint, f"{prefix}{member.name}.")  # type: ignore[arg-type]  # a class, not an instance
        else:
            yield prefix + member.name, hint


def check_types(config: Config) -> None:
    """Let pydantic compare every value with the type the model declares for it."""
    for key, hint in leaves(Config):
        value = value_of(config, key)
        adapter: TypeAdapter[Any] = TypeAdapter(hint)
        adapter.validate_python(dict(value) if isinstance(value, Mapping) else value, strict=True)


def test_the_keys_we_read_are_those_of_the_model() -> None:
    assert sorted(READERS) == sorted(key for key, _ in leaves(Config))


def test_no_key_stands_in_two_tables() -> None:
    tables = [set(READERS), set(REFUSALS), set(LATER), set(IGNORED)]

    assert sum(map(len, tables)) == len(set().union(*tables))
    assert set(SWITCHES.values()) <= set(LATER)


def test_three_paths_are_enough_and_the_rest_has_its_default(directory: Path) -> None:
    loaded = load(directory, PKI)

    file = directory / "c.yml"
    places = {
        f"pki.{key}": Place(0, 1, column, file) for key, column in (("ca", 11), ("cert", 20), ("key", 28))
    }
    assert loaded == LoadedConfig(DEFAULT, (), (file,), places)


def test_null_everywhere_is_the_default(directory: Path) -> None:
    keys = [key for key in READERS if not key.startswith("pki.") and "." in key]
    tree: dict[str, Any] = {"cipher": None, "static_host_map": None, "firewall": None}
    for key in keys:
        *sections, name = key.split(".")
        if "firewall" not in sections:
            below = tree
            for section in sections:
                below = below.setdefault(section, {})
            below[name] = None

    loaded = load(directory, PKI + yaml.safe_dump(tree))

    assert loaded.config == DEFAULT
    assert loaded.warnings == ()


H1 = HostPort(host="192.0.2.1", port=4242)


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("cipher: chachapoly", "cipher", Cipher.CHACHAPOLY),
        ('tun: {mtu: "1400"}', "tun.mtu", 1400),
        ("tun: {mtu: 1_400}", "tun.mtu", 1400),
        ("tun: {mtu: 1.4e3}", "tun.mtu", 1400),
        ("tun: {mtu: 0x578}", "tun.mtu", 1400),
        ("tun: {mtu: 65475}", "tun.mtu", 65475),
        ("tun: {mtu: 68}", "tun.mtu", 68),
        ('tun: {dev: ""}', "tun.dev", None),
        ("tun: {dev: 123}", "tun.dev", "123"),
        ("tun: {dev: nebula-12345678}", "tun.dev", "nebula-12345678"),
        ("tun: {dev: nebula%d}", "tun.dev", "nebula%d"),
        ("tun: {tx_queue: 0}", "tun.tx_queue", 0),
        ("tun: {drop_multicast: yes}", "tun.drop_multicast", True),
        ('tun: {drop_multicast: "1"}', "tun.drop_multicast", True),
        ("tun: {drop_local_broadcast: T}", "tun.drop_local_broadcast", True),
        ("tun: {drop_local_broadcast: n}", "tun.drop_local_broadcast", False),
        ("listen: {port: 65535}", "listen.port", 65535),
        ('listen: {host: "[::]"}', "listen.host", "::"),
        ("listen: {host: 0:0::1}", "listen.host", "::1"),
        ("listen: {host: '::ffff:192.0.2.1'}", "listen.host", "192.0.2.1"),
        ("listen: {host: fe80::1%eth0}", "listen.host", "fe80::1%eth0"),
        ("listen: {host: gw_1.example.org.}", "listen.host", "gw_1.example.org."),
        ("listen: {read_buffer: 0}", "listen.read_buffer", None),
        ("listen: {read_buffer: 10485760}", "listen.read_buffer", 10485760),
        ("listen: {so_mark: 4294967295}", "listen.so_mark", 4294967295),
        ("listen: {send_recv_error: private}", "listen.send_recv_error", RecvErrorPolicy.PRIVATE),
        ("listen: {send_recv_error: false}", "listen.send_recv_error", RecvErrorPolicy.NEVER),
        ("listen: {accept_recv_error: yes}", "listen.accept_recv_error", RecvErrorPolicy.ALWAYS),
        ("static_map: {cadence: 1h2m3s4ms}", "static_map.cadence", 3723.004),
        ("static_map: {network: ip}", "static_map.network", "ip"),
        ("static_map: {lookup_timeout: .5s}", "static_map.lookup_timeout", 0.5),
        ("handshakes: {try_interval: 1us, retries: 20}", "handshakes.try_interval", 1e-6),
        ("handshakes: {try_interval: 1us, retries: 20}", "handshakes.retries", 20),
        ("tunnels: {drop_inactive: TRUE}", "tunnels.drop_inactive", True),
        ("tunnels: {inactivity_timeout: 90m}", "tunnels.inactivity_timeout", 5400.0),
        ('timers: {connection_alive_interval: "7"}', "timers.connection_alive_interval", 7.0),
        ("firewall: {conntrack: {tcp_timeout: 1h}}", "firewall.conntrack.tcp_timeout", 3600.0),
        ("firewall: {default_local_cidr_any: y}", "firewall.default_local_cidr_any", True),
        ("logging: {level: WARNING}", "logging.level", LogLevel.WARN),
        ("logging: {level: panic}", "logging.level", LogLevel.ERROR),
        ("logging: {format: JSON}", "logging.format", "json"),
        ("mp: {run_dir: /tmp/x}", "mp.run_dir", "/tmp/x"),
        ("mp: {workers: 4}", "mp.workers", 4),
        ('mp: {workers: "64"}', "mp.workers", 64),
        ("mp: {workers: auto}", "mp.workers", None),
        ("mp: {drain: auto}", "mp.drain", DrainMode.AUTO),
        ("mp: {drain: writer}", "mp.drain", DrainMode.WRITER),
        ("mp: {drain: reader}", "mp.drain", DrainMode.READER),
        ("mp: {kernel: auto}", "mp.kernel", KernelChoice.AUTO),
        ("mp: {kernel: python}", "mp.kernel", KernelChoice.PYTHON),
        ("mp: {kernel: rust}", "mp.kernel", KernelChoice.RUST),
        ("mp: {kernel: null}", "mp.kernel", None),
        ("mp: {user: nebula}", "mp.user", "nebula"),
        ("mp: {user: _nebula-mp.1$}", "mp.user", "_nebula-mp.1$"),
        ("mp: {offload: {}}", "mp.offload", Offloads()),
        ("mp: {offload: null}", "mp.offload", Offloads()),
        ("mp: {offload: {tso: false}}", "mp.offload", Offloads(tso=False)),
        ("mp: {offload: {uso: no}}", "mp.offload", Offloads(uso=False)),
        ("mp: {offload: {udp_segment: false}}", "mp.offload", Offloads(udp_segment=False)),
        ("mp: {offload: {udp_gro: false, tso: yes}}", "mp.offload", Offloads(udp_gro=False)),
        ("mp: {offload: {multiqueue: false}}", "mp.offload", Offloads(multiqueue=False)),
        ("tun: {use_offloads: no}", "tun.use_offloads", False),
        ("tun: {use_offloads: no}", "mp.offload", Offloads(tso=False, uso=False)),
        ("listen: {udp_offloads: 0}", "listen.udp_offloads", False),
        ("listen: {udp_offloads: 0}", "mp.offload", Offloads(udp_segment=False, udp_gro=False)),
        (
            "tun: {use_offloads: false}\nlisten: {udp_offloads: false}",
            "mp.offload",
            Offloads(tso=False, uso=False, udp_segment=False, udp_gro=False),
        ),
        (
            "tun: {use_offloads: false}\nmp: {offload: {uso: true}}",
            "mp.offload",
            Offloads(tso=False, uso=True),
        ),
        (
            "listen: {udp_offloads: false}\nmp: {offload: {udp_segment: true, udp_gro: null}}",
            "mp.offload",
            Offloads(udp_segment=True, udp_gro=False),
        ),
        (
            "listen: {udp_offloads: true}\nmp: {offload: {udp_segment: false}}",
            "mp.offload",
            Offloads(udp_segment=False),
        ),
        ("routines: 1", "routines", 1),
        ("routines: 64", "routines", 64),
        ("routines: 0", "routines", None),
        (
            'static_host_map: {10.42.0.2: ["192.0.2.1:4242", "[2001:db8:0::1]:1", "[::ffff:192.0.2.9]:2"]}',
            "static_host_map",
            {
                ip_address("10.42.0.2"): (
                    H1,
                    HostPort(host="2001:db8::1", port=1),
                    HostPort(host="192.0.2.9", port=2),
                )
            },
        ),
        (
            "static_host_map: {fd00::2: 'gw.example.org:65535', fd00::3: []}",
            "static_host_map",
            {
                ip_address("fd00::2"): (HostPort(host="gw.example.org", port=65535),),
                ip_address("fd00::3"): (),
            },
        ),
        (
            f"pki: {{ca: a, cert: b, key: c, blocklist: [{'AB' * 32}]}}",
            "pki.blocklist",
            ("ab" * 32,),
        ),
        ("pki: {ca: a, cert: b, key: c, initiating_version: '2'}", "pki.initiating_version", 2),
        ("pki: {ca: a, cert: b, key: c, disconnect_invalid: no}", "pki.disconnect_invalid", False),
    ],
)
def test_values_mean_what_they_mean_to_nebula(directory: Path, text: str, key: str, value: object) -> None:
    loaded = load(directory, text if text.startswith("pki") else PKI + text)

    assert value_of(loaded.config, key) == value
    assert loaded.warnings == ()
    check_types(loaded.config)


def test_inline_pem_text_is_kept_as_it_is(directory: Path) -> None:
    loaded = load(directory, yaml.safe_dump({"pki": {"ca": "x", "cert": PEM, "key": PEM}}))

    assert loaded.config.pki.key == PEM


@pytest.mark.parametrize(
    "rule",
    [
        "{port: any, proto: any, host: any}",
        "{port: 0, proto: any, group: any}",
        '{port: "0", proto: any, group: [any]}',
        "{port: 0-65535, proto: any, groups: [any]}",
        "{code: any, proto: any, groups: any}",
        "{port: any, proto: any, cidr: any}",
        "{port: any, proto: any, host: any, group: '', cidr: any, ca_name: ''}",
        "{port: any, proto: any, host: any, groups: []}",
    ],
)
def test_every_spelling_of_the_any_rule_is_accepted(directory: Path, rule: str) -> None:
    loaded = load(directory, f"{PKI}firewall: {{inbound: [{rule}], outbound: []}}\n")

    assert loaded.config.firewall.inbound == (FirewallRule(),)
    assert loaded.config.firewall.outbound == ()
    assert loaded.warnings == ()


@pytest.mark.parametrize(
    ("text", "local_cidr"),
    [
        ("host: any, local_cidr: any", "any"),
        ("local_cidr: any", "any"),
        ("host: any, local_cidr: 192.168.1.77/24", ip_network("192.168.1.0/24")),
        ("host: any, local_cidr: '::/0'", ip_network("::/0")),
        ("host: any, local_cidr: ''", None),
    ],
)
def test_a_rule_may_be_limited_to_some_of_our_addresses(
    directory: Path, text: str, local_cidr: object
) -> None:
    loaded = load(directory, f"{PKI}firewall: {{inbound: [{{port: any, proto: any, {text}}}]}}\n")

    assert [rule.local_cidr for rule in loaded.config.firewall.inbound] == [local_cidr]


@pytest.mark.parametrize(
    ("fields", "warning"),
    [
        ("host: any, group: admin", "host any admits every peer, so group narrows nothing"),
        ("host: web, groups: [any]", "groups any admits every peer, so host narrows nothing"),
        ("groups: [any, admin]", "groups any admits every peer, so groups narrows nothing"),
        ("host: web, cidr: any, group: x", "cidr any admits every peer, so host and group narrows nothing"),
    ],
)
def test_a_selector_hidden_by_any_is_a_warning(directory: Path, fields: str, warning: str) -> None:
    loaded = load(directory, f"{PKI}firewall: {{inbound: [{{port: any, proto: any, {fields}}}]}}\n")

    assert loaded.config.firewall.inbound == (FirewallRule(),)
    assert loaded.warnings == (f"{directory}/c.yml:2:22: firewall.inbound[0]: {warning}",)


def test_a_remark_in_a_rule_is_a_warning(directory: Path) -> None:
    loaded = load(
        directory, PKI + "firewall: {inbound: [{port: any, proto: any, host: any, x-why: because}]}\n"
    )

    assert loaded.warnings == (
        f"{directory}/c.yml:2:57: firewall.inbound[0].x-why: unknown key of a rule; it has no effect",
    )


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        ("listen: {prot: 1}", '2:10: listen.prot: unknown key; did you mean "port"?'),
        ("Listen: {port: 1}", '2:1: Listen: unknown key; did you mean "listen"?'),
        ("mtu: 1300", '2:1: mtu: unknown key; did you mean "tun.mtu"?'),
        ("listen: {mtu: 1300}", '2:10: listen.mtu: unknown key; did you mean "tun.mtu"?'),
        ("listen.port: 1", '2:1: listen.port: unknown key; did you mean "port" in the section "listen"?'),
        ("firewall.conntrack: {tcp_timeout: 1m}", '2:1: firewall.conntrack: unknown key; did you mean "conntrack" in the section "firewall"?'),
        ("lighthouse: {am_lighthose: true}", '2:14: lighthouse.am_lighthose: unknown key; did you mean "am_lighthouse"?'),
        ("firewall: {conntrack: {tcp: 1m}}", '2:24: firewall.conntrack.tcp: unknown key; did you mean "tcp_timeout"?'),
        ("zzz: 1", "2:1: zzz: unknown key"),
        ("mp: {offload: {tcp: false}}", "2:16: mp.offload.tcp: unknown key"),
        (
            "mp: {offload: {udp_segments: false}}",
            '2:16: mp.offload.udp_segments: unknown key; did you mean "udp_segment"?',
        ),
        ("mp: {worker: 4}", '2:6: mp.worker: unknown key; did you mean "workers"?'),
        ("'a b\\': 1", '2:1: "a b\\\\": unknown key'),
        (f"? {'Qa' * 15}\n: 1", "2:3: <not shown, it may be a key>: unknown key"),
    ],
)  # fmt: skip
def test_an_unknown_key_is_a_warning_and_under_strict_a_problem(
    directory: Path, text: str, finding: str
) -> None:
    loaded = load(directory, f"{PKI}{text}\n")
    with pytest.raises(ConfigError) as caught:
        load(directory, f"{PKI}{text}\n", strict=True)

    assert loaded.config == DEFAULT
    assert loaded.warnings == (f"{directory}/c.yml:{finding}",)
    assert caught.value.problems == loaded.warnings


def test_settings_we_do_not_obey_are_named_in_one_warning_with_their_lines(directory: Path) -> None:
    text = (
        "lighthouse:\n  am_lighthouse: true\n  hosts: [10.42.0.1]\n  interval: 60\n"
        "punchy: {punch: true}\nrelay: {am_relay: yes}\nstats:\n  type: prometheus\n  listen: x\n"
        "tun: {unsafe_routes: [{}], routes: []}\nlisten: {batch: 128, routines: 2}\n"
    )

    loaded = load(directory, PKI + text)

    file = directory / "c.yml"
    assert "\n".join(loaded.warnings) == (
        "known to Nebula but without effect here yet: "
        f"lighthouse.am_lighthouse ({file}:3), lighthouse.hosts ({file}:4), lighthouse.interval ({file}:5), "
        f"punchy.punch ({file}:6), relay.am_relay ({file}:7), stats.type ({file}:9), stats.listen ({file}:10), "
        f"tun.unsafe_routes ({file}:11), listen.batch ({file}:12), listen.routines ({file}:12)"
    )
    assert loaded.config == DEFAULT


@pytest.mark.parametrize(
    "text",
    [
        "lighthouse: {am_lighthouse: false, hosts: [], interval: 10, serve_dns: no, dns: {host: x, port: 5353}}",
        "relay: {am_relay: 0, use_relays: true, relays: }",
        "relay: {use_relays: false}",
        "sshd: {enabled: false, listen: 127.0.0.1:2222, host_key: x, authorized_users: [{user: a}]}",
        "sshd: {listen: 127.0.0.1:2222}",
        "stats: {type: none, interval: 10s, message_metrics: true}",
        'stats: {type: ""}',
        "punchy: {punch: False, respond: n, delay: 1000ms, respond_delay: 5s}",
        "punchy: false",
        "punch_back: no",
        "tun: {routines: 1, use_offloads: true, unsafe_routes: , routes: [], disabled: no}",
        'tun: {pin_threads: true, pin_threads_key: ""}',
        "listen: {batch: 64, udp_offloads: true, routines: 0, windows_bypass_wdf: false}",
        "preferred_ranges: []",
        "counters: {try_promote: 1000, requery_every_packets: '5000'}",
        "timers: {requery_wait_duration: 1m}",
        "handshakes: {trigger_buffer: 64, query_buffer: 64}",
        "firewall: {conntrack: {routine_cache_timeout: 0s, max_connections: 100000}, inbound_action: drop}",
    ],
)
def test_settings_that_would_change_nothing_are_passed_over_in_silence(directory: Path, text: str) -> None:
    loaded = load(directory, f"{PKI}{text}\n", strict=True)

    assert loaded.config == DEFAULT
    assert loaded.warnings == ()


def test_more_routines_than_there_can_be_workers_are_a_warning_since_the_file_is_good_elsewhere(
    directory: Path,
) -> None:
    loaded = load(directory, f"{PKI}routines: 128\n", strict=True)

    assert loaded.config.routines == WORKERS_MAX
    assert loaded.warnings == (
        f"{directory}/c.yml:2:11: routines: found 128, but there are 64 workers at most",
    )


def test_the_most_workers_a_configuration_may_ask_for_are_those_the_tables_have_room_for() -> None:
    assert WORKERS_MAX == shm_table.WORKERS_MAX


@pytest.mark.parametrize("setting", ["pin_threads: false", "pin_threads_key: pid", "pin_threads_key: port"])
def test_what_is_asked_of_threads_is_named_since_our_processes_are_bound_to_cpus_in_our_own_way(
    directory: Path, setting: str
) -> None:
    loaded = load(directory, f"{PKI}tun: {{{setting}}}\n")

    key = setting.partition(":")[0]
    assert loaded.warnings == (
        f"known to Nebula but without effect here yet: tun.{key} ({directory}/c.yml:2)",
    )


@pytest.mark.parametrize("key", sorted(LATER))
def test_no_setting_we_do_not_obey_is_lost(directory: Path, key: str) -> None:
    tree: dict[str, Any] = {}
    for name, value in {key: "x", **dict.fromkeys(SWITCHES.values(), "true")}.items():
        *sections, last = name.split(".")
        inner = tree
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = value

    loaded = load(directory, PKI + yaml.safe_dump(tree))

    assert len(loaded.warnings) == 1
    assert f"{key} (" in loaded.warnings[0]


def test_what_is_found_wrong_later_is_told_like_a_wrong_value_and_with_all_warnings(tmp_path: Path) -> None:
    (tmp_path / "a.yml").write_text(PKI)
    (tmp_path / "b.yml").write_text("nonsense: 1\npki:\n  key: |\n    other\n    text -----BEGIN\n")
    loaded = load_config(tmp_path)

    loaded.refuse([])
    with pytest.raises(ConfigError) as caught:
        loaded.refuse([("pki.key", "pki.key: bad"), ("pki.ca", "pki.ca x: bad"), ("pki.ca", "old")], ["odd"])

    assert caught.value.problems == (
        f"{tmp_path}/a.yml:1:11: pki.ca: old",
        f"{tmp_path}/a.yml:1:11: pki.ca: x: bad",
        f"{tmp_path}/b.yml:3:8: pki.key: bad",
    )
    assert caught.value.warnings == (f"{tmp_path}/b.yml:1:1: nonsense: unknown key", "odd")


def test_a_directory_is_merged_and_a_problem_names_the_file_and_the_index_within_it(tmp_path: Path) -> None:
    rule = "{port: any, proto: any, host: any}"
    (tmp_path / "10-base.yml").write_text(f"{PKI}listen: {{port: 1}}\nfirewall: {{inbound: [{rule}]}}\n")
    (tmp_path / "20-site.yml").write_text(f"listen: {{port: 2}}\nfirewall: {{inbound: [{rule}, {rule}]}}\n")

    loaded = load_config(tmp_path)

    assert loaded.config.listen.port == 2
    assert len(loaded.config.firewall.inbound) == 3
    assert loaded.sources == (tmp_path / "10-base.yml", tmp_path / "20-site.yml")

    (tmp_path / "10-base.yml").write_text(f"listen: {{port: x}}\nfirewall: {{inbound: [{rule}, any]}}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path)

    wrong = "expected a rule such as {port: any, proto: any, host: any}"
    assert f'{tmp_path}/10-base.yml:2:58: firewall.inbound[1]: found "any", {wrong}' in caught.value.problems
    assert all("listen.port" not in problem for problem in caught.value.problems)  # 20-site.yml replaces it
    assert any("pki.ca: required" in problem for problem in caught.value.problems)


def test_syntax_errors_of_all_files_are_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.yml").write_text("a: [\n")
    (tmp_path / "b.yml").write_text("b: }\n")
    (tmp_path / "c.yml").write_text("c: {d: 1, d: 2}\n")

    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path)

    assert [problem.split(": ")[0] for problem in caught.value.problems] == [
        f"{tmp_path}/a.yml:2:1",
        f"{tmp_path}/b.yml:1:4",
        f"{tmp_path}/c.yml:1:11",
    ]


SHAPES: dict[str, Any] = {
    "text": PEM,
    "base64": KEY_BODY,
    "list": [PEM, KEY_BODY],
    "map key": {KEY_BODY: PEM},
    "rule": [dict.fromkeys(RULE_FIELDS, KEY_BODY)],
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "key",
    [
        *sorted({*READERS, *REFUSALS, *LATER}),
        "nonsense", "pki.kee", "static_host_map.1", "pki", "tun", "firewall", KEY_BODY,
    ],
)  # fmt: skip
def test_key_material_never_appears_in_a_message_wherever_it_was_pasted(
    directory: Path, key: str, shape: str
) -> None:
    *sections, last = key.split(".")
    tree: dict[str, Any] = {"pki": {"ca": "a", "cert": "b", "key": "c"}}
    inner = tree
    for section in sections:
        inner = inner.setdefault(section, {})
    inner[last] = SHAPES[shape]

    try:
        told = load(directory, yaml.safe_dump(tree)).warnings
    except ConfigError as error:
        told = error.problems

    said = "\n".join(told)
    assert KEY_BODY[:12] not in said
    assert "PRIVATE KEY" not in said


@pytest.mark.parametrize("indentation", ["", " ", "\t", "    "])
def test_key_material_never_appears_when_its_indentation_is_wrong(directory: Path, indentation: str) -> None:
    body = "\n".join(indentation + line for line in PEM.splitlines())

    for text in (f"pki:\n  key: |\n{body}\n", f"pki:\n  key:\n{body}\n", f"pki: {{key: {body}\n", body):
        with pytest.raises(ConfigError) as caught:
            load(directory, text)

        assert KEY_BODY[:12] not in str(caught.value)


YAML_PIECES = st.sampled_from(
    [*"{}[]:,-?&*!|>'\"%@`#\t\n ", "\n  ", ": ", "- ", "<<: ", "*a", "&a ", "!!str ", "---\n", "pki", "any", "~",
     "firewall", "inbound", "proto", "listen", "port", "4242", "static_host_map", "10.0.0.1", "punchy", "yes"]
)  # fmt: skip


@given(st.lists(YAML_PIECES, max_size=40).map("".join) | st.text())
def test_any_text_is_refused_with_a_config_error_that_names_the_file(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    file = tmp_path_factory.getbasetemp() / "any.yml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))

    with pytest.raises(ConfigError) as caught:  # there is never a certificate in it
        load_config(file)

    assert caught.value.problems
    assert all(str(file) in problem for problem in caught.value.problems)


@given(st.binary())
def test_any_bytes_are_refused_with_a_config_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    file = tmp_path_factory.getbasetemp() / "any.yml"
    file.write_bytes(data)

    with pytest.raises(ConfigError):
        load_config(file)


SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates()
    | st.sampled_from(["any", "0", "yes", "drop", "10.0.0.1", "10.0.0.0/8", "[::1]:1", "a:1", "1s", "aes"])
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(RULE_FIELDS) | st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=8,
)
KNOWN_KEYS = sorted({*READERS, *REFUSALS, *LATER, *IGNORED})


@given(st.dictionaries(st.sampled_from(KNOWN_KEYS), VALUES, max_size=6), st.booleans())
def test_any_values_under_the_known_keys_are_a_configuration_or_a_config_error(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any], strict: bool
) -> None:
    tree: dict[str, Any] = {"pki": {"ca": "a", "cert": "b", "key": "c"}}
    for key, value in values.items():
        *sections, last = key.split(".")
        inner = tree
        for section in sections:
            if not isinstance(inner.get(section), dict):
                inner[section] = {}
            inner = inner[section]
        inner[last] = value
    file = tmp_path_factory.getbasetemp() / "values.yml"
    file.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")

    try:
        loaded = load_config(file, strict=strict)
    except ConfigError:
        return
    check_types(loaded.config)
