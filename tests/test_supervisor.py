"""The supervisor with stand-ins for its children: what it starts, notices, restarts, gives up and ends.

Device, sockets, forks, privileges and shared memory are real, in a network of the test's own.
"""

import os
import re
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nebula_mp import supervisor
from nebula_mp.datapath import kernels
from nebula_mp.errors import SystemCallError
from nebula_mp.newtypes import CertVersion
from nebula_mp.privileges import SUPERVISOR_AS_ROOT, inspect_process
from nebula_mp.workers.host import Host
from tests.support.processes import eventually
from tests.support.supervised import (
    DEVICE,
    PATIENCE_S,
    Order,
    Supervised,
    is_alive,
    mapped_memory,
    supervised,
    with_policy,
)

pytestmark = pytest.mark.e2e
ALL = ["services", "control", "writer/0", "reader/0"]


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Supervised]:
    with supervised(tmp_path) as made:
        yield made


@pytest.fixture
def running(gateway: Supervised) -> Supervised:
    gateway.start()
    return gateway


def soon(condition: object) -> bool:
    return eventually(condition, PATIENCE_S)  # type: ignore[arg-type]


# ---- start ----


def test_it_starts_services_control_writers_and_readers_and_says_so(running: Supervised) -> None:
    assert [record["role"] for record in running.records("worker started")] == ALL
    active = running.records("Nebula interface is active")[0]
    assert active["interface"] == DEVICE
    assert active["networks"] == ["10.42.0.1/24"]
    assert (active["kernel"], active["workers"], active["drain"]) == ("python", 1, "reader")
    assert running.records("listening")[0]["addr"] == active["udpAddr"]
    assert running.records("a warning of the configuration")
    assert "mtu 1300" in running.link()
    assert " 10.42.0.1/24 " in running.in_network("ip", "-o", "address", "show", "dev", DEVICE)


def not_installed() -> None:
    kernels.is_installed = lambda: False


def broken() -> None:
    kernels.is_installed = lambda: True
    kernels._why_unusable = lambda: "it is older than this program"


@pytest.mark.parametrize(
    ("prepare", "level", "reason"),
    [(not_installed, "INFO", "is not installed"), (broken, "WARN", "it is older than this program")],
)
def test_why_the_accelerator_is_not_used_is_said(
    prepare: Callable[[], None], level: str, reason: str, gateway: Supervised
) -> None:
    gateway.configure(kernel="auto")
    gateway.start(prepare=prepare)

    assert gateway.records("Nebula interface is active")[0]["kernel"] == "python"
    said = gateway.wait("accelerator not used")
    assert said["level"] == level
    assert reason in said["reason"]


@pytest.mark.parametrize("prepare", [not_installed, broken])
def test_without_the_accelerator_that_was_asked_for_nothing_starts(
    prepare: Callable[[], None], gateway: Supervised
) -> None:
    gateway.configure(kernel="rust")
    gateway.launch(prepare=prepare)

    error = gateway.ended().error
    assert error is not None
    assert error.startswith("KernelError: the native kernel was asked for and cannot be used: ")
    assert not (gateway.home / "run").exists()


def test_the_kernel_that_was_asked_for_in_python_needs_no_explanation(running: Supervised) -> None:
    running.wait("offloads")

    assert running.records("accelerator not used") == []


@pytest.mark.native
def test_the_accelerator_is_loaded_before_the_first_fork(gateway: Supervised) -> None:
    gateway.configure(kernel="rust")
    gateway.start()

    assert gateway.records("Nebula interface is active")[0]["kernel"] == "rust"
    for pid in (gateway.pid, *map(gateway.child, ALL)):
        assert "/_accel." in Path(f"/proc/{pid}/maps").read_text()


