"""Names, addresses, keys, requests and certificates: the only home of X.509. Values in, values out, no files.

A certificate says that a public key is the key of a name in a federation. Keys are on the curve P-256, signatures
ECDSA with SHA-256; the federation's name stands in the organisation (O), the member's in the one DNS name.
"""

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from ipaddress import IPv6Address

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from peertune.errors import IdentityError

MAX_BYTES = 2**16
"""The most that a key, a request or a certificate may take."""

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_LABEL = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_ADDRESS = re.compile(rf"({_LABEL}(\.{_LABEL})*|\[(?P<v6>[0-9A-Fa-f:.]+)\]):(?P<port>[1-9][0-9]{{0,4}})")
_SCHEME = "peertune://"
_CA_DAYS = 3650
_MAX_DAYS = 366
_EARLIER = timedelta(days=1)  # before now a certificate begins: clocks may be wrong
_UNREADABLE = (
    ValueError,
    TypeError,
    InvalidSignature,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.ExtensionNotFound,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)


@dataclass(frozen=True)
class Request:
    """What a peer asks of the CA; its signature has shown that it holds the key."""

    name: str
    address: str | None  # host:port; None: it can only dial out
    key: ec.EllipticCurvePublicKey


def check_name(name: str, what: str = "name") -> str:
    """Return the name of a member or a federation. Raises IdentityError for anything but a DNS label."""
    if not _NAME.fullmatch(name):
        raise IdentityError(
            f"{what} {name!r}: give lower-case letters, digits and hyphens, such as hospital-3, up to 63"
        )
    return name


def check_address(address: str) -> str:
    """Return a peer's address. Raises IdentityError for anything but host:port."""
    found = _ADDRESS.fullmatch(address)
    try:
        if found is None or len(address) > 260 or int(found["port"]) > 65535:
            raise ValueError
        if found["v6"] is not None:
            IPv6Address(found["v6"])
    except ValueError:
        raise IdentityError(f"address {address!r}: give host:port, such as peer.example.org:50051") from None
    return address


def new_key() -> ec.EllipticCurvePrivateKey:
    """Make a key."""
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return a key as a file holds it."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def read_key(pem: bytes, where: object) -> ec.EllipticCurvePrivateKey:
    """Read a key. Raises IdentityError, which says `where`, for what is none of ours."""
    try:
        key = serialization.load_pem_private_key(pem, password=None)
        if isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, ec.SECP256R1):
            return key
    except _UNREADABLE:
        pass
    raise IdentityError(f"{where}: is no key that peertune made; restore it, or make a new one")


def pem(certificate: x509.Certificate) -> bytes:
    """Return a certificate as a file holds it."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def fingerprint(key: ec.EllipticCurvePublicKey) -> str:
    """Return the SHA-256 of a public key in groups of four hexadecimal digits, to compare by telephone."""
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return sha256(der).digest().hex(" ", 2)


def fingerprint_of(certificate: x509.Certificate) -> str:
    """Return the fingerprint of a certificate's key. Raises IdentityError where that isn't on P-256."""
    return fingerprint(public_key(certificate))


def public_key(certificate: x509.Certificate) -> ec.EllipticCurvePublicKey:
    """Return a certificate's public key. Raises IdentityError where it isn't on P-256."""
    return _on_our_curve(certificate.public_key(), "certificate")


def _on_our_curve(key: object, where: object) -> ec.EllipticCurvePublicKey:
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1):
        return key
    raise IdentityError(f"{where}: its key is not on the curve P-256; make one with peertune")


def holds_at(certificate: x509.Certificate, now: datetime) -> bool:
    """Return whether a certificate is in its validity."""
    return certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc


# ---- requests


def make_request(key: ec.EllipticCurvePrivateKey, name: str, address: str | None) -> bytes:
    """Return a signing request (PKCS#10, PEM). Raises IdentityError for a name or an address that can't be."""
    names: list[x509.GeneralName] = [x509.DNSName(check_name(name))]
    if address is not None:
        names.append(x509.UniformResourceIdentifier(_SCHEME + check_address(address)))
    made = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(key, hashes.SHA256())
    )
    return made.public_bytes(serialization.Encoding.PEM)


