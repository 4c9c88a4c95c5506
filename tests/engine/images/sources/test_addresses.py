"""Global addresses: the answer must not depend on the tables of the Python version."""

import ipaddress

import pytest

from idefics2_engine.images.sources.addresses import is_global

GLOBAL = (
    *("93.184.216.34", "8.8.8.8", "1.1.1.1", "100.63.255.255", "172.32.0.1", "223.255.255.255"),
    *("2606:4700::1111", "2a00:1450:4001::1", "2001:4860:4860::8888", "2620:fe::fe"),
    *("::ffff:8.8.8.8", "64:ff9b::808:808"),
)
NOT_GLOBAL = {
    "this network": ("0.0.0.0", "0.255.255.255"),
    "private": ("10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1"),
    "shared": ("100.64.0.0", "100.100.100.200", "100.127.255.255"),
    "loopback": ("127.0.0.1", "127.255.255.255", "::1", "::"),
    "link-local": ("169.254.169.254", "fe80::1", "febf::1", "fe80::1%1", "2606:4700::1111%1"),
    "protocols": ("192.0.0.1", "192.0.0.192", "192.0.0.255", "192.88.99.1", "168.63.129.16"),
    "documentation": ("192.0.2.1", "198.51.100.1", "203.0.113.1", "2001:db8::1", "3fff::1", "3fff:fff::1"),
    "benchmarks": ("198.18.0.1", "198.19.255.255", "2001:2::1"),
    "multicast and reserved": ("224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255", "ff02::1", "ff0e::1"),
    "site-local": ("fec0::1", "feff:ffff::1"),
    "unique local": ("fc00::1", "fd00:ec2::254"),
    "local NAT64": ("64:ff9b:1::1", "64:ff9b:1::808:808", "64:ff9b:1:ffff::7f00:1"),
    "NAT64 of a private address": ("64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b::10.0.0.1"),
    "mapped": ("::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:168.63.129.16"),
    "compatible": ("::127.0.0.1", "::10.0.0.1", "::8.8.8.8"),
    "translated": ("::ffff:0:127.0.0.1", "::ffff:0:10.0.0.1", "::ffff:0:8.8.8.8"),
    "6to4": ("2002:7f00:1::", "2002:a00:1::1", "2002:808:808::1"),
    "Teredo": ("2001:0:4136:e378:8000:63bf:80ff:fffe", "2001::1"),
    "ORCHID": ("2001:10::1", "2001:20::1", "2001:30::1"),
    "discard, dummy and segment routing": ("100::1", "100:0:0:1::1", "5f00::1"),
    "given back, and never given out": ("3ffe::1", "4000::1", "8000::1", "1000::1"),
    "no address": ("", "x", "1.2.3", "1.2.3.4.5", "::g"),
}  # fmt: skip


@pytest.mark.parametrize("address", GLOBAL)
def test_global_addresses_are_accepted(address: str) -> None:
    assert is_global(address)


@pytest.mark.parametrize("kind", NOT_GLOBAL)
def test_other_addresses_are_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for address in NOT_GLOBAL[kind]:
        assert not is_global(address), address
    # This simulates a Python version without the tables
    for version in (ipaddress.IPv4Address, ipaddress.IPv6Address):
        monkeypatch.setattr(version, "is_global", property(lambda _self: True))
    for address in NOT_GLOBAL[kind]:
        assert not is_global(address), address
