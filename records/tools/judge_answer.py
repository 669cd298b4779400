"""What load_model's models answer to the rows they are shown: run beside a copy of the script.

    python answer.py    reads plan.json, of its nth entry n.pt and n.npy; writes n.answers, n.json

Exit code 3: the script has no load_model. What is trusted is computed elsewhere: this process
belongs to the script as soon as that is imported.
"""

import hashlib
import json
import sys

import numpy as np
import torch


def answer(model, part, at):
    """float32: losses of the targets of part [B, T + 1], or logits [B, V] at one place of each
    row of part [B, T]."""
    tokens = part[:, :-1].contiguous() if at is None else part
    logits = model(tokens)  # [B, T, V]
    if logits.ndim != 3 or logits.shape[:2] != tokens.shape:
        raise SystemExit(f"load_model's model: {list(tokens.shape)} to {list(logits.shape)}")
    if at is not None:
        return logits[torch.arange(len(part)), at].float()
    odds = torch.log_softmax(logits.double(), -1)
    return -odds.gather(-1, part[:, 1:, None]).squeeze(-1).float()


def parameters(model):
    """{name: sha256 of the values}, where it has any."""
    named = dict(getattr(model, "named_parameters", dict)())
    values = {name: p.detach().float().cpu().numpy().tobytes() for name, p in named.items()}
    return {name: hashlib.sha256(value).hexdigest() for name, value in values.items()}


def main() -> int:
    import train_gpt

    with open("plan.json") as file:
        plan = json.load(file)
    if not hasattr(train_gpt, "load_model"):
        return 3
    for number, entry in enumerate(plan):
        rows = torch.from_numpy(np.load(f"{number}.npy")).to(entry["device"])
        model, start = train_gpt.load_model(f"{number}.pt", device=entry["device"]), 0
        with open(f"{number}.answers", "wb") as out, torch.no_grad():
            for size in entry["sizes"]:
                piece = slice(start, start + size)
                at = entry["at"] and torch.tensor(entry["at"][piece])
                out.write(answer(model, rows[piece], at).cpu().contiguous().numpy().tobytes())
                start += size
        with open(f"{number}.json", "w") as out:
            json.dump(parameters(model), out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
