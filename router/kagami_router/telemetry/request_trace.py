"""What the span of a request says of its generations: `gen_ai.*`, and text only where asked for."""

import json
from collections.abc import Mapping, Sequence

from opentelemetry import trace

from kagami_proto.span_names import Key, OtherServersKey
from kagami_router.request.values import End, ValidRequest


def describe_request(request: ValidRequest) -> None:
    """Write how a request samples to the current span."""
    span = trace.get_current_span()
    if not span.is_recording():
        return
    sampling = request.sampling
    span.set_attributes(
        {
            Key.MAX_TOKENS: request.stopping.max_new_tokens,
            Key.INPUT_TOKENS: len(request.prompt_ids),
            Key.FREQUENCY_PENALTY: sampling.frequency_penalty,
            Key.PRESENCE_PENALTY: sampling.presence_penalty,
        }
    )
    if sampling.do_sample:
        span.set_attributes(
            {
                Key.TEMPERATURE: sampling.temperature,
                Key.TOP_P: sampling.top_p,
                Key.TOP_K: sampling.top_k,
                # OTLP's integers are signed.
                Key.SEED: sampling.seed if sampling.seed < 1 << 63 else str(sampling.seed),
            }
        )
    else:
        span.set_attribute(Key.TEMPERATURE, 0.0)


def describe_answer(
    finished: Sequence[tuple[ValidRequest, End]],
    *,
    answer_id: str,
    received: float,
    durations: Mapping[str, str],
    with_content: bool,
) -> None:
    """Write what a call brought to the current span; its text only `with_content`.

    `durations` are TGI's, as its spans have them.
    """
    span = trace.get_current_span()
    if not span.is_recording():
        return
    ends = [end for _, end in finished]
    first_token = min(end.timings.first_token for end in ends)
    span.set_attributes(
        {
            Key.FINISH_REASONS: [end.finish_reason.value for end in ends],
            Key.CHOICE_COUNT: len(ends),
            Key.RESPONSE_ID: answer_id,
            Key.INPUT_TOKENS: sum(len(request.prompt_ids) for request, _ in finished),
            Key.OUTPUT_TOKENS: sum(end.num_generated for end in ends),
            Key.CACHED_INPUT_TOKENS: sum(end.cached_tokens for end in ends),
            Key.TIME_TO_FIRST_CHUNK: first_token - received,
            Key.DEVICE_MS: max(end.timings.device_s for end in ends) * 1e3,
        }
    )
    span.set_attributes({**durations, OtherServersKey.SEED: _seed_as_in_rust(finished[0][0])})
    span.set_attributes(_latencies(ends, received))
    if with_content:
        span.set_attributes(_content(finished))


def _seed_as_in_rust(request: ValidRequest) -> str:
    """TGI writes its `Option<u64>` as Rust's debug format does."""
    sampling = request.sampling
    return f"Some({sampling.seed})" if sampling.do_sample else "None"


def _latencies(ends: Sequence[End], received: float) -> Mapping[str, float]:
    """Seconds; the longest of several generations counts, because they run at the same time."""
    timings = [end.timings for end in ends]
    first_token = min(one.first_token for one in timings)
    return {
        OtherServersKey.LATENCY_QUEUE: max(one.scheduled - one.submitted for one in timings),
        OtherServersKey.LATENCY_FIRST_TOKEN: first_token - received,
        OtherServersKey.LATENCY_TOTAL: max(one.finished for one in timings) - received,
        OtherServersKey.LATENCY_PREFILL: max(one.first_token - one.scheduled for one in timings),
        OtherServersKey.LATENCY_DECODE: max(one.finished - one.first_token for one in timings),
        OtherServersKey.LATENCY_INFERENCE: max(one.finished - one.scheduled for one in timings),
    }


def _content(finished: Sequence[tuple[ValidRequest, End]]) -> Mapping[str, str | list[str]]:
    """Prompts as the model read them, and answers, in the form of the conventions' messages."""
    prompts = dict.fromkeys(request.prompt_text for request, _ in finished)
    asked = [_message("user", text) for text in prompts]
    answered = [
        {**_message("assistant", end.generated_text), "finish_reason": end.finish_reason.value}
        for _, end in finished
    ]
    content: dict[str, str | list[str]] = {
        Key.INPUT_MESSAGES: json.dumps(asked, ensure_ascii=False),
        Key.OUTPUT_MESSAGES: json.dumps(answered, ensure_ascii=False),
    }
    if stop := finished[0][0].stopping.stop:
        content[Key.STOP_SEQUENCES] = list(stop)
    return content


def _message(role: str, text: str) -> dict[str, object]:
    return {"role": role, "parts": [{"type": "text", "content": text}]}
