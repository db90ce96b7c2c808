#!/bin/bash
# PID 1 of a node: its own host name, /etc/hosts, /tmp and /dev/shm, then slurmd. When it is killed, the whole node is.
#   node.sh FOLDER NAME [PATH...]       each PATH below /tmp stays visible under its name
set -eu
folder=$1 name=$2
shift 2

hostname "$name"
mount --bind "$folder/hosts" /etc/hosts
own=$folder/tmp/$name
mkdir -p "$own"
chmod 1777 "$own"
for path in "$@"; do
  mkdir -p "$own/${path#/tmp/}"
  mount --rbind "$path" "$own/${path#/tmp/}"
done
mount --rbind "$own" /tmp
mount -t tmpfs -o size=4g,mode=1777 shm /dev/shm
mount -t sysfs sys /sys 2>/dev/null || true # of this network namespace; a container may forbid it

mkdir -p "$folder/spool/$name"
slurmd -f "$folder/slurm.conf" -N "$name"
while :; do # a shell reaps orphans while it waits
  sleep 3600 &
  wait $! || true
done
