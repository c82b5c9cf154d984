"""Warm up, admit, run a step, drop: the algorithm of a shard.

A step is *launched* (its work is given to the device) and *collected* (its results are read). On
a GPU the next step is launched before the last one is collected: it reads the sampled ids on the
device, before the host has them. One thread drives the engine.
"""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from math import isfinite

import torch

from kagami_proto.errors import InvalidCheckpoint, InvalidRequest
from kagami_proto.values import Grammar, Wanted
from kagami_shard.backends.base import Backend
from kagami_shard.engine.generation import GenerationState, Pending
from kagami_shard.engine.greedy_batch import GreedyBatch
from kagami_shard.engine.items import Item, build_batch, prompt_rows, samples_token
from kagami_shard.engine.launched import Launched, split_prompt_logprobs, top_tokens
from kagami_shard.engine.read_cost import ReadCost, read_cost
from kagami_shard.engine.step import NewSequence, Step, StepResult, Work
from kagami_shard.engine.warmup import WarmupLimits, measured_cache
from kagami_shard.forward.batch import ForwardBatch
from kagami_shard.forward.kv_cache import KVCache
from kagami_shard.forward.output import OutputKind
from kagami_shard.machine.bandwidth import Probe
from kagami_shard.machine.device import to_device
from kagami_shard.machine.distributed import Alone, TensorParallel
from kagami_shard.sampling.grammar import Banned, Grammars, nothing_to_fill
from kagami_shard.sampling.logprobs import Scores, score
from kagami_shard.sampling.sampler import Drawn, draw
from kagami_shard.sampling.watermark import Watermark

logger = logging.getLogger(__name__)

NOT_FINITE = "the model's output is not finite"
# What a work item can want and this engine cannot do.
_NOT_SERVED = {
    Wanted.VERIFY: "this shard does not verify drafts",
    Wanted.VECTOR: "this shard gives no vectors",
}


