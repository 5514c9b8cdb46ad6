"""The other side of what ``floor`` measures, as small processes: ``drip PORT COUNT BLOCK GAP FRAME`` sends, ``drain`` takes."""

import socket
import sys
import time


def drip(port: int, count: int, block: int, gap: float, frame: bytes) -> None:
    """Send *frame* *count* times to *port*, *block* of them at a time, *gap* seconds for each."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        due = time.monotonic()
        for sent in range(0, count, block):
            connection.sendall(frame * min(block, count - sent))
            due += block * gap
            time.sleep(max(due - time.monotonic(), 0))


def drain() -> None:
    """Say a port, and take whatever one client sends there to its end."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        print(server.getsockname()[1], flush=True)
        connection, _ = server.accept()
        with connection:
            while connection.recv(1 << 20):
                pass


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["drain"]:
            drain()
        case ["drip", port, count, block, gap, frame]:
            drip(int(port), int(count), int(block), float(gap), bytes.fromhex(frame))
