from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Curve(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CURVE25519: _ClassVar[Curve]
    P256: _ClassVar[Curve]
CURVE25519: Curve
P256: Curve

class NebulaHandshake(_message.Message):
    __slots__ = ("Details", "Hmac")
    DETAILS_FIELD_NUMBER: _ClassVar[int]
    HMAC_FIELD_NUMBER: _ClassVar[int]
    Details: NebulaHandshakeDetails
    Hmac: bytes
    def __init__(self, Details: _Optional[_Union[NebulaHandshakeDetails, _Mapping]] = ..., Hmac: _Optional[bytes] = ...) -> None: ...

class NebulaHandshakeDetails(_message.Message):
    __slots__ = ("Cert", "InitiatorIndex", "ResponderIndex", "Cookie", "Time", "CertVersion")
    CERT_FIELD_NUMBER: _ClassVar[int]
    INITIATORINDEX_FIELD_NUMBER: _ClassVar[int]
    RESPONDERINDEX_FIELD_NUMBER: _ClassVar[int]
    COOKIE_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    CERTVERSION_FIELD_NUMBER: _ClassVar[int]
    Cert: bytes
    InitiatorIndex: int
    ResponderIndex: int
    Cookie: int
    Time: int
    CertVersion: int
    def __init__(self, Cert: _Optional[bytes] = ..., InitiatorIndex: _Optional[int] = ..., ResponderIndex: _Optional[int] = ..., Cookie: _Optional[int] = ..., Time: _Optional[int] = ..., CertVersion: _Optional[int] = ...) -> None: ...

class Addr(_message.Message):
    __slots__ = ("Hi", "Lo")
    HI_FIELD_NUMBER: _ClassVar[int]
    LO_FIELD_NUMBER: _ClassVar[int]
    Hi: int
    Lo: int
    def __init__(self, Hi: _Optional[int] = ..., Lo: _Optional[int] = ...) -> None: ...

class V4AddrPort(_message.Message):
    __slots__ = ("Addr", "Port")
    ADDR_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    Addr: int
    Port: int
    def __init__(self, Addr: _Optional[int] = ..., Port: _Optional[int] = ...) -> None: ...

class V6AddrPort(_message.Message):
    __slots__ = ("Hi", "Lo", "Port")
    HI_FIELD_NUMBER: _ClassVar[int]
    LO_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    Hi: int
    Lo: int
    Port: int
    def __init__(self, Hi: _Optional[int] = ..., Lo: _Optional[int] = ..., Port: _Optional[int] = ...) -> None: ...

class NebulaMeta(_message.Message):
    __slots__ = ("Type", "Details")
    class MessageType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        Unset: _ClassVar[NebulaMeta.MessageType]
        HostQuery: _ClassVar[NebulaMeta.MessageType]
        HostQueryReply: _ClassVar[NebulaMeta.MessageType]
        HostUpdateNotification: _ClassVar[NebulaMeta.MessageType]
        HostMovedNotification: _ClassVar[NebulaMeta.MessageType]
        HostPunchNotification: _ClassVar[NebulaMeta.MessageType]
        HostWhoami: _ClassVar[NebulaMeta.MessageType]
        HostWhoamiReply: _ClassVar[NebulaMeta.MessageType]
        PathCheck: _ClassVar[NebulaMeta.MessageType]
        PathCheckReply: _ClassVar[NebulaMeta.MessageType]
        HostUpdateNotificationAck: _ClassVar[NebulaMeta.MessageType]
    Unset: NebulaMeta.MessageType
    HostQuery: NebulaMeta.MessageType
    HostQueryReply: NebulaMeta.MessageType
    HostUpdateNotification: NebulaMeta.MessageType
    HostMovedNotification: NebulaMeta.MessageType
    HostPunchNotification: NebulaMeta.MessageType
    HostWhoami: NebulaMeta.MessageType
    HostWhoamiReply: NebulaMeta.MessageType
    PathCheck: NebulaMeta.MessageType
    PathCheckReply: NebulaMeta.MessageType
    HostUpdateNotificationAck: NebulaMeta.MessageType
    TYPE_FIELD_NUMBER: _ClassVar[int]
    DETAILS_FIELD_NUMBER: _ClassVar[int]
    Type: NebulaMeta.MessageType
    Details: NebulaMetaDetails
    def __init__(self, Type: _Optional[_Union[NebulaMeta.MessageType, str]] = ..., Details: _Optional[_Union[NebulaMetaDetails, _Mapping]] = ...) -> None: ...

class NebulaMetaDetails(_message.Message):
    __slots__ = ("OldVpnAddr", "V4AddrPorts", "counter", "V6AddrPorts", "OldRelayVpnAddrs", "VpnAddr", "RelayVpnAddrs")
    OLDVPNADDR_FIELD_NUMBER: _ClassVar[int]
    V4ADDRPORTS_FIELD_NUMBER: _ClassVar[int]
    COUNTER_FIELD_NUMBER: _ClassVar[int]
    V6ADDRPORTS_FIELD_NUMBER: _ClassVar[int]
    OLDRELAYVPNADDRS_FIELD_NUMBER: _ClassVar[int]
    VPNADDR_FIELD_NUMBER: _ClassVar[int]
    RELAYVPNADDRS_FIELD_NUMBER: _ClassVar[int]
    OldVpnAddr: int
    V4AddrPorts: _containers.RepeatedCompositeFieldContainer[V4AddrPort]
    counter: int
    V6AddrPorts: _containers.RepeatedCompositeFieldContainer[V6AddrPort]
    OldRelayVpnAddrs: _containers.RepeatedScalarFieldContainer[int]
    VpnAddr: Addr
    RelayVpnAddrs: _containers.RepeatedCompositeFieldContainer[Addr]
    def __init__(self, OldVpnAddr: _Optional[int] = ..., V4AddrPorts: _Optional[_Iterable[_Union[V4AddrPort, _Mapping]]] = ..., counter: _Optional[int] = ..., V6AddrPorts: _Optional[_Iterable[_Union[V6AddrPort, _Mapping]]] = ..., OldRelayVpnAddrs: _Optional[_Iterable[int]] = ..., VpnAddr: _Optional[_Union[Addr, _Mapping]] = ..., RelayVpnAddrs: _Optional[_Iterable[_Union[Addr, _Mapping]]] = ...) -> None: ...

class NebulaControl(_message.Message):
    __slots__ = ("Type", "InitiatorRelayIndex", "ResponderRelayIndex", "OldRelayToAddr", "OldRelayFromAddr", "RelayToAddr", "RelayFromAddr")
    class MessageType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        Unset: _ClassVar[NebulaControl.MessageType]
        CreateRelayRequest: _ClassVar[NebulaControl.MessageType]
        CreateRelayResponse: _ClassVar[NebulaControl.MessageType]
    Unset: NebulaControl.MessageType
    CreateRelayRequest: NebulaControl.MessageType
    CreateRelayResponse: NebulaControl.MessageType
    TYPE_FIELD_NUMBER: _ClassVar[int]
    INITIATORRELAYINDEX_FIELD_NUMBER: _ClassVar[int]
    RESPONDERRELAYINDEX_FIELD_NUMBER: _ClassVar[int]
    OLDRELAYTOADDR_FIELD_NUMBER: _ClassVar[int]
    OLDRELAYFROMADDR_FIELD_NUMBER: _ClassVar[int]
    RELAYTOADDR_FIELD_NUMBER: _ClassVar[int]
    RELAYFROMADDR_FIELD_NUMBER: _ClassVar[int]
    Type: NebulaControl.MessageType
    InitiatorRelayIndex: int
    ResponderRelayIndex: int
    OldRelayToAddr: int
    OldRelayFromAddr: int
    RelayToAddr: Addr
    RelayFromAddr: Addr
    def __init__(self, Type: _Optional[_Union[NebulaControl.MessageType, str]] = ..., InitiatorRelayIndex: _Optional[int] = ..., ResponderRelayIndex: _Optional[int] = ..., OldRelayToAddr: _Optional[int] = ..., OldRelayFromAddr: _Optional[int] = ..., RelayToAddr: _Optional[_Union[Addr, _Mapping]] = ..., RelayFromAddr: _Optional[_Union[Addr, _Mapping]] = ...) -> None: ...

class RawNebulaCertificate(_message.Message):
    __slots__ = ("Details", "Signature")
    DETAILS_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    Details: RawNebulaCertificateDetails
    Signature: bytes
    def __init__(self, Details: _Optional[_Union[RawNebulaCertificateDetails, _Mapping]] = ..., Signature: _Optional[bytes] = ...) -> None: ...

class RawNebulaCertificateDetails(_message.Message):
    __slots__ = ("Name", "Ips", "Subnets", "Groups", "NotBefore", "NotAfter", "PublicKey", "IsCA", "Issuer", "curve")
    NAME_FIELD_NUMBER: _ClassVar[int]
    IPS_FIELD_NUMBER: _ClassVar[int]
    SUBNETS_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    NOTBEFORE_FIELD_NUMBER: _ClassVar[int]
    NOTAFTER_FIELD_NUMBER: _ClassVar[int]
    PUBLICKEY_FIELD_NUMBER: _ClassVar[int]
    ISCA_FIELD_NUMBER: _ClassVar[int]
    ISSUER_FIELD_NUMBER: _ClassVar[int]
    CURVE_FIELD_NUMBER: _ClassVar[int]
    Name: str
    Ips: _containers.RepeatedScalarFieldContainer[int]
    Subnets: _containers.RepeatedScalarFieldContainer[int]
    Groups: _containers.RepeatedScalarFieldContainer[str]
    NotBefore: int
    NotAfter: int
    PublicKey: bytes
    IsCA: bool
    Issuer: bytes
    curve: Curve
    def __init__(self, Name: _Optional[str] = ..., Ips: _Optional[_Iterable[int]] = ..., Subnets: _Optional[_Iterable[int]] = ..., Groups: _Optional[_Iterable[str]] = ..., NotBefore: _Optional[int] = ..., NotAfter: _Optional[int] = ..., PublicKey: _Optional[bytes] = ..., IsCA: _Optional[bool] = ..., Issuer: _Optional[bytes] = ..., curve: _Optional[_Union[Curve, str]] = ...) -> None: ...

class RawNebulaEncryptedData(_message.Message):
    __slots__ = ("EncryptionMetadata", "Ciphertext")
    ENCRYPTIONMETADATA_FIELD_NUMBER: _ClassVar[int]
    CIPHERTEXT_FIELD_NUMBER: _ClassVar[int]
    EncryptionMetadata: RawNebulaEncryptionMetadata
    Ciphertext: bytes
    def __init__(self, EncryptionMetadata: _Optional[_Union[RawNebulaEncryptionMetadata, _Mapping]] = ..., Ciphertext: _Optional[bytes] = ...) -> None: ...

class RawNebulaEncryptionMetadata(_message.Message):
    __slots__ = ("EncryptionAlgorithm", "Argon2Parameters")
    ENCRYPTIONALGORITHM_FIELD_NUMBER: _ClassVar[int]
    ARGON2PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    EncryptionAlgorithm: str
    Argon2Parameters: RawNebulaArgon2Parameters
    def __init__(self, EncryptionAlgorithm: _Optional[str] = ..., Argon2Parameters: _Optional[_Union[RawNebulaArgon2Parameters, _Mapping]] = ...) -> None: ...

class RawNebulaArgon2Parameters(_message.Message):
    __slots__ = ("version", "memory", "iterations", "parallelism", "salt")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    ITERATIONS_FIELD_NUMBER: _ClassVar[int]
    PARALLELISM_FIELD_NUMBER: _ClassVar[int]
    SALT_FIELD_NUMBER: _ClassVar[int]
    version: int
    memory: int
    iterations: int
    parallelism: int
    salt: bytes
    def __init__(self, version: _Optional[int] = ..., memory: _Optional[int] = ..., iterations: _Optional[int] = ..., parallelism: _Optional[int] = ..., salt: _Optional[bytes] = ...) -> None: ...
