"""A download, top to bottom: list, choose, check the disk, fetch, name the commit.

One request lists the repository. If the cache has every file, there is no second one. Small files
come first and `refs/{revision}` last, so a snapshot that a ref names, or that has its weights, is
complete. If the hub cannot be reached, a complete snapshot in the cache is used.
"""

import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, get_token

from kagami_launcher.download.cli import DownloadArgs
from kagami_launcher.download.errors import DownloadFailed, Unreachable, explain
from kagami_launcher.download.files import (
    PREFERRED,
    NoWeights,
    RemoteFile,
    Selection,
    select,
)
from kagami_launcher.download.progress import Progress, open_progress
from kagami_launcher.download.transfer import Commit, clear_wrong_size, fetch
from kagami_launcher.model import hub_cache
from kagami_launcher.model import source as hub
from kagami_proto.model_files import BrokenFile, read_object

log = logging.getLogger(__name__)

T = TypeVar("T")

# Seconds before each further attempt. The first is for a cut, the last for a hub that restarts.
_PAUSES_S = (1.0, 5.0, 15.0, 30.0)
_LIST_TIMEOUT_S = 10.0
_NUM_TRANSFERS = 8  # the library's own number
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MARGIN_BYTES = 64 << 20  # for other programs that write to the disk


def run(args: DownloadArgs) -> int:
    """Download the model and what it is built on; returns the exit code."""
    _let_the_library_speak()
    try:
        folder = download(args, args.model_id, args.revision)
        if (base := base_of(folder)) is not None:
            log.info("Downloading parent model %s", base[0])
            download(args, *base)
    except Exception as error:  # the border of this process: files and disks can cause anything
        failure = explain(error, args.model_id, args.revision, has_token=get_token() is not None)
        log.error("%s", failure)
        return 1
    return 0


def _let_the_library_speak() -> None:
    library = logging.getLogger("huggingface_hub")
    library.handlers.clear()
    library.propagate = True


def download(args: DownloadArgs, model_id: str, revision: str | None) -> Path:
    """Bring one repository into the cache; returns its snapshot. Raises `DownloadFailed`."""
    source = _cached(model_id, revision, args.cache)
    if args.is_offline:
        if source is None:
            raise DownloadFailed(
                hub_cache.not_cached(model_id, revision, args.cache, is_offline=True)
            )
        log.info("Files are already present on the host. Skipping download.")
        return source
    try:
        return _Download(args, model_id, revision).bring(is_cached=source is not None)
    except Unreachable as failure:
        if source is None:
            raise
        log.warning("%s. Going on with the cached files of %s in %s", failure, model_id, source)
        return source


def _cached(model_id: str, revision: str | None, cache: Path) -> Path | None:
    try:
        return hub_cache.cached_snapshot(model_id, revision, cache)
    except hub_cache.ModelNotFound:
        return None


def base_of(folder: Path) -> tuple[str, str | None] | None:
    """Hub id and revision of the model that an adapter is for; None if the folder holds none."""
    try:
        config = read_object(folder / "adapter_config.json")
    except BrokenFile:
        return None
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    if (folder / "config.json").is_file() or not isinstance(name, str) or not hub.is_hub_id(name):
        return None
    if revision is not None and not hub_cache.is_revision(revision):
        return None  # it would become a path; the launcher refuses it by name
    return name, revision


