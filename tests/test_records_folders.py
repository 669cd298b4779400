"""Record folders in records/tools/folders.py: honest ones, edited ones, and forged races."""

import dataclasses
import json
import os
import random
import re
import shutil

import pytest
from test_records_logs import SOURCE, write
from test_records_verify import laptop_rules, logs_in, mutate, only, said, set_rules  # noqa: F401

from records.tools import checks, folders, stats, submit, verify
from records.tools.tracks import TRACKS

FIRST, SECOND = "2026-11-20_idea", "2026-11-21_better"
TIMES = {"reference": [1000.0, 1010.0, 990.0, 1020.0], "candidate": [800.0, 820.0, 790.0, 810.0]}
LOSSES = {
    "reference": [1.4912, 1.4908, 1.4925, 1.493],
    "candidate": [1.49, 1.4911, 1.4922, 1.4933],
}


def make(place, name, *flags, source=SOURCE, date="2026-11-20", **changes):
    paths = logs_in(place / "logs" / name, source=source, **changes)
    words = ["--track", "laptop", "--date", date, "--what", "A new idea.", "--why", "It works."]
    return submit.main([name, *paths, *words, *flags])


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with both records, made once."""
    place = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as patch:
        set_rules(patch)
        patch.setattr(folders, "RECORDS", str(place))
        assert make(place, "idea") == 0
        make_raced(place, place / "laptop" / FIRST)
    return place / "laptop"


@pytest.fixture
def record(built, tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "RECORDS", str(tmp_path))
    return shutil.copytree(built / FIRST, tmp_path / "laptop" / FIRST)


@pytest.fixture
def raced(built, record):
    """A second record, which won its race against the first."""
    return shutil.copytree(built / SECOND, record.with_name(SECOND))


def run_id(day: str, number: int) -> str:
    return f"{day}_00-00-00_{number:06x}"


def race_of(reference, candidate, times=TIMES, losses=LOSSES, day="2026-11-21", **changes):
    """race.json as race writes it: 500 ms of start-up."""
    rounds = len(times["reference"])
    hashes = [
        folders.logs.sha256_file(folder / "train_gpt.py") for folder in (reference, candidate)
    ]
    both = ("reference", "candidate")
    made = {
        "reference": f"records/laptop/{reference.name}",
        "candidate": f"records/laptop/{candidate.name}",
        "flags": "--preset laptop --val_every 0",
        "runs_planned": rounds,
        "looks": [rounds],
        "alpha": stats.ALPHA,
        "loss_margin": stats.LOSS_MARGIN,
        "wall_ms": {who: [time + 500 for time in times[who]] for who in both},
        "startup_ms": {who: [500.0] * rounds for who in both},
        "losses": losses,
        "run_ids": {who: [run_id(day, i) for i in range(rounds)] for who in both},
        "data_sha256": TRACKS["laptop"].files,
        "source_sha256": dict(zip(both, hashes, strict=True)),
        "processes": 1,
        "threads": 2,
        "device": "cpu",
        "failures": [],
    }
    return made | changes


def race_folder(place, reference, source, day="2026-11-21", **changes):
    """The folder that a race leaves, with the logs of its candidate."""
    folder = place / "race"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "train_gpt.py").write_text(source)
    race = race_of(reference, folder, day=day, **changes)
    write(folder, "race.json", json.dumps(race))
    for seed in range(4):
        header = dict(run_id=run_id(day, seed))
        where = folder / f"round{seed:03d}_candidate"
        loss = 1.4601 + 0.0013 * seed  # on text of the race's own
        logs_in(where, seeds=(seed,), header=header, source=source, step_ms=9.5, loss=loss)
    return folder


def make_raced(place, record):
    folder = race_folder(place, record, "# better\n" + SOURCE)
    words = ["--track", "laptop", "--what", "Better.", "--why", "It is.", "--date", "2026-11-21"]
    assert submit.main(["better", str(folder), *words]) == 0


def rewrite(folder, change):
    """race.json with `change` applied to it, a dict or a function."""
    race = json.loads((folder / "race.json").read_text())
    race = change(race) if callable(change) else race | change
    write(folder, "race.json", json.dumps(race))


def edit(path, old, new):
    text = open(path, encoding="utf-8").read()
    assert old in text
    open(path, "w", encoding="utf-8").write(text.replace(old, new, 1))


# ------------------------------------------------------------------------------------ the folder


def test_record_passes(record, tmp_path, capsys):
    assert verify.main([str(record)]) == 0 and "track laptop" in capsys.readouterr().out
    assert verify.main([str(tmp_path / "laptop")]) == 0  # found at any depth
    group = folders.check_record(record, target=1.4).group
    assert group.reasons == [r for r in group.reasons if "not shown to be below 1.4" in r] != []
    moved = tmp_path / FIRST
    shutil.copytree(record, moved)
    assert said(folders.check_record(moved), "the track is not known")
    assert folders.check_record(moved, "laptop").ok


@pytest.mark.parametrize(
    "name, old, new, text",
    [
        ("train_gpt.py", "torch", "numpy", "but train_gpt.py has"),
        ("README.md", "A new idea.", "(Fill in: an idea)", "still says '(fill in'"),
        ("run_2.txt", "val_loss:1.4922", "val_loss:1.4822", "val_loss of the last line"),
        ("run_2.txt", "source_sha256: ", "source_sha256: 0", "run_2.txt"),
        ("run_2.txt", "step:40/40 val_loss", "step:40/40 vol_loss", "cut off"),
        ("run_2.txt", "run_id: 2026-11-20", "run_id: 2126-11-20", "which is to come"),
        ("run_2.txt", "run_id: 2026-11-20_", "run_id: some_", "its run_id is not the date"),
        ("run_2.txt", "a cpu, 2", "<b>a cpu</b>, 2", "run_2.txt holds HTML or a marker: '<b>a"),
        ("README.md", "A new idea.", "An <img src=x> idea.", "README.md holds HTML or a marker"),
        ("README.md", "A new idea.", "<!-- board:laptop -->", "README.md holds HTML or a marker"),
    ],
)
def test_edited_record(record, name, old, new, text):
    edit(record / name, old, new)
    group = folders.check_record(record).group
    assert said(group, text), group.reasons


@pytest.mark.parametrize(
    "name, text",
    [
        ("train_gpt.py", "train_gpt.py is missing"),
        ("README.md", "README.md is missing"),
        ("run_1.txt", "the seeds are 0, 2, 3, 4, not 0, 1, 2"),
    ],
)
def test_missing_file(record, name, text):
    os.unlink(record / name)
    group = only([record])
    assert said(group, text), group.reasons


def test_size_names_and_kinds_of_files(record, tmp_path):
    write(record, "README.md", (record / "README.md").read_text() + " " * 100_000)
    assert said(folders.check_record(record), "bytes beside train_gpt.py")
    for name in ("notes.md", "weights.bin", "run_01.txt", "run_x.txt", ".hidden", "more"):
        copy = tmp_path / name / FIRST
        shutil.copytree(record, copy)
        (copy / name).mkdir() if name == "more" else write(copy, name, "x")
        assert said(folders.check_record(copy, "laptop"), f"{name} does not belong")
    os.rename(record / "run_3.txt", record / "run_7.txt")
    assert said(folders.check_record(record), "run_7.txt: holds the run of seed 3")
    for seed in (0, 1, 2, 4, 7):
        os.unlink(record / f"run_{seed}.txt")
    assert said(folders.check_record(record), "no run_*.txt")


def test_size_of_the_source(record):
    with open(record / "train_gpt.py", "a") as file:
        file.write("# " + "x" * folders.MAX_SOURCE)
    assert said(folders.check_record(record), f"{folders.MAX_SOURCE} are allowed")


@pytest.mark.parametrize("name", ["train_gpt.py", "README.md", "run_2.txt", "race.json"])
@pytest.mark.parametrize("kind", ["fifo", "link", "device"])
def test_only_regular_files(record, name, kind):
    """A pipe would be waited for, a device may have no end, and a link leads anywhere."""
    path, moved = record / name, record.parent / "moved"
    if path.exists():
        os.rename(path, moved)
    else:
        moved.write_text("{}")
    if kind == "fifo":
        os.mkfifo(path)
    else:
        os.symlink(moved if kind == "link" else "/dev/zero", path)
    group = folders.check_record(record).group
    assert said(group, f"{name} is not a regular file"), group.reasons


def test_numbers_and_keys_of_json():
    parse = folders.logs.parse_json
    assert parse(b'{"a": 1, "b": [1e3]}') == {"a": 1, "b": [1000.0]}
    for text in (b'{"a": 1, "a": 2}', b'{"a": 1e300}', b"[" + b"9" * 400 + b"]", b"NaN"):
        assert parse(text) is None, text


@pytest.mark.parametrize("name", ["idea", "2026-13-01_idea", "2026-11-20_an idea", "20-11-20_idea"])
def test_folder_names(record, name):
    other = record.with_name(name)
    os.rename(record, other)
    assert said(folders.check_record(other), "the folder's name is not")


def test_a_copy_is_no_record(record, raced):
    for name in ("2026-11-22_mine", "2026-11-01_mine"):
        copy = record.with_name(name)
        shutil.copytree(record, copy)
        group = folders.check_record(copy).group
        assert said(group, f"train_gpt.py is that of {FIRST}: a copy"), group.reasons
        assert said(group, f"one of its runs is run_0.txt of {FIRST}, too")
        assert said(folders.check_record(record), f"that of {name}: a copy")
        shutil.rmtree(copy)


def rename_runs(folder, day: str):
    """Another source, other run ids: the training lines stay."""
    sha = folders.logs.sha256_file(folder / "train_gpt.py")
    write(folder, "train_gpt.py", (folder / "train_gpt.py").read_text() + "# mine\n")
    new = folders.logs.sha256_file(folder / "train_gpt.py")
    for path in sorted(folder.glob("run_*.txt")):
        text = path.read_text().replace(sha, new).replace("2026-11-21_00-00-00", f"{day}_00-00-00")
        path.write_text(text)


def test_a_copy_with_new_names_is_no_record(record, raced):
    """Its training lines are those of another folder's runs, whatever its times are."""
    copy = record.with_name("2026-11-22_mine")
    shutil.copytree(raced, copy)
    rename_runs(copy, "2026-11-22")
    for path in copy.glob("run_*.txt"):
        path.write_text(re.sub(r"train_time:(\d+)ms", "train_time:1\\1ms", path.read_text()))
    group = folders.check_record(copy).group
    assert said(group, f"of {SECOND}, too"), group.reasons


