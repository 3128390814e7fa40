#!/usr/bin/env bash
# Sets up an instance that tools/ec2.py launched, as root: packages, betons on the local disk, the fastest settings
# where the launch asked for them, and a systemd unit that trains (or converts, where that is what it was launched for). The instance's user data fetched this tree at a
# pinned commit and wrote etc/rn50.env. A failure is reported to S3 and switches the instance off, which terminates it.
# RN50_PREFIX=DIR takes DIR for the root of the file system (to try it without an instance): no disk is formatted then.
set -euo pipefail
prefix=${RN50_PREFIX:-}
export HOME=${HOME:-/root}
# shellcheck source=/dev/null
set -a && source "$prefix/etc/rn50.env" && set +a
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
python=$root/.venv/bin/python
step="start"

finish() {
    local status=$?
    ((status)) || return 0
    # switched off from outside, as AWS does with a spot instance that it takes away: that is no failure of ours
    if [[ $(systemctl is-system-running) == stopping ]]; then return 0; fi
    echo "error: setting up failed at: $step"
    "$python" -m rn50.cloud.supervise give-up --reason "setting up failed at: $step" || {
        # Without packages nothing but the aws command can tell.
        aws s3 cp --only-show-errors "$prefix/var/log/rn50-bootstrap.log" \
            "s3://$RN50_BUCKET/rn50/runs/$RN50_RUN/rn50-bootstrap.log" || true
        shutdown -h now
    }
}
trap finish EXIT
trap 'exit 143' TERM # from the user data's time limit; else bash gives the trap above status 0

# The folder for the betons: the instance's own NVMe disk where there is one.
choose_disk() {
    local disk
    if [[ -n $prefix ]]; then
        echo "$prefix/mnt/betons"
        return
    fi
    if mountpoint -q /opt/dlami/nvme; then # Deep Learning AMIs mount it
        echo /opt/dlami/nvme/betons
        return
    fi
    disk=$(lsblk -dnpo NAME,MODEL | awk '/Instance Storage/ { print $1; exit }')
    if [[ -n $disk ]]; then
        mkdir -p /mnt/nvme
        { blkid "$disk" || mkfs.ext4 -q "$disk"; } >&2
        mountpoint -q /mnt/nvme || mount "$disk" /mnt/nvme
        echo /mnt/nvme/betons
    else
        echo /mnt/betons
    fi
}

unit() { # name, text
    mkdir -p "$prefix/etc/systemd/system"
    printf '%s\n' "$2" >"$prefix/etc/systemd/system/$1"
}

step="packages"
if [[ -z $prefix ]]; then
    # a fresh instance upgrades itself at first, and holds apt's locks meanwhile
    systemctl stop apt-daily.timer apt-daily-upgrade.timer apt-daily.service apt-daily-upgrade.service || true
    echo 'DPkg::Lock::Timeout "900";' >/etc/apt/apt.conf.d/90rn50
    export NEEDRESTART_SUSPEND=1 # else Ubuntu 24.04 restarts services whose libraries are replaced
    # that timeout is for dpkg's lock; apt's own, on the lists, is waited for here, a quarter of an hour at most
    for _ in {1..45}; do
        apt-get update && break
        sleep 20
    done
fi
tries=3
until bash tools/setup.sh; do
    ((--tries)) || exit 1
    sleep 20
done

step="betons"
betons=$(choose_disk)
"$python" -m rn50.cloud.supervise stage --betons "$betons"

step="tuning"
"$python" -m rn50.cloud.supervise tune --betons "$betons"

step="systemd"
unit rn50-train.service "[Unit]
Description=rn50: the training run
Wants=network-online.target
After=network-online.target
StartLimitIntervalSec=3600
StartLimitBurst=5
OnFailure=rn50-failed.service

[Service]
Type=exec
WorkingDirectory=$root
EnvironmentFile=$prefix/etc/rn50.env
ExecStart=$python -m rn50.cloud.supervise train --betons $betons
Restart=on-failure
RestartPreventExitStatus=2
RestartSec=15
KillMode=mixed
TimeoutStopSec=90

[Install]
WantedBy=multi-user.target"
unit rn50-failed.service "[Unit]
Description=rn50: the training run failed too often

[Service]
Type=oneshot
WorkingDirectory=$root
EnvironmentFile=$prefix/etc/rn50.env
ExecStart=-$python -m rn50.cloud.supervise give-up --reason \"rn50-train.service has failed for good\"
ExecStart=shutdown -h now
TimeoutStartSec=600"
systemctl daemon-reload
systemctl enable --now rn50-train.service
echo "rn50-train.service is started"
