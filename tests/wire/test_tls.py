import re
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import NameOID
from parties import Federation

from peertune.errors import IdentityError
from peertune.identity.certificates import key_pem, new_key, pem, read_key
from peertune.identity.entries import Member
from peertune.identity.keys import Identity
from peertune.identity.roster import Roster
from peertune.topology import GRAPHS
from peertune.wire.rpc import grpc
from peertune.wire.tls import caller, check_loopback, is_there, places, secure_channel, server_credentials

LONG_AGO = datetime.now(UTC) - timedelta(days=100)
REFUSED = grpc.StatusCode.UNAVAILABLE


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    return Federation(tmp_path, "hospital-1", "hospital-2", "hospital-3")


class Server:
    """A peer that tells who calls; `now` is what it goes by, and may be changed while it runs."""

    def __init__(self, identity: Identity, roster: Roster) -> None:
        self.now = (identity, roster)
        self.handshakes = 0

    def current(self) -> tuple[Identity, Roster]:
        self.handshakes += 1
        return self.now

    def who(self, _: bytes, context: grpc.ServicerContext) -> bytes:
        member = caller(context, self.now[1])
        return b"nobody" if member is None else member.name.encode()


@contextmanager
def serving(server: Server, current: Callable[[], tuple[Identity, Roster]] | None = None) -> Iterator[int]:
    """Run a server on this machine; yield its port."""
    running = grpc.server(ThreadPoolExecutor(2))
    who = grpc.unary_unary_rpc_method_handler(server.who)
    running.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", {"Who": who}),))
    port = running.add_secure_port("localhost:0", server_credentials(current or server.current))
    running.start()
    try:
        yield port
    finally:
        running.stop(None).wait()


def ask(channel: grpc.Channel) -> object:
    """Ask who one is; return the answer or the status of the failure."""
    try:
        return channel.unary_unary("/test/Who")(b"", timeout=20)
    except grpc.RpcError as error:
        return error.code()


def call(identity: Identity, member: Member | None, port: int) -> object:
    assert member is not None
    with secure_channel(identity, replace(member, address=f"localhost:{port}")) as channel:
        return ask(channel)


def test_members_of_one_roster_reach_each_other_and_know_who_calls(federation: Federation) -> None:
    roster = federation.roster()
    for place, (name, other) in enumerate((("hospital-1", "hospital-2"), ("hospital-2", "hospital-1"))):
        with serving(Server(federation.identity(name, roster), roster)) as port:
            assert call(federation.identity(other, roster), roster.members[place], port) == other.encode()


def test_who_is_not_in_the_roster_is_refused(federation: Federation) -> None:
    roster = federation.roster()
    known = federation.identity("hospital-2", roster)
    impostors = Federation(federation.folder / "impostors", "hospital-1", "hospital-2")
    impostor = impostors.identity("hospital-2", impostors.roster())
    federation.join("hospital-4")  # the CA's, but not in the server's roster
    unlisted = federation.identity("hospital-4", federation.roster())
    with serving(Server(federation.identity("hospital-1", roster), roster)) as port:
        for stranger in (impostor, unlisted, replace(known, certificate=impostor.certificate, key=impostor.key)):
            assert call(stranger, roster.members[0], port) is REFUSED
        with grpc.insecure_channel(f"localhost:{port}") as plain:
            assert ask(plain) is REFUSED
        anchors = b"".join(map(pem, roster.members[0].certificates))
        named = (("grpc.ssl_target_name_override", "hospital-1"),)
        nobody = grpc.ssl_channel_credentials(anchors)
        with grpc.secure_channel(f"localhost:{port}", nobody, named) as bare:
            assert ask(bare) is REFUSED
        assert call(known, roster.members[0], port) == b"hospital-2"


