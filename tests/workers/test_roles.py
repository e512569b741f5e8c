"""What is loaded before the first fork."""

import subprocess
import sys

from nebula_mp.workers.parts import Role
from nebula_mp.workers.roles import real_mains

LOAD = """
from nebula_mp.workers.roles import real_mains
from nebula_mp.workers.spawn import thread_count

real_mains()
raise SystemExit(thread_count())
"""


def test_every_role_has_a_main() -> None:
    assert set(real_mains()) == set(Role)


def test_loading_them_starts_no_thread_so_that_the_supervisor_may_fork() -> None:
    loaded = subprocess.run([sys.executable, "-c", LOAD], timeout=60, check=False, capture_output=True)

    assert (loaded.returncode, loaded.stderr) == (1, b"")