class Engine:
    """One model, its KV cache and the sequences in memory."""

    def __init__(
        self,
        backend: Backend,
        *,
        block_size: int,
        parallel: TensorParallel | None = None,
        grammars: Grammars | None = None,
        watermark: Watermark | None = None,
        probe: Probe | None = None,
        why_not_finite: Callable[[], str] | None = None,
    ) -> None:
        """`probe` measures the bandwidth of the memory at the warm-up; None: it is not measured.

        `why_not_finite` is asked when the warm-up's output is no distribution, and reads all files.
        """
        self._why_not_finite = why_not_finite
        self._backend = backend
        self._parallel = parallel or Alone()
        self._grammars = grammars
        self._watermark = watermark or Watermark()
        self._greedy: GreedyBatch | None = None
        """The last step, if the next one may go on with it"""
        self._states: dict[int, GenerationState] = {}
        self.block_size = block_size
        self.cache: KVCache | None = None
        self.read_cost = ReadCost(0, 0, 0.0)
        """Known when warm"""
        self._probe = probe

    @property
    def backend(self) -> Backend:
        return self._backend

    def upgrade(self) -> None:
        """Between two steps: let a faster backend compute from now on, if one became ready."""
        self._backend = self._backend.upgrade(self.cache)
        self._greedy = None

    def recover(self, error: Exception) -> None:
        """After a step that raised `error`; raises it again if no later step can succeed."""
        self._backend.recover(error)

    # ------------------------------------------------------------------ warm-up

    def warmup(self, limits: WarmupLimits) -> KVCache:
        """Run a step, measure memory, allocate the cache; a second call returns the same cache.

        Ranks may find room for different numbers of blocks; the router uses the smallest. Raises
        torch.OutOfMemoryError, `RankLost`, and `InvalidCheckpoint` if every generation would fail.
        """
        if self.cache is None:
            started = time.monotonic()
            backend = self._backend
            with self._parallel.together():
                bandwidth = self._probe(backend.device) if self._probe else 0.0
                self.cache = measured_cache(
                    backend, limits, block_size=self.block_size, run=self._warmup_step
                )
                self.read_cost = read_cost(backend, bandwidth)
            logger.info("Warm-up done", extra={"seconds": round(time.monotonic() - started, 2)})
        return self.cache

    def _warmup_step(self, items: list[Item], cache: KVCache) -> None:
        """Raises `InvalidCheckpoint` if its rows have no distribution: no generation would."""
        if not bool(self._forward_and_draw(items, cache).logprobs.isfinite().all()):
            why = f": {self._why_not_finite()}" if self._why_not_finite else ""
            raise InvalidCheckpoint(f"{NOT_FINITE}{why}")

    @torch.inference_mode()
    def _forward_and_draw(self, items: list[Item], cache: KVCache) -> Drawn:
        return self._draw(self._logits(self._batch(items, items, []), cache), items)

    def take_memory_ahead(self) -> bool:
        """Use some idle milliseconds to take memory; False: there is no more to take."""
        return self.cache is not None and self.cache.take_ahead()

    # ------------------------------------------------------------------ steps

    def reset(self) -> None:
        """Forget every sequence."""
        self._states.clear()
        self._greedy = None

    def compile_grammar(self, grammar: Grammar) -> None:
        """Make `grammar` ready for a sequence, on any thread. Raises `InvalidRequest`."""
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

        Raises what the forward pass raises; nothing was sampled then. Raises `RankLost` if another
        rank did not raise as well.
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
        greedy = GreedyBatch.of(self._backend, self.cache, items, step.work)
        if greedy is not None:
            return self._decode(greedy, step.number, failures, started_ns, admission_ns)
        elapsed = self._backend.elapsed(started_ns)
        batch = self._batch(items, samples, prompts)
        with self._filling(samples) as masks:
            logits = self._logits(batch, self.cache)
        banned = masks.result()
        elapsed.forward_ends()
        drawn = self._draw(logits[: len(samples)], samples, banned)
        prompt_scores = self._prompt_scores(logits[len(samples) :], prompts) if prompts else None
        for row, item in enumerate(samples):
            item.state.expect(Pending(drawn.token_ids, row))
        elapsed.step_ends()
        return Launched(
            number=step.number,
            items=samples,
            drawn=drawn,
            prompt_items=prompts,
            prompt_scores=prompt_scores,
            failures=failures,
            started_ns=started_ns,
            admission_ns=admission_ns,
            elapsed=elapsed,
        )

    def _decode(
        self,
        batch: GreedyBatch,
        number: int,
        failures: dict[int, str],
        started_ns: int,
        admission_ns: int,
    ) -> StepResult:
        """Compute a step of `batch`; the next step may go on with it."""
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
        """The rows that have a distribution; the sequences of the others fail."""
        finite = [row for row, logprob in enumerate(logprobs) if isfinite(logprob)]
        with torch.inference_mode():
            for row in set(range(len(ids))).difference(finite):
                failures[ids[row]] = NOT_FINITE
                self._quarantine(self._states[ids[row]])
        return (
            [ids[row] for row in finite],
            [token_ids[row] for row in finite],
            [logprobs[row] for row in finite],
        )

    def _filling(self, items: Sequence[Item]) -> AbstractContextManager[Future[Banned | None]]:
        """The masks of the items' grammars, computed while the context's body runs."""
        if self._grammars is None:
            return nullcontext(nothing_to_fill())
        return self._grammars.filling([item.state.grammar for item in items])

    def _draw(self, logits: torch.Tensor, items: list[Item], banned: Banned | None = None) -> Drawn:
        """A token for each item, the same on every rank.

        The gathered logits have the same bits everywhere, so greedy choices agree by themselves.
        A random draw reads a running sum, which a GPU may round differently each time: the draw of
        rank 0 counts.
        """
        rows = [item.state.row() for item in items]
        drawn = draw(
            logits, rows, banned=banned, watermark=self._watermark, scorer=self._backend.scorer
        )
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
        sampled: list[int] = []
        for row, item in enumerate(launched.items):
            if finite[row]:
                item.state.take(token_ids[row])
                if item.state.grammar is not None and (error := item.state.grammar.error):
                    failures[item.state.id] = f"the grammar stopped the sequence: {error}"
                else:
                    sampled.append(row)
            else:
                failures[item.state.id] = NOT_FINITE
                self._quarantine(item.state)
        finished_ns = time.perf_counter_ns()
        device_ns, sampling_ns = launched.elapsed.times()
        return StepResult(
            number=launched.number,
            ids=[launched.items[row].state.id for row in sampled],
            token_ids=[token_ids[row] for row in sampled],
            logprobs=[logprobs[row] for row in sampled],
            top_tokens=top_tokens(launched, sampled),
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
        size = self._backend.model.vocab_size
        if (largest := max(new.token_ids)) >= size:
            return f"token id {largest} is not below the vocabulary's {size}"
        largest = max((token_id for token_id, _ in new.sampling.logit_bias), default=0)
        if largest >= size:
            return f"the biased token id {largest} is not below the vocabulary's {size}"
        return ""

    def _items(self, work: Iterable[Work], failures: dict[int, str]) -> list[Item]:
        """The work that can be done, single tokens first, by length; the rest are `failures`."""
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
        device = self._backend.device
        return build_batch(items, samples, prompts, block_size=self.block_size, device=device)

    def _logits(self, batch: ForwardBatch, cache: KVCache) -> torch.Tensor:
        """Logits after the selected rows; the next step may use their memory again."""
        logits = self._backend.run(batch, cache, OutputKind.LOGITS).logits
        assert logits is not None
        return logits

    def _prompt_scores(self, logits: torch.Tensor, prompts: list[Item]) -> Scores:
        """The scores of the prompt token that follows each row, for all items in one column."""
        targets: list[int] = []
        for item in prompts:
            first = item.position + 1
            targets += item.state.ids[first : first + prompt_rows(item)]
        width = max(item.state.top_n_tokens for item in prompts)
        target_ids = to_device(targets, dtype=torch.int64, device=self._backend.device)
        return score(logits, target_ids, width, self._backend.scorer)

    def _quarantine(self, state: GenerationState) -> None:
        """Stop a sequence whose values are not finite, and all that share such a block with it.

        The bad blocks are cleared for their next owner: a masked read of NaN is still NaN. Finite
        blocks of a shared prefix stay as they are. A block counts as bad on all ranks or on none,
        so that all ranks stop the same sequences.
        """
        assert self.cache is not None
        state.has_failed = True
        counts = self._parallel.all_reduce(self.cache.num_non_finite(state.blocks)).tolist()
        bad = {block for block, count in zip(state.blocks, counts, strict=True) if count}
        if bad:
            self.cache.clear(sorted(bad))
            for other in self._states.values():
                other.has_failed = other.has_failed or not bad.isdisjoint(other.blocks)
