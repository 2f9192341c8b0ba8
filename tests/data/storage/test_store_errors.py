"""Refusals of a store: said at once with what to set, or retried, but never both."""

import pytest
from bucket_server import Answer

from distrain.data.storage import retry as retry_module
from distrain.data.storage.retry import RefusedError, is_transient
from distrain.data.storage.store import Store
from distrain.data.storage.store_errors import summarize_error

REGION_XML = "<Region>eu-west-1</Region>"
REGION_HEADER = (("x-amz-bucket-region", "eu-west-1"),)

REFUSALS = [
    (Answer(301, "PermanentRedirect", REGION_HEADER), "AWS_REGION=eu-west-1"),
    (Answer(301, "", REGION_HEADER), "AWS_REGION=eu-west-1"),
    (Answer(307, "TemporaryRedirect"), "in another region: set AWS_REGION to the"),
    (
        Answer(400, "AuthorizationHeaderMalformed", (), REGION_XML),
        "AWS_REGION=eu-west-1",
    ),
    (
        Answer(
            400,
            "AuthorizationHeaderMalformed",
            (),
            "<Message>the region 'us-east-1' is wrong; expecting 'eu-west-1'</Message>",
        ),
        "AWS_REGION=eu-west-1",
    ),
    (
        Answer(400, "IllegalLocationConstraintException", REGION_HEADER),
        "AWS_REGION=eu-west-1",
    ),
    (Answer(400, "ExpiredToken"), "the token has expired"),
    (Answer(400, "TokenRefreshRequired"), "the token has expired"),
    (Answer(400, "InvalidToken"), "set or unset AWS_SESSION_TOKEN"),
    (Answer(403, "ExpiredToken"), "the token has expired"),
    (Answer(401, "Unauthorized"), "the store denies access to s3://b/p.*AWS_ACCESS"),
    (Answer(403, "InvalidAccessKeyId"), "the access key does not exist.*AWS_ACCESS"),
    (Answer(403, "SignatureDoesNotMatch"), "the secret key does not match.*AWS_ACCESS"),
    (Answer(403, "RequestTimeTooSkewed"), "the clock of this machine is wrong"),
    (Answer(403, "AccountProblem"), "a problem with the account"),
    (Answer(403, "AllAccessDisabled"), "access to the bucket is disabled"),
    (Answer(403, "InvalidObjectState"), "archived: restore it first"),
    (Answer(404, "NoSuchBucket"), "there is no bucket b"),
    (Answer(400, "InvalidBucketName"), "no name of a bucket"),
    (Answer(405, "MethodNotAllowed"), "refuses to .* s3://b/p.*MethodNotAllowed"),
    (Answer(400, ""), "check the URL and the endpoint"),
    (Answer(407, ""), "check the URL and the endpoint"),
]
DENIALS = {
    "list": "the store refuses to list s3://b/p/x: s3:ListBucket is needed",
    "read": r"denies access to s3://b/p/x: s3:GetObject",
    "write": r"denies access to s3://b/p/x: s3:PutObject",
    "remove": r"denies access to s3://b/p/x: s3:DeleteObject",
}
ACTIONS = {
    "list": lambda store: store.list_names("x"),
    "read": lambda store: store.read("x", 0, 4, retry_seconds=60),
    "size": lambda store: store.get_size("x"),
    "write": lambda store: store.write("x", b"data", retry_seconds=60),
    "create": lambda store: store.create_exclusive("x", b"data"),
    "remove": lambda store: store.remove("x"),
}


@pytest.fixture
def no_pause(monkeypatch):
    def fail(_):
        raise AssertionError("it is retried")

    monkeypatch.setattr(retry_module.time, "sleep", fail)


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize(
    ("answer", "message"), REFUSALS, ids=[f"{a.status}-{a.code}" for a, _ in REFUSALS]
)
def test_what_is_refused_for_good_is_said_at_once(
    bucket, no_pause, action, answer, message
):
    bucket.refuse = lambda _: answer
    if action == "size" and answer.status == 404:
        return
    with pytest.raises(RefusedError, match=message) as refused:
        ACTIONS[action](Store("s3://b/p"))
    assert not is_transient(refused.value)
    # One, one more for a reason or a region that a HEAD or a redirect does not tell.
    assert len(bucket.requests) <= (4 if action == "size" else 2)
    assert "secret" not in str(refused.value).replace(
        "the secret key does not match", ""
    )
    assert "\n" not in str(refused.value)
    assert "<" not in str(refused.value)


@pytest.mark.parametrize("action", DENIALS)
def test_the_permission_that_is_needed_is_named(bucket, no_pause, action):
    bucket.objects = {"p/x/y": b"data"} if action == "remove" else {}
    refused = {"list": ("list",), "remove": ("write",)}.get(action, ("read", "write"))
    bucket.refuse = lambda request: (
        Answer(403, "AccessDenied") if request.action in refused else None
    )
    with pytest.raises(RefusedError, match=DENIALS[action]):
        ACTIONS[action](Store("s3://b/p"))


