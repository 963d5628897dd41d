#!/usr/bin/env bash
# Runs vkd_jax on a Cloud TPU: a single virtual machine, or a slice with several hosts.
#
#   [VARIABLE=value ...] launch/tpu_vm.sh COMMAND [--dry-run] [-- PROGRAM ...]
#
# Commands, in the usual order:
#   setup      once per project: enables the APIs, creates the bucket and a service account that may only use it
#   create     requests the TPU; it costs money until it is deleted
#   status     prints the state of the TPU, and whether a run is under way on each host
#   sync       copies the last commit of this clone to all hosts
#   run        starts PROGRAM on all hosts with launch/run_host.sh; it continues when the connection ends
#   logs       follows the log of one host
#   stop       sends SIGTERM to the run on all hosts, so that it saves its state
#   delete     deletes the TPU and its disks
#
#   --dry-run  prints the commands instead of running them; it does not need the Google Cloud SDK
#   --help     prints this help
#
# Variables and their defaults:
#   PROJECT    required; the id of your Google Cloud project
#   TYPE       v5litepod-4; v5litepod-N or v6e-N with N chips (1 to 256), v4-N or v5p-N with N / 2 chips (N from 8)
#   ZONE       by TYPE: us-central1-a (v5litepod), us-east5-b (v6e), us-east5-a (v5p), us-central2-b (v4)
#   NAME       vkd; the name of the TPU
#   VERSION    the TPU software; by TYPE: v2-alpha-tpuv5-lite, v2-alpha-tpuv6e, v2-alpha-tpuv5, tpu-ubuntu2204-base
#   SPOT       empty; SPOT=1 requests a cheaper TPU, which may be preempted at any time
#   QUEUED     empty; QUEUED=1 waits in a queue for capacity (a "queued resource"); set it for all commands
#   BUCKET     required by setup only; the name of the bucket, without gs://
#   ACCOUNT    vkd@PROJECT.iam.gserviceaccount.com; the service account of the hosts
#   WORKER     0; the host whose log is followed by logs
set -euo pipefail
# shellcheck source=launch/common.sh
source "${0%"${0##*/}"}./common.sh"

read_command_line "setup create status sync run logs stop delete" "$@"
require PROJECT "the id of your Google Cloud project"
TYPE=${TYPE:-v5litepod-4}
NAME=${NAME:-vkd}
require_switch SPOT
require_switch QUEUED
ACCOUNT=${ACCOUNT:-vkd@$PROJECT.iam.gserviceaccount.com}
resolve_type
LOCATION=("--project=$PROJECT" "--zone=$ZONE")
VM=(gcloud compute tpus tpu-vm)
QUEUE=(gcloud compute tpus queued-resources)
HOST_SCRIPT="bash vkd_jax/launch/run_host.sh"
BUNDLE="${TMPDIR:-/tmp}/vkd_jax.bundle"

# on_host WORKER COMMAND: runs a command on one host, or on all.
on_host() { run "${VM[@]}" ssh "$NAME" "${LOCATION[@]}" "--worker=$1" "--command=$2"; }

case $COMMAND in
  setup)
    require BUCKET "the name of the bucket to create, without gs://"
    run gcloud services enable tpu.googleapis.com compute.googleapis.com storage.googleapis.com "--project=$PROJECT"
    exists gcloud storage buckets describe "gs://$BUCKET" ||
      run gcloud storage buckets create "gs://$BUCKET" "--project=$PROJECT" "--location=${ZONE%-*}" \
        --uniform-bucket-level-access
    exists gcloud iam service-accounts describe "$ACCOUNT" "--project=$PROJECT" ||
      run gcloud iam service-accounts create "${ACCOUNT%%@*}" "--project=$PROJECT"
    for role in objectAdmin legacyBucketReader; do # objectAdmin does not include buckets.get, which checkpoints need
      retry gcloud storage buckets add-iam-policy-binding "gs://$BUCKET" "--member=serviceAccount:$ACCOUNT" \
        "--role=roles/storage.$role" # a new account takes a while to become visible everywhere
    done
    ;;
  create)
    if [[ -n $QUEUED ]]; then
      run "${QUEUE[@]}" create "$NAME" "--node-id=$NAME" "${LOCATION[@]}" "--accelerator-type=$TYPE" \
        "--runtime-version=$VERSION" "--service-account=$ACCOUNT" ${SPOT:+--spot}
    else
      run "${VM[@]}" create "$NAME" "${LOCATION[@]}" "--accelerator-type=$TYPE" \
        "--version=$VERSION" "--service-account=$ACCOUNT" ${SPOT:+--spot}
    fi
    ;;
  status)
    if [[ -n $QUEUED ]]; then
      state=$(run "${QUEUE[@]}" describe "$NAME" "${LOCATION[@]}" "--format=value(state.state)")
      printf '%s\n' "$state"
      [[ -n $DRY_RUN || $state == ACTIVE ]] || exit 0 # no TPU exists yet
    fi
    run "${VM[@]}" describe "$NAME" "${LOCATION[@]}" "--format=value(state)"
    on_host all "test -e vkd_jax || { echo no code yet: run sync; exit; }; $HOST_SCRIPT --status"
    ;;
  sync)
    if [[ -z $DRY_RUN && -n $(git -C "$ROOT" status --porcelain) ]]; then
      printf 'note: uncommitted changes in %s are not copied.\n' "$ROOT" >&2
    fi
    if [[ -z $DRY_RUN && $(git -C "$ROOT" rev-parse --is-shallow-repository) == true ]]; then
      fail "this clone is shallow and cannot be copied: run git fetch --unshallow first."
    fi
    run git -C "$ROOT" bundle create --quiet "$BUNDLE" HEAD
    run "${VM[@]}" scp "$BUNDLE" "$NAME:vkd_jax.bundle" "${LOCATION[@]}" --worker=all
    on_host all "git init --quiet vkd_jax && git -C vkd_jax fetch --quiet ../vkd_jax.bundle HEAD &&\
 git -C vkd_jax checkout --quiet --force --detach FETCH_HEAD"
    ;;
  run)
    ((${TYPE#*-} <= 8)) || require_distributed # types up to 8 have one host in every generation
    on_host all "$HOST_SCRIPT --detach $(quoted "${PROGRAM[@]}")"
    ;;
  logs) on_host "${WORKER:-0}" "tail -n 100 -F vkd.log" ;;
  stop) on_host all "$HOST_SCRIPT --stop" ;;
  delete)
    if [[ -n $QUEUED ]]; then
      run "${QUEUE[@]}" delete "$NAME" "${LOCATION[@]}" --force
    else
      run "${VM[@]}" delete "$NAME" "${LOCATION[@]}"
    fi
    ;;
esac
