"""On PYTHONPATH, this refuses every connection that leaves the machine: notebooks run without a network.

Python imports a module of this name at start-up, so child processes are held to it too. Loopback stays
open, because Jupyter speaks to its kernels through it.
"""

import ipaddress
import socket


def _stays_here(host: object) -> bool:
    if host in (None, "", "localhost", b"localhost"):
        return True
    try:
        return ipaddress.ip_address(host.decode() if isinstance(host, bytes) else str(host)).is_loopback
    except ValueError:
        return False


def _refuse(host: object) -> None:
    raise OSError(f"No network here: a notebook of this course tried to reach {host!r}. It has to run offline.")


def _guarded(method):
    def connect(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and not _stays_here(address[0]):
            _refuse(address[0])
        return method(self, address)

    return connect


def _guarded_lookup(lookup):
    def getaddrinfo(host, *args, **kwargs):
        if not _stays_here(host):
            _refuse(host)
        return lookup(host, *args, **kwargs)

    return getaddrinfo


socket.socket.connect = _guarded(socket.socket.connect)
socket.socket.connect_ex = _guarded(socket.socket.connect_ex)
socket.getaddrinfo = _guarded_lookup(socket.getaddrinfo)
