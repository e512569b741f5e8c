import io
import json
import os
import pty
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import ip_interface
from pathlib import Path

import pytest

import nebula_mp.cli
from nebula_mp import __version__, clock
from nebula_mp.cert import codec, keys
from nebula_mp.cert.model import Certificate
from nebula_mp.cert.pem import Banner, encode_block
from nebula_mp.cert.pool import CaPool
from nebula_mp.cli.cert import PASSPHRASE_VARIABLE, main
from nebula_mp.newtypes import CertVersion, Curve
from tests.support import peers, vectors
from tests.support.vectors import Vector

FILES = vectors.DIRECTORY / "certs"
GENERATED_AT = vectors.load("certs")["generated_at"]
CERTIFICATES = {each["file"]: each for each in vectors.load("certs")["certs"]}
ENCRYPTED = vectors.load("certs")["encrypted_ca_keys"]
YEAR = 8760 * 3600


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An empty working directory, UTC, the clock of the vectors, no passphrase, and no terminal."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    monkeypatch.delenv(PASSPHRASE_VARIABLE, raising=False)
    monkeypatch.setattr(clock, "wall_ns", lambda: GENERATED_AT * 10**9 + 999_999_999)
    monkeypatch.setattr(clock, "wall_s", lambda: GENERATED_AT)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*argv: str) -> Result:
        try:
            code = main(argv)
        except SystemExit as error:
            code = int(error.code or 0)
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call


def read(path: str | Path) -> Certificate:
    [(_, certificate)] = codec.parse_pem(Path(path).read_text(), str(path))
    return certificate


def mode(path: str) -> int:
    return stat.S_IMODE(Path(path).stat().st_mode)


def left_behind() -> list[str]:
    """The names in the working directory."""
    return sorted(path.name for path in Path.cwd().iterdir())


