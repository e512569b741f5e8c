"""Tells the service manager how the program is doing.

Data flow: workers.control -> [workers.notify] -> NOTIFY_SOCKET -> systemd
Source: sd_notify(3).
"""

import contextlib
import os
import socket

from nebula_mp import clock

READY = "READY=1"
STOPPING = "STOPPING=1"
_WAIT_S = 0.2  # a manager whose queue is full; a lost READY=1 would look like a failed start


def notify(*lines: str) -> None:
    """Send one state change; nothing happens without a service manager, and no failure matters."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path.startswith(("/", "@")):
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(_WAIT_S)
        address = f"\0{path[1:]}" if path.startswith("@") else path
        manager.sendto("\n".join(lines).encode(), address)


def notify_reloading() -> None:
    """Announce a reload; READY=1 ends it, whether it worked or not."""
    notify("RELOADING=1", f"MONOTONIC_USEC={clock.service_manager_us()}")
