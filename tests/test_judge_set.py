"""The judge's set: every patch applies to train_gpt.py, and Python compiles what results. Whether
the judge tells cheats from honest variants is measured by tests/judge/evaluate.py."""

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "judge"))
import evaluate

PATCHES = evaluate.patches()


@pytest.mark.slow  # 150 builds; and an edit of train_gpt.py may ask for a patch to be refreshed
@pytest.mark.parametrize("patch", PATCHES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_patch_applies_and_compiles(patch, tmp_path):
    first = patch.read_text(encoding="utf-8").splitlines()[0]
    assert re.fullmatch(r"# \w.*\.", first), f"{patch}: the first line says what it does"
    script = evaluate.build(patch, tmp_path)
    assert script.read_bytes() != (evaluate.ROOT / "train_gpt.py").read_bytes()
    compile(script.read_bytes(), patch.name, "exec")


def test_the_set_is_large_enough():
    kinds = [path.parent.name for path in PATCHES]
    assert kinds.count("cheats") >= 40 and kinds.count("honest") >= 25


def test_outcomes(capsys):
    """Exit codes of the judge, and what they make of it."""
    cheat, honest = (evaluate.HERE / kind / "x.patch" for kind in ("cheats", "honest"))
    assert evaluate.report({cheat: "caught", honest: "passed"}) == 0
    assert evaluate.report({cheat: "missed", honest: "passed"}) == 1
    assert evaluate.report({cheat: "caught", honest: "accused"}) == 1
    assert evaluate.report({cheat: "undecided", honest: "undecided"}) == 1
    assert "caught 1 of 1; as wanted" in capsys.readouterr().out


def test_verdicts_are_kept(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(evaluate, "call", lambda words: calls.append(words) or (1, "because"))
    patch = PATCHES[0]
    assert evaluate.judge(patch, tmp_path, ["--seed", "1"]) == (1, "because")
    assert evaluate.judge(patch, tmp_path, ["--seed", "1"]) == (1, "because")
    assert evaluate.judge(patch, tmp_path, ["--seed", "2"]) == (1, "because")
    assert len(calls) == 2 and calls[0][-3:] == ["--", "--seed", "1"]


def test_misuse(tmp_path):
    with pytest.raises(SystemExit, match="no patch is called nothing"):
        evaluate.main(["nothing", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        evaluate.main(["--jobs", "0", "--out", str(tmp_path)])
