"""Credentials of gRPC: mutual TLS 1.3 between members of the roster. The only home of credentials.

What a peer trusts is the very certificates in the roster, not the CA: a server takes those of all members, a client
those of the one member it calls. A certificate that is unknown, revoked, expired or another member's is refused in the
handshake. A connection outlives its handshake, though, so a server asks `caller` who is there at every call.
"""

import socket
import ssl
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

from cryptography import x509

from peertune.errors import IdentityError
from peertune.identity.certificates import check_address, pem
from peertune.identity.entries import Member
from peertune.identity.keys import Identity
from peertune.identity.roster import Roster
from peertune.wire.rpc import TLS_13_ONLY, grpc

_NAMED = "grpc.ssl_target_name_override"  # whose name the certificate must bear


def server_credentials(current: Callable[[], tuple[Identity, Roster]]) -> grpc.ServerCredentials:
    """Return a server's credentials, which ask `current` at each handshake who this peer is and who the members are.

    `current` must be quick and not raise: where it does, those of the last handshake count. Raises IdentityError where
    TLS 1.3 can't be had.
    """
    _check_tls()
    taken = current()

    def fetch() -> object:
        nonlocal taken
        new = current()
        if new[0] is taken[0] and new[1] is taken[1]:
            return None  # as before
        taken = new
        return _configuration(*new)

    return grpc.dynamic_ssl_server_credentials(_configuration(*taken), fetch, require_client_authentication=True)


def _configuration(identity: Identity, roster: Roster) -> grpc.ServerCertificateConfiguration:
    known = [pem(certificate) for member in roster.members for certificate in member.certificates]
    return grpc.ssl_server_certificate_configuration([(identity.key, identity.certificate)], _anchors(known, "roster"))


def secure_channel(identity: Identity, member: Member, options: Sequence[tuple[str, Any]] = ()) -> grpc.Channel:
    """Return a channel to a member, which only that member can answer.

    It holds for the member's present certificates: make a new one when the roster changes them. Raises IdentityError
    for a member without an address or a valid certificate, or where TLS 1.3 can't be had.
    """
    _check_tls()
    if member.address is None:
        raise IdentityError(f"{member.name}: has no address in the roster; it must be the one that dials")
    anchors = _anchors([pem(certificate) for certificate in member.valid()], member.name)
    credentials = grpc.ssl_channel_credentials(anchors, identity.key, identity.certificate)
    named = [*(option for option in options if option[0] != _NAMED), (_NAMED, member.name)]
    target = f"dns:///{check_address(member.address)}"  # never unix:7, which gRPC knows too
    return grpc.secure_channel(target, credentials, named)


def caller(context: grpc.ServicerContext, roster: Roster) -> Member | None:
    """Return the member who calls, by the certificate of the connection, or None where it is in no seat (any more)."""
    shown = context.auth_context().get("x509_pem_cert")
    if not shown:
        return None
    return roster.by_certificate(x509.load_pem_x509_certificate(shown[0]))


def places(address: str) -> list[IPv4Address | IPv6Address]:
    """Return where a host:port is, each once. Raises OSError where its name can't be resolved."""
    host, _, port = check_address(address).rpartition(":")
    found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    return list(dict.fromkeys(ip_address(str(place[0]).partition("%")[0]) for *_, place in found))


def is_there(member: Member, wait_s: float) -> bool:
    """Return whether this member answers at its address, whatever it makes of this peer.

    A handshake that shows no certificate tells: in TLS 1.3 the server proves first who it is. gRPC only says that a
    connection was closed, as those of a proxy are that reaches nobody.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(cadata=b"".join(map(pem, member.valid())).decode())
    context.set_alpn_protocols(["h2"])
    host, _, port = (member.address or "").rpartition(":")
    try:
        with (
            socket.create_connection((host.strip("[]"), int(port)), timeout=wait_s) as plain,
            context.wrap_socket(plain, server_hostname=member.name),
        ):
            return True
    except OSError:
        return False


def check_loopback(address: str) -> str:
    """Return an address that only this machine can reach. Raises IdentityError for any other."""
    port = check_address(address).rpartition(":")[2]
    try:
        found = places(address)
    except OSError as error:
        raise IdentityError(f"{address}: can't be resolved ({error.strerror}); give 127.0.0.1:{port}") from None
    if not all(place.is_loopback for place in found):
        raise IdentityError(f"{address}: is not of this machine alone; without TLS give 127.0.0.1:{port}")
    return address


def _anchors(certificates: Sequence[bytes], whose: str) -> bytes:
    if not certificates:  # gRPC would fall back to the web's CAs
        raise IdentityError(f"{whose}: holds no valid certificate; get a newer roster")
    return b"".join(certificates)


def _check_tls() -> None:
    if not TLS_13_ONLY:
        raise IdentityError(
            "gRPC was imported before peertune.wire.rpc, so TLS 1.2 is open; import peertune.wire.rpc first"
        )
