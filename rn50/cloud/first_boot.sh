#!/bin/bash
# rn50: fetches the tree at its pinned commit, asks whether there is work left, and hands over to tools/ec2_bootstrap.sh.
set -euo pipefail
prefix=${RN50_PREFIX:-}
mkdir -p "$prefix/etc" "$prefix/var/log" "$prefix/opt/rn50"
exec >>"$prefix/var/log/rn50-bootstrap.log" 2>&1
@VALUES@
# The group that launched this machine would launch another one for what fails here, too.
failed() {
    # switched off by AWS, which takes spot instances away: then another one goes on
    [[ $(systemctl is-system-running) == stopping ]] && exit 1
    for group in $RN50_GROUPS; do
        aws autoscaling suspend-processes --auto-scaling-group-name "$group" --scaling-processes Launch || true
        aws autoscaling update-auto-scaling-group --auto-scaling-group-name "$group" \
            --min-size 0 --max-size 0 --desired-capacity 0 || true
    done
    aws s3 cp --only-show-errors "$prefix/var/log/rn50-bootstrap.log" \
        "s3://$RN50_BUCKET/rn50/runs/$RN50_RUN/rn50-bootstrap.log" || true
    shutdown -h +1
}
trap failed ERR
# Whatever happens, the machine is gone when the budget is spent: switching off terminates it. A restart of the machine
# forgets that, and does not run this script again; the timer outlives it.
limit() { # minutes
    shutdown -h "+$1"
    local at
    at=$(date -u -d "+$1 minutes" '+%F %T UTC')
    mkdir -p "$prefix/etc/systemd/system"
    printf '[Unit]\nDescription=rn50: the budget is spent\n[Service]\nType=oneshot\nExecStart=shutdown -h now\n' \
        >"$prefix/etc/systemd/system/rn50-limit.service"
    printf '[Unit]\nDescription=rn50: when the budget is spent\n[Timer]\nOnCalendar=%s\nPersistent=true\n%s\n' \
        "$at" $'[Install]\nWantedBy=timers.target' >"$prefix/etc/systemd/system/rn50-limit.timer"
    systemctl daemon-reload
    systemctl enable rn50-limit.timer
    systemctl restart rn50-limit.timer
}
limit "$RN50_MINUTES"
metadata=${AWS_EC2_METADATA_SERVICE_ENDPOINT:-http://169.254.169.254}
token=$(curl -sSf -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 300' "$metadata/latest/api/token")
about() { curl -sSf -H "X-aws-ec2-metadata-token: $token" "$metadata/latest/meta-data/$1"; }
RN50_INSTANCE=$(about instance-id)
RN50_TYPE=$(about instance-type)
RN50_MARKET=$(about instance-life-cycle)
export RN50_INSTANCE RN50_TYPE RN50_MARKET
# botocore asks the metadata service once, for a second; a client that got no credentials then never gets any
export AWS_METADATA_SERVICE_NUM_ATTEMPTS=5 AWS_METADATA_SERVICE_TIMEOUT=5
variables='RN50_(BUCKET|RUN|COMMIT|CODE_SHA256|INSTANCE|TYPE|MARKET|MINUTES)|AWS_(DEFAULT_REGION|METADATA_SERVICE_[A-Z_]+)'
env | grep -E "^($variables)=" >"$prefix/etc/rn50.env"
archive=$prefix/opt/rn50.tar.gz
# not every image has it, and snap itself is set up at the first start, too
command -v aws >/dev/null || { snap wait system seed.loaded && snap install aws-cli --classic; }
PATH=$PATH:/snap/bin
# a role that was made just now is not known everywhere at once
for _ in {1..12}; do
    aws s3 cp --only-show-errors "s3://$RN50_BUCKET/rn50/code/$RN50_COMMIT.tar.gz" "$archive" && break
    sleep "${RN50_POLL_SECONDS:-10}"
done
echo "$RN50_CODE_SHA256  $archive" | sha256sum --check --quiet
tar -xzf "$archive" -C "$prefix/opt/rn50"
cd "$prefix/opt/rn50"
minutes=$(python3 -m rn50.cloud.gate)
limit "$minutes"
timeout --kill-after=60 "${RN50_SETUP_MINUTES}m" bash tools/ec2_bootstrap.sh
