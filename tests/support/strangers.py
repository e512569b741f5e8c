"""What somebody who has seen one handshake on the wire can send: stage 1 messages of three kinds.

Data flow: a recorded stage 1 -> [support.strangers] -> tests/control, tests/e2e
The third kind is the recorded message itself, again.
"""

from random import Random

from nebula_mp.wire import nebula_pb2
from nebula_mp.wire.header import HEADER_BYTES

_KEY_BYTES = 32


def copied(stage1: bytes, dice: Random) -> bytes:
    """The certificate of a stage 1 under a fresh ephemeral key, with an index and a time that look new."""
    message = stage1[HEADER_BYTES:]
    static, payload = message[_KEY_BYTES : 2 * _KEY_BYTES], message[2 * _KEY_BYTES :]
    handshake = nebula_pb2.NebulaHandshake.FromString(payload)
    handshake.Details.InitiatorIndex = dice.randrange(1, 2**32)
    handshake.Details.Time += dice.randrange(1, 10**12)
    return stage1[:HEADER_BYTES] + dice.randbytes(_KEY_BYTES) + static + handshake.SerializeToString()


def random(stage1: bytes, dice: Random) -> bytes:
    """Noise: after a good header, of about the right length, or the recorded message with bytes altered anywhere."""
    kind = dice.randrange(3)
    if kind == 0:
        return stage1[:HEADER_BYTES] + dice.randbytes(dice.randrange(8, 600))
    if kind == 1:
        return dice.randbytes(len(stage1) + dice.randrange(-20, 21))
    altered = bytearray(stage1)
    for at in dice.sample(range(len(altered)), dice.randrange(1, 20)):
        altered[at] ^= dice.randrange(1, 256)
    return bytes(altered)
