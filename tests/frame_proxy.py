"""A link that is looked into: at a frame of a given kind something happens, before it goes on."""

import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path

from replicator.frames import FRAME_TYPES, HEADER_BYTES
from replicator.messages import Event

_HEAD = struct.Struct("<4sBBHI")


class FrameProxy:
    """Forwards frames between Unix sockets; call `close` in any case.

    ``at`` is asked about every frame, in the thread that carries it; where it says False, the
    frame and its connection are dropped. Where ``damaging`` says True, a bit of it is flipped.
    """

    def __init__(
        self,
        listen: Path,
        target: str,
        at: Callable[[type[Event]], bool] = lambda _: True,
        damaging: Callable[[type[Event]], bool] = lambda _: False,
    ) -> None:
        self.address = f"unix://{listen}"
        self._target = target.removeprefix("unix://")
        self._at, self._damaging = at, damaging
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(listen))
        self._listener.listen(16)
        self._sockets: set[socket.socket] = set()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def close(self) -> None:
        """End every connection, and wait for the threads."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()

    def cut(self) -> None:
        """End every connection now."""
        for end in list(self._sockets):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.socket(socket.AF_UNIX)
            try:
                far.connect(self._target)
            except OSError:
                near.close()
                far.close()
                continue
            self._sockets |= {near, far}
            for source, sink in ((near, far), (far, near)):
                thread = threading.Thread(target=self._carry, args=(source, sink), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError), source.makefile("rb") as frames:
            while head := frames.read(HEADER_BYTES):
                _, kind, _, _, length = _HEAD.unpack_from(head)
                if not self._at(FRAME_TYPES[kind]):
                    break
                body = bytearray(frames.read(length))
                if self._damaging(FRAME_TYPES[kind]):
                    body[-1] ^= 1
                sink.sendall(head + body)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
