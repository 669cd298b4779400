"""The tracks: what each one demands of a run, a record folder and a race."""

from dataclasses import dataclass, field

from data import laptop

# Of kjj0/fineweb10B-gpt2: the object id under which the hub keeps the shard. This
# project has never fetched it; the same value stands in several public repositories.
FINEWEB_VAL = {
    "fineweb_val_000000.bin": "5b95c8e0966f0861685b307b23dc5ae42b228ef74b28cb499784ae021f201640"
}

# Flags that say where and how a run was started, not what it computed: they may differ.
LOCAL_FLAGS = {
    "seed",
    "log_dir",
    "train_files",
    "val_files",
    "micro_batch",
    "rank_timeout",
    "checkpoint_dir",
    "checkpoint_every",
    "checkpoint_keep",
    "log_norms",
}
# Config fields of that kind, with those of runs that do not train and of resumed ones.
RUN_LOCAL = LOCAL_FLAGS | {
    "resume",
    "resume_anyway",
    "checkpoint",
    "generate",
    "generate_tokens",
    "temperature",
}


@dataclass(frozen=True)
class Track:
    """What all runs of a record have in common; None: anything, as long as all runs agree."""

    about: str
    target: float  # validation loss, nats per token
    val_tokens: int
    vocab_size: int
    data: str  # what the names of the shards begin with
    files: dict  # shard -> sha256, all of which must have been used
    other_files: bool  # whether there may be others
    world_size: int | None = None
    device: str | None = None  # CPU, GPU, or a part of its name
    resumed: bool = False  # whether a run may have been
    raced: bool = False  # ranked by paired race, not by what a log says
    preset: str | None = None
    # {name: sha256 of the source} of the records that are in. A date is soon made up: what is not
    # in here comes after them.
    settled: dict = field(default_factory=dict)
    # Those up to this name are older than the rules that all races use the default margin and that
    # a folder holds the runs of its race. What they prove is worked out anew from their times and
    # losses; those that do not win are not ranked.
    early: str = ""


def fineweb(about: str, **rules) -> Track:
    """A track whose task is 3.28 on FineWeb in GPT-2's tokens."""
    return Track(about, 3.28, 10_485_760, 50257, "fineweb", FINEWEB_VAL, True, **rules)


SETTLED_LAPTOP = {
    "2026-11-21_01_adamw": "56449a46baeeabd65993152c63a5cf8c3cbbce0eb5fcdcfcf206cb61b8a3dfe8",
    "2026-11-21_02_muon": "4549e634971192f2c62671dbd1d512fd33e1e4c89d34e593691d2e3d1650aeb3",
    "2026-11-21_03_relu2_qknorm_zeroinit": (
        "aa79252cf791acb012e396b7e05bf15fb2983bf19f1238b9aca3deaf71b2b3df"
    ),
    "2026-11-21_04_untied_head": "0ce14f554868ca81f38a431e372d2d8b7cb7c555260df9734f7c40672b155d89",
    "2026-11-21_05_nov2024": "922f6a004adc4e73829baab72a7ef3c80162df2a75e14ee4080bd910281b98a9",
    "2026-11-21_06_ngrams": "ce046e8ec0183cc5ff7c2f1942876a914277e5226d8b41a522e8919e57199e57",
    "2026-11-21_07_short_rows": "ebecc0ebdf5090901a2c5285dd39588097fd2a53d43871b9cff832cfd4acb873",
    "2026-11-21_08_two_layers": "7fef417ec4b6f83feb824977e210ba294d004a8634fea59ef456bb1008afe1f7",
    "2026-11-21_09_lr_floor": "6f9417782b3263ff63d6770df9c764ab367fc895671aa2f5c8a04977210ec284",
    "2026-11-21_10_normuon": "90e13e2cfb7bd4f9b7e203c5a2669198a388b7510c71ba0eb0e660796823b799",
    "2026-11-21_11_key_offset": "a81376fa09a022e3225a340b66ceea47fe701740174caf871d502c369c4cded6",
    "2026-11-28_12_fewer_passes": (
        "501c1e7cca5e3f173c8ff906ab72f9869b68a1a5e98724e858bf4dabad23e1c8"
    ),
}

TRACKS = {
    "speed": fineweb(
        "8×H100, FineWeb, val loss ≤ 3.28: least train time", world_size=8, device="H100"
    ),
    "one_gpu": fineweb(
        "one GPU of any kind, FineWeb, val loss ≤ 3.28: best paired race",
        world_size=1,
        device="GPU",
        raced=True,
    ),
    "laptop": Track(
        "CPU, the laptop corpus and its target: best paired race",
        target=1.26,
        val_tokens=262_144,
        vocab_size=257,
        data="laptop",
        files=laptop.SHA256,
        other_files=False,
        world_size=1,
        device="CPU",
        raced=True,
        preset="laptop",
        settled=SETTLED_LAPTOP,
        early="2026-11-21_09_lr_floor",
    ),
    "memory": fineweb("FineWeb, val loss ≤ 3.28: least peak memory", resumed=True),
}
