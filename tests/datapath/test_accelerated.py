"""The native kernel's face: it raises what the Python kernel raises, in the same words."""

import errno
import os
from collections.abc import Callable
from contextlib import closing

import pytest

from nebula_mp.datapath.api import CounterFds, Drain, Kernel
from nebula_mp.errors import RingError
from nebula_mp.shm_counters import Refusal
from nebula_mp.wire.header import COUNTER_LIMIT
from tests.datapath.conftest import MakeSite
from tests.datapath.sites import INDEX_NEAR, Site, connect, store_counter
from tests.support import rings
from tests.support.native import PYTHON, RUST, named

pytestmark = pytest.mark.native

ROW = INDEX_NEAR & 0xFFFF


def contradiction(kernel: Kernel, spoil: Callable[[Site], None], *, seal: bool) -> RingError:
    """What a drain raises for a ring of one area that is spoilt."""
    with closing(Site(kernel=kernel)) as site:
        connect(site)
        memory = (site.seal if seal else site.opened)[0]
        assert rings.publish(rings.produce(memory), b"one", b"another")
        stats = site.pages[1].descriptor
        drain: Drain
        if seal:
            tunnels = site.tables.tunnels.read_only
            drain = kernel.drain_udp(
                site.seal_end(), site.udp[0].fileno(), tunnels=tunnels, stats=stats, offloads=site.offloads
            )
        else:
            drain = kernel.drain_tun(site.open_end(), site.tun_fd, stats=stats, offloads=site.offloads)
        spoil(site)
        with pytest.raises(RingError) as raised:
            drain.drain(1)
        return raised.value


@pytest.mark.parametrize("seal", [True, False], ids=["seal ring", "open ring"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("head", 9),
        ("head", 2**64 - 1),
        ("count", 0),
        ("count", 129),
        ("number", 5),
        ("offset", 2**32 - 1),
        ("length", 0),
        ("length", 2**32 - 1),
        ("segment", 2**31),
        ("row", 64),
        ("data generation", 7),
    ],
)
def test_a_contradiction_is_told_in_the_same_words(name: str, value: int, *, seal: bool) -> None:
    def spoil(site: Site) -> None:
        rings.patch((site.seal if seal else site.opened)[0], name, value)

    expected = contradiction(named(PYTHON), spoil, seal=seal)
    found = contradiction(named(RUST), spoil, seal=seal)

    assert str(found) == str(expected)
    assert (found.field, found.value) == (expected.field, expected.value)


def test_a_lost_descriptor_is_the_error_that_python_has_for_it(make_site: MakeSite) -> None:
    site = make_site(kernel=named(RUST))
    connect(site)
    reader = site.reader()
    descriptor = site.udp[0].detach()
    os.close(descriptor)

    with pytest.raises(OSError) as lost:
        reader.opener.poll(1)

    assert lost.value.errno == errno.EBADF
    assert lost.value.strerror == os.strerror(errno.EBADF)


def test_controls_counters_are_refused_for_the_same_reasons(make_site: MakeSite) -> None:
    site = make_site(kernel=named(RUST))
    connect(site)
    made = site.tables
    spans = tuple(span.read_only for span in made.spans)
    states = tuple(memory.state.read_only for memory in site.seal)
    counters = named(RUST).send_counters(
        CounterFds(made.send.descriptor, spans, states, made.locks.descriptor)
    )

    assert counters.reserve(ROW, site.generation, 2) == 3
    assert counters.last(ROW, site.generation) == 4
    assert counters.reserve(ROW, site.generation + 1, 1) is Refusal.GONE
    store_counter(site, ROW, COUNTER_LIMIT - 1)
    assert counters.reserve(ROW, site.generation, 1) is Refusal.EXHAUSTED
