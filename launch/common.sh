# shellcheck shell=bash
# Functions that tpu_vm.sh and xpk.sh source: they parse the command line, check variables, and run or print commands.
# A dry run needs bash only.

# shellcheck disable=SC2034 # the scripts use it
ROOT=$(cd -- "${BASH_SOURCE[0]%/*}/.." && pwd)
SELF="launch/${0##*/}"
COMMAND=""
DRY_RUN=""
PROGRAM=() # the words after --

# fail MESSAGE: prints an error and exits with status 2.
fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# quoted WORD...: prints words quoted for a shell.
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

# run COMMAND...: runs a command; in a dry run, prints it.
run() {
  if [[ -n $DRY_RUN ]]; then
    quoted "$@"
    printf '\n'
    return
  fi
  if ! command -v "$1" > /dev/null; then
    fail "there is no $1 on this machine: docs/tpu.md says where to get it, and --dry-run works without it."
  fi
  "$@"
}

# exists COMMAND...: whether a describing command succeeds; false in a dry run.
exists() { [[ -z $DRY_RUN ]] && command -v "$1" > /dev/null && "$@" > /dev/null 2>&1; }

# retry COMMAND...: runs a command until it succeeds, at most six times in a minute.
retry() {
  local try
  for try in 1 2 3 4 5 6; do
    run "$@" && return
    ((try == 6)) || sleep 10
  done
  return 1
}

# require VARIABLE MEANING: fails if the variable is empty or has characters that names in Google Cloud cannot have.
require() {
  [[ -n ${!1:-} ]] || fail "$1 is empty: set it to $2, as in $1=... $SELF ${COMMAND:-create}."
  [[ ${!1} =~ ^[a-z0-9][a-z0-9_.:-]*$ ]] || fail "$1=${!1} is invalid: set it to $2, in lowercase."
}

# require_switch VARIABLE: fails if the variable is neither empty nor 1; a 0 would otherwise count as set.
require_switch() {
  printf -v "$1" %s "${!1:-}"
  [[ ${!1} =~ ^1?$ ]] || fail "$1=${!1} is invalid: set it to 1, or omit it."
}

# Prints the comment at the top of the script as its help.
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
      -*) fail "unknown flag $1: see $SELF --help." ;;
      *)
        [[ -z $COMMAND ]] || fail "two commands, $COMMAND and $1: pass one; the program to run follows --."
        COMMAND=$1
        ;;
    esac
    shift
  done
  [[ -n $COMMAND ]] || fail "no command: pass one of $commands; see $SELF --help."
  [[ " $commands " == *" $COMMAND "* ]] || fail "unknown command $COMMAND: pass one of $commands."
  if [[ $COMMAND == run ]]; then
    [[ " ${PROGRAM[*]} " != *" --dry-run "* ]] || fail "--dry-run is a flag of $SELF: pass it before --."
    ((${#PROGRAM[@]})) || fail "no program to run: pass it after --, as in $SELF run -- python -m vkd_jax.main ..."
  elif ((${#PROGRAM[@]})); then
    fail "$COMMAND takes no program: only run does."
  fi
}

# Sets the defaults of VERSION and ZONE for the generation of TYPE, and checks TYPE and ZONE.
# https://cloud.google.com/tpu/docs/runtimes and https://cloud.google.com/tpu/docs/regions-zones
resolve_type() {
  local version zone sizes="1|4|8|16|32|64|128|256"
  case $TYPE in
    v5litepod-*) version=v2-alpha-tpuv5-lite zone=us-central1-a ;;
    v6e-*) version=v2-alpha-tpuv6e zone=us-east5-b ;;
    v5p-*) version=v2-alpha-tpuv5 zone=us-east5-a sizes="8|16|32|64|128|256|384|512" ;;
    v4-*) version=tpu-ubuntu2204-base zone=us-central2-b sizes="8|16|32|64|128|256|384|512" ;;
    *) fail "TYPE=$TYPE is unknown: set it to v5litepod-N or v6e-N (N chips), v5p-N or v4-N (N / 2 chips)." ;;
  esac
  [[ ${TYPE#*-} =~ ^($sizes)$ ]] || fail "TYPE=$TYPE is not a size of ${TYPE%-*}. Available sizes: ${sizes//|/, }."
  VERSION=${VERSION:-$version}
  ZONE=${ZONE:-$zone}
  [[ $ZONE =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] || fail "ZONE=$ZONE is not a zone: set it to one such as $zone."
}

# Fails if PROGRAM lacks --distributed, since every host would then run it independently of the others.
require_distributed() {
  [[ " ${PROGRAM[*]} " == *" --distributed "* ]] ||
    fail "$TYPE may have several hosts: add --distributed after vkd_jax.main, so that they run one job."
}