def say(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Put `text` on stdin."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


# --- print


@pytest.mark.parametrize("name", vectors.load("print_json"))
def test_print_json_is_byte_for_byte_that_of_nebula_cert(name: str, run: Run) -> None:
    printed = vectors.load("print_json")[name]["head"]

    result = run("print", "-json", "-path", str(FILES / name))

    expected = json.dumps(printed, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert result == Result(0, expected + "\n", "")


@pytest.mark.parametrize("name", vectors.load("print_json"))
def test_print_gives_each_certificate_indented_with_tabs(name: str, run: Run) -> None:
    printed = vectors.load("print_json")[name]["head"]

    result = run("print", "-path", str(FILES / name))

    texts = [json.dumps(each, sort_keys=True, indent="\t", ensure_ascii=False) for each in printed]
    assert result == Result(0, "".join(text + "\n" for text in texts), "")


@pytest.mark.parametrize("vector", CERTIFICATES.values(), ids=lambda each: each["file"])
def test_the_printed_fields_are_those_of_the_decoded_vectors(vector: Vector, run: Run) -> None:
    result = run("print", "-json", "-path", str(FILES / vector["file"]))

    assert json.loads(result.out) == [vector["print_json"]]


@pytest.mark.parametrize(
    "name", [name for name, each in vectors.load("print_json").items() if "details" in each["v1_6_1"]]
)
def test_release_1_6_1_saw_the_same_in_what_it_understood(name: str, run: Run) -> None:
    old = vectors.load("print_json")[name]["v1_6_1"]

    [new] = json.loads(run("print", "-json", "-path", str(FILES / name)).out)

    same = {"groups", "isCa", "issuer", "name", "notAfter", "notBefore", "publicKey"}
    assert {key: new["details"][key] for key in same} == {key: old["details"][key] for key in same}
    assert new["details"]["networks"] == old["details"]["ips"]
    assert new["details"]["unsafeNetworks"] == old["details"]["subnets"]
    assert new["signature"] == old["signature"]
    if new["details"]["curve"] == "CURVE25519":  # 1.6.1 dropped the curve and hashed what was left
        assert new["fingerprint"] == old["fingerprint"]


@pytest.mark.parametrize(
    ("zone", "shown"),
    [
        ("UTC", "2026-11-22T19:18:47Z"),
        ("Europe/Berlin", "2026-11-22T20:18:47+01:00"),
        ("America/St_Johns", "2026-11-22T15:48:47-03:30"),
    ],
)
def test_times_are_in_the_zone_of_the_machine(
    zone: str, shown: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", zone)
    time.tzset()

    [printed] = json.loads(run("print", "-json", "-path", str(FILES / "host-a-25519-v2.crt")).out)

    assert printed["details"]["notBefore"] == shown


def test_characters_that_go_escapes_are_escaped(run: Run) -> None:
    run("ca", "-name", "a<b>&c\u2028ü")

    assert '"name":"a\\u003cb\\u003e\\u0026c\\u2028ü"' in run("print", "-json", "-path", "ca.crt").out


def test_print_reads_stdin(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, (FILES / "host-a-P256-v1.crt").read_text())

    assert '"name": "host-a-P256-v1"' in run("print", "-path", "-").out


def test_print_gives_what_it_could_read_before_it_says_what_it_could_not(run: Run) -> None:
    text = (FILES / "ca-25519-v1.crt").read_text() + (FILES / "ca-25519-v1.key").read_text()
    Path("both").write_text(text)

    result = run("print", "-path", "both")

    assert result.code == 1
    assert '"name": "ca-25519-v1"' in result.out
    assert result.err == (
        "Error: error while unmarshaling cert: both: block 2 (line 6) is a CA's private key "
        "(NEBULA ED25519 PRIVATE KEY), where a certificate is expected\n"
    )


def test_a_time_without_a_calendar_date_is_an_error_and_not_a_broken_line(run: Run) -> None:
    ca = read(FILES / "ca-25519-v1.crt")
    raw = codec.encode(ca).replace(b"0" + _varint(ca.not_after), b"0" + _varint(2**62))
    size = raw[1] + len(_varint(2**62)) - len(_varint(ca.not_after))
    text = encode_block(Banner.CERTIFICATE_V1, raw[:1] + bytes([size]) + raw[2:])
    Path("far.crt").write_text(text)

    result = run("print", "-path", "far.crt")

    assert (result.code, result.out) == (1, "")
    assert f"unix time {2**62} has no calendar date" in result.err


def _varint(number: int) -> bytes:
    out = bytearray()
    while number >= 128:
        out.append(number % 128 + 128)
        number //= 128
    return bytes([*out, number])


# --- verify


@pytest.mark.parametrize(
    "case", vectors.load("cli_verify"), ids=lambda each: f"{each['cert']} {each['tool']}"
)
def test_verify_ends_as_the_real_nebula_cert_did(case: Vector, run: Run) -> None:
    result = run("verify", "-ca", str(FILES / case["ca"]), "-crt", str(FILES / case["cert"]))

    if case["tool"] == "head":
        assert result.code == case["exit"]
        assert result.err.startswith(case["output"].rstrip("\n"))  # recorded up to a certain length
        said = CERTIFICATES[case["cert"]]["verify_against_all_cas"]
        assert result.err.endswith(f": {said}\n" if said != "ok" else "")
    elif case["exit"] == 0:
        assert result == Result(0, "", "")
    elif case["output"].startswith("Error: certificate "):  # else it had never heard of v2 or P256
        assert result.code == 1
    assert result.out == ""


def test_verify_reports_every_certificate_of_the_file(run: Run) -> None:
    names = [
        "host-a-25519-v1.crt",
        "host-expired-25519-v1.crt",
        "host-b-25519-v2.crt",
        "bad-signature-25519-v1.crt",
    ]
    Path("hosts").write_text("".join((FILES / name).read_text() for name in names))

    result = run("verify", "-ca", str(FILES / "ca-25519-v1.crt"), "-crt", "hosts")

    assert result.code == 1
    assert result.err.count("error while verifying certificate") == 3
    assert "}: certificate is expired\n" in result.err
    assert "}: certificate signature did not match\n" in result.err
    issuer = CERTIFICATES["host-b-25519-v2.crt"]["issuer"]
    assert (
        f"certificate v2 host-b-25519-v2 with issuer {issuer}: could not find ca for the certificate\n"
        in result.err
    )


def test_verify_takes_cas_that_have_expired_and_says_so_of_the_certificate(run: Run) -> None:
    run("ca", "-name", "x", "-duration", "1s")
    run("sign", "-name", "h", "-networks", "10.0.0.1/8", "-duration", "1s")

    assert run("verify", "-ca", "ca.crt", "-crt", "h.crt").code == 0


def test_verify_against_an_expired_ca_only_is_about_the_certificate(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("ca", "-name", "x", "-duration", "2s")
    run("sign", "-name", "h", "-networks", "10.0.0.1/8")
    monkeypatch.setattr(clock, "wall_s", lambda: GENERATED_AT + 10)

    result = run("verify", "-ca", "ca.crt", "-crt", "h.crt")

    assert result.code == 1
    assert result.err.endswith("}: root certificate is expired\n")


def test_verify_names_a_ca_file_that_is_none(run: Run) -> None:
    key = str(FILES / "ca-25519-v1.key")

    result = run("verify", "-ca", key, "-crt", str(FILES / "host-a-25519-v1.crt"))

    assert result.code == 1
    assert result.err.startswith(
        f"Error: error while adding ca cert to pool: {key}: block 1 (line 1) is a CA's"
    )


# --- ca


def test_a_ca_is_made_with_the_defaults_of_nebula_cert(run: Run) -> None:
    result = run("ca", "-name", "my ca")

    assert result == Result(0, "", "")
    ca = read("ca.crt")
    assert (ca.name, ca.version, ca.curve, ca.is_ca) == ("my ca", CertVersion.V2, Curve.CURVE25519, True)
    assert (ca.not_before, ca.not_after) == (GENERATED_AT, GENERATED_AT + YEAR)
    assert (ca.networks, ca.unsafe_networks, ca.groups) == ((), (), ())
    assert (
        keys.parse_signing_key(Path("ca.key").read_text(), "ca.key", lambda: b"").public_key == ca.public_key
    )
    assert mode("ca.key") == mode("ca.crt") == 0o600


def test_every_flag_of_ca_is_heard(run: Run) -> None:
    result = run(
        "ca", "-name=x", "--version", "1", "-duration=1h30m", "-out-key", "k", "--out-crt=c", "-curve", "P256",
        "-groups", " web, db ,,", "-networks", "10.0.0.0/8, 10.1.2.3/16", "-unsafe-networks=192.168.0.0/16",
    )  # fmt: skip

    assert result == Result(0, "", "")
    ca = read("c")
    assert (ca.version, ca.curve, ca.not_after - ca.not_before) == (CertVersion.V1, Curve.P256, 5400 + 0)
    assert ca.groups == ("web", "db")
    assert ca.networks == (ip_interface("10.0.0.0/8"), ip_interface("10.1.2.3/16"))
    assert ca.unsafe_networks == (ip_interface("192.168.0.0/16"),)
    assert Path("k").read_text().startswith("-----BEGIN NEBULA ECDSA P256 PRIVATE KEY-----")


def test_deprecated_flags_still_work(run: Run) -> None:
    run("ca", "-name", "x", "-ips", "10.0.0.0/8", "-subnets", "192.168.0.0/16")
    run("sign", "-name", "h", "-ip", "10.0.0.1/8", "-subnets", "192.168.1.0/24")

    assert read("ca.crt").networks == (ip_interface("10.0.0.0/8"),)
    assert read("h.crt").networks == (ip_interface("10.0.0.1/8"),)
    assert read("h.crt").unsafe_networks == (ip_interface("192.168.1.0/24"),)


@pytest.mark.parametrize("curve", ["25519", "X25519", "Curve25519", "CURVE25519"])
def test_all_names_of_curve_25519_are_known(curve: str, run: Run) -> None:
    assert run("ca", "-name", "x", "-curve", curve).code == 0


CHEAP = ("-argon-memory", "1024", "-argon-parallelism", "2", "-argon-iterations", "3")


def test_an_encrypted_ca_key_signs_with_the_passphrase_of_the_environment(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PASSPHRASE_VARIABLE, "open sesame")

    assert run("ca", "-name", "x", "-encrypt", *CHEAP) == Result(0, "", "")
    assert run("sign", "-name", "h", "-networks", "10.0.0.1/8") == Result(0, "", "")

    assert Path("ca.key").read_text().startswith("-----BEGIN NEBULA ED25519 ENCRYPTED PRIVATE KEY-----")
    assert CaPool([read("ca.crt")]).verify(read("h.crt"), GENERATED_AT)


def test_a_wrong_passphrase_is_said_and_nothing_is_written(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PASSPHRASE_VARIABLE, "right")
    run("ca", "-name", "x", "-encrypt", *CHEAP)
    monkeypatch.setenv(PASSPHRASE_VARIABLE, "wrong")

    result = run("sign", "-name", "h", "-networks", "10.0.0.1/8")

    assert result.code == 1
    assert result.err == (
        "Error: error while parsing ca-key: ca.key: block 1 (line 1): invalid passphrase or corrupt private key\n"
    )
    assert left_behind() == ["ca.crt", "ca.key"]


@pytest.mark.parametrize("vector", ENCRYPTED, ids=lambda each: each["file"])
def test_encrypted_keys_made_by_nebula_cert_sign(
    vector: Vector, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PASSPHRASE_VARIABLE, vector["passphrase"])

    result = run(
        "sign", "-ca-key", str(FILES / vector["file"]), "-ca-crt", str(FILES / vector["cert"]),
        "-name", "h", "-networks", "10.0.0.1/8",
    )  # fmt: skip

    assert result == Result(0, "", "")
    assert CaPool([read(FILES / vector["cert"])]).verify(read("h.crt"), GENERATED_AT)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        pytest.param(("ca", "-name", "x", "-encrypt"), "out-key must be encrypted interactively", id="ca"),
        pytest.param(
            ("sign", "-name", "h", "-networks", "10.0.0.1/8", "-ca-key", str(FILES / "ca-enc-P256-v2.key")),
            "ca-key is encrypted and must be decrypted interactively",
            id="sign",
        ),
    ],
)
def test_without_a_terminal_or_a_passphrase_the_way_out_is_named(
    argv: tuple[str, ...], said: str, run: Run
) -> None:
    assert run(*argv) == Result(1, "", f"Error: {said}; or set {PASSPHRASE_VARIABLE}\n")


def on_a_terminal(passphrases: list[str], *argv: str) -> tuple[int, str]:
    """Exit code and stderr of the program when somebody types a passphrase at each prompt."""
    program = "import sys; from nebula_mp.cli.cert import main; sys.exit(main())"
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", program, *argv], stdin=theirs, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, start_new_session=True,
    ) as process:  # fmt: skip
        assert process.stderr
        err = b""
        # Wait for each prompt: what is typed before it is thrown away, so that nothing typed blindly counts.
        for passphrase in passphrases:
            while not err.endswith(b"Enter passphrase: "):
                byte = process.stderr.read(1)
                assert byte, f"ended without a prompt: {err!r}"
                err += byte
            os.write(ours, passphrase.encode() + b"\n")
            err += process.stderr.read(1)
        err += process.stderr.read()
    os.close(ours)
    os.close(theirs)
    return process.returncode, err.decode()


def test_the_passphrase_is_asked_for_until_there_is_one() -> None:
    code, err = on_a_terminal(["", "", "open sesame"], "ca", "-name", "x", "-encrypt", *CHEAP)

    assert (code, err) == (0, "Enter passphrase: \n" * 3)
    key = keys.parse_signing_key(Path("ca.key").read_text(), "ca.key", lambda: b"open sesame")
    assert key.public_key == read("ca.crt").public_key


def test_after_five_empty_passphrases_nobody_is_asked_again() -> None:
    code, err = on_a_terminal([""] * 5, "ca", "-name", "x", "-encrypt", *CHEAP)

    assert code == 1
    assert err == (
        "Enter passphrase: \n" * 5
        + "Error: no passphrase specified, remove -encrypt flag to write out-key in plaintext\n"
    )
    assert left_behind() == []


# --- keygen


@pytest.mark.parametrize(("flags", "curve"), [((), Curve.CURVE25519), (("-curve", "P256"), Curve.P256)])
def test_keygen_writes_two_halves_of_one_key(flags: tuple[str, ...], curve: Curve, run: Run) -> None:
    assert run("keygen", "-out-key", "h.key", "-out-pub", "h.pub", *flags) == Result(0, "", "")

    key = keys.parse_private_key(Path("h.key").read_text(), "h.key")
    assert keys.parse_public_key(Path("h.pub").read_text(), "h.pub") == (curve, key.public_key)
    assert mode("h.key") == mode("h.pub") == 0o600


def test_keys_differ_each_time(run: Run) -> None:
    run("keygen", "-out-key", "a", "-out-pub", "a.pub")
    run("keygen", "-out-key", "b", "-out-pub", "b.pub")

    assert Path("a").read_text() != Path("b").read_text()


# --- sign


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("ca_version", [1, 2])
@pytest.mark.parametrize("curve", ["25519", "P256"])
def test_a_host_is_signed_with_a_new_key(version: int, ca_version: int, curve: str, run: Run) -> None:
    run("ca", "-name", "x", "-version", str(ca_version), "-curve", curve)

    result = run(
        "sign", "-name", "h", "-networks", "10.0.0.1/8", "-groups", "web, db", "-version", str(version),
        "-unsafe-networks", "192.168.0.0/24",
    )  # fmt: skip

    assert result == Result(0, "", "")
    host = read("h.crt")
    assert (host.version, host.name, host.groups) == (version, "h", ("web", "db"))
    assert (host.not_before, host.not_after) == (GENERATED_AT, GENERATED_AT + YEAR - 1)
    assert host.unsafe_networks == (ip_interface("192.168.0.0/24"),)
    assert keys.parse_private_key(Path("h.key").read_text(), "h.key").public_key == host.public_key
    assert CaPool([read("ca.crt")]).verify(host, GENERATED_AT)
    assert mode("h.key") == mode("h.crt") == 0o600


@pytest.mark.parametrize("version", [1, 2])
def test_the_version_is_that_of_the_ca_unless_asked_for(version: int, run: Run) -> None:
    run("ca", "-name", "x", "-version", str(version))
    run("sign", "-name", "h", "-networks", "10.0.0.1/8")

    assert read("h.crt").version == version


def test_an_existing_public_key_is_signed_and_no_private_key_is_made(run: Run) -> None:
    run("ca", "-name", "x")
    run("keygen", "-out-key", "k", "-out-pub", "p")

    run(
        "sign",
        "-name",
        "h",
        "-in-pub",
        "p",
        "-networks",
        "fd00::1/64, 10.0.0.2/8,10.0.0.1/8",
        "-duration",
        "90m",
    )

    host = read("h.crt")
    assert host.public_key == keys.parse_private_key(Path("k").read_text(), "k").public_key
    assert [str(each) for each in host.networks] == ["10.0.0.1/8", "10.0.0.2/8", "fd00::1/64"]
    assert host.not_after == GENERATED_AT + 5400
    assert not Path("h.key").exists()


def test_keys_and_certificates_can_go_through_pipes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    key = run("ca", "-name", "x", "-out-key", "-").out
    assert key.startswith("-----BEGIN NEBULA ED25519 PRIVATE KEY-----")

    say(monkeypatch, key)
    certificate = run("sign", "-name", "h", "-ca-key", "-", "-networks", "10.0.0.1/8", "-out-crt", "-").out
    say(monkeypatch, certificate)

    assert run("verify", "-ca", "ca.crt", "-crt", "-") == Result(0, "", "")
    assert left_behind() == ["ca.crt", "h.key"]


# --- what must not happen


@pytest.mark.parametrize(
    ("argv", "existing", "said"),
    [
        (("ca", "-name", "x"), "ca.key", "refusing to overwrite existing CA key: ca.key"),
        (("ca", "-name", "x"), "ca.crt", "refusing to overwrite existing CA cert: ca.crt"),
        (("keygen", "-out-key", "k", "-out-pub", "p"), "k", "refusing to overwrite existing key: k"),
        (("keygen", "-out-key", "k", "-out-pub", "p"), "p", "refusing to overwrite existing public key: p"),
        (
            ("sign", "-name", "h", "-networks", "10.0.0.1/8"),
            "h.key",
            "refusing to overwrite existing key: h.key",
        ),
        (
            ("sign", "-name", "h", "-networks", "10.0.0.1/8"),
            "h.crt",
            "refusing to overwrite existing cert: h.crt",
        ),
    ],
)
@pytest.mark.parametrize("kind", ["file", "dangling link", "directory"])
def test_nothing_is_overwritten_and_nothing_else_is_left_behind(
    argv: tuple[str, ...], existing: str, said: str, kind: str, run: Run
) -> None:
    if argv[0] == "sign":
        run("ca", "-name", "x")
    match kind:
        case "file":
            Path(existing).write_text("precious")
        case "dangling link":
            Path(existing).symlink_to("elsewhere")
        case _:
            Path(existing).mkdir()
    before = left_behind()

    result = run(*argv)

    assert (result.code, result.out, result.err) == (1, "", f"Error: {said}\n")
    assert left_behind() == before
    assert kind != "file" or Path(existing).read_text() == "precious"


def test_one_path_for_both_files_is_refused_and_leaves_nothing(run: Run) -> None:
    result = run("keygen", "-out-key", "same", "-out-pub", "same")

    assert (result.code, result.err) == (1, "Error: refusing to overwrite existing public key: same\n")
    assert left_behind() == []


def test_a_directory_that_is_missing_is_said_and_the_first_file_is_taken_back(run: Run) -> None:
    result = run("ca", "-name", "x", "-out-crt", "missing/ca.crt")

    assert (result.code, result.err) == (
        1,
        "Error: error while writing out-crt: missing/ca.crt: No such file or directory\n",
    )
    assert left_behind() == []


def test_a_ca_key_of_another_ca_is_refused(run: Run) -> None:
    run("ca", "-name", "a")
    run("ca", "-name", "b", "-out-key", "b.key", "-out-crt", "b.crt")

    result = run("sign", "-name", "h", "-networks", "10.0.0.1/8", "-ca-key", "b.key")

    assert result == Result(1, "", "Error: refusing to sign, root certificate does not match private key\n")


def test_an_expired_ca_is_refused_with_the_dates(run: Run) -> None:
    expired = str(FILES / "ca-expired-v1")

    result = run(
        "sign",
        "-name",
        "h",
        "-networks",
        "10.0.0.1/8",
        "-ca-key",
        f"{expired}.key",
        "-ca-crt",
        f"{expired}.crt",
    )

    assert result.code == 1
    assert result.err.startswith(
        "Error: ca certificate is expired: 'ca-expired' expired at 2026-11-22 19:18:48 UTC;"
    )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("-networks", "10.43.0.1/16"), "certificate contained a network assignment outside the limitations of the signing ca: 10.43.0.1/16"),
        (("-networks", "10.42.0.1/16", "-groups", "admin"), "certificate contained a group not present on the signing ca: admin"),
        (("-networks", "10.42.0.1/16", "-unsafe-networks", "172.16.0.0/24"), "certificate contained an unsafe network assignment outside the limitations of the signing ca: 172.16.0.0/24"),
        (("-networks", "10.42.0.1/16", "-duration", "2540400h"), "certificate expires after signing certificate"),
        (("-networks", "fd00::1/64,fd00::1/64"), "certificate contained a network assignment outside the limitations of the signing ca: fd00::1/64"),
    ],
)  # fmt: skip
def test_what_the_ca_may_not_sign_is_refused_in_the_words_of_nebula_cert(
    flags: tuple[str, ...], said: str, run: Run
) -> None:
    ca = str(FILES / "ca-limited-25519-v1")

    result = run(
        "sign", "-name", "h", "-ca-key", f"{ca}.key", "-ca-crt", f"{ca}.crt", "-version", "2", *flags
    )

    assert result == Result(1, "", f"Error: error while signing: {said}\n")
    assert left_behind() == []


