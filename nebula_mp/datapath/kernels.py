"""Which kernel carries packets: the native one where it can be used, else the one in Python.

Data flow: mp.kernel | NEBULA_MP_KERNEL -> [kernels] `choose` -> name -> workers.parts
           -> [kernels] `get` -> datapath.api.Kernel
Decided once, in the supervisor and before its first fork: one kernel counts under record locks and the other
by atomic instructions, so all processes of an instance have the same one. Only what was chosen is loaded: who
runs on the native kernel never has numpy in its memory. Knows names and reasons; knows nothing of packets.
Source: docs/architecture.md, "The kernel: one interface, two implementations".

| wanted   | the accelerator is             | then                                            |
|----------|--------------------------------|-------------------------------------------------|
| `python` | whatever                       | Python, and nothing to say                      |
| `auto`   | usable                         | native                                          |
| `auto`   | not installed                  | Python, and why: no fault, it is optional       |
| `auto`   | installed, but unusable        | Python, and why: a fault of the installation    |
| `rust`   | usable                         | native                                          |
| `rust`   | anything else                  | KernelError                                     |
"""

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, cast

from nebula_mp.config.model import KernelChoice, MpConfig
from nebula_mp.datapath.api import Kernel
from nebula_mp.errors import ConfigError, KernelError

ENVIRONMENT: Final = "NEBULA_MP_KERNEL"
"""What counts where neither the command line nor the configuration says which kernel is wanted."""

PYTHON: Final = "python"
RUST: Final = "rust"

_MODULES: Final = {PYTHON: "nebula_mp.datapath.python", RUST: "nebula_mp.datapath.accelerated"}
_SELF_TEST: Final = "nebula_mp.datapath.self_test"
_EXTENSION: Final = "nebula_mp._accel"
_NOT_INSTALLED: Final = f"{_EXTENSION} is not installed: when this package was, no usable cargo was there"


@dataclass(frozen=True, slots=True)
class Chosen:
    """The kernel of an instance, by name; and if the native one was wanted and is not it, why."""

    name: str
    reason: str | None = None
    is_fault: bool = False  # the accelerator is there and cannot be used


def wanted(settings: MpConfig, environment: Mapping[str, str]) -> KernelChoice:
    """Say which kernel to choose: as configured, else as the environment has it. Raises ConfigError."""
    if settings.kernel is not None:
        return settings.kernel
    text = environment.get(ENVIRONMENT) or KernelChoice.AUTO
    try:
        return KernelChoice(text)
    except ValueError:
        expected = ", ".join(KernelChoice)
        raise ConfigError(f'{ENVIRONMENT}: found "{text}", expected one of {expected}') from None


def choose(choice: KernelChoice) -> Chosen:
    """Settle on a kernel; the native one is loaded and tested for that. Raises KernelError."""
    if choice is KernelChoice.PYTHON:
        return Chosen(PYTHON)
    installed = is_installed()
    reason = _why_unusable() if installed else _NOT_INSTALLED
    if reason is None:
        return Chosen(RUST)
    if choice is KernelChoice.RUST:
        raise KernelError(
            f"the native kernel was asked for and cannot be used: {reason}."
            " Next: install nebula_mp again where there are cargo and a C compiler, or say --kernel auto"
        )
    return Chosen(PYTHON, reason, is_fault=installed)


def get(name: str) -> Kernel:
    """Give the kernel that was chosen; loads it if that is still to be done."""
    module = importlib.import_module(_MODULES[name])
    return cast(Kernel, module.NativeKernel() if name == RUST else module.PythonKernel())


def is_installed() -> bool:
    """Whether there is an accelerator at all; loads nothing."""
    return importlib.util.find_spec(_EXTENSION) is not None


def preload(choice: KernelChoice | None) -> None:
    """Load what a start will most likely need, while it is not known yet what the configuration says.

    `choice`: what the command line says. What goes wrong with the accelerator is left to `choose`.
    """
    if choice is KernelChoice.PYTHON or not is_installed():
        importlib.import_module(_MODULES[PYTHON])
    else:
        _why_unusable()


def _why_unusable() -> str | None:
    """Load and test the accelerator; None if it does its work."""
    try:
        importlib.import_module(_MODULES[RUST])
        importlib.import_module(_SELF_TEST).run()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001 - a panic over there is no Exception here
        return f"{type(error).__name__}: {error}"
    return None
