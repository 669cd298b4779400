"""Memory study: bytes of weights, gradients and optimizer state, from live tensors and for the
GaLore paper's models.

    python records/methods/memory.py     3 minutes; 6 GB of memory; writes memory_*.csv, memory.png

Live: one update of the presets laptop (four layers, no tables) and nov2024. Gradients
are those that the backward pass leaves; with per-layer updates the peak is taken as each gradient
arrives, before it is freed. For nov2024 the projection is a random one and Newton-Schulz is left
out: sizes
do not depend on values, and both take minutes on a CPU.

Shapes: the LLaMA models of arXiv 2403.03507 (configs of its public code), untied head, vocabulary
32,000. Their bytes come from the formula in state_floats, which is first checked against this
trainer's live tensors on all 60M shapes."""

import dataclasses
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import ALONE, arguments, build, change, figure, read_csv, save, tg, write_csv  # noqa: E402

LLAMA = {  # hidden, intermediate, layers, rank in the paper
    "60M": (512, 1376, 8, 128),
    "130M": (768, 2048, 12, 256),
    "350M": (1024, 2736, 24, 256),
    "1B": (2048, 5461, 24, 512),
    "7B": (4096, 11008, 32, 1024),
}
VOCAB = 32000


def variants(rank: int) -> dict[str, dict]:
    galore = dict(galore=rank, matrix_optimizer="adam")
    return {
        "Muon": {},
        "Adam": dict(matrix_optimizer="adam"),
        f"GaLore {rank}": galore,
        f"GaLore {rank}, 8 bit": galore | dict(galore_bits=8),
        f"GaLore {rank}, 8 bit, per layer": galore | dict(galore_bits=8, galore_per_layer=True),
        f"ReLoRA {rank}": dict(relora=rank, relora_warm_start=1, matrix_optimizer="adam"),
    }


def storages(tensors) -> int:
    """Bytes of the distinct storages behind some tensors."""
    found = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in tensors
        if t is not None
    }
    return sum(found.values())


def measure(preset: str, name: str, fields: dict) -> dict:
    """One update (ReLoRA: one before and one after the wrap); bytes at their peak."""
    config = change(
        tg.PRESETS[preset],
        seq_len=64,
        batch_tokens=64,
        val_tokens=64,
        steps=100,
        device="cpu",
        **fields,
    )
    gradients = 0

    def look(run):
        nonlocal gradients
        live = [o.grads for o in run.optimizers] + [p.grad for p in run.model.parameters()]
        gradients = max(gradients, storages(live))

    arrived = tg.PerLayer.arrived

    def look_first(self, p):
        look(run)
        arrived(self, p)

    tg.PerLayer.arrived = look_first
    try:
        run = build(config)
        rows = tg.random_rows(run, 1, 64)
        for _step in range(1 + bool(config.relora)):
            gradients = 0
            tg.set_stage(run)
            tg.forward_backward(run, tg.make_batch(run, rows, run.step, []))
            look(run)
            tg.step_optimizers(run)
            run.step += 1
            for method in run.methods:
                method.after_step(run.step, run)
    finally:
        tg.PerLayer.arrived = arrived
    hidden = [o for o in run.optimizers if o.weights.ndim == 3]
    state = {
        which: sum(t.nbytes for o in group for t in o.state.values())
        for which, group in (("hidden", hidden), ("all", run.optimizers))
    }
    weights = storages(run.model.parameters())
    return dict(
        preset=preset,
        variant=name,
        weights=weights,
        gradients=gradients,
        state=state["all"],
        hidden_state=state["hidden"],
        total=weights + gradients + state["all"],
    )


