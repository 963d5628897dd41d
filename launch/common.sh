# shellcheck shell=bash
# Sourced by tpu_vm.sh and xpk.sh: how they read a command line, and how they run commands or print them.
# A dry run needs no other program than bash.

# shellcheck disable=SC2034 # the scripts use it
ROOT=$(cd -- "${BASH_SOURCE[0]%/*}/.." && pwd)
SELF="launch/${0##*/}"
COMMAND=""
DRY_RUN=""
PROGRAM=() # what stands after --

# Says in one sentence what is wrong; exit status 2.
fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# Prints words the way a shell reads them back.
quoted() {
  local word space="" quote="'" escaped="'\\''"
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then
      printf '%s%s' "$space" "$word"
    else
      printf "%s'%s'" "$space" "${word//$quote/$escaped}"
    fi
    space=" "
  done
}

# Runs a command, or prints it in a dry run.
run() {
  if [[ -n $DRY_RUN ]]; then
    quoted "$@"
    printf '\n'
    return
  fi
  if ! command -v "$1" > /dev/null; then
    fail "there is no $1 on this machine: docs/tpu_pods.md says where to get it, and --dry-run works without it."
  fi
  "$@"
}

# Whether what a command describes is there; in a dry run nothing is.
there() { [[ -z $DRY_RUN ]] && command -v "$1" > /dev/null && "$@" > /dev/null 2>&1; }

# Runs a command until it succeeds, for a minute.
patiently() {
  local try
  for try in 1 2 3 4 5 6; do
    run "$@" && return
    ((try == 6)) || sleep 10
  done
  return 1
}

# need VARIABLE MEANING: refuses to go on without it, or with what no name of Google's is made of.
need() {
  [[ -n ${!1:-} ]] || fail "$1 is empty: set it to $2, as in $1=... $SELF ${COMMAND:-create}."
  [[ ${!1} =~ ^[a-z0-9][a-z0-9_.:-]*$ ]] || fail "$1=${!1} cannot be: set it to $2, in small letters."
}

# switch VARIABLE: refuses what is neither empty nor 1, such as a 0 that would be taken for yes.
switch() {
  printf -v "$1" %s "${!1:-}"
  [[ ${!1} =~ ^1?$ ]] || fail "$1=${!1}: set it to 1, or leave it out."
}

# Prints the comment at the top of the script.
help() {
  local line
  while IFS= read -r line && [[ $line == "#"* ]]; do
    line=${line#"#"}
    [[ $line == "!"* ]] || printf '%s\n' "${line# }"
  done < "$0"
}

# read_command_line "COMMANDS" ARGUMENT...: sets COMMAND, DRY_RUN and PROGRAM.
read_command_line() {
  local commands=$1
  shift
  while (($#)); do
    case $1 in
      --dry-run) DRY_RUN=yes ;;
      --help | -h)
        help
        exit
        ;;
      --)
        shift
        PROGRAM=("$@")
        break
        ;;
      -*) fail "unknown flag $1: $SELF --help lists them." ;;
      *)
        [[ -z $COMMAND ]] || fail "two commands, $COMMAND and $1: the program to run stands after --."
        COMMAND=$1
        ;;
    esac
    shift
  done
  [[ -n $COMMAND ]] || fail "no command: give one of $commands; $SELF --help explains them."
  [[ " $commands " == *" $COMMAND "* ]] || fail "unknown command $COMMAND: give one of $commands."
  if [[ $COMMAND == run ]]; then
    [[ " ${PROGRAM[*]} " != *" --dry-run "* ]] || fail "--dry-run is ours, and stands before --."
    ((${#PROGRAM[@]})) || fail "nothing to run: put it after --, as in $SELF run -- python -m vkd_jax.main --config ..."
  elif ((${#PROGRAM[@]})); then
    fail "$COMMAND takes no program; only run does."
  fi
}

# Sets VERSION and ZONE, unless they are set, by the generation of TYPE.
# https://cloud.google.com/tpu/docs/runtimes and https://cloud.google.com/tpu/docs/regions-zones
know_type() {
  local version zone sizes="1|4|8|16|32|64|128|256"
  case $TYPE in
    v5litepod-*) version=v2-alpha-tpuv5-lite zone=us-central1-a ;;
    v6e-*) version=v2-alpha-tpuv6e zone=us-east5-b ;;
    v5p-*) version=v2-alpha-tpuv5 zone=us-east5-a sizes="8|16|32|64|128|256|384|512" ;;
    v4-*) version=tpu-ubuntu2204-base zone=us-central2-b sizes="8|16|32|64|128|256|384|512" ;;
    *) fail "TYPE=$TYPE is not known: give one of v5litepod-N, v6e-N (N chips), v5p-N, v4-N (N / 2 chips)." ;;
  esac
  [[ ${TYPE#*-} =~ ^($sizes)$ ]] || fail "TYPE=$TYPE is no size of ${TYPE%-*}: give one of ${sizes//|/, }."
  VERSION=${VERSION:-$version}
  ZONE=${ZONE:-$zone}
  [[ $ZONE =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] || fail "ZONE=$ZONE is no zone: give one such as $zone."
}

# Refuses a program that would run on each of many hosts as if it were alone.
need_distributed() {
  [[ " ${PROGRAM[*]} " == *" --distributed "* ]] ||
    fail "$TYPE may have many hosts: add --distributed after vkd_jax.main, so that they run as one."
}
