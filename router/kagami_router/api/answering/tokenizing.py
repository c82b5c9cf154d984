"""Answers the routes that tokenize and do not generate."""

from collections.abc import Awaitable, Callable

from aiohttp import web

from kagami_router.api.web.app_state import AppState, state_of
from kagami_router.api.web.json_response import JsonAnswer, json_response
from kagami_router.api.web.sending import sent


async def respond_tokens(
    request: web.Request, answer: Callable[[AppState], Awaitable[JsonAnswer]]
) -> web.StreamResponse:
    """What `answer` makes, under a permit that is held until the client has it.

    These permits are as many as those of generations, and are others: a flood of one kind refuses
    nothing of the other kind. Raises `Overloaded`.
    """
    state = state_of(request)
    with state.tokenize_permits.take():
        return await sent(request, json_response(await answer(state)))
