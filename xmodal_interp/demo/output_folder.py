"""Write the demo's files into a folder without overwriting a user's files.

1. The demo lists the files that it wrote, with checksums, in ``.xmodal-demo``.
2. A later demo writes to a hidden folder. At the end it removes the listed files that are unchanged
   and moves the new files to their final paths. All other files stay.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from xmodal_interp.errors import InputError, first_of
from xmodal_interp.store import store_around

FILE_LIST, _STAGING = ".xmodal-demo", ".writing-demo"
_MADE_BY = "xmodal demo"


@contextmanager
def staging_folder(folder: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a hidden folder for the demo's files; after the block they are moved to ``folder``.

    Args:
        folder: Final folder: new, empty, or of an earlier demo, whose files are replaced.
        force: Overwrite files that the earlier demo did not write, or that were changed since.

    Raises:
        InputError: The folder holds such files and ``force`` is False, is inside a store, or has
            symbolic links at paths of the demo's files. Raised before the block if the folder
            alone shows the problem, else after it.
    """
    earlier = _earlier(folder, force=force)
    hidden, is_new = folder / _STAGING, not folder.exists()
    _remove_staging(hidden)
    hidden.mkdir(parents=True)
    try:
        yield hidden
        _place(hidden, folder, earlier, force=force)
    finally:
        _remove_staging(hidden)
        if is_new and not any(folder.iterdir()):
            folder.rmdir()


def _earlier(folder: Path, *, force: bool) -> dict[str, str]:
    """Return the files that an earlier demo wrote, and their checksums."""
    around = store_around(folder / FILE_LIST)
    if around is not None:
        raise InputError(
            f"{str(folder)!r} belongs to the store {str(around)!r}, where the demo must not be "
            "written. Choose another folder."
        )
    inside = [each.name for each in folder.iterdir()] if folder.exists() else []
    if not {*inside} - {_STAGING}:
        return {}
    made = _listed(folder / FILE_LIST)
    if made is None:
        if force:
            return {}
        raise InputError(
            f"{str(folder)!r} contains files that the demo did not write. Choose a new or empty "
            "folder (xmodal demo FOLDER), or pass --force to overwrite files of the same names."
        )
    changed = sorted(n for n, digest in made.items() if _digest(folder / n) not in (digest, ""))
    if changed and not force:
        raise InputError(
            f"Files of an earlier demo in {str(folder)!r} have changed: {first_of(changed)}. "
            "Choose another folder, or pass --force to overwrite them."
        )
    return made


def _listed(path: Path) -> dict[str, str] | None:
    """Return the file list of an earlier demo, or None if it does not exist or is damaged."""
    try:
        listed = json.loads(path.read_text("utf-8"))
        files = dict(listed["files"]) if listed["made_by"] == _MADE_BY else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    valid = files is not None and all(
        isinstance(digest, str) and not Path(name).is_absolute() and ".." not in Path(name).parts
        for name, digest in files.items()
    )
    return files if valid else None


def _place(hidden: Path, folder: Path, earlier: dict[str, str], *, force: bool) -> None:
    """Move the new files to their final paths, and remove those of an earlier demo."""
    made = {
        path.relative_to(hidden).as_posix(): _digest(path)
        for path in sorted(hidden.rglob("*"))
        if path.is_file()
    }
    blocked = sorted(name for name in made if _is_blocked(folder, name))
    if blocked:
        raise InputError(
            f"{str(folder)!r} has symbolic links or folders at the paths of {first_of(blocked)}. "
            "Choose another folder."
        )
    theirs = sorted(n for n in made if n not in earlier and (folder / n).exists())
    if theirs and not force:
        raise InputError(
            f"{str(folder)!r} contains files that the demo did not write, at the paths of "
            f"{first_of(theirs)}. Choose another folder, or pass --force to overwrite them."
        )
    _write_file_list(
        folder, {**earlier, **made}
    )  # a demo that is interrupted here can be run again
    for name, digest in earlier.items():
        if _digest(folder / name) == digest and not _is_blocked(folder, name):
            (folder / name).unlink()
    for name in made:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (hidden / name).replace(folder / name)
    folders = {parent for name in earlier for parent in Path(name).parents if parent.name}
    for empty in sorted(folders, key=lambda path: -len(path.parts)):
        inside = folder / empty
        if inside.is_dir() and not inside.is_symlink() and not any(inside.iterdir()):
            inside.rmdir()
    _write_file_list(folder, made)


def _write_file_list(folder: Path, made: dict[str, str]) -> None:
    text = json.dumps({"made_by": _MADE_BY, "files": made}, indent=1)
    hidden = folder / _STAGING / FILE_LIST
    hidden.write_text(f"{text}\n", "utf-8")
    hidden.replace(folder / FILE_LIST)


def _is_blocked(folder: Path, name: str) -> bool:
    """Return whether a file cannot be written to this path.

    The path is a folder, one of its parents is not, or one of them is a symbolic link.
    """
    folders = [folder / parent for parent in Path(name).parents if parent.name]
    wrong = any(each.exists() and not each.is_dir() for each in folders)
    linked = any(each.is_symlink() for each in (folder / name, *folders))
    return wrong or linked or (folder / name).is_dir()


def _remove_staging(hidden: Path) -> None:
    if hidden.is_symlink():
        raise InputError(
            f"{str(hidden)!r} is a symbolic link. Remove it, or choose another folder."
        )
    if hidden.exists():
        shutil.rmtree(hidden)


def _digest(path: Path) -> str:
    """Return the SHA-256 of a file; an empty string if it does not exist."""
    if path.is_symlink() or not path.is_file():
        return "something else" if path.is_symlink() or path.exists() else ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
