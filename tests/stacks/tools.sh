#!/usr/bin/env bash
# Installs, from Debian's packages, the programs that `tests/stacks/tools.rs` uses. Needs root.
set -euo pipefail

declare -A of=([tshark]=tshark [iperf3]=iperf3 [redis-server]=redis-server [redis-benchmark]=redis-tools
    [curl]=curl [dnsmasq]=dnsmasq-base [dig]=bind9-dnsutils [/usr/sbin/sshd]=openssh-server [ssh]=openssh-client)
missing=()
for program in "${!of[@]}"; do
    command -v "$program" >/dev/null || missing+=("${of[$program]}")
done
if [ ${#missing[@]} = 0 ]; then
    exit 0
fi
echo "installing ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
# Nothing is to be started: the tests start what they need, in namespaces of their own.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
fi
if ! { apt-get update -qq && apt-get install -qq -y --no-install-recommends -o Dpkg::Options::=--force-confold "${missing[@]}"; } \
    >/tmp/stacks-tools.log 2>&1; then
    tail -n 20 /tmp/stacks-tools.log >&2
    echo "tests/stacks/tools.sh: ${missing[*]} can't be installed with apt-get; the log is /tmp/stacks-tools.log" >&2
    exit 1
fi
