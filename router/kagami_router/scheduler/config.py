"""The limits that a scheduler works within."""

from dataclasses import dataclass

# TGI's defaults for whichever of the two knobs is not given while the other is.
DEFAULT_WAITING_SERVED_RATIO = 0.3
DEFAULT_MAX_WAITING_TOKENS = 20


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """The pool and the limits of a step.

    `waiting_served_ratio`, `max_waiting_tokens`: when newcomers may interrupt decoding, in TGI's
    sense; with neither they join as soon as the budget allows. `max_steps_in_flight`: with two, one
    runs while the router handles the result of the one before it.
    `cache_grows_to`: while more blocks than this are cached, the oldest is given again before one
    that was never used, whose memory is not taken yet; None: all blocks are alike.
    """

    num_blocks: int
    block_size: int
    max_step_tokens: int
    max_batch_size: int
    waiting_served_ratio: float | None = None
    max_waiting_tokens: int | None = None
    prefix_caching: bool = True
    max_steps_in_flight: int = 2
    cache_grows_to: int | None = None

    def __post_init__(self) -> None:
        if self.max_step_tokens < 1 or self.max_batch_size < 1:
            raise ValueError("a step needs room for one token and one sequence")
