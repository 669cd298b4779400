"""What every verb of `python -m records` shares: parser, errors, printing, writing of files."""

import argparse
import contextlib
import functools
import json
import math
import os
import re
import signal
import sys
import tempfile
import traceback
from pathlib import Path

from data.shards import BadInput, explain

HELP = argparse.RawDescriptionHelpFormatter
BUG = 70  # exit code of a fault of ours


class Parser(argparse.ArgumentParser):
    """argparse in one style: a module's docstring as help, no guessed flags, errors of one line."""

    def __init__(self, verb: str, doc: str, **options):
        defaults = dict(prog=f"python -m records {verb}", formatter_class=HELP, allow_abbrev=False)
        super().__init__(description=doc, **defaults | options)

    def error(self, message):
        raise BadInput(f"{message}; see {self.prog} --help")


class Interrupted(BaseException):
    """SIGINT, SIGTERM or SIGHUP; the argument is the exit code."""


@contextlib.contextmanager
def interruptible():
    """SIGINT, SIGTERM and SIGHUP raise Interrupted inside: a running trainer is ended first."""

    def interrupt(number, frame):
        raise Interrupted(128 + number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    heard = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]  # nohup
    before = {number: signal.signal(number, interrupt) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def command(verb: str):
    """Decorates a verb's main(argv): every exception becomes an exit code here, and nowhere else.
    What a user can mend is one line and 2; a fault of ours is a traceback and BUG, so that it is
    never taken for a verdict."""

    def decorate(main):
        @functools.wraps(main)
        def wrapped(argv=None) -> int:
            try:
                with interruptible():
                    return main(sys.argv[1:] if argv is None else [str(word) for word in argv])
            except BadInput as error:
                line, code = str(error), 2
            except BrokenPipeError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return 0
            except OSError as error:
                line, code = explain(error), 2
            except Interrupted as stopped:
                line, code = "interrupted", stopped.args[0]
            except KeyboardInterrupt:
                line, code = "interrupted", 130
            except Exception as error:
                traceback.print_exc()
                line, code = f"a bug of this tool, no verdict ({type(error).__name__})", BUG
            print(f"records {verb}: {printable(line, 1000)}", file=sys.stderr)
            return code

        return wrapped

    return decorate


def number_in(kind, low, high=math.inf):
    """An argparse type: a number between low and high."""

    def parse(given):
        value = kind(given)
        if not (low <= value <= high and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{given} is not between {low} and {high}")
        return value

    parse.__name__ = kind.__name__
    return parse


def new_file(given) -> Path:
    """An argparse type: a path at which nothing is overwritten, in a folder that exists."""
    path = Path(given)
    if not path.parent.is_dir() or os.path.lexists(path):
        raise BadInput(f"{path}: give a new file in a folder that exists")
    return path


def need(*modules: str):
    """BadInput unless all of these can be imported."""
    for module in modules:
        try:
            __import__(module)
        except ImportError:
            raise BadInput(
                f"{module} is not installed; pip install -r records/requirements.txt"
            ) from None


def printable(text, limit: int = 120) -> str:
    """`text` safe for a terminal: control characters replaced, long text shortened."""
    text = "".join(c if c.isprintable() else "?" for c in str(text))
    return text if len(text) <= limit else text[: limit - 3] + "..."


def markdown(text, limit: int = 120) -> str:
    """`text` from a folder or a log as plain text in Markdown: no markup, link, HTML, new cell."""
    text = printable(text, limit)
    text = re.sub(r"([\\`*\[\](){}<>#!|~&@]|:(?=//)|(?<=www)\.)", r"\\\1", text)
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)


def emit(text: str):
    """Print to stdout; a reader that has gone away (`| head`) is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def write_atomic(path, data: bytes):
    """Write to a temporary name beside `path`, then rename: no reader ever sees half a file."""
    handle, temporary = tempfile.mkstemp(dir=os.path.dirname(os.path.abspath(path)), prefix=".tmp_")
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_json(path, value):
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    write_atomic(path, text.encode())


def _markers(name):
    return f"<!-- {name} -->", f"<!-- /{name} -->"


def between(text: str, name: str) -> str | None:
    """What stands between `<!-- name -->` and `<!-- /name -->`, stripped; None without these."""
    start, end = _markers(name)
    _, found, rest = text.partition(start)
    body, closed, _ = rest.partition(end)
    return body.strip() if found and closed else None


def replace_between(text: str, name: str, body: str) -> str:
    """`text` with the block `name` replaced; ValueError where its comments are not there."""
    start, end = _markers(name)
    if between(text, name) is None:
        raise ValueError(f"no {start} ... {end} in the text")
    head, _, rest = text.partition(start)
    return f"{head}{start}\n{body.strip()}\n{end}{rest.partition(end)[2]}"
