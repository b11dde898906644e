# A Linux guest, protected in one lab host, each side with a disk of its own: the primary is killed at a random moment while clients
# count up in redis and write records. No answer that they had is lost, and the guest is well, before and after; at the end the survivor
# is killed too: its disk needs no repair, and has all records that were acknowledged.
limit=600

check() {
    host_start a 1
    host_run a ". linux.sh; pair
        start_side b secondary; start_side a primary; until_said 240 GUEST-READY a.log; until_state 240 a protected
        for client in redis records; do client \$client >/dev/null 2>&1 & done
        until_more 20 redis records; well"
    host_run a ". linux.sh
        sleep $((RANDOM % 4)).$((RANDOM % 10))
        end_process a; until_state 60 b alone
        until_more 20 redis records; well; inside true"
    host_run a ". linux.sh
        clients_done 2; well; end_process b
        count=\$(repaired b)
        [ \$count -ge \$(cat records.count) ] || { echo \"\$count records on the disk\"; exit 1; }
        echo \"the primary killed: \$(tr '\n' ' ' <finished)\""
}
