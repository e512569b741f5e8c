"""The services process, with the test in the places of supervisor, control and clients."""

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from ipaddress import ip_address, ip_interface
from pathlib import Path
from types import MappingProxyType

import pytest

from nebula_mp.cli.client import Client
from nebula_mp.config.model import Config, HostPort, LoggingConfig, LogLevel, PkiConfig, StaticMapConfig
from nebula_mp.errors import InstanceError
from nebula_mp.newtypes import Seconds
from nebula_mp.privileges import find_account, lock_down_child
from nebula_mp.shm_stats import StatsPage, create_page
from nebula_mp.workers import checked, local_api, logs, services
from nebula_mp.workers.channel import Channel, Message, channel_pair, discard
from nebula_mp.workers.checked import Checked, PkiSources
from nebula_mp.workers.instance import Instance
from nebula_mp.workers.parts import Role, ServicesParts, descriptors
from tests.support.processes import Forked, eventually, forked

_WAIT_S = 20.0


def configuration(*hosts: str, logging: LoggingConfig | None = None, cadence: float = 600) -> Checked:
    entries = tuple(
        HostPort(host=host.rpartition(":")[0], port=int(host.rpartition(":")[2])) for host in hosts
    )
    config = Config(
        pki=PkiConfig(ca="CA", cert="CERT", key=""),
        static_host_map=MappingProxyType({ip_address("10.42.0.2"): entries}),
        static_map=StaticMapConfig(cadence=Seconds(cadence), lookup_timeout=Seconds(1)),
        logging=logging or LoggingConfig(disable_timestamp=True),
    )
    return Checked(
        config=config,
        pki_sources=PkiSources(cert="pki.cert c", key="pki.key k", ca="pki.ca a"),
        warnings=(),
        sources=("c.yml",),
        networks=(ip_interface("10.42.0.1/24"),),
        name="host",
        at=0,
        key=-1,
    )


class End:
    """An end of a channel that the test reads as somebody else would."""

    def __init__(self, descriptor: int) -> None:
        self.channel = Channel(descriptor, "services")
        self._waiting: list[Message] = []

    def next(self) -> Message:
        while not self._waiting:
            assert select.select([self.channel], [], [], _WAIT_S)[0], "services says nothing"
            self._waiting = self.channel.receive()
        return self._waiting.pop(0)


class Gateway:
    """Everything that services is given, and the other ends of it. `parts` may be given to several starts."""

    def __init__(self, directory: Path, undo: contextlib.ExitStack) -> None:
        self.instance = Instance.claim(str(directory), "nebula1")
        undo.callback(self.instance.release)
        self.listener = undo.enter_context(self.instance.listen())
        self.page = create_page("services")
        undo.callback(self.page.close)
        self.log_source, self.log = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.printed, self.output = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self.printed, False)
        supervisor, self.supervisors_end = channel_pair()
        control, self.controls_end = channel_pair()
        self.supervisor, self.control = End(supervisor), End(control)
        for descriptor in (
            self.log_source, self.log, self.printed, self.output, supervisor, self.supervisors_end, control,
            self.controls_end,
        ):  # fmt: skip
            undo.callback(os.close, descriptor)
        self.text = ""

    def parts(self, checked: Checked, start: int = 1) -> ServicesParts:
        return ServicesParts(
            role=Role.SERVICES,
            number=0,
            start=start,
            device="nebula1",
            kernel="python",
            stats=self.page.descriptor,
            log=self.log,
            logging=checked.config.logging,
            checked=checked,
            listener=self.listener.fileno(),
            uids=(os.geteuid(),),
            log_source=self.log_source,
            output=self.output,
            supervisor=self.supervisors_end,
            control=self.controls_end,
        )

    @contextlib.contextmanager
    def running(self, checked: Checked, start: int = 1) -> Iterator[Forked]:
        parts = self.parts(checked, start)

        def main() -> None:
            assert services.main(parts) == 0

        with forked(main) as child:
            assert self.supervisor.next().kind == "ready"
            yield child

    def tell_of_workers(self) -> None:
        """Answer as the supervisor of three workers, of which one runs."""
        asked = self.supervisor.next()
        assert asked.body["name"] == "workers"
        states = [("running", "running"), ("given up", "given up"), ("running", "backing off")]
        processes = [
            {"role": role, "worker": worker, "state": state}
            for worker, both in enumerate(states)
            for role, state in zip(("writer", "reader"), both, strict=True)
        ]
        processes.append({"role": "control", "worker": None, "state": "running"})
        body = {"id": asked.body["id"], "result": {"processes": processes}, "error": None}
        self.supervisor.channel.send("answer", body)

    def log_has(self, text: str) -> bool:
        return eventually(lambda: text in self.read(), _WAIT_S)

    def read(self) -> str:
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(self.printed, 65536):
                self.text += piece.decode()
        return self.text

    def client(self) -> Client:
        return Client(self.instance.socket_path, timeout_s=_WAIT_S)


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    with contextlib.ExitStack() as undo:
        yield Gateway(tmp_path, undo)


