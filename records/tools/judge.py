"""Judge a trainer as a black box: run it as a race does, change one thing, compare what comes out.

    python -m records judge SCRIPT [-- flags for the trainer]
    python -m records judge records/laptop/NEW [--against records/laptop/OLD] [--json FILE]

It needs of a script the flags of its track, the log format, a final checkpoint, and
load_model(path) that gives a callable from tokens [B, T] to logits or log-probabilities [B, T, V].
It starts the script in new folders, each run in a sandbox, on text that is drawn anew: documents in
another order, cut, reversed or not, renumbered. Loss is scored here, from the final checkpoint, on
validation text that no run was given. records/JUDGE.md says how, and what cannot be seen.

what is changed                           what must come out
nothing                                   the logged val_loss is what the checkpoint scores
a row's later tokens, its neighbours,     the same probabilities at the positions asked for
its place, the batch's size
validation text becomes noise, in the     the same model; a logged loss that rises with the noise
folder that an earlier run left
the track's own text becomes unknown      the same lead over the reference

Time is not judged: a race measures the whole process. Exit code 0: legal; 1: not legal, with
reasons; 3: nothing against it, but not all could be seen or decided; 2: misuse; 70: a bug of the
judge, no verdict.
"""

import concurrent.futures
import hashlib
import math
import os
import secrets
import shlex
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from records.tools import corpus as texts
from records.tools import logs, runs
from records.tools.command import (
    BadInput,
    Parser,
    command,
    need,
    new_file,
    number_in,
    printable,
    write_json,
)
from records.tools.corpus import ROOT, taken
from records.tools.race import race_flags, score
from records.tools.runs import Failed, Place, ask
from records.tools.tracks import TRACKS

CUDA_STEPS = 60  # of the shortened schedule on a GPU
QUESTIONS = 1536  # positions at which the model is shown the prefix alone
PROBED = 64  # rows of either text on which two models are compared
LOSS = {False: 1e-3, True: 3e-3}  # nats between a logged val_loss and ours; True: on CUDA
EXACT, ROUNDED = 5e-4, 0.25  # nats between two losses of one token: in fp32, and at most
FEW = 0.01  # share of positions whose losses may differ by more, where there is noise
LEAK = 0.003  # nats a token that later tokens may seem to be worth
REPEATED = 5  # times as far apart as two runs of the same, and by ...
UNSEEDED = 0.05  # ... so many nats: noise explains no more
CLOSE = 1.5  # times as far apart as two runs of the same: on CUDA, that is equal
LEAD = 0.1  # nats of a lead that noise, other text and other numbers may take away
VERDICTS = {0: "legal", 1: "not legal", 3: "nothing against it, but not all was seen or decided"}


@dataclass(frozen=True)
class Check:
    name: str
    state: str  # pass, fail, not seen, not decided, void, or skipped
    reason: str


@dataclass
class Trial:
    """One run of a script: what it left, and what its final model scored."""

    name: str
    why: str = "not run"  # it brought nothing; empty: it did
    run: logs.Run | None = None
    losses: dict = field(default_factory=dict)  # rows' name -> ours [N, T]
    logits: np.ndarray | None = None  # at the positions asked, of prefixes alone
    wall: float = 0.0
    checkpoint_bytes: int = 0
    touched: bool = False  # it changed its own file
    unscored: str = ""  # why its model could not be scored

    def mean(self, name: str) -> float | None:
        return float(self.losses[name].mean()) if name in self.losses else None


