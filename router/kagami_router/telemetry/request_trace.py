"""What the span of a request says of its generations: `gen_ai.*`, and text only where asked for."""

import json
from collections.abc import Mapping, Sequence

from opentelemetry import trace

from kagami_proto.span_names import Key
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
    with_content: bool,
) -> None:
    """Write what a call brought to the current span; its text only `with_content`."""
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
    if with_content:
        span.set_attributes(_content(finished))


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
