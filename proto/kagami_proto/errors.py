"""The exception tree, and the one table that says what each becomes at a border.

```
KagamiError
├─ InvalidRequest            the client's fault: a field, its limit and the value given
│  ├─ MalformedBody          JSON, but not of the route's shape
│  │  └─ NotJson             not JSON at all
│  ├─ BodyTooLarge           longer than --payload-limit
│  ├─ UnsupportedMediaType   Content-Type is not JSON
│  │  └─ CodedBody           Content-Encoding is not `identity`
│  ├─ BodyTooSlow            the body made no progress for --body-timeout
│  ├─ ContextOverflow        prompt, or prompt and answer, are longer than the model's context
│  ├─ TemplateError          the chat template is missing or refuses the messages
│  ├─ ToolError              the tools cannot be served
│  ├─ SuffixNotSupported     `suffix` of the completions route
│  ├─ BatchSizeExceeded      more prompts in one call than --max-client-batch-size
│  ├─ InvalidUtf8            bytes of a KServe input are no text
│  └─ LengthMismatch         a KServe call asks for other outputs than it has inputs
├─ NotFound                  there is no such path, model or method
│  └─ MethodNotAllowed       the path is there, for other methods
├─ Unauthorized              the API key is missing or wrong
├─ Overloaded                no permit free: the client may come back later
├─ Unavailable               not ready yet, or draining
├─ Unhealthy                 steps make no progress
├─ GenerationFailed          the shard could not compute this request
│  └─ ShardLost              the shard went away while the request ran
├─ IncompleteGeneration      the stream ended without its last token
├─ UnsupportedModel          the model folder is sound, but we cannot run such a model
├─ InvalidCheckpoint         the model folder's files are missing or contradict each other
└─ RankLost                  the shards of one model do not find, or do not follow, each other
```

The class says whose fault it is. Anything outside the tree is a bug: logged with its traceback,
500.
"""

from collections.abc import Mapping
from http import HTTPStatus
from types import MappingProxyType
from typing import NamedTuple


class KagamiError(Exception):
    """Root of the tree; `str()` is the text a client may read."""


class InvalidRequest(KagamiError):
    """The request breaks a rule; the text names the field, the limit and the value.

    `field` is the path of that field in the body, as in "messages[0].content"; None: no one field.
    """

    def __init__(self, text: str, *, field: str | None = None) -> None:
        super().__init__(text)
        self.field = field


class MalformedBody(InvalidRequest):
    """The body is JSON, but does not have the route's shape."""


class NotJson(MalformedBody):
    """The body is not JSON."""


class BodyTooLarge(InvalidRequest):
    """The body is longer than the limit."""


class UnsupportedMediaType(InvalidRequest):
    """The content type is not JSON."""


class CodedBody(UnsupportedMediaType):
    """The body is compressed, or coded in another way."""


class BodyTooSlow(InvalidRequest):
    """The body made no progress for too long."""


class ContextOverflow(InvalidRequest):
    """The prompt, or the prompt with the answer, has more tokens than the limit.

    Each family of clients waits for words of its own, with the numbers in them.
    """

    def __init__(
        self,
        text: str,
        *,
        num_prompt: int,
        num_answer: int,
        limit: int,
        is_exact: bool,
    ) -> None:
        """`limit` is that of the prompt, or of both; `num_answer` is 0 if the prompt alone is over.

        Not `is_exact`: the prompt was not tokenized, and has at least `num_prompt`.
        """
        super().__init__(text, field="inputs")
        self.num_prompt = num_prompt
        self.num_answer = num_answer
        self.limit = limit
        self.is_exact = is_exact


class TemplateError(InvalidRequest):
    """The chat template is missing, or failed on these messages."""


class ToolError(InvalidRequest):
    """The tools or the choice among them cannot be served."""


class SuffixNotSupported(InvalidRequest):
    """`suffix` was given."""


class BatchSizeExceeded(InvalidRequest):
    """One call brings more prompts than the limit."""


class InvalidUtf8(InvalidRequest):
    """The bytes of an input are not UTF-8."""


class LengthMismatch(InvalidRequest):
    """The number of outputs differs from the number of inputs."""


class NotFound(KagamiError):
    """The path, or the thing it names, does not exist."""


class MethodNotAllowed(NotFound):
    """The path does not take this method."""


class Unauthorized(KagamiError):
    """The API key is missing or wrong."""