class Asking:
    """A command of a client that waits beside the test; `result` is its answer or the error's text."""

    def __init__(self, gateway: Gateway, command: str, client: Client | None = None) -> None:
        self.result: Mapping[str, object] | str = "nothing yet"
        self._thread = threading.Thread(target=self._ask, args=(client or gateway.client(), command))
        self._thread.start()

    def _ask(self, client: Client, command: str) -> None:
        try:
            with client:
                self.result = client.call(command)
        except InstanceError as error:
            self.result = str(error)

    def finish(self) -> Mapping[str, object] | str:
        self._thread.join(_WAIT_S)
        assert not self._thread.is_alive()
        return self.result


# ---- names ----


def test_the_hosts_of_the_configuration_are_told_to_control_at_once_and_whenever_it_asks(
    gateway: Gateway,
) -> None:
    with gateway.running(configuration("192.0.2.1:4242", "2001:db8::1:4243")):
        first = gateway.control.next()
        gateway.control.channel.send("resolve")
        again = gateway.control.next()

    assert first == Message("resolved", {"remotes": {"10.42.0.2": ["192.0.2.1:4242", "[2001:db8::1]:4243"]}})
    assert again == first


def test_a_name_is_looked_up_and_told_when_it_is_known(gateway: Gateway) -> None:
    with gateway.running(configuration("localhost:4242")):
        before, after = gateway.control.next(), gateway.control.next()

    assert before.body == {"remotes": {"10.42.0.2": []}}
    assert after.body == {"remotes": {"10.42.0.2": ["127.0.0.1:4242"]}}


def test_a_control_that_had_no_room_for_names_gets_them_later(gateway: Gateway) -> None:
    flood = Channel(gateway.controls_end, "")
    while flood.send("noise", {"pad": bytes(1000)}):
        pass

    with gateway.running(configuration("192.0.2.1:4242")):
        kinds = [gateway.control.next().kind]
        while kinds[-1] != "resolved":
            kinds.append(gateway.control.next().kind)

    assert len(kinds) > 10


def test_a_reload_replaces_the_names_and_keeps_what_was_found_out(gateway: Gateway) -> None:
    with gateway.running(configuration("localhost:4242")):
        gateway.control.next()
        gateway.control.next()
        new = checked.encode(configuration("localhost:1", "192.0.2.9:2"))
        gateway.supervisor.channel.send("reload", {"checked": new})

        reported = gateway.control.next()

    assert reported.body == {"remotes": {"10.42.0.2": ["127.0.0.1:1", "192.0.2.9:2"]}}


def test_a_reload_changes_how_services_itself_writes(gateway: Gateway) -> None:
    with gateway.running(configuration("localhost:4242", cadence=0.05)):
        assert gateway.log_has('msg="DNS results changed for host list"')
        json = configuration("localhost:4242", "nowhere.invalid:1", logging=LoggingConfig(format="json"))
        gateway.supervisor.channel.send("reload", {"checked": checked.encode(json)})

        assert gateway.log_has('"msg":"DNS resolution failed for static_map host"')


# ---- the log ----


def test_lines_of_all_processes_come_out_whole(gateway: Gateway) -> None:
    with gateway.running(configuration()):
        os.write(gateway.log, b"level=INFO msg=one\nlevel=INFO m")
        time.sleep(0.05)
        os.write(gateway.log, b"sg=two\n")

        assert gateway.log_has("level=INFO msg=one\nlevel=INFO msg=two\n")


