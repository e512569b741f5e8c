"""Where the real Nebula programs are, and certificates made with them or with our own program.

Data flow: NEBULA_PEERS or .peers/ -> [support.peers] -> support.nodes, tests/e2e
Knows the command line of each release of nebula-cert; knows nothing of running nodes.
Source: `nebula-cert -h` of 1.6.1, 1.9.3 and 1.11.0.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CLONE = Path(__file__).resolve().parents[2]
VERSIONS = ("1.6.1", "1.9.3", "1.11.0")
OURS = "ours"
STAND_IN = os.environ.get("NEBULA_MP_E2E_STAND_IN", "")
"""A version of Nebula that plays our part: shows whether a failure lies in the tests or in the program."""


def peers_directory() -> Path:
    """The directory that holds VERSION/usr/bin/nebula for each of `VERSIONS`."""
    return Path(os.environ.get("NEBULA_PEERS") or CLONE / ".peers").resolve()


def why_not(*programs: str) -> str:
    """Why a test that runs `programs` (versions or `OURS`) cannot: which releases are missing; empty if none is."""
    versions = {STAND_IN if program == OURS and STAND_IN else program for program in programs} - {OURS}
    missing = [
        path
        for version in sorted(versions)
        for path in (binary(version, "nebula"), binary(version, "nebula-cert"))
        if not os.access(path, os.X_OK)
    ]
    if not missing:
        return ""
    return f"{', '.join(map(str, missing))} missing: tools/test fetches it, or set NEBULA_PEERS"


def binary(version: str, name: str = "nebula") -> Path:
    """Path of `nebula` or `nebula-cert` of that release."""
    return peers_directory() / version / "usr" / "bin" / name


def our_command(*argv: str) -> list[str]:
    """The argv of our own program."""
    return [sys.executable, "-m", "nebula_mp", *argv]


@dataclass(frozen=True)
class Authority:
    """A CA: where its certificate and key are, of which version and curve its certificates are."""

    certificate: Path
    key: Path
    version: int
    curve: str


@dataclass(frozen=True)
class CertTool:
    """`nebula-cert` of one release, or ours (`OURS`), writing below `home`."""

    program: str
    home: Path

    def authority(self, name: str, *, version: int = 1, curve: str = "25519") -> Authority:
        """Make a CA valid for a day."""
        authority = Authority(self.home / f"{name}.crt", self.home / f"{name}.key", version, curve)
        argv = ["ca", "--name", name, "--duration", "24h"]
        argv += ["--out-crt", str(authority.certificate), "--out-key", str(authority.key)]
        self._run(argv + self._version(version) + self._curve(curve))
        return authority

    def keygen(self, name: str, *, curve: str = "25519") -> tuple[Path, Path]:
        """Make a host's key pair; paths of the private and of the public key."""
        private, public = self.home / f"{name}.key", self.home / f"{name}.pub"
        self._run(["keygen", "--out-key", str(private), "--out-pub", str(public), *self._curve(curve)])
        return private, public

    def sign(
        self,
        authority: Authority,
        name: str,
        public: Path,
        networks: Sequence[str],
        *,
        groups: Sequence[str] = (),
        duration: str = "",
    ) -> str:
        """Sign a host certificate of the CA's version and return it as PEM text."""
        out = self.home / f"{name}-v{authority.version}.crt"
        out.unlink(missing_ok=True)
        argv = ["sign", "--name", name, "--in-pub", str(public), "--out-crt", str(out)]
        argv += ["--ca-crt", str(authority.certificate), "--ca-key", str(authority.key)]
        argv += ["--networks" if self._is_recent else "--ip", ",".join(networks)]
        argv += ["--groups", ",".join(groups)] if groups else []
        argv += ["--duration", duration] if duration else []
        self._run(argv + self._version(authority.version))
        return out.read_text()

    @property
    def _is_recent(self) -> bool:
        return self._effective in {OURS, "1.11.0"}

    @property
    def _effective(self) -> str:
        return STAND_IN if self.program == OURS and STAND_IN else self.program

    def _version(self, version: int) -> list[str]:
        if self._is_recent:
            return ["--version", str(version)]
        assert version == 1, f"nebula-cert {self.program} makes version 1 only"
        return []

    def _curve(self, curve: str) -> list[str]:
        return [] if curve == "25519" else ["--curve", curve]

    def _run(self, argv: list[str]) -> None:
        effective = self._effective
        command = our_command("cert") if effective == OURS else [str(binary(effective, "nebula-cert"))]
        done = subprocess.run([*command, *argv], capture_output=True, text=True, timeout=30, check=False)
        if done.returncode != 0:
            raise AssertionError(
                f"{' '.join([*command, *argv])}: {done.returncode}\n{done.stdout}{done.stderr}"
            )
