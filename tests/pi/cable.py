"""Joins its standard input and output with a port on loopback: QEMU starts one for each connection of its guest."""

import contextlib
import os
import socket
import sys
import threading


def main() -> None:
    """Copy in both directions until both sides have ended."""
    with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as far:
        far.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def back() -> None:
            with contextlib.suppress(OSError):
                while data := far.recv(65536):
                    while data:
                        data = data[os.write(1, data) :]
            # QEMU's side learns of it when this process ends.
            os._exit(0)

        threading.Thread(target=back, daemon=True).start()
        with contextlib.suppress(OSError):
            while data := os.read(0, 65536):
                far.sendall(data)


if __name__ == "__main__":
    main()
