"""Between nodes: which interface a node's address is on, and what a TCP connection carries."""

import fcntl
import os
import socket
import struct
import threading
import time
from typing import Any

SENT_S = 1.0
"""Seconds of sending: enough for TCP to open its window."""
ACCEPT_S = 15.0
BLOCK = bytes(2**20)
_SIOCGIFADDR = 0x8915
CHOSEN_BY = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")


def interfaces() -> dict[str, str]:
    """Return the IPv4 address of each interface that has one."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(any_socket.fileno(), _SIOCGIFADDR, request)
            except OSError:  # it has none
                continue
            found[name] = socket.inet_ntoa(answer[20:24])
    return found


def place() -> dict[str, Any]:
    """Return the interfaces, the variables that choose one, and the address of the host's name."""
    try:
        own = socket.gethostbyname(socket.gethostname())
    except OSError:
        own = ""
    chosen = {name: os.environ[name] for name in CHOSEN_BY if name in os.environ}
    return {"interfaces": interfaces(), "chosen": chosen, "own": own}


def listen(address: str) -> int:
    """Take one connection on a port of `address`, which is returned, and count what comes."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    server = socket.create_server((address, 0), family=family)
    server.settimeout(ACCEPT_S)
    threading.Thread(target=_receive, args=(server,), daemon=True).start()
    return int(server.getsockname()[1])


def _receive(server: socket.socket) -> None:
    with server:
        try:
            connection, _ = server.accept()
        except TimeoutError:  # the sender says what is wrong
            return
        with connection:
            connection.settimeout(ACCEPT_S)
            buffer, num_bytes = bytearray(2**20), 0
            while received := connection.recv_into(buffer):
                num_bytes += received
            connection.sendall(struct.pack("!Q", num_bytes))


def send(address: str, port: int) -> float:
    """Send to `listen` for a second; return bytes per second. Raises OSError."""
    with socket.create_connection((address, port), timeout=ACCEPT_S) as connection:
        began, num_bytes = time.monotonic(), 0
        while time.monotonic() - began < SENT_S:
            connection.sendall(BLOCK)
            num_bytes += len(BLOCK)
        connection.shutdown(socket.SHUT_WR)
        (arrived,) = struct.unpack("!Q", connection.recv(8, socket.MSG_WAITALL))
        if arrived != num_bytes:
            raise OSError(f"{arrived} of {num_bytes} bytes arrived")
        return num_bytes / (time.monotonic() - began)
