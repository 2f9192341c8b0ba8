"""What the errors of a bucket mean: for good or for now, and what to set.

A request that a store refuses for good becomes `RefusedError`, which no caller retries.
"""

import os
import re
import urllib.error
import urllib.request
from typing import NamedTuple
from urllib.parse import urlsplit

from distrain.data.storage.retry import RefusedError

CREDENTIALS_BY_SCHEME = {
    "s3": (
        "the AWS chain: AWS_ACCESS_KEY_ID, AWS_PROFILE or ~/.aws (with boto3), "
        "the role of a pod or an instance (a public bucket needs none: "
        "AWS_SKIP_SIGNATURE=true)"
    ),
    "gs": (
        "Google's chain: GOOGLE_APPLICATION_CREDENTIALS, gcloud's credentials, "
        "the service account of an instance (a public bucket needs none: "
        "GOOGLE_SKIP_SIGNATURE=true)"
    ),
    "az": (
        "Azure's chain: AZURE_STORAGE_ACCOUNT_NAME with a key, token or client, "
        "a managed identity (a public container needs none: "
        "AZURE_SKIP_SIGNATURE=true)"
    ),
}
"""URL schemes of object stores, and where the credentials of each are looked for."""

# The permission that each kind of request needs.
_PERMISSIONS = {
    "s3": {
        "list": "s3:ListBucket",
        "read": "s3:GetObject (and s3:ListBucket, to be told what is missing)",
        "write": "s3:PutObject",
        "remove": "s3:DeleteObject",
    },
    "gs": {
        "list": "storage.objects.list",
        "read": "storage.objects.get",
        "write": "storage.objects.create and storage.objects.delete",
        "remove": "storage.objects.delete",
    },
    "az": {
        "list": "the role Storage Blob Data Reader",
        "read": "the role Storage Blob Data Reader",
        "write": "the role Storage Blob Data Contributor",
        "remove": "the role Storage Blob Data Contributor",
    },
}

# Error codes of requests that may succeed later, whatever their status.
_TRANSIENT_CODES = {
    "BadDigest",
    "BandwidthLimitExceeded",
    "ConditionalRequestConflict",
    "ContainerBeingDeleted",
    "IncompleteBody",
    "InternalError",
    "OperationAborted",
    "OperationTimedOut",
    "RequestTimeout",
    "ServerBusy",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "XAmzContentSHA256Mismatch",
}
_TRANSIENT_STATUSES = {408, 409, 416, 425, 429}
# Statuses above 500 that do not pass: what the request asks for is not implemented.
_LASTING_SERVER_STATUSES = {501, 505}

_WRONG_REGION_CODES = {
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException",
    "PermanentRedirect",
    "TemporaryRedirect",
}
# What obstore writes of a redirect without an address: S3's answer in a wrong region.
_BARE_REDIRECT = "redirect without LOCATION"
_MISSING_BUCKET_CODES = {"NoSuchBucket", "ContainerNotFound"}
# Error codes about the credentials, and what is wrong with them.
_CREDENTIAL_PROBLEMS = {
    "ExpiredToken": "the token has expired: get a new one",
    "TokenRefreshRequired": "the token has expired: get a new one",
    "InvalidToken": "the session token is not valid: set or unset AWS_SESSION_TOKEN",
    "InvalidAccessKeyId": "the access key does not exist",
    "SignatureDoesNotMatch": "the secret key does not match",
    "AuthenticationFailed": "the key or token is not valid",
    "InvalidAuthenticationInfo": "the key or token is not valid or has expired",
    "NoAuthenticationInformation": "there are none",
}
_OTHER_PROBLEMS = {
    "RequestTimeTooSkewed": "the clock of this machine is wrong: set it",
    "AccountProblem": "there is a problem with the account: ask its owner",
    "AccountIsDisabled": "the account is disabled: ask its owner",
    "AllAccessDisabled": "all access to the bucket is disabled: ask its owner",
    "InvalidBucketName": "this is no name of a bucket: check the URL",
    "InvalidObjectState": "the object is archived: restore it first",
    "BlobArchived": "the object is archived: restore it first",
}

