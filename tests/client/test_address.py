"""Addresses as people give them."""

import pytest

from client.address import parse_address


@pytest.mark.parametrize(
    ("url", "wanted"),
    [
        ("localhost:8000", "http://localhost:8000"),
        ("http://h:1/v1/", "http://h:1"),
        ("https://h/v1", "https://h"),
        ("https://h/below/v1", "https://h/below"),
        ("http://[::1]:8000/", "http://[::1]:8000"),
    ],
)
def test_address_is_completed(url: str, wanted: str) -> None:
    assert parse_address(url) == wanted


@pytest.mark.parametrize("url", ["", "ftp://h", "http://", "http://h:x", "h?a=1", "http://\udcff"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="is not an address such as"):
        parse_address(url)


@pytest.mark.parametrize("url", ["http://me:hush@h", "me:hush@h:8000", "http://me:hush@h:x"])
def test_address_with_a_password_is_refused_without_quoting_it(url: str) -> None:
    with pytest.raises(ValueError, match="no user name or password") as caught:
        parse_address(url)
    assert "hush" not in str(caught.value)