def test_by_its_own_roster_a_peer_lets_its_neighbours_in_and_no_other_member(federation: Federation) -> None:
    whole = federation.roster()
    own = federation.own_rosters(GRAPHS["path"](clients=3), {"name": "a path"})["hospital-1"]
    with serving(Server(federation.identity("hospital-1", own), own)) as port:
        assert call(federation.identity("hospital-2", whole), whole.members[0], port) == b"hospital-2"
        assert call(federation.identity("hospital-3", whole), whole.members[0], port) is REFUSED


def test_a_server_that_is_another_member_or_another_ca_s_is_refused(federation: Federation) -> None:
    roster = federation.roster()
    known = federation.identity("hospital-2", roster)
    with serving(Server(federation.identity("hospital-3", roster), roster)) as port:
        assert call(known, roster.members[0], port) is REFUSED
        assert call(known, roster.members[2], port) == b"hospital-2"
    impostors = Federation(federation.folder / "impostors", "hospital-1")
    identity = impostors.identity("hospital-1", impostors.roster())
    with serving(Server(identity, roster)) as port:
        assert call(known, roster.members[0], port) is REFUSED


def test_who_is_revoked_while_the_server_runs_is_refused_and_nobody_on_an_open_connection(
    federation: Federation,
) -> None:
    roster = federation.roster()
    server = Server(federation.identity("hospital-1", roster), roster)
    gone, stays = (federation.identity(name, roster) for name in ("hospital-2", "hospital-3"))
    with serving(server) as port:
        member = replace(roster.members[0], address=f"localhost:{port}")
        with secure_channel(gone, member) as channel:
            assert ask(channel) == b"hospital-2"
            federation.revoke("hospital-2")
            server.now = (server.now[0], federation.roster())
            assert ask(channel) == b"nobody"
        assert call(gone, member, port) is REFUSED
        assert call(stays, member, port) == b"hospital-3"


def test_who_joins_while_the_server_runs_is_let_in(federation: Federation) -> None:
    roster = federation.roster()
    server = Server(federation.identity("hospital-1", roster), roster)
    federation.join("hospital-4")
    newer = federation.roster()
    with serving(server) as port:
        assert call(federation.identity("hospital-4", newer), roster.members[0], port) is REFUSED
        server.now = (server.now[0], newer)
        assert call(federation.identity("hospital-4", newer), roster.members[0], port) == b"hospital-4"


def test_own_certificate_is_renewed_while_the_server_runs(federation: Federation) -> None:
    before = federation.roster()
    client = federation.identity("hospital-2", before)
    server = Server(federation.identity("hospital-1", before), before)
    federation.join("hospital-1")
    after = federation.roster()
    old, both = before.members[0], after.members[0]
    new = replace(both, certificates=both.certificates[1:])
    with serving(server) as port:
        assert [call(client, member, port) for member in (old, both, new)] == [b"hospital-2", b"hospital-2", REFUSED]
        server.now = (federation.identity("hospital-1", after), after)
        assert [call(client, member, port) for member in (old, both, new)] == [REFUSED, b"hospital-2", b"hospital-2"]


def test_both_certificates_of_a_member_that_renews_are_let_in(federation: Federation) -> None:
    before = federation.roster()
    old = federation.identity("hospital-2", before)
    federation.join("hospital-2")
    after = federation.roster()
    with serving(Server(federation.identity("hospital-1", after), after)) as port:
        for identity in (old, federation.identity("hospital-2", after)):
            assert call(identity, after.members[0], port) == b"hospital-2"


def test_an_expired_certificate_is_refused_on_both_sides(federation: Federation) -> None:
    old = Federation(federation.folder / "old", now=LONG_AGO)
    old.join("hospital-1", days=366, now=LONG_AGO)
    old.join("hospital-2", days=90, now=LONG_AGO)
    roster = old.roster(LONG_AGO)
    valid, expired = old.identity("hospital-1", roster), old.identity("hospital-2", roster, LONG_AGO)
    with serving(Server(valid, roster)) as port:
        assert call(expired, roster.members[0], port) is REFUSED
        assert call(valid, roster.members[0], port) == b"hospital-1"
    with serving(Server(expired, roster)) as port:
        with pytest.raises(IdentityError, match="hospital-2: holds no valid certificate"):
            call(valid, roster.members[1], port)
        anchor = grpc.ssl_channel_credentials(pem(roster.members[1].certificates[0]), valid.key, valid.certificate)
        named = (("grpc.ssl_target_name_override", "hospital-2"),)
        with grpc.secure_channel(f"localhost:{port}", anchor, named) as channel:
            assert ask(channel) is REFUSED


