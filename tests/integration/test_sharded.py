"""A model split over two processes: the text is the same, and they start and end together."""

import json
import os
import signal
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tests.fakes.byte_tokenizer import EOS, byte_tokenizer
from tests.integration.conftest import Server, free_port, launch, running
from tests.integration.test_processes import alive, descendants, within
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.slow

PROMPTS = [f"{word} and then" for word in "one two three four five six seven eight".split()]


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose token is a byte; four heads, two of keys."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=EOS + 1,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=EOS,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    return folder


def flags(model: Path, num_shard: int) -> list[str]:
    return [
        *("--model-id", str(model), "--dtype", "float32"),
        *("--num-shard", str(num_shard), "--master-port", str(free_port())),
    ]


@pytest.fixture(scope="module")
def cut(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("cut"), *flags(tiny_llama, 2)) as server:
        yield server


@pytest.fixture(scope="module")
def expected(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int]]:
    """What one shard answers, one prompt after the other."""
    with running(tmp_path_factory.mktemp("whole"), *flags(tiny_llama, 1)) as server:
        return {prompt: generate(server, prompt) for prompt in PROMPTS}


def post(server: Server, route: str, prompt: str, **parameters: object) -> str:
    body = {"inputs": prompt, "parameters": {"max_new_tokens": 40, "details": True, **parameters}}
    request = urllib.request.Request(
        f"{server.url}/{route}", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return str(answer.read().decode())


def generate(server: Server, prompt: str, **parameters: object) -> list[int]:
    details = json.loads(post(server, "generate", prompt, **parameters))["details"]
    return [token["id"] for token in details["tokens"]]


def stream(server: Server, prompt: str) -> list[int]:
    lines = post(server, "generate_stream", prompt).splitlines()
    events = [json.loads(line[5:]) for line in lines if line.startswith("data:")]
    return [event["token"]["id"] for event in events]


def test_two_shards_say_what_one_says(cut: Server, expected: dict[str, list[int]]) -> None:
    assert {prompt: generate(cut, prompt) for prompt in PROMPTS} == expected


def test_two_shards_stream_to_eight_clients_what_one_says(
    cut: Server, expected: dict[str, list[int]]
) -> None:
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda prompt: stream(cut, prompt), PROMPTS))
    assert dict(zip(PROMPTS, answers, strict=True)) == expected


def test_a_seeded_draw_is_the_same_alone_and_among_others(cut: Server) -> None:
    sampling = {"do_sample": True, "seed": 5, "temperature": 1.5, "top_p": 0.9}
    alone = generate(cut, PROMPTS[0], **sampling)
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda _: generate(cut, PROMPTS[0], **sampling), range(8)))
    assert answers == [alone] * 8


def test_the_log_names_every_rank(cut: Server) -> None:
    log = cut.log.read_text()
    wanted = (
        "Sharding model on 2 processes",
        "Starting shard rank=0",
        "Starting shard rank=1",
        "Starting Webserver",
    )
    positions = [log.index(text) for text in wanted]
    assert positions == sorted(positions)
    for rank in (0, 1):
        assert f"Server started at unix://{cut.log.parent}/" in log
        ready = [line for line in log.splitlines() if line.endswith(f"s rank={rank}")]
        assert any("Shard ready in" in line for line in ready)


def pid_of_rank(server: Server, rank: int) -> int:
    wanted = f"RANK={rank}".encode()
    (pid,) = (
        pid
        for pid in descendants(server.process.pid)
        if wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    )
    return pid


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("is_busy", [False, True])
def test_one_dead_rank_ends_the_tree(
    tiny_llama: Path, tmp_path: Path, rank: int, is_busy: bool
) -> None:
    with running(tmp_path, *flags(tiny_llama, 2)) as server, ThreadPoolExecutor(4) as clients:
        tree = descendants(server.process.pid)
        answers = [
            clients.submit(generate, server, prompt, max_new_tokens=200, ignore_eos=True)
            for prompt in PROMPTS[: 4 * is_busy]
        ]
        if is_busy:
            assert within(10, lambda: num_submitted(server) == 4)

        os.kill(pid_of_rank(server, rank), signal.SIGKILL)

        assert server.process.wait(timeout=15) == 1
        assert len(tree) == 3
        assert not any(alive(pid) for pid in tree)
        log = server.log.read_text()
        assert says_one_of(log, f"Shard {rank} crashed", "Webserver Crashed")
        for answer in answers:
            answer.exception(timeout=5)


def num_submitted(server: Server) -> int:
    """Requests that were let in and reached the batching loop."""
    return int(server.metric("tgi_request_input_length_count"))


def says_one_of(text: str, *wanted: str) -> bool:
    """Which of the two the launcher sees first is a race; both end the tree."""
    return any(each in text for each in wanted)


@pytest.mark.parametrize("is_busy", [False, True])
def test_sigterm_ends_all_ranks_within_five_seconds(
    tiny_llama: Path, tmp_path: Path, is_busy: bool
) -> None:
    with running(tmp_path, *flags(tiny_llama, 2)) as server, ThreadPoolExecutor(4) as clients:
        tree = descendants(server.process.pid)
        answers = [
            clients.submit(generate, server, prompt, max_new_tokens=100, ignore_eos=True)
            for prompt in PROMPTS[: 4 * is_busy]
        ]
        if is_busy:
            assert within(10, lambda: num_submitted(server) == 4)
        server.process.send_signal(signal.SIGTERM)

        assert server.process.wait(timeout=5) == 0
        assert not any(alive(pid) for pid in tree)
        assert "Traceback" not in server.log.read_text()
        for answer in answers:
            assert len(answer.result(timeout=5)) == 100


def test_a_number_of_shards_that_does_not_divide_is_one_clear_line(
    tiny_llama: Path, tmp_path: Path
) -> None:
    process, log = launch(tmp_path, free_port(), *flags(tiny_llama, 3))

    assert process.wait(timeout=60) == 1
    text = log.read_text()
    assert "`num_heads` must be divisible by `num_shards` (got `num_heads`: 4" in text
    assert "Error: ShardCannotStart" in text
    assert "Traceback" not in text
