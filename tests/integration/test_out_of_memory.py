"""A shard that finds too little memory while it loads, in two ways: refused, and killed."""

import contextlib
import json
import math
import os
import resource
import signal
import struct
from pathlib import Path

import pytest
from tests.fakes.byte_tokenizer import EOS, byte_tokenizer
from tests.integration.conftest import free_port, launch
from tests.integration.test_processes import descendants, within

pytestmark = pytest.mark.slow

GIB = 2**30
VOCABULARY, HIDDEN, HEAD = 2**20, 2**11, 64
LAYER = "layers.0"
SHAPES: dict[str, tuple[int, ...]] = {
    "embed_tokens": (VOCABULARY, HIDDEN),
    "norm": (HIDDEN,),
    f"{LAYER}.input_layernorm": (HIDDEN,),
    f"{LAYER}.post_attention_layernorm": (HIDDEN,),
    **{f"{LAYER}.self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"},
    **{f"{LAYER}.mlp.{name}_proj": (HEAD, HIDDEN) for name in ("gate", "up")},
    f"{LAYER}.mlp.down_proj": (HIDDEN, HEAD),
}
NO_CARD = {"CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def four_gibibytes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose embedding alone has 4 GiB; the file is a hole and takes no room."""
    folder = tmp_path_factory.mktemp("four-gibibytes")
    tensors, end = {}, 0
    for name, shape in SHAPES.items():
        start, end = end, end + 2 * math.prod(shape)
        tensors[f"model.{name}.weight"] = {
            "dtype": "F16",
            "shape": shape,
            "data_offsets": [start, end],
        }
    header = json.dumps(tensors).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + end)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": HEAD,
        "num_hidden_layers": 1,
        "num_attention_heads": HIDDEN // HEAD,
        "tie_word_embeddings": True,
        "max_position_embeddings": 256,
        "torch_dtype": "float16",
        "eos_token_id": EOS,
    }
    (folder / "config.json").write_text(json.dumps(config))
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def processes_about(folder: Path) -> list[str]:
    """The ids of all processes whose command line names the folder."""
    names = bytes(folder)
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it may have ended meanwhile
            if names in (entry / "cmdline").read_bytes():
                found.append(entry.name)
    return found


def shards_of(launcher: int) -> list[int]:
    """The shards that a launcher has started."""
    with contextlib.suppress(OSError):  # another child may end meanwhile
        return [
            pid
            for pid in descendants(launcher)
            if b"text-generation-server" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
    return []


@pytest.mark.parametrize(
    ("limit", "wish"),
    [(3 * GIB, "unable to mmap"), (6 * GIB, "can't allocate memory")],
    ids=["the file is not mapped", "the tensor is not allocated"],
)
def test_a_model_that_does_not_fit_is_named_as_such(
    four_gibibytes: Path, tmp_path: Path, limit: int, wish: str
) -> None:
    process, log = launch(tmp_path, free_port(), "--model-id", str(four_gibibytes), environ=NO_CARD)
    resource.prlimit(process.pid, resource.RLIMIT_DATA, (limit, limit))  # its children inherit it

    assert process.wait(timeout=60) == 1
    last = log.read_text().splitlines()[-2:]
    assert "Last error of the shard: Error when initializing model: not enough memory" in last[0]
    assert wish in last[0]
    assert last[1] == "Error: ShardCannotStart"
    assert "Traceback" not in log.read_text()
    assert processes_about(tmp_path) == []


def test_a_shard_that_the_kernel_kills_while_it_loads_is_named(tmp_path: Path) -> None:
    process, log = launch(tmp_path, free_port())
    assert within(60, lambda: shards_of(process.pid) != [])
    (shard,) = shards_of(process.pid)

    os.kill(shard, signal.SIGKILL)  # what the kernel's out-of-memory killer does

    assert process.wait(timeout=10) == 1
    last = log.read_text().splitlines()[-2:]
    phrase = "was signaled to shutdown with signal 9 (out of memory?)"
    assert f"Last error of the shard: it {phrase}" in last[0]
    assert last[1] == "Error: ShardCannotStart"
    assert processes_about(tmp_path) == []
