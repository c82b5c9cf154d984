"""Which backend serves a model on a device.

| device | model          | backend                                                           |
|--------|----------------|-------------------------------------------------------------------|
| CPU    | a decoder      | native, if it may and can run here; torch until it is built       |
| CPU    | transformers'  | torch                                                             |
| CUDA   | any            | torch                                                             |

Torch serves several ranks of one model: the native library has no collectives.
"""

from pathlib import Path

import torch

from kagami_shard.backends.base import Backend
from kagami_shard.backends.native.select import LateBuild, Native
from kagami_shard.backends.torch.load import load_torch
from kagami_shard.machine.distributed import TensorParallel


def load_backend(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool,
    max_length: int,
    parallel: TensorParallel,
    quantize: str | None,
    memory_fraction: float,
    native: Native | None,
) -> tuple[Backend, LateBuild | None]:
    """Load the model of `folder`; arguments as `load_torch` has them. `native`: None forbids it.

    Also the build that has to be started, so that `Backend.upgrade` finds something faster later.
    """
    if parallel.size > 1:
        native = None
    backend = load_torch(
        folder,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        max_length=max_length,
        parallel=parallel,
        quantize=quantize,
        defers=native is not None and native.will_pack(dtype=dtype, device=device),
        memory_fraction=memory_fraction,
        successor=None if native is None else native.take_over,
    )
    return (backend, None) if native is None else native.choose(backend)
