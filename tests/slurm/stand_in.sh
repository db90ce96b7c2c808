#!/bin/bash
# Stands in for `python -m dapo_megatron job-node CONFIG` where the batch script is what is tested. RUN/play, or play in the
# folder of a sweep, has one word per attempt:
#   a number   the exit code to end with; 87 names the node as a bad one      wait   until it is asked to save, then 85      stuck   whatever it is asked
#   a number with !   as `job-node` when other tasks are still there: the code is left in a file, and srun kills them
# RUN/attempts gets a line per attempt: restart count, nodes of the processes. Processes that are not the first one end with it.
run=$(dirname "$(dirname "$4")")
attempt=${SLURM_RESTART_COUNT:-0}
printf '%s\n' "$@" > "$run/arguments"
env -0 > "$run/environment.$SLURM_PROCID"
pwd > "$run/cwd"
words=($(cat "$run/play" 2>/dev/null || cat "$run/../play"))
word=${words[$attempt]}
if [ "$SLURM_PROCID" != 0 ]; then
  [[ $word != *! ]] || exec sleep 600
  trap '' USR1 TERM
  touch "$run/up.$attempt.$SLURM_PROCID"
  while [ ! -e "$run/ended.$attempt" ]; do sleep 0.1; done
  exit 0
fi
end() { touch "$run/ended.$attempt"; exit "$1"; }
trap 'end 85' USR1 TERM
echo "$attempt $(hostname) $SLURM_NTASKS" >> "$run/attempts"
if [[ $word == *! ]]; then
  mkdir -p "$run/slurm/nodes/${SLURM_JOB_ID}_$attempt"
  echo "${word%!}" > "$run/slurm/nodes/${SLURM_JOB_ID}_$attempt/exit_code"
  exit "${word%!}"
fi
[ "$word" != stuck ] || trap '' USR1 TERM
case $word in wait | stuck) while :; do sleep 0.1; done ;; esac
[ "$word" != 87 ] || hostname >> "$run/slurm/excluded_nodes"
end "$word"
