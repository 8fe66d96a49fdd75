"""What goes to pyfuse3's session and comes back, and whom the first answer is told to."""

import os
import select
import socket
import struct
import threading

from fusedisk.relay import Relay

HEADER = struct.Struct("<IIQQIIII")
INIT = 26


def test_only_an_answer_counts_as_one() -> None:
    """A new server that resumes has answered nothing: the keeper would restart it without delay."""
    kernel, device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    told, answered = os.pipe()
    relay = Relay(device.fileno(), lambda request: None, answered)
    request = HEADER.pack(56, INIT, 7, 0, 0, 0, 0, 0) + bytes(16)

    def session() -> None:
        assert relay.session.recv(4096) == request
        relay.session.send(struct.pack("<IiQ", 16, 0, 7))

    with kernel, device:
        asked = threading.Thread(target=session)
        asked.start()
        relay.resume(request)
        asked.join()
        # The kernel is told to hand out again what was not answered, and that is all.
        length, code, unique = struct.unpack("<IiQ", kernel.recv(4096))
        assert (length, code, unique) == (16, 7, 0)
        assert select.select([told], [], [], 0)[0] == []

        passing = threading.Thread(target=relay.relay_replies)
        passing.start()
        relay.session.send(struct.pack("<IiQ", 16, -2, 8))
        assert kernel.recv(4096) == struct.pack("<IiQ", 16, -2, 8)
        assert os.read(told, 16) == b"a"
        relay.session.send(struct.pack("<IiQ", 16, -2, 9))
        assert kernel.recv(4096) == struct.pack("<IiQ", 16, -2, 9)
        relay.close()
        passing.join()
        relay.session.close()
        # Once is enough.
        assert select.select([told], [], [], 0)[0] == []
    os.close(told)
    os.close(answered)
