"""Whether places can be used, found out before any work; what is learnt here would otherwise stop a job half way.

On S3, a read of an absent key must answer 404: a user who may not list a bucket gets 403 for what is absent as for what
is forbidden, and then nobody could tell a hole from a refusal. What is to be written is tried with an object that is
removed again.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from volseg.errors import InputError, PlaceError, StorageDeniedError, StorageFullError, StorageUnavailableError
from volseg.storage import files
from volseg.storage.ledger import ledger_root

_AMAZON = ".amazonaws.com"


def check_places(reads: Sequence[str] = (), writes: Sequence[str] = ()) -> None:
    """Check that what is to be read can be told from what is missing, and that what is to be written can be.

    Each is a prefix below which things lie or shall lie: for a segmentation `writes` are the output and its ledger. For
    places on S3; others are left to those who open them. Whether something lies there is not checked. Raises
    PlaceError, in one line with what was tried, what S3 answered and what to do.
    """
    for uri in dict.fromkeys([*reads, *writes]):
        if files.is_s3(uri):
            _check_name(uri)
            with _nothing_was_done():
                _check_absent(files.absolute(uri))
                _check_region(files.absolute(uri))
    for uri in writes:
        if files.is_s3(uri):
            with _nothing_was_done():
                _check_writable(files.absolute(uri))


def check_apart(output: str, inputs: Mapping[str, str]) -> None:
    """Raise InputError where the output, or its ledger, lies in an input or the other way round; by their names."""
    mine = files.absolute(output)
    for name, uri in inputs.items():
        other = files.absolute(uri)
        if any(
            f"{a}/".startswith(f"{b}/")
            for place in (mine, ledger_root(mine))
            for a, b in ((place, other), (other, place))
        ):
            raise InputError(
                f"output {mine} and {name} {other} overlap: writing would destroy what is read; choose another output"
            )


@contextmanager
def _nothing_was_done() -> Iterator[None]:
    try:
        yield
    except (StorageDeniedError, StorageFullError, StorageUnavailableError) as error:
        raise PlaceError(f"{error} (nothing was done)") from error


def _check_name(uri: str) -> None:
    if not files.remote_path(uri).partition("/")[2]:
        raise PlaceError(
            f"{uri} names a bucket, a place is a name inside one, since what is there may be replaced as a whole; "
            "nothing was done: say s3://BUCKET/NAME"
        )


def _check_region(uri: str) -> None:
    from volseg.storage import s3
    from volseg.storage.s3_errors import Action, another_region

    fs = s3.filesystem()
    bucket, _, key = files.remote_path(uri).partition("/")
    answer: Any = fs.call("list_objects_v2", Bucket=bucket, Prefix=f"{key}/", MaxKeys=1)
    found = answer["ResponseMetadata"]["HTTPHeaders"].get("x-amz-bucket-region")
    endpoint, region = str(fs.s3.meta.endpoint_url), str(fs.s3.meta.region_name)
    # Amazon's client follows a bucket to its region, at a request more each time; other servers name any region.
    if found and _AMAZON in endpoint and found != region:
        raise another_region(Action("list_objects_v2", bucket, key, endpoint, region), found, "200").error


def _check_absent(uri: str) -> None:
    probe = files.join(uri, f".volseg-absent-{uuid.uuid4().hex}")
    try:
        found = files.size(probe)
    except StorageDeniedError as error:
        if "access is denied" not in str(error):
            raise
        bucket = files.remote_path(uri).partition("/")[0]
        raise PlaceError(
            f"{probe} is absent, but S3 answers that access is denied: what is missing in {uri} cannot be told from "
            "what is forbidden, and a hole would not be noticed; nothing was done: grant s3:ListBucket on "
            f"s3://{bucket} and s3:GetObject on {uri}/*"
        ) from error
    if found is not None:
        raise PlaceError(f"{uri} answers for {probe}, which nobody wrote: it is no S3 storage; nothing was done")


def _check_writable(uri: str) -> None:
    content = uuid.uuid4().hex.encode()
    probe = files.join(uri, f".volseg-probe-{uuid.uuid4().hex}")
    files.write_bytes(probe, content)
    try:
        read = files.read_bytes(probe)
    finally:
        files.remove(probe)
    if read != content:
        raise PlaceError(
            f"{probe} was written with {len(content)} bytes and read back as {len(read)} others: the storage cannot be "
            "trusted; nothing was done: choose another"
        )
