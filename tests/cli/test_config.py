"""`nebula-mp config validate`: what it prints and what it ends with."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nebula_mp import cli, clock
from nebula_mp.cert.codec import encode_pem
from nebula_mp.cert.keys import encode_private_key
from nebula_mp.newtypes import CertVersion
from tests.support.pki import ANY_TIME, Pki


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with ca.crt, host.crt and host.key, and a clock at which they are valid."""
    pki = Pki.shared()
    identity = pki.identity("host", "10.42.0.1/24")
    (tmp_path / "ca.crt").write_text(encode_pem(pki.ca))
    (tmp_path / "host.crt").write_text(encode_pem(identity.certificates[CertVersion.V2]))
    (tmp_path / "host.key").write_text(encode_private_key(identity.private_key))
    (tmp_path / "host.key").chmod(0o600)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(clock, "wall_s", lambda: ANY_TIME)
    return tmp_path


PKI = "pki: {ca: ca.crt, cert: host.crt, key: host.key}\n"


def validate(text: str, *options: str) -> int:
    Path("config.yml").write_text(text)
    return cli.main(["config", "validate", "-c", "config.yml", *options])


@pytest.mark.usefixtures("directory")
def test_a_good_configuration_is_one_line_and_exit_code_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert validate(PKI) == 0
    assert capsys.readouterr() == ("config.yml: the configuration and its certificates are good\n", "")