def read_request(data: bytes, where: object) -> Request:
    """Read a signing request and check its own signature.

    Raises IdentityError, which says `where`, for what is no request, isn't signed with its own key, or asks for more
    than one name and one address.
    """
    try:
        if len(data) > MAX_BYTES:
            raise ValueError("too long")
        read = x509.load_pem_x509_csr(data)
        signed = read.is_signature_valid
        names = read.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except _UNREADABLE:
        raise IdentityError(f"{where}: is no signing request; make one with peertune peer request") from None
    if not signed:
        raise IdentityError(f"{where}: isn't signed with its own key; have it made and sent again")
    hosts = names.get_values_for_type(x509.DNSName)
    links = names.get_values_for_type(x509.UniformResourceIdentifier)
    ours = all(link.startswith(_SCHEME) for link in links)
    if len(hosts) != 1 or len(links) > 1 or len(hosts) + len(links) != len(names) or not ours:
        raise IdentityError(
            f"{where}: must ask for one name and at most one address; make it with peertune peer request"
        )
    try:
        address = check_address(links[0].removeprefix(_SCHEME)) if links else None
        return Request(check_name(hosts[0]), address, _on_our_curve(read.public_key(), "key"))
    except IdentityError as error:
        raise IdentityError(f"{where}: {error}") from None


# ---- certificates


def issue_ca(key: ec.EllipticCurvePrivateKey, federation: str, now: datetime | None = None) -> x509.Certificate:
    """Return a CA's certificate of itself. Raises IdentityError for a federation's name that can't be."""
    organisation = x509.NameAttribute(NameOID.ORGANIZATION_NAME, check_name(federation, "federation"))
    name = x509.Name([organisation, x509.NameAttribute(NameOID.COMMON_NAME, "CA")])
    return (
        _builder(name, name, key.public_key(), now or datetime.now(UTC), _CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(sign_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def issue(
    ca_key: ec.EllipticCurvePrivateKey, ca: x509.Certificate, request: Request, days: int, now: datetime | None = None
) -> x509.Certificate:
    """Return the certificate that a request asks for. Raises IdentityError for days that can't be."""
    now = now or datetime.now(UTC)
    if not 1 <= days <= _MAX_DAYS:
        raise IdentityError(f"days {days}: give 1 to {_MAX_DAYS}")
    if now + timedelta(days=days) > ca.not_valid_after_utc:
        raise IdentityError(f"the CA's own certificate ends on {ca.not_valid_after_utc:%Y-%m-%d}; give fewer days")
    organisation = x509.NameAttribute(NameOID.ORGANIZATION_NAME, federation_of(ca))
    name = x509.Name([organisation, x509.NameAttribute(NameOID.COMMON_NAME, request.name)])
    both = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    return (
        _builder(name, ca.subject, request.key, now, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(sign_certificates=False), critical=True)
        .add_extension(both, critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(request.name)]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, days: int
) -> x509.CertificateBuilder:
    now = now.replace(microsecond=0)  # what a certificate can say
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _EARLIER)
        .not_valid_after(now + timedelta(days=days))
    )


def _usage(*, sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        key_cert_sign=sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )


def federation_of(ca: x509.Certificate) -> str:
    """Return the federation whose CA this is. Raises IdentityError for what is no CA's certificate of itself."""
    try:
        ca.verify_directly_issued_by(ca)
        if ca.extensions.get_extension_for_class(x509.BasicConstraints).value.ca:
            return _organisation(ca)
    except _UNREADABLE:
        pass
    raise IdentityError("the CA's certificate isn't one; take the file that the CA returned as it is")


def check_issued(certificate: x509.Certificate, ca: x509.Certificate) -> str:
    """Return the name of the member whose certificate this is. Raises IdentityError where this CA didn't issue it."""
    try:
        certificate.verify_directly_issued_by(ca)
        names = list(certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
        leaf = not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        same = _organisation(certificate) == _organisation(ca)
    except _UNREADABLE:
        raise IdentityError(
            "certificate: isn't issued by the federation's CA; take the one that the CA returned"
        ) from None
    if not leaf or not same or len(names) != 1 or not isinstance(names[0], x509.DNSName):
        raise IdentityError("certificate: is no member's; take the one that the CA returned")
    public_key(certificate)
    return check_name(names[0].value)


def _organisation(certificate: x509.Certificate) -> str:
    (name,) = certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
    return check_name(str(name.value), "federation")


def bundle(certificate: x509.Certificate, ca: x509.Certificate) -> bytes:
    """Return what the CA returns to a member: the certificate, followed by the CA's own."""
    return pem(certificate) + pem(ca)


def read_bundle(data: bytes, where: object) -> tuple[x509.Certificate, x509.Certificate]:
    """Read a member's certificate and its CA's. Raises IdentityError, which says `where`, for anything else."""
    try:
        certificate, ca = x509.load_pem_x509_certificates(data)
        federation_of(ca)
        check_issued(certificate, ca)
    except _UNREADABLE:
        raise IdentityError(f"{where}: must hold a member's certificate and its CA's; put the CA's file back") from None
    except IdentityError as error:
        raise IdentityError(f"{where}: {error}") from None
    return certificate, ca
