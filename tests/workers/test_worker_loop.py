"""What readers and writers have in common."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import pytest

from nebula_mp.config.model import LogLevel
from nebula_mp.datapath.api import Drain
from nebula_mp.workers import logs
from nebula_mp.workers.worker_loop import GivenUp


@dataclass(eq=False)
class Doing:
    """A drain, as far as it is asked here."""

    given_up: str | None = None


def test_an_offload_that_a_drain_gives_up_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[LogLevel, str, Mapping[str, object]]] = []
    monkeypatch.setattr(logs, "write", lambda level, message, fields: said.append((level, message, fields)))
    udp, tun = Doing(), Doing()
    given_up = GivenUp("reader/1", [cast("Drain", udp), cast("Drain", tun)])

    given_up.say()
    assert said == []

    tun.given_up = "tso"
    given_up.say()
    udp.given_up = "udp_segment"
    for _ in range(3):
        given_up.say()

    assert said == [
        (LogLevel.WARN, "offload disabled", {"role": "reader/1", "offload": "tso"}),
        (LogLevel.WARN, "offload disabled", {"role": "reader/1", "offload": "udp_segment"}),
    ]