@pytest.mark.usefixtures("directory")
def test_all_problems_are_listed_and_counted_and_the_exit_code_is_1(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = (
        f"{PKI}listen:\n  port: 42424x\nfirewall:\n  inbound:\n"
        "    - port: any\n      proto: tpc\n      host: any\n    - proto: any\n      host: any\n"
    )

    assert validate(text) == 1
    assert capsys.readouterr().out == (
        'config.yml:3:9: listen.port: found "42424x", expected a whole number 0..65535; did you mean 42424?\n'
        'config.yml:7:14: firewall.inbound[0].proto: found "tpc", expected one of any, tcp, udp, icmp; '
        "did you mean tcp?\n"
        "config.yml:9:7: firewall.inbound[1].port: required: any, or a port\n"
        "3 problems. Next: correct and repeat nebula-mp config validate -c config.yml\n"
    )


@pytest.mark.usefixtures("directory")
def test_an_unknown_key_is_a_warning_and_with_strict_a_problem(capsys: pytest.CaptureFixture[str]) -> None:
    text = f"{PKI}listen: {{prot: 1}}\n"
    finding = 'config.yml:2:10: listen.prot: unknown key; did you mean "port"?\n'

    assert validate(text) == 0
    assert capsys.readouterr().out.startswith(f"warning: {finding}config.yml: the configuration")
    assert validate(text, "--strict") == 1
    assert capsys.readouterr().out.startswith(f"{finding}1 problem. Next: ")


@pytest.mark.usefixtures("directory")
def test_an_unknown_key_is_named_beside_problems_too(capsys: pytest.CaptureFixture[str]) -> None:
    text = f"{PKI}lisen: {{port: 1}}\ntun: {{mtu: 1}}\n"

    assert validate(text) == 1
    on_validate = capsys.readouterr().out
    assert cli.main(["start", "-c", "config.yml"]) == 1
    on_start = capsys.readouterr().err

    for said in (on_validate, on_start):
        assert 'warning: config.yml:2:1: lisen: unknown key; did you mean "listen"?' in said
        assert "tun.mtu" in said


@pytest.mark.usefixtures("directory")
def test_settings_without_effect_are_one_warning(capsys: pytest.CaptureFixture[str]) -> None:
    assert validate(f"{PKI}punchy: {{punch: true}}\nlocal_range: x\n", "--strict") == 0
    assert capsys.readouterr().out == (
        "warning: known to Nebula but without effect here yet: punchy.punch (config.yml:2), "
        "local_range (config.yml:3)\n"
        "config.yml: the configuration and its certificates are good\n"
    )


def test_a_certificate_that_cannot_be_read_or_used_is_a_problem(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (directory / "host.crt").unlink()
    assert validate(PKI) == 1
    missing = capsys.readouterr().out
    (directory / "host.crt").write_text((directory / "ca.crt").read_text())
    assert validate(PKI) == 1
    wrong = capsys.readouterr().out

    assert missing.startswith("config.yml:1:25: pki.cert: host.crt: No such file or directory: sign one with")
    assert wrong.startswith(
        "config.yml:1:25: pki.cert: host.crt: block 1 (line 1): v2 certificate 'ca-1' is a CA"
    )
    assert missing.count("\n") == wrong.count("\n") == 2


@pytest.mark.parametrize(
    "words",
    [["config", "validate", "-c"], ["start", "-test", "-c"], ["start", "-c"]],
    ids=["config validate", "start -test", "start"],
)
def test_every_command_names_file_and_line_of_all_files_it_cannot_use_and_keeps_the_warnings(
    words: list[str], directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (directory / "host.crt").unlink()
    (directory / "host.key").write_text("nonsense")
    text = "pki:\n  ca: nowhere/ca.crt\n  cert: host.crt\n  key: host.key\nlisen: {port: 1}\n"
    (directory / "m.yml").write_text(text)

    assert cli.main([*words, "m.yml"]) == 1

    captured = capsys.readouterr()
    said = sorted(line for line in (captured.out + captured.err).splitlines() if "Next: " not in line)
    assert said == [
        "m.yml:2:7: pki.ca: nowhere/ca.crt: No such file or directory: make a CA with `nebula-mp cert ca`",
        "m.yml:3:9: pki.cert: host.crt: No such file or directory: sign one with `nebula-mp cert sign`",
        'm.yml:4:8: pki.key: host.key: no PEM block found; one starts with "-----BEGIN NEBULA ..."',
        'warning: m.yml:5:1: lisen: unknown key; did you mean "listen"?',
    ]


def test_json_says_the_same_of_certificates_and_names_the_sources(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (directory / "host.crt").unlink()
    (directory / "host.key").chmod(0o644)

    assert validate(f"{PKI}local_range: x\n", "--json") == 1

    bad = json.loads(capsys.readouterr().out)
    assert bad["problems"] == [
        "config.yml:1:25: pki.cert: host.crt: No such file or directory: sign one with `nebula-mp cert sign`"
    ]
    assert bad["warnings"] == [
        "known to Nebula but without effect here yet: local_range (config.yml:2)",
        "pki.key host.key: every user of this machine can read the private key: chmod 600 it",
    ]
    assert bad["sources"] == ["config.yml"]


def test_a_certificate_of_another_ca_is_a_warning(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (directory / "ca.crt").write_text(encode_pem(Pki.other_ca().ca))

    assert validate(PKI) == 0
    assert capsys.readouterr().out.startswith("warning: ")


@pytest.mark.usefixtures("directory")
def test_json_says_the_same_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert validate(f"{PKI}local_range: x\n", "--json") == 0
    good = json.loads(capsys.readouterr().out)
    assert validate(f"{PKI}local_range: x\ntun: {{mtu: 1}}\n", "--json") == 1
    bad = json.loads(capsys.readouterr().out)

    assert good == {
        "schema": 1,
        "valid": True,
        "problems": [],
        "warnings": ["known to Nebula but without effect here yet: local_range (config.yml:2)"],
        "sources": ["config.yml"],
    }
    assert bad == {
        "schema": 1,
        "valid": False,
        "problems": ['config.yml:3:12: tun.mtu: found "1", expected a whole number 68..65475'],
        "warnings": ["known to Nebula but without effect here yet: local_range (config.yml:2)"],
        "sources": [],
    }


@pytest.mark.parametrize("option", ["-c", "-config", "--config"])
def test_every_spelling_of_the_option_names_the_file(
    directory: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    (directory / "conf.d").mkdir()
    (directory / "conf.d/a.yml").write_text(PKI)

    assert cli.main(["config", "validate", option, "conf.d"]) == 0
    assert capsys.readouterr().out.startswith("conf.d: ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["config"],
        ["config", "validate"],
        ["config", "validate", "-c"],
        ["config", "validate", "-c", "x", "y"],
    ],
    ids=" ".join,
)
def test_a_mistake_on_the_command_line_is_exit_code_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)

    assert caught.value.code == 2
    assert capsys.readouterr().out == ""


def test_a_file_name_that_no_terminal_can_print_is_escaped(tmp_path: Path) -> None:
    program = "import sys; from nebula_mp.cli import main; sys.exit(main())"
    command: list[str | bytes] = [sys.executable, "-c", program, "config", "validate", "-c", b"no\xffthing\n"]

    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert done.returncode == 1
    assert done.stderr == ""
    assert done.stdout == (
        "no\\udcffthing\\n: cannot be read: No such file or directory\n"
        "1 problem. Next: correct and repeat nebula-mp config validate -c no\\udcffthing\\n\n"
    )
