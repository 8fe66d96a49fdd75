"""TLS 1.3 with certificates on both sides, and what its errors mean to who has to mend them."""

import contextlib
import ssl
from pathlib import Path
from typing import Final

import trio

from fusedisk.errors import FuseDiskError
from replicator.transport.unsent import unsent_bytes

_DEFAULT_PLACES: Final = (Path("~/.config/fusedisk/tls"), Path("/etc/fusedisk/tls"))
_MAKE_KEYS = "make keys with 'replicator keys' and give their directory as --tls"

NOT_TLS_ALERT: Final = bytes.fromhex("15 0303 0002 02 28")
"""What is said where one side is TLS and the other not: the alert handshake_failure (RFC 8446)."""

_FOREIGN: Final = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "HTTPS_PROXY_REQUEST")

# X509_V_ERR_* of OpenSSL's x509_vfy.h.
_EXPIRED, _NOT_YET_VALID = 10, 9
_NAME_MISMATCHES = (62, 64)

_ALERTS: Final = {
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "wants a certificate, and this side has none",
    "TLSV1_ALERT_UNKNOWN_CA": "does not know the CA of this side's certificate",
    "TLSV1_ALERT_DECRYPT_ERROR": "does not know the CA of this side's certificate",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "says that this side's certificate is expired",
    "SSLV3_ALERT_BAD_CERTIFICATE": "does not accept this side's certificate",
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": "does not accept this side's kind of certificate",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "does not accept this side's certificate",
}
_ALERT_REMEDY = "use certificates of one CA on both sides ('replicator keys')"


def client_context(directory: Path | None) -> ssl.SSLContext:
    """For a sender. Raises FuseDiskError where the files are missing or unusable."""
    return _context(ssl.PROTOCOL_TLS_CLIENT, directory)


def server_context(directory: Path | None) -> ssl.SSLContext:
    """For a receiver; a peer without a certificate of the CA does not get in."""
    context = _context(ssl.PROTOCOL_TLS_SERVER, directory)
    context.verify_mode = ssl.CERT_REQUIRED
    # Sessions last for days and resuming would skip the look at the certificate's dates.
    context.num_tickets = 0
    return context


def _context(protocol: int, given: Path | None) -> ssl.SSLContext:
    directory = given if given is not None else _default_directory()
    files = [directory / name for name in ("ca.pem", "cert.pem", "key.pem")]
    for file in files:
        try:
            mode = file.stat().st_mode
        except OSError as error:
            raise FuseDiskError(f"cannot read {file}: {error.strerror}; {_MAKE_KEYS}") from None
    if mode & 0o077:
        raise FuseDiskError(f"{file} may be read by others; chmod 600 it")
    ca, certificate, key = files
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_verify_locations(ca)
        context.load_cert_chain(certificate, key, password=_no_password)
    except (OSError, ValueError) as error:
        raise FuseDiskError(
            f"the keys in {directory} are unusable ({_reason(error)}); {_MAKE_KEYS}"
        ) from None
    return context


def _no_password() -> str:
    # Without this OpenSSL asks on the terminal, where a daemon has none.
    raise ValueError("the key is protected by a password")


def _default_directory() -> Path:
    for place in _DEFAULT_PLACES:
        with contextlib.suppress(RuntimeError):
            if (found := place.expanduser()).is_dir():
                return found
    places = " or ".join(map(str, _DEFAULT_PLACES))
    raise FuseDiskError(f"there are no TLS keys in {places}; {_MAKE_KEYS}")


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or "not PEM").lower().replace("_", " ")
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


