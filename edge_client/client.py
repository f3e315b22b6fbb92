"""paho's MQTT client, counting the bytes that cross its socket, and remembering what ended a TLS connection."""

import contextlib
import ssl

import paho.mqtt.client as mqtt


class Client(mqtt.Client):
    """paho's client; bytes are counted inside TLS, where there is TLS."""

    sent = 0
    received = 0
    alert: ssl.SSLError | None = None
    """What the other side said before it hung up; paho would only tell that it did."""

    def _sock_recv(self, bufsize: int) -> bytes:
        try:
            data = super()._sock_recv(bufsize)
        except ssl.SSLError as error:
            self.alert = error
            raise
        self.received += len(data)
        return data

    def _sock_send(self, buf: bytes | bytearray) -> int:
        try:
            count = super()._sock_send(buf)
        except BlockingIOError:
            raise
        except OSError:
            # In TLS 1.3 a broker refuses a certificate after the handshake: the reason waits to be read.
            if isinstance(self.socket(), ssl.SSLSocket):
                with contextlib.suppress(OSError):
                    self._sock_recv(1)
            raise
        self.sent += count
        return count
