"""What load_model's model answers to the rows it is shown: run beside a copy of the script.

    python answer.py    reads model.pt, plan.json and rows.npy, writes answers.bin

Exit code 3: the script has no load_model. What is trusted is computed elsewhere: this process
belongs to the script as soon as that is imported.
"""

import json
import sys

import numpy as np
import torch


def main() -> int:
    import train_gpt

    with open("plan.json") as file:
        plan = json.load(file)
    if not hasattr(train_gpt, "load_model"):
        return 3
    rows = np.load("rows.npy")  # [N, T], with losses [N, T + 1]
    model = train_gpt.load_model("model.pt", device=plan["device"])
    start = 0
    with open("answers.bin", "wb") as out, torch.no_grad():
        for size in plan["sizes"]:
            part = torch.from_numpy(rows[start : start + size]).to(plan["device"])
            tokens = part[:, :-1].contiguous() if plan["answer"] == "losses" else part
            logits = model(tokens)  # [B, T, V]
            if tuple(logits.shape[:2]) != tuple(tokens.shape) or logits.ndim != 3:
                print(f"load_model's model answers {list(logits.shape)} to {list(tokens.shape)}")
                return 4
            if plan["answer"] == "position":
                at = torch.tensor(plan["at"][start : start + size], device=logits.device)
                answer = logits[torch.arange(len(part), device=logits.device), at]  # [B, V]
            elif plan["answer"] == "losses":
                odds = torch.log_softmax(logits.double(), -1)
                answer = -odds.gather(-1, part[:, 1:, None]).squeeze(-1)  # [B, T]
            else:
                answer = logits
            out.write(answer.float().cpu().contiguous().numpy().tobytes())
            start += size
    return 0


if __name__ == "__main__":
    sys.exit(main())
