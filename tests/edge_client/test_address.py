"""URLs of brokers: read, written, refused, and not gone to in the open."""

import pytest

from edge_client.address import Address
from edge_client.errors import ConfigError, TransportError

URLS = {
    "mqtt://host": Address("host", 1883),
    "mqtts://host": Address("host", 8883, tls=True),
    "mqtt://host:1/demo": Address("host", 1, federation="demo"),
    "mqtt://me:p%40ss@host": Address("host", 1883, username="me", password="p@ss"),
    "mqtt://[::1]:99/": Address("::1", 99),
}


@pytest.mark.parametrize("url", URLS)
def test_addresses(url):
    assert Address.parse(url) == URLS[url]
    again = Address.parse(str(URLS[url]))
    assert (again.host, again.port, again.tls) == (URLS[url].host, URLS[url].port, URLS[url].tls)


@pytest.mark.parametrize(
    "url", ["", "host", "http://host", "mqtt://", "mqtt://host:x", "mqtt://host:99999", "mqtt://["]
)
def test_what_is_no_address_is_refused(url):
    with pytest.raises(TransportError, match="broker URL"):
        Address.parse(url)


@pytest.mark.parametrize(
    "url", ["mqtt://h:1883", "mqtts://h:8883", "mqtt://fleet:s%20ecret@127.0.0.1:1883", "mqtt://me@[::1]:7"]
)
def test_an_address_is_read_back_from_its_url_and_shows_no_password(url):
    address = Address.parse(url)
    assert Address.parse(address.url) == address
    assert "ecret" not in str(address)


NEAR = ("127.0.0.1", "127.9.9.9", "::1", "localhost", "LocalHost.")
FAR = ("10.0.0.1", "broker.example", "localhost.example", "0.0.0.0", "fe80::1%eth0")


@pytest.mark.parametrize(("host", "near"), [*((host, True) for host in NEAR), *((host, False) for host in FAR)])
def test_only_this_machine_is_reached_in_the_open(host, near):
    address = Address(host, 1883)
    assert address.loopback == near
    Address(host, 8883, tls=True).check()
    address.check(insecure=True)
    if near:
        address.check()
    else:
        with pytest.raises(ConfigError, match=r"another machine.*use mqtts://, or say --insecure"):
            address.check()