def test_the_service_manager_hears_of_it_when_it_is_up_and_when_it_ends(
    gateway: Supervised, tmp_path: Path
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(PATIENCE_S)
        gateway.launch(environment={"NOTIFY_SOCKET": str(tmp_path / "notify")})

        heard = manager.recv(1024).decode()
        assert re.fullmatch(rf"READY=1\nSTATUS=device {DEVICE}, listening on 127.0.0.1:\d+", heard)
        gateway.send(signal.SIGHUP)
        assert manager.recv(1024).decode().startswith("RELOADING=1\nMONOTONIC_USEC=")
        assert manager.recv(1024).decode() == "READY=1"

        gateway.send(signal.SIGTERM)
        assert manager.recv(1024).decode() == "STOPPING=1"
        assert gateway.ended().code == 0


def test_it_keeps_few_rights_and_maps_none_of_the_shared_memory(running: Supervised) -> None:
    facts = inspect_process(running.pid)

    assert facts.effective == facts.permitted == {int(capability) for capability in SUPERVISOR_AS_ROOT}
    assert facts.no_new_privs
    assert facts.threads == 1
    # It was forked from pytest, whose other tests may have left memory of theirs mapped.
    assert not mapped_memory(running.pid).keys() - running.inherited.keys()
    title = Path(f"/proc/{running.pid}/cmdline").read_text()
    assert title.startswith(f"nebula-mp: supervisor {DEVICE}")


def test_every_child_is_nobody_and_has_its_own_descriptors_only(running: Supervised) -> None:
    for name in ALL:
        facts = inspect_process(running.child(name))

        assert facts.uids == (65534,) * 4
        assert facts.permitted == frozenset()
        assert facts.no_new_privs
        keys = [each for each in facts.descriptors if "private key" in each.target]
        assert len(keys) == (name == "control"), name


def test_as_many_workers_as_configured_share_device_and_port(gateway: Supervised) -> None:
    gateway.configure(workers=3)
    gateway.start()

    assert gateway.records("Nebula interface is active")[0]["workers"] == 3
    assert {f"{role}/{number}" for role in ("reader", "writer") for number in range(3)} <= {
        record["role"] for record in gateway.records("worker started")
    }
    assert len(gateway.in_network("ss", "-Hlun").splitlines()) == 4


def test_the_offloads_in_force_are_said_at_the_start(running: Supervised) -> None:
    said = running.wait("offloads")

    wanted = {"tso": True, "uso": True, "udpSegment": True, "udpGro": True, "queues": 1}
    assert {name: said[name] for name in wanted} == wanted
    assert said["gsoMaxSegs"] in (49, 65_535)  # as we forward or not


def test_one_worker_because_of_the_configuration_is_said_and_no_warning(gateway: Supervised) -> None:
    gateway.configure(workers=3, offload={"multiqueue": False})
    gateway.start()

    said = gateway.wait("one worker, as mp.offload.multiqueue is off")
    assert (said["level"], said["wanted"]) == ("INFO", 3)
    assert gateway.records("offloads")[0]["queues"] == 1
    assert [record["role"] for record in gateway.records("worker started")] == ALL


def test_a_gateway_that_cannot_start_leaves_nothing(gateway: Supervised) -> None:
    gateway.orders.give("control", Order.CRASH)
    gateway.launch()

    ended = gateway.ended()

    assert ended.error == (
        "SystemCallError: control ended (code 1) while the gateway was starting: the log may say why"
    )
    assert not [pid for pid in gateway.pids() if is_alive(pid)]
    assert list((gateway.home / "run").iterdir()) == []
    assert gateway.records("begins", who="control")  # the log got out
    assert not gateway.records("Nebula interface is active")


def test_a_step_that_fails_undoes_those_before_it(gateway: Supervised) -> None:
    gateway.configure(port=4242)
    taken: list[socket.socket] = []

    def take_the_port() -> None:
        taken.append(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        taken[0].bind(("127.0.0.1", 4242))

    gateway.launch(prepare=take_the_port)

    error = gateway.ended().error
    assert error is not None
    assert error.startswith("SystemCallError: udp 127.0.0.1:4242: the port is taken by ")
    assert list((gateway.home / "run").iterdir()) == []
    assert not gateway.pids()


def test_a_signal_before_it_is_up_ends_it_in_order(gateway: Supervised) -> None:
    gateway.orders.give("control", Order.HANG)
    gateway.launch()
    gateway.wait("begins", who="control")

    assert gateway.stop().code == 0
    assert not [pid for pid in gateway.pids() if is_alive(pid)]


# ---- deaths ----


@pytest.mark.parametrize("name", ALL)
def test_a_child_that_was_killed_is_named_and_started_again_and_no_other(
    running: Supervised, name: str
) -> None:
    others = {other: running.child(other) for other in ALL if other != name}
    dead = running.child(name)

    running.kill(name)
    running.wait_for_start(name, 2)

    message = "worker ended" if "/" in name else f"{name} ended"
    record = running.wait(message)
    assert (record["role"], record["pid"], record["signal"]) == (name, dead, "SIGKILL")
    assert record["restarts"] == 1
    assert record["silenceMs"] < 10_000
    assert record.get("tunnelsKept") == (0 if name == "control" else None)
    assert {other: running.child(other) for other in others} == others
    assert running.stop().code == 0


def test_a_ring_that_a_dead_one_was_draining_is_free_for_the_others(running: Supervised) -> None:
    running.orders.give("writer/0", Order.TAKE_LEASE)
    running.wait("drains")
    running.kill("reader/0")
    running.wait_for_start("reader/0", 2)
    running.kill("writer/0")
    running.wait_for_start("writer/0", 2)
    running.kill("reader/0")
    running.wait_for_start("reader/0", 3)

    leases = [record["lease"] for record in running.records("begins", who="reader/0")]

    assert leases[0] == leases[2] == 0
    assert leases[1] != 0  # its holder was alive


def test_an_exit_nobody_asked_for_is_a_death_too(running: Supervised) -> None:
    running.orders.give("writer/0", Order.END)
    running.wait_for_start("writer/0", 2)

    assert running.wait("worker ended")["code"] == 0


def test_no_two_starts_have_a_number_in_common(running: Supervised) -> None:
    running.kill("reader/0")
    running.wait_for_start("reader/0", 2)
    running.kill("control")
    running.wait_for_start("control", 2)

    starts = [record["start"] for record in running.records("begins")]

    assert len(set(starts)) == len(starts) == len(ALL) + 2


def test_whoever_stands_still_is_found_out_killed_and_replaced(running: Supervised) -> None:
    stopped = running.child("reader/0")

    running.kill("reader/0", signal.SIGSTOP)
    running.wait_for_start("reader/0", 2)

    record = running.wait("worker stuck")
    assert (record["role"], record["pid"]) == ("reader/0", stopped)
    assert running.wait("worker ended")["signal"] in {"SIGABRT", "SIGKILL"}
    assert len(running.records("worker stuck")) == 1


def test_a_stuck_process_says_where_it_was(running: Supervised) -> None:
    running.orders.give("control", Order.HANG)
    running.wait_for_start("control", 2)

    assert running.wait("control ended")["signal"] == "SIGABRT"
    assert "Fatal Python error: Aborted" in running.text
    assert "in run" in running.text


def test_five_deaths_in_a_short_time_give_a_worker_up_while_another_is_left(gateway: Supervised) -> None:
    gateway.configure(workers=2)
    gateway.start()

    gateway.orders.give("writer/1", Order.CRASH, sticky=True)

    record = gateway.wait("worker keeps failing")
    assert (record["worker"], record["takenOverBy"]) == (1, 0)
    assert gateway.wait("heard", who="control", kind="owners")["owners"] == [0, 0]
    assert len(gateway.records("worker ended", role="writer/1")) == 5
    assert gateway.starts("writer/1") == 5
    assert gateway.starts("reader/1") == 1
    assert not is_alive(gateway.child("reader/1"))
    assert "numqueues 1 numdisabled 1" in gateway.in_network("ip", "-d", "link", "show", "dev", DEVICE)
    gateway.kill("reader/0")
    gateway.wait_for_start("reader/0", 2)
    assert [record["live"] for record in gateway.records("begins", who="reader/0")] == [[1, 1], [1, 0]]
    gateway.kill("control")
    gateway.wait_for_start("control", 2)
    assert [record["owners"] for record in gateway.records("begins", who="control")] == [[0, 1], [0, 0]]
    states = {
        (process["role"], process["worker"]): process["state"]
        for process in gateway.ask(Order.ASK_WORKERS)["result"]["processes"]
    }
    assert states == {
        ("services", None): "running",
        ("control", None): "running",
        ("writer", 0): "running",
        ("reader", 0): "running",
        ("writer", 1): "given up",
        ("reader", 1): "given up",
    }
    assert gateway.stop().code == 0


def test_the_last_worker_is_started_after_pauses_that_grow(running: Supervised) -> None:
    running.orders.give("reader/0", Order.CRASH, sticky=True)

    running.wait("worker keeps failing", worker=0)
    running.wait("worker ended", role="reader/0", count=7)
    running.orders.give("reader/0", Order.NOTHING)
    dead = len(running.records("worker ended"))
    running.wait_for_start("reader/0", dead + 1)

    silences = [record["silenceMs"] for record in running.records("worker ended")]
    for silence, pause in zip(silences[4:7], (100, 200, 400), strict=True):
        assert silence >= pause
    assert len(running.records("worker keeps failing")) == 1
    assert running.stop().code == 0


def test_control_that_fails_for_too_long_ends_the_gateway(gateway: Supervised) -> None:
    gateway.start(prepare=with_policy(LOST_AFTER=0))

    gateway.orders.give("control", Order.CRASH, sticky=True)

    assert gateway.ended().code == 5
    assert gateway.records("data path lost", role="control")
    assert not [pid for pid in gateway.pids() if is_alive(pid)]


def test_a_ring_that_contradicts_itself_is_emptied_and_both_halves_start_anew(running: Supervised) -> None:
    generations = running.records("begins", who="reader/0")[0]["generations"]

    running.orders.give("reader/0", Order.CONTRADICT)
    running.wait_for_start("reader/0", 2)
    running.wait_for_start("writer/0", 2)

    assert generations == [1, 1, 1]
    assert running.records("begins", who="reader/0")[1]["generations"] == [2, 2, 2]
    assert running.wait("heard", who="control", kind="upcalls")["worker"] == 0
    assert running.records("ring contradiction", role="reader/0")
    assert running.wait("worker ended")["code"] == 4
    assert len(running.records("worker ended")) == 1


def test_the_second_contradiction_empties_the_rings_between_readers_too(gateway: Supervised) -> None:
    gateway.configure(workers=2)
    gateway.start()

    gateway.orders.give("reader/0", Order.CONTRADICT)
    gateway.wait_for_start("reader/0", 2)
    assert gateway.starts("reader/1") == 1
    gateway.orders.give("reader/0", Order.CONTRADICT)
    gateway.wait_for_start("reader/0", 3)
    gateway.wait_for_start("reader/1", 2)

    found = [record["generations"] for record in gateway.records("begins", who="reader/0")]
    assert found == [[1, 1, 1, 1], [2, 2, 2, 1], [3, 3, 3, 2]]
    assert gateway.records("begins", who="reader/1")[-1]["generations"] == [1, 1, 1, 2]
    assert gateway.starts("writer/1") == 1


def test_a_ring_of_upcalls_that_control_finds_bad_is_emptied(running: Supervised) -> None:
    running.orders.give("control", Order.FIND_BAD_RING)
    running.wait_for_start("reader/0", 2)

    assert running.records("begins", who="reader/0")[1]["generations"] == [2, 2, 2]
    assert running.wait("heard", who="control", kind="upcalls")["worker"] == 0


def test_whoever_talks_nonsense_is_replaced(running: Supervised) -> None:
    running.orders.give("control", Order.BABBLE)
    running.wait_for_start("control", 2)

    assert running.wait("message not understood")["role"] == "control"
    assert running.ask(Order.ASK_RELOAD)["error"] is None


def test_fifty_restarts_leave_as_many_descriptors_and_no_thread(gateway: Supervised) -> None:
    gateway.start(prepare=with_policy(DEATHS_MAX=1000))

    def descriptors() -> list[str]:
        return sorted(each.target for each in inspect_process(gateway.pid).descriptors)

    def same_kinds() -> list[str]:
        return [re.sub(r"\d+", "", target) for target in descriptors()]

    before = same_kinds()
    for number in range(2, 15):
        for name in ALL:
            gateway.kill(name)
            gateway.wait_for_start(name, number)

    assert same_kinds() == before
    assert inspect_process(gateway.pid).threads == 1


# ---- the device ----


def delete_device(gateway: Supervised) -> None:
    gateway.in_network("ip", "link", "delete", DEVICE)


def test_a_device_that_was_deleted_is_made_again_and_all_workers_with_it(gateway: Supervised) -> None:
    gateway.configure(workers=2, mtu=1280)
    gateway.start()

    delete_device(gateway)
    for name in ("writer/0", "reader/0", "writer/1", "reader/1"):
        gateway.wait_for_start(name, 2)

    heard = gateway.wait("heard", who="control", kind="tuns")
    assert heard["count"] == 2
    assert gateway.records("tun device lost")[0]["dev"] == DEVICE
    assert gateway.records("tun device opened again")
    assert "mtu 1280" in gateway.link()
    assert " 10.42.0.1/24 " in gateway.in_network("ip", "-o", "address", "show", "dev", DEVICE)
    assert gateway.starts("control") == 1
    assert not gateway.records("worker ended")


def test_a_device_that_nobody_uses_is_missed_all_the_same(running: Supervised) -> None:
    for name in ("writer/0", "reader/0"):
        running.orders.give(name, Order.BE_DEAF)
        running.wait("deaf", who=name)

    delete_device(running)

    running.wait_for_start("reader/0", 2)
    assert running.records("tun device opened again")


def test_no_worker_is_started_while_there_is_no_device(gateway: Supervised) -> None:
    blocked = gateway.home / "blocked"
    reopen = Host.reopen_device

    def refuse(host: Host) -> None:
        if blocked.exists():
            raise SystemCallError("not yet")
        reopen(host)

    def prepare() -> None:
        setattr(Host, "reopen_device", refuse)  # noqa: B010 - in the supervisor's process only
        setattr(supervisor, "_TUN_REOPENS_MAX", 10**6)  # noqa: B010

    gateway.start(prepare=prepare)
    gateway.orders.give("reader/0", Order.CRASH, sticky=True)
    gateway.wait("worker keeps failing")
    blocked.touch()
    delete_device(gateway)
    gateway.wait("tun device not opened again", count=8)  # by now its pause is over
    gateway.orders.give("reader/0", Order.NOTHING)
    blocked.unlink()
    gateway.wait("tun device opened again")

    said = gateway.messages()
    meanwhile = said[said.index("tun device lost") : said.index("tun device opened again")]
    assert "worker started" not in meanwhile
    assert gateway.stop().code == 0


def test_a_worker_that_lost_a_descriptor_of_a_device_that_is_there_is_only_replaced(
    running: Supervised,
) -> None:
    running.orders.give("reader/0", Order.LOSE_DESCRIPTOR)
    running.wait_for_start("reader/0", 2)

    assert running.wait("worker ended")["code"] == 3
    assert not running.records("tun device lost")
    assert running.starts("writer/0") == 1


def test_a_device_that_is_deleted_again_and_again_ends_the_gateway(running: Supervised) -> None:
    for number in range(2, 5):
        delete_device(running)
        running.wait_for_start("reader/0", number)
    delete_device(running)

    assert running.ended().code == 5
    assert running.records("tun device lost for good, shutting down")
    assert not [pid for pid in running.pids() if is_alive(pid)]


def test_a_worker_that_was_given_up_stays_so_when_the_device_is_made_again(gateway: Supervised) -> None:
    gateway.configure(workers=2)
    gateway.start()
    gateway.orders.give("reader/1", Order.CRASH, sticky=True)
    gateway.wait("worker keeps failing")
    starts = gateway.starts("reader/1")

    delete_device(gateway)
    gateway.wait_for_start("reader/0", 2)

    assert gateway.wait("heard", who="control", kind="tuns")["count"] == 2
    assert gateway.starts("reader/1") == starts
    assert gateway.stop().code == 0


def test_control_hears_of_another_address_of_the_machine(running: Supervised) -> None:
    running.in_network("ip", "link", "add", "nmp-u0", "type", "veth", "peer", "name", "nmp-u1")
    running.in_network("ip", "address", "add", "192.0.2.1/24", "dev", "nmp-u0")

    running.wait("heard", who="control", kind="underlay")

    assert any("+192.0.2.1" in record["changes"] for record in running.records("underlay changed"))


# ---- reload ----


def test_a_reload_changes_the_device_and_tells_control_and_services(running: Supervised) -> None:
    running.configure(mtu=1400)
    running.send(signal.SIGHUP)

    running.wait("config reloaded")

    assert "mtu 1400" in running.link()
    heard = running.wait("heard", who="control", kind="reload")
    assert heard["count"] == 1  # the key
    running.wait("heard", who="services", kind="reload")
    assert running.records("one of control's")
    assert running.records("Caught HUP, reloading config")
    assert running.starts("control") == 1


def test_readers_are_replaced_when_a_certificate_with_more_networks_is_loaded(gateway: Supervised) -> None:
    gateway.certify("10.42.0.1/24", versions=(CertVersion.V1,))
    gateway.start()
    gateway.certify("10.42.0.1/24", "10.43.0.1/16", versions=(CertVersion.V1, CertVersion.V2))
    gateway.send(signal.SIGHUP)

    gateway.wait_for_start("reader/0", 2)

    overlays = [record["overlay"] for record in gateway.records("begins", who="reader/0")]
    assert overlays == [["10.42.0.0/24"], ["10.42.0.0/24", "10.43.0.0/16"]]
    assert " 10.43.0.1/16 " in gateway.in_network("ip", "-o", "address", "show", "dev", DEVICE)
    assert not gateway.records("worker ended")
    assert gateway.starts("writer/0") == 1


def test_certificates_that_may_not_follow_those_in_force_change_nothing(running: Supervised) -> None:
    running.certify("10.44.0.1/24")

    answer = running.ask(Order.ASK_RELOAD)

    assert "restart to change addresses" in answer["error"]
    assert " 10.42.0.1/24 " in running.in_network("ip", "-o", "address", "show", "dev", DEVICE)
    assert not running.records("heard", who="control", kind="reload")


def test_the_level_of_the_log_can_be_changed(running: Supervised) -> None:
    running.configure(level="error")
    running.ask(Order.ASK_RELOAD)
    started = len(running.records("worker started"))

    running.kill("writer/0")

    def restarts() -> int:
        processes = running.ask(Order.ASK_WORKERS)["result"]["processes"]
        return sum(process["restarts"] for process in processes if process["state"] == "running")

    assert soon(lambda: restarts() == 1)
    assert len(running.records("worker started")) == started
    assert not running.records("worker ended")


def test_a_reload_by_command_answers_with_its_warnings(running: Supervised) -> None:
    running.configure(dev="another", workers=3)

    answer = running.ask(Order.ASK_RELOAD)

    assert answer["error"] is None
    assert answer["result"] == {
        "device": DEVICE,
        "warnings": [
            "a warning of the configuration",
            "changed, but needs a restart: mp.workers, tun.dev",
            "one of control's",
        ],
    }


def test_a_configuration_that_is_wrong_changes_nothing(running: Supervised) -> None:
    running.configure(bad=True, mtu=1400)

    answer = running.ask(Order.ASK_RELOAD)

    assert answer["error"] == "config.yml:1:1: tun.mtu: is nonsense"
    assert running.wait("reload failed, nothing was changed")["error"] == answer["error"]
    assert "mtu 1300" in running.link()
    assert not running.records("heard", who="control", kind="reload")


def test_a_size_that_the_kernel_refuses_changes_nothing(running: Supervised) -> None:
    running.configure(mtu=10, so_mark=7)

    answer = running.ask(Order.ASK_RELOAD)

    assert "MTU 10 refused" in answer["error"]
    assert "mtu 1300" in running.link()
    assert not running.records("heard", who="control", kind="reload")


def test_what_control_refuses_is_undone(running: Supervised) -> None:
    running.configure(mtu=1400)
    running.orders.give("control", Order.REFUSE_RELOAD)
    assert soon(lambda: running.orders.peek("control") is Order.NOTHING)

    answer = running.ask(Order.ASK_RELOAD)

    assert answer["error"] == "not today"
    assert "mtu 1300" in running.link()
    assert not running.records("heard", who="services", kind="reload")


def test_a_reload_that_control_does_not_survive_is_abandoned(running: Supervised) -> None:
    running.configure(mtu=1400)
    running.orders.give("control", Order.IGNORE_RELOAD)
    assert soon(lambda: running.orders.peek("control") is Order.NOTHING)
    running.send(signal.SIGHUP)
    running.wait("heard", who="control", kind="reload")
    assert "mtu 1400" in running.link()

    running.kill("control")
    running.wait_for_start("control", 2)

    running.wait("reload abandoned")
    assert "mtu 1300" in running.link()
    assert running.ask(Order.ASK_RELOAD)["error"] is None  # the next one works
    assert "mtu 1400" in running.link()


def test_reloads_that_come_together_are_done_one_after_the_other(running: Supervised) -> None:
    running.orders.give("control", Order.IGNORE_RELOAD)
    assert soon(lambda: running.orders.peek("control") is Order.NOTHING)
    running.send(signal.SIGHUP)
    running.wait("heard", who="control", kind="reload")
    running.orders.give("services", Order.ASK_RELOAD)
    assert soon(lambda: running.orders.peek("services") is Order.NOTHING)
    running.ask(Order.ASK_NONSENSE)  # by now it has heard of the other one too
    assert len(running.records("heard", who="control", kind="reload")) == 1

    running.kill("control")

    running.wait("config reloaded")
    assert len(running.records("heard", who="control", kind="reload")) == 2


def test_fifty_reloads_leave_as_many_descriptors(running: Supervised) -> None:
    running.ask(Order.ASK_RELOAD)
    before = len(inspect_process(running.pid).descriptors)

    for number in range(50):
        running.configure(mtu=1300 + number % 2, bad=number % 5 == 4)
        running.ask(Order.ASK_RELOAD)

    assert len(inspect_process(running.pid).descriptors) == before


# ---- commands ----


def test_it_says_what_each_process_is_doing(running: Supervised) -> None:
    running.kill("writer/0")
    running.wait_for_start("writer/0", 2)

    result = running.ask(Order.ASK_WORKERS)["result"]
    processes = result["processes"]

    assert result["kernel"] == "python"
    assert [(each["role"], each["worker"], each["state"], each["restarts"]) for each in processes] == [
        ("services", None, "running", 0),
        ("control", None, "running", 0),
        ("writer", 0, "running", 1),
        ("reader", 0, "running", 0),
    ]
    for each, name in zip(processes, ALL, strict=True):
        assert each["pid"] == running.child(name)
        assert each["core"] in os.sched_getaffinity(0)
        assert each["cpu_s"] >= 0
        assert each["uptime_s"] >= 0
        assert (each["packets_in"], each["packets_out"]) == (0, 0)
        assert each["ring_fill"] == (0 if "/" in name else None)


def test_a_command_nobody_knows_is_refused(running: Supervised) -> None:
    assert running.ask(Order.ASK_NONSENSE)["error"] == "unknown command 'nonsense'"


# ---- stop ----


def test_it_stops_control_then_readers_then_writers_and_services_last(running: Supervised) -> None:
    ended = running.stop()

    assert ended.code == 0
    told = [line for line in running.messages() if line.split()[0] in {"told", "heard", "Goodbye"}]
    assert told == [
        "heard control stop",
        "told reader/0",
        "told writer/0",
        "Goodbye",
        "heard services stop",
    ]
    assert running.records("Caught signal, shutting down")[0]["signal"] == "SIGTERM"
    assert not [pid for pid in running.pids() if is_alive(pid)]
    assert list((running.home / "run").iterdir()) == []
    assert not running.records("worker ended")


def test_the_device_is_gone_before_services_are_told(running: Supervised) -> None:
    assert DEVICE in running.ask(Order.ASK_NONSENSE)["devices"]

    assert running.stop().code == 0

    assert DEVICE not in running.records("heard", who="services", kind="stop")[0]["devices"]


def test_it_stops_at_a_command_too_and_answers_first(running: Supervised) -> None:
    answer = running.ask(Order.ASK_STOP)

    assert answer["result"] == {"pid": running.pid, "device": DEVICE}
    assert running.ended().code == 0


def test_those_who_do_not_end_are_killed(running: Supervised) -> None:
    for name in ("control", "reader/0", "writer/0"):
        running.orders.give(name, Order.BE_DEAF)
        running.wait("deaf", who=name)

    assert running.stop().code == 0
    assert not [pid for pid in running.pids() if is_alive(pid)]
    assert running.records("Goodbye")


def test_a_second_signal_ends_it_at_once(running: Supervised) -> None:
    for name in ("control", "reader/0", "writer/0"):
        running.orders.give(name, Order.BE_DEAF)
        running.wait("deaf", who=name)
    pids = running.pids()

    running.kill_twice()

    assert running.wait_for_exit() == 0
    assert soon(lambda: not [pid for pid in pids if is_alive(pid)])
    assert list((running.home / "run").iterdir()) == []
    assert not running.records("Goodbye")


def test_nothing_outlives_a_supervisor_that_was_killed(gateway: Supervised) -> None:
    gateway.configure(workers=2)
    gateway.start()
    gateway.kill("reader/0", signal.SIGSTOP)
    pids = gateway.pids()
    assert len(pids) == 6

    gateway.send(signal.SIGKILL)

    assert soon(lambda: not [pid for pid in pids if is_alive(pid)])


def test_a_dead_ones_lock_and_socket_are_taken_over(gateway: Supervised) -> None:
    gateway.start()
    gateway.send(signal.SIGKILL)
    assert gateway.wait_for_exit() == -signal.SIGKILL
    gateway.log_path.write_text("")

    gateway.start()

    assert gateway.stop().code == 0


def test_what_services_could_not_write_is_written_at_the_end(running: Supervised) -> None:
    running.kill("services", signal.SIGSTOP)
    running.send(signal.SIGHUP)

    assert running.stop().code == 0

    assert running.records("Goodbye")
    assert running.records("heard", who="control", kind="stop")
