"""An object store as a folder of objects: bounded reads, whole writes, and every failure one of our errors.

Credentials come from the environment (or the profile that AWS_PROFILE names) and go into obstore alone. What a server
answers may repeat them, so of its text only the HTTP status and the error code ever reach a message. obstore tries
again by itself after 5xx, 429 and cut connections, and goes on with a half-read object where it was cut.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from actstore.errors import ActstoreError, FormatError, StorageFailed, StoreNotFound, UsageError

RETRIES = 8  # about 15 s of waiting in all
REQUEST_SECONDS = 300  # a row group of 32 MiB at 1 Mbit/s
URL = re.compile(r"(?:s3|gs|az)://[A-Za-z0-9][A-Za-z0-9._-]{1,62}(?:/(?!\.{1,2}(?:/|$))[A-Za-z0-9._=+-]+)*")
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
SKEWED = {"RequestTimeTooSkewed", "RequestExpired", "RequestInTheFuture"}
AGAIN = "run the same command again: what has arrived is kept"


@dataclass(frozen=True, slots=True)
class Bucket:
    """A place below which stores lie. Make one with `open_bucket`.

    Args:
        url: scheme, bucket and prefix; it holds no credentials.
    """

    url: str
    _store: Any = field(repr=False)


def open_bucket(url: str, make: bool = False, retries: int = RETRIES) -> Bucket:
    """Return the bucket and prefix that a URL names; nothing is asked of the server yet.

    Args:
        url: s3://BUCKET/PREFIX, gs://…, az://CONTAINER/PREFIX or file:///FOLDER.
        make: make a file:// folder that is missing.
        retries: of each request, with growing pauses.

    Raises: UsageError: another URL, one with credentials, an endpoint without encryption, or obstore is not installed.
        StoreNotFound: no such folder.

    Example:
        >>> open_bucket("s3://user:secret@bucket/x")
        Traceback (most recent call last):
        ...
        actstore.errors.UsageError: this is no URL of an object store, or it carries credentials
          do: give s3://BUCKET/PREFIX, gs://…, az://… or file:///FOLDER; credentials belong into the environment or a profile
    """
    url = url.rstrip("/")
    folder = Path(url.removeprefix("file://")) if url.startswith("file:///") else None
    if folder is None and not URL.fullmatch(url):  # the URL is not repeated: it may hold a password
        if "://" not in url and not url.startswith(("s3:", "gs:", "az:")):
            raise UsageError("this is a path, not a URL", url, f"write file://{Path(url).absolute()}")
        raise UsageError(
            "this is no URL of an object store, or it carries credentials",
            do="give s3://BUCKET/PREFIX, gs://…, az://… or file:///FOLDER; credentials belong into the environment or a profile",
        )
    try:
        from obstore import store
        from obstore.exceptions import BaseError
    except ImportError as error:
        raise UsageError("object stores need the package obstore", do="pip install 'actstore[s3]'") from error
    if folder is not None:
        if not make and not folder.is_dir():
            raise StoreNotFound("no such folder", url, "`actstore push HASH URL` makes it")
        with _named(url, ""):
            return Bucket(url, store.LocalStore(folder, mkdir=make))
    client = {"timeout": timedelta(seconds=REQUEST_SECONDS), "connect_timeout": timedelta(seconds=10)}
    pauses = {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=5)}
    options: dict[str, Any] = {"client_options": client, "retry_config": {"max_retries": retries, "backoff": pauses}}
    if url.startswith("s3:"):
        client["allow_http"] = _plain_http_is_fine()  # type: ignore[assignment]
        options |= _profile()
    try:
        return Bucket(url, store.from_url(url, **options))
    except (BaseError, ValueError) as error:
        raise _failure(error, url) from None


def _plain_http_is_fine() -> bool:
    """Return whether the endpoint in the environment may be spoken to without TLS: it is this machine, or so said."""
    endpoint = urlsplit(next((os.environ[name] for name in ENDPOINTS if os.environ.get(name)), ""))
    if "@" in endpoint.netloc:
        raise UsageError("the endpoint's URL carries credentials", "AWS_ENDPOINT_URL", "put them into AWS_ACCESS_KEY_ID and …")
    allowed = os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true") or endpoint.hostname in (
        "127.0.0.1", "::1", "localhost",
    )  # fmt: skip
    if endpoint.scheme == "http" and not allowed:
        raise UsageError("the endpoint has no encryption", "AWS_ENDPOINT_URL", "use https://, or set AWS_ALLOW_HTTP=true")
    return allowed


def _profile() -> dict[str, Any]:
    """Return the credentials of the profile in AWS_PROFILE, as obstore takes them; boto3 knows how to read profiles."""
    if not os.environ.get("AWS_PROFILE"):
        return {}
    try:
        from botocore.exceptions import BotoCoreError
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError as error:
        raise UsageError("a profile needs the package boto3", "AWS_PROFILE", "pip install boto3") from error
    try:
        return {"credential_provider": Boto3CredentialProvider()}
    except (BotoCoreError, ValueError):
        raise UsageError("the profile gives no credentials", "AWS_PROFILE", "`aws configure list` shows what it has") from None


@contextlib.contextmanager
def _named(url: str, name: str) -> Iterator[None]:
    """Turn what obstore raises into our errors, FileNotFoundError or FileExistsError; its own text goes no further."""
    from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError

    try:
        yield
    except (AlreadyExistsError, PreconditionError):  # the latter is what Azure may say
        raise FileExistsError(name) from None
    except (BaseError, OSError, ValueError) as error:
        if "NoSuchBucket" in str(error):
            raise StoreNotFound("no such bucket", url) from None
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(name) from None
        raise _failure(error, f"{url}/{name}") from None


def _failure(error: Exception, where: str) -> ActstoreError:
    """Return our error for one of obstore's, told from the status and the error code in its text."""
    text = str(error)
    status, code = re.search(r"status code: (\d{3})", text), re.search(r"<Code>(\w{1,64})</Code>", text)
    said = ", ".join([f"HTTP {m[1]}" for m in (status,) if m] + [m[1] for m in (code,) if m]) or type(error).__name__
    if code and code[1] in SKEWED:
        do = "set this machine's clock: signed requests carry the time"
        return StorageFailed(f"this machine's clock differs too much from the object store's ({said})", where, do)
    if "169.254.169.254" in text or "metadata.google" in text:
        return StorageFailed("no credentials were found", where, "set AWS_ACCESS_KEY_ID and …, or AWS_PROFILE (docs/remote.md)")
    if type(error).__name__ in ("PermissionDeniedError", "UnauthenticatedError"):
        return StorageFailed(f"the object store refused the request ({said})", where, "check the credentials and their rights")
    return StorageFailed(f"the object store failed, also when asked again ({said})", where, AGAIN)