def live() -> list[dict]:
    plain = dict(n_layer=4, ngram=0, value_embeds=False, normuon=0.0)
    rows = [measure("laptop", name, fields | plain) for name, fields in variants(32).items()]
    eigh, newton_schulz = torch.linalg.eigh, tg.newton_schulz

    def any_basis(a):
        return None, torch.eye(a.size(-1)).expand_as(a)

    # The sizes are the same, and these two would take minutes
    torch.linalg.eigh, tg.newton_schulz = any_basis, lambda g, *args, **kwargs: g
    try:
        names = variants(128) | {
            "GaLore 64": dict(galore=64, matrix_optimizer="adam"),
            "GaLore 256": dict(galore=256, matrix_optimizer="adam"),
        }
        for name, fields in names.items():
            rows.append(measure("nov2024", name, fields))
    finally:
        torch.linalg.eigh, tg.newton_schulz = eigh, newton_schulz
    return rows


def shapes(model: str) -> tuple[list, list]:
    """(hidden matrices, all others) of a LLaMA model, as [(count, rows, columns)]."""
    d, ff, layers, _ = LLAMA[model]
    return [(4 * layers, d, d), (3 * layers, ff, d)], [(2, VOCAB, d), (2 * layers + 1, 1, d)]


def state_floats(model: str, rank: int) -> tuple[int, int]:
    """(entries of projections, entries of moments): a hidden m x n matrix has min r and 2 max r,
    any other weight 0 and 2."""
    hidden, others = shapes(model)
    return (
        sum(count * min(m, n) * rank for count, m, n in hidden),
        sum(count * 2 * max(m, n) * rank for count, m, n in hidden)
        + sum(2 * count * m * n for count, m, n in others),
    )


def check_formula(model: str = "60M"):
    """The formula against live tensors: one update of every matrix of a model, full Adam and
    GaLore, 32 and 8 bits."""
    hidden, others = shapes(model)
    rank, eigh = LLAMA[model][3], torch.linalg.eigh
    projections, moments = state_floats(model, rank)
    small = sum(2 * count * m * n for count, m, n in others)
    low_moments = moments - small
    for bits in (32, 8):
        config = dataclasses.replace(
            tg.PRESETS["laptop"], galore=rank, galore_bits=bits, matrix_optimizer="adam"
        )
        run = tg.Run(config, ALONE, None, [])
        method, measured = tg.GaLore(config), 0
        torch.linalg.eigh = lambda a: (None, torch.eye(a.size(-1)).expand_as(a))
        try:
            for count, m, n in hidden + others:
                low = (count, m, n) in hidden
                named = {str(i): tg.parameter(torch.zeros(m, n), "matrix") for i in range(count)}
                rule = method.wraps(tg.Adam) if low else tg.Adam
                group = tg.MATRIX_GROUPS["adam"]
                optimizer = rule(named, group, (m, n) if low else (), run)
                optimizer.method = method if low else optimizer.method
                optimizer.grads = torch.randn_like(optimizer.weights)
                optimizer.step()
                measured += sum(t.nbytes for t in optimizer.state.values())
        finally:
            torch.linalg.eigh = eigh
        packed = 4 * low_moments if bits == 32 else low_moments + 4 * low_moments // rank
        expected = 4 * (projections + small) + packed
        print(f"{model}, {bits} bit: live {measured:,} bytes, formula {expected:,}")
        assert measured == expected


