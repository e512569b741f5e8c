"""Two sites: what one seals the other one opens, and nothing is unaccounted for."""

import gc
import random
from collections import Counter as Tally

import pytest

from nebula_mp.config.model import Offloads
from nebula_mp.newtypes import Cipher, Seconds
from tests.datapath.conftest import MakeSite
from tests.datapath.sites import (
    FAR,
    FAR_V6,
    INDEX_FAR,
    NEAR,
    NEAR_V6,
    Site,
    connect,
    drained,
    message,
    packet,
)
from tests.support import rings
from tests.support.packets import raw_packets
from tests.support.processes import vm_flags

pytestmark = pytest.mark.usefixtures("kernel")


def pair(make_site: MakeSite, cipher: Cipher = Cipher.AES, *, workers: int = 1) -> tuple[Site, Site]:
    near, far = make_site(workers=workers), make_site(workers=workers)
    connect(near, far.address(), cipher=cipher)
    connect(far, near.address(), cipher=cipher, mirrored=True)
    return near, far


@pytest.mark.parametrize("cipher", Cipher)
@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("back", [False, True], ids=["out", "back"])
def test_every_kind_of_packet_comes_out_as_it_went_in(
    make_site: MakeSite, cipher: Cipher, version: int, *, back: bool
) -> None:
    near, far = pair(make_site, cipher)
    addresses = (NEAR, FAR) if version == 4 else (NEAR_V6, FAR_V6)
    packets = raw_packets(*(addresses[::-1] if back else addresses), 7, 300, unclassified=True)
    sender, receiver = (far, near) if back else (near, far)
    sender.allow(*packets)
    receiver.allow(*packets, inbound=True)
    sealer, opener = sender.reader().sealer, receiver.reader().opener
    arrived = []
    for first in range(0, len(packets), 10):
        for each in packets[first : first + 10]:
            sender.inside.send(each)
        sealer.poll(100)
        sender.send()
        opener.poll(100)
        receiver.write()
        arrived += receiver.received()

    assert arrived == packets
    assert sender.drops() == receiver.drops() == {}
    assert sender.upcalls() == receiver.upcalls() == []
    sender.check_ledger()
    receiver.check_ledger()


@pytest.mark.parametrize("seed", range(5))
def test_whatever_happens_on_the_way_every_packet_is_accounted_for_and_none_comes_twice(
    make_site: MakeSite, seed: int
) -> None:
    """Two workers each; flows known or not; datagrams lost, copied, changed, cut, to either reader."""
    dice = random.Random(seed)
    near, far = pair(make_site, workers=2)
    packets = raw_packets(NEAR, FAR, seed, 200)
    for each in packets:
        if dice.random() < 0.7:
            near.allow(each)
        if dice.random() < 0.7:
            far.allow(each, inbound=True)
    sealers = [near.reader(worker).sealer for worker in range(2)]
    openers = [far.reader(worker).opener for worker in range(2)]
    given: list[bytes] = []
    arrived: list[bytes] = []

    def step(budget: int) -> None:
        for sealer in dice.sample(sealers, 2):
            sealer.poll(budget)
        for worker in range(2):
            near.send(worker)
            meddle(far, dice)
        for opener in dice.sample(openers, 2):
            opener.poll(budget)
        for worker in range(2):
            far.write(worker)
            arrived.extend(far.received())
            near.upcalls(worker)
            far.upcalls(worker)

    for each in packets:
        given.append(each if dice.random() < 0.95 else each[: dice.randrange(30)])
        near.inside.send(given[-1])
        near.now = far.now = Seconds(near.now + 0.001)
        step(dice.randrange(3))
    for _ in range(20):
        step(1000)

    assert arrived
    assert not Tally(arrived) - Tally(given), "altered, or delivered twice"
    assert {"drop.auth", "drop.replay", "drop.tun.inner_ip"} < (near.drops() | far.drops()).keys()
    near.check_ledger()
    far.check_ledger()


def test_a_train_of_messages_is_opened_as_the_messages_it_is(make_site: MakeSite) -> None:
    near, far = pair(make_site)
    far.offloads = Offloads(tso=False, uso=False)
    packets = [packet(number, 1000, back=True) for number in range(60)]
    near.allow(*packets, inbound=True)
    trains = [[message(3 + number, packets[number]) for number in range(at, at + 30)] for at in (0, 30)]
    producer = rings.produce(far.seal[0])
    for train in trains:
        assert producer.try_begin()
        assert producer.try_add(b"".join(train), len(train[0]), INDEX_FAR & 0xFFFF)
        producer.publish()

    assert far.send() == 2
    opener = near.reader().opener
    while opener.poll(100):
        near.write()

    assert near.received() == packets
    assert far.stats()["mp.udp.tx.packets"] == near.stats()["mp.udp.rx.packets"] == 60
    assert near.drops() == far.drops() == {}
    near.check_ledger()


def meddle(far: Site, dice: random.Random) -> None:
    """Take datagrams off the first reader's socket, and put them, copied or changed, into the other's."""
    for datagram in drained([far.udp[0]]):
        changed = bytearray(datagram)
        match dice.randrange(5):
            case 0:
                changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
            case 1:
                del changed[dice.randrange(len(changed)) :]
            case 2:
                continue
            case _:
                pass
        for _ in range(dice.randrange(1, 4)):
            far.far.sendto(changed, far.udp[1].getsockname())


def test_a_reader_keeps_the_keys_out_of_core_dumps_and_children(make_site: MakeSite) -> None:
    site = make_site()

    def protected() -> int:
        gc.collect()
        return sum({"dd", "dc"} <= flags for flags in vm_flags("tunnel keys"))

    before = protected()
    reader = site.reader()

    assert protected() == before + 1
    assert reader.sweep() == 0
