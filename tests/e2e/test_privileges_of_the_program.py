"""What /proc says of the running program: nobody has more than its work needs, and control alone the key.

The table is printed; every cell that matters is asserted. The memory of all processes is searched for the
private key as bytes, as a number of the crypto library's, and as the text of its file.
"""

import base64
import signal
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from nebula_mp.privileges import SUPERVISOR_AS_ROOT, find_account
from tests.e2e.conftest import MakePair
from tests.support.anatomy import Anatomy, table, take_apart
from tests.support.memory import Find, scan
from tests.support.netns import wait_until
from tests.support.newcomer import Newcomer
from tests.support.nodes import Node, Pair, Variant
from tests.support.traffic import Endpoint, check_tcp, ping

pytestmark = pytest.mark.e2e

WORKERS = 2
CHILDREN_UMASK = 0o077
_WITHIN_S = 10.0
_SESSION_KEY_BYTES = 32

# Region by the beginning of its name: who may read it, who may write it. An owner's own is `reader/0` for
# `span/0`. Others than these have it neither mapped nor as a descriptor; the supervisor, which makes all,
# has descriptors of all and maps none of them.
_READERS = frozenset({"reader/0", "reader/1"})
_WRITERS = frozenset({"writer/0", "writer/1"})
_CONTROL = frozenset({"control"})
_TABLES: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "tunnels": (_CONTROL | _READERS | _WRITERS, _CONTROL),
    "tunnel keys": (_CONTROL | _READERS, _CONTROL),
    "peers": (_CONTROL | _READERS, _CONTROL),
    "flows last seen": (_CONTROL | _READERS, _CONTROL | _READERS),
    # One for each reader, and behind them control's.
    "flows 0": (_CONTROL | _READERS, frozenset({"reader/0"})),
    "flows 1": (_CONTROL | _READERS, frozenset({"reader/1"})),
    "flows 2": (_CONTROL | _READERS, _CONTROL),
    "send counters": (_CONTROL | _READERS, _CONTROL | _READERS),
    "replay windows": (_READERS, _READERS),
    "journal": (_CONTROL, _CONTROL),
}


def _pair(make_pair: MakePair, curve: str = "25519") -> Pair:
    """Ours with two workers, and the peer; not started."""
    pair = make_pair("1.11.0", Variant(f"v1-{curve}", curve=curve))
    pair.a.workers = WORKERS
    pair.introduce(pair.a)
    return pair


def _start(pair: Pair) -> None:
    pair.start()
    ends = (
        Endpoint(pair.a.site, pair.a.host.address(4)),
        Endpoint(pair.b.site, pair.b.host.address(4)),
    )
    ping(*ends)
    check_tcp(*ends)


def _take_apart(node: Node) -> dict[str, Anatomy]:
    pids = _pids(node)
    return {name: take_apart(name, pid) for name, pid in pids.items()}


def _pids(node: Node) -> dict[str, int]:
    """Every process of the program by name, the supervisor first; nothing else runs in its site."""
    children = {name: row.pid for name, row in sorted(node.processes().items()) if row.pid is not None}
    pids = {"supervisor": node.pid, **children}
    assert set(pids.values()) == set(node.site.space.pids())
    return pids


@pytest.mark.parametrize("kernel", ["python", pytest.param("rust", marks=pytest.mark.native)])
def test_every_process_has_what_its_work_needs_and_nothing_more(make_pair: MakePair, kernel: str) -> None:
    pair = _pair(make_pair)
    pair.a.kernel = kernel
    _start(pair)

    found = _take_apart(pair.a)

    print("\n" + table(list(found.values())))
    assert pair.a.call("status")["kernel"] == kernel
    for each in found.values():
        paths = "\n".join(mapping.path for mapping in each.facts.mappings)
        assert ("/numpy/" in paths) == (kernel == "python"), each.name
        assert kernel == "python" or "/_accel." in paths, each.name
    _check_supervisor(found["supervisor"])
    children = [each for each in found.values() if each.name != "supervisor"]
    assert len(children) == 2 + 2 * WORKERS
    for each in children:
        _check_child(each, found["supervisor"].facts.pid)
    for each in found.values():
        assert not [mapping for mapping in each.facts.mappings if mapping.is_writable_and_executable], (
            each.name
        )
    for beginning, (may_read, may_write) in _TABLES.items():
        _check_access(found.values(), beginning, may_read, may_write)
    _check_own_regions(found)
    _check_descriptors(found)