def paper() -> list[dict]:
    """Bytes per part for each model; the columns are the readings of the paper's claims, and this
    trainer."""
    rows = []
    for model, (_d, _ff, _layers, rank) in LLAMA.items():
        hidden, others = shapes(model)
        weights = sum(count * m * n for count, m, n in hidden + others)
        projections, moments = state_floats(model, rank)
        small = sum(2 * count * m * n for count, m, n in others)
        largest = max(m * n for _, m, n in hidden + others)

        def row(name, weights, gradients, state, model=model, rank=rank):
            new = dict(
                model=model,
                rank=rank,
                variant=name,
                weights=weights,
                gradients=gradients,
                state=state,
                total=weights + gradients + state,
            )
            ours = name.startswith("this trainer")
            first = next(
                (
                    r
                    for r in rows
                    if r["model"] == model and r["variant"].startswith("this trainer") == ours
                ),
                new,
            )  # Adam, in either
            rows.append(
                new
                | dict(
                    state_change=state / first["state"] - 1,
                    total_change=new["total"] / first["total"] - 1,
                )
            )

        row("Adam, all bf16", 2 * weights, 2 * weights, 4 * weights)
        row("GaLore, all bf16", 2 * weights, 2 * weights, 2 * (projections + moments))
        row("GaLore, all bf16, P not counted", 2 * weights, 2 * weights, 2 * moments)
        row("GaLore, 8-bit moments, P one byte", 2 * weights, 2 * weights, projections + moments)
        row("GaLore, 8-bit moments, P bf16", 2 * weights, 2 * weights, 2 * projections + moments)
        row(
            "GaLore, 8-bit moments, P bf16, per layer",
            2 * weights,
            2 * largest,
            2 * projections + moments,
        )
        row("this trainer: Adam, all fp32", 4 * weights, 4 * weights, 8 * weights)
        low = moments - small
        row("this trainer: GaLore, fp32", 4 * weights, 4 * weights, 4 * (projections + moments))
        row(
            "this trainer: GaLore, 8-bit hidden moments",
            4 * weights,
            4 * weights,
            4 * (projections + small) + low + 4 * low // rank,
        )
        hidden_largest = max(m * n for _, m, n in hidden)
        row(
            "this trainer: the same, per layer",
            4 * weights,
            2 * small + 4 * hidden_largest,
            rows[-1]["state"],
        )
    return rows


def report():
    table, papers = read_csv("memory_live.csv"), read_csv("memory_paper.csv")
    made, axes = figure(1, 3)
    for axis, (title, rows) in zip(
        axes,
        (
            ("laptop of four layers, live", [r for r in table if r["preset"] == "laptop"]),
            ("nov2024, live", [r for r in table if r["preset"] == "nov2024"]),
            ("LLaMA 7B, formula", [r for r in papers if r["model"] == "7B"]),
        ),
        strict=False,
    ):
        left = [0.0] * len(rows)
        for part in ("weights", "gradients", "state"):
            sizes = [r[part] / 2**20 if "live" in title else r[part] / 2**30 for r in rows]
            axis.barh(range(len(rows)), sizes, left=left, label=part)
            left = [a + b for a, b in zip(left, sizes, strict=False)]
        axis.set_yticks(range(len(rows)), [r["variant"] for r in rows], fontsize=6)
        axis.invert_yaxis()
        axis.set(title=title, xlabel="MiB" if "live" in title else "GiB")
    axes[2].legend(fontsize=7, loc="lower right")
    save(made, "memory.png")
    for r in table:
        print(
            f"{r['preset']:10} {r['variant']:32} weights {r['weights'] / 2**20:8.2f}  gradients "
            f"{r['gradients'] / 2**20:8.2f}  "
            f"state {r['state'] / 2**20:8.2f}  of it hidden {r['hidden_state'] / 2**20:8.2f}  "
            f"total {r['total'] / 2**20:8.2f} MiB"
        )
    for r in papers:
        print(
            f"{r['model']:5} {r['variant']:44} weights {r['weights'] / 1e9:7.3f}  gradients "
            f"{r['gradients'] / 1e9:7.3f}  state {r['state'] / 1e9:7.3f} "
            f"({r['state_change']:+.1%})  total {r['total'] / 1e9:7.3f} GB "
            f"({r['total_change']:+.1%})"
        )


def main(argv=None) -> int:
    flags = arguments(__doc__.partition("\n\n")[0]).parse_args(argv)
    if not flags.plot_only:
        torch.set_num_threads(flags.processes)
        check_formula()
        write_csv("memory_paper.csv", paper())
        write_csv("memory_live.csv", live())
    report()
    return 0


if __name__ == "__main__":
    sys.exit(main())
