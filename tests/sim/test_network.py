"""The invented network does what it says: in order of time, from one seed."""

from dataclasses import replace
from ipaddress import ip_address

import pytest

from nebula_mp.newtypes import UdpAddr
from tests.sim.network import CALM, STRANGER, Fate, Message, Network, Weather

A, B = UdpAddr(ip_address("192.0.2.1"), 1), UdpAddr(ip_address("192.0.2.2"), 2)


class Inbox:
    """Remembers when what came from where."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.got: list[tuple[float, bytes, UdpAddr]] = []

    def __call__(self, data: bytes, source: UdpAddr) -> None:
        self.got.append((self.network.now, data, source))


def flood(weather: Weather, *, seed: int = 1, count: int = 1000) -> tuple[Network, Inbox]:
    """Send `count` datagrams from A to B, ten in a second."""
    network = Network(seed, weather)
    inbox = Inbox(network)
    network.attach(B, "b", inbox)
    for number in range(count):
        network.run_until(number / 10)
        network.send("a", A, B, number.to_bytes(2, "big"))
    network.run_until(1000)
    return network, inbox


def fates(network: Network) -> list[Fate]:
    return [row.fate for row in network.trace if isinstance(row, Message)]


def test_events_run_in_order_of_time_and_then_of_their_making() -> None:
    network = Network(1)
    ran: list[tuple[str, float]] = []
    for name, when in (("late", 2.0), ("first", 1.0), ("second", 1.0)):
        network.call_at(when, lambda name=name: ran.append((name, network.now)))  # type: ignore[misc]

    network.run_until(1.5)
    assert (ran, network.now) == ([("first", 1.0), ("second", 1.0)], 1.5)

    network.run_until(2.0)
    assert ran[2:] == [("late", 2.0)]


def test_an_event_may_make_others_for_the_same_moment() -> None:
    network = Network(1)
    ran: list[float] = []
    network.call_at(1.0, lambda: network.call_at(1.0, lambda: ran.append(network.now)))

    network.run_until(1.0)

    assert ran == [1.0]


def test_in_calm_weather_each_datagram_arrives_once_and_within_the_latency() -> None:
    network, inbox = flood(CALM)

    assert [data for _, data, _ in inbox.got] == [number.to_bytes(2, "big") for number in range(1000)]
    assert all(source == A for _, _, source in inbox.got)
    low, high = CALM.latency_s
    assert all(
        low <= row.arrived - row.sent <= high
        for row in network.trace
        if isinstance(row, Message) and row.arrived is not None
    )
    assert set(fates(network)) == {Fate.DELIVERED}


@pytest.mark.parametrize(
    ("weather", "fate"),
    [
        pytest.param(Weather(loss=0.3), Fate.LOST, id="loss"),
        pytest.param(Weather(duplicate=0.3), Fate.DUPLICATE, id="duplicates"),
        pytest.param(Weather(corrupt=0.3), Fate.CORRUPT, id="bit errors"),
        pytest.param(Weather(copy=0.3, copy_s=1), Fate.COPY, id="copies"),
    ],
)
def test_foul_weather_strikes_as_often_as_it_says(weather: Weather, fate: Fate) -> None:
    network, inbox = flood(weather)

    struck = fates(network).count(fate)
    assert 240 < struck < 360
    arrived = 1000 - struck * (fate is Fate.LOST) + struck * (fate in (Fate.DUPLICATE, Fate.COPY))
    assert len(inbox.got) == arrived
    assert sum(source == STRANGER for _, _, source in inbox.got) == struck * (fate is Fate.COPY)


def test_stragglers_are_overtaken() -> None:
    _, inbox = flood(Weather(straggle=0.2, straggle_s=2))

    numbers = [int.from_bytes(data, "big") for _, data, _ in inbox.got]
    assert numbers != sorted(numbers)
    assert sorted(numbers) == list(range(1000))


def test_a_datagram_reaches_whoever_is_at_the_address_when_it_arrives() -> None:
    network = Network(1, replace(CALM, latency_s=(1, 1)))
    first, second = Inbox(network), Inbox(network)
    network.attach(B, "first", first)
    network.send("a", A, B, b"1")
    network.detach(B)
    network.send("a", A, B, b"2")
    network.run_until(1)
    network.attach(B, "second", second)
    network.send("a", A, B, b"3")
    network.run_until(2)

    assert first.got == []
    assert [data for _, data, _ in second.got] == [b"3"]
    assert fates(network) == [Fate.NOBODY, Fate.NOBODY, Fate.DELIVERED]


def test_one_seed_makes_one_course_of_events() -> None:
    weather = Weather(loss=0.1, duplicate=0.1, straggle=0.1, straggle_s=1, corrupt=0.1, copy=0.1, copy_s=1)

    assert flood(weather, seed=7)[1].got == flood(weather, seed=7)[1].got
    assert flood(weather, seed=7)[1].got != flood(weather, seed=8)[1].got