def test_a_public_key_of_another_curve_is_refused(run: Run) -> None:
    run("ca", "-name", "x")

    result = run("sign", "-name", "h", "-networks", "10.0.0.1/8", "-in-pub", str(FILES / "keygen-P256.pub"))

    assert result == Result(1, "", "Error: curve of in-pub does not match ca\n")


@pytest.mark.parametrize("argv", [
    ("ca", "-name", "x", "-out-qr", "x.png"),
    ("sign", "-name", "x", "-networks", "10.0.0.1/8", "-out-qr", "x.png"),
    ("print", "-path", "x", "-out-qr", "x.png"),
])  # fmt: skip
def test_qr_codes_are_not_offered_and_say_what_to_use(argv: tuple[str, ...], run: Run) -> None:
    result = run(*argv)

    assert (result.code, result.out) == (1, "")
    assert result.err == "Error: -out-qr is not offered here: give the file to a program such as qrencode\n"
    assert left_behind() == []


@pytest.mark.parametrize("argv", [
    ("ca", "-name", "x", "-pkcs11", "pkcs11:a"),
    ("keygen", "-out-pub", "x", "-pkcs11", "pkcs11:a"),
    ("sign", "-name", "x", "-networks", "10.0.0.1/8", "-pkcs11=pkcs11:a"),
])  # fmt: skip
def test_hardware_keys_are_not_offered_and_say_what_to_use(argv: tuple[str, ...], run: Run) -> None:
    result = run(*argv)

    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("Error: -pkcs11 is not offered here: ")
    assert left_behind() == []


