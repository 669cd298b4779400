"""records/legal.py: the trainer passes, and each planted cheat is caught by the check that is there for it.

A cheat is code put at the end of a copy of train_gpt.py, in place of what it redefines: it survives rewording above."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from records import legal

ROOT = Path(__file__).resolve().parents[1]
TRAINER, MAIN = (ROOT / "train_gpt.py").read_text(encoding="utf-8"), '\nif __name__ == "__main__":'

EMBED = """def __init__(self, config, honest=GPT.__init__):
    honest(self, config)
    self.wte.__class__ ="""
# name: (checks that must fail, what one of their reasons says, code)
CHEATS = {
    "attention sees one token ahead": ("causality", "position 1 changes the logits at position 0", """
def attend(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(q.size(2), k.size(2)).tril(1).bool())
"""),
    "embedding sees one token ahead": ("causality", "looks ahead by 1", """
class Peeking(nn.Embedding):
    def forward(self, tokens):
        x = super().forward(tokens)
        return x + 0.1 * F.pad(x[:, 1:], (0, 0, 0, 1))
EMBED Peeking
"""),
    "a norm over the whole row": ("causality", "looks ahead", """
def norm(x):
    return x / (x.square().mean((-2, -1), keepdim=True) + 1e-6).sqrt()
"""),
    "rows see each other": ("causality", "another row", """
class Neighbours(nn.Embedding):
    def forward(self, tokens):
        return super().forward(tokens) + 0.1 * super().forward(tokens.roll(1, 0))
EMBED Neighbours
"""),
    "a cache from one call to the next": ("causality probabilities", "remembers", """
class Caching(nn.Embedding):
    last = 0
    def forward(self, tokens):
        x = super().forward(tokens)
        Caching.last, x = x.mean().detach(), x + Caching.last
        return x
EMBED Caching
"""),
    "scores that are not normalised": ("probabilities", "do not sum to one", """
def forward(self, tokens, targets=None, honest=GPT.forward):
    logits = honest(self, tokens)
    if targets is None:
        return logits
    return (logits.topk(64).values.logsumexp(-1) - logits.gather(-1, targets[..., None])[..., 0]).mean()
GPT.forward = forward
"""),
    "targets seen by the model": ("probabilities", "evaluation 1 returned", """
def evaluate(forward, *rest, honest=evaluate):
    def seeing(x, y):
        logits = forward(x)
        return F.cross_entropy((logits + 0.1 * F.one_hot(y, logits.size(-1))).flatten(0, 1), y.flatten())
    return honest(seeing, *rest)
"""),
    "a val loss made up": ("probabilities", "the log's val_loss", """
def step(self, step, steps, kind, loss, ms, honest=Log.step):
    honest(self, step, steps, kind, loss - 0.01 * (kind == "val"), ms)
Log.step = step
"""),
    "validation on fewer tokens": ("validation", "left out 512 of the 1024", """
