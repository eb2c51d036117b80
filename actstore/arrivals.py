"""What arrives from a bucket, checked before anything is done with it: manifest, small files, records, chunks."""

from __future__ import annotations

from actstore.bucket import Bucket, list_folders, list_objects, read_object
from actstore.catalog import Listed, unique_digest
from actstore.digests import DIGEST, check_prefix, sha256_bytes
from actstore.errors import FormatError, StoreDamaged, StoreNotFound, StoreNotSealed
from actstore.layout import GROUPS, MANIFEST, chunk_name, record_name
from actstore.limits import MAX_MANIFEST_BYTES, MAX_RECORD_BYTES, MAX_TABLE_BYTES
from actstore.manifest import Manifest, RowGroup
from actstore.reader import Store
from actstore.sealed import check_manifest, check_record, check_small_bytes, small_file_limit
from actstore.stats import Moments
from actstore.zarr_array import chunk_bytes


def find_remote(bucket: Bucket, prefix: str) -> str:
    """Return the digest of the only store in a bucket that begins with `prefix`, sealed or not.

    Raises: UsageError: not a prefix, or several stores begin with it. StoreNotFound: none does. StorageFailed.
    """
    if DIGEST.fullmatch(check_prefix(prefix)):
        return prefix
    there = [name for name in list_folders(bucket) if DIGEST.fullmatch(name)]
    return unique_digest(there, prefix, "store", bucket.url, f"`actstore ls {bucket.url}` lists the stores")


def list_remote(bucket: Bucket) -> list[Listed]:
    """Return every store of a bucket, those without a manifest as unsealed; damage makes a line with a problem.

    Raises: StorageFailed, StoreNotFound.
    """
    listed = []
    for digest in filter(DIGEST.fullmatch, list_folders(bucket)):
        try:
            manifest, _, _ = remote_manifest(bucket, digest)
            listed.append(Listed(digest, True, manifest.key, manifest))
        except StoreNotSealed:
            groups = sum(1 for name, _ in list_objects(bucket, f"{digest}/row_groups"))
            listed.append(Listed(digest, False, committed=groups, how_far=f"{groups} row groups are there"))
        except FormatError as error:
            listed.append(Listed(digest, True, problem=error.what))
    return listed


def remote_manifest(bucket: Bucket, digest: str) -> tuple[Manifest, Moments, bytes]:
    """Return the manifest of a store in a bucket, checked, the moments of its rows, and its bytes.

    Raises: StoreNotFound: nothing is there. StoreNotSealed: no manifest. FormatError: damaged, or of another store.
        StorageFailed.
    """
    where = f"{bucket.url}/{digest}/{MANIFEST}"
    try:
        data = bytes(read_object(bucket, f"{digest}/{MANIFEST}", MAX_MANIFEST_BYTES))
    except FileNotFoundError:
        if not any(True for _ in list_objects(bucket, digest)):
            raise StoreNotFound(
                f"no store {digest[:12]} is there", bucket.url, f"`actstore ls {bucket.url}` lists the stores"
            ) from None
        raise StoreNotSealed(
            "the store has no manifest: its push or capture is under way, or stopped half-way", where, "run that command again"
        ) from None
    return *check_manifest(data, digest, where, lambda size: _table(bucket, digest, size)), data


def _table(bucket: Bucket, digest: str, size: int) -> bytes:
    """Return the table of row groups of a large store; what is in it, its manifest's digest decides."""
    where = f"{bucket.url}/{digest}/{GROUPS}"
    if size > MAX_TABLE_BYTES:
        raise FormatError(f"{GROUPS} must have {size} bytes, at most {MAX_TABLE_BYTES} are allowed", where)
    try:
        return bytes(read_object(bucket, f"{digest}/{GROUPS}", size))
    except FileNotFoundError:
        raise FormatError(f"{GROUPS}, which lists the row groups, is missing", where) from None


def remote_small_file(bucket: Bucket, name: str, manifest: Manifest, moments: Moments) -> bytes:
    """Return a small file of a store in a bucket, which is what its manifest implies. Raises: as `check_small_file`."""
    where = f"{bucket.url}/{manifest.store}/{name}"
    try:
        data = bytes(read_object(bucket, f"{manifest.store}/{name}", small_file_limit(name)))
    except FileNotFoundError:
        raise _damaged(f"object {name} is missing", where) from None
    check_small_bytes(name, data, manifest, moments, where)
    return data


def remote_record(bucket: Bucket, store: Store, group: int) -> tuple[RowGroup, bytes]:
    """Return a commit record that is the one the manifest names, and its bytes.

    Raises: StoreDamaged: missing or another one. FormatError: over the limit. StorageFailed.
    """
    name = record_name(group)
    try:
        data = bytes(read_object(bucket, f"{store.digest}/{name}", MAX_RECORD_BYTES))
        return check_record(data, group, store.manifest), data
    except (FileNotFoundError, StoreDamaged) as error:
        what = error.what if isinstance(error, StoreDamaged) else f"record {name} is missing"
        raise _damaged(what, f"{bucket.url}/{store.digest}/{name}") from None


def remote_chunk(bucket: Bucket, store: Store, record: RowGroup, array: str) -> memoryview:
    """Return the bytes of a chunk, of the right size and with the SHA-256 of its record.

    Raises: StoreDamaged: missing, of another size or with another digest. FormatError: over the limit. StorageFailed.
    """
    name, manifest = chunk_name(array, record.index), store.manifest
    where = f"{bucket.url}/{store.digest}/{name}"
    limit = chunk_bytes("acts", manifest.group_rows, store.d_model, "float32")  # no array of the row group is larger
    try:
        data = read_object(bucket, f"{store.digest}/{name}", limit)
    except FileNotFoundError:
        raise _damaged(f"chunk {name} is missing", where) from None
    if problem := store.size_problem(array, record.index, len(data)):
        raise _damaged(f"chunk {name} {problem}", where)
    found, wanted = sha256_bytes(data), record.chunks[array].sha256  # type: ignore[index]
    if found != wanted:
        raise _damaged(f"chunk {name} has digest {found[:12]}…, its record says {wanted[:12]}…", where)
    return data


def _damaged(what: str, where: str) -> StoreDamaged:
    return StoreDamaged(what, where, "delete this object and `actstore push` the store again from where it is whole")