HOST = ("sign", "-name", "h")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ((), "no mode was provided; one of ca, keygen, sign, print, verify"),
        (("ca",), "-name is required"),
        (("ca", "-name", "x", "-out-key", ""), "-out-key is required"),
        (("ca", "-name", "x", "-out-crt="), "-out-crt is required"),
        (("ca", "-name", "x", "-duration", "0"), "-duration must be greater than 0"),
        (("ca", "-name", "x", "-duration", "-1h"), "-duration must be greater than 0"),
        (("ca", "-name", "x", "-version", "3"), "-version must be either 1 or 2"),
        (("ca", "-name", "x", "-curve", "P384"), "invalid curve: P384; 25519 or P256"),
        (("ca", "-name", "x", "-networks", "10.0.0.0"), "invalid -networks definition: 10.0.0.0"),
        (("ca", "-name", "x", "-networks", "10.0.0.0/255.0.0.0"), "invalid -networks definition: 10.0.0.0/255.0.0.0"),
        (("ca", "-name", "x", "-networks", "10.0.0.0/08"), "invalid -networks definition: 10.0.0.0/08"),
        (("ca", "-name", "x", "-networks", "10.0.0.0/33"), "invalid -networks definition: 10.0.0.0/33"),
        (("ca", "-name", "x", "-networks", "fe80::1%eth0/64"), "invalid -networks definition: fe80::1%eth0/64"),
        (("ca", "-name", "x", "-unsafe-networks", "x/8"), "invalid -unsafe-networks definition: x/8"),
        (("ca", "-name", "x", "-version", "1", "-networks", "fd00::/8"), "invalid -networks definition: v1 certificates can only be ipv4, have fd00::/8"),
        (("ca", "-name", "x", "-encrypt", "-argon-memory", "0"), "-argon-memory must be 1 to 4294967295, got 0"),
        (("ca", "-name", "x", "-encrypt", "-argon-parallelism", "256"), "-argon-parallelism must be 1 to 255, got 256"),
        (("keygen", "-out-pub", "x"), "-out-key is required"),
        (("keygen", "-out-key", "x"), "-out-pub is required"),
        (("keygen", "-out-key", "x", "-out-pub", "y", "-curve", "x"), "invalid curve: x; 25519 or P256"),
        (("sign", "-networks", "10.0.0.1/8"), "-name is required"),
        (HOST, "-networks is required"),
        ((*HOST, "-networks", "10.0.0.1/8", "-ca-key="), "-ca-key is required"),
        ((*HOST, "-networks", "10.0.0.1/8", "-ca-crt="), "-ca-crt is required"),
        ((*HOST, "-networks", "10.0.0.1/8", "-in-pub", "x", "-out-key", "y"), "cannot set both -in-pub and -out-key"),
        ((*HOST, "-networks", "10.0.0.1/8", "-version", "3"), "-version must be either 1 or 2"),
        ((*HOST, "-networks", "10.0.0.1/8,10.0.0.2/8", "-version", "1"), "invalid -networks definition: v1 certificates can only have a single ipv4 address"),
        ((*HOST, "-networks", "fd00::1/8", "-version", "1"), "invalid -networks definition: v1 certificates can only have a single ipv4 address"),
        ((*HOST, "-networks", "10.0.0.1/8,fd00::1/8", "-version", "1"), "invalid -networks definition: v1 certificates can only contain ipv4 addresses"),
        ((*HOST, "-networks", "10.0.0.1/8", "-unsafe-networks", "fd00::/8", "-version", "1"), "invalid -unsafe-networks definition: v1 certificates can only be ipv4, have fd00::/8"),
        (("print",), "-path is required"),
        (("verify", "-crt", "x"), "-ca is required"),
        (("verify", "-ca", "x"), "-crt is required"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_said_with_the_usage_and_exit_code_2(
    argv: tuple[str, ...], said: str, run: Run
) -> None:
    if argv[:1] == ("sign",):
        run("ca", "-name", "x")
    before = left_behind()

    result = run(*argv)

    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("usage: nebula-mp-cert ")
    assert result.err.endswith(f"\nError: {said}\n")
    assert left_behind() == before


@pytest.mark.parametrize("argv", [("unknown",), ("ca", "-unknown"), ("ca", "name")])
def test_what_is_neither_mode_nor_flag_ends_with_exit_code_2(argv: tuple[str, ...], run: Run) -> None:
    assert (run(*argv).code, run(*argv).out) == (2, "")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("ca", "-name", "x", "-out-key", "-", "-out-crt", "-"), '-out-key and -out-crt both set to "-", only one output may write to stdout'),
        (("keygen", "-out-key", "-", "-out-pub", "-"), '-out-key and -out-pub both set to "-", only one output may write to stdout'),
        ((*HOST, "-networks", "10.0.0.1/8", "-ca-key", "-", "-ca-crt", "-"), '-ca-key and -ca-crt both set to "-", only one input may read from stdin'),
        ((*HOST, "-networks", "10.0.0.1/8", "-ca-crt", "-", "-in-pub", "-"), '-ca-crt and -in-pub both set to "-", only one input may read from stdin'),
        (("verify", "-ca", "-", "-crt", "-"), '-ca and -crt both set to "-", only one input may read from stdin'),
    ],
)  # fmt: skip
def test_two_flags_cannot_share_one_stream(argv: tuple[str, ...], said: str, run: Run) -> None:
    assert run(*argv) == Result(1, "", f"Error: {said}\n")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("print", "-path", "none"), "unable to read cert; none: No such file or directory"),
        (("verify", "-ca", "none", "-crt", "x"), "error while reading ca: none: No such file or directory"),
        ((*HOST, "-networks", "10.0.0.1/8"), "error while reading ca-key: ca.key: No such file or directory"),
        (("print", "-path", "/"), "unable to read cert; /: Is a directory"),
    ],
)
def test_files_that_cannot_be_read_are_named(argv: tuple[str, ...], said: str, run: Run) -> None:
    assert run(*argv) == Result(1, "", f"Error: {said}\n")


