import subprocess
import sys
from pathlib import Path

import pytest

from kagami_benchmark.cli import BenchmarkArgs, Compare, parse
from kagami_benchmark.workload import NAMED, Length


def parsed(*argv: str) -> BenchmarkArgs:
    args = parse(argv, {})
    assert isinstance(args, BenchmarkArgs)
    return args


def test_without_flags_it_does_what_tgis_does() -> None:
    args = parsed()

    assert [one.concurrency for one in args.workloads] == [1, 2, 4, 8, 16, 32]
    assert args.workloads[0].prompt == Length(10, 10)
    assert args.workloads[0].output == Length(8, 8)
    assert (args.runs, args.warmups) == (10, 1)


def test_tgis_short_flags_are_understood() -> None:
    args = parsed("-b", "1", "-b", "4,8", "-s", "64-128", "-d", "16", "-r", "2", "-w", "0")

    assert [one.num_requests for one in args.workloads] == [1, 4, 8]
    assert args.workloads[0].prompt == Length(64, 128)
    assert (args.runs, args.warmups) == (2, 0)


def test_a_rate_sends_for_ten_seconds_unless_told_otherwise() -> None:
    assert parsed("--rate", "2.5").workloads[0].num_requests == 25
    assert parsed("--rate", "2.5", "--requests", "7").workloads[0].num_requests == 7


def test_named_workloads_run_three_times() -> None:
    args = parsed("--workload", "W2,W4")

    assert args.workloads == (NAMED["W2"], NAMED["W4"])
    assert args.runs == 3


def test_a_url_says_the_route() -> None:
    args = parsed("--peer", "other=http://h:1/v1/completions")

    assert [one.url for one in args.targets] == [
        "http://127.0.0.1:3000/generate_stream",
        "http://h:1/v1/completions",
    ]


def test_only_sampling_that_was_given_is_sent() -> None:
    args = parsed("--temperature", "0.5", "--do-sample")

    assert args.sampling == {"temperature": 0.5, "do_sample": True}


def test_the_key_comes_from_the_environment_too() -> None:
    args = parse([], {"API_KEY": "secret"})

    assert isinstance(args, BenchmarkArgs)
    assert args.api_key == "secret"


def test_comparing_measures_nothing() -> None:
    assert parse(["--compare", "a.json", "b.json"]) == Compare(Path("a.json"), Path("b.json"))


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--url", "ftp://x"], "argument --url: 'ftp://x' is no http URL"),
        (["--url", "http://x/y"], "argument --url: the path of 'http://x/y' is none of"),
        (["--peer", "http://x"], "argument --peer: 'http://x' is not NAME=URL"),
        (["--peer", "server=http://x"], "--peer: two servers have one name: server, server"),
        (["-b", "0"], "argument -b/--batch-size: '0' is no count from 1 to 1000000"),
        (["--rate", "-1"], "argument --rate: '-1' is no number above 0"),
        (["-s", "9-3"], "argument -s/--sequence-length: '9-3': the first number is the greater"),
        (["--workload", "W9"], "argument --workload: 'W9' is none of W1, W2, W3, W4, all"),
        (["--workload", "W1", "-b", "2"], "--workload: its lengths and clients are fixed"),
        (["--prompt-kind", "ids"], "--prompt-kind ids needs --tokenizer-name"),
        (["--duration", "nan"], "argument --duration: 'nan' is no number above 0"),
        (["--bogus"], "unrecognized arguments: --bogus"),
    ],
)
def test_a_bad_flag_gets_one_clear_line(
    argv: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse(argv, {})

    said = capsys.readouterr().err
    assert said.startswith(f"error: {line}")
    assert said.count("\n") == 1


def test_help_loads_nothing_heavy() -> None:
    program = (
        "import sys; from kagami_benchmark.__main__ import main; sys.argv[1:] = ['--help']\n"
        "try: main()\n"
        "except SystemExit: print({'aiohttp', 'rich', 'msgspec', 'tokenizers'} & {*sys.modules})"
    )

    said = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)

    assert said.stdout.endswith(b"\nset()\n")
