"""A small CA, and for each host a key and a certificate for both ends of TLS."""

import datetime
import ipaddress
import os
import re
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fusedisk.errors import FuseDiskError, UsageError
from fusedisk.state import write_durably

CA_DAYS, HOST_DAYS = 3650, 825
_CLOCK_SKEW = datetime.timedelta(hours=1)
_DNS_NAME = re.compile(r"[a-z0-9_](?:[a-z0-9._-]{0,251}[a-z0-9])?", re.ASCII)


@dataclass(frozen=True)
class HostKeys:
    """What was made for a host: a directory of ca.pem, cert.pem and key.pem."""

    host: str
    directory: Path
    expires: datetime.date


@dataclass(frozen=True)
class _Authority:
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate


def make_keys(directory: Path, hosts: list[str]) -> list[HostKeys]:
    """Make keys for hosts, by the CA in the directory, which is made where there is none.

    Nothing that exists is overwritten. Raises UsageError for a bad name, FuseDiskError for what
    exists or is unusable; then nothing was made.
    """
    names = [_general_name(host) for host in hosts]
    if len(set(names)) != len(names):
        raise UsageError("a host is named twice")
    for host in hosts:
        if os.path.lexists(directory / host):
            raise FuseDiskError(f"{directory / host} exists; move it away to make new keys")
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        authority = _authority(directory)
        return [
            _make_host(directory / host, host, name, authority)
            for host, name in zip(hosts, names, strict=True)
        ]
    except OSError as error:
        raise FuseDiskError(
            f"cannot write keys to {error.filename or directory}: {error.strerror}"
        ) from None


def _general_name(host: str) -> x509.GeneralName:
    try:
        if "%" not in host:
            return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if not _DNS_NAME.fullmatch(host.lower()) or ".." in host:
        raise UsageError(f"{host[:80]!r} is neither a host name nor an IP address")
    return x509.DNSName(host.lower())


def _authority(directory: Path) -> _Authority:
    key_file, certificate_file = directory / "ca-key.pem", directory / "ca.pem"
    if not key_file.exists() and not certificate_file.exists():
        return _make_authority(key_file, certificate_file)
    try:
        key = serialization.load_pem_private_key(key_file.read_bytes(), None)
        certificate = x509.load_pem_x509_certificate(certificate_file.read_bytes())
    except (FileNotFoundError, ValueError, TypeError) as error:
        raise FuseDiskError(
            f"the CA in {directory} is unusable ({error}); use another directory"
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or (
        certificate.public_key() != key.public_key()
    ):
        raise FuseDiskError(f"{key_file} is not the key of {certificate_file}")
    if certificate.not_valid_after_utc < _now() + datetime.timedelta(days=1):
        raise FuseDiskError(f"the CA in {directory} is expired; make a new one elsewhere")
    return _Authority(key, certificate)


def _make_authority(key_file: Path, certificate_file: Path) -> _Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fusedisk replication CA")])
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    certificate = (
        _builder(name, name, key, _now() + datetime.timedelta(days=CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(identifier, critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier),
            critical=False,
        )
        .sign(key, hashes.SHA256())
    )
    # The key first: a certificate without its key would stand in the way of the next try.
    _write_key(key_file, key)
    write_durably(certificate_file, certificate.public_bytes(serialization.Encoding.PEM))
    return _Authority(key, certificate)


def _make_host(
    directory: Path, host: str, name: x509.GeneralName, authority: _Authority
) -> HostKeys:
    key = ec.generate_private_key(ec.SECP256R1())
    issuer = authority.certificate
    expires = min(_now() + datetime.timedelta(days=HOST_DAYS), issuer.not_valid_after_utc)
    # A common name ends at 64 characters (RFC 5280); what counts is the alternative name.
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host[:64])])
    certificate = (
        _builder(subject, issuer.subject, key, expires)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        # Both: after a cutover the target sends, and the source receives.
        .add_extension(
            x509.ExtendedKeyUsage(
                [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
            ),
            critical=False,
        )
        .add_extension(x509.SubjectAlternativeName([name]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()),
            critical=False,
        )
        .sign(authority.key, hashes.SHA256())
    )
    directory.mkdir(mode=0o700)
    _write_key(directory / "key.pem", key)
    for file, content in (("cert.pem", certificate), ("ca.pem", issuer)):
        write_durably(directory / file, content.public_bytes(serialization.Encoding.PEM))
    return HostKeys(host, directory, expires.date())


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, end: datetime.datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_now() - _CLOCK_SKEW)
        .not_valid_after(end)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _write_key(file: Path, key: ec.EllipticCurvePrivateKey) -> None:
    # O_EXCL and the mode at once: never over a key, never readable by others for a moment.
    fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as out:
        out.write(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        out.flush()
        os.fsync(fd)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC).replace(microsecond=0)
