"""TLS with real processes and certificates: who gets in, and what the others are told."""

import datetime
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import wait_for
from cryptography import x509
from test_replication import REPLICATOR, Pair
from test_replication import pair as pair
from transport_helpers import copy, receive, said_one_line

from replicator import keys as keys_module
from replicator.keys import make_keys


class Keys:
    """Directories of keys by host, of one CA."""

    def __init__(self, directory: Path, *hosts: str) -> None:
        self.directory = directory
        make_keys(directory, list(hosts))

    def of(self, host: str) -> Path:
        return self.directory / host


def test_tls(pair: Pair) -> None:
    keys = Keys(pair.tmp_path / "keys", "127.0.0.1", "source.example", "other.example")
    options = ("--tls", keys.of("127.0.0.1"), "--allow", "Source.Example")
    receive(pair, "tls://127.0.0.1:0", *options)
    copy(pair, "--tls", keys.of("source.example"))
    refused = pair.start("--once", "--tls", str(keys.of("other.example")))
    said_one_line(refused, "--allow")


def test_tls_keys_are_found_where_they_belong(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    home = pair.tmp_path / "home"
    place = home / ".config/fusedisk/tls"
    place.parent.mkdir(parents=True)
    make_keys(pair.tmp_path / "keys", ["127.0.0.1"])
    shutil.copytree(pair.tmp_path / "keys/127.0.0.1", place)
    monkeypatch.setenv("HOME", str(home))
    receive(pair, "tls://127.0.0.1:0")
    copy(pair)
    (place / "key.pem").chmod(0o640)
    said_one_line(pair.start("--once"), "chmod 600")
    shutil.rmtree(place)
    said_one_line(pair.start("--once"), "replicator keys")


def test_tls_name_of_the_receiver_is_checked(pair: Pair) -> None:
    keys = Keys(pair.tmp_path / "keys", "elsewhere.example", "source.example")
    receive(pair, "tls://127.0.0.1:0", "--tls", keys.of("elsewhere.example"))
    refused = pair.start("--once", "--tls", str(keys.of("source.example")))
    said_one_line(refused, "is not for 127.0.0.1")


def test_tls_ca_is_checked_by_both_sides(pair: Pair) -> None:
    ours = Keys(pair.tmp_path / "ours", "127.0.0.1")
    theirs = Keys(pair.tmp_path / "theirs", "127.0.0.1")
    receiver = receive(pair, "tls://127.0.0.1:0", "--tls", theirs.of("127.0.0.1"))
    said_one_line(pair.start("--once", "--tls", str(ours.of("127.0.0.1"))), "is not of this side's")
    wait_for(lambda: "refused the certificate of this receiver" in receiver.said, "it is logged")
    # A sender that trusts the receiver, and is not trusted by it.
    shutil.copy(theirs.of("127.0.0.1") / "ca.pem", ours.of("127.0.0.1") / "ca.pem")
    said_one_line(pair.start("--once", "--tls", str(ours.of("127.0.0.1"))), "does not know the CA")
    assert not (pair.store / "r").exists()


@pytest.mark.parametrize("side", ["receiver", "sender"])
def test_tls_expired_certificate(pair: Pair, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = Keys(pair.tmp_path / "keys", "127.0.0.1")
    past = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=2000)
    monkeypatch.setattr(keys_module, "_now", lambda: past)
    new = keys.of("127.0.0.1").rename(pair.tmp_path / "new")
    make_keys(keys.directory, ["127.0.0.1"])
    old = keys.of("127.0.0.1")
    receive(pair, "tls://127.0.0.1:0", "--tls", old if side == "receiver" else new)
    sender = pair.start("--once", "--tls", str(new if side == "receiver" else old))
    said_one_line(sender, "expired")


def test_tls_client_without_a_certificate_learns_nothing(pair: Pair) -> None:
    keys = Keys(pair.tmp_path / "keys", "127.0.0.1")
    receiver = receive(pair, "tls://127.0.0.1:0", "--tls", keys.of("127.0.0.1"))
    port = pair.address.rpartition(":")[2]
    openssl = subprocess.run(
        ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-tls1_3", "-ign_eof"],
        input=b"FDW1",
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert b"alert certificate required" in openssl.stderr
    wait_for(lambda: "client has no certificate" in receiver.said, "it is logged")


def test_tls_and_plain_are_told_apart(pair: Pair) -> None:
    keys = Keys(pair.tmp_path / "keys", "127.0.0.1")
    tls = ("--tls", str(keys.of("127.0.0.1")))
    receiver = receive(pair, "tls://127.0.0.1:0", *tls)
    pair.address = pair.address.replace("tls://", "tcp://")
    said_one_line(pair.start("--once"), "speaks TLS: write tls://")
    wait_for(lambda: "does not speak TLS 1.3" in receiver.said, "it is logged")
    receiver = receive(pair, "tcp://127.0.0.1:0")
    pair.address = pair.address.replace("tcp://", "tls://")
    said_one_line(pair.start("--once", *tls), "is it a plain tcp:// receiver?")
    wait_for(lambda: "peer speaks TLS" in receiver.said, "it is logged")


def test_tls_1_2_is_refused(pair: Pair) -> None:
    keys = Keys(pair.tmp_path / "keys", "127.0.0.1")
    receive(pair, "tls://127.0.0.1:0", "--tls", keys.of("127.0.0.1"))
    port = pair.address.rpartition(":")[2]
    where = keys.of("127.0.0.1")
    files = [str(where / "cert.pem"), "-key", str(where / "key.pem")]
    openssl = subprocess.run(
        ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-tls1_2", "-cert", *files],
        input=b"",
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert b"alert protocol version" in openssl.stderr


# keys


def test_keys_are_private_and_never_overwritten(tmp_path: Path) -> None:
    def keys(*hosts: str) -> subprocess.CompletedProcess[str]:
        command = [REPLICATOR, "keys", str(tmp_path / "keys"), *hosts]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    made = keys("a.example", "192.0.2.7")
    assert made.returncode == 0, made.stderr
    for host in ("a.example", "192.0.2.7"):
        assert str(tmp_path / "keys" / host) in made.stdout
        assert (tmp_path / "keys" / host / "key.pem").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "keys/ca-key.pem").stat().st_mode & 0o777 == 0o600
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.pem")}

    again = keys("b.example", "a.example")
    assert again.returncode == 1 and "a.example exists" in again.stderr
    assert keys("fe80::1%../../x").returncode == keys("../x").returncode == 2
    assert {p: p.read_bytes() for p in tmp_path.rglob("*.pem")} == before
    assert not (tmp_path / "keys/b.example").exists()

    assert keys("b.example").returncode == 0
    assert all(p.read_bytes() == content for p, content in before.items())
    ca = x509.load_pem_x509_certificate((tmp_path / "keys/ca.pem").read_bytes())
    new = x509.load_pem_x509_certificate((tmp_path / "keys/b.example/cert.pem").read_bytes())
    new.verify_directly_issued_by(ca)
    assert new.not_valid_after_utc <= ca.not_valid_after_utc