def test_two_runs_with_the_same_training_lines_are_one(tmp_path):
    paths = logs_in(tmp_path, seeds=(0, 1, 2))
    assert only(paths).ok
    lines = [line for line in open(paths[0]) if " train_loss:" in line]
    text = open(paths[1]).read()
    losses = iter(lines)
    text = re.sub(r"step:\d+/\d+ train_loss:.*\n", lambda line: next(losses), text)
    write(tmp_path, "1.txt", text)
    assert said(only(paths), "0.txt and 1.txt have the same training lines: they are one run")


def test_a_folder_of_junk_refuses_nobody(record):
    junk = record.with_name("2026-11-01_junk")
    junk.mkdir()
    write(junk, "race.json", "[]")
    assert folders.check_record(record).ok


def test_runs_with_one_id_are_one_run(tmp_path):
    paths = logs_in(tmp_path, header=dict(run_id="2026-11-20_12-00-00_000000"))
    assert said(only(paths), "run_id 2026-11-20_12-00-00_000000")


def test_a_linked_folder_is_no_record(record, tmp_path):
    os.rename(record, tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", record)
    assert said(folders.check_record(record), "the folder is a link")


def settle(monkeypatch, *records, early=""):
    """These folders are in."""
    known = {r.name: folders.logs.sha256_file(r / "train_gpt.py") for r in records}
    rules = dataclasses.replace(TRACKS["laptop"], settled=known, early=early)
    monkeypatch.setitem(TRACKS, "laptop", rules)


def test_a_new_record_comes_after_those_that_are_in(record, raced, monkeypatch):
    """A date is soon made up."""
    settle(monkeypatch, record, raced)
    assert folders.check_record(record).ok and folders.check_record(raced).ok
    older = record.with_name("2026-11-20_a")
    shutil.copytree(record, older)
    write(older, "train_gpt.py", SOURCE + "# older\n")
    group = folders.check_record(older).group
    assert said(group, f"it is dated before {SECOND}, which was here first"), group.reasons
    assert said(group, "race.json is missing")
    assert folders.check_record(record).ok, "what is in is no copy of what came later"
    edit(record / "train_gpt.py", "torch", "numpy")
    assert said(folders.check_record(record), "not the one that is settled under this name")


def test_no_record_is_older_than_its_runs(record):
    early = record.with_name("2026-11-19_idea")
    os.rename(record, early)
    assert said(folders.check_record(early), "dated before its own runs, the last of 2026-11-20")
    late = record.with_name("2126-11-19_idea")
    os.rename(early, late)
    assert said(folders.check_record(late), "it is dated 2126-11-19, which is to come")


def test_stray_entries_stop_nobody(record, raced, tmp_path):
    (record.parent / "2026-11-30_notes").write_text("hi")
    os.symlink("nowhere", record.parent / "2026-11-30_link")
    (record.parent / "2000-01-01_empty").mkdir()
    (record / "__pycache__").mkdir()
    assert folders.check_record(record).ok and folders.check_record(raced).ok


def test_a_race_of_other_runs(record, raced):
    """The folder holds the runs of its race, all of them, on its machine."""
    for change, text in [
        (dict(run_ids={who: ["x"] * 4 for who in TIMES}), "runs are not those here, seed by seed"),
        (dict(threads=1), "it ran 1 threads, the runs here 2"),
        (dict(device="NVIDIA H100"), "it ran on NVIDIA H100, the runs here did not"),
        (dict(data_sha256={}), "read other text than that of the race"),
        (
            dict(
                wall_ms={who: [379.0] * 4 for who in TIMES},
                startup_ms={who: [1.0] * 4 for who in TIMES},
            ),
            "a run here logs more time than the race measured",
        ),
    ]:
        write(raced, "race.json", json.dumps(race_of(record, raced) | change))
        assert said(folders.check_record(raced), text), text
    os.unlink(raced / "run_3.txt")
    write(raced, "race.json", json.dumps(race_of(record, raced)))
    assert said(folders.check_record(raced), "runs are not those here")


def test_damaged_record_makes_no_traceback(raced, tmp_path, capsys):
    rng = random.Random(2)
    for _ in range(30):
        copy = tmp_path / "laptop" / "2026-11-22_copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(raced, copy)
        names = ["README.md", "run_2.txt", "train_gpt.py", "race.json", "race.json"]
        path = copy / rng.choice(names)
        path.write_bytes(mutate(rng, path.read_bytes()))
        assert verify.main([str(copy)]) in (0, 1)
        capsys.readouterr()


def test_all_records_of_this_repository_pass(monkeypatch):
    monkeypatch.undo()  # by the real rules
    ranked = {}
    for track in TRACKS:
        place = os.path.join(folders.RECORDS, track)
        for name in sorted(os.listdir(place)) if os.path.isdir(place) else []:
            if folders.NAME.fullmatch(name):
                found = folders.check_record(os.path.join(place, name))
                assert found.ok, (name, found.group.reasons)
                ranked[name] = not found.unranked
    assert len(ranked) >= 11
    # Raced with a margin of 0.02 before there was one rule: at 0.005 these do not win.
    lost = {"02_muon", "03_relu2_qknorm_zeroinit", "05_nov2024", "07_short_rows"}
    assert {name[11:] for name in ranked if not ranked[name]} == lost


# --------------------------------------------------------------------------------------- the race


def test_a_won_race_passes(raced):
    found = folders.check_record(raced)
    assert found.ok and not found.unranked, found.group.reasons
    assert found.found["n"] == 4 and found.found["ratio"] == pytest.approx(0.801, abs=0.001)
    assert found.found["faster"] == "yes" and found.reference == FIRST
    # on text of its own: the first record's loss, and the difference in the race
    start = checks.spread([run.val_loss for run in folders.runs_of(raced.with_name(FIRST))])["mean"]
    worse = [b - a for a, b in zip(*LOSSES.values(), strict=True)]
    assert found.level["mean"] == pytest.approx(start + sum(worse) / 4)
    assert said(folders.check_record(raced, "speed"), "is not ranked by race")


def test_all_but_the_first_need_a_race(raced):
    os.unlink(raced / "race.json")
    assert said(folders.check_record(raced), "race.json is missing")


def scaled(who, key, factor):
    def change(race):
        race[key][who] = [value * factor for value in race[key][who]]
        return race

    return change


def test_what_is_computed_cannot_be_stored_wrong(raced):
    """Ratio, interval and verdict stand in no folder; if they do, nobody reads them."""
    before = folders.check_record(raced).found
    rewrite(raced, dict(ratio=0.01, ci=[0.01, 0.02], p_value=0, faster="yes", n=40))
    assert folders.check_record(raced).found == before


FORGED = {
    "fast beyond the logs": (scaled("candidate", "wall_ms", 0.2), "above 0"),
    "no times": (dict(wall_ms=None), "it needs wall_ms of reference and candidate"),
    "a time of 0": (scaled("candidate", "wall_ms", 0), "wall_ms holds what is none"),
    "old clock": (
        lambda race: {k: v for k, v in race.items() if k != "startup_ms"} | {"times_ms": TIMES},
        "its times are not of whole processes",
    ),
    "fewer losses": (
        dict(losses={"reference": [1.49], "candidate": [1.48]}),
        "not alike in length",
    ),
    "a time that is text": (dict(wall_ms={who: ["x"] * 4 for who in TIMES}), "what is none"),
    "a candidate without a hash": (
        dict(source_sha256={"reference": "0" * 64}),
        "the candidate was another source",
    ),
    "no hashes": (dict(source_sha256=None), "the candidate was another source"),
    "wide margin": (dict(loss_margin=0.5), "the loss margin is 0.5; records are raced at 0.005"),
    "no margin": (dict(loss_margin=None), "it needs loss_margin"),
    "lax level": (dict(alpha=0.4), "alpha is 0.4; records need 0.01"),
    "other looks": (dict(looks=[1, 2, 3, 4]), "looks [1, 2, 3, 4] are not those of 4"),
    "no looks": (dict(looks=None), "it has no looks"),
    "other looks at the wrong rounds": (dict(looks=[2, 4]), "looks [2, 4] are not those"),
    "more pairs than planned": (dict(runs_planned=2), "4 pairs of 2 planned"),
    "flags for both": (dict(flags="--preset laptop --steps 9"), "its flags are"),
    "another preset": (dict(flags="--preset nov2024"), "its flags are"),
    "resumed": (dict(flags="--preset laptop --resume latest"), "its flags are"),
    "flags of the candidate": (
        dict(candidate=f"records/laptop/{SECOND} --lr_muon 1"),
        "candidate is not one path",
    ),
    "flags of the reference": (
        dict(reference=f"records/laptop/{FIRST} --steps 999"),
        "reference is not one path",
    ),
    "a reference that is slowed down": (
        dict(reference=f"records/laptop/{FIRST} --micro_batch 1"),
        "reference is not one path",
    ),
    "a reference with flags in quotes": (
        dict(reference=f"'x/{FIRST} --steps 900'"),
        "is no other record",
    ),
    "two words": (dict(candidate="idea.py idea.py"), "candidate is not one path"),
    "flags that slow both down": (
        dict(flags="--preset laptop --micro_batch 1"),
        "its flags are",
    ),
    "easier data": (dict(flags="--preset laptop --val_files easy"), "its flags are"),
    "runs that failed": (dict(failures=[{"run": "round000_B", "why": "x"}]), "runs failed in it"),
    "words that are no flags": (dict(flags="foo --preset laptop"), "its flags are"),
    "half a round": (dict(runs_planned=4.5), "4 pairs of 4.5 planned"),
    "no word of failures": (dict(failures=None), "runs failed in it"),
    "stopped between looks": (
        dict(runs_planned=9, looks=[3, 6, 9]),
        "it has 4 pairs, but would end after [3, 6, 9]",
    ),
    "an empty plan": (dict(looks=[]), "it has no looks"),
    "times no clock shows": (scaled("candidate", "wall_ms", 1e11), "wall_ms holds what is none"),
    "no flags line": (dict(flags=None), "its flags are"),
    "unbalanced quotes": (dict(flags="--preset 'laptop"), "its flags are"),
    "against nobody": (dict(reference="records/laptop/2026-11-01_none"), "is no other record"),
    "against a path": (dict(reference="../../../tmp"), "is no other record"),
    "against itself": (dict(reference=f"records/laptop/{SECOND}"), "it is a race against itself"),
    "two processes": (dict(processes=2), "it ran 2 processes; the track demands 1"),
}


@pytest.mark.parametrize("kind", FORGED)
def test_forged_races(raced, kind):
    change, text = FORGED[kind]
    rewrite(raced, change)
    group = folders.check_record(raced).group
    assert said(group, "race.json: ") and said(group, text), group.reasons


def consistent(record, raced, times=TIMES, losses=LOSSES, **changes):
    """A race whose numbers all fit each other."""
    write(raced, "race.json", json.dumps(race_of(record, raced, times, losses, **changes)))
    return folders.check_record(raced)


def test_consistent_forgeries(record, raced):
    """Whatever it says, the verdict has to follow from times and losses by the default rules."""
    assert consistent(record, raced).ok
    same = TIMES | {"candidate": [1003, 1010.0, 992, 1019]}
    assert said(consistent(record, raced, times=same), "does not show less time")
    worse = LOSSES | {"reference": [1.4845, 1.4856, 1.4868, 1.4880]}
    assert said(consistent(record, raced, losses=worse), "does not show a loss as good")
    assert said(consistent(record, raced, losses=worse, loss_margin=0.5), "the loss margin is 0.5")
    lost = LOSSES | {"reference": [loss - 0.02 for loss in LOSSES["candidate"]]}
    group = consistent(record, raced, losses=lost)
    assert said(group, "candidate's losses are not shown to be below 1.5"), group.group.reasons
    two = {who: column[:2] for who, column in TIMES.items()}
    group = consistent(record, raced, times=two, losses={w: c[:2] for w, c in LOSSES.items()})
    assert said(group, "2 pairs of 2 planned; at least 3 are needed")
    late = record.with_name("2026-11-29_late")
    shutil.copytree(record, late)
    (late / "train_gpt.py").write_text(SOURCE + "# late\n")
    write(raced, "race.json", json.dumps(race_of(late, raced)))
    assert said(folders.check_record(raced), "2026-11-29_late is a later record")
    edit(record / "train_gpt.py", "torch", "numpy")
    write(raced, "race.json", json.dumps(race_of(late, raced) | {"reference": FIRST}))
    assert said(
        folders.check_record(raced), f"the reference was another source than record {FIRST}"
    )


def test_what_is_raced_is_what_ran(raced):
    """A record's runs have the flags of the race, so its recipe stands in its train_gpt.py."""
    for seed in range(4):
        edit(
            raced / f"run_{seed}.txt", f"argv: --seed {seed}", f"argv: --seed {seed} --lr_muon 0.02"
        )
    assert said(folders.check_record(raced), "was started with --lr_muon")


def old(record, raced, times=TIMES, losses=LOSSES, **changes):
    """A race whose times are those of the logs' lines, as before December 2026."""
    race = race_of(record, raced, times, losses, **changes) | {"times_ms": times}
    race = {k: v for k, v in race.items() if k not in ("wall_ms", "startup_ms", "run_ids")}
    write(raced, "race.json", json.dumps(race))
    return folders.check_record(raced)


def test_early_records(record, raced, monkeypatch):
    """Records listed as older than the rules pass with a wider margin, but only winners rank."""
    settle(monkeypatch, record, raced, early=SECOND)
    found = old(record, raced, loss_margin=0.02)
    assert found.ok and not found.unranked, found.group.reasons
    worse = LOSSES | {"candidate": [1.4955, 1.4965, 1.4975, 1.4980]}
    found = old(record, raced, losses=worse, loss_margin=0.02)
    assert found.ok and "does not show a loss as good: +0.005" in found.unranked
    settle(monkeypatch, record, raced)
    assert said(old(record, raced, loss_margin=0.02), "the loss margin is 0.02")
    runs = folders.runs_of(raced)
    times = TIMES | {"candidate": [run.train_time for run in runs]}
    own = {"candidate": [run.val_loss for run in runs]}
    own["reference"] = [loss + 1e-3 for loss in own["candidate"]]
    own["reference"][0] += 1e-4
    assert old(record, raced, times, own).ok, "settled, with the logs' own times and losses"
    shifted = times | {"candidate": [0.9 * time for time in times["candidate"]]}
    assert said(old(record, raced, shifted, own), "times are not those of the runs here")
    lower = own | {"candidate": [loss - 0.001 for loss in own["candidate"]]}
    assert said(old(record, raced, times, lower), "losses are not those of the runs here")


def test_no_race_where_races_do_not_rank(raced, monkeypatch):
    monkeypatch.setitem(TRACKS, "laptop", dataclasses.replace(TRACKS["laptop"], raced=False))
    assert said(folders.check_record(raced), "this track is not ranked by race")