def _check_supervisor(each: Anatomy) -> None:
    facts = each.facts
    assert facts.uids == (0, 0, 0, 0)
    assert facts.permitted == facts.effective == SUPERVISOR_AS_ROOT
    assert (facts.inheritable, facts.ambient, facts.bounding) == (frozenset(), frozenset(), frozenset())
    assert facts.no_new_privs
    assert facts.threads == 1
    assert not {one.name for one in each.mapped if one.name.startswith(tuple(_TABLES))}


def _check_child(each: Anatomy, supervisor: int) -> None:
    facts, account = each.facts, find_account(None)
    assert facts.parent == supervisor, each.name
    assert facts.uids == (account.uid,) * 4, each.name
    assert facts.gids == (account.gid,) * 4, each.name
    assert facts.groups == (), each.name
    nothing = (facts.permitted, facts.effective, facts.inheritable, facts.ambient, facts.bounding)
    assert nothing == (frozenset(),) * 5, each.name
    assert facts.no_new_privs, each.name
    assert facts.dumpable is False, each.name
    assert facts.core_limit_bytes == 0, each.name
    assert facts.umask == CHILDREN_UMASK, each.name
    assert facts.environment == (), each.name
    assert facts.threads == 1 or each.name == "services", each.name


def _check_access(
    processes: Iterable[Anatomy], beginning: str, may_read: frozenset[str], may_write: frozenset[str]
) -> None:
    for each in processes:
        if each.name == "supervisor":
            continue
        readable = [name for name in each.readable(beginning) if _is_called(name, beginning)]
        writable = [name for name in each.writable(beginning) if _is_called(name, beginning)]
        assert bool(readable) == (each.name in may_read), f"{each.name}: {beginning}: {readable}"
        assert bool(writable) == (each.name in may_write), f"{each.name}: {beginning}: {writable}"


def _is_called(name: str, beginning: str) -> bool:
    """Whether that is the region's whole name, but for a number: `flows` is not `flows last seen`."""
    return name.removeprefix(beginning).strip(" /0123456789") == ""


def _check_own_regions(found: dict[str, Anatomy]) -> None:
    """What belongs to one worker, or one process, is written by that one alone."""
    for name, each in found.items():
        if name == "supervisor":
            continue
        number = name.partition("/")[2]
        assert each.writable("stats") == [f"stats {name}"], name
        if name in _READERS:
            assert each.writable("span") == [f"span {number}"], name
            assert each.writable("traffic") == [f"traffic {number}"], name
        else:
            assert each.writable("span") == [], name
        assert bool(each.readable("private key")) == (name == "control"), name
        if name in _WRITERS | {"services"}:
            assert each.readable("traffic") == [], name
        if name in _WRITERS:
            assert each.writable("ring data") == [], name


def _check_descriptors(found: dict[str, Anatomy]) -> None:
    """No file of the disk, and devices and sockets only where packets go through them."""
    for name, each in found.items():
        kinds = each.kinds
        if name in _READERS | _WRITERS:
            assert (kinds["tun"], kinds["udp"]) == (1, 1), name
            assert (kinds["unix"], kinds["netlink"]) == (0, 0), name
        elif name == "control":
            assert (kinds["tun"], kinds["udp"], kinds["netlink"]) == (WORKERS, 1, 0)
        elif name == "services":
            assert (kinds["tun"], kinds["netlink"]) == (0, 0)
        if name not in {"supervisor", "services"}:
            allowed = ("/proc/",) if name in _READERS else ()
            assert not [path for path in each.files if not path.startswith(allowed or "never")], name