# Servers of an instance's or a pod's role, the last that the chains ask.
_ROLE_SERVERS = ("169.254.169.254", "169.254.170.", "metadata.google.internal")
# How obstore's TLS library says that it does not trust a server, with the reason.
_BAD_CERTIFICATE = re.compile(r"InvalidCertificate\(\s*(\w+)")

_MAX_SUMMARY_CHARS = 300
_REGION_TIMEOUT_SECONDS = 5.0


class StoreRequest(NamedTuple):
    """Request that failed."""

    action: str
    """"list", "read", "write", "create" (if it does not exist) or "remove"."""
    scheme: str
    bucket_url: str
    object_url: str
    """URL of what was asked for, without secrets."""


class _Answer(NamedTuple):
    """What a store answered, as far as the client says it."""

    status: int | None
    code: str
    """Error code in the body; "" without one."""
    region: str
    """Region that the body names; "" without one."""
    request_url: str


def is_transient_status(status: int) -> bool:
    """Return whether an HTTP error may pass by waiting."""
    if status in _TRANSIENT_STATUSES:
        return True
    return status >= 500 and status not in _LASTING_SERVER_STATUSES


def translate_store_error(error: Exception, request: StoreRequest) -> OSError:
    """Return the OSError for what obstore raised.

    Args:
        error: an exception of obstore.
        request: the request that failed.

    Returns:
        FileNotFoundError, FileExistsError, RefusedError (for good, with what to set),
        or an OSError that may pass.
    """
    # The servers of roles are asked before the store, and have errors of their own.
    if any(server in str(error) for server in _ROLE_SERVERS):
        return _explain_no_credentials(error, request)

    answer = _parse_answer(str(error))
    is_transient_code = answer.code in _TRANSIENT_CODES
    if not is_transient_code:
        refusal = _explain_refusal(answer, str(error), request)
        if refusal is not None:
            return RefusedError(refusal)

    # By name, because obstore and its exceptions may not be installed.
    error_name = type(error).__name__
    if isinstance(error, FileNotFoundError) or answer.status == 404:
        return FileNotFoundError(request.object_url)
    # Any conflict has this class, but only one with a conditional put is the file's.
    if error_name == "AlreadyExistsError" and request.action == "create":
        return FileExistsError(request.object_url)

    summary = summarize_error(error)
    if error_name == "InvalidPathError" or isinstance(error, ValueError):
        named = re.search(r'[Pp]ath "(.*?)"[: ]', str(error), re.DOTALL)
        key = repr(named[1]) if named else summary
        return RefusedError(
            f"{request.bucket_url} has a key that cannot be read, {key}, with an empty "
            "part, a part . or .., or a control character: rename it"
        )
    is_lasting = answer.status is not None and not is_transient_status(answer.status)
    if is_lasting and not is_transient_code:
        return RefusedError(
            f"the store refuses to {_get_verb(request)} {request.object_url}: check "
            f"the URL and the endpoint ({summary})"
        )
    return OSError(summary)


def _explain_no_credentials(error: Exception, request: StoreRequest) -> OSError:
    message = (
        f"no credentials for {request.bucket_url}, which come from "
        f"{CREDENTIALS_BY_SCHEME[request.scheme]} ({summarize_error(error)})"
    )
    # A role's server may answer later, unless the user knows that there is none.
    is_disabled = os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true"
    return RefusedError(message) if is_disabled else OSError(message)


