"""Draws what some hosts said to each other, for somebody who has to find out why a run failed.

Data flow: sim.network (trace) -> [sim.diagram] -> text of a failure
One column for each host; time goes down, in the order in which datagrams were sent.
"""

from collections.abc import Iterable, Sequence

from nebula_mp.errors import WireError
from nebula_mp.newtypes import UdpAddr
from nebula_mp.wire.header import TEST_REPLY, Header, MessageType
from tests.sim.network import Fate, Message, Note

COLUMN = 44
LINES = 60


def draw(
    trace: Iterable[Message | Note], names: Sequence[str], homes: dict[UdpAddr, str], lines: int = LINES
) -> str:
    """Draw the last `lines` messages among the hosts `names`, and what befell those hosts meanwhile.

    `homes`: whose addresses they were, for datagrams that never arrived.
    """
    rows = [row for row in trace if _matters(row, names, homes)][-lines:]
    head = " " * 10 + "".join(name.center(COLUMN) for name in names).rstrip()
    return "\n".join([head, *(_row(row, names, homes) for row in rows)])


def describe(data: bytes) -> str:
    """`handshake 1`, `message 01020304 #17`: type, receiver's index and counter, as far as there are any."""
    if len(data) <= 1:
        return "punch"
    try:
        header = Header.parse(data)
    except WireError:
        return f"{len(data)} bytes of nonsense"
    if header.type is MessageType.HANDSHAKE:
        return f"handshake {header.counter} {header.remote_index:08x} ({len(data)} B)"
    name = header.type.name.lower()
    if header.type is MessageType.TEST:
        name = "test reply" if header.subtype == TEST_REPLY else "test"
    return f"{name} {header.remote_index:08x} #{header.counter}"


def _receiver(message: Message, homes: dict[UdpAddr, str]) -> str:
    return message.receiver if message.arrived is not None else homes.get(message.to, "?")


def _matters(row: Message | Note, names: Sequence[str], homes: dict[UdpAddr, str]) -> bool:
    if isinstance(row, Note):
        return row.host in names
    return row.sender in names and _receiver(row, homes) in names


def _row(row: Message | Note, names: Sequence[str], homes: dict[UdpAddr, str]) -> str:
    clock = f"{row.sent:9.4f} "
    if isinstance(row, Note):
        return f"{clock}{'* ' + row.host + ': ' + row.text}"
    places = [COLUMN // 2 + COLUMN * number for number in range(len(names))]
    start, end = places[names.index(row.sender)], places[names.index(_receiver(row, homes))]
    left, right = sorted((start, end))
    label = f" {describe(row.data)} "
    arrived = row.arrived is not None
    if left == right:
        line = [" "] * (COLUMN * len(names))
        for place in places:
            line[place] = "|"
        return f"{clock}{''.join(line).rstrip()}   to itself:{label}"
    shaft = label.center(right - left - 3, "-")
    tip = ("<" if end < start else ">") if arrived else "x"
    arrow = f"{tip}-{shaft}" if end < start else f"{shaft}-{tip}"
    line = [" "] * (COLUMN * len(names))
    for place in places:
        line[place] = "|"
    line[left + 1 : left + 1 + len(arrow)] = arrow
    remarks = [row.fate.value] if row.fate not in (Fate.DELIVERED, Fate.ON_THE_WAY) else []
    if row.arrived is not None:
        remarks.append(f"+{(row.arrived - row.sent) * 1000:.0f} ms")
    elif row.fate is Fate.ON_THE_WAY:
        remarks.append("still on the way")
    return f"{clock}{''.join(line).rstrip()}  {', '.join(remarks)}"