@pytest.mark.parametrize(("place", "curve"), [("file", "25519"), ("inline", "25519"), ("inline", "P256")])
def test_the_private_key_is_in_the_memory_of_control_and_of_nobody_else(
    make_pair: MakePair, place: str, curve: str
) -> None:
    pair = _pair(make_pair, curve)
    if place == "inline":
        pair.a.extra = {"pki": {"key": pair.a.host.key.read_text()}}
    _start(pair)
    _assert_only_control_knows(pair.a, _patterns("key", pair.a.host.key), "after the start")

    old = _patterns("old key", pair.a.host.key)
    _renew(pair, inline=place == "inline")
    ends = [Endpoint(node.site, node.host.address(4)) for node in pair.nodes]
    ping(*ends)

    _assert_only_control_knows(pair.a, _patterns("new key", pair.a.host.key), "after the reload")
    _assert_nobody_but_control_knows(pair.a, old, "after the reload")


def _patterns(name: str, key: Path) -> dict[str, bytes]:
    """How a private key may stand in memory: its bytes, these as a number's limbs, and its PEM text."""
    lines = [line for line in key.read_text().splitlines() if line and not line.startswith("-")]
    raw = base64.b64decode("".join(lines))
    return {f"{name}, bytes": raw, f"{name}, number": raw[::-1], f"{name}, PEM": lines[0].encode()}


def _renew(pair: Pair, *, inline: bool) -> None:
    """A new key and certificate, which the program then reloads."""
    pair.certify(pair.a.host, (1,), fresh_key=True)
    if inline:
        pair.a.extra = {"pki": {"key": pair.a.host.key.read_text()}}
        pair.a.write_config()
    reloads = len(pair.a.log_lines("config reloaded"))
    pair.a.send_signal(signal.SIGHUP)
    wait_until(lambda: len(pair.a.log_lines("config reloaded")) > reloads, "the reload", within_s=_WITHIN_S)


def _assert_only_control_knows(node: Node, patterns: dict[str, bytes], when: str) -> None:
    finds = _assert_nobody_but_control_knows(node, patterns, when)
    assert finds, f"{when}: not even control has the key, so this search proves nothing"


def _assert_nobody_but_control_knows(node: Node, patterns: dict[str, bytes], when: str) -> list[Find]:
    """What was found in control."""
    finds = _search(node, patterns, when)
    elsewhere = {name: found for name, found in finds.items() if found and name != "control"}
    assert not elsewhere, f"{when}: {elsewhere}"
    return finds["control"]


def _search(node: Node, patterns: dict[str, bytes], when: str) -> dict[str, list[Find]]:
    finds = {}
    for name, pid in _pids(node).items():
        found = scan(pid, patterns)
        print(f"{when}: {name}: {found.scanned_bytes >> 20} MiB searched, {_told(found.finds)}")
        assert not found.unread, f"{name}: {found.unread}"
        finds[name] = found.finds
    return finds


def _told(finds: Sequence[Find]) -> str:
    return (
        ", ".join(sorted({f"{find.what} in {find.where.strip() or 'anonymous memory'}" for find in finds}))
        or "nothing"
    )


def test_the_keys_of_a_tunnel_are_known_to_control_and_the_readers(make_pair: MakePair) -> None:
    pair = _pair(make_pair)
    _start(pair)
    newcomer = Newcomer(pair, "host-c", ["10.42.0.3/24"])
    newcomer.shake_hands(pair.a, within_s=_WITHIN_S)
    newcomer.prove()
    newcomer.close()
    assert newcomer.session is not None
    keys = newcomer.session.keys
    assert len(keys.send) == len(keys.receive) == _SESSION_KEY_BYTES

    finds = _search(
        pair.a, {"to us": bytes(keys.send), "from us": bytes(keys.receive)}, "one handshake later"
    )

    for name, found in finds.items():
        whats = {find.what for find in found}
        assert whats == ({"to us", "from us"} if name == "control" or name in _READERS else set()), name
