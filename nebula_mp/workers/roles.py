"""The main of each role, loaded before the first fork, so that no child has to load anything.

Data flow: supervisor -> [workers.roles] -> workers.{control,services,reader,writer}
A module of its own since it is the one place that knows them all.
"""

from collections.abc import Mapping

from nebula_mp import clock
from nebula_mp.crypto.aead import TAG_BYTES, Aead
from nebula_mp.crypto.dh import PrivateKey
from nebula_mp.crypto.signing import SigningKey, verify
from nebula_mp.newtypes import Cipher, Curve
from nebula_mp.noise.ix import IxInitiator, IxResponder
from nebula_mp.workers import control, reader, services, writer
from nebula_mp.workers.parts import Role
from nebula_mp.workers.spawn import Main


def real_mains() -> Mapping[Role, Main]:
    """Give them, and load what they would load later."""
    services.preload()
    _use_ciphers()
    return {
        Role.CONTROL: control.main,
        Role.SERVICES: services.main,
        Role.READER: reader.main,
        Role.WRITER: writer.main,
    }


def _use_ciphers() -> None:
    """Have the library look up each algorithm once, with keys of nobody.

    It does so at the first use in a process, and in those forked later not again: that was 7 of the 9 million
    instructions of a reader's first packets, and 2 of the 9 million of control's first handshake.
    """
    for curve in Curve:
        for cipher in Cipher:
            one, two = (PrivateKey.generate(curve, clock.entropy) for _ in range(2))
            initiator = IxInitiator(curve, cipher, one, clock.entropy)
            responder = IxResponder(curve, cipher, two, clock.entropy)
            responder.read_message_1(initiator.write_message_1(b"1"))
            initiator.read_message_2(responder.write_message_2(b"2")[0])
        authority = SigningKey.generate(curve, clock.entropy)
        verify(curve, authority.public_key, authority.sign(b"3"), b"3")
    for cipher in Cipher:
        aead = Aead(cipher, bytes(32))
        sealed, opened = memoryview(bytearray(1 + TAG_BYTES)), memoryview(bytearray(1))
        aead.seal_into(1, b"", b"4", sealed)
        aead.open_into(1, b"", sealed, opened)
