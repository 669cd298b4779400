"""The share of training time spent outside forward, backward and update: data, bookkeeping, the log, the screen.

    python -m records step_share [--steps 60] [other flags of train_gpt.py]

Runs the trainer in this process with a stopwatch around forward_backward and update, and compares their sum with the clock's
training time. On CUDA the stopwatch synchronises the device, so there the share is an upper bound.
"""

import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
import train_gpt
from records.tools.command import command


def timed(function, seconds: list[float], sync):
    def wrapper(*args, **kwargs):
        sync()
        begun = time.perf_counter()
        result = function(*args, **kwargs)
        sync()
        seconds.append(time.perf_counter() - begun)
        return result

    return wrapper


@command("step_share")
def main(argv) -> int:
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    sync = train_gpt.torch.cuda.synchronize if train_gpt.torch.cuda.is_available() else lambda: None
    passes, updates, clocks = [], [], []
    stop = train_gpt.Clock.stop

    def noting_stop(clock):
        stop(clock)
        clocks.append(clock.seconds)

    train_gpt.Clock.stop = noting_stop
    train_gpt.forward_backward = timed(train_gpt.forward_backward, passes, sync)
    train_gpt.update = timed(train_gpt.update, updates, sync)
    if code := train_gpt.main(
        argv if any(word.startswith("--steps") for word in argv) else ["--steps", "60", *argv]
    ):
        return code
    steps = len(updates) - 1  # the first one is the warm-up's, outside the clock
    inside, total = sum(passes[-steps:]) + sum(updates[-steps:]), clocks[-1]
    print(
        f"{steps} steps, {total:.2f} s of training: forward and backward {sum(passes[-steps:]) / total:.1%}, update "
        f"{sum(updates[-steps:]) / total:.1%}, everything else {1 - inside / total:.1%}"
    )
    return 0
