"""A complete store made immutable and published: small files, then manifest, then one rename (the seal point)."""

from __future__ import annotations

import contextlib
import os
from typing import Any

from actstore import durable
from actstore.digests import canonical_json, sha256_bytes
from actstore.errors import StorageFailed
from actstore.key import dump_key
from actstore.layout import GROUP_METADATA, GROUPS, KEY, MANIFEST, PLAN, SPOOL, VOCABULARY, metadata_name
from actstore.manifest import Digests, Manifest, dump_record, seal_manifest
from actstore.stats import Moments
from actstore.writer import READ_ONLY, StoreWriter, read_groups
from actstore.zarr_array import array_metadata, group_attributes


def small_files(manifest: Manifest, moments: Moments, vocabulary: dict[str, Any]) -> dict[str, bytes]:
    """Return the files of a sealed store beside its chunks, records and manifest: key, vocabulary, Zarr metadata, table.

    Args:
        manifest: gives key, rows, width and content digest; its `files` are not looked at.
        moments: of all rows.
        vocabulary: {"tokens": text of each id, "special": ids}.
    """
    attributes = group_attributes(manifest.key, manifest.content_digest, moments)
    zarr_files = array_metadata(manifest.rows, manifest.d_model, manifest.key.dtype, manifest.group_rows, attributes)
    table = {GROUPS: manifest.groups.table} if isinstance(manifest.groups, Digests) else {}
    return {KEY: dump_key(manifest.key), VOCABULARY: canonical_json(vocabulary), **zarr_files, **table}


def seal(writer: StoreWriter, vocabulary: dict[str, Any], provenance: dict[str, Any]) -> Manifest:
    """Seal a complete store and publish it under its digest. From here on nothing in the folder changes.

    Args:
        writer: the open store, no row group missing.
        vocabulary: {"tokens": text of each id, "special": ids}.
        provenance: versions, device, threads, seconds.

    Raises: DiskFull, StorageFailed: the store stays unsealed; the same command seals it.
    """
    groups, moments = read_groups(writer)
    if len(groups) < writer.n_groups:
        raise StorageFailed(
            f"row group {len(groups)} was committed, and is damaged or gone", str(writer.paths.staging), "run the command again"
        )
    manifest = seal_manifest(writer.key, writer.rows, writer.d_model, groups, {}, moments, provenance)
    files = small_files(manifest, moments, vocabulary)
    manifest = manifest.model_copy(update={"files": {name: sha256_bytes(data) for name, data in files.items()}})
    publish(writer, files, dump_record(manifest))
    return manifest


def publish(writer: StoreWriter, files: dict[str, bytes], manifest: bytes) -> None:
    """Write the small files and the manifest of a complete store, and rename it to its place: the seal point.

    Args:
        writer: the open store, every chunk and record in place.
        files: the small files by name.
        manifest: the manifest's bytes.

    Raises: DiskFull, StorageFailed: the store stays unsealed.
    """
    staging = writer.paths.staging
    for folder in (*writer.arrays, "row_groups"):
        durable.sync_folder(staging / folder)  # a record may be of a process that died between its rename and its sync
    tables = [GROUPS] if GROUPS in files else []
    for name in (KEY, VOCABULARY, *tables, *(metadata_name(a) for a in writer.arrays), GROUP_METADATA):
        durable.remove_tree(staging / name)  # of a seal that was interrupted, perhaps by another version of zarr
        durable.write_new(staging, name, [files[name]], mode=READ_ONLY)
    durable.remove_tree(staging / MANIFEST)
    for name in (PLAN, SPOOL):
        durable.remove_tree(staging / name)
    durable.write_new(staging, MANIFEST, [manifest], mode=READ_ONLY)
    durable.remove_tree(staging / "tmp")
    durable.sync_folder(staging)  # else a power loss may keep the rename and bring temporary files back into a sealed store
    durable.rename_dir(staging, writer.paths.sealed)


def seal_once(writer: StoreWriter, vocabulary: dict[str, Any], provenance: dict[str, Any]) -> None:
    """Seal a complete store unless another process has just done so; see `seal`.

    Raises: DiskFull, StorageFailed.
    """
    with durable.lock(writer.paths.claim(None), f"pid {os.getpid()}", wait=True):
        if not writer.is_sealed():
            seal(writer, vocabulary, provenance)
            with contextlib.suppress(StorageFailed):  # another worker looks whether there is work left; gc sweeps the rest
                durable.remove_tree(writer.paths.claims)