class TlsStream(trio.abc.Stream):
    """An SSLStream whose errors say what is wrong.

    In TLS 1.3 a client learns only when it first reads that its certificate was refused.
    """

    def __init__(self, stream: "trio.SSLStream[trio.SocketStream]", peer: str) -> None:
        self._stream, self._peer = stream, peer

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Raises FuseDiskError if the certificate was refused, else as SSLStream does."""
        with self._explained():
            await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        """As SSLStream does."""
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """Raises FuseDiskError if the certificate was refused, else as SSLStream does."""
        with self._explained():
            return await self._stream.receive_some(max_bytes)

    def unsent_bytes(self) -> int:
        """What the socket below has not sent."""
        return unsent_bytes(self._stream)

    async def aclose(self) -> None:
        """Close."""
        await self._stream.aclose()

    @contextlib.contextmanager
    def _explained(self):  # type: ignore[no-untyped-def]
        try:
            yield
        except trio.BrokenResourceError as error:
            reason = getattr(error.__cause__, "reason", None)
            if reason in _ALERTS:
                raise FuseDiskError(f"{self._peer} {_ALERTS[reason]}; {_ALERT_REMEDY}") from None
            raise


async def shake_hands(
    stream: trio.SocketStream, context: ssl.SSLContext, host: str, peer: str
) -> TlsStream:
    """Become the client of a receiver called ``peer``, whose certificate must be for ``host``.

    Raises FuseDiskError where trying again would not help, and OSError.
    """
    tls = trio.SSLStream(stream, context, server_hostname=host.partition("%")[0])
    try:
        await tls.do_handshake()
    except trio.BrokenResourceError as error:
        await _flush_alert(tls)
        await trio.aclose_forcefully(stream)
        raise _client_error(error.__cause__, host, peer) from None
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise
    return TlsStream(tls, peer)


def _client_error(cause: BaseException | None, host: str, peer: str) -> Exception:
    if isinstance(cause, ssl.SSLCertVerificationError):
        if cause.verify_code in _NAME_MISMATCHES:
            return FuseDiskError(
                f"the certificate of {peer} is not for {host}; connect by a name that it is for, "
                f"or make one for {host} ('replicator keys')"
            )
        if cause.verify_code == _EXPIRED:
            return FuseDiskError(f"the certificate of {peer} is expired; make a new one there")
        if cause.verify_code == _NOT_YET_VALID:
            return FuseDiskError(f"the certificate of {peer} is not valid yet; check both clocks")
        return FuseDiskError(
            f"the certificate of {peer} is not of this side's CA ({cause.verify_message}); "
            f"{_ALERT_REMEDY}"
        )
    if isinstance(cause, ssl.SSLEOFError) or not isinstance(cause, ssl.SSLError):
        return ConnectionError(f"{peer} ended the TLS handshake")
    if cause.reason in _ALERTS:
        return FuseDiskError(f"{peer} {_ALERTS[cause.reason]}; {_ALERT_REMEDY}")
    return FuseDiskError(
        f"{peer} does not speak TLS 1.3 ({_reason(cause)}); is it a plain tcp:// receiver?"
    )


async def admit(stream: "trio.SSLStream[trio.SocketStream]", allow: tuple[str, ...]) -> str | None:
    """Be the server of a handshake; what to refuse this client with, if its names are not allowed.

    Raises trio.BrokenResourceError with the reason where it has no certificate that counts.
    """
    try:
        await stream.do_handshake()
    except trio.BrokenResourceError as error:
        # OpenSSL has no answer for what is not TLS at all.
        foreign = getattr(error.__cause__, "reason", None) in _FOREIGN
        await _flush_alert(stream, NOT_TLS_ALERT if foreign else b"")
        raise trio.BrokenResourceError(_server_reason(error.__cause__)) from None
    names = _names(stream.getpeercert())
    if not allow or names & {name.lower() for name in allow}:
        return None
    return "this side's certificate is not one that the receiver allows; see its --allow"


def _names(certificate: dict[str, object] | None) -> set[str]:
    entries = (certificate or {}).get("subjectAltName", ())
    assert isinstance(entries, tuple)
    return {value.lower() for kind, value in entries if kind in ("DNS", "IP Address")}


def _server_reason(cause: BaseException | None) -> str:
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"the client's certificate was refused: {cause.verify_message}"
    if isinstance(cause, ssl.SSLError) and not isinstance(cause, ssl.SSLEOFError):
        if cause.reason in _ALERTS:
            return f"the client refused the certificate of this receiver ({_reason(cause)})"
        if cause.reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
            return "the client has no certificate"
        return f"the client does not speak TLS 1.3 ({_reason(cause)})"
    return "the client ended the TLS handshake"


async def _flush_alert(stream: "trio.SSLStream[trio.SocketStream]", otherwise: bytes = b"") -> None:
    """Send the alert that says why the handshake failed, which SSLStream makes but keeps.

    Then take what the peer still sends: closing over it would reset the connection, and the peer
    would lose the alert.
    """
    outgoing = getattr(stream, "_outgoing", None)
    if not isinstance(outgoing, ssl.MemoryBIO):
        return
    with trio.move_on_after(1), contextlib.suppress(trio.BrokenResourceError):
        await stream.transport_stream.send_all(outgoing.read() or otherwise)
        await stream.transport_stream.send_eof()
        while await stream.transport_stream.receive_some(4096):
            pass
