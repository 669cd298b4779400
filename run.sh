#!/usr/bin/env bash
# Finds a Python. setup/environment.py sets it up, setup/launch.py gets the data and starts training.
set -eu
cd "$(dirname "$0")"
if [ "${1-} ${2-}" = "help " ]; then
    cat <<'HELP'
./run.sh [--flag value ...]   set up, get the data, train: gpt2_small on all GPUs, laptop without one
./run.sh setup                set up, no more
./run.sh fetch [--flag ...]   set up and get the data of such a run, no more
./run.sh prepare FILES... --out DIR    set up and turn your own text into token shards
./run.sh test [pytest flags]  set up and run the tests
./run.sh help                 this text; ./run.sh --help lists the flags of train_gpt.py

The first start makes .venv from requirements.txt, unless the active Python already has all of it.
A .venv that is not run.sh's is used if it has all of it, and never changed.
The presets' data is fetched or built; shards that --train_files names are only checked.
Everything runs in the folder of run.sh: relative paths in flags start there.

PYTHON=path   use this Python as it is and install nothing
NPROC=n       processes on this machine (default: one for each GPU, or one)
NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT   several machines: the same command on each, with
              NODE_RANK 0, 1, ... (torchrun's own PET_NNODES, PET_RDZV_ENDPOINT, ... work as well)
HELP
    exit
fi
for python in "${PYTHON:-python3}" python python3.13 python3.12 python3.11 .venv/bin/python; do
    new=$("$python" -c 'import sys; print(sys.version_info >= (3, 11))' 2>/dev/null | tail -n 1)
    [ "$new" != True ] || exec "$python" setup/environment.py "$@"
    [ -z "${PYTHON-}" ] || break
done
echo "run.sh: ${PYTHON:-python3} does not run as Python 3.11 or newer;" \
    "install one, or name one with PYTHON=" >&2
exit 2
