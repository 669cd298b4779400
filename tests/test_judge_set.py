"""The judge's set: every patch applies to its frozen trainer, and Python compiles what results.
Whether the judge tells cheats from honest variants is measured by tests/judge/evaluate.py."""

import importlib.util
import json
import re
import sys
import threading
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F


def load(path: Path):
    """A module by its path: its folder, which holds a train_gpt.py of its own, is none to import
    from."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


evaluate = load(Path(__file__).parent / "judge" / "evaluate.py")
PATCHES = evaluate.patches()
HONEST = [path for path in PATCHES if path.parent.name == "honest" and path.stem != "compiled"]


@pytest.mark.slow  # 150 builds
@pytest.mark.parametrize("patch", PATCHES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_patch_applies_and_compiles(patch, tmp_path):
    first = patch.read_text(encoding="utf-8").splitlines()[0]
    assert re.fullmatch(r"# \w.*\.", first), f"{patch}: the first line says what it does"
    script = evaluate.build(patch, tmp_path)
    assert script.read_bytes() != evaluate.TRAINER.read_bytes()
    compile(script.read_bytes(), patch.name, "exec")


@pytest.mark.slow
@pytest.mark.parametrize("patch", HONEST, ids=lambda path: path.stem)
def test_an_honest_variant_trains_and_loads(patch, tmp_path, monkeypatch):
    """Its loss falls, and load_model gives the model that the last validation saw."""
    spec = importlib.util.spec_from_file_location(patch.stem, evaluate.build(patch, tmp_path))
    trainer = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, patch.stem, trainer)
    spec.loader.exec_module(trainer)
    monkeypatch.chdir(tmp_path)
    tokens = helpers.text(2049, seed=3)
    helpers.write_shard(tmp_path / "train_0.bin", helpers.text(40000, seed=2))
    helpers.write_shard(tmp_path / "val_0.bin", tokens)
    flags = dict(preset="laptop", device="cpu", steps=9, val_tokens=2048, checkpoint_every=9)
    files = dict(train_files="train_*.bin", val_files="val_*.bin")
    ran = helpers.run(helpers.words(**flags, **files), trainer)
    assert ran.code == 0, ran.err
    for thread in set(threading.enumerate()) - {threading.main_thread()}:
        if not thread.daemon:
            thread.join(timeout=1)  # the end of a process waits for them, too
    path = max(tmp_path.glob("checkpoints/*/*.pt"))
    rows = torch.from_numpy(np.lib.stride_tricks.sliding_window_view(tokens, 129)[::128].copy())
    with torch.no_grad():
        logits = trainer.load_model(path)(rows[:, :-1].long())
    loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten().long()).item()
    assert loss == pytest.approx(ran.result()["val_loss"], abs=1e-4) and loss < 4


def test_the_set_is_large_enough_and_listed():
    kinds = [path.parent.name for path in PATCHES]
    assert kinds.count("cheats") >= 60 and kinds.count("honest") >= 50
    readme = (evaluate.HERE / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)` \|", readme, re.M)
    assert sorted(listed) == sorted(path.stem for path in PATCHES)


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
    told = dict(
        code=1,
        checks=[
            dict(name="a", state="pass", reason=""),
            dict(name="b", state="fail", reason="why"),
        ],
    )

    def call(words):
        calls.append(words)
        Path(words[words.index("--json") + 1]).write_text(json.dumps(told))
        return told["code"], ""

    monkeypatch.setattr(evaluate, "call", call)
    patch = PATCHES[0]
    assert evaluate.judge(patch, tmp_path, ["--seed", "1"]) == (1, "fail b: why")
    assert evaluate.judge(patch, tmp_path, ["--seed", "1"]) == (1, "fail b: why")
    told.update(code=3)
    told["checks"][1]["state"] = "void"
    assert evaluate.judge(patch, tmp_path, ["--seed", "2"]) == (4, "void b: why")
    assert len(calls) == 2 and calls[0][-3:] == ["--", "--seed", "1"]
    monkeypatch.setattr(evaluate, "call", lambda words: (70, "a bug"))
    assert evaluate.judge(patch, tmp_path, ["--seed", "3"]) == (70, "a bug")


def test_misuse(tmp_path):
    with pytest.raises(SystemExit, match="no patch is called nothing"):
        evaluate.main(["nothing", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        evaluate.main(["--jobs", "0", "--out", str(tmp_path)])
