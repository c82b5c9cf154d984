"""The seed article from start to end, with a small model in exactly its model's form."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import sentencepiece
from huggingface_hub import InferenceClient
from tests.fakes import tiny_swallow
from tests.fakes.fake_hub import FakeHub
from tests.fakes.pieces import SAMPLES
from tests.fakes.tiny_swallow import ANSWER, QUESTION
from tests.integration.conftest import Server, running

pytestmark = pytest.mark.slow
REPLACEMENT = "\ufffd"
MODEL_ID = "tokyotech-llm/Swallow-7b-hf"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_swallow.write(tmp_path_factory.mktemp("swallow") / "Swallow-7b-hf")


@pytest.fixture(scope="module")
def hub(checkpoint: Path) -> Iterator[FakeHub]:
    files = {file.name: file.read_bytes() for file in checkpoint.iterdir() if file.is_file()}
    fake = FakeHub()
    fake.add(MODEL_ID, files)
    with fake.serve():
        yield fake


@pytest.fixture(scope="module")
def environ(hub: FakeHub, checkpoint: Path) -> dict[str, str]:
    """A machine that has never seen the model, and its hub."""
    return {"HF_ENDPOINT": hub.url, "HF_HOME": str(checkpoint.parent / "data")}


@pytest.fixture(scope="module")
def swallow(checkpoint: Path, environ: dict[str, str]) -> Iterator[Server]:
    with running(checkpoint.parent, "--model-id", MODEL_ID, environ=environ) as server:
        yield server


def curl(url: str, body: str) -> str:
    command = ["curl", "-sS", url, "-X", "POST", "-d", body, "-H", "Content-Type: application/json"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_the_log_tells_the_articles_story(swallow: Server) -> None:
    log = swallow.log.read_text()
    story = [
        "INFO download: text_generation_launcher: Starting check and download process",
        "Download file: pytorch_model-0000",
        "Download: [2/2] -- ETA: 0",
        "🚨🚨BREAKING CHANGE in 2.0🚨🚨: Safetensors conversion is disabled without `--trust-",
        "Converting PyTorch weights to safetensors.",
        "Convert: [1/2] -- Took: 0:00:0",
        "Convert: [2/2] -- Took: 0:00:0",
        "INFO download: text_generation_launcher: Successfully downloaded weights",
        "INFO shard-manager: text_generation_launcher: Starting shard rank=0",
        "Server started at unix://",
        "INFO shard-manager: text_generation_launcher: Shard ready in",
        "Starting Webserver",
        "Connected",
    ]
    places = [log.find(line) for line in story]
    assert -1 not in places, (story[places.index(-1)], log)
    assert places == sorted(places)
    assert "Could not find a fast tokenizer" not in log
    loaded = next(line for line in log.splitlines() if "Model loaded" in line)
    assert "gigabytes=" in loaded
    assert "gigabytes_per_second=" in loaded


def test_generate_with_curl(swallow: Server) -> None:
    body = f'{{"inputs":"{QUESTION}","parameters":{{"max_new_tokens":200}}}}'
    assert json.loads(curl(f"{swallow.url}/generate", body)) == {"generated_text": ANSWER}


def test_generate_stream_with_curl(swallow: Server) -> None:
    body = f'{{"inputs":"{QUESTION}","parameters":{{"max_new_tokens":200}}}}'
    lines = curl(f"{swallow.url}/generate_stream", body).splitlines()
    events = [json.loads(line.removeprefix("data:")) for line in lines if line.startswith("data:")]
    texts = [event["token"]["text"] for event in events if not event["token"]["special"]]
    assert [event["index"] for event in events] == list(range(1, len(events) + 1))
    assert "".join(texts) == ANSWER
    assert REPLACEMENT not in "".join(lines)
    assert events[-1]["generated_text"] == ANSWER


def test_the_inference_clients_text_generation(swallow: Server) -> None:
    client = InferenceClient(model=swallow.url)
    response = client.text_generation(prompt=QUESTION, max_new_tokens=200)
    # `/` returns the prompt too where no pipeline tag is known, as TGI does for a local model.
    assert response == QUESTION + ANSWER


def test_the_inference_clients_stream(swallow: Server) -> None:
    client = InferenceClient(model=swallow.url)
    tokens = list(client.text_generation(prompt=QUESTION, max_new_tokens=20, stream=True))
    assert len(tokens) == 20
    assert ANSWER.startswith("".join(tokens))
    assert REPLACEMENT not in "".join(tokens)


@pytest.mark.parametrize("text", [text for text in SAMPLES if text and "<unk>" not in text])
def test_a_prompts_tokens_are_sentencepieces(swallow: Server, checkpoint: Path, text: str) -> None:
    judge = sentencepiece.SentencePieceProcessor(model_file=str(checkpoint / "tokenizer.model"))
    found = json.loads(curl(f"{swallow.url}/tokenize", json.dumps({"inputs": text})))
    assert [token["id"] for token in found] == [1, *judge.encode(text)]


def test_the_second_start_downloads_and_converts_nothing(
    swallow: Server, hub: FakeHub, checkpoint: Path, environ: dict[str, str]
) -> None:
    def weights() -> list[tuple[str, int, int]]:
        files = sorted((checkpoint.parent / "data").rglob("*.safetensors"))
        return [(file.name, file.stat().st_ino, file.stat().st_mtime_ns) for file in files]

    before, asked = weights(), len(hub.requests())
    with running(checkpoint.parent, "--model-id", MODEL_ID, environ=environ) as again:
        log = again.log.read_text()
    assert len(before) == 2
    assert weights() == before
    assert len(hub.requests()) - asked <= 1
    assert "Files are already present on the host. Skipping download." in log
    assert "Convert" not in log
