"""OpenVINO GenAI's continuous batching, driven by lines of JSON; run by the peer's own python.

In:  {"id": 1, "ids": [...], "max_new_tokens": 8, "ignore_eos": true}, one line for each request.
Out: [[1, [token ids], is_done], ...], one line for each step that brought anything; first "ready".

It is a process of its own because a step holds the interpreter's lock for its whole length, and
tokens that wait for a web server's turn would make OpenVINO slower than it is.
"""

import argparse
import json
import os
import select
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import openvino
import openvino_genai

CACHE_GB = 1  # holds 16 sequences of 1,096 tokens of the models measured here
MAX_BATCHED_TOKENS = 2048


class Requests:
    """Lines of standard input, read when there are any, or waited for."""

    def __init__(self) -> None:
        self._rest = b""
        self.is_closed = False

    def read(self, *, wait: bool) -> Iterator[dict[str, Any]]:
        """The requests that have come; with `wait` at least one, unless the input ends."""
        while not self.is_closed and select.select([0], [], [], None if wait else 0)[0]:
            data = os.read(0, 1 << 20)
            self.is_closed = not data
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                wait = False
                yield json.loads(line)


def make_pipeline(folder: Path, num_threads: int) -> Any:
    """The pipeline, with a prefix cache and prompts in chunks, in bfloat16."""
    config = openvino_genai.SchedulerConfig()
    config.cache_size = CACHE_GB
    config.enable_prefix_caching = True
    config.dynamic_split_fuse = True
    config.max_num_batched_tokens = MAX_BATCHED_TOKENS
    config.max_num_seqs = 32
    properties = {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": num_threads}
    return openvino_genai.ContinuousBatchingPipeline(str(folder), config, "CPU", properties)


def add(pipeline: Any, request: dict[str, Any]) -> Any:
    """Start one request, greedy; the handle its tokens come from."""
    config = pipeline.get_config()
    config.max_new_tokens = request["max_new_tokens"]
    config.ignore_eos = request["ignore_eos"]
    config.do_sample = False
    ids = openvino.Tensor(numpy.array([request["ids"]], dtype=numpy.int64))
    return pipeline.add_request(request["id"], ids, config)


def news(live: dict[int, Any]) -> list[tuple[int, list[int], bool]]:
    """What the last step brought; requests that are done leave `live`."""
    found = []
    for number, handle in list(live.items()):
        ids: list[int] = []
        while handle.can_read():
            for output in handle.read().values():
                ids += output.generated_ids
        is_done = handle.get_status() != openvino_genai.GenerationStatus.RUNNING
        if ids or is_done:
            found.append((number, ids, is_done))
        if is_done:
            del live[number]
    return found


def main() -> None:
    """Serve until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    # What libraries print must not come between the lines.
    output = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    pipeline = make_pipeline(args.folder, args.threads)
    output.write('"ready"\n')
    live: dict[int, Any] = {}
    requests = Requests()
    while not requests.is_closed:
        for request in requests.read(wait=not live):
            live[request["id"]] = add(pipeline, request)
        if live:
            pipeline.step()
            if found := news(live):
                output.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
