# A Linux guest, protected in one lab host, each side with a disk of its own: the primary is killed at a random moment while clients
# count up in redis and write records. No answer that they had is lost, and the guest is well, before and after; at the end the survivor
# is killed too: its disk needs no repair, and has all records that were acknowledged.
limit=600

check() {
    host_start a 1
    host_run a ". linux.sh; $(declare -f start_side); network 2; mkdir witness
        disk a.img; cp --sparse=always linux/a.img linux/b.img
        start_side b secondary; start_side a primary; until_said 240 GUEST-READY a.log; until_state 240 a protected
        for client in redis records; do client \$client >/dev/null 2>&1 & done
        until_more 20 redis records; well"
    host_run a ". linux.sh; $(declare -f end_process)
        sleep $((RANDOM % 4)).$((RANDOM % 10))
        end_process a; until_state 60 b alone
        until_more 20 redis records; well; inside true"
    host_run a ". linux.sh; $(declare -f end_process)
        clients_done 2; well; end_process b
        # The first brings the file system's own journal in, and nothing is left to repair.
        { e2fsck -p linux/b.img >fsck.log 2>&1 || [ \$? = 1 ]; } && e2fsck -fn linux/b.img >>fsck.log 2>&1 || { cat fsck.log; exit 1; }
        debugfs -R 'dump /var/lib/checks/records records' linux/b.img 2>/dev/null
        [ \$((\$(stat -c %s records) / 64)) -ge \$(cat records.count) ] || { echo 'acknowledged records are not on the disk'; exit 1; }
        echo \"the primary killed: \$(tr '\n' ' ' <finished)\""
}

# start_side a primary
start_side() {
    local name=$1 role=$2 peer own=7700 other=7701
    [ "$name" = a ] || { own=7701 other=7700; }
    peer=(--listen "127.0.0.1:$own" --peer "127.0.0.1:$other")
    tandem "$role" --pair lab --name "$name" "${peer[@]}" "${boots[@]}" --image "linux/$name.img" --memory 192M --vcpus 1 \
        --tap "tap$((own - 7700))" --witness dir:/run/lab/witness --takeover-limit 3s --mode "${mode:-auto}" </dev/null >>"$name.log" 2>&1 &
    echo $! >"$name.pid"
}

end_process() {
    local pid
    pid=$(cat "$1.pid")
    kill -KILL "$pid"
    while kill -0 "$pid" 2>/dev/null; do sleep 0.1; done
}
