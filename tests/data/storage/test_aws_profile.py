"""Profiles of AWS: which keys, region and endpoint arrive at the server."""

from pathlib import Path

import pytest

from distrain.data.storage.retry import RefusedError
from distrain.data.storage.store import Store
from distrain.errors import UserError

KEYS = "aws_access_key_id = {0}\naws_secret_access_key = secret-of-{0}\n"
SSO = "sso_account_id = 1\nsso_role_name = r\nregion = eu-west-1\n"


@pytest.fixture
def aws(clean_aws, server, tmp_path):
    """Write files of a home, and return what the server sees of a listing."""
    server.objects = {"p/a.jpg": b"x"}

    def write_and_list(files=(), **variables):
        for name, text in dict(files).items():
            path = Path(tmp_path / "home" / name)
            path.parent.mkdir(exist_ok=True)
            path.write_text(text.replace("URL", server.url))
        for name, value in variables.items():
            clean_aws.setenv(
                name,
                value.replace("URL", server.url).replace(
                    "HOME", str(tmp_path / "home")
                ),
            )
        assert Store("s3://b/p").list_names() == ["a.jpg"]
        (request,) = server.requests
        return request.access_key, request.region

    return write_and_list


PROCESS = """credential_process = /bin/echo '{"Version": 1, "AccessKeyId": "p", "SecretAccessKey": "s"}'\n"""


@pytest.mark.parametrize(
    ("files", "variables", "expected"),
    [
        pytest.param(
            {
                ".aws/config": f"[default]\nendpoint_url=URL\nregion=eu-west-3\n{PROCESS}"
            },
            {},
            ("p", "eu-west-3"),
            id="credential_process in the config file alone",
        ),
        pytest.param(
            {".aws/config": "[default]\nendpoint_url=URL\n" + KEYS.format("c")},
            {},
            ("c", "us-east-1"),
            id="keys in the config file alone",
        ),
        pytest.param(
            {".aws/credentials": "[default]\n" + KEYS.format("d")},
            {"AWS_ENDPOINT_URL": "URL"},
            ("d", "us-east-1"),
            id="the credentials file alone",
        ),
        pytest.param(
            {
                ".aws/config": "[profile x]\nregion=r1\nendpoint_url=URL\n",
                ".aws/credentials": "[x]\n" + KEYS.format("x"),
            },
            {"AWS_PROFILE": "x"},
            ("x", "r1"),
            id="AWS_PROFILE",
        ),
        pytest.param(
            {".aws/config": "[profile x]\nendpoint_url=URL\n" + KEYS.format("x")},
            {"AWS_DEFAULT_PROFILE": "x"},
            ("x", "us-east-1"),
            id="AWS_DEFAULT_PROFILE",
        ),
        pytest.param(
            {"elsewhere": "[default]\nendpoint_url=URL\n" + KEYS.format("e")},
            {"AWS_CONFIG_FILE": "HOME/elsewhere"},
            ("e", "us-east-1"),
            id="AWS_CONFIG_FILE",
        ),
        pytest.param(
            {"elsewhere": "[default]\n" + KEYS.format("e")},
            {"AWS_SHARED_CREDENTIALS_FILE": "~/elsewhere", "AWS_ENDPOINT_URL": "URL"},
            ("e", "us-east-1"),
            id="AWS_SHARED_CREDENTIALS_FILE with ~",
        ),
        pytest.param(
            {
                ".aws/config": "[default]\nservices=x\n"
                + KEYS.format("s")
                + "[services x]\ns3 =\n  endpoint_url = URL\n"
            },
            {},
            ("s", "us-east-1"),
            id="the endpoint of a services section",
        ),
        pytest.param(
            {
                ".aws/config": "[default]\nregion=r1\nendpoint_url=http://127.0.0.1:9\n"
                + KEYS.format("c")
            },
            {"AWS_REGION": "r2", "AWS_ENDPOINT_URL": "URL"},
            ("c", "r2"),
            id="the environment's region and endpoint go first",
        ),
        pytest.param(
            {
                ".aws/config": "[profile x]\nregion=r1\nendpoint_url=URL\n"
                + KEYS.format("x")
            },
            {
                "AWS_PROFILE": "x",
                "AWS_ACCESS_KEY_ID": "env",
                "AWS_SECRET_ACCESS_KEY": "secret",
            },
            ("env", "r1"),
            id="the environment's keys go first, as in boto3",
        ),
        pytest.param(
            {".aws/config": "[default]\nendpoint_url=URL\n" + KEYS.format("c")},
            {"AWS_SKIP_SIGNATURE": "true"},
            ("", ""),
            id="nothing is signed for a public bucket",
        ),
        pytest.param(
            {},
            {
                "AWS_ENDPOINT_URL": "URL",
                "AWS_ACCESS_KEY_ID": "env",
                "AWS_SECRET_ACCESS_KEY": "secret",
            },
            ("env", "us-east-1"),
            id="no profile at all",
        ),
    ],
)
def test_what_arrives_at_the_server(aws, files, variables, expected):
    assert aws(files, **variables) == expected