def test_an_interrupted_prompt_ends_without_a_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_arguments: object, **_options: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("nebula_mp.cli.cert.getpass.getpass", interrupt)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)

    assert run("ca", "-name", "x", "-encrypt") == Result(1, "", "Error: interrupted\n")


def test_the_version_is_said_as_nebula_cert_says_it(run: Run) -> None:
    assert run("-version") == Result(0, f"Version: {__version__}\n", "")


@pytest.mark.parametrize("mode", ["ca", "keygen", "sign", "print", "verify"])
def test_every_mode_explains_itself(mode: str, run: Run) -> None:
    result = run(mode, "-h")

    assert (result.code, result.err) == (0, "")
    assert f"usage: nebula-mp-cert {mode}" in result.out


def test_nebula_mp_has_all_of_it_below_cert(capsys: pytest.CaptureFixture[str]) -> None:
    assert nebula_mp.cli.main(["cert", "ca", "-name", "-x", "-version", "1", "--groups=-config"]) == 0
    assert nebula_mp.cli.main(["cert", "print", "-json", "-path", "ca.crt"]) == 0

    [printed] = json.loads(capsys.readouterr().out)
    assert printed["details"]["name"] == "-x"
    assert printed["details"]["groups"] == ["-config"]
    assert printed["version"] == 1
    assert nebula_mp.cli.main(["cert", "ca"]) == 2
    assert nebula_mp.cli.main(["cert", "ca", "-name", "x"]) == 1


