#!/usr/bin/env bash
# Submits one starflow2 command as an xpk workload: TPU slices on Google Kubernetes Engine.
#
#   launch/xpk.sh --cluster C --workload W --tpu-type T --image IMAGE [--slices K] [--project P] \
#       [--zone Z] [--restarts R] [--dry-run] -- train --config configs/NAME.py --workdir DIR
#
#   --cluster    that xpk knows
#   --workload   name of the job
#   --tpu-type   of each slice, as xpk writes it: v5litepod-256, v5p-128, v6e-256
#   --image      container image with starflow2 installed, configs/ in its working directory
#   --slices     how many (default 1)
#   --restarts   how often a failed or preempted job starts again (default 10); it continues
#   --dry-run    print what would run, and end
#
# The work directory must be one that all pods see (a mounted bucket, Filestore).
set -euo pipefail

fail() {
  echo "xpk.sh: $1" >&2
  exit 2
}

cluster="" workload="" tpu_type="" image="" slices=1 project="" zone="" restarts=10 dry_run=false
while [[ $# -gt 0 ]]; do
  case $1 in
    --dry-run) dry_run=true && shift && continue ;;
    --) shift && break ;;
    --cluster | --workload | --tpu-type | --image | --slices | --project | --zone | --restarts)
      [[ $# -ge 2 ]] || fail "$1 needs a value"
      variable=${1#--}
      printf -v "${variable//-/_}" '%s' "$2"
      shift 2
      ;;
    *) fail "unknown option $1; the command stands behind --" ;;
  esac
done
[[ -n $cluster && -n $workload && -n $tpu_type && -n $image ]] ||
  fail "--cluster, --workload, --tpu-type and --image are needed"
[[ $slices =~ ^[1-9][0-9]*$ ]] || fail "--slices is a positive number, not $slices"
[[ $# -gt 0 ]] || fail "the command is missing: -- train --config ... --workdir ..."
[[ $1 != starflow2 ]] || shift

printf -v words ' %q' "$@"
command=(xpk workload create "--cluster=$cluster" "--workload=$workload" "--tpu-type=$tpu_type"
  "--num-slices=$slices" "--docker-image=$image" "--max-restarts=$restarts")
[[ -z $project ]] || command+=("--project=$project")
[[ -z $zone ]] || command+=("--zone=$zone")
command+=("--command=STARFLOW2_DISTRIBUTED=1 starflow2$words")

if $dry_run; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi
exec "${command[@]}"
