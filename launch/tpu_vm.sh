#!/usr/bin/env bash
# Runs one starflow2 command on all workers of a Cloud TPU VM slice.
#
#   launch/tpu_vm.sh --name TPU --zone ZONE [--project P] [--dir DIR] [--bin DIR] [--dry-run] \
#       -- train --config configs/NAME.py --workdir DIR
#
#   --name, --zone   of the TPU VM
#   --project        default: gcloud's own setting
#   --dir            working directory on the workers, where the repository is (default starflow2-jax)
#   --bin            directory of the starflow2 command there (default .venv/bin, below --dir)
#   --dry-run        print what would run, and end
#
# The work directory must be one that all workers see (NFS, Filestore, a mounted bucket).
set -euo pipefail

fail() {
  echo "tpu_vm.sh: $1" >&2
  exit 2
}

name="" zone="" project="" dir="starflow2-jax" bin=".venv/bin" dry_run=false
while [[ $# -gt 0 ]]; do
  case $1 in
    --dry-run) dry_run=true && shift && continue ;;
    --) shift && break ;;
    --name | --zone | --project | --dir | --bin)
      [[ $# -ge 2 ]] || fail "$1 needs a value"
      printf -v "${1#--}" '%s' "$2"
      shift 2
      ;;
    *) fail "unknown option $1; the command stands behind --" ;;
  esac
done
[[ -n $name && -n $zone ]] || fail "--name and --zone are needed"
[[ $# -gt 0 ]] || fail "the command is missing: -- train --config ... --workdir ..."
[[ $1 != starflow2 ]] || shift

# Quoted twice: for the shell on the workers, and, below, for that on this machine.
printf -v remote 'cd %q && STARFLOW2_DISTRIBUTED=1 %q' "$dir" "$bin/starflow2"
printf -v words ' %q' "$@"
command=(gcloud compute tpus tpu-vm ssh "$name" "--zone=$zone")
[[ -z $project ]] || command+=("--project=$project")
command+=(--worker=all "--command=$remote$words")

if $dry_run; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi
exec "${command[@]}"
