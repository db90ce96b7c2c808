"""Addresses and ports of a node that a job may use."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable, Iterator

from dapo_megatron.config.schema import SlurmConfig
from dapo_megatron.types import BadNodeError

NUM_FIXED_PORTS = 10
"""Of a Ray node, each for one service."""
NUM_WORKER_PORTS = 500
"""Of a Ray node, one a process."""


def address_of(name: str, network: str | None) -> str:
    """The IPv4 address by which the node `name`, which is this one, is known, inside `network` (None: any private one).

    BadNodeError when its name means no such address.
    """
    found = [address for address in _resolved(name) if is_allowed(address, network)]
    if found:
        return found[0]
    known = ", ".join(_resolved(name)) or "no address at all"
    raise BadNodeError(
        f"{name} is known as {known}, of which none is in {network or 'a private network'}; set slurm.network to the network of the nodes."
    )


def is_allowed(address: str, network: str | None) -> bool:
    """Whether the job may use it: never loopback, which other nodes cannot reach."""
    ip = ipaddress.ip_address(address)
    if ip.is_loopback or ip.is_link_local or ip.is_unspecified:
        return False
    return ip in ipaddress.ip_network(network) if network is not None else ip.is_private


def free_ports(address: str, config: SlurmConfig, seed: int) -> list[int]:
    """A block of neighbouring ports of which the first NUM_FIXED_PORTS are free on `address`; `seed` says where the search begins.

    BadNodeError when there is no such block between slurm.first_port and slurm.last_port.
    """
    size = NUM_FIXED_PORTS + NUM_WORKER_PORTS
    starts = list(range(config.first_port, config.last_port - size + 2, size))
    for at in range(len(starts)):
        start = starts[(seed + at) % len(starts)]
        if all(is_free(address, port) for port in range(start, start + NUM_FIXED_PORTS)):
            return list(range(start, start + size))
    raise BadNodeError(
        f"no {NUM_FIXED_PORTS} neighbouring ports of {address} between slurm.first_port ({config.first_port}) and slurm.last_port "
        f"({config.last_port}) are free, in steps of {size}; use another range."
    )


def is_free(address: str, port: int) -> bool:
    """Whether one could listen there, on all addresses too."""
    return all(_can_bind(host, port) for host in (address, ""))


def interface_of(address: str) -> str | None:
    """Name of the network interface that has the address, e.g. for GLOO_SOCKET_IFNAME; None when there is none."""
    import fcntl
    import struct

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                reply = fcntl.ioctl(probe, 0x8915, struct.pack("256s", name.encode()[:15]))  # SIOCGIFADDR of linux/sockios.h
            except OSError:  # it has no IPv4 address
                continue
            if socket.inet_ntoa(reply[20:24]) == address:
                return name
    return None


def _resolved(name: str) -> list[str]:
    try:
        found = socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)
    except OSError:
        return []
    return list(_distinct(str(entry[4][0]) for entry in found))


def _distinct(items: Iterable[str]) -> Iterator[str]:
    seen: set[str] = set()
    for item in items:
        if item not in seen:
            seen.add(item)
            yield item


def _can_bind(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True
