"""What S3 and its client answer when something is wrong, in words: which errors pass, and what to do about the others.

The codes are those of the S3 API reference ("Error Responses"), of MinIO and of Ceph for a full disk or quota: Amazon's
own S3 is never full. Servers' own sentences are left out, because they may repeat what was sent.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from botocore import exceptions as boto
from botocore.parsers import ResponseParserError

from volseg.errors import StorageDeniedError, StorageFullError, StorageUnavailableError

_PERMISSIONS = {
    "get_object": "s3:GetObject",
    "list_objects_v2": "s3:ListBucket",
    "head_bucket": "s3:ListBucket",
    "delete_object": "s3:DeleteObject",
    "delete_objects": "s3:DeleteObject",
}
_VERBS = {"get_object": "read", "list_objects_v2": "listed", "delete_object": "removed", "delete_objects": "removed"}

EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"}
_FULL = {
    "507", "InsufficientStorage", "QuotaExceeded", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded",
    "StorageFull", "NoSpaceLeft",
}  # fmt: skip
_REGION = {
    "301", "307", "PermanentRedirect", "TemporaryRedirect", "Redirect", "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException",
}  # fmt: skip
_PASSING = {
    "SlowDown", "SlowDownRead", "SlowDownWrite", "Throttling", "ThrottlingException", "RequestLimitExceeded",
    "TooManyRequests", "RequestTimeout", "RequestTimeoutException", "OperationAborted", "ConditionalRequestConflict",
    "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch", "InternalError", "ServiceUnavailable", "408",
    "409", "429",
}  # fmt: skip
_SIMPLE = {
    "InvalidAccessKeyId": ("{server} does not know the access key", "check AWS_ACCESS_KEY_ID or AWS_PROFILE"),
    "SignatureDoesNotMatch": ("the secret key does not fit the access key", "check AWS_SECRET_ACCESS_KEY"),
    "InvalidToken": ("{server} does not accept the session token", "check AWS_SESSION_TOKEN"),
    "InvalidClientTokenId": ("{server} does not accept the session token", "check AWS_SESSION_TOKEN"),
    "RequestTimeTooSkewed": ("the clock of this machine is wrong", "set it"),
    "NoSuchBucket": (
        "there is no bucket {bucket!r} at {server}",
        "create it, or check its name and AWS_ENDPOINT_URL",
    ),
    "InvalidBucketName": ("{bucket!r} cannot be the name of a bucket", "check the path"),
}  # fmt: skip
_UNANSWERED = (
    boto.ConnectionError, boto.HTTPClientError, ResponseParserError, boto.IncompleteReadError,
    boto.FlexibleChecksumError, aiohttp.ClientError, OSError,
)  # fmt: skip


class ShortBodyError(OSError):
    """Fewer bytes came than were announced or asked for."""


@dataclass(frozen=True)
class Action:
    """One operation: the client's `method` on `bucket` and `key`, at the server `endpoint`, for `region`, if signed."""

    method: str
    bucket: str
    key: str = ""
    endpoint: str = ""
    region: str = ""
    unsigned: bool = False

    @property
    def uri(self) -> str:
        """What it is about."""
        return f"s3://{self.bucket}/{self.key}".rstrip("/")

    @property
    def server(self) -> str:
        """The endpoint without user names and passwords."""
        parts = urlsplit(self.endpoint)
        port = f":{parts.port}" if parts.port else ""
        return f"{parts.scheme}://{parts.hostname}{port}" if parts.hostname else "the S3 endpoint"

    @property
    def verb(self) -> str:
        """What is done, as in 'cannot be read'."""
        return _VERBS.get(self.method, "written")


@dataclass(frozen=True)
class Verdict:
    """What an error means: whether it may pass by itself, and what to raise where it did not."""

    error: Exception
    passing: bool = False
    expired: bool = False


def judge(error: Exception, action: Action, requests: int) -> Verdict:
    """Say what an error of the client means, met after so many requests; an error of volseg itself comes back as it is.

    The `error` of the verdict is FileNotFoundError for an absent object, FileExistsError where a condition was not met,
    OSError for what only the caller can judge, else StorageDeniedError, StorageFullError or StorageUnavailableError.
    """
    if isinstance(error, boto.ClientError):
        return _of_answer(error, action, requests)
    if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError):
        missing = isinstance(error, boto.NoCredentialsError)
        what = "no AWS credentials were found" if missing else "the AWS credentials are incomplete"
        remedy = (
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give this machine a role, or "
            "AWS_NO_SIGN_REQUEST=yes for public buckets"
        )
        return _denied(action, what, remedy)
    if isinstance(error, boto.SSLError):
        return _denied(action, f"{action.server} has no certificate that is trusted", "set AWS_CA_BUNDLE")
    if isinstance(error, _UNANSWERED):
        return _no_answer(error, action, requests)
    if isinstance(error, boto.BotoCoreError):
        # Profiles, role and token services: their sentences may hold what a helper program printed.
        what = f"the AWS configuration gives no credentials ({type(error).__name__})"
        return _denied(action, what, "check AWS_PROFILE and the AWS config, or log in again")
    if isinstance(error, ValueError) and str(error).startswith("Invalid endpoint"):
        return _denied(action, "AWS_ENDPOINT_URL is no address", "say http://HOST:PORT or https://HOST")
    return Verdict(error)


