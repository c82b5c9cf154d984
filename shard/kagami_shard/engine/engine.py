"""Warm up, admit, run a step, drop: the algorithm of a shard.

A step is *launched* (its work is given to the device) and *collected* (its results are read). On
a GPU the next step is launched before the last one is collected: a sampled id that has not been
read yet is fed to the next step on the device. One thread drives the engine.
"""

import logging
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import isfinite

import torch

from kagami_proto.errors import InvalidRequest
from kagami_proto.values import Grammar, SamplingParams, Wanted
from kagami_shard.engine.generation import GenerationState, Pending
from kagami_shard.engine.greedy_batch import GreedyBatch, GreedyModel, is_greedy_decode
from kagami_shard.engine.items import Item, build_batch, prompt_rows, samples_token
from kagami_shard.engine.launched import (
    Launched,
    device_times,
    split_prompt_logprobs,
    top_tokens,
)
from kagami_shard.engine.step import (
    NewSequence,
    Step,
    StepResult,
    Work,
)
from kagami_shard.forward.batch import ForwardBatch
from kagami_shard.forward.kv_cache import KVCache, block_bytes, blocks_for
from kagami_shard.layers.attention import Attention
from kagami_shard.machine.bandwidth import Probe
from kagami_shard.machine.device import to_device
from kagami_shard.machine.distributed import Alone, TensorParallel
from kagami_shard.machine.memory import pool_bytes
from kagami_shard.models.base import Model
from kagami_shard.models.read_cost import ReadCost, read_cost
from kagami_shard.sampling.grammar import Banned, Grammars, nothing_to_fill
from kagami_shard.sampling.logprobs import Scorer, Scores, TorchScorer, score
from kagami_shard.sampling.sampler import Drawn, draw
from kagami_shard.sampling.watermark import Watermark

logger = logging.getLogger(__name__)

# A warm-up step on the CPU: enough to start the threads and fill the primitive caches.
_CPU_WARMUP_TOKENS = 32
# Without a given bound a CPU gets this many tokens of KV cache, if the memory allows.
_CPU_POOL_TOKENS = 24_576

NOT_FINITE = "the model's output is not finite"
# What a work item can want and this engine cannot do.
_NOT_SERVED = {
    Wanted.VERIFY: "this shard does not verify drafts",
    Wanted.VECTOR: "this shard gives no vectors",
}


@dataclass(frozen=True, slots=True)
class Limits:
    """The largest step and the largest sequence that the router will send."""

    max_step_tokens: int
    max_batch_size: int
    max_total_tokens: int
    """0: the model's max_positions"""
    max_pool_tokens: int
    """0: as memory allows"""


