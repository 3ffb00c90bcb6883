"""Where users may send the service: the table of disguises, and every address of a name."""

from __future__ import annotations

import ipaddress
import socket
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mutoscope.jobs import addresses
from mutoscope.jobs.addresses import Refused, Unresolved
from mutoscope.settings import Settings

STRICT = addresses.input_policy(Settings())
HTTP = addresses.input_policy(Settings(allow_http_inputs=True))

PRIVATE = [
    "0.0.0.0", "0.1.2.3", "10.0.0.1", "10.255.255.255", "100.64.0.1", "100.127.255.254", "127.0.0.1", "127.255.0.1",
    "169.254.169.254", "172.16.0.1", "172.31.255.255", "192.0.0.1", "192.0.0.170", "192.0.2.1", "192.31.196.1",
    "192.52.193.1", "192.88.99.1", "192.168.0.1", "192.175.48.1", "198.18.0.1", "198.19.255.255", "198.51.100.1",
    "203.0.113.7", "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255",
    "::", "::1", "::7f00:1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "::ffff:0:127.0.0.1",
    "64:ff9b::7f00:1", "64:ff9b::808:808", "64:ff9b:1::1", "100::1", "100:0:0:1::1", "2001::1", "2001:0:7f00:1::",
    "2001:2::1", "2001:10::1", "2001:20::1", "2001:db8::1", "2002:7f00:1::", "2002:808:808::1", "2620:4f:8000::1",
    "3fff::1", "5f00::1", "fc00::1", "fd12:3456::1", "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1", "4000::1",
]  # fmt: skip
PUBLIC = [
    "1.1.1.1", "8.8.8.8", "9.255.255.255", "11.0.0.1", "100.63.255.255", "100.128.0.1", "126.255.255.255",
    "128.0.0.1", "169.253.255.255", "172.15.255.255", "172.32.0.1", "192.0.1.1", "192.169.0.1", "198.17.255.255",
    "198.20.0.1", "223.255.255.255", "::ffff:8.8.8.8", "2001:4860:4860::8888", "2606:4700:4700::1111", "2a00:1450::1",
]  # fmt: skip


@pytest.mark.parametrize("text", PRIVATE)
def test_private_addresses(text: str) -> None:
    assert not addresses.is_public(ipaddress.ip_address(text))


@pytest.mark.parametrize("text", PUBLIC)
def test_public_addresses(text: str) -> None:
    assert addresses.is_public(ipaddress.ip_address(text))


@given(st.ip_addresses())
def test_nothing_is_public_that_python_calls_private(address: addresses.IP) -> None:
    """An independent table; Python knows some networks that ours lets pass no more than it does."""
    if addresses.is_public(address):
        plain = addresses.canonical(address)
        assert plain.is_global
        assert not plain.is_multicast


