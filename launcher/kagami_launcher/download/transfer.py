"""One file of a commit into the hub cache: resumed, verified, in place by one rename.

The cache's layout is `huggingface_hub`'s, and whatever is small it fetches itself. Large files (Git
LFS) get their bytes here, by the library's `http_get`, because `hf_hub_download` starts them again
from nothing after a kill: its temporary file has a new name each time. Ours is
`blobs/{sha256}.incomplete`; once its hash is right it becomes the blob, and the library, which
finds it there, only links it.
"""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from huggingface_hub import constants, hf_hub_download, hf_hub_url
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import WeakFileLock, build_hf_headers

from kagami_launcher.download.errors import WrongContent
from kagami_launcher.download.files import RemoteFile
from kagami_launcher.download.progress import TransferBar
from kagami_launcher.model.hub_cache import repository_folder


@dataclass(frozen=True, slots=True)
class Commit:
    """One commit of a repository, and its place in the hub cache."""

    model_id: str
    sha: str
    cache: Path

    @property
    def folder(self) -> Path:
        return repository_folder(self.cache, self.model_id)

    def pointer(self, file: RemoteFile) -> Path:
        """Where the file appears when it is complete."""
        return self.folder / "snapshots" / self.sha / file.name

    def blob(self, file: RemoteFile) -> Path:
        return self.folder / "blobs" / str(file.sha256)

    def partial(self, file: RemoteFile) -> Path:
        blob = self.blob(file)
        return blob.with_name(f"{blob.name}.incomplete")

    def has(self, file: RemoteFile) -> bool:
        """Whether the file is there with the size that the hub says."""
        path = self.pointer(file)
        return path.is_file() and path.stat().st_size == file.size

    def missing_bytes(self, file: RemoteFile) -> int:
        """How much of the file is not on the disk yet."""
        if file.sha256 is None:
            return file.size
        if size_of(self.blob(file)) == file.size:
            return 0
        return max(0, file.size - size_of(self.partial(file)))


def size_of(path: Path) -> int:
    """Bytes of a file; 0 if there is none."""
    return path.stat().st_size if path.is_file() else 0


def clear_wrong_size(commit: Commit, file: RemoteFile) -> None:
    """Remove a file of the wrong size, which a full disk or another tool left there.

    Not called while files are being fetched: two of them may share a blob. The target of a link
    that leads out of the repository's folder stays: it belongs to somebody else.
    """
    for path in (commit.pointer(file), commit.blob(file)):
        if path.is_file() and path.stat().st_size != file.size:
            content = path.resolve()
            path.unlink()
            if content.is_relative_to(commit.folder.resolve()):
                content.unlink(missing_ok=True)


def fetch(commit: Commit, file: RemoteFile, advance: Callable[[int], None]) -> Path:
    """Bring the file into the snapshot. Raises what the library raises, and `WrongContent`."""
    is_large = file.sha256 is not None and file.size <= constants.MAX_HTTP_DOWNLOAD_SIZE
    if is_large and not commit.blob(file).is_file():
        lock = commit.cache / ".locks" / commit.folder.name / f"{file.sha256}.lock"
        for folder in (lock.parent, commit.folder / "blobs"):
            folder.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            if not commit.blob(file).is_file():  # another process may have been faster
                _fetch_blob(commit, file, advance)
    path = Path(
        hf_hub_download(
            commit.model_id,
            file.name,
            revision=commit.sha,
            cache_dir=commit.cache,
            tqdm_class=cast(Any, TransferBar(advance)),
        )
    )
    if (size := size_of(path)) != file.size:
        path.unlink()
        raise WrongContent(f"{file.name} has {size} bytes, and {file.size} by the hub's list")
    return path


def _fetch_blob(commit: Commit, file: RemoteFile, advance: Callable[[int], None]) -> None:
    partial = commit.partial(file)
    for is_resumed in (size_of(partial) > 0, False):
        _transfer(commit, file, advance)
        if _sha256(partial) == file.sha256:
            os.replace(partial, commit.blob(file))
            return
        advance(-size_of(partial))
        partial.unlink()
        if not is_resumed:  # else the old part may be wrong: fetch the whole file again
            break
    raise WrongContent(
        f"{file.name} of model {commit.model_id} is not what the hub says it is (sha256 differs): "
        "it was changed on the way, by a proxy or a mirror"
    )


def _transfer(commit: Commit, file: RemoteFile, advance: Callable[[int], None]) -> None:
    partial = commit.partial(file)
    if size_of(partial) > file.size:
        partial.unlink()
    # The hub's address and not the one it redirects to: that is signed, and it expires.
    url = hf_hub_url(commit.model_id, file.name, revision=commit.sha)
    with partial.open("ab") as sink:
        have = sink.tell()
        http_get(
            url,
            sink,
            resume_size=have,
            headers=build_hf_headers(),
            expected_size=file.size,
            displayed_filename=file.name,
            tqdm_class=cast(Any, TransferBar(advance)),
        )
        sink.flush()
        os.fsync(sink.fileno())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
