"""The share of training time spent outside forward, backward and update: data, bookkeeping, the
log, the screen.

    python -m records step_share [--steps 60] [other flags of train_gpt.py]

Runs the trainer in this process with a stopwatch around forward_backward and update, and compares
their sum with the clock's training time. On CUDA the stopwatch synchronises the device, so there
the share is an upper bound."""

import time

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
    passes, updates, runs = [], [], []
    result_of = train_gpt.result_of

    def noting_result(run, *rest):
        runs.append(run)
        return result_of(run, *rest)

    train_gpt.result_of = noting_result
    train_gpt.forward_backward = timed(train_gpt.forward_backward, passes, sync)
    train_gpt.update = timed(train_gpt.update, updates, sync)
    if "--steps" not in argv:
        argv = ["--steps", "60", *argv]
    code = train_gpt.main(argv)
    if code:
        return code
    steps, total = runs[0].config.steps, runs[0].clock.seconds
    # What came before belongs to the warm-up, outside the clock
    forward, update = sum(passes[-steps:]) / total, sum(updates[-steps:]) / total
    print(
        f"{steps} steps, {total:.2f} s of training: forward and backward {forward:.1%}, "
        f"update {update:.1%}, everything else {1 - forward - update:.1%}"
    )
    return 0
