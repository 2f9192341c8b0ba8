import os

import pytest
from bucket_server import serve_bucket

_PROXY_VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture
def clean_aws(monkeypatch, tmp_path):
    """No variables and files of AWS, no proxies, and an empty home."""
    for name in os.environ:
        if name.startswith("AWS_") or name.lower() in _PROXY_VARIABLES:
            monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    return monkeypatch


@pytest.fixture
def server():
    with serve_bucket() as server:
        yield server


@pytest.fixture
def bucket(clean_aws, server):
    """A server that the environment names, with keys for it."""
    clean_aws.setenv("AWS_ACCESS_KEY_ID", "key")
    clean_aws.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    clean_aws.setenv("AWS_ENDPOINT_URL", server.url)
    return server
