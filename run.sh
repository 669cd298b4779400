#!/usr/bin/env bash
# Sets up once, gets the data, trains. `./run.sh help` says how.
set -eu
cd "$(dirname "$0")"
usage="./run.sh [--flag value ...]   set up, get the data, train: gpt2_small on all GPUs, or laptop where there is none
./run.sh test [pytest flags]  set up and run the tests
./run.sh help                 this text; ./run.sh --help lists the flags of train_gpt.py

The first start makes .venv from requirements.txt, unless the active Python already has all of it.
Data is fetched or built only where no --train_files is given: data/laptop.py for laptop, data/fineweb.py otherwise.
Everything runs in the folder of run.sh: relative paths in flags start there.

PYTHON=path   use this Python as it is and install nothing
NPROC=n       processes on this machine (default: one for each GPU, or one)
NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT   several machines: the same command on each, with NODE_RANK 0, 1, ...
              (torchrun's own PET_NNODES, PET_RDZV_ENDPOINT, ... work as well)"
fail() { echo "run.sh: $*" >&2; exit 2; }

# lacks PYTHON NUMPY|"" PACKAGE...: what is wrong there, or nothing. Asks for metadata: importing torch takes seconds.
lacks() {
    "$1" -c 'import sys; from importlib.metadata import version
found = {name: version(name) for name in sys.argv[2:]}
if not (2, 11) <= tuple(int(part) for part in found["torch"].split(".")[:2]) <= (2, 13):
    sys.exit("torch %s is not between 2.11 and 2.13" % found["torch"])
if sys.argv[1] not in ("", found["numpy"]):
    sys.exit("numpy %s is not %s, the laptop corpus" % (found["numpy"], sys.argv[1]))' "${@:2}" 2>&1 | tail -n 1
}

# Runs a command in its own process group, passes signals on to it exactly once, and waits until it has ended.
supervise() {
    local stopped="" status=0
    set -m; "$@" </dev/null & child=$!; set +m
    trap 'stopped=143; kill -s TERM "$child" 2>/dev/null || :' TERM HUP
    trap 'stopped=130; kill -s INT "$child" 2>/dev/null || :' INT
    until wait "$child"; do status=$?; kill -0 "$child" 2>/dev/null || break; done
    trap - TERM HUP INT
    [ -z "$stopped" ] || exit "$stopped"
    return "$status"
}

# setup [PACKAGE...]: sets $python to one that has these and all that training needs.
setup() {
    local why base venv=$PWD/.venv stamp=.venv/installed${1:+_tests} files=(requirements.txt)
    [ $# = 0 ] || files+=(tests/requirements.txt records/requirements.txt)
    set -- torch numpy tiktoken huggingface_hub "$@"
    if [ -n "${PYTHON-}" ]; then
        python=$PYTHON why=$(lacks "$PYTHON" "" "$@")
        [ -z "$why" ] || fail "PYTHON=$PYTHON: $why; pip install -r requirements.txt there, or unset PYTHON for a .venv"
        return
    fi
    base=$(command -v python3 || command -v python) || fail "no python3 found; install Python 3.11 or newer"
    python=$base why=$(lacks "$base" "$(sed -n 's/^numpy==//p' requirements.txt)" "$@")
    [ -n "$why" ] || return 0
    "$base" -c "import sys; sys.exit(sys.version_info < (3, 11))" ||
        fail "$base is older than Python 3.11; install that or newer, or name one with PYTHON="
    # The stamp is a copy of what was installed: after an edit or an interrupted set-up it differs.
    python=$venv/bin/python
    if cat "${files[@]}" | cmp -s - "$stamp" && "$python" -c ""; then return; fi
    echo "run.sh: setting up $venv ($base: $why)" >&2
    # Debian's python3 may come without ensurepip; its pip can still put one there from outside.
    "$python" -m pip --version >/dev/null 2>&1 || supervise "$base" -m venv --clear "$venv" >/dev/null ||
        { "$base" -m venv --clear --without-pip "$venv" && "$base" -m pip -q --python "$python" install pip; } ||
        fail "$base cannot make a virtual environment; install its venv module (python3-venv), or set PYTHON="
    supervise "$python" -m pip install "${files[@]/#/-r}" || fail "pip install failed, see above; run again to retry"
    cp requirements.txt .venv/installed
    cat "${files[@]}" >"$stamp"
}

case " ${*-} " in
    " help ") echo "$usage"; exit ;;
    " test "*) shift; setup pytest scipy matplotlib; exec "$python" -m pytest -q "$@" ;;
    *" -h "* | *" --help "* | *" --generate"*) setup; exec "$python" train_gpt.py "$@" ;;
esac
setup
# One look at machine and flags: GPUs, threads, and the command that brings the data. Bad flags end here, before any download.
plan=$("$python" -c 'import sys, torch, train_gpt
gpus = torch.cuda.device_count()
try:
    config = train_gpt.parse_config(sys.argv[1:], "gpt2_small" if gpus else "laptop")
except train_gpt.UserError as error:
    sys.exit(print(f"train_gpt.py: {error}", file=sys.stderr) or 2)
shards = -(-(config.steps * config.batch_tokens + 1) // (config.epochs_allowed * 10**8))
data = {"data/laptop/laptop_train_*.bin": "laptop.py", "data/fineweb10B/fineweb_train_*.bin": f"fineweb.py {shards}"}
print(gpus, torch.get_num_threads(), data.get(config.train_files, ""))' "$@") || exit
read -r gpus threads data <<<"$plan"
rendezvous=""
processes=${NPROC:-$((gpus > 0 ? gpus : 1))}
case $processes in 0* | *[!0-9]*) fail "NPROC=$processes is not a number of processes; give 1 or more" ;; esac
for name in NNODES NODE_RANK MASTER_ADDR MASTER_PORT; do # torchrun takes its defaults from PET_*
    pet=PET_$name value=${!name-}
    [ -z "$value" ] || export "$pet=${!pet-$value}"
done
[ -n "${PET_NNODES-}${PET_MASTER_ADDR-}${PET_RDZV_ENDPOINT-}" ] || rendezvous=--standalone
[ "${PET_NNODES:-1}" = 1 ] || [ -n "${PET_RDZV_ENDPOINT:-${PET_NODE_RANK:+${PET_MASTER_ADDR-}}}" ] ||
    fail "NNODES=$PET_NNODES needs MASTER_ADDR and NODE_RANK as well (or torchrun's PET_RDZV_ENDPOINT)"

# shellcheck disable=SC2086 # a script and its argument
[ -z "$data" ] || supervise "$python" data/$data
[ "$processes" != 1 ] || [ -z "$rendezvous" ] || exec "$python" train_gpt.py "$@"

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > processes ? threads / processes : 1))}"
# torchrun hides its workers' exit codes; train_gpt.py leaves the first cause here, as "<exit code> <message>".
SPEEDRUN_ERROR_FILE=$(mktemp) && export SPEEDRUN_ERROR_FILE
trap 'rm -f "$SPEEDRUN_ERROR_FILE"' EXIT
supervise "$python" -m torch.distributed.run ${rendezvous:+"$rendezvous"} --nproc_per_node="$processes" \
    train_gpt.py "$@" && exit || status=$?
[ ! -s "$SPEEDRUN_ERROR_FILE" ] || { read -r status message <"$SPEEDRUN_ERROR_FILE" || :; echo "$message" >&2; }
exit "$status"
