# A Linux guest, protected by two hosts, serves clients on this machine: an open ssh session, downloads, increments of redis and records on
# its disk. A host loses its power, the other one's guest goes on, a new host takes its place, without a disk that it could build on, and
# joins; then the other loses its power. No answer that a client had is lost, none is wrong, no connection ends, and the guest is well; before
# and after, it leaves the cutting of what it sends to the network. At the end its disk needs no repair, and has all records that were
# acknowledged. KILLS=10 says how often (1), LAB_LIMIT=3600 how long it may take, MODE=auto the mode (lockstep), VCPUS=2 how many processors the
# guest has (1).
limit=1200
# It keeps two processors busy for minutes.
by_name=1

check() {
    local number primary=a secondary=b kills=${KILLS:-1} mode=${MODE:-lockstep} common side
    common="export VCPUS=${VCPUS:-1}; . linux.sh"
    wires
    outside
    for side in a b; do
        host_start $side 1 2048 wire-$side
        host_run $side "$common; apart $side"
    done
    host_run b "$common; start_side b secondary $mode"
    host_run a "$common; start_side a primary $mode; until_said 400 GUEST-READY a.log; until_state 240 a protected"
    large_frames
    for client in ssh redis records download; do
        client $client >/dev/null 2>&1 &
        until_more 1 $client
    done
    well
    for ((number = 1; number <= kills; number++)); do
        [ "$number" = 1 ] || joins "$secondary" "$primary"
        survives "$primary" "$secondary" || { told "$secondary"; return 1; }
        read -r primary secondary <<<"$secondary $primary"
    done
    clients_done 4
    large_frames
    well
    host_run "$primary" "$common; end_process $primary
        count=\$(repaired $primary); [ \$count -ge $(cat records.count) ] || { echo \"\$count records are on the disk\"; exit 1; }"
    echo "a host lost its power $kills times: $(tr '\n' ' ' <finished)"
}

# survives a b: a's host loses its power, b's guest goes on.
survives() {
    local from=$SECONDS
    sleep $((RANDOM % 4)).$((RANDOM % 10))
    host_kill "$1"
    host_run "$2" "$common; until_state 60 $2 alone" && until_more 5 redis records && until_more 2 ssh && well || return 1
    echo "the host of $1 lost its power: $(tail -qn 1 ssh.count redis.count records.count download.count | tr '\n' ' ') after $((SECONDS - from)) s"
}

# joins a b: a new host is a's, and joins b.
joins() {
    host_start "$1" 1 2048 "wire-$1"
    host_run "$1" "$common; apart $1; start_side $1 secondary $mode"
    host_run "$2" "$common; until_state 300 $2 'protected\|checkpointing'" || { told "$1"; return 1; }
    until_more 5 redis records
    until_more 2 ssh
}

# What a side says of itself.
told() {
    host_run "$1" "tandem status --control /run/tandem/lab-$1.sock; tandem flows --control /run/tandem/lab-$1.sock; grep -v 'guest: ' $1.log | tail -n 40"
    tail -n 3 ./*.count
}
