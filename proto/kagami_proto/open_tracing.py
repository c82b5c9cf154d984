"""Starts tracing for a process; the SDK is imported where there is a plan, and not before."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import import_module

from kagami_proto.tracing import NO_TRACING, Tracing
from kagami_proto.tracing_plan import EXPORTERS, TracingPlan

logger = logging.getLogger(__name__)


@contextmanager
def open_tracing(
    wanted: TracingPlan | None,
    attributes: Mapping[str, str | int] | None = None,
    *,
    problem: str = "",
) -> Iterator[Tracing]:
    """Trace inside this context, to its end with what is queued (one second at most).

    `attributes` are of the process (the resource). What is wrong with the plan, or was with what
    it should have been made of, is logged, and costs the traces and nothing else.
    """
    if problem:
        logger.warning("Traces are off: %s", problem)
    with ExitStack() as stack:
        tracing = NO_TRACING
        if wanted is not None:
            try:
                # Takes 100 ms that nobody should pay who does not trace.
                sdk = import_module("kagami_proto.tracing_sdk")
                opened = sdk.open_sdk(wanted, dict(attributes or {}), EXPORTERS[wanted.protocol])
                tracing = stack.enter_context(opened)
            except (ImportError, ValueError, OSError) as error:
                logger.warning("Traces are off: %s", error)
        yield tracing
