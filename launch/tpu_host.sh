#!/usr/bin/env bash
# What launch/tpu_pod.py does on a host of a TPU slice. ~/flaxcls holds the code, ~/flaxcls-venv the
# packages, ~/flaxcls-run the log, the process group and the exit code of training.
#
#   tpu_host.sh setup         installs the pinned packages
#   tpu_host.sh run COMMAND   starts it in the background, with a process group of its own
#   tpu_host.sh state         says how it is: absent, running or its exit code
set -euo pipefail

runs() { # is anything left of the group?
  [ -e ~/flaxcls-run/pid ] && kill -0 -- "-$(cat ~/flaxcls-run/pid)" 2>/dev/null
}

case $1 in
  setup)
    python3 -m pip install --quiet --user uv==0.13.9 # brings Python 3.11; the images have 3.10
    python3 -m uv venv --quiet --clear --python=3.11 ~/flaxcls-venv
    VIRTUAL_ENV=~/flaxcls-venv python3 -m uv pip install --quiet \
      -c ~/flaxcls/launch/constraints.txt -e ~/flaxcls'[cloud,fast,s3,tpu]'
    ;;
  run)
    if runs && [ ! -e ~/flaxcls-run/exit ]; then
      echo "training runs already" >&2
      exit 1
    fi
    if runs; then # processes that it has left behind, and that may hold the TPU
      kill -KILL -- "-$(cat ~/flaxcls-run/pid)"
    fi
    mkdir -p ~/flaxcls-run
    rm -f ~/flaxcls-run/exit ~/flaxcls-run/pid
    cd ~/flaxcls
    # The trap keeps this shell alive while its child saves; files are written whole or not.
    # shellcheck disable=SC2016 # expanded by the shell that is started
    setsid nohup bash -c '
      trap : TERM
      echo $$ >~/flaxcls-run/pid.new
      mv ~/flaxcls-run/pid.new ~/flaxcls-run/pid
      "$@"
      echo $? >~/flaxcls-run/exit.new
      mv ~/flaxcls-run/exit.new ~/flaxcls-run/exit
    ' - "${@:2}" >>~/flaxcls-run/log 2>&1 </dev/null &
    until [ -e ~/flaxcls-run/pid ]; do sleep 0.1; done # so that "state" knows of it from now on
    ;;
  state)
    if [ -e ~/flaxcls-run/exit ]; then
      echo "flaxcls-state: $(cat ~/flaxcls-run/exit)"
    elif runs; then
      echo flaxcls-state: running
    elif [ -e ~/flaxcls-run/pid ]; then
      echo flaxcls-state: 137 # gone without an exit code: somebody killed it
    else
      echo flaxcls-state: absent
    fi
    ;;
esac
