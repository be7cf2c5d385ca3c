"""Which targets may be called: a corpus of addresses and URLs, and the pinned connection itself."""

from __future__ import annotations

import asyncio
import socket
import threading

import httpcore
import pytest

from app.kit import ssrf
from app.kit.ssrf import ForbiddenTarget, Rules, parse_target, vet, why_forbidden

PUBLIC = Rules()
CLOSED_NETWORK = Rules(allow_private=True, allow_http=True)

FORBIDDEN = [
    "127.0.0.1",
    "127.255.255.254",
    "0.0.0.0",
    "0.1.2.3",
    "10.0.0.1",
    "10.255.255.255",
    "172.16.0.1",
    "172.31.255.255",
    "192.168.0.1",
    "100.64.0.1",
    "100.127.255.255",
    "100.100.100.200",
    "169.254.169.254",
    "169.254.170.2",
    "169.254.0.1",
    "192.0.0.192",
    "192.0.0.8",
    "192.0.2.1",
    "198.51.100.7",
    "203.0.113.9",
    "198.18.0.1",
    "198.19.255.255",
    "192.88.99.1",
    "224.0.0.1",
    "239.255.255.250",
    "240.0.0.1",
    "255.255.255.255",
    "168.63.129.16",
    "::1",
    "::",
    "::127.0.0.1",
    "::8.8.8.8",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "::ffff:169.254.169.254",
    "64:ff9b::7f00:1",
    "64:ff9b::a9fe:a9fe",
    "64:ff9b::808:808",
    "64:ff9b:1::1",
    "::ffff:0:7f00:1",
    "::ffff:0:808:808",
    "2002:7f00:1::",
    "2002:a9fe:a9fe::",
    "2002:808:808::",
    "2001:0:7f00:1::1",
    "2001:db8::1",
    "3fff::1",
    "5f00::1",
    "100::1",
    "fe80::1",
    "fec0::1",
    "fc00::1",
    "fd00::1",
    "fd00:ec2::254",
    "fd20:ce::254",
    "ff02::1",
    "ff05::2",
]
ALLOWED = [
    "8.8.8.8",
    "1.1.1.1",
    "93.184.215.14",
    "100.63.255.255",
    "100.128.0.1",
    "172.15.255.255",
    "172.32.0.1",
    "192.167.255.255",
    "198.17.255.255",
    "198.20.0.1",
    "223.255.255.255",
    "2606:4700::6810:84e5",
    "2a00:1450:4001:81b::200e",
    "2001:4860:4860::8888",
    "::ffff:8.8.8.8",
]
METADATA = [
    "169.254.169.254",
    "169.254.170.2",
    "::ffff:169.254.169.254",
    "64:ff9b::a9fe:a9fe",
    "::ffff:0:a9fe:a9fe",
    "2002:a9fe:a9fe::",
    "100.100.100.200",
    "192.0.0.192",
    "168.63.129.16",
    "fd00:ec2::254",
    "fd20:ce::254",
    "fe80::1",
    "0.0.0.0",
    "::",
    "224.0.0.1",
    "255.255.255.255",
]


def test_the_corpus_is_large_enough():
    assert len(FORBIDDEN) >= 40


@pytest.mark.parametrize("address", FORBIDDEN)
def test_addresses_that_are_not_public_are_refused(address):
    assert why_forbidden(address, PUBLIC) is not None


@pytest.mark.parametrize("address", ALLOWED)
def test_public_addresses_are_not_refused_by_mistake(address):
    assert why_forbidden(address, PUBLIC) is None


@pytest.mark.parametrize("address", METADATA)
def test_metadata_and_reserved_addresses_are_refused_even_in_a_closed_network(address):
    assert why_forbidden(address, CLOSED_NETWORK) is not None


