"""A host that only wants to shake hands: how soon does a gateway serve somebody it has never seen?

Data flow: tests/e2e -> [support.newcomer] -> a UDP socket on the wire -> the gateway's stage 2
Two or three datagrams, no tunnel device and no process, so that milliseconds can be told.
"""

import os
import select
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from nebula_mp.cert.identity import Identity
from nebula_mp.cert.pool import CaPool
from nebula_mp.errors import WireError
from nebula_mp.handshake.machine import Completed, Initiator
from nebula_mp.newtypes import CertVersion, Cipher, Counter, TunnelIndex
from nebula_mp.wire.header import STAGE_2_COUNTER, TEST_REQUEST, Header, MessageType
from tests.support.netns import entered
from tests.support.nodes import PORT, Node, Pair

_AGAIN_EVERY_S = 0.02


class Newcomer:
    """A host with a certificate of the pair's CA, at an address of the wire's router; close it at the end."""

    def __init__(self, pair: Pair, name: str, networks: Sequence[str]) -> None:
        private, public = pair.tool.keygen(name, curve=pair.variant.curve)
        certificate = pair.tool.sign(pair.authorities[1], name, public, networks)
        now = int(time.time())
        self._identity = Identity.from_pem(
            certificate,
            Path(private).read_text(),
            cert_source=name,
            key_source=name,
            initiating_version=None,
            at=now,
        )
        self._pool = CaPool.from_pem(
            pair.authorities[1].certificate.read_text(), source="ca", at=now, blocklist=()
        )
        self._cipher = Cipher(pair.variant.cipher)
        with entered(pair.wire.router):
            self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self.session: Completed | None = None
        self._target = ("", 0)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def shake_hands(self, node: Node, *, within_s: float) -> float:
        """Send one new stage 1 over and over until it is answered; seconds until then.

        The tunnel it made is in `session`; to the gateway it is a candidate until `prove`.
        """
        index = TunnelIndex(int.from_bytes(os.urandom(4), "big") | 1)
        initiator = Initiator(
            self._identity,
            self._cipher,
            CertVersion.V1,
            os.urandom,
            local_index=index,
            time_ns=time.time_ns(),
        )
        self._target = (str(node.site.addresses[4]), PORT)
        began = time.monotonic()
        while (waited := time.monotonic() - began) < within_s:
            self._socket.sendto(initiator.stage1, self._target)
            if select.select([self._socket], [], [], _AGAIN_EVERY_S)[0]:
                self.session = self._read(initiator)
                if self.session is not None:
                    return time.monotonic() - began
        raise AssertionError(f"{node.label} did not answer a stage 1 for {waited:.1f} s")

    def prove(self) -> None:
        """Send a test in the tunnel, the first and only message in it."""
        assert self.session is not None
        counter = Counter(STAGE_2_COUNTER + 1)
        header = Header(MessageType.TEST, TEST_REQUEST, self.session.remote_index, counter).encode()
        self._socket.sendto(header + self.session.send.seal(counter, header, b""), self._target)

    def _read(self, initiator: Initiator) -> Completed | None:
        try:
            return initiator.read_stage2(self._socket.recv(2048), self._pool, int(time.time()))
        except WireError:
            return None  # an answer to an earlier one, or a test of the tunnel
