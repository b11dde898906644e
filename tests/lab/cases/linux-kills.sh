# A Linux guest, protected in one lab host, each side with a disk of its own, serves an open ssh session, downloads, increments of redis
# and records on its disk. Again and again the primary is killed at a random moment, the survivor goes on, and a new secondary joins it. No
# answer that a client had is lost, none is wrong, no connection ends, and the guest is well. Side a is in mode auto when it leads: its
# survivor's guest has run beside it. Side b is buffered: its survivor goes on from what was saved last, in a process where it never ran. At
# the end both are killed: their disks need no repair, and have all records that were acknowledged. KILLS=10 says how often (2),
# LAB_LIMIT=3600 how long it may take.
limit=1200

check() {
    local number primary=a secondary=b kills=${KILLS:-2} common
    local -A modes=([a]=${MODE:-auto} [b]=${MODE:-buffered})
    common="export VCPUS=${VCPUS:-1}; . linux.sh"
    host_start a 1
    host_run a "$common; pair; start_side b secondary ${modes[b]}; start_side a primary ${modes[a]}; until_said 400 GUEST-READY a.log; until_state 240 a protected
        for client in ssh redis records download; do client \$client >/dev/null 2>&1 & until_more 1 \$client; done; well"
    for ((number = 1; number <= kills; number++)); do
        host_run a "$(declare -f survives); $common; survives $primary $secondary $((RANDOM % 4)).$((RANDOM % 10)) ${modes[$primary]}" || {
            host_run a "for side in a b; do tandem status --control /run/tandem/lab-\$side.sock; tandem flows --control /run/tandem/lab-\$side.sock
                grep -v 'guest: ' \$side.log | tail -n 30; done; tail -n 3 *.count"
            return 1
        }
        read -r primary secondary <<<"$secondary $primary"
    done
    host_run a "$common; clients_done 4; well; end_process $primary; until_state 60 $secondary alone; end_process $secondary
        for side in a b; do
            count=\$(repaired \$side)
            [ \$count -ge \$(cat records.count) ] || { echo \"\$side has \$count records on its disk\"; exit 1; }
        done
        echo \"the primary killed $kills times: \$(tr '\n' ' ' <finished)\""
}

# survives a b 1.5 auto: a is killed after so many seconds, b goes on, a joins it, with that mode for when it leads.
survives() {
    local end=$SECONDS
    sleep "$3"
    end_process "$1"
    until_state 60 "$2" alone
    until_more 5 redis records
    until_more 2 ssh
    start_side "$1" secondary "$4"
    until_state 300 "$2" 'protected\|checkpointing'
    until_more 5 redis records
    until_more 2 ssh
    well
    echo "$1 killed: $(tail -qn 1 ssh.count redis.count records.count download.count | tr '\n' ' ') after $((SECONDS - end)) s"
}
