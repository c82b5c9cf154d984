"""The model's folder: found, downloaded and converted, before anything is started."""

import logging
import sys
from collections.abc import Mapping
from pathlib import Path

from opentelemetry.trace import Tracer

from kagami_launcher import environment, plan
from kagami_launcher.cli import Invocation
from kagami_launcher.errors import LaunchFailed
from kagami_launcher.model import hub_cache
from kagami_launcher.model import source as hub
from kagami_launcher.model.source import ModelSource
from kagami_launcher.process_tree import ProcessTree
from kagami_proto.span_names import SpanName
from kagami_proto.tracing import span

log = logging.getLogger(__name__)

_DOWNLOAD: Mapping[str, object] = {"span": "download"}


def prepare(invocation: Invocation, tree: ProcessTree, tracer: Tracer) -> ModelSource:
    """Find the model's folder, and make it if it has to be converted."""
    args, environ = invocation.args, invocation.environ
    log.info("Starting check and download process for %s", args.model_id, extra=_DOWNLOAD)
    cache = hub_cache.cache_folder(args.huggingface_hub_cache, environ)
    override, was_looked_up = args.weights_cache_override, False
    try:
        if not hub.is_hub_id(args.model_id) or not override:
            was_looked_up = _download(invocation, cache, tree, tracer)
            source = hub.resolve(args.model_id, revision=args.revision, cache=cache)
        else:
            source = hub.overridden(args.model_id, Path(override), cache)
    except (hub_cache.ModelNotFound, OSError, ValueError) as missing:  # of foreign files
        raise LaunchFailed("DownloadError", str(missing)) from missing
    if args.revision is not None and not source.is_from_hub:
        log.warning("`--revision` has no effect: %s is not from the hub", args.model_id)
    if source.is_ready and not was_looked_up:
        log.info("Files are already present on the host. Skipping download.")
    elif not source.is_ready:
        _convert(invocation, source, tree, tracer)
    log.info("Successfully downloaded weights for %s", args.model_id, extra=_DOWNLOAD)
    return source


def _download(invocation: Invocation, cache: Path, tree: ProcessTree, tracer: Tracer) -> bool:
    """Have the hub's model brought into the cache; False if nobody has to be asked for it."""
    args, environ = invocation.args, invocation.environ
    if not hub.is_hub_id(args.model_id):
        return False
    if hub_cache.will_do(
        args.model_id,
        args.revision,
        cache,
        is_offline=hub_cache.is_offline(environ),
        trust_remote_code=args.trust_remote_code,
    ):
        return False
    with span(tracer, SpanName.DOWNLOAD):
        tree.run_to_end(
            f"Downloading {args.model_id}",
            plan.download_command(args, on_terminal=sys.stdout.isatty()),
            environment.for_download(environ, plan.hub_environment(args)),
        )
    return True


def _convert(
    invocation: Invocation, source: ModelSource, tree: ProcessTree, tracer: Tracer
) -> None:
    log.info("Converting %s to safetensors in %s", source.origin, source.folder)
    with span(tracer, SpanName.CONVERT):
        tree.run_to_end(
            f"Converting {invocation.args.model_id}",
            [sys.executable, "-P", "-m", *plan.conversion(invocation, source)],
            environment.for_conversion(invocation.environ),
        )
