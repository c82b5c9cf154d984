"""The JSON of SageMaker, Vertex AI and KServe v2 (the Open Inference Protocol)."""

from collections.abc import Sequence
from typing import Any

from msgspec import UNSET, Struct, UnsetType

from kagami_router.api.schemas.native import GenerateParameters


class VertexRequest(Struct, frozen=True):
    """Each instance is a body of /generate or of /v1/chat/completions."""

    instances: list[dict[str, Any]]


class VertexResponse(Struct, frozen=True):
    """One text for each instance, in their order."""

    predictions: list[str]


class InferInput(Struct, frozen=True):
    """One prompt: the bytes of its UTF-8 text as numbers, or the text itself."""

    name: str
    data: list[int | str]
    shape: list[int] = []
    datatype: str = "BYTES"


class InferOutputName(Struct, frozen=True):
    """What an output is to be called."""

    name: str


class InferRequest(Struct, frozen=True):
    """Body of `infer`; without `outputs` they are called like the inputs."""

    inputs: list[InferInput]
    id: str | None = None
    parameters: GenerateParameters | UnsetType = UNSET
    outputs: list[InferOutputName] | None = None


class InferOutput(Struct, frozen=True):
    """One text, in the form its input had."""

    name: str
    shape: list[int]
    datatype: str
    data: Sequence[int | str]


class InferResponse(Struct, frozen=True):
    """Answer of `infer`, in the order of the inputs."""

    id: str | None
    outputs: list[InferOutput]


class Live(Struct, frozen=True):
    """Answer of KServe's probes."""

    live: bool


class ServerMetadata(Struct, frozen=True):
    """Answer of `/v2`."""

    name: str
    version: str
    extensions: list[str]
