import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message

import nebula_mp
from nebula_mp.wire import nebula_pb2
from tests.support import vectors
from tests.support.vectors import Vector

ROOT = Path(nebula_mp.__file__).resolve().parents[1]
PROTO = "nebula_mp/wire/nebula.proto"


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("protoc")
    command = [
        sys.executable,
        "-m",
        "grpc_tools.protoc",
        f"-I{ROOT}",
        f"--python_out={out}",
        f"--pyi_out={out}",
    ]
    subprocess.run([*command, PROTO], check=True, cwd=ROOT)
    return out


@pytest.mark.parametrize("suffix", [".py", ".pyi"])
def test_the_committed_code_is_what_protoc_makes_of_nebula_proto(generated: Path, suffix: str) -> None:
    name = PROTO.removesuffix(".proto") + "_pb2" + suffix

    assert (ROOT / name).read_bytes() == (generated / name).read_bytes(), (
        f"{name}: run the command in {PROTO}"
    )


@pytest.mark.parametrize("vector", vectors.load("messages"), ids=lambda each: each["name"])
def test_lighthouse_and_control_messages_are_read_and_written_byte_for_byte(vector: Vector) -> None:
    kind: type[Message] = getattr(nebula_pb2, vector["kind"])
    raw = bytes.fromhex(vector["hex"])
    expected = ParseDict(vector["json"], kind())

    assert kind.FromString(raw) == expected
    assert expected.SerializeToString() == raw


def test_an_update_ack_in_version_2_form_has_details_that_are_present_and_empty() -> None:
    ack = nebula_pb2.NebulaMeta.FromString(bytes.fromhex("080a1200"))

    assert ack.Type == nebula_pb2.NebulaMeta.HostUpdateNotificationAck
    assert ack.HasField("Details")
    assert not nebula_pb2.NebulaMeta.FromString(bytes.fromhex("080a")).HasField("Details")


def test_old_relay_addresses_are_written_packed_and_read_either_way() -> None:
    packed = bytes.fromhex("2a 04 01 02 80 01")
    unpacked = bytes.fromhex("28 01 28 02 28 80 01")

    read = nebula_pb2.NebulaMetaDetails.FromString(unpacked)

    assert list(read.OldRelayVpnAddrs) == [1, 2, 128]
    assert read.SerializeToString() == packed
    assert nebula_pb2.NebulaMetaDetails.FromString(packed) == read


@pytest.mark.parametrize("message", ["payload1", "payload2"])
@pytest.mark.parametrize("vector", vectors.load("handshake"), ids=lambda each: each["name"])
def test_handshake_payloads_are_read_and_written_byte_for_byte(vector: Vector, message: str) -> None:
    payload = vector[message]
    expected = nebula_pb2.NebulaHandshake(
        Details=nebula_pb2.NebulaHandshakeDetails(
            Cert=bytes.fromhex(payload["cert"]),
            InitiatorIndex=payload["initiator_index"],
            ResponderIndex=payload["responder_index"],
            Time=int(payload["time"]),
            CertVersion=payload["cert_version"],
        )
    )
    raw = bytes.fromhex(payload["raw"])

    assert nebula_pb2.NebulaHandshake.FromString(raw) == expected
    assert expected.SerializeToString() == raw


# Field numbers and types are the protocol; this is docs/wire-format.md once more, so that an edit of the .proto
# file shows.
FIELDS = {
    "NebulaHandshake": {1: ("Details", "message"), 2: ("Hmac", "bytes")},
    "NebulaHandshakeDetails": {
        1: ("Cert", "bytes"),
        2: ("InitiatorIndex", "uint32"),
        3: ("ResponderIndex", "uint32"),
        4: ("Cookie", "uint64"),
        5: ("Time", "uint64"),
        8: ("CertVersion", "uint32"),
    },
    "RawNebulaCertificate": {1: ("Details", "message"), 2: ("Signature", "bytes")},
    "RawNebulaCertificateDetails": {
        1: ("Name", "string"),
        2: ("Ips", "uint32*"),
        3: ("Subnets", "uint32*"),
        4: ("Groups", "string*"),
        5: ("NotBefore", "int64"),
        6: ("NotAfter", "int64"),
        7: ("PublicKey", "bytes"),
        8: ("IsCA", "bool"),
        9: ("Issuer", "bytes"),
        100: ("curve", "enum"),
    },
    "RawNebulaEncryptedData": {1: ("EncryptionMetadata", "message"), 2: ("Ciphertext", "bytes")},
    "RawNebulaEncryptionMetadata": {
        1: ("EncryptionAlgorithm", "string"),
        2: ("Argon2Parameters", "message"),
    },
    "RawNebulaArgon2Parameters": {
        1: ("version", "int32"),
        2: ("memory", "uint32"),
        3: ("iterations", "uint32"),
        4: ("parallelism", "uint32"),
        5: ("salt", "bytes"),
    },
}
TYPES = {
    3: "int64",
    4: "uint64",
    5: "int32",
    8: "bool",
    9: "string",
    11: "message",
    12: "bytes",
    13: "uint32",
    14: "enum",
}


@pytest.mark.parametrize("name", FIELDS)
def test_field_numbers_and_types_are_those_of_the_protocol(name: str) -> None:
    descriptor = nebula_pb2.DESCRIPTOR.message_types_by_name[name]

    assert {
        field.number: (field.name, TYPES[field.type] + "*" * field.is_repeated) for field in descriptor.fields
    } == FIELDS[name]