def test_a_member_who_can_not_be_called_is_told_apart(federation: Federation) -> None:
    roster = federation.roster()
    identity = federation.identity("hospital-1", roster)
    with pytest.raises(IdentityError, match="hospital-2: has no address in the roster"):
        secure_channel(identity, roster.members[1])
    with pytest.raises(IdentityError, match="hospital-2: holds no valid certificate"):
        secure_channel(identity, replace(roster.members[1], address="localhost:1", certificates=()))
    with pytest.raises(IdentityError, match="give host:port"):
        secure_channel(identity, replace(roster.members[1], address="unix:/tmp/x"))
    with pytest.raises(IdentityError, match="roster: holds no valid certificate"):
        server_credentials(lambda: (identity, replace(roster, members=())))


def test_options_of_a_channel_do_not_change_whom_it_calls(federation: Federation) -> None:
    roster = federation.roster()
    identity, another = federation.identity("hospital-2", roster), [("grpc.ssl_target_name_override", "hospital-3")]
    with serving(Server(federation.identity("hospital-1", roster), roster)) as port:
        for member, answer in ((roster.members[0], b"hospital-2"), (roster.members[2], REFUSED)):
            with secure_channel(identity, replace(member, address=f"localhost:{port}"), another) as channel:
                assert ask(channel) == answer


def test_a_server_goes_on_with_what_it_knew_where_nothing_newer_can_be_had(federation: Federation) -> None:
    roster = federation.roster()
    server = Server(federation.identity("hospital-1", roster), roster)

    def failing() -> tuple[Identity, Roster]:
        if server.current() and server.handshakes > 1:
            raise OSError("no disk")
        return server.now

    with serving(server, failing) as port:
        assert call(federation.identity("hospital-2", roster), roster.members[0], port) == b"hospital-2"
    assert server.handshakes > 1


def shaking(version: ssl.TLSVersion, pair: bytes, folder: Path) -> ssl.SSLContext:
    """A client of Python's own TLS."""
    (folder / "pair.pem").write_bytes(pair)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.minimum_version = context.maximum_version = version
    context.load_cert_chain(folder / "pair.pem")
    context.set_alpn_protocols(["h2"])
    return context


def shake(
    context: ssl.SSLContext, port: int, session: ssl.SSLSession | None = None
) -> tuple[bytes, ssl.SSLSession | None]:
    """Return the first bytes of the server's HTTP/2, none if it refuses, and the session to resume."""
    try:
        with (
            socket.create_connection(("localhost", port), timeout=20) as plain,
            context.wrap_socket(plain, server_hostname="hospital-1", session=session) as secure,
        ):
            secure.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0")
            return secure.recv(9), secure.session
    except (ssl.SSLError, ConnectionError):
        return b"", None


def test_only_tls_1_3_is_spoken(federation: Federation, tmp_path: Path) -> None:
    roster = federation.roster()
    client = federation.identity("hospital-2", roster)
    with serving(Server(federation.identity("hospital-1", roster), roster)) as port:
        pair = client.key + client.certificate
        assert shake(shaking(ssl.TLSVersion.TLSv1_2, pair, tmp_path), port)[0] == b""
        settings, _ = shake(shaking(ssl.TLSVersion.TLSv1_3, pair, tmp_path), port)
        assert settings[3:4] == b"\4", "a frame of HTTP/2's settings"