def _explain_refusal(answer: _Answer, text: str, request: StoreRequest) -> str | None:
    """Return why a request fails for good, and what to set; None if not known."""
    denied = f"the store denies access to {request.object_url}"
    sources = f"the credentials come from {CREDENTIALS_BY_SCHEME[request.scheme]}"
    bucket = urlsplit(request.bucket_url).netloc

    if answer.code in _WRONG_REGION_CODES or _BARE_REDIRECT in text:
        region = answer.region or _ask_region(answer.request_url)
        setting = f"AWS_REGION={region}" if region else "AWS_REGION to the bucket's"
        return f"the bucket {bucket} is in another region: set {setting}"
    # To list or to write, no object must exist: what is missing is the bucket.
    needs_object = request.action in ("read", "remove")
    is_bucket_missing = answer.status == 404 and not needs_object
    if is_bucket_missing or answer.code in _MISSING_BUCKET_CODES:
        return f"there is no bucket {bucket} at this endpoint: check the URL"
    if answer.code in _CREDENTIAL_PROBLEMS:
        problem = _CREDENTIAL_PROBLEMS[answer.code]
        return f"{denied}: {problem} ({answer.code}); {sources}"
    if answer.code in _OTHER_PROBLEMS:
        return f"{denied}: {_OTHER_PROBLEMS[answer.code]} ({answer.code})"
    if answer.status == 401:
        return f"{denied}: it takes no such credentials; {sources}"
    if answer.status == 403:
        permissions = _PERMISSIONS[request.scheme]
        needed = f"{permissions[_get_verb(request)]} is needed; {sources}"
        if request.action == "list":
            return f"the store refuses to list {request.object_url}: {needed}"
        return f"{denied}: {needed}"
    if bad_certificate := _BAD_CERTIFICATE.search(text):
        host = urlsplit(answer.request_url).netloc or bucket
        return (
            f"the certificate of {host} is not trusted ({bad_certificate[1]}): set "
            "SSL_CERT_FILE to a file of the authorities to trust, or check the endpoint"
        )
    return None


def _get_verb(request: StoreRequest) -> str:
    return "write" if request.action == "create" else request.action


def _parse_answer(text: str) -> _Answer:
    """Return what a store answered, out of the text of obstore's exception."""
    status = re.search(r"status code: (\d{3})", text)
    code = re.search(r"<Code>\s*(\w+)\s*</Code>", text)
    region = re.search(r"<Region>\s*([\w-]+)\s*</Region>", text)
    if region is None:
        region = re.search(r"expecting '([\w-]+)'", text)
    url = re.search(r"Error performing \w+ (\S+) in ", text)
    return _Answer(
        int(status[1]) if status else None,
        code[1] if code else "",
        region[1] if region else "",
        url[1] if url else "",
    )


def _ask_region(request_url: str) -> str:
    """Return the region that a bucket is in, or "" if the server does not say it.

    S3 names it in a header, even of an answer to a request without a signature. obstore
    hides the headers of what failed.
    """
    url = urlsplit(request_url)._replace(query="").geturl()
    headers = None
    try:
        # obstore speaks HTTP alone, so that the scheme is no other.
        request = urllib.request.Request(url, method="HEAD")  # noqa: S310
        with urllib.request.urlopen(request, timeout=_REGION_TIMEOUT_SECONDS) as answer:  # noqa: S310
            headers = answer.headers
    except urllib.error.HTTPError as error:
        headers = error.headers
    except (OSError, ValueError):
        return ""
    return str(headers.get("x-amz-bucket-region", ""))


def summarize_error(error: BaseException) -> str:
    """Return an error in one line, without what may be secret in its URLs."""
    text = str(error)
    answer = _parse_answer(text)
    lines = (line.strip() for line in text.splitlines())
    first_line = next((line for line in lines if line), type(error).__name__)
    # The body of an answer, which may be long, says in its code what it is about.
    summary = re.split(r":\s*<|: \{", first_line, maxsplit=1)[0]
    summary = re.sub(r"(https?://)[^\s/?@]+@", r"\1", summary)
    summary = re.sub(r"(https?://[^\s?]+)\?\S*", r"\1", summary)
    if answer.code:
        summary = f"{summary}: {answer.code}"
    return summary[:_MAX_SUMMARY_CHARS]
