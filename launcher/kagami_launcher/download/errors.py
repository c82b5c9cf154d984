"""Every failure of a download as one line for the operator: the cause and what to do.

The only file that knows the exceptions of huggingface_hub. The class that is raised says whether
another attempt may help.
"""

import errno

import httpx2
from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

_TRANSIENT_STATUS = (408, 429, 500, 502, 503, 504)


class DownloadFailed(Exception):
    """The model cannot be had; the text is for the operator."""


class Unreachable(DownloadFailed):
    """The hub does not answer as it should. Another attempt, or the cache, may help."""


class WrongContent(DownloadFailed):
    """A file is not what the hub says it is."""


def explain(
    error: BaseException, model_id: str, revision: str | None, *, has_token: bool
) -> DownloadFailed:
    """Translate an exception of the library, of HTTP or of the file system."""
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # after that error the library looked into the cache
    where = constants.ENDPOINT
    match error:
        case DownloadFailed():
            return error
        case GatedRepoError():
            who = "the account of the given token" if has_token else "nobody without a token"
            return DownloadFailed(
                f"model {model_id} is gated and {who} may read it: accept its conditions at "
                f"{where}/{model_id} and set HF_TOKEN to a token of that account"
            )
        case RevisionNotFoundError():
            return DownloadFailed(
                f"model {model_id} has no revision {revision or 'main'}: check --revision"
            )
        case EntryNotFoundError():
            return DownloadFailed(
                f"a file of model {model_id} is missing on {where}: {_one(error)}"
            )
        case RepositoryNotFoundError():
            return _not_found(model_id, has_token)
        case HfHubHTTPError() if error.response.status_code == 401:
            if not has_token:
                return _not_found(model_id, has_token)
            return DownloadFailed(f"{where} refuses the token (401): check HF_TOKEN")
        case HfHubHTTPError() if error.response.status_code in _TRANSIENT_STATUS:
            status = f"{error.response.status_code} {error.response.reason_phrase}".strip()
            return Unreachable(f"the hub at {where} fails ({status}): try again later")
        case HfHubHTTPError():
            return DownloadFailed(
                f"{where} refuses model {model_id} ({error.response.status_code}): {_one(error)}"
            )
        case HFValidationError():
            return DownloadFailed(f"{model_id} is neither a folder nor a hub id: {_one(error)}")
        case httpx2.TransportError() | FileMetadataError():
            return Unreachable(
                f"cannot reach the hub at {where} ({type(error).__name__}: {_one(error)}): check "
                "the network and HF_ENDPOINT"
            )
        case OSError() if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return DownloadFailed("no space is left on the disk of the hub cache")
        case OSError() if error.errno is not None:
            return DownloadFailed(f"cannot write the hub cache: {error.strerror}: {error.filename}")
        case OSError():  # the library: `Consistency check failed: file should be of size …`
            return Unreachable(_one(error))
        case _:
            return DownloadFailed(f"{type(error).__name__}: {_one(error)}")


def _not_found(model_id: str, has_token: bool) -> DownloadFailed:
    advice = "the given token may not read it" if has_token else "it is private: set HF_TOKEN"
    return DownloadFailed(
        f"model {model_id} does not exist on {constants.ENDPOINT}, or {advice}; check --model-id"
    )


def _one(error: BaseException) -> str:
    """The first line of a text that has many."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
