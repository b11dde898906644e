# What cases with a Linux guest have in common. Sourced on a lab host, where it is /run/lab/linux.sh: `. linux.sh`.
#
#   network 2            a bridge for the clients, 192.0.2.1, and as many TAPs in it
#   until_said 120 GUEST-READY log [2]    waits so many seconds for a line in a file, or for two
#   ask record           what the guest's `checks` (tests/lab/checks.rs) answers
#   well                 the guest's clocks, memory and kernel are well, or this fails
#   serves 2             so is all that it offers, with two processors
#   inside 'command'     runs a command in the guest by ssh

set -e
address=192.0.2.10
# A guest that writes little to its console, and believes in its clock as it does on a real processor. In the lab a guest, QEMU's
# too, finds that CPUID contradicts itself about the size of XSAVE's area, warns, and does without.
quiet="console=ttyS0 quiet panic=-1 mitigations=off nokaslr tsc=reliable no_timer_check noxsave"
boots=(--kernel linux/vmlinuz --initrd linux/initrd --cmdline "$quiet ip=$address/24")

network() {
    local number
    ip link add br0 type bridge && ip link set br0 up && ip address add 192.0.2.1/24 dev br0
    for ((number = 0; number < $1; number++)); do
        ip tuntap add dev "tap$number" mode tap && ip link set "tap$number" master br0 up
    done
}

# A file of its own for each host of the guest.
disk() {
    cp --sparse=always linux/disk.img "linux/$1"
}

until_said() {
    local end=$((SECONDS + $1))
    until [ "$(grep -ac "$2" "$3" 2>/dev/null)" -ge "${4:-1}" ]; do
        if [ $SECONDS -ge $end ]; then
            echo "'$2' was not said within $1 s:"
            tail -n 50 "$3"
            return 1
        fi
        sleep 0.5
    done
}

ask() {
    local answer=
    exec {guest}<>"/dev/tcp/$address/7000" || return 1
    echo "$1" >&"$guest"
    read -r -t 30 -u "$guest" answer
    exec {guest}>&-
    echo "$answer"
    [[ $answer != failed* && -n $answer ]]
}

well() {
    local report kernel
    report=$(ask report) && kernel=$(ask kernel) || { echo "the guest's checks do not answer: $report $kernel"; return 1; }
    [ "$kernel" = "kernel ok" ] || { echo "the guest's $kernel"; return 1; }
    case $report in
        *clock_back=0\ *wall_back_ms=0\ *memory_errors=0) ;;
        *) echo "the guest's checks found trouble: $report"; return 1 ;;
    esac
    echo "the guest is well: $report"
}

inside() {
    ssh -q -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o ServerAliveInterval=20 -i linux/key "root@$address" "$@"
}

serves() {
    local sum good processors
    read -r good _ <linux/bulk.sha256
    sum=$(curl -sS -m 120 "http://$address/bulk" | sha256sum)
    [ "${sum%% *}" = "$good" ] || { echo "the download's sum is $sum"; return 1; }
    [ "$(redis-cli -h "$address" PING)" = PONG ] || { echo "redis does not answer"; return 1; }
    processors=$(inside nproc)
    [ "$processors" = "$1" ] || { echo "not $1 processors, but: $processors"; return 1; }
    ask record && well
}
