"""Which kernel is chosen, and what is said of it; the accelerator is a stand-in, but for the last tests."""

import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import nebula_mp.datapath
from nebula_mp.config.model import KernelChoice, MpConfig
from nebula_mp.datapath import kernels
from nebula_mp.datapath.kernels import PYTHON, RUST, Chosen
from nebula_mp.errors import ConfigError, KernelError


class PanicError(BaseException):
    """What a panic of the extension is in Python: no Exception."""


class Accelerator(ModuleType):
    """In place of the self-test of an accelerator that loads: it ends as the test says."""

    def __init__(self, error: BaseException | None = None) -> None:
        super().__init__("nebula_mp.datapath.self_test")
        self._error = error
        self.tested = 0

    def run(self) -> None:
        self.tested += 1
        if self._error is not None:
            raise self._error


def install(monkeypatch: pytest.MonkeyPatch, accelerator: Accelerator | None) -> None:
    monkeypatch.setattr(kernels, "is_installed", lambda: accelerator is not None)
    monkeypatch.setitem(sys.modules, "nebula_mp.datapath.accelerated", ModuleType("accelerated"))
    monkeypatch.setitem(sys.modules, "nebula_mp.datapath.self_test", accelerator)


@pytest.mark.parametrize("wanted", [KernelChoice.AUTO, KernelChoice.RUST])
def test_the_accelerator_is_used_where_it_passes_its_test(
    wanted: KernelChoice, monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerator = Accelerator()
    install(monkeypatch, accelerator)

    assert kernels.choose(wanted) == Chosen(RUST)
    assert accelerator.tested == 1


def test_who_asks_for_python_gets_it_and_the_accelerator_is_not_even_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    accelerator = Accelerator()
    install(monkeypatch, accelerator)

    assert kernels.choose(KernelChoice.PYTHON) == Chosen(PYTHON)
    assert accelerator.tested == 0


def test_without_an_accelerator_it_is_python_which_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, None)

    chosen = kernels.choose(KernelChoice.AUTO)

    assert (chosen.name, chosen.is_fault) == (PYTHON, False)
    assert chosen.reason is not None
    assert chosen.reason.startswith("nebula_mp._accel is not installed")


UNUSABLE = [
    pytest.param(
        ImportError("undefined symbol: nmp_open"), "ImportError: undefined symbol: nmp_open", id="link"
    ),
    pytest.param(KernelError("ABI 7, expected 8"), "KernelError: ABI 7, expected 8", id="other version"),
    pytest.param(PanicError("index out of bounds"), "PanicError: index out of bounds", id="panic"),
]


@pytest.mark.parametrize(("error", "reason"), UNUSABLE)
def test_an_accelerator_that_cannot_be_used_is_a_fault_that_is_told(
    error: BaseException, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, Accelerator(error))

    assert kernels.choose(KernelChoice.AUTO) == Chosen(PYTHON, reason, is_fault=True)


@pytest.mark.parametrize(("error", "reason"), UNUSABLE)
def test_who_insists_on_the_accelerator_is_refused_where_it_cannot_be_used(
    error: BaseException, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, Accelerator(error))

    with pytest.raises(KernelError) as refused:
        kernels.choose(KernelChoice.RUST)

    assert f"cannot be used: {reason}. Next: " in str(refused.value)


def test_who_insists_on_the_accelerator_is_refused_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, None)

    with pytest.raises(
        KernelError, match=r"cannot be used: nebula_mp\._accel is not installed.* --kernel auto"
    ):
        kernels.choose(KernelChoice.RUST)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)])
def test_who_is_asked_to_end_meanwhile_ends(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Accelerator(error))

    with pytest.raises(type(error)):
        kernels.choose(KernelChoice.AUTO)


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, KernelChoice.AUTO),
        ({"NEBULA_MP_KERNEL": ""}, KernelChoice.AUTO),
        ({"NEBULA_MP_KERNEL": "auto"}, KernelChoice.AUTO),
        ({"NEBULA_MP_KERNEL": "python"}, KernelChoice.PYTHON),
        ({"NEBULA_MP_KERNEL": "rust"}, KernelChoice.RUST),
    ],
)
def test_the_environment_says_what_is_wanted(environment: dict[str, str], wanted: KernelChoice) -> None:
    assert kernels.wanted(MpConfig(), environment) is wanted


@pytest.mark.parametrize("said", KernelChoice)
@pytest.mark.parametrize("environment", ["python", "rust", "go"])
def test_what_is_configured_beats_the_environment(said: KernelChoice, environment: str) -> None:
    assert kernels.wanted(MpConfig(kernel=said), {"NEBULA_MP_KERNEL": environment}) is said


def test_a_kernel_in_the_environment_that_there_is_not_is_an_error() -> None:
    with pytest.raises(ConfigError) as refused:
        kernels.wanted(MpConfig(), {"NEBULA_MP_KERNEL": "go"})

    assert str(refused.value) == 'NEBULA_MP_KERNEL: found "go", expected one of auto, python, rust'


@pytest.mark.parametrize(
    ("wanted", "installed", "numpy", "tested"),
    [
        (None, True, False, 1),
        (KernelChoice.AUTO, True, False, 1),
        (KernelChoice.RUST, True, False, 1),
        (KernelChoice.PYTHON, True, True, 0),
        (None, False, True, 0),
        (KernelChoice.AUTO, False, True, 0),
    ],
)
def test_a_start_loads_what_it_will_need_while_its_configuration_is_read(
    wanted: KernelChoice | None,
    installed: bool,
    numpy: bool,
    tested: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    accelerator = Accelerator(ImportError("is said when it is chosen"))
    install(monkeypatch, accelerator)
    monkeypatch.setattr(kernels, "is_installed", lambda: installed)
    # Both, or what it loads anew stays behind as the package's own, with other classes than everybody has.
    monkeypatch.delattr(nebula_mp.datapath, "python", raising=False)
    monkeypatch.delitem(sys.modules, "nebula_mp.datapath.python", raising=False)

    kernels.preload(wanted)

    assert ("nebula_mp.datapath.python" in sys.modules, accelerator.tested) == (numpy, tested)


def test_a_kernel_is_found_by_its_name() -> None:
    assert kernels.get(PYTHON).name == PYTHON


def test_only_its_face_and_its_self_test_know_the_accelerator() -> None:
    package = Path(nebula_mp.__file__).parent
    imports = re.compile(r"^\s*(?:from|import)\b.*\b_accel\b", re.MULTILINE)

    found = {path.name for path in package.rglob("*.py") if imports.search(path.read_text())}

    assert found == {"accelerated.py", "self_test.py"}


def test_nothing_but_the_python_kernel_loads_numpy() -> None:
    script = (
        "import importlib, sys\nfrom nebula_mp.cli import start\nfrom nebula_mp.datapath import kernels\n"
        "for name in start._PARTS: importlib.import_module(name)\n"
        "from nebula_mp.workers.roles import real_mains; real_mains()\n"
        "print('numpy' in sys.modules)\nkernels.get('python')\nprint('numpy' in sys.modules)"
    )

    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )

    assert ended.stdout.split() == ["False", "True"]
