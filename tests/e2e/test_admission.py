"""New flows that readers admit by themselves, and what becomes of them when the rules change."""

import signal
import socket
from ipaddress import IPv4Address

import pytest

from tests.e2e.conftest import BESIDE_THE_NATIVE, MakePair
from tests.support.nodes import DEVICE, Pair, Variant, log_has
from tests.support.peers import OURS
from tests.support.traffic import Endpoint, ping

pytestmark = pytest.mark.e2e

BASIC = Variant("v1-25519")
CONNECTIONS = 200
KERNELS = pytest.mark.parametrize("kernel", ["", *BESIDE_THE_NATIVE], indirect=True)


def ends_of(pair: Pair) -> tuple[Endpoint, Endpoint]:
    ours, theirs = (Endpoint(node.site, node.host.address(4)) for node in pair.nodes)
    return ours, theirs


def exchange(client: Endpoint, server: Endpoint, count: int) -> None:
    """Open connections one after the other, each with a byte both ways."""
    with server.socket(socket.SOCK_STREAM) as listener:
        listener.bind((str(server.address), 0))
        listener.settimeout(5)
        listener.listen()
        for _ in range(count):
            with client.socket(socket.SOCK_STREAM) as one:
                one.settimeout(5)
                one.connect(listener.getsockname())
                other, _ = listener.accept()
                with other:
                    other.settimeout(5)
                    one.sendall(b"?")
                    assert other.recv(1) == b"?"
                    other.sendall(b"!")
                    assert one.recv(1) == b"!"


def bound(end: Endpoint) -> socket.socket:
    made = end.socket(socket.SOCK_DGRAM)
    made.bind((str(end.address), 0))
    made.settimeout(2)
    return made


def arrives(source: socket.socket, destination: socket.socket, text: bytes) -> bool:
    source.sendto(text, destination.getsockname())
    try:
        return destination.recv(100) == text
    except TimeoutError:
        return False


@KERNELS
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.usefixtures("kernel")
def test_control_hears_of_few_of_many_new_connections(make_pair: MakePair, workers: int) -> None:
    pair = make_pair("1.11.0", BASIC)
    pair.a.workers = workers
    pair.introduce(pair.a)
    pair.start()
    ours, theirs = ends_of(pair)
    ping(ours, theirs)
    before = pair.a.stats()

    exchange(ours, theirs, CONNECTIONS)
    exchange(theirs, ours, CONNECTIONS)

    after = pair.a.stats()
    grown = {name: after.get(name, 0) - before.get(name, 0) for name in ("mp.flows.admitted", "mp.upcalls")}
    # Asked twice, once for each half of the life of what control says of two addresses; a machine may be slow.
    assert grown["mp.flows.admitted"] >= 2 * CONNECTIONS - 20, grown
    assert grown["mp.upcalls"] <= 30, grown


@KERNELS
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.usefixtures("kernel")
def test_when_the_rules_change_a_flow_stays_that_its_own_direction_still_allows(
    make_pair: MakePair, workers: int
) -> None:
    pair = make_pair(OURS, BASIC)
    pair.a.workers = workers
    pair.introduce(pair.a)
    pair.start()
    ours, theirs = ends_of(pair)
    exchange(ours, theirs, 2)  # so that control has spoken of the two
    exchange(theirs, ours, 2)
    with bound(ours) as from_us, bound(theirs) as to_them, bound(theirs) as from_them, bound(ours) as to_us:
        admitted = pair.a.stats()["mp.flows.admitted"]
        assert arrives(from_us, to_them, b"we began")
        assert arrives(from_them, to_us, b"they began")
        assert pair.a.stats()["mp.flows.admitted"] >= admitted + 2

        pair.a.inbound = []
        pair.a.write_config()
        said = len(pair.a.log)
        pair.a.send_signal(signal.SIGHUP)
        log_has(pair.a, "config reloaded", since=said)

        assert arrives(to_them, from_us, b"an answer, which comes first")
        assert arrives(from_us, to_them, b"and we go on")
        assert not arrives(from_them, to_us, b"they do not")
        with bound(theirs) as new:
            assert not arrives(new, to_us, b"nor does anything new")
    ping(ours, theirs)


def test_a_packet_to_nobody_is_not_admitted(make_pair: MakePair) -> None:
    pair = make_pair(OURS, BASIC)
    pair.introduce(pair.a)
    pair.start()
    ours, theirs = ends_of(pair)
    exchange(ours, theirs, 2)
    admitted = pair.a.stats()["mp.flows.admitted"]

    with bound(ours) as source:
        for host in range(200, 220):
            source.sendto(b"nobody", (str(IPv4Address(int(ours.address) & 0xFFFFFF00 | host)), 9))

    assert pair.a.stats()["mp.flows.admitted"] == admitted
    assert pair.a.site.has_device(DEVICE)
