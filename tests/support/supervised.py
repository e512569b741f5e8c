"""A supervisor in a network of its own, whose children are stand-ins that do as the test says.

Data flow: tests -> [support.supervised] -> nebula_mp.supervisor.serve in a process -> stand-ins
Everything else is real: device, sockets, shared memory, forks, privileges, the check of a reload. The test tells
a stand-in what to do by a word in shared memory, and hears from it in the log: `heard`, `told`, `begins`.
Needs root.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from mmap import mmap
from pathlib import Path
from select import POLLERR, poll, select
from typing import Any, Final

from nebula_mp import clock, supervisor
from nebula_mp.cert.codec import encode_pem
from nebula_mp.cert.keys import encode_private_key
from nebula_mp.config.load import LoadedConfig
from nebula_mp.config.model import (
    Config,
    DrainMode,
    KernelChoice,
    ListenConfig,
    LoggingConfig,
    LogLevel,
    MpConfig,
    Offloads,
    PkiConfig,
    TunConfig,
)
from nebula_mp.config.report import Place
from nebula_mp.errors import ConfigError, RingError
from nebula_mp.newtypes import CertVersion
from nebula_mp.shm import GENERATION, load_word
from nebula_mp.shm_ring import LEASE, holder_word
from nebula_mp.shm_stats import SLOTS, StatsPage
from nebula_mp.shm_table import LIVE
from nebula_mp.workers import logs, restarts
from nebula_mp.workers.channel import Channel, Message
from nebula_mp.workers.checked import Check
from nebula_mp.workers.parts import ControlParts, Parts, ReaderParts, Role, ServicesParts, WriterParts
from nebula_mp.workers.spawn import FINISH, Main
from tests.support.pki import ANY_TIME, Pki
from tests.support.private_net import private_network
from tests.support.processes import Forked, eventually

PATIENCE_S: Final = 30.0
DEVICE: Final = "nmp-sup"
WORKERS_MAX: Final = 4
_NAP_S: Final = 0.01
_STICKY: Final = 1 << 16


class Order(IntEnum):
    """What a stand-in can be told to do. One is obeyed once, unless it is sticky."""

    NOTHING = 0
    END = 1  # with exit code 0
    CRASH = 2  # with exit code 1
    LOSE_DESCRIPTOR = 3
    CONTRADICT = 4  # as a ring of its own does
    HANG = 5  # without showing that it lives
    BE_DEAF = 6  # live, but never do what it is told, nor notice anything
    TAKE_LEASE = 7  # of the seal ring, as who drains it
    # control only:
    FIND_BAD_RING = 10  # in the upcalls of worker 0
    REFUSE_RELOAD = 11  # the next one
    IGNORE_RELOAD = 12  # the next one
    BABBLE = 13  # send what is no message
    # services only:
    ASK_RELOAD = 20
    ASK_STOP = 21
    ASK_WORKERS = 22
    ASK_NONSENSE = 23


class Orders:
    """A word for each process, which it shares with the test."""

    def __init__(self) -> None:
        self._words = memoryview(mmap(-1, 4096)).cast("Q")

    @staticmethod
    def _place(name: str) -> int:
        role, _, number = name.partition("/")
        return list(Role).index(Role(role)) * WORKERS_MAX + int(number or 0)

    def give(self, name: str, order: Order, *, sticky: bool = False) -> None:
        self._words[self._place(name)] = order | (_STICKY if sticky else 0)

    def peek(self, name: str) -> Order:
        """What waits to be obeyed."""
        return Order(self._words[self._place(name)] & ~_STICKY)

    def take(self, name: str) -> Order:
        word = self._words[self._place(name)]
        if not word & _STICKY:
            self._words[self._place(name)] = Order.NOTHING
        return Order(word & ~_STICKY)


class StandIn:
    """A process that beats, obeys orders, and says in the log what it hears."""

    def __init__(self, parts: Parts, orders: Orders) -> None:
        self.parts = parts
        self.orders = orders
        self.deaf = False
        self.told = False
        self.page = StatsPage(parts.stats, writable=True)
        logs.Logs(parts.logging, parts.log)
        signal.signal(FINISH, self._on_finish)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (FINISH,))

    def say(self, message: str, **fields: object) -> None:
        logs.write(LogLevel.INFO, message, {"who": self.parts.name, **fields})

    def _on_finish(self, *_: object) -> None:
        self.told = True

    def run(self) -> int:
        self.begin()
        while True:
            self.page.add(SLOTS["mp.passes"])
            if self.told:
                self.say("told")
                if not self.deaf:
                    return 0
                self.told = False
            match self.orders.take(self.parts.name):
                case Order.NOTHING:
                    pass
                case Order.END | Order.CRASH | Order.LOSE_DESCRIPTOR as order:
                    return {Order.END: 0, Order.CRASH: 1, Order.LOSE_DESCRIPTOR: 3}[order]
                case Order.CONTRADICT:
                    raise RingError("seal/0", "head", 7, "0..3")
                case Order.HANG:
                    while True:
                        time.sleep(1)
                case Order.BE_DEAF:
                    self.deaf = True
                    self.say("deaf")
                case Order.TAKE_LEASE:
                    self.take_lease()
                case order:
                    self.obey(order)
            if self.turn():
                return 0

    def begin(self) -> None:
        fields: dict[str, object] = {}
        if isinstance(self.parts, ReaderParts):
            rings = self.parts.memory
            fields = {
                "generations": [
                    load_word(ring.data, GENERATION) for ring in (rings.seal_ring, rings.upcall_ring)
                ]
                + [load_word(ring.data, GENERATION) for ring in rings.strangers_in.values()],
                "lease": load_word(self.parts.seal_ring.state, LEASE),
                "overlay": [str(network) for network in self.parts.overlay],
                "live": [load_word(span, LIVE) for span in rings.spans],
            }
        if isinstance(self.parts, ControlParts):
            fields = {"owners": self.parts.owners}
        self.say("begins", start=self.parts.start, **fields)

    def take_lease(self) -> None:
        assert isinstance(self.parts, ReaderParts | WriterParts)
        word = holder_word(os.getpid(), self.parts.start)
        os.pwrite(self.parts.seal_ring.state, word.to_bytes(8, "little"), 8 * LEASE)
        self.say("drains")

    def obey(self, order: Order) -> None:
        raise AssertionError(order)

    def turn(self) -> bool:
        """Whether it is over."""
        if isinstance(self.parts, ReaderParts | WriterParts) and not self.deaf:
            tun = poll()
            tun.register(self.parts.tun, POLLERR)
            if tun.poll(0):
                self.orders.give(self.parts.name, Order.LOSE_DESCRIPTOR)
                return False
        time.sleep(_NAP_S)
        return False


class StandInControl(StandIn):
    parts: ControlParts

    def begin(self) -> None:
        self.supervisor = Channel(self.parts.supervisor, "supervisor")
        self.next_reload = Order.NOTHING
        super().begin()
        if self.orders.peek("control") is Order.NOTHING:  # else it is not to become ready
            self.supervisor.send("ready")

    def obey(self, order: Order) -> None:
        match order:
            case Order.FIND_BAD_RING:
                self.supervisor.send("bad_ring", {"worker": 0})
            case Order.BABBLE:
                os.write(self.parts.supervisor, b"?!")
            case _:
                self.next_reload = order

    def turn(self) -> bool:
        select([self.parts.supervisor], [], [], _NAP_S)
        over = False
        for message in self.supervisor.receive():
            over |= self._hear(message)
        return over

    def _hear(self, message: Message) -> bool:
        words = {key: value for key, value in message.body.items() if key != "checked"}
        self.say("heard", kind=message.kind, count=len(message.descriptors), **words)
        message.close()
        if self.deaf:
            return False
        if message.kind == "reload":
            order, self.next_reload = self.next_reload, Order.NOTHING
            error = "not today" if order is Order.REFUSE_RELOAD else None
            if order is not Order.IGNORE_RELOAD:
                body = {"id": message.body["id"], "error": error, "warnings": ["one of control's"]}
                self.supervisor.send("reloaded", body)
        if message.kind == "stop":
            self.supervisor.send("stopped")
        return message.kind == "stop"


class StandInServices(StandIn):
    parts: ServicesParts

    def begin(self) -> None:
        self.supervisor = Channel(self.parts.supervisor, "supervisor")
        self.asked = 0
        super().begin()
        self.supervisor.send("ready")

    def obey(self, order: Order) -> None:
        self.asked += 1
        name = order.name.removeprefix("ASK_").lower()
        self.supervisor.send("command", {"id": self.asked, "name": name})

    def turn(self) -> bool:
        select([self.parts.log_source, self.parts.supervisor], [], [], _NAP_S)
        stop = False
        for message in self.supervisor.receive():
            words = {key: value for key, value in message.body.items() if key != "checked"}
            devices = [name for _, name in socket.if_nameindex()]
            self.say("heard", kind=message.kind, devices=devices, **words)
            stop |= message.kind == "stop"
        with contextlib.suppress(BlockingIOError):
            while lines := os.read(self.parts.log_source, 65536):
                os.write(self.parts.output, lines)
        return stop


def stand_ins(orders: Orders) -> Mapping[Role, Main]:
    """The mains of all roles."""
    kinds = {Role.CONTROL: StandInControl, Role.SERVICES: StandInServices}

    def main_of(kind: type[StandIn]) -> Main:
        return lambda parts: kind(parts, orders).run()

    return {role: main_of(kinds.get(role, StandIn)) for role in Role}


@dataclass
class Ended:
    """How a supervisor ended."""

    code: int | None = None
    error: str | None = None


def mapped_memory(pid: int) -> dict[str, str]:
    """Names of the anonymous files that a process maps, by inode."""
    lines = (line.split(maxsplit=5) for line in Path(f"/proc/{pid}/maps").read_text().splitlines())
    return {line[4]: line[5] for line in lines if len(line) == 6 and "memfd" in line[5]}


class Supervised:
    """`start`, then `give` orders and `wait` for log records; `close` at the end."""

    def __init__(self, home: Path) -> None:
        self.inherited: dict[str, str] = {}  # what the supervisor mapped when it was forked
        self.home = home
        self.orders = Orders()
        self.log_path = home / "log"
        self.log_path.touch()
        self.result_path = home / "result"
        self.notes_path = home / "config.json"
        self.process: Forked | None = None
        self.certify("10.42.0.1/24")

    def certify(self, *networks: str, versions: tuple[CertVersion, ...] = (CertVersion.V2,)) -> None:
        """Give it certificates with these addresses, from the next load of the configuration on."""
        pki = Pki.shared()
        identity = pki.identity("host", *networks, versions=versions)
        for name, text in (
            ("ca.crt", encode_pem(pki.ca)),
            ("host.crt", "".join(map(encode_pem, identity.certificates.values()))),
            ("host.key", encode_private_key(identity.private_key)),
        ):
            (self.home / name).write_text(text)
            (self.home / name).chmod(0o600)

    def configure(self, **notes: object) -> None:
        """What the next load of the configuration finds: `workers`, `mtu`, `dev`, `port`, `so_mark`,
        `level`, `offload`, `kernel`, `bad`.
        """
        self.notes_path.write_text(json.dumps(notes))

    def load(self) -> LoadedConfig:
        """Stand for config.load; runs in the process that checks."""
        clock.wall_s = lambda: ANY_TIME
        notes = json.loads(self.notes_path.read_text())
        if notes.get("bad"):
            raise ConfigError("config.yml:1:1: tun.mtu: is nonsense")
        config = Config(
            pki=PkiConfig(
                ca=f"{self.home}/ca.crt", cert=f"{self.home}/host.crt", key=f"{self.home}/host.key"
            ),
            listen=ListenConfig(host="127.0.0.1", port=notes.get("port", 0), so_mark=notes.get("so_mark", 0)),
            tun=TunConfig(dev=notes.get("dev", DEVICE), mtu=notes.get("mtu", 1300)),
            logging=LoggingConfig(level=LogLevel(notes.get("level", "info")), format="json"),
            mp=MpConfig(
                run_dir=str(self.home / "run"),
                workers=notes.get("workers", 1),
                drain=DrainMode.READER,
                kernel=KernelChoice(notes.get("kernel", "python")),
                user="nobody",
                offload=Offloads(**notes.get("offload", {})),
            ),
        )
        file = self.home / "config.yml"
        places = {f"pki.{key}": Place(0, line, 7, file) for line, key in enumerate(("ca", "cert", "key"), 2)}
        return LoadedConfig(config, ("a warning of the configuration",), (file,), places)

    # ---- life ----

    def launch(
        self, *, prepare: Callable[[], object] = lambda: None, environment: Mapping[str, str] = {}
    ) -> None:
        """Start it and return at once; `prepare` runs in its process first."""
        self.result_path.unlink(missing_ok=True)
        if not self.notes_path.exists():
            self.configure()

        def main() -> None:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            network = private_network()
            network.__enter__()  # for good: the right to leave it is given up
            os.environ.update(environment)
            log = os.open(self.log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            os.dup2(log, 1)
            os.close(log)
            prepare()
            ended: dict[str, object] = {}
            try:
                checked = Check.begin(self.load).finish()
                piped = logs.Logs(checked.config.logging)
                ended["code"] = supervisor.serve(checked, self.load, piped, mains=stand_ins(self.orders))
            except BaseException as error:
                ended["error"] = f"{type(error).__name__}: {error}"
                raise
            finally:
                self.result_path.write_text(json.dumps(ended))

        self.inherited = mapped_memory(os.getpid())
        self.process = Forked(main)

    def start(self, **keys: Any) -> None:
        """Start it and wait until it is up."""
        self.launch(**keys)
        self.wait("Nebula interface is active")

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def ended(self) -> Ended:
        """Wait for its end, and say how `serve` ended."""
        self.wait_for_exit()
        return Ended(**json.loads(self.result_path.read_text()))

    def wait_for_exit(self) -> int:
        """Wait for its end, and give its exit status."""
        assert self.process is not None
        process = self.process
        assert eventually(lambda: os.waitid(os.P_PID, process.pid, _LOOK) is not None, PATIENCE_S), self.text
        return process.wait()

    def kill_twice(self) -> None:
        """Two signals that ask it to stop, so close that the second comes while it is stopping."""
        os.kill(self.pid, signal.SIGSTOP)
        os.kill(self.pid, signal.SIGTERM)
        os.kill(self.pid, signal.SIGINT)
        os.kill(self.pid, signal.SIGCONT)

    def stop(self) -> Ended:
        """SIGTERM, and wait for its end."""
        self.send(signal.SIGTERM)
        return self.ended()

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()

    # ---- what it says ----

    @property
    def text(self) -> str:
        return self.log_path.read_text()

    def records(self, message: str, **fields: object) -> list[dict[str, Any]]:
        """The log records with this message and these fields, so far."""
        found = []
        for line in self.text.splitlines():
            with contextlib.suppress(ValueError):  # half a line, or a stack
                record = json.loads(line)
                if record["msg"] == message and fields.items() <= record.items():
                    found.append(record)
        return found

    def wait(self, message: str, *, count: int = 1, **fields: object) -> dict[str, Any]:
        """Wait until there are so many such records; gives the last of them."""
        assert eventually(lambda: len(self.records(message, **fields)) >= count, PATIENCE_S), (
            f"not said {count} times: {message} {fields}\n{self.text}"
        )
        return self.records(message, **fields)[count - 1]

    def messages(self) -> list[str]:
        """Every message, in its order, with who said or heard what."""
        told = []
        for line in self.text.splitlines():
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                told.append(" ".join(filter(None, (record["msg"], record.get("who"), record.get("kind")))))
        return told

    # ---- its children ----

    def starts(self, name: str) -> int:
        """How often the process of this name was started."""
        return len(self.records("worker started", role=name))

    def child(self, name: str) -> int:
        """The process id of the latest of this name."""
        pid: int = self.records("worker started", role=name)[-1]["pid"]
        return pid

    def wait_for_start(self, name: str, number: int) -> int:
        """Wait until it was started `number` times and begins; gives its process id."""
        pid: int = self.wait("worker started", role=name, count=number)["pid"]
        self.wait("begins", who=name, count=number)
        return pid

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        os.kill(self.child(name), number)

    def ask(self, order: Order) -> dict[str, Any]:
        """Let services ask the supervisor; gives the answer it hears."""
        before = len(self.records("heard", who="services", kind="answer"))
        self.orders.give("services", order)
        return self.wait("heard", who="services", kind="answer", count=before + 1)

    def pids(self) -> list[int]:
        """Every child that was ever started."""
        return [record["pid"] for record in self.records("worker started")]

    def in_network(self, *argv: str) -> str:
        """Run a program in the supervisor's network; what it prints."""
        command = ["nsenter", f"--net=/proc/{self.pid}/ns/net", *argv]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def link(self) -> str:
        """What `ip` says of the device."""
        return self.in_network("ip", "-o", "link", "show", "dev", DEVICE)


_LOOK: Final = os.WEXITED | os.WNOHANG | os.WNOWAIT


@contextlib.contextmanager
def supervised(home: Path) -> Iterator[Supervised]:
    """One that ends with the block."""
    made = Supervised(home)
    try:
        yield made
    finally:
        made.close()


def is_alive(pid: int) -> bool:
    """Whether the process runs; a dead one that nobody has waited for does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def with_policy(**values: object) -> Callable[[], None]:
    """Give what changes the numbers of `restarts`, for `launch`."""

    def change() -> None:
        for name, value in values.items():
            setattr(restarts, name, value)

    return change
