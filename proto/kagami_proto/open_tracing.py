"""Starts tracing for a process; imports the SDK only if there is a plan."""

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
    """Trace inside this context; its end exports the queued spans (one second at most).

    `attributes` describe the process (the resource). An error in the plan, or the `problem` that
    prevented a plan, is logged; the process goes on without traces.
    """
    if problem:
        logger.warning("Traces are off: %s", problem)
    with ExitStack() as stack:
        tracing = NO_TRACING
        if wanted is not None:
            try:
                # The import takes 100 ms, which only those who trace should pay.
                sdk = import_module("kagami_proto.tracing_sdk")
                opened = sdk.open_sdk(wanted, dict(attributes or {}), EXPORTERS[wanted.protocol])
                tracing = stack.enter_context(opened)
            except (ImportError, ValueError, OSError) as error:
                logger.warning("Traces are off: %s", error)
        yield tracing
