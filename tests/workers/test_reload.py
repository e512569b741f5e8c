"""What a reload may change, and what waits for a restart."""

from dataclasses import replace

import pytest

from nebula_mp.config.model import (
    Config,
    DrainMode,
    FirewallConfig,
    HandshakesConfig,
    KernelChoice,
    ListenConfig,
    LoggingConfig,
    LogLevel,
    MpConfig,
    Offloads,
    PkiConfig,
    TimersConfig,
    TunConfig,
)
from nebula_mp.newtypes import Cipher, Seconds
from nebula_mp.workers.reload import merge

RUNNING = Config(pki=PkiConfig(ca="a", cert="b", key="c"), tun=TunConfig(dev="nebula1"))


@pytest.mark.parametrize(
    ("new", "key"),
    [
        (replace(RUNNING, cipher=Cipher.CHACHAPOLY), "cipher"),
        (replace(RUNNING, handshakes=HandshakesConfig(retries=3)), "handshakes"),
        (replace(RUNNING, listen=ListenConfig(host="::")), "listen.host"),
        (replace(RUNNING, listen=ListenConfig(port=1)), "listen.port"),
        (replace(RUNNING, tun=TunConfig(dev="nebula2")), "tun.dev"),
        (replace(RUNNING, tun=TunConfig(dev="nebula1", tx_queue=1)), "tun.tx_queue"),
        (replace(RUNNING, tun=TunConfig(dev="nebula1", drop_multicast=True)), "tun.drop_multicast"),
        (replace(RUNNING, listen=ListenConfig(udp_offloads=False)), "listen.udp_offloads"),
        (replace(RUNNING, tun=TunConfig(dev="nebula1", use_offloads=False)), "tun.use_offloads"),
        (replace(RUNNING, routines=4), "routines"),
        (replace(RUNNING, mp=MpConfig(run_dir="/tmp/x")), "mp.run_dir"),
        (replace(RUNNING, mp=MpConfig(workers=2)), "mp.workers"),
        (replace(RUNNING, mp=MpConfig(drain=DrainMode.WRITER)), "mp.drain"),
        (replace(RUNNING, mp=MpConfig(kernel=KernelChoice.RUST)), "mp.kernel"),
        (replace(RUNNING, mp=MpConfig(user="nebula")), "mp.user"),
        (replace(RUNNING, mp=MpConfig(offload=Offloads(tso=False))), "mp.offload"),
    ],
)
def test_what_needs_a_restart_keeps_its_running_value_and_is_named(new: Config, key: str) -> None:
    assert merge(RUNNING, new) == (RUNNING, (key,))


@pytest.mark.parametrize(
    "new",
    [
        replace(RUNNING, pki=PkiConfig(ca="x", cert="y", key="z", disconnect_invalid=False)),
        replace(RUNNING, tun=TunConfig(dev="nebula1", mtu=1400)),
        replace(RUNNING, listen=ListenConfig(read_buffer=1 << 20, so_mark=7)),
        replace(RUNNING, firewall=FirewallConfig(default_local_cidr_any=True)),
        replace(RUNNING, logging=LoggingConfig(level=LogLevel.DEBUG)),
        replace(RUNNING, timers=TimersConfig(connection_alive_interval=Seconds(1))),
        RUNNING,
    ],
)
def test_all_else_is_taken_over_without_a_word(new: Config) -> None:
    assert merge(RUNNING, new) == (new, ())


def test_one_change_does_not_hold_back_another_in_the_same_section() -> None:
    new = replace(RUNNING, tun=TunConfig(dev="nebula2", mtu=1400))

    assert merge(RUNNING, new) == (replace(RUNNING, tun=TunConfig(dev="nebula1", mtu=1400)), ("tun.dev",))
