"""Other servers, and which of them are installed below a folder. Data and pure look-ups.

A peer is installed when its program and its form of the model are there. Everything that a peer is
told stands in `PEERS`; the fields in braces are those of `Peer.command`.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

# 16 clients of up to 1,096 tokens: the same room for everybody.
_MAX_LENGTH = 2048


@dataclass(frozen=True, slots=True)
class Peer:
    """One server with weights of one kind."""

    name: str
    maker: str
    """Its column in the table."""
    program: str
    """Below the peers' folder."""
    model: str
    """Its form of the model, below the peers' folder."""
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    preload: tuple[str, ...] = ()
    """Libraries for LD_PRELOAD; those that are not there are left out."""
    start_limit_s: float = 120


@dataclass(frozen=True, slots=True)
class Installed:
    """A peer that can be started."""

    peer: Peer
    program: Path
    model: Path
    root: Path

    def command(self, *, port: int, num_threads: int) -> list[str]:
        """What starts it on a port of the loopback interface."""
        values = self._values() | {"port": str(port), "threads": str(num_threads)}
        return [part.format(**values) for part in self.peer.command]

    def environment(self, base: Mapping[str, str], *, cores: Iterable[int]) -> dict[str, str]:
        """`base` with what the peer needs on `cores`, and without what is ours."""
        values = self._values() | {"cores": ",".join(map(str, sorted(cores)))}
        made = {name: value for name, value in base.items() if name != "PYTHONPATH"}
        made["PATH"] = f"{self.program.parent}{os.pathsep}{base.get('PATH', os.defpath)}"
        made |= {name: text.format(**values) for name, text in self.peer.environment.items()}
        libraries = [text.format(**values) for text in self.peer.preload]
        if there := [library for library in libraries if Path(library).exists()]:
            made["LD_PRELOAD"] = ":".join(there)
        return made

    def _values(self) -> dict[str, str]:
        here = Path(__file__).parent
        paths = {"program": self.program, "model": self.model, "root": self.root, "here": here}
        return {name: str(path) for name, path in paths.items()}


# vLLM keeps a core free for its front unless it is told which cores to compute on; tcmalloc and
# Intel's OpenMP in front are what its documentation recommends.
_VLLM_COMMAND = (
    "{program}", "serve", "{model}", "--served-model-name", "model",
    "--host", "127.0.0.1", "--port", "{port}", "--dtype", "bfloat16",
    "--max-model-len", str(_MAX_LENGTH), "--max-num-seqs", "32",
    "--max-num-batched-tokens", "2048", "--enable-prefix-caching",
)  # fmt: skip
_VLLM_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_CPU_OMP_THREADS_BIND": "{cores}",
}
_VLLM_PRELOAD = (
    "/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4",
    "{root}/vllm/lib/libiomp5.so",
)
# 16 slots of 1,280 tokens each.
_LLAMACPP_COMMAND = (
    "{program}", "-m", "{model}", "--alias", "model", "--host", "127.0.0.1", "--port", "{port}",
    "-t", "{threads}", "-tb", "{threads}", "-np", "16", "-c", "20480", "--no-ui",
)  # fmt: skip
_OPENVINO_COMMAND = (
    "{program}", "{here}/openvino_front.py", "{model}", "--port", "{port}", "--threads", "{threads}"
)  # fmt: skip


def _vllm(name: str, model: str) -> Peer:
    return Peer(
        name=name,
        maker="vLLM",
        program="vllm/bin/vllm",
        model=model,
        command=_VLLM_COMMAND,
        environment=_VLLM_ENVIRONMENT,
        preload=_VLLM_PRELOAD,
        start_limit_s=300,
    )


def _llamacpp(name: str, model: str) -> Peer:
    program = "llamacpp-build/bin/llama-server"
    return Peer(name, "llama.cpp", program, model, _LLAMACPP_COMMAND)


PEERS: Mapping[str, Peer] = {
    peer.name: peer
    for peer in (
        _vllm("vllm-bf16", "models/{name}"),
        _vllm("vllm-w8a8", "models/{name}-w8a8"),
        # Weights in float16 on disk; OpenVINO computes in bfloat16 where the core has it.
        Peer(
            "openvino-bf16", "OpenVINO", "ov/bin/python", "models/{name}-ov-fp16", _OPENVINO_COMMAND
        ),
        _llamacpp("llamacpp-q8_0", "models/{name}-Q8_0.gguf"),
        _llamacpp("llamacpp-q4_0", "models/{name}-Q4_0.gguf"),
    )
}
MAKERS: tuple[str, ...] = tuple(dict.fromkeys(peer.maker for peer in PEERS.values()))


def find(root: Path, model: str, names: Iterable[str]) -> tuple[list[Installed], list[str]]:
    """Those of `names` that are installed for a model, and what the others lack."""
    found, lacking = [], []
    for name in names:
        peer = PEERS[name]
        program, weights = root / peer.program, root / peer.model.format(name=model)
        # A virtual environment's python is a link that may point nowhere: exists() follows it.
        missing = [path.name for path in (program, weights) if not path.exists()]
        if missing:
            lacking.append(f"{name} was not measured: no {' and no '.join(missing)}")
        else:
            found.append(Installed(peer, program, weights, root))
    return found, lacking
