#!/usr/bin/env bash
# Runs vkd_jax on a TPU slice of Google Kubernetes Engine with XPK, which restarts a preempted run.
#
#   [VARIABLE=value ...] launch/xpk.sh COMMAND [--dry-run] [-- PROGRAM ...]
#
# Commands, in the usual order:
#   create     creates a cluster with one slice; it costs money until it is deleted
#   run        starts PROGRAM on all hosts with launch/run_host.sh, in a container of IMAGE that has this folder
#   status     lists the workloads of the cluster
#   logs       follows the log of one host
#   stop       deletes the workload; its processes receive SIGTERM and have half a minute to save their state
#   delete     deletes the cluster
#
#   --dry-run  prints the commands instead of running them; it does not need XPK
#   --help     prints this help
#
# Variables and their defaults:
#   PROJECT    required; the id of your Google Cloud project
#   TYPE       v5litepod-16; v5litepod-N (N from 8) or v6e-N with N chips, v4-N or v5p-N (N from 8) with N / 2 chips
#   ZONE       by TYPE: us-central1-a (v5litepod), us-east5-b (v6e), us-east5-a (v5p), us-central2-b (v4)
#   NAME       vkd; the name of the cluster
#   WORKLOAD   vkd-run; the name of the run, unique in the cluster until the run is stopped
#   SPOT       empty; SPOT=1 requests cheaper hosts, which may be preempted at any time
#   RESTARTS   10; the number of restarts of a run that is preempted (exit status 143)
#   IMAGE      python:3.12; the base image of the container
#   WORKER     0; the host whose log is followed by logs
set -euo pipefail
# shellcheck source=launch/common.sh
source "${0%"${0##*/}"}./common.sh"

read_command_line "create run status logs stop delete" "$@"
require PROJECT "the id of your Google Cloud project"
TYPE=${TYPE:-v5litepod-16}
NAME=${NAME:-vkd}
WORKLOAD=${WORKLOAD:-vkd-run}
require_switch SPOT
resolve_type
[[ $TYPE != v5litepod-[14] ]] || fail "XPK does not support $TYPE: use v5litepod-8 or larger, or launch/tpu_vm.sh."
CLUSTER=("--cluster=$NAME" "--project=$PROJECT" "--zone=$ZONE")

case $COMMAND in
  create)
    capacity=--on-demand
    [[ -z $SPOT ]] || capacity=--spot
    run xpk cluster create "${CLUSTER[@]}" "--tpu-type=$TYPE" --num-slices=1 "$capacity"
    ;;
  run)
    [[ $TYPE == v6e-1 ]] || require_distributed
    # XPK runs the command in a shell; exec replaces it, so that SIGTERM reaches the program.
    run xpk workload create "--workload=$WORKLOAD" "${CLUSTER[@]}" "--tpu-type=$TYPE" --num-slices=1 \
      "--base-docker-image=${IMAGE:-python:3.12}" "--script-dir=$ROOT" "--max-restarts=${RESTARTS:-10}" \
      "--command=exec bash launch/run_host.sh $(quoted "${PROGRAM[@]}")"
    ;;
  status) run xpk workload list "${CLUSTER[@]}" ;;
  logs)
    run gcloud container clusters get-credentials "$NAME" "--project=$PROJECT" "--region=${ZONE%-*}"
    run kubectl logs --follow --tail=100 \
      "--selector=xpk.google.com/workload=$WORKLOAD,batch.kubernetes.io/job-completion-index=${WORKER:-0}"
    ;;
  stop) run xpk workload delete "--workload=$WORKLOAD" "${CLUSTER[@]}" ;;
  delete) run xpk cluster delete "${CLUSTER[@]}" ;;
esac