class Judging:
    """A script, its text, and its trials by name. Trials that share a folder are one job."""

    def __init__(self, script: bytes, flags: list[str], track_text, reference: bytes, args):
        self.script, self.reference, self.args = script, reference, args
        self.flags, self.seed = flags, texts.whole_number(flags, "seed", 0)
        self.rng = np.random.default_rng(args.dice)
        self.track_text, self.text = track_text, track_text.drawn(self.rng)
        self.other = track_text.drawn(self.rng, known=True)  # other validation text, as it is
        self.noise = self.text.noise(self.rng)
        self.ask_blind(self.text)
        self.trials: dict[str, Trial] = {}

    def ask_blind(self, text):
        """One position of each of Q rows, all later tokens being of another text."""
        rows = text.rows(text.hidden)
        count, length = len(rows), text.length
        asked = min(QUESTIONS, max(count, 4 * length))
        self.at = np.sort(np.resize(np.arange(length), asked))  # short prefixes first
        self.row = np.resize(self.rng.permutation(count), asked)
        others = text.rows(text.shown)[np.resize(self.rng.permutation(count), asked)]
        later = np.arange(length) > self.at[:, None]
        shown = np.where(later, others[:, :-1], rows[self.row, :-1])
        sizes = text.batches(asked, self.rng, count)  # no row twice in a batch
        self.blind = shown, sizes, self.at
        self.targets = rows[self.row, self.at + 1]

    def job(self, name: str) -> list[tuple]:
        """(name, script, text, flags, {rows' name: rows}) of each trial of a job."""
        text, own = self.text, self.track_text
        raced = race_flags(
            texts.taken(self.flags, "val_every")[1] + ["--val_every", "0"], self.seed
        )
        steps = texts.whole_number(self.flags, "steps", self.args.steps)
        watched = taken(raced, "val_every")[1] + ["--val_every", str(max(1, steps // 2))]
        hidden = {"hidden": text.rows(text.hidden)}
        probe = np.concatenate([text.rows(t)[:PROBED] for t in (text.hidden, text.shown)])
        noise = self.noise.rows(self.noise.shown)
        known = {"hidden": own.rows(own.hidden)}
        renewed = {"hidden": self.other.rows(self.other.hidden)}
        shown = ("shown", self.script, text, watched, {"probe": probe})
        return {
            "base": [("base", self.script, text, raced, hidden)],
            "validation": [
                shown,
                ("noise", self.script, self.noise, watched, {"probe": probe, "noise": noise}),
            ],
            "again": [("again", *shown[1:])],
            # as users run it; for a trainer that saves its final model only when asked, once more
            "known": [
                ("plain", self.script, own, taken(raced, "checkpoint_every")[1], known),
                ("known", self.script, own, raced, known),
            ],
            "reference": [("reference", self.reference, text, raced, hidden)],
            "reference known": [("reference known", self.reference, own, raced, known)],
            "renewed": [("renewed", self.script, self.other, raced, renewed)],
            "reference renewed": [
                ("reference renewed", self.reference, self.other, raced, renewed)
            ],
        }[name]

    def do(self, name: str):
        """Runs a job; what fails stands in its trials."""
        place = None
        try:
            for kind, script, text, flags, rows in self.job(name):
                if kind == "known" and self["plain"].losses:
                    self.trials["known"] = self["plain"]
                    continue
                trial = self.trials[kind] = Trial(kind)
                if kind == "noise":  # in the folder that the run before left
                    place.fill(text.files())
                else:
                    if place:
                        place.close()
                    place = Place(script, text.files())
                self.one(trial, place, text, flags, rows)
        finally:
            if place:
                place.close()

    def one(self, trial: Trial, place: Place, text, flags, rows):
        args, began = self.args, time.monotonic()
        try:
            trial.wall = place.train(flags, args.timeout, 1, args.processes)
            trial.run, trial.why = logs.read_log(place.log())[0], ""
            trial.touched = (place.folder / runs.SCRIPT).read_bytes() != place.script
            trial.checkpoint_bytes = place.checkpoint().stat().st_size
            dice = np.random.default_rng([args.dice, len(rows)])
            trial.losses = score(place, text, rows, args.cuda, args.timeout, dice)
            if trial.name == "base":
                asked, found = {"blind": self.blind}, place.checkpoint()
                answers = ask(
                    place.script, found, self.noise.files(), asked, args.cuda, args.timeout
                )
                trial.logits = answers["blind"]
        except Failed as error:
            trial.unscored = str(error)
            trial.why = trial.why and trial.unscored
        print(
            f"  {trial.name}: {trial.why or trial.unscored or 'done'} "
            f"({time.monotonic() - began:.0f} s)",
            file=sys.stderr,
            flush=True,
        )

    def __getitem__(self, name: str) -> Trial:
        return self.trials.get(name) or Trial(name)

    # what is compared

    def same(self, a: str, b: str) -> bool | None:
        """Have two trials one model, by our losses? None: nothing to compare."""
        x, y = (self[name].losses.get("probe") for name in (a, b))
        return None if x is None or y is None else bool(np.abs(x - y).max() <= 1e-5)

    def lead(self, text: str) -> float | None:
        """Nats by which the candidate is ahead of the reference on a text."""
        known = {"unknown": ("base", "reference"), "known": ("known", "reference known")}
        pair = known.get(text, ("renewed", "reference renewed"))
        mine, theirs = (self[name].mean("hidden") for name in pair)
        if self.reference == self.script:
            return None if mine is None else 0.0
        return None if mine is None or theirs is None else theirs - mine


def losses_of(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-log softmax(logits)[target] in fp64, nats: logits [N, V], targets [N]."""
    whole = np.array([np.logaddexp.reduce(row, dtype=np.float64) for row in logits])
    return whole - logits[np.arange(len(logits)), targets]


# -------------------------------------------------------------------------------------- the checks
# Each takes a Judging and returns (state, reason).


def unseen(case, *names):
    """What keeps these trials from showing anything."""
    why = (case[name].why or case[name].unscored for name in names)
    return "not seen", next((f"{n}: {w}" for n, w in zip(names, why, strict=True) if w), "no loss")


def source(case):
    trial, digest = case["plain"], hashlib.sha256(case.script).hexdigest()
    if trial.why:
        return unseen(case, "plain")
    if trial.touched:
        return "fail", "train_gpt.py is not what it was before the run"
    if not trial.run.source_bytes or trial.run.source_sha256 != digest:
        return "fail", "the log's source is not the file that ran"
    return "pass", "the log's source is the file that ran"


def logged_loss(case):
    """Is the logged loss what the checkpoint scores: as users run it, and on noise?"""
    limit, ours = LOSS[case.args.cuda], case["known"].mean("hidden")
    said = [case[name].run and case[name].run.val_loss for name in ("plain", "known")]
    if ours is None or None in said:
        return unseen(case, "plain", "known")
    reason = f"the logs say {said[0]:.4f} and {said[1]:.4f}, the checkpoint scores {ours:.4f}"
    seeded = case.same("shown", "noise") and not case.args.cuda
    if ours - said[1] > limit or ours - said[0] > (limit if seeded else UNSEEDED):
        return "fail", reason
    if max(said) - ours > limit or abs(said[0] - said[1]) > limit:
        return "not decided", f"{reason}: not all that is random is seeded, or it logs more"
    ours, run = case["noise"].mean("noise"), case["noise"].run
    if ours is None or run.val_loss is None:
        return unseen(case, "noise")
    if abs(ours - run.val_loss) > limit * max(1, ours):
        return "fail", f"on noise the log says {run.val_loss:.4f}, the checkpoint scores {ours:.4f}"
    if ours < math.log(case.text.mark):
        return "not seen", "the loss on noise did not rise, so a least loss would not show"
    return "pass", reason


def causality(case):
    """Each token's loss with its whole row in sight, and with another future, other neighbours."""
    trial = case["base"]
    if trial.logits is None:
        return unseen(case, "base")
    if trial.logits.shape[1] <= case.targets.max():
        return "not seen", "its logits are not those of the track's tokens"
    gain = losses_of(trial.logits, case.targets) - trial.losses["hidden"][case.row, case.at]
    limit = min(max(EXACT, 5 * float(np.median(np.abs(gain)))), ROUNDED)
    wrong = np.abs(gain) > limit
    mean, error = gain.mean(), gain.std() / math.sqrt(len(gain))
    if wrong.sum() >= max(2, FEW * len(gain) * (limit > EXACT)) or mean > LEAK + 4 * error:
        places = ", ".join(map(str, np.unique(case.at[wrong])[:4])) or "none alone"
        reason = f"at {wrong.sum()} of {len(gain)} positions asked (such as {places}) the logits"
        return "fail", f"{reason} depend on later tokens or other rows, by {mean:.3f} nats a token"
    return "pass", f"{len(gain)} positions keep their logits with another future, among other rows"


def validation_text(case):
    """The final model, where the validation text is noise and the folder holds an earlier run."""
    equal = case.same("shown", "noise")
    if equal is None:
        return unseen(case, "shown", "noise")
    if equal:
        return (
            "pass",
            "with noise for validation text, beside an earlier run, the model is the same",
        )
    if case["again"].why == "not run":
        return "wanted", "again"
    repeated = case.same("shown", "again")
    if repeated is None:
        return unseen(case, "again")
    worth = abs(case["noise"].mean("probe") - case["shown"].mean("probe"))
    reason = "the final model depends on the validation text, or on what an earlier run left"
    if repeated:
        return (
            "fail",
            f"{reason}: the probes' loss differs by {worth:.4f}, that of a repetition not",
        )
    noise = abs(case["again"].mean("probe") - case["shown"].mean("probe"))
    seen = f"{worth:.3f} nats with noise for validation text, {noise:.3f} from run to run"
    if worth > REPEATED * noise + UNSEEDED:
        return "fail", f"{reason}: {seen}"
    apart = [
        float(np.abs(case[name].losses["probe"] - case["shown"].losses["probe"]).mean())
        for name in ("noise", "again")
    ]
    if case.args.cuda and apart[0] <= CLOSE * apart[1]:  # no two runs are equal there
        return "pass", f"as near as two runs of the same: {apart[0]:.4f} and {apart[1]:.4f} nats"
    return "not decided", f"not all that is random is seeded: {seen}"


def identity(case):
    """Is its lead over the reference there on text that it cannot know?"""
    known, unknown = case.lead("known"), case.lead("unknown")
    if known is None or unknown is None:
        return unseen(case, "base", "known", "reference", "reference known")
    told = (
        f"{known:+.3f} nats ahead of the reference on the track's text, {unknown:+.3f} on unknown"
    )
    if known - unknown <= LEAD or known <= LEAD:
        return "pass", told
    if case["renewed"].why == "not run":
        return "wanted", "renewed"
    renewed = case.lead("renewed")
    if renewed is None:
        return unseen(case, "renewed", "reference renewed")
    if renewed < known / 2 and known - renewed > LEAD:
        return "fail", f"{told}, {renewed:+.3f} with other validation documents: it knows those"
    return "void", f"it uses the identity of this track's tokens, worth nothing in a race: {told}"


def claim(case):
    """The record's own loss for the seed that was run here, on the track's text."""
    run, claims = case["plain"].run, case.args.claims
    if not run or run.val_loss is None:
        return unseen(case, "plain")
    ours, claimed = run.val_loss, claims.get(case.seed)
    if claimed is None or case.args.note:
        return "not seen", f"the record has no run of seed {case.seed} with these flags"
    allowed = max(0.03, 5 * float(np.std([loss for loss in claims.values() if loss is not None])))
    reason = f"seed {case.seed} ends at {ours:.4f} here, at {claimed:.4f} in the record"
    return "pass" if abs(ours - claimed) <= allowed else "not decided", reason


CHECKS = {  # in the order of what is run first: check, jobs that it looks at
    causality: ("base",),
    validation_text: ("validation", "again"),
    source: ("known",),
    logged_loss: ("known", "validation", "again"),
    identity: ("base", "known", "reference", "reference known", "renewed", "reference renewed"),
}
ON_DEMAND = {"again": ["again"], "renewed": ["renewed", "reference renewed"]}


def facts(case) -> str:
    """The memory age in a line: what a loss was bought with. Declared by the script, but for bytes
    and seconds."""
    trial, result = case["base"], case["base"].run.result if case["base"].run else None
    if not result:
        return "no result line: parameters and tokens are not known"
    number = {key: logs.number(result.get(key)) for key in logs.DECLARED}
    said = [
        f"{what} {'?' if number[key] is None else format(number[key], ',.0f')}"
        for key, what in logs.DECLARED.items()
    ]
    timed = (logs.number(result.get("train_time_ms")) or 0) / 1000
    return ", ".join(
        [
            *said,
            f"tokens that it could read {len(case.text.train):,}",
            f"checkpoint {trial.checkpoint_bytes:,} bytes",
            f"untimed {trial.wall - timed:.1f} of {trial.wall:.1f} s",
        ]
    )


def judge(case: Judging, every_check: bool) -> list[Check]:
    """The verdict, check by check. It ends with the first proof, unless every_check."""
    claimed = any(loss is not None for loss in case.args.claims.values())
    checks = CHECKS | ({claim: ("known",)} if claimed else {})
    waiting = list(dict.fromkeys(n for jobs in CHECKS.values() for n in jobs))
    waiting = [name for name in waiting if name not in sum(ON_DEMAND.values(), [])]
    if case.reference == case.script:
        waiting = [name for name in waiting if not name.startswith("reference")]
    found, active = {}, {}
    pool = concurrent.futures.ThreadPoolExecutor(1 if case.args.cuda or not runs.sandbox() else 2)
    try:
        while waiting or active:
            for name in waiting:
                active[pool.submit(case.do, name)] = name
            waiting = []
            done = concurrent.futures.wait(active, return_when="FIRST_COMPLETED").done
            for job in done:
                active.pop(job)
                job.result()
            for look, names in checks.items():
                if look not in found and not set(names) & set(active.values()):
                    state, reason = look(case)
                    if state == "wanted":
                        waiting += ON_DEMAND[reason]
                    else:
                        found[look] = state, reason
            if not every_check and any(state == "fail" for state, _ in found.values()):
                break
    finally:
        runs.cancelled.set()
        pool.shutdown(cancel_futures=True)
        runs.cancelled.clear()
    skipped = ("skipped", "a proof was found before")
    return [Check(look.__name__.replace("_", " "), *found.get(look, skipped)) for look in checks]


# -------------------------------------------------------------------------------------------- main
def read_record(folder: Path) -> tuple[list[str], str | None, dict]:
    """Flags, track and {seed: val_loss} of a record folder; None for the loss of a run on a race's
    own text. Raises BadInput if it has no logs."""
    found = [run for path in sorted(folder.glob("run_*.txt")) for run in logs.read_log(path)]
    track = folder.resolve().parent.name
    public = (TRACKS[track].files if track in TRACKS else None) or {}

    def claimed(run):
        secret = any((run.data or {}).get(name) != sha for name, sha in public.items())
        return None if secret else run.val_loss

    claims = {run.seed: claimed(run) for run in found if run.val_loss and type(run.seed) is int}
    if not claims:
        raise BadInput(f"{folder}: no run_*.txt with a seed and a val_loss; is it a record?")
    given = taken(found[0].header.get("argv", "").split(), "val_every", *texts.LOCAL)[1]
    return given, track if track in TRACKS else None, claims


def read_script(path: Path) -> bytes:
    place = path / runs.SCRIPT if path.is_dir() else path
    if not place.is_file():
        raise BadInput(f"{path}: no such trainer; name a script or a record folder")
    source = place.read_bytes()
    try:
        compile(source, str(place), "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise BadInput(f"{path}: Python cannot read it ({error}); name a trainer") from None
    return source


def newest(track: str) -> Path:
    """The record of the track that a candidate is held against, or this repository's trainer."""
    known = sorted(TRACKS[track].settled)
    return ROOT / "records" / track / known[-1] if known else ROOT / runs.SCRIPT


def parse(argv: list[str]):
    """(our arguments, flags for the trainer)"""
    at = argv.index("--") if "--" in argv else len(argv)
    parser = Parser("judge", __doc__)
    add, limit, dice = parser.add_argument, number_in(float, 1), number_in(int, 0)
    add("script", type=Path, help="a trainer, or a record folder")
    add("--against", type=Path, metavar="RECORD", help="the reference [the track's newest record]")
    add("--track", choices=sorted(TRACKS), help="[the record's, or laptop]")
    add("--json", type=new_file, metavar="FILE", help="write the verdict there, too")
    add("--timeout", type=limit, default=3600, help="seconds a run may take [3600]")
    add("--dice", type=dice, help="seed of what is drawn, to judge alike [secret]")
    add("--every_check", action="store_true", help="go on after the first proof")
    args = parser.parse_args(argv[:at])
    args.dice = secrets.randbits(64) if args.dice is None else args.dice
    return args, argv[at + 1 :]


def prepare(args, flags: list[str]) -> Judging:
    script, track = read_script(args.script), None
    args.claims = {}
    if args.script.is_dir():
        recorded, track, args.claims = read_record(args.script)
        flags = (
            recorded
            + flags
            + ([] if taken(flags, "seed")[0]["seed"] else ["--seed", str(min(args.claims))])
        )
    args.track = args.track or track or "laptop"
    need("torch", "psutil")
    import torch

    args.cuda = args.track != "laptop"
    if args.cuda and not torch.cuda.is_available():
        raise BadInput(f"track {args.track} needs a CUDA device; --track laptop needs none")
    name, preset = texts.preset_of(flags, TRACKS[args.track].preset or "gpt2_small")
    extra = taken(flags, "preset", "seed", "device")[1]
    if args.cuda and not taken(flags, "steps")[0]["steps"]:
        extra += ["--steps", str(CUDA_STEPS)]
    args.note = f"not the track's flags: {shlex.join(extra)}" if extra else ""
    args.steps, args.processes = preset.steps, int(os.environ.get("NPROC", 1)) if args.cuda else 1
    given = taken(flags, "device")[0]["device"]
    seed = texts.whole_number(flags, "seed", 0)
    flags = [*extra, "--seed", str(seed)] + (["--device", given] if given else [])
    digests = TRACKS["laptop"].files if name == "laptop" else None
    limit = 2 * CUDA_STEPS * 2**20 if args.cuda else None
    text = texts.track_corpus(flags, preset, limit, digests)
    reference = read_script(args.against or newest(args.track))
    return Judging(script, ["--preset", name, *flags], text, reference, args)


def tell(args, case: Judging, checks: list[Check], seconds: float) -> int:
    states = {check.state for check in checks}
    code = 1 if "fail" in states else 3 if states != {"pass"} else 0
    for check in checks:
        print(f"{check.state:<11} {check.name:<15} {check.reason}")
    print(f"{'facts':<27} {facts(case)}")
    print(f"\n{runs.about_the_sandbox()}")
    digest = hashlib.sha256(case.script).hexdigest()
    print(f"{printable(args.script)} (sha256 {digest[:12]}), track {args.track}: {VERDICTS[code]}")
    if args.note:
        print(args.note)
    if args.json:
        told = dict(script=str(args.script), sha256=digest, track=args.track, code=code)
        told |= dict(verdict=VERDICTS[code], note=args.note, dice=args.dice, facts=facts(case))
        told |= dict(seconds=round(seconds, 1), sandbox=runs.sandbox())
        write_json(args.json, told | dict(checks=[asdict(check) for check in checks]))
    return code


@command("judge")
def main(argv) -> int:
    args, flags = parse(argv)
    began = time.monotonic()
    case = prepare(args, flags)
    checks = judge(case, args.every_check)
    return tell(args, case, checks, time.monotonic() - began)