@pytest.mark.parametrize(
    ("url", "why"),
    [
        # loopback, in all spellings
        ("https://127.0.0.1/", "private"),
        ("https://127.0.0.1:8443/", "private"),
        ("https://[::1]/", "private"),
        ("https://[::ffff:127.0.0.1]/", "private"),
        ("https://[::ffff:7f00:1]/", "private"),
        ("https://[0:0:0:0:0:ffff:127.0.0.1]/", "private"),
        ("https://2130706433/", "another form"),
        ("https://0x7f000001/", "."),
        ("https://0x7f.0.0.1/", "another form"),
        ("https://0177.0.0.1/", "."),
        ("https://127.1/", "another form"),
        ("https://127.0.1/", "another form"),
        ("https://0/", "another form"),
        ("https://127.0.0.1./", "private"),
        ("https://00000177.00000000.00000000.00000001/", "."),
        ("https://0x7f.1/", "another form"),
        ("https://127.0.0.0x1/", "another form"),
        ("https://1.2.3.4.5/", "another form"),
        ("https://①②⑦.⓪.⓪.①/", "."),
        ("https://127。0。0。1/", "."),
        ("https://１２７.0.0.1/", "."),
        ("https://%31%32%37.0.0.1/", "."),
        ("https://0.0.0.0/", "private"),
        # other private places
        ("https://169.254.169.254/latest/meta-data/", "private"),
        ("https://[fd00:ec2::254]/", "private"),
        ("https://[fe80::1%25eth0]/", "."),
        ("https://[64:ff9b::7f00:1]/", "private"),
        ("https://[2002:7f00:1::]/", "private"),
        ("https://10.0.0.1/", "private"),
        ("https://100.64.0.1/", "private"),
        # not http at all
        ("file:///etc/passwd", "."),
        ("file://localhost/etc/passwd", "scheme"),
        ("gopher://example.com/", "scheme"),
        ("ftp://example.com/a.png", "scheme"),
        ("dict://example.com/", "scheme"),
        ("data:image/png;base64,AAAA", "."),
        ("javascript:alert(1)", "."),
        ("//example.com/a.png", "."),
        ("example.com/a.png", "."),
        ("", "."),
        ("http://example.com/a.png", "allow_http_inputs"),
        # two readings of one text
        ("https://user@example.com/", "user name"),
        ("https://user:secret@example.com/", "user name"),
        ("https://example.com@127.0.0.1/", "."),
        ("https://@example.com/", "user name"),
        ("https://example.com\\@127.0.0.1/", "backslash"),
        ("https://127.0.0.1\\.example.com/", "backslash"),
        ("https://exa mple.com/", "space"),
        ("https://example.com/\r\nHost: 127.0.0.1", "control"),
        ("https://example.com\t/", "control"),
        ("https:///a.png", "."),
        ("https://[::1/", "."),
        ("https://[::1]evil.com/", "."),
        ("https://example.com:0/", "port 0"),
        ("https://example.com:22/", "port 22"),
        ("https://example.com:25/", "port 25"),
        ("https://example.com:99999/", "."),
        ("https://example.com:-1/", "."),
        ("https://-example.com/", "not valid"),
        ("https://exa$mple.com/", "not valid"),
        ("https://example..com/", "not valid"),
        ("https://" + "a" * 64 + ".com/", "."),
        ("https://example.com/" + "a" * 2048, "2048"),
    ],
)
def test_refused_without_asking_the_network(url: str, why: str) -> None:
    with pytest.raises(Refused, match=why):
        addresses.parse(url, STRICT)


@pytest.mark.parametrize(
    ("url", "host", "port", "path", "header"),
    [
        ("https://example.com", "example.com", 443, b"/", "example.com"),
        ("https://EXAMPLE.com./a.png?x=1&y=%20#frag", "example.com", 443, b"/a.png?x=1&y=%20", "example.com"),
        ("https://example.com:8443/a", "example.com", 8443, b"/a", "example.com:8443"),
        ("https://bücher.example/ü", "xn--bcher-kva.example", 443, b"/%C3%BC", "xn--bcher-kva.example"),
        ("https://8.8.8.8/a", "8.8.8.8", 443, b"/a", "8.8.8.8"),
        (
            "https://[2606:4700:4700::1111]:8443/",
            "2606:4700:4700::1111",
            8443,
            b"/",
            "[2606:4700:4700::1111]:8443",
        ),
        ("https://[::ffff:8.8.8.8]/", "8.8.8.8", 443, b"/", "8.8.8.8"),
        ("https://under_score.example.com/", "under_score.example.com", 443, b"/", "under_score.example.com"),
    ],
)
def test_accepted(url: str, host: str, port: int, path: bytes, header: str) -> None:
    target = addresses.parse(url, STRICT)
    assert (target.host, target.port, target.path, target.host_header) == (host, port, path, header)


def test_http_when_allowed() -> None:
    assert addresses.parse("http://example.com/a", HTTP).port == 80


