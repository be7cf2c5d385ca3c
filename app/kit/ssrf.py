"""Requests to addresses that strangers chose, without letting them choose addresses inside our network.

Knows: which URLs and addresses are fit to be called, and how to connect to exactly the address that was
judged. Text is never judged, only resolved addresses: `0x7f000001` and `127.1` are loopback too.
Refuses to know: what is sent and why.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any
from urllib.parse import quote, urlsplit

import httpcore
import idna

MAX_URL_LENGTH = 2048
PUBLIC_PORTS = frozenset({443, 8443})
ASCII = bytes(range(128)).decode()
Address = IPv4Address | IPv6Address
Resolver = Callable[[str, int], list[str]]

# Never called, whatever a deployment allows: link-local holds the clouds' metadata services, the rest are
# those that sit elsewhere, and what is no address of one host.
NEVER = [
    ip_network(text)
    for text in (
        "0.0.0.0/8",
        "169.254.0.0/16",
        "100.100.100.200/32",  # Alibaba Cloud metadata, inside the shared range
        "168.63.129.16/32",  # Azure's host agent, a public address
        "192.0.0.0/24",  # protocol assignments; .192 is Oracle Cloud's metadata
        "224.0.0.0/4",
        "240.0.0.0/4",
        "::/128",
        "fe80::/10",
        "fec0::/10",
        "ff00::/8",
        "fd00:ec2::/32",  # EC2 metadata, DNS and time by IPv6
        "fd20:ce::254/128",  # Google Cloud metadata
    )
]
# What `ipaddress` of Python 3.11 calls global although a packet may end inside: translation and tunnel
# prefixes, documentation, segment routing, the 6to4 relay.
NOT_PUBLIC = [
    ip_network(text)
    for text in ("64:ff9b::/96", "64:ff9b:1::/48", "::ffff:0:0:0/96", "2001::/32", "2002::/16", "::/96", "3fff::/20",
                 "5f00::/16", "100::/64", "2001:db8::/32", "192.88.99.0/24", "100.64.0.0/10", "198.18.0.0/15")
]  # fmt: skip
TRANSLATED = NOT_PUBLIC[:3]  # the last 32 bits are an IPv4 address
# What `allow_private` opens: the networks of a closed installation.
PRIVATE = [
    ip_network(text)
    for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "127.0.0.0/8", "100.64.0.0/10", "fc00::/7", "::1/128")
]


class ForbiddenTarget(ValueError):
    """The URL or an address it leads to may not be called; the text is fit for the one who named it."""


@dataclass(frozen=True, slots=True)
class Target:
    """A URL that passed the strict parse, written in ASCII: IDNA names, percent escapes. `host` has no brackets."""

    url: str
    scheme: str
    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Rules:
    """What this deployment allows beyond public https on the usual ports."""

    allow_private: bool = False
    allow_http: bool = False

    @property
    def any_port(self) -> bool:
        return self.allow_private or self.allow_http


def parse_target(url: str, rules: Rules) -> Target:
    """Reads a URL more strictly than any client would, so that nobody can read it differently."""
    if len(url) > MAX_URL_LENGTH:
        raise ForbiddenTarget(f"The URL is longer than {MAX_URL_LENGTH} characters.")
    if not url.isprintable() or any(sign in url for sign in ' \\"<>'):
        raise ForbiddenTarget("The URL contains characters that have to be escaped.")
    try:
        parts = urlsplit(url)
        port, host = parts.port, parts.hostname
    except ValueError:
        raise ForbiddenTarget("The URL cannot be read.") from None
    if parts.scheme not in ({"https", "http"} if rules.allow_http else {"https"}):
        raise ForbiddenTarget("Only https:// URLs are called.")
    if "@" in parts.netloc or parts.fragment:
        raise ForbiddenTarget("The URL must not contain a user name, a password or a fragment.")
    if not host or "%" in host:
        raise ForbiddenTarget("The URL names no host.")
    port = port if port is not None else (443 if parts.scheme == "https" else 80)
    if port == 0 or (port not in PUBLIC_PORTS and not rules.any_port):
        raise ForbiddenTarget("Only the ports 443 and 8443 are called.")
    host = _ascii_host(host)
    place = f"[{host}]" if ":" in host else host
    # What is escaped already stays as it is: only characters that no request line can hold are escaped.
    rest = quote(parts.path + (f"?{parts.query}" if parts.query else ""), safe=ASCII)
    return Target(f"{parts.scheme}://{place}:{port}{rest}", parts.scheme, host, port)


def _ascii_host(host: str) -> str:
    if ":" in host:
        try:
            return str(IPv6Address(host))
        except ValueError:
            raise ForbiddenTarget("The host is not an address.") from None
    try:
        return idna.encode(host.rstrip("."), uts46=True).decode("ascii")
    except idna.IDNAError:
        if host.isascii():
            return host.rstrip(".")  # names with an underscore, numbers in odd notations: the resolver decides
        raise ForbiddenTarget("The host's name is not a valid internationalised name.") from None


def why_forbidden(text: str, rules: Rules) -> str | None:
    """None when the address may be called, else the reason."""
    address: Address = ip_address(text.partition("%")[0])
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    inner = _embedded(address)
    if _inside(address, NEVER) or any(_inside(part, NEVER) for part in inner):
        return "the address is reserved (metadata, link-local, multicast or unspecified)"
    if rules.allow_private and _inside(address, PRIVATE):
        return None
    if _inside(address, NOT_PUBLIC) or address.is_multicast or not address.is_global:
        return "the address is not public"
    return None


def _inside(address: Address, networks: Iterable[IPv4Network | IPv6Network]) -> bool:
    return any(address.version == network.version and address in network for network in networks)


def _embedded(address: Address) -> list[Address]:
    """IPv4 addresses that a translator or tunnel would make of this one."""
    if isinstance(address, IPv4Address):
        return []
    inner: list[Address] = [IPv4Address(int(address) & 0xFFFFFFFF)] if _inside(address, TRANSLATED) else []
    if address.sixtofour is not None:
        inner.append(address.sixtofour)
    if address.teredo is not None:
        inner += address.teredo
    return inner


def system_resolver(host: str, port: int) -> list[str]:
    """Every address the machine's resolver gives for the name."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def vet(target: Target, rules: Rules, resolver: Resolver = system_resolver) -> str:
    """One address of the host; refused when *any* of them is forbidden, or a rebinding name would pass by luck."""
    try:
        addresses = resolver(target.host, target.port)
    except (OSError, UnicodeError):
        raise ForbiddenTarget(f"The name {target.host} cannot be resolved.") from None
    if not addresses:
        raise ForbiddenTarget(f"The name {target.host} has no address.")
    for address in addresses:
        reason = why_forbidden(address, rules)
        if reason is not None:
            raise ForbiddenTarget(f"{target.host} may not be called: {reason}.")
    return addresses[0]


