"""What a checkpoint's model answers to rows of tokens: run beside a copy of the script.

    python answer.py DEVICE NAME...    reads model.pt and NAME.npz, writes NAME.answers

This process belongs to the script as soon as that is imported: what is trusted is computed, or
checked against blind questions, elsewhere.
"""

import sys

import numpy as np
import torch


def answer(model, part, at):
    """float32: losses of the targets of part [B, T + 1], or logits [B, V] at one place of each
    row of part [B, T]. Logits or log-probabilities: the softmax of both is the same."""
    tokens = part[:, :-1].contiguous() if at is None else part
    logits = model(tokens)  # [B, T, V]
    if logits.ndim != 3 or logits.shape[:2] != tokens.shape:
        raise SystemExit(f"load_model's model: {list(tokens.shape)} to {list(logits.shape)}")
    if at is not None:
        return logits[torch.arange(len(part)), at].float()
    odds = torch.log_softmax(logits.double(), -1)
    return -odds.gather(-1, part[:, 1:, None]).squeeze(-1).float()


def main(device, *names):
    import train_gpt

    if not hasattr(train_gpt, "load_model"):
        raise SystemExit("the script has no load_model")
    model = train_gpt.load_model("model.pt", device=device)
    for name in names:
        asked = np.load(f"{name}.npz")
        rows, start = torch.from_numpy(asked["rows"]).to(device), 0
        with open(f"{name}.answers", "wb") as out, torch.no_grad():
            for size in asked["sizes"]:
                piece = slice(start, start + size)
                at = torch.from_numpy(asked["at"][piece]) if len(asked["at"]) else None
                out.write(answer(model, rows[piece], at).cpu().contiguous().numpy().tobytes())
                start += size


if __name__ == "__main__":
    main(*sys.argv[1:])