def test_a_home_that_is_not_known(aws, clean_aws):
    """HOME is unset, and the user has no entry: what a container with a bare user id is like."""
    import pwd

    def fail(_):
        raise KeyError("uid not found")

    clean_aws.delenv("HOME")
    clean_aws.setattr(pwd, "getpwuid", fail)
    keys = {"AWS_ACCESS_KEY_ID": "env", "AWS_SECRET_ACCESS_KEY": "secret"}
    assert aws(AWS_ENDPOINT_URL="URL", **keys) == ("env", "us-east-1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[profile y]\n",
            r"the AWS profile cannot be used: .*\(x\) could not be found",
        ),
        ("[profile x\n", "the AWS profile cannot be used: Unable to parse config file"),
        ("[profile x]\naws_access_key_id = k\n", "Partial credentials found"),
        ("[profile x]\ncredential_process = /bin/false\n", "custom-process"),
    ],
)
def test_a_profile_that_cannot_be_used(aws, text, message):
    with pytest.raises(UserError, match=message):
        aws({".aws/config": text}, AWS_PROFILE="x")


@pytest.mark.parametrize(
    "how",
    [
        "sso_start_url = https://x.invalid/start\nsso_region = us-east-1\n",
        "sso_session = s\n",
    ],
    ids=["legacy", "session"],
)
def test_an_sso_login_that_has_expired(aws, server, how):
    session = "[sso-session s]\nsso_region = us-east-1\nsso_start_url = https://x.invalid/start\n"
    text = f"[profile x]\nendpoint_url=URL\n{SSO}{how}{session}"
    with pytest.raises(RefusedError, match="run aws sso login --profile x$"):
        aws({".aws/config": text}, AWS_PROFILE="x")
    assert not server.requests


def test_credentials_that_expire_are_renewed(clean_aws):
    """botocore renews what it is asked for; obstore must ask again before the end."""
    from datetime import datetime, timedelta, timezone
    from types import SimpleNamespace

    from distrain.data.storage.aws_profile import ProfileCredentials

    frozen = SimpleNamespace(access_key="a", secret_key="b", token="c")
    credentials = SimpleNamespace(get_frozen_credentials=lambda: frozen)
    given = ProfileCredentials(credentials, "x")()
    assert given.pop("expires_at") < datetime.now(timezone.utc) + timedelta(minutes=10)
    assert given == {
        "access_key_id": "a",
        "secret_access_key": "b",
        "token": "c",
    }


def test_an_instance_without_a_role_server_is_not_asked_twice(clean_aws, server):
    """With AWS_EC2_METADATA_DISABLED there is nothing that may answer later."""
    from distrain.data.storage.store_errors import (
        StoreRequest,
        translate_store_error,
    )

    request = StoreRequest("read", "s3", "s3://b", "s3://b/x")
    error = Exception("Error performing PUT http://169.254.169.254/latest in 1ms - x")
    failure = translate_store_error(error, request)
    assert not isinstance(failure, RefusedError)
    clean_aws.setenv("AWS_EC2_METADATA_DISABLED", "true")
    failure = translate_store_error(error, request)
    assert isinstance(failure, RefusedError)
    assert "no credentials for s3://b, which come from" in str(failure)
