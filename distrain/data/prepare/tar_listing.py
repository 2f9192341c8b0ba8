"""List the files of a tar archive that may be images or labels, and leave out junk."""

from collections.abc import Collection
from pathlib import PurePosixPath
from typing import NamedTuple

from distrain.data.prepare.image_folder import has_image_extension
from distrain.data.prepare.junk import is_junk
from distrain.data.prepare.source import Reject
from distrain.data.prepare.tar_members import (
    LABEL_EXTENSIONS,
    TarMember,
    get_extension,
    iter_members,
)
from distrain.data.storage.store import Store

# Folder of extended headers, from a tar that did not know them and unpacked them.
_PAX_HEADER_FOLDER = "PaxHeader"


class MemberList(NamedTuple):
    """Files of an archive that may be images or labels, and what is left out."""

    files: list[TarMember]
    rejects: list[Reject]


def list_members(
    store: Store, path: str, inner_archive: TarMember | None = None
) -> MemberList:
    """List the files of an archive that may be images or labels, in their order.

    Junk is passed over: hidden files, AppleDouble files of macOS, extended headers. Of
    several members of one name, which `tar -r` and `tar -u` append, the last one
    counts, as it does when the archive is unpacked.

    Args:
        store: where the archive is.
        path: the archive.
        inner_archive: list this archive inside it.

    Raises:
        OSError: the archive cannot be read.
        UserError: it is not a tar archive, is compressed, or is damaged.
    """
    # Walk all headers.
    location = path
    start = 0
    end = None
    if inner_archive is not None:
        location = f"{path}/{inner_archive.name}"
        start = inner_archive.start
        end = start + inner_archive.num_bytes
    member_by_name: dict[str, TarMember | Reject] = {}
    rejects: list[Reject] = []
    for member in iter_members(store, path, start, end):
        name = normalize_name(member.name)
        if name in member_by_name and not _is_junk_member(name):
            reason = "replaced by a later member of the same name"
            rejects.append(Reject(f"{location}/{member.name}", reason))
        member_by_name[name] = member

    # The folders in which all members lie may be hidden: they came with the archive.
    common = find_common_folder(member_by_name)
    files: list[TarMember] = []
    for name, member in member_by_name.items():
        if _is_junk_member(name.removeprefix(common)):
            continue
        if isinstance(member, Reject):
            rejects.append(Reject(f"{location}/{member.name}", member.reason))
        else:
            files.append(member)
    return MemberList(files, rejects)


def normalize_name(name: str) -> str:
    """Return one spelling of a name: ./cat.jpg and cat.jpg are one file."""
    is_normal = not name.startswith("./") and "//" not in name and "/./" not in name
    return name if is_normal else str(PurePosixPath(name))


def _is_junk_member(name: str) -> bool:
    if is_junk(name):
        return True
    folders = name.split("/")[:-1] if _PAX_HEADER_FOLDER in name else []
    return any(folder.startswith(_PAX_HEADER_FOLDER) for folder in folders)


def find_common_folder(names: Collection[str]) -> str:
    """Return the folders in which all names lie, with a slash at the end, or ""."""
    # Names between the first and the last one share what these two share.
    common = ""
    first_folders = min(names, default="").split("/")[:-1]
    last_folders = max(names, default="").split("/")[:-1]
    for first, last in zip(first_folders, last_folders, strict=False):
        if first != last:
            break
        common += f"{first}/"
    return common


def holds_archives(store: Store, path: str) -> bool:
    """Return whether the first image, label or archive in an archive is an archive.

    Raises OSError and UserError.
    """
    for member in iter_members(store, path):
        if isinstance(member, Reject) or _is_junk_member(member.name):
            continue
        if member.name.endswith(".tar"):
            return True
        is_label = get_extension(member.name) in LABEL_EXTENSIONS
        if is_label or has_image_extension(member.name):
            return False
    return False
