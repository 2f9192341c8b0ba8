import socket

import pytest
from photos import encoded, picture, write_set

from distrain.data.shards.dataset import Dataset
from distrain.data.storage.proxies import must_bypass_proxies, read_url


@pytest.mark.parametrize(
    ("host", "is_near"),
    [
        ("127.0.0.1", True),
        ("127.3.2.1", True),
        ("localhost", True),
        ("[::1]", True),
        ("10.1.2.3", True),
        ("172.16.0.1", True),
        ("192.168.3.4", True),
        ("169.254.1.1", True),
        ("100.64.1.2", True),
        ("[fd00::1]", True),
        ("[fe80::1%25lo]", True),
        ("8.8.8.8", False),
        ("[2606:4700::1111]", False),
        ("raycluster-head", True),
        ("head.ray.svc.cluster.local", True),
        ("head.corp.example.com", True),
        ("ray.example.com", False),
        ("nowhere.example.com", False),
        ("nowhere", True),
    ],
)
@pytest.mark.parametrize("form", ["http://{}:8265", "https://user@{}/x", "http://{}"])
def test_what_goes_around_proxies(proxy, monkeypatch, host, is_near, form):
    addresses = {
        "raycluster-head": "10.4.5.6",
        "head.ray.svc.cluster.local": "10.96.1.1",
        "head.corp.example.com": "10.9.9.9",
        "ray.example.com": "8.8.4.4",
    }
    resolve = socket.getaddrinfo

    def answer(name, *arguments):
        # No name is asked for outside of this machine.
        if name.startswith("nowhere"):
            raise socket.gaierror
        return resolve(addresses.get(name, name), *arguments)

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    assert must_bypass_proxies(form.format(host)) is is_near


def test_without_a_proxy_no_name_is_looked_up(monkeypatch):
    monkeypatch.setattr("distrain.data.storage.proxies.getproxies", dict)
    monkeypatch.setattr(socket, "getaddrinfo", None)
    assert not must_bypass_proxies("http://localhost:8265")
    assert not must_bypass_proxies("auto")


def test_another_servers_page_goes_through_the_proxy(proxy, monkeypatch):
    """As the environment says: the proxy may be the only way there."""
    monkeypatch.setattr(
        "distrain.data.storage.proxies.must_bypass_proxies", lambda _: False
    )
    with pytest.raises(OSError, match="403"):
        read_url("http://ray.example.com:8265/metrics", timeout_seconds=2.0)
    assert proxy == ["http://ray.example.com:8265/metrics"]


def test_a_data_set_in_a_bucket_of_this_network_is_read_around_proxies(
    bucket, proxy, tmp_path
):
    files = [encoded(picture(i, 20, 30)) for i in range(6)]
    write_set(tmp_path / "set", files)
    paths = [path for path in (tmp_path / "set").rglob("*") if path.is_file()]
    bucket.objects = {
        f"p/{path.relative_to(tmp_path / 'set').as_posix()}": path.read_bytes()
        for path in paths
    }
    dataset = Dataset.open("s3://b/p", retry_seconds=0.0)
    assert [bytes(row.data) for row in dataset] == files
    assert proxy == []
