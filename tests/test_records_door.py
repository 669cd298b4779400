"""python -m records: one door, from anywhere, and the misuse of it."""

import subprocess
import sys
from pathlib import Path

import pytest

from records.__main__ import MEASUREMENTS, VERBS, main
from records.tools import command

ROOT = Path(__file__).resolve().parents[1]


def call(*words, cwd=ROOT):
    return subprocess.run([sys.executable, *words], cwd=cwd, capture_output=True, text=True)


def test_help_lists_every_verb(capsys):
    assert main([]) == main(["--help"]) == 0
    out = capsys.readouterr().out
    for verb, what in (VERBS | MEASUREMENTS).items():
        assert f"    {verb}" in out and what in out


def test_unknown_and_missing_verbs(monkeypatch, capsys):
    assert (
        main(["verfy"]) == 2 and "no verb 'verfy'; choose one of verify" in capsys.readouterr().err
    )
    monkeypatch.setitem(VERBS, "unwritten", "a verb without a module")
    assert main(["unwritten"]) == 2 and "this clone has no unwritten" in capsys.readouterr().err


def test_a_verb_imports_only_itself():
    """Reading logs must not wait for torch, nor for pictures."""
    code = "import sys; from records import __main__ as door; door.main(['verify', 'none'])"
    done = call("-c", code + "; print(*sys.modules)")
    loaded = set(done.stdout.split())
    assert done.stderr.startswith("records verify: none does not exist")
    assert "records.tools.verify" in loaded
    assert not loaded & {"torch", "matplotlib", "train_gpt", "records.tools.race"}


def test_from_anywhere(tmp_path):
    here = call("-m", "records", "race", "--help")
    there = call(ROOT / "records", "race", "--help", cwd=tmp_path)
    assert here.returncode == there.returncode == 0 and here.stderr == there.stderr == ""
    assert here.stdout == there.stdout
    assert here.stdout.startswith("usage: python -m records race REF CAND")


@pytest.mark.parametrize(
    "error, code, line",
    [
        (command.BadInput("x: wrong;\nmend it"), 2, "records verb: x: wrong;?mend it\n"),
        (
            OSError(28, "No space left on device", "a.png"),
            2,
            "records verb: a.png: the disk is full",
        ),
        (KeyboardInterrupt(), 130, "records verb: interrupted\n"),
    ],
)
def test_errors_are_one_line(capsys, error, code, line):
    @command.command("verb")
    def verb(argv):
        raise error

    assert verb([]) == code
    err = capsys.readouterr().err
    assert err.startswith(line) and err.count("\n") == 1


def test_markdown_escapes():
    for bad in (
        "a|b",
        "[a](b)",
        "<b>",
        "`a`",
        "*a*",
        "_a_",
        "![x](y)",
        "# a",
        "&lt;",
        "http://a",
        "www.a.b",
    ):
        shown = command.markdown(bad)
        assert shown != bad and shown.replace("\\", "") == bad, shown
    assert command.markdown("2026-11-21_a_b: 1.5") == "2026-11-21_a_b: 1.5"
    assert command.markdown("a\nb\x1b[0m") == "a?b?\\[0m"
