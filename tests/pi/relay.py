"""The line between a guest and the broker: it counts what goes up, and stops at a byte that a test has chosen."""

import contextlib
import socket
import threading


class Relay:
    """Listens on loopback and passes everything on to another port there."""

    def __init__(self, port: int) -> None:
        self._far = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._lock = threading.Condition()
        self.up = 0
        """Bytes from the guest so far."""
        self._limit: int | None = None
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def stop_after(self, count: int) -> None:
        """Pass on so many bytes more of what comes from the guest, and nothing from then on."""
        with self._lock:
            self._limit = self.up + count

    def stopped(self, seconds: float) -> bool:
        """Wait until the limit is reached; whether it was."""
        with self._lock:
            return self._lock.wait_for(lambda: self._limit is not None and self.up >= self._limit, seconds)

    def renew(self) -> None:
        """End what connections there are, and pass on everything again."""
        with self._lock:
            ended, self._open = self._open, []
        for one in ended:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        with self._lock:
            self._limit, self.up = None, 0
            self._lock.notify_all()

    def close(self) -> None:
        """Listen no more."""
        self._listener.close()
        self.renew()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", self._far))
                except OSError:
                    near.close()
                    continue
                for one in (near, far):
                    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                with self._lock:
                    self._open += [near, far]
                threading.Thread(target=self._pass, args=(near, far, True), daemon=True).start()
                threading.Thread(target=self._pass, args=(far, near, False), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, upward: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(4096):
                if upward:
                    with self._lock:
                        self.up += len(data)
                        self._lock.notify_all()
                        # A line that is dead lets nothing through, and does not end.
                        self._lock.wait_for(lambda: self._limit is None or self.up < self._limit)
                target.sendall(data)
        for one in (source, target):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