def test_what_may_be_read_is_read_where_nothing_may_be_listed(bucket):
    bucket.objects = {"p/x": b"data"}
    bucket.refuse = lambda request: (
        Answer(403, "AccessDenied") if request.action == "list" else None
    )
    store = Store("s3://b/p")
    assert store.read("x") == b"data"
    assert store.exists("x")
    with pytest.raises(RefusedError, match="s3:ListBucket is needed"):
        store.exists("y")


@pytest.mark.parametrize(
    "answer",
    [
        Answer(400, "RequestTimeout"),
        Answer(400, "BadDigest"),
        Answer(409, "OperationAborted"),
        Answer(403, "SlowDown"),
    ],
    ids=lambda answer: f"{answer.status}-{answer.code}",
)
@pytest.mark.parametrize("action", ["list", "read", "size", "write", "remove"])
def test_what_may_pass_is_left_to_the_caller_to_retry(bucket, answer, action):
    bucket.refuse = lambda _: answer
    act = ACTIONS[action]
    with pytest.raises(OSError, match=r"status code|S3 error") as failed:
        # Without patience: the retries of the store have tests of their own.
        act(Store("s3://b/p")) if action not in ("read", "write") else {
            "read": lambda store: store.read("x", 0, 4),
            "write": lambda store: store.write("x", b"data"),
        }[action](Store("s3://b/p"))
    assert is_transient(failed.value)


def test_a_store_in_trouble_is_retried_until_it_answers(bucket, monkeypatch):
    monkeypatch.setattr(retry_module.time, "sleep", lambda _: None)
    bucket.objects = {"p/x": b"data"}
    answers = [Answer(400, "RequestTimeout"), Answer(409, "OperationAborted")]
    bucket.refuse = lambda _: answers.pop() if answers else None
    assert Store("s3://b/p").read("x", 0, 4, retry_seconds=60) == b"data"


def test_of_a_conditional_put_a_conflict_is_another_writers_file(bucket):
    bucket.refuse = lambda _: Answer(409, "ConditionalRequestConflict")
    with pytest.raises(FileExistsError):
        Store("s3://b/p").create_exclusive("x", b"data")


# --- other clouds, by the texts of the client


@pytest.mark.parametrize(
    ("scheme", "status", "code", "message"),
    [
        ("gs", 401, "", "denies access to gs://b/x.*GOOGLE_APPLICATION_CREDENTIALS"),
        ("gs", 403, "AccessDenied", "storage.objects.get is needed"),
        ("gs", 404, "NoSuchBucket", "there is no bucket b"),
        (
            "az",
            403,
            "AuthenticationFailed",
            "the key or token is not valid.*AZURE_STORAGE",
        ),
        (
            "az",
            401,
            "InvalidAuthenticationInfo",
            "the key or token is not valid or has",
        ),
        ("az", 403, "AuthorizationFailure", "Storage Blob Data Reader is needed"),
        ("az", 404, "ContainerNotFound", "there is no bucket b"),
    ],
)
def test_other_clouds_refuse_too(scheme, status, code, message):
    from distrain.data.storage.store_errors import StoreRequest, translate_store_error

    url = f"{scheme}://b"
    body = f"<Error><Code>{code}</Code></Error>"
    error = Exception(
        "Generic error: Error performing GET https://b.invalid/x?sig=HIDDEN in 1ms - "
        f"Server returned non-2xx status code: {status} Reason: {body}"
    )
    request = StoreRequest("read", scheme, url, f"{url}/x")
    refused = translate_store_error(error, request)
    assert isinstance(refused, RefusedError)
    import re

    assert re.search(message, str(refused))
    assert "HIDDEN" not in str(refused)


def test_a_certificate_that_is_not_trusted_names_the_variable():
    from distrain.data.storage.store_errors import StoreRequest, translate_store_error

    error = Exception(
        "Generic S3 error: Error performing GET https://minio:9000/b/x in 1ms - HTTP "
        "error: error sending request\n\nDebug source:\n error: InvalidCertificate(\n"
        "        UnknownIssuer,\n    ),\n"
    )
    request = StoreRequest("read", "s3", "s3://b", "s3://b/x")
    refused = translate_store_error(error, request)
    assert isinstance(refused, RefusedError)
    assert "minio:9000 is not trusted (UnknownIssuer): set SSL_CERT_FILE" in str(
        refused
    )


@pytest.mark.parametrize(
    ("error", "summary"),
    [
        (
            OSError("GET https://s3.x/a.tar?X-Amz-Signature=5ec failed"),
            "GET https://s3.x/a.tar failed",
        ),
        (
            OSError("error sending request for url (https://me:5ec@x/a?sig=5ec)"),
            "error sending request for url (https://x/a",
        ),
        (OSError("\nfirst line\nsecond"), "first line"),
        (OSError(), "OSError"),
        (OSError("x" * 5000), "x" * 300),
    ],
)
def test_a_summary_is_one_line_without_what_may_be_secret(error, summary):
    assert summarize_error(error) == summary