def evaluate(forward, shards, config, *rest, honest=evaluate):
    return honest(forward, shards, dataclasses.replace(config, val_tokens=config.val_tokens // 2), *rest)
"""),
    "validation on the same tokens twice": ("validation", "512 tokens more than once", """
def evaluate(forward, shards, config, *rest, honest=evaluate):
    half = dataclasses.replace(config, val_tokens=config.val_tokens // 2)
    return (honest(forward, shards, half, *rest) + honest(forward, shards, half, *rest)) / 2
"""),
    "validation on other tokens": ("validation", "are no rows of the validation shard", """
def evaluate(forward, shards, config, *rest, honest=evaluate):
    return honest(forward, Shards(config.train_files, "train_files"), config, *rest)
"""),
    "training on validation rows": ("leakage batches", "of the validation shard, at token 0", """
def batch_at(self, step, rows=slice(None), honest=Batches.batch_at):
    batch = honest(self, step, rows)
    if step == 3:
        batch[2] = Shards("FOLDER/tiny_val_*.bin", "val_files").read(0, batch.shape[1])
    return batch
Batches.batch_at = batch_at
"""),
    "reading validation tokens early": ("leakage", "read 1 times outside of evaluate(), by init_weights()", """
def init_weights(model, config, honest=init_weights):
    np.fromfile(glob.glob(config.val_files)[0], dtype="<u2")
    honest(model, config)
"""),
    "a batch used twice": ("batches", "again, first seen in step 0", """
def batch_at(self, step, rows=slice(None), honest=Batches.batch_at):
    return honest(self, step // 2, rows)
Batches.batch_at = batch_at
"""),
    "batches picked by hand": ("batches", "step 1 does not hold the rows that come next", """
def batch_at(self, step, rows=slice(None), honest=Batches.batch_at):
    return honest(self, step + (step > 0), rows)
Batches.batch_at = batch_at
"""),
    "two updates a batch": ("batches", "an update after 128 tokens, not 256", """
def forward_backward(forward, inputs, targets, micro, world_size, honest=forward_backward):
    for x, y in zip(inputs.split(4), targets.split(4)):
        loss = honest(forward, x, y, len(x), world_size)
        if clock_runs:
            for p in forward.parameters():
                p.data -= 0.01 * p.grad
    return loss
clock_runs = False
def training_loop(*args, honest=training_loop):
    global clock_runs
    clock_runs = True
    return honest(*args)
"""),
    "easier targets": ("batches", "targets are not its inputs moved on by one", """
def stream(self, *args, honest=Batches.stream):
    for inputs, targets in honest(self, *args):
        yield inputs, inputs
Batches.stream = stream
"""),
    "training while the clock stands": ("clock validation", "with gradients while the clock stood", """
def evaluate(forward, *rest, honest=evaluate):
    loss, data = honest(forward, *rest), torch.randint(256, (4, 33))
    with torch.enable_grad():
        forward(data[:, 1:], data[:, :-1]).backward()
    for p in forward.parameters():
        p.data -= 0.01 * p.grad
    return loss
"""),
    "an update moved out of the clock": ("clock", "weights changed while the clock stood", """
def update(run, honest=update):
    if run.step:
        run.clock.stop()
    honest(run)
    if run.step:
        run.clock.start()
"""),
    "a warm-up that is kept": ("clock", "leaves other weights than it found", """
Run.load_state = lambda self, state: None
"""),
    "a warm-up on training data": ("clock", "feeds tokens of the shards", """
def warm_up(run, forward, honest=warm_up):
    data = torch.from_numpy(Batches(Shards(run.config.train_files, ""), run.config).batch_at(9).astype(np.int64))
    forward(data[:, :-1], data[:, 1:])
    return honest(run, forward)
"""),
    "a clock that goes slow": ("clock", "the log says train_time", """
Clock.ms = property(lambda self, honest=Clock.ms.fget: 0.95 * honest(self))
"""),
    "a clock that starts over": ("clock", "the log says train_time", """
def update(run, honest=update):
    honest(run)
    run.clock.start()
"""),
    "waiting for data outside of the clock": ("clock", "for neither a validation nor a checkpoint", """
def stream(self, *args, honest=Batches.stream):
    def paused(batches):
        while True:
            with clock.paused():
                batch = next(batches, None)
            if batch is None:
                return
            yield batch
    return paused(honest(self, *args))
Batches.stream = stream
def training_loop(run, *rest, honest=training_loop):
    global clock
    clock = run.clock
    return honest(run, *rest)
"""),
    "no clock": ("batches clock", "the script has no Clock", "Stopwatch = Clock; del Clock\n" """
def train(*args, honest=train):
    globals()["Clock"] = Stopwatch
    honest(*args)
    del globals()["Clock"]
"""),
    "a GPT by another name": ("causality probabilities validation leakage batches clock", "no GPT.forward", """
Transformer = GPT
def train(*args, honest=train):
    globals()["GPT"] = Transformer
    honest(*args)
    del globals()["GPT"]
del GPT
"""),
    "no main": ("causality probabilities validation leakage batches clock", "the script has no main", "del main\n"),
}


@pytest.fixture(autouse=True)
def signals():
    """The trainer listens to signals; pytest must go on to."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def planted(folder: Path, code: str) -> Path:
    assert TRAINER.count(MAIN) == 1
    script = folder / "train_gpt.py"
    code = code.replace("FOLDER", str(folder)).replace("EMBED", EMBED) + "GPT.__init__ = __init__\n" * ("EMBED" in code)
    script.write_text(TRAINER.replace(MAIN, f"\n{code}\n{MAIN}"), encoding="utf-8")
    return script


@pytest.mark.parametrize("name", CHEATS)
def test_cheat_is_caught_and_named(name, tmp_path, monkeypatch):
    checks, reason, code = CHEATS[name]
    monkeypatch.chdir(tmp_path)
    report = legal.examine(planted(tmp_path, code), [], tmp_path)["checks"]
    assert {check for check, reasons in report.items() if reasons} == set(checks.split()), report
    assert any(reason in text for check in checks.split() for text in report[check]), report


@pytest.mark.parametrize("flags", [
    "--no_spread_rows --lawa 2 --lawa_interval 1", "--lawa 2 --lawa_interval 1 --lawa_mode replace --bf16",
    "--micro_batch 2 --checkpoint_every 2 --doc_mask --window 8 --window_pattern SL",
    "--relora 4 --relora_warm_start 2 --relora_interval 2", "--galore 4 --galore_interval 2 --galore_per_layer",
    "--seq_len 16 --batch_tokens 128 --val_tokens 512 --steps 9 --no_untie_head"])
def test_methods_are_legal(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = legal.examine(ROOT / "train_gpt.py", flags.split(), tmp_path)
    assert not any(report["checks"].values()), report


def test_unknown_flags_are_dropped_with_a_note(tmp_path, monkeypatch):
    monkeypatch.setitem(legal.TINY, "new_idea", True)
    monkeypatch.chdir(tmp_path)
    report = legal.examine(ROOT / "train_gpt.py", [], tmp_path)
    assert report["notes"] == ["the script has no --new_idea: left out"] and not any(report["checks"].values())


def run(*args):
    command = [sys.executable, ROOT / "records" / "legal.py", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_command_passes_the_trainer(tmp_path):
    done = run(ROOT / "train_gpt.py", "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report["legal"] and list(report["checks"]) == list(legal.CHECKS), done


def test_command_names_the_failed_check_and_document(tmp_path):
    (tmp_path / "data").mkdir()
    legal.shards.write_shard(tmp_path / "data" / "x_train_000000.bin", [256, 1, 2, 256, 3, 4, 5])
    legal.shards.write_shard(tmp_path / "data" / "x_val_000000.bin", [256, 6, 256, 3, 4, 5])
    planted(tmp_path, CHEATS["attention sees one token ahead"][2])
    done = run(tmp_path, "--data", tmp_path / "data")
    assert done.returncode == 1 and "FAIL  causality" in done.stdout and "pass  clock" in done.stdout, done
    assert "1 of 2 validation documents of x (3 tokens) are also in train" in done.stdout and not done.stderr, done


@pytest.mark.parametrize("code, flags, said", [
    ("raise RuntimeError('planted')", [], "RuntimeError: planted"),
    ("import time; time.sleep(60)", ["--timeout", "1"], "did not end within 1 s"),
    ("import os; os._exit(0)", [], "it crashed (exit code 0)"),
    ("import sys\ndef main(argv): sys.exit('bad flag')", [], "exit code bad flag")])
def test_command_survives_its_trainer(code, flags, said, tmp_path):
    (tmp_path / "t.py").write_text(code)
    done = run(tmp_path / "t.py", *flags)
    assert done.returncode == 1 and said in done.stdout + done.stderr and "Traceback" not in done.stderr, done
    assert os.listdir(tmp_path) == ["t.py"]


@pytest.mark.parametrize("args", [
    "", "nowhere.py", "train_gpt.py --new", "train_gpt.py --data nowhere", "train_gpt.py -- --device cuda",
    "train_gpt.py -- --steps many", "train_gpt.py -- --seq_len 4"])
def test_misuse_is_one_line(args, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    try:
        code = legal.main(args.split())
    except SystemExit as end:  # argparse's way
        code = end.code
    out, err = capsys.readouterr()
    assert code == 2 and err.startswith("legal.py: ") and err.count("\n") == 1 and not out