def test_who_is_revoked_gets_in_by_no_session_of_before(federation: Federation, tmp_path: Path) -> None:
    roster = federation.roster()
    server = Server(federation.identity("hospital-1", roster), roster)
    client = federation.identity("hospital-2", roster)
    context = shaking(ssl.TLSVersion.TLSv1_3, client.key + client.certificate, tmp_path)
    with serving(server) as port:
        _, session = shake(context, port)
        assert session is not None
        assert shake(context, port, session)[0] != b""
        federation.revoke("hospital-2")
        server.now = (server.now[0], federation.roster())
        assert shake(context, port, session)[0] == b""


def test_a_client_does_not_speak_tls_1_2_either(federation: Federation, tmp_path: Path) -> None:
    roster = federation.roster()
    served, client = (federation.identity(name, roster) for name in ("hospital-1", "hospital-2"))
    (tmp_path / "pair.pem").write_bytes(served.key + served.certificate)
    for version, spoken in ((ssl.TLSVersion.TLSv1_2, False), (ssl.TLSVersion.TLSv1_3, True)):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tmp_path / "pair.pem")
        context.minimum_version = context.maximum_version = version
        context.set_alpn_protocols(["h2"])
        with socket.create_server(("127.0.0.1", 0)) as listening, ThreadPoolExecutor(1) as pool:
            answer = pool.submit(call, client, roster.members[0], listening.getsockname()[1])
            listening.settimeout(20)
            plain, _ = listening.accept()
            try:
                with context.wrap_socket(plain, server_side=True) as secure:
                    assert secure.recv(3) == b"PRI"
                    heard = True
            except (ssl.SSLError, ConnectionError):
                heard = False
            listening.close()
            assert answer.result() is REFUSED
        assert heard == spoken


def test_whether_a_member_is_there_is_told_without_its_taking_this_peer(federation: Federation, tmp_path: Path) -> None:
    roster = federation.roster()
    one, other, silent = (replace(member, address="localhost:1") for member in roster.members)
    assert not is_there(one, 20), "nobody listens"
    with serving(Server(federation.identity("hospital-1", roster), roster)) as port:
        assert is_there(replace(one, address=f"localhost:{port}"), 20)
        assert not is_there(replace(other, address=f"localhost:{port}"), 20), "somebody else"
    with socket.create_server(("127.0.0.1", 0)) as mute:
        assert not is_there(replace(silent, address=f"127.0.0.1:{mute.getsockname()[1]}"), 0.2)


def test_a_member_cannot_make_another_member(federation: Federation, tmp_path: Path) -> None:
    roster = federation.roster()
    insider = federation.identity("hospital-2", roster)
    signer, own = read_key(insider.key, "insider"), x509.load_pem_x509_certificate(insider.certificate)
    key = new_key()
    for issuer in (own.subject, roster.members[2].certificates[0].issuer):
        forged = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "hospital-3")]))
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(datetime.now(UTC) - timedelta(days=1))
            .not_valid_after(datetime.now(UTC) + timedelta(days=1))
            .add_extension(x509.SubjectAlternativeName([x509.DNSName("hospital-3")]), critical=False)
            .sign(signer, hashes.SHA256())
        )
        with serving(Server(federation.identity("hospital-1", roster), roster)) as port:
            chain = pem(forged) + insider.certificate
            context = shaking(ssl.TLSVersion.TLSv1_3, key_pem(key) + chain, tmp_path)
            assert shake(context, port)[0] == b""
            assert call(replace(insider, key=key_pem(key), certificate=chain), roster.members[0], port) is REFUSED


def test_another_s_certificate_is_of_no_use_without_its_key(federation: Federation) -> None:
    roster = federation.roster()
    insider, other = (federation.identity(name, roster) for name in ("hospital-2", "hospital-3"))
    with serving(Server(federation.identity("hospital-1", roster), roster)) as port:
        assert call(replace(insider, certificate=other.certificate), roster.members[0], port) is REFUSED


