import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from ceph import KEY, PORT, SECRET, Ceph, installed
from proxy import Proxy

from distrain.data.storage import object_store


@pytest.fixture(scope="session")
def ceph(tmp_path_factory):
    if not installed():
        pytest.skip(
            "no S3 server: apt-get install radosgw ceph-mon ceph-osd ceph-mgr ceph-common"
        )
    server = Ceph(tmp_path_factory.mktemp("ceph"))
    try:
        server.up()
        yield server
    finally:
        server.down()


@pytest.fixture(scope="session")
def bucket(ceph, digits):
    """The digits in a bucket; the environment's credentials and endpoint are the server's."""
    import boto3
    from botocore.config import Config

    options = {
        "aws_access_key_id": KEY,
        "aws_secret_access_key": SECRET,
        "region_name": "us-east-1",
    }
    checksums = Config(
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    client = boto3.client("s3", endpoint_url=ceph.url, config=checksums, **options)
    client.create_bucket(Bucket="data")
    for file in sorted(digits.rglob("*")):
        if file.is_file():
            client.upload_file(str(file), "data", str(file.relative_to(digits)))
    return client


@pytest.fixture
def s3(ceph, bucket, monkeypatch):
    """`s3://data` by way of a proxy that can break connections. Stalls are given up after a second here."""
    proxy = Proxy(PORT)
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    monkeypatch.setitem(object_store._CLIENT_OPTIONS, "read_timeout", "1s")
    if not ceph.answers():
        ceph.start_gateway()
    yield proxy
    proxy.close()
