# What cases with a Linux guest have in common. Sourced on a lab host, where it is /run/lab/linux.sh: `. linux.sh`; and for clients on this
# machine by `outside`.
#
#   network 2            a bridge for the clients, 192.0.2.1, and as many TAPs in it
#   until_said 120 GUEST-READY log [2]    waits so many seconds for a line in a file, or for two
#   ask record           what the guest's `checks` (tests/lab/checks.rs) answers
#   well                 the guest's clocks, memory and kernel are well, and are watched, or this fails
#   serves 2             so is all that it offers, with two processors
#   large_frames         a download leaves the guest in frames larger than the network's, which others cut, or this fails
#   pair                 the places of a pair: two TAPs, two disks, a witness
#   apart a              those of one side that has a host of its own: on the wire it is 192.0.2.2, or 192.0.2.3 if it is b
#   start_side a primary starts one side of it; `end_process a` kills it, `ended 60 a` waits until it ends and says how
#   repaired a           looks at that side's disk, repairs it from its journal, and says how many records it has, all whole
#   inside 'command'     runs a command in the guest by ssh
#   client redis & …      a client that goes on until `enough` exists; `clients_done` ends them and says what they saw

set -e
address=192.0.2.10
# A guest that writes little to its console, and believes in its clock as it does on a real processor. In the lab a guest, QEMU's
# too, finds that CPUID contradicts itself about the size of XSAVE's area, warns, and does without.
quiet="console=ttyS0 quiet panic=-1 mitigations=off nokaslr tsc=reliable no_timer_check noxsave"
boots=(--kernel linux/vmlinuz --initrd linux/initrd --cmdline "$quiet ip=$address/24")

network() {
    local number
    ip link add br0 type bridge && ip link set br0 up && ip address add 192.0.2.1/24 dev br0
    for ((number = 0; number < $1; number++)); do tap "tap$number"; done
}

