"""Broken configurations and, word for word, what the operator is told about each.

Source of the cases: what slackhq/nebula refuses, and what it silently replaces by a default.
"""

from pathlib import Path

import pytest

from nebula_mp.config.load import load_config
from nebula_mp.errors import ConfigError

PKI = "pki: {ca: a, cert: b, key: c}\n"

CASES = [
    pytest.param(
        PKI + "tun: {mtu: zz}\n",
        ['2:12: tun.mtu: found "zz", expected a whole number 68..65475'],
        id="mtu: letters",
    ),
    pytest.param(
        PKI + "tun:\n  mtu: 1300x\n",
        ['3:8: tun.mtu: found "1300x", expected a whole number 68..65475; did you mean 1300?'],
        id="mtu: digits and letters",
    ),
    pytest.param(
        PKI + "tun: {mtu: 67}\n",
        ['2:12: tun.mtu: found "67", expected a whole number 68..65475'],
        id="mtu: too small",
    ),
    pytest.param(
        PKI + "tun: {mtu: 65476}\n",
        ['2:12: tun.mtu: found "65476", expected a whole number 68..65475'],
        id="mtu: too large",
    ),
    pytest.param(
        PKI + "tun: {mtu: 1300.5}\n",
        ['2:12: tun.mtu: found "1300.5", expected a whole number 68..65475'],
        id="mtu: fraction",
    ),
    pytest.param(
        PKI + 'tun: {mtu: "1_300"}\n',
        ['2:12: tun.mtu: found "1_300", expected a whole number 68..65475'],
        id="mtu: quoted underscore",
    ),
    pytest.param(
        PKI + "tun: {mtu: [1300]}\n",
        ["2:12: tun.mtu: found a list, expected a whole number 68..65475"],
        id="mtu: a list",
    ),
    pytest.param(
        PKI + "tun: {mtu: {a: 1}}\n",
        ["2:12: tun.mtu: found a map, expected a whole number 68..65475"],
        id="mtu: a map",
    ),
    pytest.param(
        PKI + 'tun: {mtu: ""}\n',
        ['2:12: tun.mtu: found "", expected a whole number 68..65475'],
        id="mtu: empty text",
    ),
    pytest.param(
        PKI + "tun: {mtu: 1e6}\n",
        ['2:12: tun.mtu: found "1e+06", expected a whole number 68..65475'],
        id="mtu: exponent that Go prints as one",
    ),
    pytest.param(
        PKI + "listen: {port: 65536}\n",
        ['2:16: listen.port: found "65536", expected a whole number 0..65535'],
        id="port: too large",
    ),
    pytest.param(
        PKI + "listen: {port: -1}\n",
        ['2:16: listen.port: found "-1", expected a whole number 0..65535'],
        id="port: negative",
    ),
    pytest.param(
        PKI + "listen:\n  port: 42424x\n",
        ['3:9: listen.port: found "42424x", expected a whole number 0..65535; did you mean 42424?'],
        id="port: digits and a letter",
    ),
    pytest.param(
        PKI + "listen:\n  host: 0.0.0.0\n  port: 4242x\n",
        ['4:9: listen.port: found "4242x", expected a whole number 0..65535; did you mean 4242?'],
        id="port: 4242x",
    ),
    pytest.param(
        PKI + "listen:\n  port: |\n    1\n    2\n",
        ["3:9: listen.port: found <a text of 3 lines>, expected a whole number 0..65535"],
        id="port: several lines",
    ),
    pytest.param(
        PKI + "listen: {port: " + "9" * 5000 + "}\n",
        [
            '2:16: listen.port: found "99999999999999999999999999999999999999999999999999999999999999999999999999999...", expected a whole number 0..65535'
        ],
        id="port: thousands of digits",
    ),
    pytest.param(
        PKI + "listen: {read_buffer: -1, write_buffer: 10M}\n",
        [
            '2:23: listen.read_buffer: found "-1", expected a number of bytes 0..2147483647',
            '2:41: listen.write_buffer: found "10M", expected a number of bytes 0..2147483647; did you mean 10485760?',
        ],
        id="buffer: negative",
    ),
    pytest.param(
        PKI + "listen: {so_mark: 4294967296}\n",
        ['2:19: listen.so_mark: found "4294967296", expected a whole number 0..4294967295'],
        id="mark: too large",
    ),
    pytest.param(
        PKI + "listen: {host: 10.0.0.256}\n",
        ['2:16: listen.host: found "10.0.0.256", expected an IP address or a host name'],
        id="listen host: address out of range",
    ),
    pytest.param(
        PKI + "listen: {host: my host}\n",
        ['2:16: listen.host: found "my host", expected an IP address or a host name'],
        id="listen host: spaces",
    ),
    pytest.param(
        PKI + 'listen: {host: ""}\n',
        ['2:16: listen.host: found "", expected an IP address or a host name'],
        id="listen host: empty",
    ),
    pytest.param(
        PKI + 'listen: {host: "[::1]"}\n',
        ['2:16: listen.host: found "[::1]", expected an IP address or a host name; did you mean ::1?'],
        id="listen host: brackets",
    ),
    pytest.param(
        PKI + "listen: {send_recv_error: Never}\n",
        [
            '2:27: listen.send_recv_error: found "Never", expected one of always, never, private; did you mean never?'
        ],
        id="recv_error: other capitals",
    ),
    pytest.param(
        PKI + "listen: {accept_recv_error: 2}\n",
        ['2:29: listen.accept_recv_error: found "2", expected one of always, never, private'],
        id="recv_error: a number",
    ),
    pytest.param(
        PKI + "tun: {drop_multicast: on}\n",
        ['2:23: tun.drop_multicast: found "on", expected true or false (or yes, no); did you mean true?'],
        id="bool: on",
    ),
    pytest.param(
        PKI + 'tun: {drop_local_broadcast: "off"}\n',
        [
            '2:29: tun.drop_local_broadcast: found "off", expected true or false (or yes, no); did you mean false?'
        ],
        id="bool: off",
    ),
    pytest.param(
        PKI + "tunnels: {drop_inactive: 2}\n",
        ['2:26: tunnels.drop_inactive: found "2", expected true or false (or yes, no)'],
        id="bool: a number",
    ),
    pytest.param(
        PKI + "logging: {disable_timestamp: {}}\n",
        ["2:30: logging.disable_timestamp: found a map, expected true or false (or yes, no)"],
        id="bool: a map",
    ),
    pytest.param(
        PKI + "tunnels: {inactivity_timeout: 600}\n",
        [
            '2:31: tunnels.inactivity_timeout: found "600", expected a duration above zero such as 500ms, 30s or 1h30m; did you mean 600s?'
        ],
        id="duration: no unit",
    ),
    pytest.param(
        PKI + "tunnels: {inactivity_timeout: 10 min}\n",
        [
            '2:31: tunnels.inactivity_timeout: found "10 min", expected a duration above zero such as 500ms, 30s or 1h30m; did you mean 10m?'
        ],
        id="duration: a space",
    ),
    pytest.param(
        PKI + "tunnels: {inactivity_timeout: 2d}\n",
        [
            '2:31: tunnels.inactivity_timeout: found "2d", expected a duration above zero such as 500ms, 30s or 1h30m; did you mean 48h?'
        ],
        id="duration: days",
    ),
    pytest.param(
        PKI + "handshakes: {try_interval: 0s}\n",
        [
            '2:28: handshakes.try_interval: found "0s", expected a duration above zero such as 500ms, 30s or 1h30m'
        ],
        id="duration: zero",
    ),
    pytest.param(
        PKI + "handshakes: {try_interval: -100ms}\n",
        [
            '2:28: handshakes.try_interval: found "-100ms", expected a duration above zero such as 500ms, 30s or 1h30m'
        ],
        id="duration: negative",
    ),
    pytest.param(
        PKI + "static_map: {cadence: 9223372037s}\n",
        [
            '2:23: static_map.cadence: found "9223372037s", expected a duration above zero such as 500ms, 30s or 1h30m'
        ],
        id="duration: too long for Go",
    ),
    pytest.param(
        PKI + "static_map: {lookup_timeout: soon}\n",
        [
            '2:30: static_map.lookup_timeout: found "soon", expected a duration above zero such as 500ms, 30s or 1h30m'
        ],
        id="duration: a word",
    ),
    pytest.param(
        PKI + "firewall:\n  conntrack:\n    tcp_timeout: 12\n    udp_timeout: [3m]\n    default_timeout: x\n",
        [
            '4:18: firewall.conntrack.tcp_timeout: found "12", expected a duration above zero such as 500ms, 30s or 1h30m; did you mean 12s?',
            "5:18: firewall.conntrack.udp_timeout: found a list, expected a duration above zero such as 500ms, 30s or 1h30m",
            '6:22: firewall.conntrack.default_timeout: found "x", expected a duration above zero such as 500ms, 30s or 1h30m',
        ],
        id="duration: three in one section",
    ),
    pytest.param(
        PKI + "timers: {connection_alive_interval: 5s}\n",
        [
            '2:37: timers.connection_alive_interval: found "5s", expected a whole number of seconds without a unit, 1..2147483647; did you mean 5?'
        ],
        id="seconds: with a unit",
    ),
    pytest.param(
        PKI + "timers: {pending_deletion_interval: 0}\n",
        [
            '2:37: timers.pending_deletion_interval: found "0", expected a whole number of seconds without a unit, 1..2147483647'
        ],
        id="seconds: zero",
    ),
    pytest.param(
        PKI + "timers: {pending_deletion_interval: 2.5}\n",
        [
            '2:37: timers.pending_deletion_interval: found "2.5", expected a whole number of seconds without a unit, 1..2147483647'
        ],
        id="seconds: fraction",
    ),
    pytest.param(
        PKI + "handshakes: {retries: 0}\n",
        ['2:23: handshakes.retries: found "0", expected a whole number 1..2147483647'],
        id="retries: zero",
    ),
    pytest.param(
        PKI + "cipher: AES\n",
        ['2:9: cipher: found "AES", expected one of aes, chachapoly; did you mean aes?'],
        id="cipher: capitals",
    ),
    pytest.param(
        PKI + "cipher: rot13\n",
        ['2:9: cipher: found "rot13", expected one of aes, chachapoly'],
        id="cipher: unknown",
    ),
    pytest.param(
        PKI + "static_map: {network: ipv4}\n",
        ['2:23: static_map.network: found "ipv4", expected one of ip4, ip6, ip; did you mean ip4?'],
        id="network: unknown",
    ),
    pytest.param(
        PKI + "logging: {level: verbose}\n",
        ['2:18: logging.level: found "verbose", expected one of trace, debug, info, warn, error'],
        id="log level: unknown",
    ),
    pytest.param(
        PKI + "logging: {level: inf}\n",
        [
            '2:18: logging.level: found "inf", expected one of trace, debug, info, warn, error; did you mean info?'
        ],
        id="log level: near",
    ),
    pytest.param(
        PKI + "logging: {format: yaml}\n",
        ['2:19: logging.format: found "yaml", expected one of text, json'],
        id="log format: unknown",
    ),
    pytest.param(
        PKI + "tun: {dev: nebula-gateway-1}\n",
        [
            "2:12: tun.dev: found \"nebula-gateway-1\", expected a device name of at most 15 bytes without spaces, '/' and ':'"
        ],
        id="device: too long",
    ),
    pytest.param(
        PKI + "tun: {dev: a/b}\n",
        [
            "2:12: tun.dev: found \"a/b\", expected a device name of at most 15 bytes without spaces, '/' and ':'"
        ],
        id="device: slash",
    ),
    pytest.param(
        PKI + "tun: {dev: .}\n",
        [
            "2:12: tun.dev: found \".\", expected a device name of at most 15 bytes without spaces, '/' and ':'"
        ],
        id="device: dot",
    ),
    pytest.param(
        PKI + "mp: {run_dir: run}\n",
        ['2:15: mp.run_dir: found "run", expected an absolute path'],
        id="run_dir: relative",
    ),
    pytest.param(
        PKI + "mp: {workers: 0}\n",
        ['2:15: mp.workers: found "0", expected auto or a whole number 1..64'],
        id="workers: none",
    ),
    pytest.param(
        PKI + "mp: {workers: 65}\n",
        ['2:15: mp.workers: found "65", expected auto or a whole number 1..64'],
        id="workers: too many",
    ),
    pytest.param(
        PKI + "mp: {workers: Auto}\n",
        ['2:15: mp.workers: found "Auto", expected auto or a whole number 1..64; did you mean auto?'],
        id="workers: capital letter",
    ),
    pytest.param(
        PKI + "mp: {workers: [4]}\n",
        ["2:15: mp.workers: found a list, expected auto or a whole number 1..64"],
        id="workers: a list",
    ),
    pytest.param(
        PKI + "mp: {drain: write}\n",
        ['2:13: mp.drain: found "write", expected one of auto, writer, reader; did you mean writer?'],
        id="drain: misspelt",
    ),
    pytest.param(
        PKI + "mp: {kernel: rusty}\n",
        ['2:14: mp.kernel: found "rusty", expected one of auto, python, rust; did you mean rust?'],
        id="kernel: misspelt",
    ),
    pytest.param(
        PKI + "mp: {user: two words}\n",
        ['2:12: mp.user: found "two words", expected the name of a user'],
        id="user: two words",
    ),
    pytest.param(
        PKI + "mp: {offload: {tso: 1.5}}\n",
        ['2:21: mp.offload.tso: found "1.5", expected true or false (or yes, no)'],
        id="offload: not a truth value",
    ),
    pytest.param(
        PKI + "mp: {offload: {udp_gro: [true], uso: off}}\n",
        [
            "2:25: mp.offload.udp_gro: found a list, expected true or false (or yes, no)",
            '2:38: mp.offload.uso: found "off", expected true or false (or yes, no); did you mean false?',
        ],
        id="offload: two of them",
    ),
    pytest.param(
        PKI + "mp: {offload: off}\n",
        ['2:15: mp.offload: found "off", expected a map of settings'],
        id="offload: not a map",
    ),
    pytest.param(
        PKI + 'mp: {user: ""}\n',
        ['2:12: mp.user: found "", expected the name of a user'],
        id="user: empty",
    ),
    pytest.param(
        PKI + "routines: -1\n",
        ['2:11: routines: found "-1", expected a whole number 0..2147483647'],
        id="routines: negative",
    ),
    pytest.param(
        PKI + "static_host_map: [10.42.0.2]\n",
        ['2:18: static_host_map: found a list, expected a map such as "10.42.0.1": ["192.0.2.1:4242"]'],
        id="hosts: a list",
    ),
    pytest.param(
        PKI + 'static_host_map: {"10.42.0.": ["192.0.2.1:1"]}\n',
        ['2:19: static_host_map.10.42.0.: found "10.42.0.", expected the overlay address of a peer'],
        id="hosts: bad overlay address",
    ),
    pytest.param(
        PKI + 'static_host_map: {"10.42.0.2/24": ["192.0.2.1:1"]}\n',
        [
            '2:19: static_host_map.10.42.0.2/24: found "10.42.0.2/24", expected the overlay address of a peer; did you mean 10.42.0.2?'
        ],
        id="hosts: a network",
    ),
    pytest.param(
        PKI + 'static_host_map: {"::ffff:10.42.0.2": ["192.0.2.1:1"]}\n',
        [
            '2:19: static_host_map.::ffff:10.42.0.2: found "::ffff:10.42.0.2", expected the overlay address of a peer; did you mean 10.42.0.2?'
        ],
        id="hosts: IPv4 in IPv6 form",
    ),
    pytest.param(
        PKI + 'static_host_map: {"fe80::1%eth0": ["192.0.2.1:1"]}\n',
        [
            '2:19: static_host_map.fe80::1%eth0: found "fe80::1%eth0", expected the overlay address of a peer; did you mean fe80::1?'
        ],
        id="hosts: zone",
    ),
    pytest.param(
        PKI + 'static_host_map:\n  "fd00::1": ["192.0.2.1:1"]\n  "fd00:0::1": ["192.0.2.1:1"]\n',
        ["4:3: static_host_map.fd00:0::1: found the same address a second time, in another spelling"],
        id="hosts: twice, spelled differently",
    ),
    pytest.param(
        PKI + "static_host_map:\n  10.42.0.2: 192.0.2.1\n",
        [
            '3:14: static_host_map.10.42.0.2: found "192.0.2.1", expected host:port such as 192.0.2.1:4242, [2001:db8::1]:4242 or gateway.example.org:4242'
        ],
        id="hosts: no port",
    ),
    pytest.param(
        PKI + 'static_host_map: {10.42.0.2: ["192.0.2.1:0"]}\n',
        [
            '2:31: static_host_map.10.42.0.2[0]: found "192.0.2.1:0", expected host:port such as 192.0.2.1:4242, [2001:db8::1]:4242 or gateway.example.org:4242'
        ],
        id="hosts: port 0",
    ),
    pytest.param(
        PKI + 'static_host_map: {10.42.0.2: ["192.0.2.1:65536"]}\n',
        [
            '2:31: static_host_map.10.42.0.2[0]: found "192.0.2.1:65536", expected host:port such as 192.0.2.1:4242, [2001:db8::1]:4242 or gateway.example.org:4242'
        ],
        id="hosts: port too large",
    ),
    pytest.param(
        PKI + 'static_host_map: {10.42.0.2: ["2001:db8:0:0:0:0:0:1:4242"]}\n',
        [
            '2:31: static_host_map.10.42.0.2[0]: found "2001:db8:0:0:0:0:0:1:4242", expected host:port such as 192.0.2.1:4242, [2001:db8::1]:4242 or gateway.example.org:4242; did you mean [2001:db8:0:0:0:0:0:1]:4242?'
        ],
        id="hosts: IPv6 without brackets",
    ),
    pytest.param(
        PKI + 'static_host_map: {10.42.0.2: ":4242"}\n',
        [
            '2:30: static_host_map.10.42.0.2: found ":4242", expected host:port such as 192.0.2.1:4242, [2001:db8::1]:4242 or gateway.example.org:4242'
        ],
        id="hosts: no host",
    ),
    pytest.param(
        PKI + 'static_host_map: {10.42.0.2: "a_b..c:4242"}\n',
        [
            '2:30: static_host_map.10.42.0.2: found "a_b..c:4242", expected host:port such as 192.0.2.1:4242, [2001:db8::1]:4242 or gateway.example.org:4242'
        ],
        id="hosts: bad name",
    ),
    pytest.param(
        PKI + 'static_host_map: {10.42.0.2: "192.0.2.300:4242"}\n',
        [
            '2:30: static_host_map.10.42.0.2: found "192.0.2.300:4242", expected host:port such as 192.0.2.1:4242, [2001:db8::1]:4242 or gateway.example.org:4242'
        ],
        id="hosts: bad address as a name",
    ),
    pytest.param(
        PKI + "static_host_map: {10.42.0.2: }\n",
        [
            "2:30: static_host_map.10.42.0.2: found nothing, expected host:port such as 192.0.2.1:4242, [2001:db8::1]:4242 or gateway.example.org:4242"
        ],
        id="hosts: null",
    ),
    pytest.param(
        PKI + 'static_host_map:\n  10.42.0.2: ["192.0.2.1:1", "x", {a: b}]\n  10.42.0.3: "y"\n',
        [
            '3:30: static_host_map.10.42.0.2[1]: found "x", expected host:port such as 192.0.2.1:4242, [2001:db8::1]:4242 or gateway.example.org:4242',
            "3:35: static_host_map.10.42.0.2[2]: found a map, expected host:port such as 192.0.2.1:4242, [2001:db8::1]:4242 or gateway.example.org:4242",
            '4:14: static_host_map.10.42.0.3: found "y", expected host:port such as 192.0.2.1:4242, [2001:db8::1]:4242 or gateway.example.org:4242',
        ],
        id="hosts: one good and two bad",
    ),
    pytest.param(
        PKI + "firewall: {inbound: any}\n",
        ['2:21: firewall.inbound: found "any", expected a list of rules'],
        id="firewall: inbound is text",
    ),
    pytest.param(
        PKI + "firewall: {inbound: [any]}\n",
        [
            '2:22: firewall.inbound[0]: found "any", expected a rule such as {port: any, proto: any, host: any}'
        ],
        id="firewall: rule is text",
    ),
    pytest.param(
        PKI + "firewall:\n  inbound:\n    - {port: any, proto: tcp, host: any}\n",
        [
            '4:7: firewall.inbound[0]: found proto "tcp", which is not supported yet; expected proto any, port any, and any as host, group or cidr'
        ],
        id="firewall: protocol",
    ),
    pytest.param(
        PKI + "firewall:\n  inbound:\n    - port: any\n      proto: tpc\n      host: any\n",
        [
            '5:14: firewall.inbound[0].proto: found "tpc", expected one of any, tcp, udp, icmp; did you mean tcp?'
        ],
        id="firewall: unknown protocol",
    ),
    pytest.param(
        PKI + "firewall: {outbound: [{port: 443, proto: any, host: any}]}\n",
        [
            '2:23: firewall.outbound[0]: found port "443", which is not supported yet; expected proto any, port any, and any as host, group or cidr'
        ],
        id="firewall: port",
    ),
    pytest.param(
        PKI + "firewall: {outbound: [{port: 200-901, proto: any, host: any}]}\n",
        [
            '2:23: firewall.outbound[0]: found port "200-901", which is not supported yet; expected proto any, port any, and any as host, group or cidr'
        ],
        id="firewall: port range",
    ),
    pytest.param(
        PKI + "firewall: {outbound: [{port: fragment, proto: any, host: any}]}\n",
        [
            '2:23: firewall.outbound[0]: found port "fragment", which is not supported yet; expected proto any, port any, and any as host, group or cidr'
        ],
        id="firewall: fragment",
    ),
    pytest.param(
        PKI + "firewall: {outbound: [{port: 65536, proto: any, host: any}]}\n",
        [
            '2:30: firewall.outbound[0].port: found "65536", expected a port 0..65535, a range such as 200-901, "any" or "fragment"'
        ],
        id="firewall: port out of range",
    ),
    pytest.param(
        PKI + "firewall: {outbound: [{port: 20-10, proto: any, host: any}]}\n",
        [
            '2:30: firewall.outbound[0].port: found "20-10", expected a port 0..65535, a range such as 200-901, "any" or "fragment"'
        ],
        id="firewall: range backwards",
    ),
    pytest.param(
        PKI + "firewall: {outbound: [{port: anny, proto: any, host: any}]}\n",
        [
            '2:30: firewall.outbound[0].port: found "anny", expected a port 0..65535, a range such as 200-901, "any" or "fragment"; did you mean any?'
        ],
        id="firewall: port misspelt",
    ),
    pytest.param(
        PKI + "firewall: {outbound: [{proto: any, host: any}]}\n",
        ["2:23: firewall.outbound[0].port: required: any, or a port"],
        id="firewall: no port",
    ),
    pytest.param(
        PKI + "firewall: {outbound: [{port: any, host: any}]}\n",
        ["2:23: firewall.outbound[0].proto: required: any, or a protocol"],
        id="firewall: no protocol",
    ),
    pytest.param(
        PKI + "firewall: {outbound: [{port: any, proto: any}]}\n",
        [
            "2:23: firewall.outbound[0]: expected at least one of host, group, groups, cidr, local_cidr, ca_name, ca_sha"
        ],
        id="firewall: nobody",
    ),
    pytest.param(
        PKI + "firewall: {inbound: [{proto: icmp, host: any}]}\n",
        [
            '2:22: firewall.inbound[0]: found proto "icmp", which is not supported yet; expected proto any, port any, and any as host, group or cidr'
        ],
        id="firewall: ICMP needs no port",
    ),
    pytest.param(
        PKI + "firewall: {inbound: [{port: x, proto: icmp, host: any}]}\n",
        [
            '2:22: firewall.inbound[0]: found proto "icmp", which is not supported yet; expected proto any, port any, and any as host, group or cidr'
        ],
        id="firewall: the port of ICMP is not looked at",
    ),
    pytest.param(
        PKI + "firewall: {inbound: [{port: any, proto: any, host: web-1}]}\n",
        [
            '2:22: firewall.inbound[0]: found host "web-1", which is not supported yet; expected proto any, port any, and any as host, group or cidr'
        ],
        id="firewall: host",
    ),
    pytest.param(
        PKI + "firewall: {inbound: [{port: any, proto: any, group: admin}]}\n",
        [
            '2:22: firewall.inbound[0]: found group "admin", which is not supported yet; expected proto any, port any, and any as host, group or cidr'
        ],
        id="firewall: group",
    ),
    pytest.param(
        PKI + "firewall: {inbound: [{port: any, proto: any, groups: [a, b]}]}\n",
        [
            "2:22: firewall.inbound[0]: found groups, which is not supported yet; expected proto any, port any, and any as host, group or cidr"
        ],
        id="firewall: groups",
    ),
    pytest.param(
        PKI + 'firewall: {inbound: [{port: any, proto: any, groups: "", local_cidr: any}]}\n',
        [
            '2:22: firewall.inbound[0]: found groups "", which is not supported yet; expected proto any, port any, and any as host, group or cidr'
        ],
        id="firewall: empty groups text is a group",
    ),
    pytest.param(
        PKI + "firewall: {inbound: [{port: any, proto: any, cidr: 0.0.0.0/0}]}\n",
        [
            '2:22: firewall.inbound[0]: found cidr "0.0.0.0/0", which is not supported yet; expected proto any, port any, and any as host, group or cidr'
        ],
        id="firewall: cidr",
    ),
    pytest.param(
        PKI + "firewall: {inbound: [{port: any, proto: any, cidr: 10.0.0.0/33}]}\n",
        [
            '2:52: firewall.inbound[0].cidr: found "10.0.0.0/33", expected a network such as 10.42.0.0/16 or fd00::/8'
        ],
        id="firewall: bad cidr",
    ),
    pytest.param(
        PKI + "firewall: {inbound: [{port: any, proto: any, host: any, local_cidr: 10.0.0.1}]}\n",
        [
            '2:69: firewall.inbound[0].local_cidr: found "10.0.0.1", expected a network such as 10.42.0.0/16 or fd00::/8; did you mean 10.0.0.1/32?'
        ],
        id="firewall: cidr without a length",
    ),
    pytest.param(
        PKI + "firewall: {inbound: [{port: any, proto: any, host: any, local_cidr: 10.0.0.0/255.0.0.0}]}\n",
        [
            '2:69: firewall.inbound[0].local_cidr: found "10.0.0.0/255.0.0.0", expected a network such as 10.42.0.0/16 or fd00::/8'
        ],
        id="firewall: cidr with a netmask",
    ),
    pytest.param(
        PKI + "firewall: {inbound: [{port: any, proto: any, host: any, ca_name: prod, ca_sha: ab}]}\n",
        [
            '2:22: firewall.inbound[0]: found ca_name "prod", ca_sha "ab", which is not supported yet; expected proto any, port any, and any as host, group or cidr'
        ],
        id="firewall: CA",
    ),
    pytest.param(
        PKI + "firewall: {inbound: [{port: any, proto: any, group: any, groups: [any]}]}\n",
        ["2:22: firewall.inbound[0]: found both group and groups, expected one of them"],
        id="firewall: group and groups",
    ),
    pytest.param(
        PKI + "firewall: {inbound: [{port: any, code: any, proto: any, host: any}]}\n",
        ["2:22: firewall.inbound[0]: found both port and code, expected one of them"],
        id="firewall: port and code",
    ),
    pytest.param(
        PKI + "firewall: {inbound: [{port: any, proto: any, group: [a, b]}]}\n",
        ["2:53: firewall.inbound[0].group: found a list of 2 groups, expected one; did you mean groups?"],
        id="firewall: two in group",
    ),
    pytest.param(
        PKI + "firewall: {inbound: [{port: any, proto: any, host: any, gruop: admin}]}\n",
        ['2:57: firewall.inbound[0].gruop: unknown key of a rule; did you mean "group"?'],
        id="firewall: misspelt selector",
    ),
    pytest.param(
        PKI + "firewall: {inbound: [{port: any, proto: any, host: }]}\n",
        ["2:52: firewall.inbound[0].host: found nothing, expected a name"],
        id="firewall: null host",
    ),
    pytest.param(
        PKI + "firewall: {inbound: [{port: any, proto: any, groups: , local_cidr: any}]}\n",
        ["2:54: firewall.inbound[0].groups: found nothing, expected a name"],
        id="firewall: null groups",
    ),
    pytest.param(
        PKI + "firewall: {inbound_action: reject, outbound_action: allow}\n",
        [
            '2:28: firewall.inbound_action: found "reject", which is not supported yet; expected drop',
            '2:53: firewall.outbound_action: found "allow", expected one of drop, reject',
        ],
        id="firewall: reject",
    ),
    pytest.param(
        PKI + "tun: {disabled: yes}\n",
        ["2:17: tun.disabled: a gateway without a device is not supported yet; expected false"],
        id="tun disabled",
    ),
    pytest.param(
        PKI + "tun: {disabled: maybe}\n",
        ['2:17: tun.disabled: found "maybe", expected true or false (or yes, no)'],
        id="tun disabled: no bool",
    ),
    pytest.param(
        PKI + "listen: 4242\n",
        ['2:9: listen: found "4242", expected a map of settings'],
        id="section: a number",
    ),
    pytest.param(
        PKI + "firewall: []\n",
        ["2:11: firewall: found a list, expected a map of settings"],
        id="section: a list",
    ),
    pytest.param(
        PKI + "lighthouse: x\n",
        ['2:13: lighthouse: found "x", expected a map of settings'],
        id="section we do not obey: text",
    ),
    pytest.param(
        PKI + "listen: {port: *p}\n",
        ['2:16: found the alias "p" of an anchor that is not defined before'],
        id="alias of nothing",
    ),
    pytest.param(
        PKI + "tun: &a {mtu: 1300, b: *a}\n",
        ['2:24: found the alias "a" inside its own anchor: an endless loop'],
        id="alias in itself",
    ),
    pytest.param(
        PKI + "listen:\n  port: 1\n  host: 0.0.0.0\n  port: 2\n",
        ["5:3: listen.port: found a second time, first at line 3"],
        id="duplicate key",
    ),
    pytest.param(
        PKI + "tun: {mtu: 1300}\ntun: {mtu: 1400}\n",
        ["3:1: tun: found a second time, first at line 2"],
        id="duplicate section",
    ),
    pytest.param(
        PKI + "listen:\n\tport: 1\n",
        ["3:1: broken YAML: found character that cannot start any token; indent with spaces, not tabs"],
        id="tab",
    ),
    pytest.param(
        PKI + "listen: {port: 1\n",
        [
            "3:1: broken YAML: did not find expected ',' or '}' while parsing a flow mapping that starts at line 2"
        ],
        id="unclosed",
    ),
    pytest.param(
        PKI + "listen:\n  port: 1\n host: 0.0.0.0\n",
        ["4:2: broken YAML: did not find expected key while parsing a block mapping that starts at line 1"],
        id="bad indentation",
    ),
    pytest.param(
        PKI + "---\nlisten: {port: 1}\n",
        ["2:1: found a second YAML document, expected one (Nebula reads only the first)"],
        id="two documents",
    ),
    pytest.param(
        PKI + "listen: {port: !!binary NDI0Mg==}\n",
        ['2:16: found the tag "tag:yaml.org,2002:binary", expected a value without one'],
        id="a tag",
    ),
    pytest.param(
        PKI + "? {a: b}\n: 1\n", ["2:3: found a map as a key, expected a name"], id="a map as a key"
    ),
    pytest.param(
        PKI + ": 1\n",
        ["2:1: broken YAML: did not find expected key while parsing a block mapping that starts at line 1"],
        id="nothing as a key",
    ),
    pytest.param(
        PKI + "listen: {<<: 1}\n",
        ["2:10: found `<<` without a map behind it, expected an alias of one"],
        id="merge of no map",
    ),
    pytest.param(
        PKI + 'listen: {host: "a\x07b"}\n',
        ["2:18: found the control character U+0007, expected text"],
        id="a control character",
    ),
    pytest.param(
        "",
        [
            "1:1: pki.ca: required: the path of a file of CA certificates, or their PEM text",
            "1:1: pki.cert: required: the path of this host's certificate file, or its PEM text",
            "1:1: pki.key: required: the path of this host's private key file, or its PEM text",
        ],
        id="empty file",
    ),
    pytest.param(
        "# nothing\n",
        [
            "1:1: pki.ca: required: the path of a file of CA certificates, or their PEM text",
            "1:1: pki.cert: required: the path of this host's certificate file, or its PEM text",
            "1:1: pki.key: required: the path of this host's private key file, or its PEM text",
        ],
        id="only a comment",
    ),
    pytest.param(
        "tun: {mtu: 1300}\n",
        [
            "1:1: pki.ca: required: the path of a file of CA certificates, or their PEM text",
            "1:1: pki.cert: required: the path of this host's certificate file, or its PEM text",
            "1:1: pki.key: required: the path of this host's private key file, or its PEM text",
        ],
        id="no pki",
    ),
    pytest.param(
        "listen: {port: 1}\npki:\n  ca: a\n  cert: b\n",
        ["2:1: pki.key: required: the path of this host's private key file, or its PEM text"],
        id="pki without a key",
    ),
    pytest.param(
        "listen: {port: 1}\npki:\n",
        [
            "2:1: pki.ca: required: the path of a file of CA certificates, or their PEM text",
            "2:1: pki.cert: required: the path of this host's certificate file, or its PEM text",
            "2:1: pki.key: required: the path of this host's private key file, or its PEM text",
        ],
        id="pki is null",
    ),
    pytest.param(
        'pki: {ca: "", cert: b, key: c}\n',
        [
            "1:11: pki.ca: found nothing, expected the path of a file of CA certificates, or their PEM text with its BEGIN line"
        ],
        id="empty path",
    ),
    pytest.param(
        "pki: {ca: [a], cert: b, key: c}\n",
        ["1:11: pki.ca: found a list, expected the path of a file of CA certificates, or their PEM text"],
        id="path is a list",
    ),
    pytest.param(
        "pki: {ca: a, cert: ~, key: c}\n",
        ["1:1: pki.cert: required: the path of this host's certificate file, or its PEM text"],
        id="path is null",
    ),
    pytest.param(
        'pki: {ca: a, cert: b, key: "pkcs11:id=%01?pin-value=1234"}\n',
        [
            "1:28: pki.key: keys in a PKCS#11 token are not supported yet; expected the path of this host's private key file, or its PEM text"
        ],
        id="PKCS#11 key with a PIN",
    ),
    pytest.param(
        "pki: {ca: a, cert: b, key: QUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUE=}\n",
        [
            "1:28: pki.key: found a text that is neither, expected the path of this host's private key file, or its PEM text with its BEGIN line"
        ],
        id="bare base64 instead of a key",
    ),
    pytest.param(
        "pki:\n  ca: a\n  cert: b\n  key: |\n    QUFBQUFB\n    QUFBQUFB\n",
        [
            "4:8: pki.key: found a text that is neither, expected the path of this host's private key file, or its PEM text with its BEGIN line"
        ],
        id="several lines without BEGIN",
    ),
    pytest.param(
        "pki: {ca: a, cert: b, key: c, disconnect_invalid: ture}\n",
        [
            '1:51: pki.disconnect_invalid: found "ture", expected true or false (or yes, no); did you mean true?'
        ],
        id="bool misspelt",
    ),
    pytest.param(
        "pki: {ca: a, cert: b, key: c, initiating_version: 3}\n",
        ['1:51: pki.initiating_version: found "3", expected a whole number 1..2'],
        id="initiating version 3",
    ),
    pytest.param(
        "pki: {ca: a, cert: b, key: c, blocklist: abc}\n",
        ['1:42: pki.blocklist: found "abc", expected a list of certificate fingerprints'],
        id="blocklist is text",
    ),
    pytest.param(
        "pki: {ca: a, cert: b, key: c, blocklist: [abc, ~]}\n",
        [
            '1:43: pki.blocklist[0]: found "abc", expected a certificate fingerprint of 64 hexadecimal digits',
            "1:48: pki.blocklist[1]: found nothing, expected a certificate fingerprint of 64 hexadecimal digits",
        ],
        id="blocklist entry too short and null",
    ),
    pytest.param(
        "pki: {ca: a, cert: b, key: c, blocklist: [" + "a" * 65 + "]}\n",
        [
            '1:43: pki.blocklist[0]: found "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", expected a certificate fingerprint of 64 hexadecimal digits'
        ],
        id="blocklist entry of 65 digits",
    ),
    pytest.param("- pki\n", ["1:1: found a list, expected a map of settings"], id="root is a list"),
    pytest.param("pki\n", ['1:1: found "pki", expected a map of settings'], id="root is text"),
    pytest.param("{~: 1}\n", ["1:2: found nothing as a key, expected a name"], id="a null key"),
]


@pytest.mark.parametrize(("text", "expected"), CASES)
def test_every_problem_is_named_with_line_column_key_and_what_is_expected(
    tmp_path: Path, text: str, expected: list[str]
) -> None:
    file = tmp_path / "config.yml"
    file.write_text(text, encoding="utf-8")

    with pytest.raises(ConfigError) as caught:
        load_config(file)

    assert [problem.removeprefix(f"{file}:") for problem in caught.value.problems] == expected


def test_the_table_is_as_long_as_it_was_promised_to_be() -> None:
    assert len(CASES) >= 60