class Overloaded(KagamiError):
    """Every permit is taken."""


class Unavailable(KagamiError):
    """The server is starting or stopping."""


class Unhealthy(KagamiError):
    """Steps make no progress."""


class GenerationFailed(KagamiError):
    """A shard could not compute this request."""


class ShardLost(GenerationFailed):
    """The connection to a shard broke while the request ran."""


class IncompleteGeneration(KagamiError):
    """The token stream ended before its last token."""


class UnsupportedModel(KagamiError):
    """We have no way to run this kind of model; raised at start."""


class InvalidCheckpoint(KagamiError):
    """A file or a tensor of the model folder is missing or wrong; raised at start."""


class RankLost(KagamiError):
    """The ranks of a model cannot connect or have diverged; the shard that raises it ends."""


class ErrorRow(NamedTuple):
    """What an error becomes at a border."""

    kind: str
    """TGI's `error_type`"""
    status: HTTPStatus
    prefix: str = ""
    """Stands before the text that a client reads"""
    cause: str = "generation"
    """The label `err` of tgi_request_failure"""
    is_refusal: bool = False
    """The request was not served, and nothing of ours is broken: a warning in the log"""


def _invalid(
    kind: str,
    status: HTTPStatus = HTTPStatus.UNPROCESSABLE_ENTITY,
    prefix: str = "",
    cause: str = "validation",
) -> ErrorRow:
    return ErrorRow(kind, status, prefix, cause, is_refusal=True)


TABLE: Mapping[type[KagamiError], ErrorRow] = MappingProxyType(
    {
        InvalidRequest: _invalid("validation", prefix="Input validation error: "),
        MalformedBody: _invalid("validation"),
        NotJson: _invalid("validation", HTTPStatus.BAD_REQUEST),
        BodyTooLarge: _invalid("validation", HTTPStatus.REQUEST_ENTITY_TOO_LARGE),
        UnsupportedMediaType: _invalid("validation", HTTPStatus.UNSUPPORTED_MEDIA_TYPE),
        BodyTooSlow: _invalid("validation", HTTPStatus.REQUEST_TIMEOUT),
        TemplateError: _invalid("template_error", prefix="Template error: ", cause="template"),
        ToolError: _invalid("tool_error", prefix="Tool error: "),
        SuffixNotSupported: _invalid("suffix not supported"),
        BatchSizeExceeded: _invalid("batch size exceeded"),
        InvalidUtf8: _invalid("utf8"),
        LengthMismatch: _invalid("length mismatch"),
        NotFound: ErrorRow("not_found", HTTPStatus.NOT_FOUND, is_refusal=True),
        MethodNotAllowed: ErrorRow(
            "method_not_allowed", HTTPStatus.METHOD_NOT_ALLOWED, is_refusal=True
        ),
        Unauthorized: ErrorRow("unauthorized", HTTPStatus.UNAUTHORIZED, is_refusal=True),
        Overloaded: ErrorRow(
            "overloaded", HTTPStatus.TOO_MANY_REQUESTS, cause="overloaded", is_refusal=True
        ),
        Unavailable: ErrorRow(
            "unavailable", HTTPStatus.SERVICE_UNAVAILABLE, cause="unavailable", is_refusal=True
        ),
        Unhealthy: ErrorRow("healthcheck", HTTPStatus.SERVICE_UNAVAILABLE),
        GenerationFailed: ErrorRow(
            "generation", HTTPStatus.FAILED_DEPENDENCY, "Request failed during generation: "
        ),
        IncompleteGeneration: ErrorRow(
            "incomplete_generation",
            HTTPStatus.INTERNAL_SERVER_ERROR,
            "Incomplete generation: ",
            cause="incomplete",
        ),
        UnsupportedModel: ErrorRow("unsupported_model", HTTPStatus.INTERNAL_SERVER_ERROR),
        InvalidCheckpoint: ErrorRow("invalid_checkpoint", HTTPStatus.INTERNAL_SERVER_ERROR),
        RankLost: ErrorRow("rank_lost", HTTPStatus.INTERNAL_SERVER_ERROR),
    }
)


def row_of(error: BaseException) -> ErrorRow | None:
    """The row of the nearest ancestor in `TABLE`, or None for an error outside the tree."""
    for ancestor in type(error).__mro__:
        if row := TABLE.get(ancestor):
            return row
    return None
