# A protected Linux guest gives back the room of a file that it removed: on both hosts. Then it ends by itself. It reboots: it stays
# protected all the while. It powers off: both sides end, with disks that are alike and need no repair. It panics: both sides end, and say
# why. Each time both disks have all records that were acknowledged, and nobody takes over.
limit=900

check() {
    host_start a 1
    host_run a "$(declare -f trims taken reboots powers_off panics recorded agree); . linux.sh
        pair; start_side b secondary; start_side a primary
        until_said 240 GUEST-READY a.log; until_state 240 a protected
        trims
        reboots
        powers_off
        start_side b secondary; start_side a primary; until_said 240 GUEST-READY a.log 3; until_state 240 a protected
        panics
        echo \"rebooted, powered off, panicked: \$(cat acknowledged) records, all there\""
}

# Makes a record, which is on the disk before it is told, and must be the next.
recorded() {
    local answer side
    answer=$(ask record) || {
        echo "no record, but '$answer', after $(cat acknowledged)"
        for side in a b; do
            tandem status --control /run/tandem/lab-$side.sock
            tandem flows --control /run/tandem/lab-$side.sock
            grep -v 'guest: ' $side.log | tail -n 30
        done
        ask report
        return 1
    }
    [ "$answer" = "record $(cat acknowledged 2>/dev/null || echo 0)" ] || { echo "the next record is '$answer', after $(cat acknowledged)"; return 1; }
    echo $((${answer#record } + 1)) >acknowledged
}

trims() {
    local side end=$((SECONDS + 60))
    local -A full
    inside 'head -c 16M /dev/urandom >/filler && sync'
    for side in a b; do full[$side]=$(taken $side); done
    inside 'rm /filler && sync && fstrim /'
    for side in a b; do
        until [ "$(taken $side)" -lt $((${full[$side]} - 15 * 1024)) ]; do
            [ $SECONDS -lt $end ] || { echo "$side's image takes $(taken $side) KiB, and took ${full[$side]} before the guest gave 16 MiB back"; return 1; }
            sleep 0.5
        done
    done
}

# KiB that a side's image takes of its disk.
taken() {
    sync "linux/$1.img"
    du -k "linux/$1.img" | cut -f1
}

reboots() {
    recorded
    ask 'do reboot'
    until_said 240 GUEST-READY a.log 2
    until_state 60 a protected
    until_state 60 b protected
    recorded
    well
    [ "$(grep -c 'state="syncing"' b.log)" = 1 ] || { echo "the protection was lost:"; tail -n 20 a.log b.log; return 1; }
}

powers_off() {
    local terms
    terms=$(ls witness)
    recorded
    ask 'do poweroff'
    [ "$(ended 120 a) $(ended 60 b)" = '0 0' ] || { echo "powered off, they ended with $(cat a.status b.status)"; tail -n 20 a.log b.log; return 1; }
    for side in a b; do
        tail -n 1 $side.log | grep -q 'ended: the guest powered off' || { echo "it does not say why $side ended:"; tail -n 5 $side.log; return 1; }
        e2fsck -fn linux/$side.img >fsck.log 2>&1 || { cat fsck.log; return 1; }
    done
    cmp linux/a.img linux/b.img
    agree "$terms" records_of
}

panics() {
    local terms
    terms=$(ls witness)
    recorded
    ask 'do echo c >/proc/sysrq-trigger'
    [ "$(ended 120 a) $(ended 60 b)" = '1 0' ] || { echo "after a panic they ended with $(cat a.status b.status)"; tail -n 20 a.log b.log; return 1; }
    for side in a b; do
        tail -n 1 $side.log | grep -q 'the guest crashed: it panicked' || { echo "it does not say why $side ended:"; tail -n 5 $side.log; return 1; }
    done
    agree "$terms" repaired
}

# agree TERMS how-to-count: nobody has taken over since, and both disks have all records that were acknowledged.
agree() {
    [ "$(ls witness)" = "$1" ] && ! grep 'took over' a.log b.log || { echo "somebody took over: $(ls witness)"; return 1; }
    local side count
    for side in a b; do
        count=$("$2" $side)
        [ "$count" = "$(cat acknowledged)" ] || { echo "$side has $count records of $(cat acknowledged) on its disk"; return 1; }
    done
}