def read_object(bucket: Bucket, name: str, limit_bytes: int) -> memoryview:
    """Return the bytes of an object, its size checked before they are read.

    Raises: FileNotFoundError. FormatError: over the limit. StorageFailed, StoreNotFound.
    """
    import obstore

    with _named(bucket.url, name):
        found = obstore.get(bucket._store, name)
        if found.meta["size"] <= limit_bytes:
            return memoryview(found.bytes())
    raise FormatError(f"{found.meta['size']} bytes, at most {limit_bytes} are allowed", f"{bucket.url}/{name}")


def write_object(bucket: Bucket, name: str, data: bytes | memoryview, create: bool = False) -> None:
    """Write a whole object: readers see it complete or not at all.

    Raises: FileExistsError: it is there, and `create` was asked for. StorageFailed, StoreNotFound.
    """
    import obstore

    with _named(bucket.url, name):
        obstore.put(bucket._store, name, data, mode="create" if create else "overwrite", use_multipart=False)


def create_object(bucket: Bucket, name: str, data: bytes, limit_bytes: int) -> bytes:
    """Create an object unless it is there; return the bytes that it has then: `data`, or those of whoever came first.

    That it is there is believed once it was read: our own request may have succeeded and its answer been lost, and S3's
    409 for two requests at once arrives as "it is there" too (https://github.com/apache/arrow-rs-object-store/pull/852).

    Raises: FormatError: what is there is over the limit. StorageFailed, StoreNotFound.
    """
    for _ in range(RETRIES):
        with contextlib.suppress(FileNotFoundError):
            try:
                write_object(bucket, name, data, create=True)
                return data
            except FileExistsError:
                return bytes(read_object(bucket, name, limit_bytes))
    raise StorageFailed("the object can neither be created nor read", f"{bucket.url}/{name}", AGAIN)


def copy_object(bucket: Bucket, name: str, target: str) -> None:
    """Copy an object within the bucket, by the server. Raises: FileNotFoundError. StorageFailed, StoreNotFound."""
    import obstore

    with _named(bucket.url, name):
        obstore.copy(bucket._store, name, target)


def delete_objects(bucket: Bucket, names: list[str]) -> None:
    """Delete objects; those that are not there are no matter. Raises: StorageFailed, StoreNotFound."""
    import obstore

    with contextlib.suppress(FileNotFoundError), _named(bucket.url, names[0] if names else ""):
        obstore.delete(bucket._store, names)


def object_exists(bucket: Bucket, name: str) -> bool:
    """Return whether an object is there. Raises: StorageFailed."""
    import obstore

    with contextlib.suppress(FileNotFoundError), _named(bucket.url, name):
        obstore.head(bucket._store, name)
        return True
    return False


def list_objects(bucket: Bucket, folder: str) -> Iterator[tuple[str, int]]:
    """Yield (name below the folder, bytes) of each object below a folder. Raises: StorageFailed, StoreNotFound."""
    import obstore

    with _named(bucket.url, folder):
        for batch in obstore.list(bucket._store, folder, chunk_size=1000):
            for found in batch:
                yield found["path"].removeprefix(folder + "/"), found["size"]


def list_folders(bucket: Bucket) -> list[str]:
    """Return the names directly below the bucket's prefix that have objects below them, sorted."""
    import obstore

    with _named(bucket.url, ""):
        found = obstore.list_with_delimiter(bucket._store)["common_prefixes"]
    return sorted(path.rstrip("/").rpartition("/")[2] for path in found)