class _Download:
    """One repository at one revision."""

    def __init__(self, args: DownloadArgs, model_id: str, revision: str | None) -> None:
        self._args, self._model_id, self._revision = args, model_id, revision

    def bring(self, *, is_cached: bool) -> Path:
        """Fetch what is missing; returns the snapshot. Raises `DownloadFailed`."""
        commit, files = self._insist(self._list, pauses=() if is_cached else _PAUSES_S)
        chosen = self._choose(files)
        wanted = [*chosen.texts, *chosen.weights]
        if missing := [file for file in wanted if not commit.has(file)]:
            self._check_disk(commit, missing)
            self._say_what_is_there(chosen, missing)
            self._fetch_all(commit, chosen, missing)
        else:
            log.info("Files are already present on the host. Skipping download.")
        self._name(commit)
        return commit.folder / "snapshots" / commit.sha

    def _list(self) -> tuple[Commit, list[RemoteFile]]:
        info = HfApi().model_info(
            self._model_id,
            revision=self._revision,
            timeout=_LIST_TIMEOUT_S,
            files_metadata=True,
        )
        # Both become file names, and not every hub can be trusted.
        if info.sha is None or not hub_cache.is_pinned(info.sha):
            raise Unreachable(f"the hub names no commit for model {self._model_id}")
        hashes = {item.rfilename: item.lfs.sha256 for item in info.siblings or () if item.lfs}
        if bad := [name for name, value in hashes.items() if not _SHA256.fullmatch(value)]:
            raise DownloadFailed(f"the hub gives no sha256 for {bad[0]} of model {self._model_id}")
        files = [
            RemoteFile(item.rfilename, item.size or 0, hashes.get(item.rfilename))
            for item in info.siblings or ()
        ]
        return Commit(self._model_id, info.sha, self._args.cache), files

    def _choose(self, files: Sequence[RemoteFile]) -> Selection:
        args = self._args
        about = f"for model {self._model_id} and revision {self._revision}"
        try:
            chosen = select(
                files,
                extension=args.extension,
                allow_others=args.auto_convert,
                trust_remote_code=args.trust_remote_code,
            )
        except NoWeights as reason:
            raise DownloadFailed(f"{reason} {about}.") from reason
        if chosen.extension != args.extension and args.extension == PREFERRED:
            kind = {".bin": "PyTorch", ".pt": "PyTorch", ".gguf": "GGUF"}[chosen.extension]
            log.warning(
                "No safetensors weights found for model %s at revision %s. Downloading %s weights.",
                self._model_id,
                self._revision,
                kind,
            )
        return chosen

    def _check_disk(self, commit: Commit, missing: Sequence[RemoteFile]) -> None:
        needed = sum(commit.missing_bytes(file) for file in missing)
        free = _free_bytes(commit.cache)
        if needed + _MARGIN_BYTES > free:
            raise DownloadFailed(
                f"not enough space for model {self._model_id} in {commit.cache}: "
                f"{needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free"
            )

    def _say_what_is_there(self, chosen: Selection, missing: Sequence[RemoteFile]) -> None:
        for file in chosen.weights:
            if file not in missing:
                log.info("File %s already present in cache.", file.name)

    def _fetch_all(self, commit: Commit, chosen: Selection, missing: Sequence[RemoteFile]) -> None:
        for file in missing:
            clear_wrong_size(commit, file)
        weights = [file for file in missing if file in chosen.weights]
        num_bytes = sum(commit.missing_bytes(file) for file in weights)
        texts = [file for file in missing if file not in weights]
        _side_by_side(lambda file: self._fetch(commit, file, lambda _: None), texts)
        progress = open_progress(len(weights), num_bytes, draws_bars=self._args.draws_bars)
        try:
            _side_by_side(lambda file: self._fetch_weights(commit, file, progress), weights)
        finally:
            progress.close()

    def _fetch_weights(self, commit: Commit, file: RemoteFile, progress: Progress) -> None:
        started = time.monotonic()
        progress.start(file)
        path = self._fetch(commit, file, progress.advance)
        progress.finish(file, path, time.monotonic() - started)

    def _fetch(self, commit: Commit, file: RemoteFile, advance: Callable[[int], None]) -> Path:
        return self._insist(lambda: fetch(commit, file, advance), pauses=_PAUSES_S)

    def _insist(self, action: Callable[[], T], *, pauses: Sequence[float]) -> T:
        """Try until it works, or until no further attempt can help; raises `DownloadFailed`."""
        for attempt, pause_s in enumerate([*pauses, None], start=1):
            try:
                return action()
            except Exception as error:  # of HTTP, of the library, of the disk: see errors.py
                failure = explain(
                    error, self._model_id, self._revision, has_token=get_token() is not None
                )
                if pause_s is None or not isinstance(failure, Unreachable):
                    raise failure from error
                log.warning("%s", failure)
                log.info("Retrying in %g seconds", pause_s)
                time.sleep(pause_s)
                log.warning("Retry %s/%s", attempt, len(pauses))
        raise AssertionError("the last attempt returns or raises")

    def _name(self, commit: Commit) -> None:
        """Let the revision name this commit. Done last: a ref never names half a model."""
        revision = self._revision or "main"
        if revision == commit.sha:
            return
        reference = commit.folder / "refs" / revision
        if reference.is_file() and reference.read_text(encoding="utf-8") == commit.sha:
            return
        reference.parent.mkdir(parents=True, exist_ok=True)
        draft = reference.with_name(f"{reference.name}.{os.getpid()}")
        draft.write_text(commit.sha, encoding="utf-8")
        os.replace(draft, reference)


def _side_by_side(action: Callable[[RemoteFile], object], files: Sequence[RemoteFile]) -> None:
    """Fetch all at once. The first failure is raised; the others end with the process."""
    pool = ThreadPoolExecutor(max_workers=_NUM_TRANSFERS)
    try:
        for transfer in as_completed([pool.submit(action, file) for file in files]):
            transfer.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _free_bytes(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