# Makes a TAP, with a queue for each of the guest's processors.
tap() {
    local queues=
    [ "${VCPUS:-1}" = 1 ] || queues=multi_queue
    ip tuntap add dev "$1" mode tap $queues && ip link set "$1" master br0 up
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

# Waits so many seconds until the role of that name is in one of these states: until_state 60 a 'protected\|alone'.
until_state() {
    local end=$((SECONDS + $1))
    until tandem status --control "/run/tandem/lab-$2.sock" 2>/dev/null | grep -q "^state *\($3\)"; do
        if [ $SECONDS -ge $end ]; then
            echo "$2 was not $3 within $1 s:"
            tandem status --control "/run/tandem/lab-$2.sock"
            tail -n 30 "$2.log"
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

# What a report of the checks says of one thing: seen "$report" memory_parts.
seen() {
    local rest=${1#*"$2="}
    echo "${rest%% *}"
}

well() {
    local before report kernel end=$((SECONDS + 60))
    before=$(ask report) || { echo "the guest's checks do not answer: $before"; return 1; }
    # Watchers that stand find nothing.
    while report=$(ask report) && { [ "$(seen "$report" clock_rounds)" -le "$(seen "$before" clock_rounds)" ] ||
        [ "$(seen "$report" memory_parts)" -le "$(seen "$before" memory_parts)" ]; }; do
        [ $SECONDS -lt $end ] || { echo "the guest's watchers stand: $before, 60 s later: $report"; return 1; }
        sleep 0.2
    done
    kernel=$(ask kernel) || { echo "the guest's checks do not answer: $report $kernel"; return 1; }
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

large_frames() {
    local sum good before after count='cat /sys/class/net/e*/statistics/tx_packets'
    read -r good _ <linux/bulk.sha256
    before=$(inside "$count")
    sum=$(curl -sS -m 120 "http://$address/bulk" | sha256sum)
    after=$(inside "$count")
    [ "${sum%% *}" = "$good" ] || { echo "the download's sum is $sum"; return 1; }
    # 4 MiB are 2,897 segments.
    [ $((after - before)) -lt 2000 ] || { echo "a download took $((after - before)) frames"; return 1; }
    echo "a download took $((after - before)) frames"
}

pair() {
    network 2
    mkdir witness
    disk a.img
    cp --sparse=always linux/a.img linux/b.img
}

# A witness of each host's own is enough where hosts die, and no network parts them.
apart() {
    ip link add br0 type bridge && ip link set wire master br0 && ip link set br0 up
    ip address add "$([ "$1" = a ] && echo 192.0.2.2 || echo 192.0.2.3)/24" dev br0
    tap tap0
    mkdir witness
    disk "$1.img"
    touch apart
}

# start_side a primary [auto]: starts a side, once more too, with the mode for when it leads, of a guest with $VCPUS processors. Its log is
# a.log, its process a.pid, how it ended a.status.
start_side() {
    local name=$1 role=$2 peer own=127.0.0.1:7700 other=127.0.0.1:7701 tap=tap0
    [ ! -e apart ] || own=192.0.2.2:7700 other=192.0.2.3:7700
    if [ "$name" != a ]; then
        read -r own other <<<"$other $own"
        [ -e apart ] || tap=tap1
    fi
    [ "${VCPUS:-1}" = 1 ] || tap+=,queues=$VCPUS
    peer=(--listen "$own" --peer "$other")
    rm -f "$name.pid" "$name.status"
    (
        tandem "$role" --pair lab --name "$name" "${peer[@]}" "${boots[@]}" --image "linux/$name.img" --memory 192M --vcpus "${VCPUS:-1}" \
            --tap "$tap" --witness dir:/run/lab/witness --takeover-limit 3s --mode "${3:-auto}" </dev/null >>"$name.log" 2>&1 &
        echo $! >"$name.pid"
        wait $! && status=0 || status=$?
        echo "$status" >"$name.status"
    ) &
    until [ -s "$name.pid" ]; do sleep 0.1; done
}

end_process() {
    kill -KILL "$(cat "$1.pid")"
    until [ -s "$1.status" ]; do sleep 0.1; done
}

# Waits so many seconds until a side has ended, and says with what.
ended() {
    local end=$((SECONDS + $1))
    until [ -s "$2.status" ]; do
        [ $SECONDS -lt $end ] || { echo "$2 did not end within $1 s"; tail -n 30 "$2.log"; return 1; }
        sleep 0.2
    done
    cat "$2.status"
}

repaired() {
    # The first brings the file system's own journal in, and nothing is left to repair.
    { e2fsck -p "linux/$1.img" >"$1.fsck" 2>&1 || [ $? = 1 ]; } && e2fsck -fn "linux/$1.img" >>"$1.fsck" 2>&1 || { cat "$1.fsck"; return 1; }
    records_of "$1"
}

records_of() {
    local told
    debugfs -R "dump /usr/local/bin/checks $1.checks" "linux/$1.img" 2>/dev/null
    debugfs -R "dump /var/lib/checks/records $1.records" "linux/$1.img" 2>/dev/null
    chmod +x "$1.checks"
    told=$("./$1.checks" verify "$1.records") && [[ $told == records\ * ]] || { echo "$1: $told" >&2; return 1; }
    echo "${told#records }"
}

# Goes on until told that it is enough; each answer must be the one that follows from the last.
client() {
    local kind=$1 number=0 failure=
    echo 0 >"$kind.count"
    "client_$kind" || failure=${failure:-it ended}
    [ -z "$failure" ] || echo "$kind: after $number: $failure" >>failed
    echo "$kind: $number" >>finished
}

# Increments, answered with the numbers in turn.
client_redis() {
    local answer
    exec {redis}<>"/dev/tcp/$address/6379"
    until [ -e enough ]; do
        printf 'INCR lab\r\n' >&"$redis"
        IFS= read -r -t 90 -u "$redis" answer || { failure="no answer"; return 1; }
        number=$((number + 1))
        [ "$answer" = ":$number"$'\r' ] || { failure="answered $answer"; return 1; }
        echo $number >redis.count
        sleep 0.1
    done
}

# Records that are on the guest's disk when they are told.
client_records() {
    local answer first
    exec {records}<>"/dev/tcp/$address/7000"
    echo records >&"$records"
    read -r -t 90 -u "$records" _ first
    until [ -e enough ]; do
        echo record >&"$records"
        read -r -t 90 -u "$records" answer || { failure="no answer"; return 1; }
        [ "$answer" = "record $((first + number))" ] || { failure="answered '$answer'"; return 1; }
        number=$((number + 1))
        echo $number >records.count
        sleep 0.1
    done
}

# A session in which a shell says again what it hears.
client_ssh() {
    local answer session
    coproc SESSION { inside 'echo in; while read -r line; do echo "heard $line"; done'; }
    session=$SESSION_PID
    # Keys are computed on both emulated guests, one message of the other waiting for what each has to say.
    read -r -t 300 -u "${SESSION[0]}" answer || { failure="no login"; return 1; }
    until [ -e enough ]; do
        echo "$number" >&"${SESSION[1]}"
        read -r -t 90 -u "${SESSION[0]}" answer || { failure="no answer"; return 1; }
        [ "$answer" = "heard $number" ] || { failure="heard '$answer'"; return 1; }
        number=$((number + 1))
        echo $number >ssh.count
        sleep 0.2
    done
    kill "$session"
}

# Downloads, slow enough to be met by what is tried.
client_download() {
    local sum good
    read -r good _ <linux/bulk.sha256
    until [ -e enough ]; do
        sum=$(curl -sS --limit-rate 500k "http://$address/bulk" 2>>download.errors | sha256sum)
        [ "${sum%% *}" = "$good" ] || { failure="its sum is $sum: $(tail -n 3 download.errors)"; return 1; }
        number=$((number + 1))
        echo $number >download.count
    done
}

# Waits until each of these clients has had as many answers more.
until_more() {
    local more=$1 client from end
    shift
    for client; do
        from=$(cat "$client.count" 2>/dev/null || true)
        end=$((SECONDS + 300))
        until [ "$(cat "$client.count")" -ge $((${from:-0} + more)) ] 2>/dev/null; do
            [ ! -e failed ] || { cat failed; return 1; }
            [ $SECONDS -lt $end ] || { echo "$client: no $more answers more than $from within 300 s"; return 1; }
            sleep 0.5
        done
    done
}

clients_done() {
    local end=$((SECONDS + 300))
    touch enough
    until [ -e finished ] && [ "$(wc -l <finished)" -ge "$1" ]; do
        [ $SECONDS -lt $end ] || { echo "clients do not end: $(cat finished)"; return 1; }
        sleep 0.5
    done
    [ ! -e failed ] || { cat failed; return 1; }
    echo "$(tr '\n' ' ' <finished)and each answer was right"
}
