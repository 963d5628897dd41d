#!/usr/bin/env bash
# Runs on each host: creates the virtual environment if it does not exist, installs this clone, and executes PROGRAM.
#
#   launch/run_host.sh PROGRAM ...           in the foreground; PROGRAM receives SIGTERM
#   launch/run_host.sh --detach PROGRAM ...  in the background, also after the connection ends; the log is ~/vkd.log
#   launch/run_host.sh --status              prints whether a run is under way
#   launch/run_host.sh --stop                sends SIGTERM to the run, and kills it if it does not exit in GRACE seconds
#
# Variables and their defaults:
#   VENV   ~/vkd-venv; the virtual environment
#   GRACE  60; the seconds that --stop waits before it kills the run
set -euo pipefail

LOG=$HOME/vkd.log
LOCK=$HOME/vkd.lock # contains the process id of the run, which holds the lock until it ends
VENV=${VENV:-$HOME/vkd-venv}

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# Whether no run is under way.
idle() { flock --nonblock "$LOCK" true; }

# signal NAME: signals the run; a detached run leads a process group, to which the installer belongs as well.
signal() { kill "-$1" -- "-$process" 2> /dev/null || kill "-$1" "$process" 2> /dev/null || true; }

case ${1:-} in
  "") fail "no program to run: launch/run_host.sh PROGRAM ..." ;;
  --help | -h)
    sed -n '2,/^set/{s/^# \{0,1\}//p}' "$0"
    exit
    ;;
  --status)
    if idle; then echo "$(hostname): no run is under way"; else echo "$(hostname): running, process $(< "$LOCK")"; fi
    exit
    ;;
  --stop)
    if idle; then
      echo "$(hostname): no run is under way"
      exit
    fi
    process=$(< "$LOCK")
    signal TERM
    if flock --timeout "${GRACE:-60}" "$LOCK" true; then
      echo "$(hostname): stopped"
    else
      signal KILL
      echo "$(hostname): killed after ${GRACE:-60} s; unsaved state is lost"
    fi
    exit
    ;;
  --detach)
    shift
    (($#)) || fail "no program to run: launch/run_host.sh --detach PROGRAM ..."
    idle || fail "a run is under way on $(hostname), process $(< "$LOCK"); stop it first."
    nohup setsid bash "$0" "$@" >> "$LOG" 2>&1 < /dev/null &
    echo "$(hostname): started; the log is $LOG"
    exit
    ;;
esac

exec 9>> "$LOCK"
flock --nonblock 9 || fail "a run is under way on $(hostname), process $(< "$LOCK"); stop it first."
: > "$LOCK"
echo "$$" >&9

cd -- "${0%"${0##*/}"}./.."
echo "$(date -u +%FT%TZ) $(hostname): $*"
# The Python of TPU images may be too old for JAX; uv installs a newer one.
python3 -m uv --version > /dev/null 2>&1 || python3 -m pip install --quiet --user uv
[[ -x $VENV/bin/python ]] || python3 -m uv venv --quiet --python 3.12 "$VENV"
python3 -m uv pip install --quiet --python "$VENV/bin/python" '.[tpu]'
export PATH=$VENV/bin:$PATH
exec "$@"
