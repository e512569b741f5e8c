"""The machine and the programs, as far as a figure depends on them.

Data flow: /proc, git, the programs -> [iperf_harness.facts] -> results
Whatever cannot be found out is left out: a measurement does not fail for it.
"""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from nebula_mp import __version__
from tools.iperf_harness import proctree
from tools.iperf_harness.systems import CLONE, OURS, System

_TIMEOUT_S = 10.0
_BUSY_LOOK_S = 0.5
_BUSY_SHARE = 0.1


def machine() -> dict[str, str]:
    """Processor, kernel, memory, and the versions of the tools."""
    model = _first_match(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"))
    memory = _first_match(r"^MemTotal:\s*(\d+)", _read("/proc/meminfo"))
    facts = {
        "CPU": f"{len(os.sched_getaffinity(0))} of {model or os.uname().machine}",
        "Linux": os.uname().release,
        "memory": f"{int(memory) / 1e6:.1f} GB" if memory else "",
        "Python": ".".join(map(str, sys.version_info[:3])),
        "iperf3": _first_match(r"iperf ([\d.]+)", _output("iperf3", "--version")),
    }
    return {name: value for name, value in facts.items() if value}


def versions(systems: Iterable[System]) -> dict[str, str]:
    """What each system's program is."""
    return {system.label: _version(system) for system in systems if system.is_tunnel}


def busy_share() -> float:
    """Share of the processors that others use, looked at for half a second; 0 to 1."""
    before = proctree.machine()
    time.sleep(_BUSY_LOOK_S)
    used = proctree.machine().since(before)
    return (used.busy_s + used.stolen_s) / used.all_s if used.all_s else 0.0


def busy_warning(share: float) -> list[str]:
    """A line if that is more than a measurement should have beside it."""
    if share <= _BUSY_SHARE:
        return []
    return [
        f"others used {100 * share:.0f} % of the processors before the run; ratios are safer than figures"
    ]


def _version(system: System) -> str:
    if system.label.partition(":")[0] == OURS:
        return f"{__version__} {_commit()}".rstrip()
    said = _output(system.command[0], "-version")
    return _first_match(r"^(?:Version: )?(\S.*)$", said) or " ".join(system.command)


def _commit() -> str:
    commit = _output("git", "-C", str(CLONE), "rev-parse", "--short", "HEAD").strip()
    changed = _output("git", "-C", str(CLONE), "status", "--porcelain", "--untracked-files=no").strip()
    return f"{commit}{' with changes' if changed else ''}" if commit else ""


def _output(*argv: str) -> str:
    """Stdout of a command; empty if it fails."""
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _read(path: str) -> str:
    return Path(path).read_text(errors="replace")


def _first_match(pattern: str, text: str) -> str:
    found = re.search(pattern, text, re.MULTILINE)
    return found[1].strip() if found else ""