# --- next to the real nebula-cert


@pytest.fixture
def real() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a released nebula-cert, or skip the test if it is missing; its clock is this machine's."""

    def call(version: str, *argv: str) -> subprocess.CompletedProcess[str]:
        if reason := peers.why_not(version):
            pytest.skip(reason)
        command = [str(peers.binary(version, "nebula-cert")), *argv]
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)

    return call


Real = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.mark.e2e
@pytest.mark.parametrize("zone", ["UTC", "Asia/Kathmandu"])
@pytest.mark.parametrize("flag", ["-json", "-json=false"])
def test_every_file_is_printed_as_by_the_real_nebula_cert(
    flag: str, zone: str, run: Run, real: Real, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", zone)
    time.tzset()

    for path in sorted(FILES.glob("*.crt")):
        theirs = real("1.11.0", "print", flag, "-path", str(path))
        assert run("print", flag, "-path", str(path)) == Result(theirs.returncode, theirs.stdout, ""), path


@pytest.mark.e2e
@pytest.mark.parametrize("name", ["a<&>b\u2028", '"\\/\x01\x7f\t', "ü\N{GRINNING FACE}", "\b\f"])
def test_strange_names_are_printed_as_by_the_real_nebula_cert(name: str, run: Run, real: Real) -> None:
    assert run("ca", "-name", name, "-groups", name).code == 0

    for flag in ("-json", "-json=false"):
        assert (
            run("print", flag, "-path", "ca.crt").out
            == real("1.11.0", "print", flag, "-path", "ca.crt").stdout
        )


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("release", "curve", "ca_version", "version"),
    [
        ("1.6.1", "25519", 1, 1),
        ("1.9.3", "25519", 1, 1),
        ("1.9.3", "P256", 1, 1),
        *(("1.11.0", curve, ca, host) for curve in ("25519", "P256") for ca in (1, 2) for host in (1, 2)),
    ],
)
def test_real_and_our_certificates_are_trusted_by_each_other(
    *,
    release: str,
    curve: str,
    ca_version: int,
    version: int,
    run: Run,
    real: Real,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(clock, "wall_ns", time.time_ns)
    monkeypatch.setattr(clock, "wall_s", lambda: int(time.time()))
    recent = release == "1.11.0"
    ca_flags = [
        *(["-version", str(ca_version)] if recent else []),
        *([] if release == "1.6.1" else ["-curve", curve]),
    ]
    flags = [
        "-networks" if recent else "-ip",
        "10.0.0.1/8",
        "-groups",
        "web",
        *(["-version", str(version)] if recent else []),
    ]

    def theirs(*argv: str) -> None:
        done = real(release, *argv)
        assert done.returncode == 0, done

    assert (
        run(
            "ca",
            "-name",
            "o",
            "-version",
            str(ca_version),
            "-curve",
            curve,
            "-out-key",
            "o.key",
            "-out-crt",
            "o.crt",
        ).code
        == 0
    )
    theirs("ca", "-name", "t", "-out-key", "t.key", "-out-crt", "t.crt", *ca_flags)
    for ca in ("o", "t"):
        signing = ("-ca-key", f"{ca}.key", "-ca-crt", f"{ca}.crt")
        assert (
            run(
                "sign",
                "-name",
                f"{ca}o",
                "-networks",
                "10.0.0.1/8",
                "-groups",
                "web",
                "-version",
                str(version),
                *signing,
            ).code
            == 0
        )
        theirs("sign", "-name", f"{ca}t", *flags, *signing)
        for host in (f"{ca}o.crt", f"{ca}t.crt"):
            theirs("verify", "-ca", f"{ca}.crt", "-crt", host)
            assert run("verify", "-ca", f"{ca}.crt", "-crt", host) == Result(0, "", "")
            foreign = "t.crt" if ca == "o" else "o.crt"
            assert (
                run("verify", "-ca", foreign, "-crt", host).code
                == real(release, "verify", "-ca", foreign, "-crt", host).returncode
                == 1
            )


@pytest.mark.e2e
def test_keys_encrypted_by_either_program_are_decrypted_by_the_other(
    run: Run, real: Real, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clock, "wall_ns", time.time_ns)
    monkeypatch.setenv(PASSPHRASE_VARIABLE, "päss phrase")
    for curve in ("25519", "P256"):
        ours = (
            "ca",
            "-name",
            "o",
            "-curve",
            curve,
            "-encrypt",
            *CHEAP,
            "-out-key",
            f"o{curve}.key",
            "-out-crt",
            f"o{curve}.crt",
        )
        theirs = (
            "ca",
            "-name",
            "t",
            "-curve",
            curve,
            "-encrypt",
            *CHEAP,
            "-out-key",
            f"t{curve}.key",
            "-out-crt",
            f"t{curve}.crt",
        )
        assert run(*ours) == Result(0, "", "")
        assert real("1.11.0", *theirs).returncode == 0

        by_us = (
            "sign",
            "-name",
            f"us{curve}",
            "-networks",
            "10.0.0.1/8",
            "-ca-key",
            f"t{curve}.key",
            "-ca-crt",
            f"t{curve}.crt",
        )
        by_them = (
            "sign",
            "-name",
            f"them{curve}",
            "-networks",
            "10.0.0.1/8",
            "-ca-key",
            f"o{curve}.key",
            "-ca-crt",
            f"o{curve}.crt",
        )
        assert run(*by_us) == Result(0, "", "")
        assert real("1.11.0", *by_them).returncode == 0


@pytest.mark.e2e
def test_verify_says_what_the_real_nebula_cert_says(
    run: Run, real: Real, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clock, "wall_s", lambda: int(time.time()))

    for name in sorted(CERTIFICATES):
        argv = ("verify", "-ca", str(FILES / "ca-limited-25519-v1.crt"), "-crt", str(FILES / name))
        theirs = real("1.11.0", *argv)
        assert run(*argv) == Result(theirs.returncode, "", theirs.stderr), name
