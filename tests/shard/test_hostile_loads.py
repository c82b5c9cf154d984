"""Every mutant of a model folder is refused in one line or served; none ends the process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.fakes.model_folders import CONFIG, tensors, write_model
from tests.shard.hostile_loads import KINDS

from kagami_shard import cli

MUTANTS = 40
SECONDS_EACH = 10.0


def test_every_mutant_is_refused_in_one_line_or_served(tmp_path: Path) -> None:
    cache = cli.cache_folder(os.environ)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.shard.hostile_loads"),
            *(str(cache), str(tmp_path / "model"), str(MUTANTS)),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, (lines[-1:], done.stderr[-2000:])
    outcomes = [line.split(" ", 4) for line in lines]
    assert len(outcomes) == len(KINDS) * (1 + MUTANTS), "a reason has a line break"
    sound = [outcome for outcome in outcomes if outcome[1] == "0"]
    assert [(kind, word) for kind, _, _, word, *_ in sound] == [(kind, "served") for kind in KINDS]
    assert [outcome for outcome in outcomes if outcome[3] not in ("served", "refused")] == []
    assert [outcome for outcome in outcomes if float(outcome[2]) > SECONDS_EACH] == []


def deeply_nested(folder: Path) -> None:
    (folder / "config.json").write_text('{"a":' * 100_000)


def a_million_layers(folder: Path) -> None:
    write_model(folder, {**CONFIG, "num_hidden_layers": 10**6})


def a_matrix_of_another_shape(folder: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    write_model(folder, weights=tensors() | {name: tensors()[name][:, :1].repeat(5000, 1)})


def no_token_id(folder: Path) -> None:
    write_model(folder, {**CONFIG, "eos_token_id": -1})


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (deeply_nested, "config.json: its JSON is nested too deeply"),
        (a_million_layers, "config.json: num_hidden_layers must be a whole number from 1 to 1024"),
        (a_matrix_of_another_shape, "down_proj.weight has the shape [160000, 1], config.json says"),
        (no_token_id, "config.json: eos_token_id -1 is no token id"),
    ],
)
def test_a_shard_says_why_in_its_last_line_and_ends_with_1(
    spoil: object, words: str, tmp_path: Path
) -> None:
    assert callable(spoil)
    spoil(tmp_path)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "kagami_shard", "serve", str(tmp_path)),
            *("--uds-path", str(tmp_path / "shard"), "--dtype", "bfloat16"),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    text = done.stdout + done.stderr
    assert "Traceback" not in text
    assert words in text.splitlines()[-1]
