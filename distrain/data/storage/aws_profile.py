"""What AWS profiles say: credentials, region and endpoint, read by botocore.

The precedence is boto3's: the environment's keys before those of a profile, and both
before the role of a pod or an instance, for which obstore's own chain is asked.
"""

import os
from datetime import datetime, timedelta, timezone
from typing import Any

from distrain.data.storage.retry import RefusedError
from distrain.data.storage.store_errors import summarize_error
from distrain.errors import UserError

# botocore renews credentials ten minutes before they expire, when it is asked for them.
_CREDENTIALS_LIFETIME = timedelta(minutes=5)
# Providers of botocore's chain for roles: they ask servers, and obstore asks them too.
_ROLE_PROVIDERS = ("iam-role", "container-role")
_PROFILE_VARIABLES = ("AWS_PROFILE", "AWS_DEFAULT_PROFILE")
_FILES_BY_VARIABLE = {
    "AWS_CONFIG_FILE": "~/.aws/config",
    "AWS_SHARED_CREDENTIALS_FILE": "~/.aws/credentials",
}
_REGION_VARIABLES = ("AWS_REGION", "AWS_DEFAULT_REGION")
_ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_SSO_ERRORS = (
    "PendingAuthorizationExpiredError",
    "SSOTokenLoadError",
    "TokenRetrievalError",
    "UnauthorizedSSOTokenError",
)
# Errors that may pass: the server that gives the credentials does not answer.
_NETWORK_ERRORS = (
    "ConnectionClosedError",
    "ConnectTimeoutError",
    "EndpointConnectionError",
    "ReadTimeoutError",
)


class ProfileCredentials:
    """Credentials of a profile, in the form that obstore asks for them."""

    def __init__(self, credentials: Any, profile: str) -> None:
        """Wrap botocore's credentials, which renew themselves where they can."""
        self._credentials = credentials
        self._profile = profile
        self.failure: OSError | None = None
        """Why the credentials could not be had, when they were last asked for."""

    def __call__(self) -> dict[str, Any]:
        """Return the present credentials."""
        # obstore reports only that something failed here.
        try:
            frozen = self._credentials.get_frozen_credentials()
        except Exception as error:
            self.failure = _explain_failure(error, self._profile)
            raise self.failure from None
        self.failure = None
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(timezone.utc) + _CREDENTIALS_LIFETIME,
        }


def read_endpoint_variable() -> str | None:
    """Return the endpoint that the environment names, if any."""
    values = (os.environ.get(name) for name in _ENDPOINT_VARIABLES)
    return next((value for value in values if value), None)


def read_aws_profile() -> tuple[dict[str, str], ProfileCredentials | None]:
    """Read the AWS profile in use, without a request to an instance's servers.

    Returns:
        Region and endpoint that the environment leaves open, by obstore's names; and
        the credentials, None if neither environment nor profile has any.

    Raises:
        UserError: the profile is missing or cannot be read, or boto3 is not installed.
    """
    named = next((name for name in _PROFILE_VARIABLES if os.environ.get(name)), None)
    # Not pathlib: it raises where there is neither HOME nor an entry for the user.
    paths = [
        os.path.expanduser(os.environ.get(variable) or default)
        for variable, default in _FILES_BY_VARIABLE.items()
    ]
    if named is None and not any(map(os.path.exists, paths)):
        return {}, None
    try:
        import botocore.exceptions
        import botocore.session
    except ImportError:
        if named is None or "AWS_ACCESS_KEY_ID" in os.environ:
            return {}, None
        raise UserError(
            f"{named} needs boto3, which reads profiles: pip install 'distrain[s3]'"
        ) from None

    session = botocore.session.Session()
    try:
        settings = _read_settings(session)
        # The server that gives a role's credentials has a region too.
        region = os.environ.get("AWS_REGION") or settings.get("region", "us-east-1")
        session.set_config_variable("region", region)
        if os.environ.get("AWS_SKIP_SIGNATURE", "").lower() in ("1", "true"):
            return settings, None
        resolver = session.get_component("credential_provider")
        for name in _ROLE_PROVIDERS:
            resolver.remove(name)
        credentials = resolver.load_credentials()
    except (botocore.exceptions.BotoCoreError, ValueError, OSError) as error:
        raise UserError(
            f"the AWS profile cannot be used: {' '.join(str(error).split())[:300]}"
        ) from None
    if credentials is None:
        return settings, None
    return settings, ProfileCredentials(credentials, session.profile or "default")


def _read_settings(session: Any) -> dict[str, str]:
    """Return region and endpoint of the profile, where the environment has none."""
    settings = {}
    profile = session.get_scoped_config()
    if not any(os.environ.get(name) for name in _REGION_VARIABLES):
        settings["region"] = profile.get("region")
    ignored = os.environ.get("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "").lower()
    if read_endpoint_variable() is None and ignored != "true":
        # The endpoint of S3 alone goes before that of all services.
        services = session.full_config.get("services", {})
        s3_settings = services.get(profile.get("services"), {}).get("s3", {})
        settings["endpoint"] = profile.get("endpoint_url")
        if isinstance(s3_settings, dict) and "endpoint_url" in s3_settings:
            settings["endpoint"] = s3_settings["endpoint_url"]
    return {name: value for name, value in settings.items() if value}


def _explain_failure(error: Exception, profile: str) -> OSError:
    """Return why a profile gives no credentials: for now, or for good."""
    name = type(error).__name__
    if name in _SSO_ERRORS:
        return RefusedError(
            f"the SSO login of the AWS profile {profile} has expired: run aws sso "
            f"login --profile {profile}"
        )
    message = (
        f"the AWS profile {profile} gives no credentials ({summarize_error(error)})"
    )
    if name in _NETWORK_ERRORS:
        return OSError(message)
    return RefusedError(f"{message}: check it with aws sts get-caller-identity")