@pytest.mark.parametrize("address", ["127.0.0.1", "10.1.2.3", "192.168.1.1", "100.64.0.1", "::1", "fc00::1"])
def test_a_closed_network_may_be_opened_on_purpose(address):
    assert why_forbidden(address, CLOSED_NETWORK) is None


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/",
        "ftp://example.com/",
        "file:///etc/passwd",
        "gopher://example.com/_x",
        "//example.com/",
        "example.com",
        "https://",
        "https:///path",
        "https://user@example.com/",
        "https://user:pw@example.com/",
        "https://example.com@127.0.0.1/",
        "https://example.com:22/",
        "https://example.com:0/",
        "https://example.com:99999/",
        "https://example.com:x/",
        "https://example.com/#fragment",
        "https://example.com\\@127.0.0.1/",
        "https://exa mple.com/",
        "https://example.com/\r\nHost: x",
        "https://example.com/\x00",
        "https://[fe80::1%25eth0]/",
        "https://[::1/",
        "https://[v1.ü:]/",
        "https://" + "a" * 2050 + ".com/",
        "https://exa\u202emple.com/",
    ],
)
def test_urls_that_two_readers_could_read_differently_are_refused(url):
    with pytest.raises(ForbiddenTarget):
        parse_target(url, PUBLIC)


def test_an_international_name_becomes_ascii():
    assert parse_target("https://bücher.example/hook", PUBLIC).host == "xn--bcher-kva.example"


@pytest.mark.parametrize(
    ("url", "sent"),
    [
        (
            "https://bücher.example/größe?für=élan",
            "https://xn--bcher-kva.example:443/gr%C3%B6%C3%9Fe?f%C3%BCr=%C3%A9lan",
        ),
        ("https://example.com/a%20b/%C3%BC?x=%2F&y=1", "https://example.com:443/a%20b/%C3%BC?x=%2F&y=1"),
        ("https://example.com?x=1", "https://example.com:443?x=1"),
        ("https://[2606:4700::6810:84E5]:8443/", "https://[2606:4700::6810:84e5]:8443/"),
    ],
)
def test_what_is_sent_is_ascii_and_reads_the_same_again(url, sent):
    target = parse_target(url, PUBLIC)
    assert target.url == sent
    assert parse_target(target.url, PUBLIC) == target
    assert httpcore.URL(target.url).host.decode() == target.host


@pytest.mark.parametrize("text", ["0x7f000001", "2130706433", "0177.0.0.1", "127.1", "127.0.0.1.", "①②⑦.0.0.1"])
def test_other_spellings_of_loopback_are_judged_by_what_they_resolve_to(text):
    target = parse_target(f"https://{text}/", PUBLIC)
    with pytest.raises(ForbiddenTarget):
        vet(target, PUBLIC, _numeric_resolver)


def _numeric_resolver(host: str, _port: int) -> list[str]:
    # The C library's reading of numbers, which getaddrinfo shares; no name server is asked.
    return [socket.inet_ntoa(socket.inet_aton(host))]


def test_one_forbidden_address_among_public_ones_refuses_the_name():
    target = parse_target("https://rebinding.example/", PUBLIC)
    with pytest.raises(ForbiddenTarget, match="not public"):
        vet(target, PUBLIC, lambda _host, _port: ["93.184.215.14", "10.0.0.1"])
    assert vet(target, PUBLIC, lambda _host, _port: ["93.184.215.14", "1.1.1.1"]) == "93.184.215.14"


def test_a_name_without_an_address_is_refused():
    target = parse_target("https://nowhere.example/", PUBLIC)

    def fails(_host: str, _port: int) -> list[str]:
        raise socket.gaierror(-2, "Name or service not known")

    for resolver in (fails, lambda _host, _port: []):
        with pytest.raises(ForbiddenTarget):
            vet(target, PUBLIC, resolver)


def test_a_resolver_that_hangs_does_not_outlive_the_deadline():
    released = threading.Event()

    def hangs(_host: str, _port: int) -> list[str]:
        released.wait(30)
        return []

    async def attempt() -> None:
        async with asyncio.timeout(0.2):
            await ssrf.vet_async(parse_target("https://slow.example/", PUBLIC), PUBLIC, hangs)

    try:
        with pytest.raises(TimeoutError):
            asyncio.run(attempt())
    finally:
        released.set()


def test_the_connection_goes_to_the_vetted_address_whatever_the_name_says():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        async def connect() -> tuple[str, int]:
            stream = await ssrf.PinnedBackend("127.0.0.1").connect_tcp("never-looked-up.example", port, 2.0)
            peer = stream.get_extra_info("server_addr")
            await stream.aclose()
            return peer

        assert asyncio.run(connect()) == ("127.0.0.1", port)