def test_lines_written_while_there_were_no_services_come_out_then(gateway: Gateway) -> None:
    os.write(gateway.log, b"level=INFO msg=early\n")

    with gateway.running(configuration()):
        assert gateway.log_has("level=INFO msg=early\n")


def test_a_stuck_stdout_stops_nothing_and_the_loss_is_told_when_it_moves_again(gateway: Gateway) -> None:
    stats = StatsPage(gateway.page.read_only, writable=False)
    line = b"level=INFO msg=" + b"x" * 200 + b"\n"

    with gateway.running(configuration()):
        for _ in range(3000):
            assert eventually(lambda: bool(select.select([], [gateway.log], [], 1)[1]))
            os.write(gateway.log, line)
        assert eventually(lambda: not select.select([gateway.log_source], [], [], 0)[0])
        before = stats.snapshot()["mp.passes"]
        assert eventually(lambda: stats.snapshot()["mp.passes"] > before + 2)

        assert gateway.log_has('level=WARN msg="log lines lost" count=')

    lost = int(gateway.text.partition("count=")[2].split()[0])
    assert gateway.text.count(line.decode()) + lost == 3000


def test_what_is_left_in_the_pipe_is_written_out_at_the_end(gateway: Gateway) -> None:
    with gateway.running(configuration()) as child:
        for number in range(500):
            os.write(gateway.log, b"level=INFO msg=last number=%d\n" % number)
        gateway.supervisor.channel.send("stop")
        assert child.wait() == 0

    assert [line.rpartition("=")[2] for line in gateway.read().splitlines()] == [
        str(number) for number in range(500)
    ]


