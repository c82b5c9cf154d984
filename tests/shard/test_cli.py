import pwd
from pathlib import Path

import pytest

from kagami_shard import cli


def test_defaults(tmp_path: Path) -> None:
    args = cli.parse(["serve", str(tmp_path)], {})

    assert args.model_folder == tmp_path
    assert (args.dtype, args.uds_path) == ("bfloat16", "/tmp/text-generation-server")
    assert (args.rank, args.world_size, args.max_total_tokens) == (0, 1, 0)


@pytest.mark.parametrize(
    ("environ", "folder"),
    [
        ({"XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/x/kagami/native"),
        ({"HOME": "/h"}, "/h/.cache/kagami/native"),
        ({}, "~/.cache/kagami/native"),
    ],
)
def test_a_user_without_a_home_has_a_cache_all_the_same(
    environ: dict[str, str], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_entry(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", no_entry)
    assert cli.cache_folder(environ) == Path(folder)


def test_rank_and_limits_come_from_the_environment(tmp_path: Path) -> None:
    environ = {"RANK": "1", "WORLD_SIZE": "2", "MAX_TOTAL_TOKENS": "77"}

    args = cli.parse(["serve", str(tmp_path)], environ)

    assert (args.rank, args.world_size, args.max_total_tokens) == (1, 2, 77)


def test_watermarks_come_from_the_environment(tmp_path: Path) -> None:
    args = cli.parse(["serve", str(tmp_path)], {"WATERMARK_GAMMA": "0.25"})

    assert (args.watermark_gamma, args.watermark_delta) == (0.25, 2.0)


@pytest.mark.parametrize(
    ("argv", "environ", "word"),
    [
        (["serve", "/no/such/folder"], {}, "/no/such/folder"),
        (["serve", "/tmp", "--dtype", "int3"], {}, "int3"),
        (["serve", "/tmp", "--unknown"], {}, "--unknown"),
        (["serve", "/tmp"], {"RANK": "first"}, "first"),
    ],
)
def test_a_usage_error_is_one_line_and_exit_code_2(
    argv: list[str], environ: dict[str, str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        cli.parse(argv, environ)

    error = capsys.readouterr().err
    assert raised.value.code == 2
    assert error.count("\n") == 1
    assert word in error


@pytest.mark.parametrize("value", ["-5000", "nan", str(2**32), "9" * 5000])
@pytest.mark.parametrize(
    "variable",
    "RANK WORLD_SIZE MASTER_PORT CUDA_MEMORY_FRACTION MAX_TOTAL_TOKENS WATERMARK_GAMMA"
    " WATERMARK_DELTA OMP_NUM_THREADS".split(),
)
def test_a_number_out_of_range_is_refused_by_its_name(
    variable: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.parse(["serve", str(tmp_path)], {variable: value})
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert variable in error
    assert "expected a" in error