@pytest.mark.parametrize("hidden", [*PRIVATE[:10], "::1", "::ffff:127.0.0.1", "fe80::1%eth0", "fd00::1"])
def test_every_address_of_a_name_counts(hidden: str) -> None:
    target = addresses.parse("https://example.com/", STRICT)
    for found in ([hidden], ["8.8.8.8", hidden], [hidden, "8.8.8.8"]):
        with pytest.raises(Refused, match="private or reserved"):
            addresses.resolve(target, STRICT, lambda host, port, found=found: found)


def test_private_address_is_not_told() -> None:
    """What the inner network looks like is nobody's business."""
    target = addresses.parse("https://example.com/", STRICT)
    with pytest.raises(Refused) as caught:
        addresses.resolve(target, STRICT, lambda host, port: ["10.11.12.13"])
    assert "10.11" not in caught.value.reason


def test_names_without_address() -> None:
    target = addresses.parse("https://example.com/", STRICT)

    def fails(host: str, port: int) -> list[str]:
        raise OSError("Name or service not known")

    with pytest.raises(Unresolved, match="looked up"):
        addresses.resolve(target, STRICT, fails)
    with pytest.raises(Unresolved, match="no address"):
        addresses.resolve(target, STRICT, lambda host, port: [])


def test_resolver_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr("socket.getaddrinfo", lambda *args, **kwargs: release.wait() and [])
    try:
        with pytest.raises(TimeoutError):
            addresses.system_resolver("example.com", 443, timeout_s=0.05)
    finally:
        release.set()


def test_system_resolver_knows_this_machine() -> None:
    assert "127.0.0.1" in addresses.system_resolver("127.0.0.1", 80)
    with pytest.raises(socket.gaierror):
        addresses.system_resolver("no-such-host.invalid", 80)


@pytest.mark.parametrize(
    ("allowed", "url", "found"),
    [
        (("localhost",), "https://localhost/", ["127.0.0.1", "::1"]),
        (("minio.lan",), "https://MINIO.lan./", ["10.1.2.3"]),
        (("10.0.0.0/8",), "https://store.example/", ["10.1.2.3"]),
        (("10.1.2.3",), "https://10.1.2.3/", ["10.1.2.3"]),
        (("fd00::/8",), "https://[fd00::1]:81/", ["fd00::1"]),
        (("127.0.0.0/8",), "https://[::ffff:127.0.0.1]/", ["127.0.0.1"]),
    ],
)
def test_named_hosts_and_networks_are_open(allowed: tuple[str, ...], url: str, found: list[str]) -> None:
    policy = addresses.input_policy(Settings(allow_private_hosts=allowed))
    target = addresses.parse(url, policy)
    assert addresses.resolve(target, policy, lambda host, port: found) == tuple(found)


@pytest.mark.parametrize(
    ("allowed", "url", "found"),
    [
        (("localhost",), "https://other/", ["127.0.0.1"]),
        (("localhost",), "https://localhost.example.com/", ["127.0.0.1"]),
        (("10.0.0.0/8",), "https://store.example/", ["10.1.2.3", "192.168.0.1"]),
        (("10.1.2.3",), "https://store.example/", ["10.1.2.4"]),
    ],
)
def test_and_no_others(allowed: tuple[str, ...], url: str, found: list[str]) -> None:
    policy = addresses.input_policy(Settings(allow_private_hosts=allowed))
    with pytest.raises(Refused):
        addresses.resolve(addresses.parse(url, policy), policy, lambda host, port: found)


def test_webhooks_may_use_http_to_named_hosts_only() -> None:
    policy = addresses.webhook_policy(Settings(allow_private_hosts=("localhost", "10.0.0.0/8")))
    addresses.parse("http://localhost:3000/hook", policy)
    addresses.parse("http://10.0.0.7/hook", policy)
    with pytest.raises(Refused, match=r"naming example\.com in the setting allow_private_hosts"):
        addresses.parse("http://example.com/hook", policy)
    with pytest.raises(Refused, match="allow_private_hosts"):
        addresses.parse("http://localhost:3000/hook", addresses.webhook_policy(Settings()))