def test_a_stuck_stdout_does_not_hold_up_the_end(gateway: Gateway) -> None:
    os.set_blocking(gateway.output, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(gateway.output, bytes(4096))
    os.set_blocking(gateway.output, True)

    with gateway.running(configuration()) as child:
        os.write(gateway.log, b"level=INFO msg=unwritten\n")
        gateway.supervisor.channel.send("stop")

        assert child.wait() == 0


# ---- commands ----


def test_status_is_what_control_says_with_what_only_services_knows(gateway: Gateway) -> None:
    with gateway.running(configuration()):
        asking = Asking(gateway, "status")
        assert gateway.control.next().kind == "resolved"
        asked = gateway.control.next()
        answer = {
            "id": asked.body["id"],
            "result": {"hosts": [], "device": "?", "stats": {"a": 1, "mp.log.lost": 2}},
            "error": None,
        }
        gateway.control.channel.send("answer", answer)
        gateway.tell_of_workers()
        status = asking.finish()

    assert asked.kind == "status"
    assert isinstance(status, dict)
    uptime = status.pop("uptime_s")
    assert status == {
        "hosts": [],
        "device": "nebula1",
        "pid": os.getpid(),
        "stats": {"a": 1, "mp.log.lost": 2},
        "workers": {"running": 1, "configured": 3},
    }
    assert 0 <= uptime <= time.clock_gettime(time.CLOCK_BOOTTIME)


def test_a_large_status_comes_through(gateway: Gateway) -> None:
    hosts = [{"name": f"host-{number}", "pad": "x" * 100} for number in range(20_000)]
    with gateway.running(configuration()):
        asking = Asking(gateway, "status")
        gateway.control.next()
        body = {"id": gateway.control.next().body["id"], "result": {"hosts": hosts}, "error": None}
        gateway.control.channel.send("answer", body)
        gateway.tell_of_workers()
        status = asking.finish()

    assert isinstance(status, dict)
    assert status["hosts"] == hosts


def test_a_supervisor_that_is_too_busy_to_count_does_not_hold_back_a_status(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services, "STATUS_WAIT_S", 1.0)

    with gateway.running(configuration()):
        asking = Asking(gateway, "status")
        gateway.control.next()
        body = {"id": gateway.control.next().body["id"], "result": {"hosts": []}, "error": None}
        gateway.control.channel.send("answer", body)
        status = asking.finish()

    assert isinstance(status, dict)
    assert status["hosts"] == []
    assert "workers" not in status


def test_a_control_that_does_not_answer_is_said_to_be_restarting(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services, "STATUS_WAIT_S", 0.2)

    with gateway.running(configuration()):
        asking = Asking(gateway, "status")

        assert asking.finish() == (
            "nebula1: status failed: control does not answer within 0.2 s: it is being restarted; try again"
        )


def test_a_successor_of_control_is_asked_again(gateway: Gateway) -> None:
    with gateway.running(configuration()):
        asking = Asking(gateway, "status")
        gateway.control.next()
        number = gateway.control.next().body["id"]  # by a control that dies now
        gateway.control.channel.send("resolve")
        kinds = {message.kind: message for message in (gateway.control.next(), gateway.control.next())}
        gateway.control.channel.send("answer", {"id": number, "result": {"hosts": []}, "error": None})
        gateway.tell_of_workers()
        status = asking.finish()

    assert kinds.keys() == {"resolved", "status"}
    assert kinds["status"].body == {"id": number}
    assert isinstance(status, dict)
    assert status["hosts"] == []


@pytest.mark.parametrize("name", ["reload", "workers", "stop"])
def test_commands_go_to_the_supervisor_and_its_answers_come_back(name: str, gateway: Gateway) -> None:
    with gateway.running(configuration()):
        asking = Asking(gateway, name)
        asked = gateway.supervisor.next()
        answer = {"id": asked.body["id"], "result": {"for": name}, "error": None}
        gateway.supervisor.channel.send("answer", answer)

        assert asking.finish() == {"for": name}
    assert (asked.kind, asked.body["name"]) == ("command", name)


def test_a_refusal_of_the_supervisor_comes_back_in_its_words(gateway: Gateway) -> None:
    with gateway.running(configuration()):
        asking = Asking(gateway, "reload")
        number = gateway.supervisor.next().body["id"]
        gateway.supervisor.channel.send("answer", {"id": number, "result": None, "error": "pki.key: gone"})

        assert asking.finish() == "nebula1: reload failed: pki.key: gone"


def test_two_clients_get_each_its_own_answer(gateway: Gateway) -> None:
    with gateway.running(configuration()):
        one = Asking(gateway, "reload")
        first = gateway.supervisor.next()
        other = Asking(gateway, "workers")
        second = gateway.supervisor.next()
        for asked in (second, first):
            body = {"id": asked.body["id"], "result": {"for": asked.body["name"]}, "error": None}
            gateway.supervisor.channel.send("answer", body)

        assert (one.finish(), other.finish()) == ({"for": "reload"}, {"for": "workers"})


def test_an_answer_to_a_dead_predecessor_finds_nobody(gateway: Gateway) -> None:
    with gateway.running(configuration(), start=1):
        first = Asking(gateway, "reload")
        stale = gateway.supervisor.next().body["id"]
    first.finish()
    discard(gateway.supervisors_end)

    with gateway.running(configuration(), start=2):
        second = Asking(gateway, "reload")
        fresh = gateway.supervisor.next().body["id"]
        for number, text in ((stale, "old"), (fresh, "new")):
            body = {"id": number, "result": {"is": text}, "error": None}
            gateway.supervisor.channel.send("answer", body)

        assert second.finish() == {"is": "new"}


def test_the_client_of_stop_is_answered_at_once_and_hung_up_on_only_at_the_end(gateway: Gateway) -> None:
    with gateway.running(configuration()) as child, socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(_WAIT_S)
        raw.connect(str(gateway.instance.socket_path))
        raw.sendall(local_api.encode({"schema": local_api.SCHEMA, "command": "stop"}))
        number = gateway.supervisor.next().body["id"]
        gateway.supervisor.channel.send("answer", {"id": number, "result": {"pid": 1}, "error": None})
        answer = raw.recv(4096)
        still_there = not select.select([raw], [], [], 0.2)[0]
        gateway.supervisor.channel.send("stop")
        hung_up = raw.recv(4096)
        assert child.wait() == 0

    assert b"pid" in answer
    assert still_there
    assert hung_up == b""


def test_an_answer_and_the_end_in_one_breath_still_reach_the_client(gateway: Gateway) -> None:
    with gateway.running(configuration()) as child:
        asking = Asking(gateway, "stop")
        number = gateway.supervisor.next().body["id"]
        gateway.supervisor.channel.send("answer", {"id": number, "result": {"pid": 1}, "error": None})
        gateway.supervisor.channel.send("stop")
        assert child.wait() == 0

        assert asking.finish() == {"pid": 1}


def test_the_socket_outlives_a_services_process_and_serves_with_the_next(gateway: Gateway) -> None:
    with gateway.running(configuration()) as child:
        child.kill(signal.SIGKILL)
    client = gateway.client()

    with gateway.running(configuration(), start=2):
        waiting = Asking(gateway, "workers", client)
        number = gateway.supervisor.next().body["id"]
        gateway.supervisor.channel.send("answer", {"id": number, "result": {"ok": 1}, "error": None})

        assert waiting.finish() == {"ok": 1}
    assert gateway.instance.socket_path.exists()


# ---- faults ----


def test_it_shows_that_it_is_alive_while_nothing_happens(gateway: Gateway) -> None:
    stats = StatsPage(gateway.page.read_only, writable=False)

    with gateway.running(configuration()):
        seen = stats.snapshot()["mp.passes"]

        assert eventually(lambda: stats.snapshot()["mp.passes"] >= seen + 3)


@pytest.mark.parametrize("whose", ["control", "supervisor"])
def test_nonsense_on_a_channel_ends_it_with_1_and_is_said(whose: str, gateway: Gateway) -> None:
    parts = gateway.parts(configuration())

    def main() -> None:
        assert services.main(parts) == 1

    with forked(main) as child:
        assert gateway.supervisor.next().kind == "ready"
        end: End = getattr(gateway, whose)
        end.channel.send("answer", {"no": "id"})
        assert child.wait() == 0

    assert 'msg="unexpected error in services"' in gateway.read()


# ---- what a locked-down process can still do ----


def _lock_down(parts: ServicesParts, parent: int) -> None:
    account = find_account(None) if os.geteuid() == 0 else None
    lock_down_child(account=account, keep={2, *(fd for fd in descriptors(parts) if fd >= 0)}, parent=parent)


def _locked_down(gateway: Gateway, checked: Checked) -> Callable[[], None]:
    parts, parent = gateway.parts(checked), os.getpid()

    def main() -> None:
        _lock_down(parts, parent)
        assert (os.geteuid() != 0, dict(os.environ)) == (True, {})
        # Whatever is imported from here on would be missing where our files belong to another user.
        sys.meta_path.clear()
        sys.path_hooks.clear()
        assert services.main(parts) == 0

    return main


def test_without_rights_environment_and_our_files_it_looks_names_up_answers_and_writes_the_log(
    gateway: Gateway,
) -> None:
    hosts = configuration("localhost:4242", "nowhere.invalid:1")
    with forked(_locked_down(gateway, hosts)) as child:
        assert gateway.supervisor.next().kind == "ready"
        gateway.control.next()
        found = gateway.control.next()
        said = gateway.log_has("DNS resolution failed")
        asking = Asking(gateway, "workers")
        number = gateway.supervisor.next().body["id"]
        gateway.supervisor.channel.send("answer", {"id": number, "result": {"ok": 1}, "error": None})
        answer = asking.finish()
        gateway.supervisor.channel.send("reload", {"checked": checked.encode(configuration("192.0.2.1:1"))})
        reloaded = gateway.control.next()
        gateway.supervisor.channel.send("stop")
        code = child.wait()

    assert found.body == {"remotes": {"10.42.0.2": ["127.0.0.1:4242"]}}
    assert said
    assert answer == {"ok": 1}
    assert reloaded.body == {"remotes": {"10.42.0.2": ["192.0.2.1:1"]}}
    assert code == 0


def test_its_own_lines_go_the_way_of_all_lines(gateway: Gateway) -> None:
    with gateway.running(configuration("nowhere.invalid:1")):
        log = logs.Logs(LoggingConfig(disable_timestamp=True), gateway.log)
        logs.write(LogLevel.WARN, "from another process")
        log.close()

        assert gateway.log_has('level=ERROR msg="DNS resolution failed for static_map host"')
        assert gateway.log_has('level=WARN msg="from another process"\n')


def test_the_import_loads_all_that_a_name_look_up_needs_of_our_files() -> None:
    script = (
        "import socket, sys\n"
        "from nebula_mp.workers import services\n"
        "sys.meta_path.clear(), sys.path_hooks.clear()\n"
        "print(socket.getaddrinfo('localhost', None, socket.AF_INET, socket.SOCK_DGRAM)[0][4][0])"
    )

    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )

    assert (ended.stdout, ended.stderr) == ("127.0.0.1\n", "")
