"""The exception tree; imports nothing of ours.

NebulaError
├── ConfigError          the operator's YAML is wrong    message names file, line and key; exit 1
├── WireError            a peer's bytes are wrong        count by class and drop; never fatal
│   ├── TruncatedError, UnknownTypeError, ReplayError
│   ├── AuthError        a tag or a key did not fit      drop; an open handshake goes on waiting
│   └── HandshakeError   a handshake message whose content cannot be used; drop, go on waiting
├── CertError            a certificate is not trusted    drop the handshake, log the fingerprint;
│                                                        for our own files: exit 1, and those of
│                                                        the configuration are a ConfigError
├── SystemCallError      the kernel refused              message names the device and the capability
├── RingError            shared memory contradicts us    worker exits, supervisor restarts it
├── KernelError          the kernel that was asked for cannot be used: exit 1
└── InstanceError        the running program could not be reached, or one is running already
"""


class NebulaError(Exception):
    """Root of all errors this program raises on purpose."""


class ConfigError(NebulaError):
    """The configuration cannot be used. `problems` holds one line for each, `file:line:column: key: text`.

    `warnings` are what else was noticed; an unknown key may be why another is missing.
    """

    def __init__(self, *problems: str, warnings: tuple[str, ...] = ()) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems
        self.warnings = warnings


class WireError(NebulaError):
    """Bytes from the network break the protocol."""


class TruncatedError(WireError):
    """Fewer bytes than the format needs."""


class UnknownTypeError(WireError):
    """A version, type or subtype that is not ours."""


class ReplayError(WireError):
    """A counter that was seen before or lies behind the window."""


class AuthError(WireError):
    """An authentication tag, public key or Noise message did not fit."""


class HandshakeError(WireError):
    """A handshake message that is well formed but whose content cannot be used."""


class CertError(NebulaError):
    """A certificate cannot be parsed or is not trusted; the message says why."""


class SystemCallError(NebulaError):
    """The kernel refused a call we depend on. `exit_code` is what the process should end with."""

    def __init__(self, message: str, *, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class RingError(NebulaError):
    """Shared memory says what no correct process can have written.

    `field` and `value` are for the log record; the message adds which memory and what was expected.
    """

    def __init__(self, where: str, field: str, value: object, expected: str) -> None:
        super().__init__(f"{where}: {field} is {value}, expected {expected}")
        self.field = field
        self.value = value


class KernelError(NebulaError):
    """The accelerator is missing, does not fit this version, or errs; the message says what."""


class InstanceError(NebulaError):
    """No instance is running where one is needed, or one is where none may be."""

    def __init__(self, message: str, *, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code
