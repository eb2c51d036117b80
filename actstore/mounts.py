"""Which file system a folder lies on: locks and atomic renames are promised on local ones only."""

from __future__ import annotations

from pathlib import Path

MOUNTINFO = Path("/proc/self/mountinfo")
NETWORK = {
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "virtiofs", "afs", "ceph", "lustre", "gpfs", "beegfs", "orangefs", "glusterfs",
    "ncpfs", "coda", "pvfs2", "ocfs2", "gfs2", "daos", "weka", "wekafs", "panfs", "fuse.sshfs", "fuse.rclone", "fuse.s3fs",
    "fuse.gcsfuse", "fuse.goofys", "fuse.glusterfs", "fuse.ceph", "fuse.juicefs", "fuse.mount-s3", "fuse.blobfuse2",
}  # fmt: skip


def network_filesystem(folder: Path, mountinfo: Path = MOUNTINFO) -> str:
    """Return the type of the network file system that a folder lies on, or "" when it lies on a local one.

    Args:
        folder: existing or not; a missing one will lie where its nearest parent does.
        mountinfo: the kernel's list of mounts; absent outside Linux, where nothing is known.

    Source: proc_pid_mountinfo(5): field 5 is the mount point, the field behind " - " the type.

    Example:
        >>> network_filesystem(Path("/proc"))
        ''
    """
    try:
        lines = mountinfo.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return ""
    place, best = folder.resolve(), (-1, "")
    for line in lines:
        mount, _, rest = line.partition(" - ")
        fields = mount.split(" ")
        if len(fields) < 5 or not rest:
            continue
        for escaped, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
            fields[4] = fields[4].replace(escaped, character)
        if place.is_relative_to(fields[4]) and len(fields[4]) >= best[0]:  # a later mount hides an earlier one
            best = len(fields[4]), rest.split(" ")[0]
    return best[1] if best[1] in NETWORK else ""
