#!/usr/bin/env bash
# torch 2.13.0: torchrun is ended by SIGUSR1, the signal that SLURM's --signal=USR1@SECONDS sends before a job's time is over, and its
# workers go on without it.
#
# torchrun handles SIGTERM, SIGINT, SIGHUP and SIGQUIT: it passes them on, waits 30 s and kills what is left. SIGUSR1 has its default
# action, so torchrun is gone at once (exit 138) and tells nobody; the workers, which the signal was meant for, are adopted by process 1
# and train on. With --signals-to-handle=…,SIGUSR1 (or TORCHELASTIC_SIGNALS_TO_HANDLE) the workers get the signal.
#
# Seen on 2026-11-29, Python 3.11, Linux, as printed below. Wants python3, pip and network; 200 MB (the CPU build, where pip finds one).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/worker.py" <<'PYTHON'
import os
import signal
import sys
import time

def told(signum, frame):
    with open(sys.argv[1] + ".told", "w") as file:
        file.write(signal.Signals(signum).name)
    sys.exit(0)

signal.signal(signal.SIGUSR1, told)
with open(sys.argv[1], "w") as file:
    file.write(str(os.getpid()))
time.sleep(90)
PYTHON
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy --extra-index-url https://download.pytorch.org/whl/cpu > "$folder/pip.txt" 2>&1 || { cat "$folder/pip.txt"; exit 1; }

try() {  # NAME OPTIONS…: start torchrun, send it SIGUSR1, say what became of it and of its worker
    local name=$1 pid code=0 worker
    shift
    "$folder/venv/bin/torchrun" --standalone --nproc-per-node 1 "$@" "$folder/worker.py" "$folder/$name" > "$folder/$name.log" 2>&1 &
    pid=$!
    for _ in $(seq 120); do [ -s "$folder/$name" ] && break; sleep 0.5; done
    worker=$(cat "$folder/$name")
    kill -USR1 "$pid"
    wait "$pid" 2> /dev/null || code=$?
    sleep 2
    echo "$name: torchrun's exit code $code, worker $(kill -0 "$worker" 2> /dev/null && echo "lives" || echo "ended"), was told $(cat "$folder/$name.told" 2> /dev/null || echo nothing)"
    kill -9 "$worker" 2> /dev/null || true
}

said=$(try default 2> /dev/null; try asked --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 2> /dev/null)
printf '%s\n' "$said"
expected="default: torchrun's exit code 138, worker lives, was told nothing
asked: torchrun's exit code 1, worker ended, was told SIGUSR1"
[ "$said" = "$expected" ] || { echo "another behaviour than was seen"; exit 1; }
echo "as seen"
