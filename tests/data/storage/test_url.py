"""URLs in messages."""

from distrain.data.storage.url import join_url, redact_url


def test_the_url_of_what_lies_in_a_folder():
    assert join_url("photos", "cat") == "photos/cat"
    assert join_url("/", "cat") == "/cat"
    assert join_url("s3://bucket/photos", "a/b") == "s3://bucket/photos/a/b"
    assert join_url("zip://::x.zip", "cat") == "zip://cat::x.zip"
    assert join_url("zip://a::/tmp/x.zip", "cat") == "zip://a/cat::/tmp/x.zip"


def test_a_url_without_a_secret_stays_as_it_is():
    for url in ("zip://::x.zip", "s3://b/x", "https://h:1/x", "a?b@c", "memory://x"):
        assert redact_url(url) == url
    url = "zip://a::https://user:secret@host/x.zip?sig=1"
    assert redact_url(url) == "zip://a::https://host/x.zip"
