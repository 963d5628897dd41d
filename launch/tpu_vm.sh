#!/usr/bin/env bash
# Runs vkd_jax on a Cloud TPU: one virtual machine, or a slice of many hosts.
#
#   [VARIABLE=value ...] launch/tpu_vm.sh COMMAND [--dry-run] [-- PROGRAM ...]
#
# Commands, in the order in which they are used:
#   setup      once a project: turns on the APIs, makes the bucket, and an account that may use it and nothing else
#   create     asks for the TPU; from then on it costs money
#   status     how far it is, and whether a run is under way on its hosts
#   sync       sends the last commit of this clone to all hosts
#   run        starts PROGRAM on all hosts by launch/run_host.sh; it goes on when the connection ends
#   logs       follows the log of one host
#   stop       sends SIGTERM to the run on all hosts, so that it saves its state
#   delete     gives the TPU back; what lies on its disks is lost
#
#   --dry-run  prints every command as it would be run, and runs none; it needs no Google Cloud SDK
#   --help     prints this
#
# Variables, with their defaults:
#   PROJECT    the id of your Google Cloud project; no default
#   TYPE       v5litepod-4; v5litepod-1 to -256, v6e-1 to -256 (so many chips), v4-8, v5p-8 and larger (half as many)
#   ZONE       where: by TYPE us-central1-a, us-east5-b (v6e), us-east5-a (v5p), us-central2-b (v4)
#   NAME       vkd; the name of the TPU
#   VERSION    what is installed on it: by TYPE v2-alpha-tpuv5-lite, v2-alpha-tpuv6e, v2-alpha-tpuv5, tpu-ubuntu2204-base
#   SPOT       empty; SPOT=1 asks for a cheaper TPU, which may be taken away at any time
#   QUEUED     empty; QUEUED=1 waits in Google's queue until there is room (a "queued resource"); set it for all commands
#   BUCKET     the name of a bucket, without gs://; setup alone needs it; no default
#   ACCOUNT    vkd@PROJECT.iam.gserviceaccount.com; the service account that the hosts act as
#   WORKER     0; the host whose log is followed
set -euo pipefail
# shellcheck source=launch/common.sh
source "${0%"${0##*/}"}./common.sh"

read_command_line "setup create status sync run logs stop delete" "$@"
need PROJECT "the id of your Google Cloud project"
TYPE=${TYPE:-v5litepod-4}
NAME=${NAME:-vkd}
switch SPOT
switch QUEUED
ACCOUNT=${ACCOUNT:-vkd@$PROJECT.iam.gserviceaccount.com}
know_type
WHERE=("--project=$PROJECT" "--zone=$ZONE")
VM=(gcloud compute tpus tpu-vm)
QUEUE=(gcloud compute tpus queued-resources)
HOST_SCRIPT="bash vkd_jax/launch/run_host.sh"
BUNDLE="${TMPDIR:-/tmp}/vkd_jax.bundle"

# on WORKER COMMAND: runs a command on one host, or on all.
on() { run "${VM[@]}" ssh "$NAME" "${WHERE[@]}" "--worker=$1" "--command=$2"; }

case $COMMAND in
  setup)
    need BUCKET "the name of the bucket to make, without gs://"
    run gcloud services enable tpu.googleapis.com compute.googleapis.com storage.googleapis.com "--project=$PROJECT"
    there gcloud storage buckets describe "gs://$BUCKET" ||
      run gcloud storage buckets create "gs://$BUCKET" "--project=$PROJECT" "--location=${ZONE%-*}" \
        --uniform-bucket-level-access
    there gcloud iam service-accounts describe "$ACCOUNT" "--project=$PROJECT" ||
      run gcloud iam service-accounts create "${ACCOUNT%%@*}" "--project=$PROJECT"
    for role in objectAdmin legacyBucketReader; do # the first may not ask what bucket it is, as checkpoints do
      patiently gcloud storage buckets add-iam-policy-binding "gs://$BUCKET" "--member=serviceAccount:$ACCOUNT" \
        "--role=roles/storage.$role" # an account is known everywhere only after a while
    done
    ;;
  create)
    if [[ -n $QUEUED ]]; then
      run "${QUEUE[@]}" create "$NAME" "--node-id=$NAME" "${WHERE[@]}" "--accelerator-type=$TYPE" \
        "--runtime-version=$VERSION" "--service-account=$ACCOUNT" ${SPOT:+--spot}
    else
      run "${VM[@]}" create "$NAME" "${WHERE[@]}" "--accelerator-type=$TYPE" \
        "--version=$VERSION" "--service-account=$ACCOUNT" ${SPOT:+--spot}
    fi
    ;;
  status)
    if [[ -n $QUEUED ]]; then
      state=$(run "${QUEUE[@]}" describe "$NAME" "${WHERE[@]}" "--format=value(state.state)")
      printf '%s\n' "$state"
      [[ -n $DRY_RUN || $state == ACTIVE ]] || exit 0 # there is no TPU to ask
    fi
    run "${VM[@]}" describe "$NAME" "${WHERE[@]}" "--format=value(state)"
    on all "test -e vkd_jax || { echo no code yet: sync; exit; }; $HOST_SCRIPT --status"
    ;;
  sync)
    if [[ -z $DRY_RUN && -n $(git -C "$ROOT" status --porcelain) ]]; then
      printf 'note: there are changes in %s that are not committed; they are not sent.\n' "$ROOT" >&2
    fi
    if [[ -z $DRY_RUN && $(git -C "$ROOT" rev-parse --is-shallow-repository) == true ]]; then
      fail "this clone is shallow, and cannot be sent: run git fetch --unshallow first."
    fi
    run git -C "$ROOT" bundle create --quiet "$BUNDLE" HEAD
    run "${VM[@]}" scp "$BUNDLE" "$NAME:vkd_jax.bundle" "${WHERE[@]}" --worker=all
    on all "git init --quiet vkd_jax && git -C vkd_jax fetch --quiet ../vkd_jax.bundle HEAD &&\
 git -C vkd_jax checkout --quiet --force --detach FETCH_HEAD"
    ;;
  run)
    ((${TYPE#*-} <= 8)) || need_distributed # up to 8, in every generation, lie on one host
    on all "$HOST_SCRIPT --detach $(quoted "${PROGRAM[@]}")"
    ;;
  logs) on "${WORKER:-0}" "tail -n 100 -F vkd.log" ;;
  stop) on all "$HOST_SCRIPT --stop" ;;
  delete)
    if [[ -n $QUEUED ]]; then
      run "${QUEUE[@]}" delete "$NAME" "${WHERE[@]}" --force
    else
      run "${VM[@]}" delete "$NAME" "${WHERE[@]}"
    fi
    ;;
esac
