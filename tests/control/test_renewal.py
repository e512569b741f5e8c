"""Certificates: renewed, revoked, expired, of another CA, of another host, of two versions."""

from ipaddress import ip_address

import pytest

from nebula_mp.config.model import (
    LogLevel,
    PkiConfig,
)
from nebula_mp.newtypes import CertVersion, Instant
from tests.control.pair import CONFIG, Wire, kinds, udp, with_config


def test_a_renewed_certificate_reaches_the_peer_without_losing_the_tunnel() -> None:
    wire = Wire()
    a, b = wire.nodes
    wire.connect(a, b)
    renewed = wire.pki.identity("host-1", "10.42.0.1/16", groups=("new",), key_of=a.identity)

    wire.perform(a, a.controller.handle_reload(CONFIG, renewed, wire.pki.pool(), wire.now))
    for _ in range(8):
        wire.connect(a, b)
        wire.advance(1)

    primary = next(host for host in b.controller.hosts() if host.primary)
    assert primary.groups == ("new",)
    assert len(b.delivered) == len(a.delivered) == 9


def test_an_address_that_a_reload_adds_is_ours_from_then_on() -> None:
    wire = Wire()
    a, _ = wire.nodes
    more = wire.pki.identity("host-1", "10.42.0.1/16", "fd00::1/64", key_of=a.identity)
    packets = [udp(ip_address("fd00::1"), ip_address(to)) for to in ("fd00::1", "fd00::2")]

    wire.perform(a, a.controller.handle_reload(CONFIG, more, wire.pki.pool(), wire.now))
    for packet in packets:
        wire.perform(a, a.controller.handle_tun_packet(packet, wire.now))

    assert a.controller.stats["drop.tun.own_address"] == 1
    assert a.controller.stats["handshake_manager.initiated"] == 1


def test_a_blocklisted_peer_is_cut_off_within_one_check() -> None:
    wire = Wire()
    a, b = wire.nodes
    wire.connect(a, b)
    pool = wire.pki.pool(blocklist=[b.identity.newest.fingerprint])

    wire.perform(a, a.controller.handle_reload(CONFIG, a.identity, pool, wire.now))
    wire.advance(5)

    assert a.controller.hosts() == b.controller.hosts() == []


@pytest.mark.parametrize("disconnect", [True, False])
def test_an_expired_peer_is_cut_off_if_disconnect_invalid_is_on(disconnect: bool) -> None:
    config = with_config(pki=PkiConfig(ca="", cert="", key="", disconnect_invalid=disconnect))
    wire = Wire(config=config)
    a, b = wire.nodes
    wire.connect(a, b)
    expired = b.identity.newest.not_after + 1

    wire.now = Instant(wire.now.mono, expired * 10**9)
    wire.advance(5)

    assert (a.controller.hosts() == []) is disconnect


def test_a_peer_of_another_ca_is_refused_and_named_in_one_line_a_second() -> None:
    wire = Wire()
    a, b = wire.nodes
    foreign = wire.pki.other_ca().identity("host-2", "10.42.0.2/16")
    b = wire.join(2, identity=foreign)
    wire.everybody_knows_everybody()

    for _ in range(5):
        wire.send(b, a)
        wire.settle()
        wire.advance(0.15)

    refused = [
        event
        for event in a.logs
        if event.level is LogLevel.INFO and event.fields.get("reason") == "handshake_cert"
    ]
    assert len(refused) == 1
    assert "could not find ca" in str(refused[0].fields["error"])
    assert a.controller.hosts() == []


def test_when_another_host_answers_its_address_is_not_asked_again_and_it_hears_goodbye() -> None:
    wire = Wire(3)
    a, b, c = wire.nodes
    # a believes that c lives where b lives, and at c's own address
    wire.perform(a, a.controller.handle_resolved({c.address: [b.at]}, wire.now))

    wire.send(a, c)
    seen = kinds(wire.settle())
    wire.perform(a, a.controller.handle_resolved({c.address: [b.at, c.at]}, wire.now))
    wire.settle()

    assert "close_tunnel" in seen
    assert b.delivered == []
    assert len(c.delivered) == 1
    assert [host.name for host in a.controller.hosts()] == ["host-3"]


@pytest.mark.parametrize(
    ("a_versions", "b_versions", "used"),
    [
        pytest.param((1,), (1,), (1, 1), id="v1 both"),
        pytest.param((2,), (2,), (2, 2), id="v2 both"),
        pytest.param((1, 2), (1, 2), (1, 1), id="both own both: v1 first"),
        pytest.param((1, 2), (2,), (2, 2), id="peer owns only v2: we follow"),
        pytest.param((2,), (1, 2), (2, 2), id="initiator owns only v2"),
        pytest.param((1,), (2,), (1, 2), id="mixed"),
    ],
)
def test_hosts_meet_whatever_certificate_versions_they_own(
    a_versions: tuple[int, ...], b_versions: tuple[int, ...], used: tuple[int, int]
) -> None:
    wire = Wire()
    for number, versions in ((1, a_versions), (2, b_versions)):
        identity = wire.pki.identity(
            f"host-{number}", f"10.42.0.{number}/16", versions=tuple(CertVersion(each) for each in versions)
        )
        wire.join(number, identity=identity)
    wire.everybody_knows_everybody()
    a, b = wire.nodes

    for _ in range(8):
        wire.connect(a, b)
        wire.advance(1)

    [tunnel] = [
        t for t in a.controller._core.hostmap.tunnels(b.address) if a.controller._core.hostmap.is_primary(t)
    ]
    assert (tunnel.session.own_certificate.version, tunnel.certificate.version) == used
    assert len(a.delivered) == len(b.delivered) == 8
