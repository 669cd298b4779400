"""One format for all code, and a size for train_gpt.py, counted in Python tokens.

Formatting cannot change a count of tokens; a docstring is one of them and comments are none, so
explaining costs nothing."""

import collections
import importlib.util
import io
import subprocess
import sys
import tokenize

import pytest
from helpers import ROOT

BUDGET = 32_488  # 31,488 tokens on 28 November 2026, and 1,000 for forks
MOST_PER_LINE, MEAN_PER_LINE = 40, 11
NO_CODE = {"NL", "NEWLINE", "COMMENT", "INDENT", "DEDENT", "ENCODING", "ENDMARKER"}


def tokens(text: str):
    """Tokens of the code; an f-string is one, also since Python 3.12, which splits it."""
    depth = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        name = tokenize.tok_name[token.type]
        inside = depth > 0
        depth += name in ("FSTRING_START", "TSTRING_START")
        depth -= name in ("FSTRING_END", "TSTRING_END")
        if name not in NO_CODE and not inside:
            yield token


def per_line(text: str) -> collections.Counter:
    return collections.Counter(token.start[0] for token in tokens(text))


def test_the_count():
    assert sum(per_line("x = 1  # one\n").values()) == 3
    assert sum(per_line('f(f"{a + b!r:>{w}} and {c}", "d")\n\n').values()) == 6
    assert per_line('def f():\n    """Two\n    lines."""\n    return 1\n') == {1: 5, 2: 1, 4: 2}


def check_size(text: str):
    """Of the trainer, or of a fork of it."""
    counts = per_line(text)
    total = sum(counts.values())
    assert total <= BUDGET, f"train_gpt.py has {total:,} tokens, {BUDGET:,} are allowed"
    assert total / len(counts) <= MEAN_PER_LINE
    long = {number: count for number, count in counts.items() if count > MOST_PER_LINE}
    assert not long, f"lines of more than {MOST_PER_LINE} tokens: {long}"


def test_the_size_of_the_trainer():
    check_size((ROOT / "train_gpt.py").read_text(encoding="utf-8"))


@pytest.mark.parametrize("command", [["format", "--check"], ["check"]], ids=" ".join)
def test_ruff(command):
    """Over all code but the frozen copies in record folders (pyproject.toml)."""
    if importlib.util.find_spec("ruff") is None:
        pytest.skip("ruff is not installed: pip install -r tests/requirements.txt")
    command = [sys.executable, "-m", "ruff", *command, "--no-cache", str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
