"""The regular look at one proven tunnel: whether it is alive, still trusted, and the right one to use.

Data flow: control.controller (a deadline came) -> [control.upkeep] -> control.core, control.handshakes
Carries out what control.liveness decides. Knows nothing of datagrams.
Source: docs/wire-format.md, "Connection manager"; Nebula's connection manager.
"""

from nebula_mp.cert.pool import BlocklistedError
from nebula_mp.config.model import LogLevel
from nebula_mp.control import liveness
from nebula_mp.control.core import Core, TimerKind
from nebula_mp.control.handshakes import Handshakes
from nebula_mp.control.hostmap import REHANDSHAKE_COUNTER, Tunnel
from nebula_mp.control.liveness import Decision
from nebula_mp.errors import CertError
from nebula_mp.newtypes import CertVersion, Instant, IPAddress
from nebula_mp.wire.header import COUNTER_LIMIT


class Upkeep:
    """`check` each tunnel when its deadline comes."""

    def __init__(self, core: Core, handshakes: Handshakes) -> None:
        self._core = core
        self._handshakes = handshakes

    def check(self, tunnel: Tunnel, now: Instant) -> None:
        """Look after one proven tunnel, at most one alive interval after the last time."""
        core = self._core
        if not self._still_trusted(tunnel, now):
            core.close(tunnel)
            return
        tunnel.traffic.look(core.plane.passed(tunnel))
        if core.plane.last_counter(tunnel) + 1 >= COUNTER_LIMIT:
            core.outbox.log(LogLevel.WARN, "Tunnel used up its message counter", **who(tunnel))
            core.forget(tunnel)
            return
        config = core.config
        primary = core.hostmap.is_primary(tunnel)
        decision, again = liveness.check(
            tunnel.traffic, primary=primary, now=now.mono, tunnels=config.tunnels, timers=config.timers
        )
        match decision:
            case Decision.ALIVE if core.hostmap.is_first(tunnel):
                self._renew(tunnel, now)
            case Decision.ALIVE:
                self._swap_primary(tunnel)
            case Decision.IDLE | Decision.WAIT:
                pass
            case Decision.TEST:
                core.search(tunnel)
            case Decision.INACTIVE:
                core.outbox.log(LogLevel.INFO, "Dropping tunnel due to inactivity", **who(tunnel))
                core.close(tunnel)
                return
            case Decision.DEAD:
                core.outbox.log(
                    LogLevel.INFO,
                    "Tunnel status",
                    tunnelCheck={"state": "dead", "method": "active"},
                    **who(tunnel),
                )
                # If the peer lives after all, it shall not go on sending on what we forgot.
                core.close(tunnel)
                return
        core.timers.arm((TimerKind.CHECK, tunnel.local_index), again)

    def _still_trusted(self, tunnel: Tunnel, now: Instant) -> bool:
        """Tell whether the peer's certificate would be accepted today."""
        core = self._core
        try:
            core.pool.recheck(tunnel.session.peer, now.wall_s)
        except BlocklistedError as error:
            reason: CertError = error
        except CertError as error:
            if not core.config.pki.disconnect_invalid:
                return True
            reason = error
        else:
            return True
        core.outbox.log(
            LogLevel.INFO,
            "Remote certificate is no longer valid, tearing down the tunnel",
            **who(tunnel),
            fingerprint=tunnel.certificate.fingerprint,
            error=reason,
        )
        return False

    def _swap_primary(self, tunnel: Tunnel) -> None:
        """Move to the tunnel the peer uses. Only the host with the lower address does, so both end on one."""
        core = self._core
        used = core.hostmap.primary(tunnel.addresses[0])
        if used is not None:
            used.traffic.look(core.plane.passed(used))
        if used is not None and used.traffic.last_in >= tunnel.traffic.last_in:
            return  # what came through this one came before the peer took to the other, or restarted
        mine = core.own_networks[0].ip
        if order(tunnel.addresses[0]) < order(mine):
            return
        if core.plane.last_counter(tunnel) >= REHANDSHAKE_COUNTER:
            return
        current = core.identity.certificates.get(tunnel.session.own_certificate.version)
        if current is not None and current.signature != tunnel.session.own_certificate.signature:
            return
        core.hostmap.make_primary(tunnel)

    def _renew(self, tunnel: Tunnel, now: Instant) -> None:
        """Start a handshake if this tunnel should be replaced; it stays in use until the new one is up."""
        identity = self._core.identity
        used = tunnel.session.own_certificate
        peer_version = tunnel.certificate.version
        version: CertVersion | None = None
        if used.version not in identity.certificates:
            reason = "local cert removed"
        elif peer_version > used.version and peer_version in identity.certificates:
            reason, version = "local cert version lower than peer", peer_version
        elif identity.certificates[used.version].signature != used.signature:
            reason = "local cert is not current"
        elif used.version < identity.initiating_version:
            reason = "current cert version < pki.initiating_version"
        elif self._core.plane.last_counter(tunnel) >= REHANDSHAKE_COUNTER:
            reason = "message counter threshold"
        else:
            return
        if self._handshakes.is_open(tunnel.addresses):
            return
        self._core.outbox.log(LogLevel.INFO, "Re-handshaking with remote", **who(tunnel), reason=reason)
        self._handshakes.start(tunnel.addresses[0], now, version=version)


def who(tunnel: Tunnel) -> dict[str, object]:
    """Give the fields that tell in a log line which tunnel it is about."""
    return {
        "vpnAddrs": tunnel.addresses,
        "certName": tunnel.certificate.name,
        "udpAddr": tunnel.remote,
        "localIndex": tunnel.local_index,
        "remoteIndex": tunnel.remote_index,
    }


def order(address: IPAddress) -> tuple[int, int]:
    """Sort IPv4 before IPv6, then by number: the order in which identities are compared."""
    return address.version, int(address)