def _of_answer(error: boto.ClientError, action: Action, requests: int) -> Verdict:
    answer: Any = error.response
    body, meta = answer.get("Error", {}), answer.get("ResponseMetadata", {})
    status = int(meta.get("HTTPStatusCode") or 0)
    code = str(body.get("Code") or status)
    facts = {"server": action.server, "bucket": action.bucket}
    if code in _SIMPLE:
        what, remedy = _SIMPLE[code]
        return _denied(action, f"{what.format(**facts)} ({status} {code})", remedy)
    if code in EXPIRED:
        return Verdict(_stopped(action, f"the credentials have expired ({code})", "renew them"), expired=True)
    if code in _FULL or status == 507 or "no space left" in str(body.get("Message", "")).lower():
        return Verdict(
            StorageFullError(
                f"no space left while writing {action.uri} ({status} {code} from {action.server}); the job stopped: "
                "free space or raise the quota, then run it again"
            )
        )
    if code in _REGION:
        headers = meta.get("HTTPHeaders", {})
        return another_region(
            action, headers.get("x-amz-bucket-region") or body.get("Region") or "", f"{status} {code}"
        )
    if code == "NoSuchKey":
        return Verdict(FileNotFoundError(errno.ENOENT, "there is no such object", action.uri))
    if status == 412 or code == "PreconditionFailed":
        return Verdict(FileExistsError(errno.EEXIST, "there is such an object", action.uri))
    if status == 416:
        return Verdict(OSError(errno.EINVAL, "the range is not satisfiable", action.uri))
    if status == 501 or code == "NotImplemented":
        return Verdict(OSError(errno.ENOSYS, "the storage does not know this request", action.uri))
    if status in {401, 403}:
        permission = _PERMISSIONS.get(action.method, "s3:PutObject")
        remedy = f"grant {permission} on {action.uri}"
        if action.unsigned:
            remedy += " to everybody, or unset AWS_NO_SIGN_REQUEST to sign with credentials"
        return _denied(action, f"access is denied ({status} {code})", remedy)
    # A bare 404 may have lost the words that it is the bucket that is missing.
    passing = status >= 500 or code in _PASSING or code == "404"
    error_ = unavailable(action, f"{action.server} answered {status} {code}", requests)
    return Verdict(error_, passing=passing)


def another_region(action: Action, found: str, answer: str) -> Verdict:
    """Return what to raise where a bucket lies in another region, `found` where the server named it."""
    where = f"region {found}" if found else "another region"
    remedy = f"set AWS_DEFAULT_REGION={found}" if found else "set AWS_DEFAULT_REGION to its region"
    what = f"bucket {action.bucket!r} lies in {where}, requests go to {action.region or 'no region'} ({answer})"
    return _denied(action, what, remedy)


def unavailable(action: Action, what: str, requests: int) -> StorageUnavailableError:
    """Return the error of a storage that gave no usable answer to any of the `requests`."""
    return StorageUnavailableError(
        f"{action.uri} cannot be {action.verb}: {what} ({requests} request{'s' * (requests > 1)}); the storage may be "
        "overloaded: try again, or send less with fewer workers or VOLSEG_S3_RATE"
    )


def _no_answer(error: Exception, action: Action, requests: int) -> Verdict:
    if isinstance(error, ShortBodyError | boto.IncompleteReadError | aiohttp.ClientPayloadError):
        return Verdict(unavailable(action, f"{action.server} sent too few bytes", requests), passing=True)
    if isinstance(error, boto.EndpointConnectionError | boto.ConnectTimeoutError | aiohttp.ClientConnectorError):
        gone = StorageUnavailableError(
            f"{action.uri} cannot be {action.verb}: {action.server} cannot be reached ({type(error).__name__}, "
            f"{requests} request{'s' * (requests > 1)}); stopped: check AWS_ENDPOINT_URL and the network, then run it "
            "again"
        )
        return Verdict(gone, passing=True)
    return Verdict(
        unavailable(action, f"no whole answer from {action.server} ({type(error).__name__})", requests), True
    )


def _denied(action: Action, what: str, remedy: str) -> Verdict:
    return Verdict(_stopped(action, what, remedy))


def _stopped(action: Action, what: str, remedy: str) -> StorageDeniedError:
    return StorageDeniedError(f"{action.uri} cannot be {action.verb}: {what}; stopped: {remedy}, then run it again")
