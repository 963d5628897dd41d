#!/usr/bin/env bash
# Runs vkd_jax on a TPU slice of Google Kubernetes Engine, by XPK, which starts a run again when it was preempted.
#
#   [VARIABLE=value ...] launch/xpk.sh COMMAND [--dry-run] [-- PROGRAM ...]
#
# Commands, in the order in which they are used:
#   create     makes a cluster with one slice; from then on it costs money
#   run        starts PROGRAM on all hosts by launch/run_host.sh, in a container of IMAGE with this folder in it
#   status     the workloads of the cluster
#   logs       follows the log of one host
#   stop       takes the workload away; its processes get SIGTERM and half a minute to save their state
#   delete     takes the cluster away
#
#   --dry-run  prints every command as it would be run, and runs none; it needs no XPK
#   --help     prints this
#
# Variables, with their defaults:
#   PROJECT    the id of your Google Cloud project; no default
#   TYPE       v5litepod-16; v5litepod-8 to -256, v6e-1 to -256 (so many chips), v4-8, v5p-8 and larger (half as many)
#   ZONE       where: by TYPE us-central1-a, us-east5-b (v6e), us-east5-a (v5p), us-central2-b (v4)
#   NAME       vkd; the name of the cluster
#   WORKLOAD   vkd-run; the name of the run, which no other may have until it is stopped
#   SPOT       empty; SPOT=1 asks for cheaper hosts, which may be taken away at any time
#   RESTARTS   10; how often a run is started again that was stopped from outside (exit status 143)
#   IMAGE      python:3.12; what the container is made from
#   WORKER     0; the host whose log is followed
set -euo pipefail
# shellcheck source=launch/common.sh
source "${0%"${0##*/}"}./common.sh"

read_command_line "create run status logs stop delete" "$@"
need PROJECT "the id of your Google Cloud project"
TYPE=${TYPE:-v5litepod-16}
NAME=${NAME:-vkd}
WORKLOAD=${WORKLOAD:-vkd-run}
switch SPOT
know_type
[[ $TYPE != v5litepod-[14] ]] || fail "XPK has no $TYPE: take v5litepod-8 or larger, or launch/tpu_vm.sh."
CLUSTER=("--cluster=$NAME" "--project=$PROJECT" "--zone=$ZONE")

case $COMMAND in
  create)
    capacity=--on-demand
    [[ -z $SPOT ]] || capacity=--spot
    run xpk cluster create "${CLUSTER[@]}" "--tpu-type=$TYPE" --num-slices=1 "$capacity"
    ;;
  run)
    [[ $TYPE == v6e-1 ]] || need_distributed
    # A shell of XPK's waits for the command; exec hands SIGTERM on to what it becomes.
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
