from collections.abc import Callable, Iterator

import pytest
from tests.router.text.templates.bombs import BOMBS

from kagami_proto.errors import TemplateError
from kagami_router.text.templates.process import RenderProcess
from kagami_router.text.templates.prompt import Job
from kagami_router.text.templates.values import Arguments, NoContent

Starts = Callable[..., RenderProcess]


@pytest.fixture
def starts() -> Iterator[Starts]:
    started: list[RenderProcess] = []

    def start(**sources: str) -> RenderProcess:
        started.append(RenderProcess(sources))
        return started[-1]

    yield start
    for process in started:
        process.close()


def job(template: str, **variables: object) -> Job:
    return Job(template, [{"role": "user", "content": "Hi"}], variables, None, None)


def test_a_process_renders_job_after_job(starts: Starts) -> None:
    process = starts(a="{{ messages[0].content }}{{ x }}", b="{{ x }}")
    assert process.prompt(job("a", x="é\ud800")) == "Hié\ud800"
    assert process.prompt(job("b", x=Arguments('{"a":1}', {"a": 1}))) == '{"a":1}'
    assert process.prompt(job("a", x=NoContent())) == "Hi"


def test_errors_of_a_template_come_back(starts: Starts) -> None:
    process = starts(a="{{ raise_exception('only ' ~ x) }}", b="{{ 1 / 0 }}")
    with pytest.raises(TemplateError, match="only user"):
        process.prompt(job("a", x="user"))
    with pytest.raises(TemplateError, match="ZeroDivisionError"):
        process.prompt(job("b"))


def test_what_takes_too_long_ends_and_the_next_job_has_a_new_process(starts: Starts) -> None:
    process = starts(loops=BOMBS["loops"], fine="{{ 1 }}")
    with pytest.raises(TemplateError, match=r"rendering took more than 0\.2 s"):
        process.prompt(job("loops"), 0.2)
    assert process.prompt(job("fine")) == "1"


@pytest.mark.parametrize("name", ["center", "str.zfill", "format", "slice", "+"])
def test_what_takes_too_much_memory_is_refused(starts: Starts, name: str) -> None:
    process = starts(bomb=BOMBS[name], fine="{{ 1 }}")
    with pytest.raises(TemplateError, match=r"512 MB|MemoryError|took more than|process ended"):
        process.prompt(job("bomb"), 3)
    assert process.prompt(job("fine")) == "1"


def test_a_process_that_was_killed_is_an_error_of_one_job(starts: Starts) -> None:
    process = starts(a="{{ 1 }}")
    process.prompt(job("a"))
    assert process._running is not None
    process._running.kill()
    process._running.wait()
    with pytest.raises(TemplateError, match=r"the rendering process ended \(signal 9\)"):
        process.prompt(job("a"))
    assert process.prompt(job("a")) == "1"


def test_messages_that_are_nested_too_deeply_are_refused(starts: Starts) -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(TemplateError, match="nested too deeply"):
        starts(a="").prompt(job("a", x=deep))
    while deep:  # else it is freed in one recursion
        deep = deep.pop()  # type: ignore[assignment]


def test_nothing_is_rendered_after_the_end(starts: Starts) -> None:
    process = starts(a="{{ 1 }}")
    process.prompt(job("a"))
    process.close()
    with pytest.raises(TemplateError, match="the server stops"):
        process.prompt(job("a"))