async def vet_async(target: Target, rules: Rules, resolver: Resolver = system_resolver) -> str:
    """`vet` in a thread nobody waits for: a resolver that hangs must not outlive the caller's deadline."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[str] = loop.create_future()

    def settle(set_it: Callable[[Any], None], value: object) -> None:
        if not answer.done():
            set_it(value)

    def work() -> None:
        outcome: tuple[Callable[[Any], None], object]
        try:
            outcome = (answer.set_result, vet(target, rules, resolver))
        except Exception as error:  # noqa: BLE001 - handed to the awaiting task
            outcome = (answer.set_exception, error)
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, *outcome)

    threading.Thread(target=work, daemon=True, name="ssrf-resolver").start()
    return await answer


class PinnedBackend(httpcore.AsyncNetworkBackend):
    """Connects to one vetted address whatever name is asked for; TLS and Host keep the name."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._backend = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - the signature of httpcore's back ends
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        stream = await self._backend.connect_tcp(self._address, port, timeout, local_address, socket_options)
        peer = stream.get_extra_info("server_addr")
        if not peer or ip_address(str(peer[0]).partition("%")[0]) != ip_address(self._address):
            await stream.aclose()
            raise httpcore.ConnectError("connected to an address that was not vetted")
        return stream

    async def connect_unix_socket(self, *_: object, **__: object) -> httpcore.AsyncNetworkStream:
        raise httpcore.ConnectError("a webhook never goes to a Unix socket")

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