class Engine:
    """One model, its KV cache and the sequences in memory."""

    def __init__(
        self,
        model: Model,
        attention: Attention,
        *,
        dtype: torch.dtype,
        device: torch.device,
        block_size: int,
        memory_fraction: float = 1.0,
        parallel: TensorParallel | None = None,
        grammars: Grammars | None = None,
        watermark: Watermark | None = None,
        probe: Probe | None = None,
    ) -> None:
        """`probe` measures the bandwidth of the memory at the warm-up; None: nobody asks."""
        self._model = model
        self._attention = attention
        self._dtype = dtype
        self._device = device
        self._memory_fraction = memory_fraction
        self._parallel = parallel or Alone()
        self._grammars = grammars
        self._watermark = watermark or Watermark()
        self._scorer: Scorer = TorchScorer()
        self._greedy: GreedyBatch | None = None
        """The last step, if the next one may go on with it"""
        self._states: dict[int, GenerationState] = {}
        self.block_size = block_size
        self.cache: KVCache | None = None
        self.read_cost = ReadCost(0, 0, 0.0)
        """Known when warm"""
        self._probe = probe

    @property
    def model(self) -> Model:
        return self._model

    @property
    def attention_name(self) -> str:
        return self._attention.name

    def use(self, model: Model, attention: Attention, scorer: Scorer) -> None:
        """From the next step on compute the same model in another way; the cache stays."""
        self._model, self._attention, self._scorer = model, attention, scorer
        self._greedy = None

    # ------------------------------------------------------------------ warm-up

    def warmup(self, limits: Limits) -> KVCache:
        """Run a step, measure memory, allocate the cache; a second call returns the same cache.

        On CUDA the step has all the prompt tokens and sampled rows that the limits allow; on the
        CPU, where it would only cost time, a few. Ranks may find room for different numbers of
        blocks; the router uses the smallest. Raises torch.OutOfMemoryError, `RankLost`.
        """
        if self.cache is None:
            started = time.monotonic()
            with self._parallel.together():
                bandwidth = self._probe(self._device) if self._probe else 0.0
                self.cache = self._measured_cache(limits)
                self.read_cost = read_cost(self._model, self._dtype, bandwidth)
            logger.info("Warm-up done", extra={"seconds": round(time.monotonic() - started, 2)})
        return self.cache

    def _measured_cache(self, limits: Limits) -> KVCache:
        num_tokens, num_rows = limits.max_step_tokens, limits.max_batch_size
        if self._device.type == "cpu":
            num_tokens, num_rows = min(num_tokens, _CPU_WARMUP_TOKENS), min(num_rows, 2)
        longest = limits.max_total_tokens or self._model.max_positions or num_tokens
        self._run_warmup_steps(num_tokens, min(longest, num_tokens), num_rows)
        num_blocks = self._size_pool(limits, longest)
        return self._new_cache(num_blocks)

    @torch.inference_mode()
    def _run_warmup_steps(self, num_tokens: int, max_length: int, num_rows: int) -> None:
        """`num_tokens` tokens in prompts of at most `max_length`, then `num_rows` decodes."""
        lengths = [max_length] * (num_tokens // max_length)
        if num_tokens % max_length:
            lengths.append(num_tokens % max_length)
        cache = self._new_cache(1 + sum(blocks_for(n, self.block_size) for n in lengths))
        free = iter(range(1, cache.num_blocks))
        items = []
        for number, length in enumerate(lengths):
            state = GenerationState(_warmup_sequence(number, length))
            state.blocks = [next(free) for _ in range(blocks_for(length, self.block_size))]
            items.append(Item(state, 0, length))
        self._forward_and_draw(items, cache)
        decodes = []
        for number in range(num_rows):
            state = GenerationState(_warmup_sequence(number, max_length))
            state.blocks = items[0].state.blocks
            decodes.append(Item(state, max_length - 1, 1))
        self._forward_and_draw(decodes, cache)

    def _forward_and_draw(self, items: list[Item], cache: KVCache) -> Drawn:
        batch = self._batch(items, items, [])
        logits = self._model.forward(batch, self._attention.prepare(batch, cache))
        return self._draw(logits, items)

    def _size_pool(self, limits: Limits, longest: int) -> int:
        """Blocks that fit, scratch block included."""
        size = block_bytes(self._model.layers, self.block_size, self._dtype)
        free = pool_bytes(self._device, self._memory_fraction)
        num_blocks = free // size
        wanted = limits.max_pool_tokens
        if not wanted and self._device.type == "cpu":
            wanted = max(_CPU_POOL_TOKENS, longest)
        if wanted:
            num_blocks = min(num_blocks, 1 + blocks_for(wanted, self.block_size))
        if num_blocks < 2:
            raise torch.OutOfMemoryError(
                f"no room for the KV cache: one block takes {size} bytes, {free} are free"
            )
        logger.info(
            "KV-cache blocks: %d, size: %d",
            num_blocks,
            self.block_size,
            extra={"bytes": num_blocks * size},
        )
        return num_blocks

    def _new_cache(self, num_blocks: int) -> KVCache:
        return KVCache(
            self._model.layers,
            num_blocks,
            self.block_size,
            dtype=self._dtype,
            device=self._device,
        )

    def take_memory_ahead(self) -> bool:
        """Use some milliseconds without work; False: there is no more to take."""
        return self.cache is not None and self.cache.take_ahead()

    # ------------------------------------------------------------------ steps

    def reset(self) -> None:
        """Forget every sequence."""
        self._states.clear()
        self._greedy = None

    def compile_grammar(self, grammar: Grammar) -> None:
        """Have `grammar` ready for a sequence; on any thread. Raises `InvalidRequest`."""
        self._known_grammars.compile(grammar)

    @property
    def _known_grammars(self) -> Grammars:
        if self._grammars is None:
            raise InvalidRequest("this shard has no vocabulary for grammars")
        return self._grammars

    def reads_history(self, step: Step) -> bool:
        """Whether `step` needs the ids of the step before it on the host (penalties do)."""
        return any(
            (state := self._states.get(work.id)) is not None
            and state.reads_last_id
            and state.pending is not None
            for work in step.work
        )

    def launch(self, step: Step) -> Launched | StepResult:
        """Apply the changes of `step` and give its forward pass to the device.

        Whatever the forward pass raises passes through; nothing was sampled then. `RankLost` if
        another rank did not raise as well.
        """
        started_ns = time.perf_counter_ns()
        batch, self._greedy = self._greedy, None
        if batch is not None and batch.takes(step):
            admission_ns = time.perf_counter_ns() - started_ns
            return self._decode(batch, step.number, {}, started_ns, admission_ns)
        with torch.inference_mode(), self._parallel.together():
            return self._launch(step, started_ns)

    def _launch(self, step: Step, started_ns: int) -> Launched | StepResult:
        assert self.cache is not None, "warm up before the first step"
        failures = self._apply(step)
        admission_ns = time.perf_counter_ns() - started_ns
        items = self._items(step.work, failures)
        samples = list(filter(samples_token, items))
        prompts = [item for item in items if prompt_rows(item)]
        if not items:
            elapsed_ns = time.perf_counter_ns() - started_ns
            return StepResult(
                number=step.number,
                failures=failures,
                host_ns=elapsed_ns,
                device_ns=elapsed_ns,
                admission_ns=admission_ns,
            )
        if isinstance(self._model, GreedyModel) and all(map(is_greedy_decode, items)):
            asked_ids = [work.id for work in step.work]
            greedy = GreedyBatch(self._model, self.cache, items, asked_ids)
            return self._decode(greedy, step.number, failures, started_ns, admission_ns)
        events = self._mark_start()
        batch = self._batch(items, samples, prompts)
        with self._filling(samples) as masks:
            logits = self._model.forward(batch, self._attention.prepare(batch, self.cache))
        banned = masks.result()
        drawing_ns = time.perf_counter_ns()
        if events:
            events[1].record()
        drawn = self._draw(logits[: len(samples)], samples, banned)
        prompt_scores = self._prompt_scores(logits[len(samples) :], prompts) if prompts else None
        for row, item in enumerate(samples):
            item.state.expect(Pending(drawn.token_ids, row))
        if events:
            events[2].record()
        launched_ns = time.perf_counter_ns()
        return Launched(
            step.number,
            samples,
            drawn,
            prompts,
            prompt_scores,
            failures,
            started_ns,
            events,
            admission_ns,
            launched_ns - drawing_ns,
            launched_ns,
        )

    def _decode(
        self,
        batch: GreedyBatch,
        number: int,
        failures: dict[int, str],
        started_ns: int,
        admission_ns: int,
    ) -> StepResult:
        """A step of `batch`, which the next one may go on with."""
        num_lost = batch.run()
        rows = (batch.sequence_ids, batch.token_ids, batch.logprobs)
        if num_lost:
            rows = self._without_lost(*rows, failures)
        else:
            self._greedy = batch
        ids, token_ids, logprobs = rows
        elapsed_ns = time.perf_counter_ns() - started_ns
        return StepResult(
            number=number,
            ids=ids,
            token_ids=token_ids,
            logprobs=logprobs,
            failures=failures,
            host_ns=elapsed_ns,
            device_ns=elapsed_ns,
            sampling_ns=batch.sampling_ns,
            admission_ns=admission_ns,
        )

    def _without_lost(
        self,
        ids: Sequence[int],
        token_ids: Sequence[int],
        logprobs: Sequence[float],
        failures: dict[int, str],
    ) -> tuple[list[int], list[int], list[float]]:
        """The rows that have a distribution; the others' sequences fail."""
        kept = [row for row, logprob in enumerate(logprobs) if isfinite(logprob)]
        with torch.inference_mode():
            for row in set(range(len(ids))).difference(kept):
                failures[ids[row]] = NOT_FINITE
                self._quarantine(self._states[ids[row]])
        return (
            [ids[row] for row in kept],
            [token_ids[row] for row in kept],
            [logprobs[row] for row in kept],
        )

    def _filling(self, items: Sequence[Item]) -> AbstractContextManager[Future[Banned | None]]:
        """The masks of the items' grammars, computed while the context's body runs."""
        if self._grammars is None:
            return nullcontext(nothing_to_fill())
        return self._grammars.filling([item.state.grammar for item in items])

    def _draw(self, logits: torch.Tensor, items: list[Item], banned: Banned | None = None) -> Drawn:
        """A token for each item, the same on every rank.

        The gathered logits have the same bits everywhere, so greedy choices agree by themselves.
        A draw reads a running sum, which a GPU may round differently each time: rank 0's counts.
        """
        rows = [item.state.row() for item in items]
        drawn = draw(logits, rows, banned=banned, watermark=self._watermark, scorer=self._scorer)
        if any(item.state.sampling.do_sample for item in items):
            return drawn._replace(token_ids=self._parallel.broadcast(drawn.token_ids))
        return drawn

    def collect(self, launched: Launched | StepResult) -> StepResult:
        """Read the results of `launched`; waits for the device. Raises as `launch` does."""
        if isinstance(launched, StepResult):
            return launched
        with self._parallel.together():
            return self._collect(launched)

    def _collect(self, launched: Launched) -> StepResult:
        token_ids = launched.drawn.token_ids.tolist()
        logprobs = launched.drawn.logprobs.tolist()
        finite = launched.drawn.logprobs.isfinite().tolist()
        failures = launched.failures
        kept: list[int] = []
        for row, item in enumerate(launched.items):
            if finite[row]:
                item.state.take(token_ids[row])
                if item.state.grammar is not None and (error := item.state.grammar.error):
                    failures[item.state.id] = f"the grammar stopped the sequence: {error}"
                else:
                    kept.append(row)
            else:
                failures[item.state.id] = NOT_FINITE
                self._quarantine(item.state)
        finished_ns = time.perf_counter_ns()
        device_ns, sampling_ns = device_times(launched)
        return StepResult(
            number=launched.number,
            ids=[launched.items[row].state.id for row in kept],
            token_ids=[token_ids[row] for row in kept],
            logprobs=[logprobs[row] for row in kept],
            top_tokens=top_tokens(launched, kept),
            prompt_logprobs=split_prompt_logprobs(launched),
            failures=failures,
            host_ns=finished_ns - launched.started_ns,
            device_ns=device_ns,
            sampling_ns=sampling_ns,
            admission_ns=launched.admission_ns,
        )

    def _apply(self, step: Step) -> dict[int, str]:
        """Drop, admit, grant; returns the failures of single sequences."""
        failures: dict[int, str] = {}
        for dropped in step.drop_ids:
            self._states.pop(dropped, None)
        for new in step.new_sequences:
            if reason := new.refused or self._refusal(new):
                failures[new.id] = reason
            else:
                self._admit(new, failures)
        for sequence_id, blocks in step.grants.items():
            if state := self._states.get(sequence_id):
                state.blocks.extend(blocks)
        return failures

    def _admit(self, new: NewSequence, failures: dict[int, str]) -> None:
        grammar = None
        if new.grammar is not None:
            generated_ids = new.token_ids[new.num_prompt_tokens :]
            try:
                grammar = self._known_grammars.start(new.grammar, generated_ids)
            except InvalidRequest as error:
                failures[new.id] = f"grammar is not valid: {error}"
                return
        self._states[new.id] = GenerationState(new, grammar)

    def _refusal(self, new: NewSequence) -> str:
        if not new.token_ids:
            return "the sequence has no tokens"
        size = self._model.vocab_size
        if (largest := max(new.token_ids)) >= size:
            return f"token id {largest} is not below the vocabulary's {size}"
        largest = max((token_id for token_id, _ in new.sampling.logit_bias), default=0)
        if largest >= size:
            return f"the biased token id {largest} is not below the vocabulary's {size}"
        return ""

    def _items(self, work: Iterable[Work], failures: dict[int, str]) -> list[Item]:
        """The work that can be done, single tokens first, by length; what cannot is a failure."""
        items: list[Item] = []
        for sequence_id, position, count, wanted in work:
            if sequence_id in failures:
                continue
            state = self._states.get(sequence_id)
            if state is None:
                failures[sequence_id] = "the sequence is not in memory"
            elif state.has_failed:
                failures[sequence_id] = NOT_FINITE
            elif wanted in _NOT_SERVED:
                failures[sequence_id] = _NOT_SERVED[wanted]
            elif position + count > state.num_known:
                failures[sequence_id] = f"position {position + count} lies behind the known ids"
            elif position + count > len(state.blocks) * self.block_size:
                failures[sequence_id] = f"position {position + count} has no block"
            else:
                items.append(Item(state, position, count, wanted))
        items.sort(key=lambda item: (item.num_tokens > 1, item.end))
        return items

    def _batch(
        self, items: Sequence[Item], samples: Sequence[Item], prompts: Sequence[Item]
    ) -> ForwardBatch:
        return build_batch(items, samples, prompts, block_size=self.block_size, device=self._device)

    def _tensor(self, values: Sequence[object]) -> torch.Tensor:
        return to_device(values, dtype=torch.int64, device=self._device)

    def _prompt_scores(self, logits: torch.Tensor, prompts: list[Item]) -> Scores:
        """Those of the next prompt token after each row, all items in one column."""
        targets: list[int] = []
        for item in prompts:
            first = item.position + 1
            targets += item.state.ids[first : first + prompt_rows(item)]
        width = max(item.state.top_n_tokens for item in prompts)
        return score(logits, self._tensor(targets), width, self._scorer)

    def _quarantine(self, state: GenerationState) -> None:
        """Stop a sequence whose values are not finite, and whoever shares such a block with it.

        The blocks are cleaned for their next owner: a masked read of NaN is still NaN. Those of
        a shared prefix that are finite stay as they are. A block is bad on all ranks or on none,
        or they would not stop the same sequences.
        """
        assert self.cache is not None
        state.has_failed = True
        counts = self._parallel.all_reduce(self.cache.num_non_finite(state.blocks)).tolist()
        bad = {block for block, count in zip(state.blocks, counts, strict=True) if count}
        if bad:
            self.cache.clear(sorted(bad))
            for other in self._states.values():
                other.has_failed = other.has_failed or not bad.isdisjoint(other.blocks)

    def _mark_start(self) -> tuple[torch.cuda.Event, torch.cuda.Event, torch.cuda.Event] | None:
        if self._device.type != "cuda":
            return None
        start, drawing, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        start.record()
        return start, drawing, end


def _warmup_sequence(number: int, length: int) -> NewSequence:
    return NewSequence(
        id=number,
        token_ids=[1] * length,
        num_prompt_tokens=length,
        sampling=SamplingParams(do_sample=True, top_k=10, top_p=0.9, typical_p=0.9),
    )