def test_on_a_connection_without_tls_the_caller_is_nobody(federation: Federation) -> None:
    roster = federation.roster()
    server = Server(federation.identity("hospital-1", roster), roster)
    running = grpc.server(ThreadPoolExecutor(1))
    who = grpc.unary_unary_rpc_method_handler(server.who)
    running.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", {"Who": who}),))
    port = running.add_insecure_port("localhost:0")
    running.start()
    with grpc.insecure_channel(f"localhost:{port}") as channel:
        assert ask(channel) == b"nobody"
    running.stop(None).wait()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.8.8.8:50051", "[::1]:50051", "localhost:50051"])
def test_addresses_of_this_machine_alone(address: str) -> None:
    assert check_loopback(address) == address


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("0.0.0.0:1", "is not of this machine alone; without TLS give 127.0.0.1:1$"),
        ("[::]:1", "is not of this machine alone; without TLS give 127.0.0.1:1$"),
        ("10.0.0.1:50051", "is not of this machine alone"),
        ("no-such-host.invalid:1", "can't be resolved"),
        ("127.0.0.1", "give host:port"),
    ],
)
def test_other_addresses_are_not(address: str, why: str) -> None:
    with pytest.raises(IdentityError, match=why):
        check_loopback(address)


def test_a_name_of_this_machine_and_of_another_is_not_of_this_machine_alone(monkeypatch: pytest.MonkeyPatch) -> None:

    def resolve(*names: str) -> None:  # as a resolver would: this machine's knows no such name
        families = [socket.AF_INET6 if ":" in name else socket.AF_INET for name in names]
        found = [
            (family, socket.SOCK_STREAM, 6, "", (name, 50051)) for family, name in zip(families, names, strict=True)
        ]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)

    resolve("::1", "127.0.0.1")
    assert check_loopback("both.example.org:50051") == "both.example.org:50051"
    resolve("::1", "fe80::1%eth0", "127.0.0.1", "::1", "fe80::1%eth1")
    assert list(map(str, places("both.example.org:50051"))) == ["::1", "fe80::1", "127.0.0.1"], "each once"
    for names in (("127.0.0.1", "10.0.0.1"), ("10.0.0.1", "127.0.0.1")):
        resolve(*names)
        with pytest.raises(IdentityError, match="is not of this machine alone"):
            check_loopback("both.example.org:50051")


OPEN = "gRPC was imported before peertune.wire.rpc, so TLS 1.2 is open; import peertune.wire.rpc first"
LATE = """
import grpc
from peertune.errors import IdentityError
from peertune.wire import tls
for make in (lambda: tls.server_credentials(lambda: None), lambda: tls.secure_channel(None, None)):
    try:
        make()
    except IdentityError as error:
        print(error)
"""


def test_no_credentials_are_made_where_grpc_was_imported_too_early() -> None:
    done = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True, check=True, env={})
    assert (done.stdout, done.stderr) == (2 * f"{OPEN}\n", "")


def test_where_tls_1_2_is_open_no_side_gets_credentials(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    roster = federation.roster()
    identity = federation.identity("hospital-1", roster)
    monkeypatch.setattr("peertune.wire.tls.TLS_13_ONLY", False)
    told = f"^{re.escape(OPEN)}$"
    with pytest.raises(IdentityError, match=told):
        server_credentials(lambda: (identity, roster))
    with pytest.raises(IdentityError, match=told):
        secure_channel(identity, replace(roster.members[1], address="localhost:1"))


def test_identity_loads_without_grpc_and_tls_without_torch() -> None:
    code = (
        "import os, sys, peertune.identity.authority, peertune.wire.limits; "
        "print('grpc' in sys.modules, *(key for key in os.environ if 'GRPC' in key)); "
        "import peertune.wire.tls; print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={}).stdout
    first, _, rest = done.partition("\n")
    assert first == "False", "nor is anything set for it"
    assert "grpc" in rest.split()
    assert "torch" not in rest.split()
