"""A store that refuses ends every command at once, with exit 2 and one sentence."""

import pytest
import torch
from bucket_server import Answer

from distrain.data.storage import retry as retry_module
from distrain.distributed.world import World
from distrain.errors import UserError
from distrain.trainer import train

REFUSALS = {
    "no listing": (
        lambda request: (
            Answer(403, "AccessDenied") if request.action == "list" else None
        ),
        "s3:ListBucket is needed",
    ),
    "region": (
        lambda _: Answer(301, "", (("x-amz-bucket-region", "eu-west-1"),)),
        "set AWS_REGION=eu-west-1",
    ),
    "token": (lambda _: Answer(400, "ExpiredToken"), "the token has expired"),
    "bucket": (lambda _: Answer(404, "NoSuchBucket"), "there is no bucket b"),
}


@pytest.fixture(params=REFUSALS.values(), ids=REFUSALS)
def refusal(bucket, request, monkeypatch):
    def fail(_):
        raise AssertionError("it is retried")

    monkeypatch.setattr(retry_module.time, "sleep", fail)
    bucket.refuse, message = request.param
    yield message
    assert len(bucket.requests) <= 4


@pytest.mark.parametrize(
    "arguments",
    [
        ("pack", "s3://b/photos", "out"),
        ("index", "s3://b/photos", "--to", "out"),
        ("verify", "s3://b/shards"),
        ("inspect", "s3://b/shards"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_commands(refusal, distrain, monkeypatch, tmp_path, arguments):
    monkeypatch.chdir(tmp_path)
    code, _, err = distrain(*arguments)
    assert code == 2
    assert refusal in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("place", ["data", "run"])
def test_train(refusal, narrow, console, place):
    changes = {"data": {"data": {"train": "s3://b/x"}}, "run": {"run": "s3://b/run"}}
    with pytest.raises((UserError, PermissionError), match=refusal):
        train(narrow(**changes[place]), World(torch.device("cpu")), console)
