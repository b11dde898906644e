# Two lab hosts, whose processors differ. A VM that needs what the secondary's lacks is refused before anything has started; one that
# may do without it is protected. Then a host loses its power, and a client's connection and increments go on.
limit=420

check() {
    host_start a 1 1536 listen
    host_start b 1 1536 connect popcnt=off
    local side
    for side in a b; do
        host_run $side "
            ip link add br0 type bridge && ip link set wire master br0 && ip link set br0 up
            ip address add 10.9.0.$([ $side = a ] && echo 1 || echo 2)/24 dev br0
            ip tuntap add dev tap0 mode tap && ip link set tap0 master br0 up
            truncate -s 64M disk.img"
    done
    local pair='--pair lab --image disk.img --memory 64M --tap tap0 --takeover-limit 2s'
    host_run b "tandem secondary $pair --name b --listen 10.9.0.2:7700 --peer 10.9.0.1:7700 >role.log 2>&1 &"
    # A primary that finds no secondary takes this host's processor as it is, and begins alone.
    host_run b "$(declare -f until_state); until_state starting"
    host_run a "$(declare -f is_refused); is_refused popcnt timeout 60 tandem primary $pair --name a --peer 10.9.0.2:7700 --cpu x86-64-v2"
    host_run a "tandem primary $pair --name a --peer 10.9.0.2:7700 --cmdline 'ip=10.9.0.10/24 gw=10.9.0.2' >role.log 2>&1 &"
    host_run b "$(declare -f until_state); until_state protected"
    host_run a "grep \"the secondary's host lacks popcnt: so does the VM\" role.log"
    host_run b "$(declare -f increments); increments >client.log 2>&1 &"
    host_run b "$(declare -f until_more); until_more"
    host_kill a
    # Without a witness that survives, the operator says that the host is gone for good.
    host_run b "$(declare -f until_state); until_state contending && tandem takeover --old-primary-is-off && until_state alone"
    host_run b "$(declare -f until_more); until_more"
    host_run b 'touch enough; for try in $(seq 100); do grep -q "^done" client.log && break; sleep 0.2; done
        tail -n 5 role.log; cat client.log; grep -q "^done" client.log'
}

# is_refused popcnt COMMAND…: it says that this is lacking, has started nothing, and leaves nothing behind.
is_refused() {
    local feature=$1 status=0 before
    shift
    before=$(ls)
    "$@" >/tmp/refused 2>&1 || status=$?
    [ $status = 1 ] && grep -q "lacks what the VM's CPU has: $feature: " /tmp/refused && ! grep -q running /tmp/refused && [ "$(ls)" = "$before" ] && return
    echo "it ended with $status, and left $(ls):"
    cat /tmp/refused
    return 1
}

# Waits until the role on this host says that it is in that state.
until_state() {
    local try
    for try in $(seq 300); do
        tandem status 2>/dev/null | grep -q "^state *$1" && return
        sleep 0.1
    done
    tandem status
    cat role.log
    return 1
}

# Waits until there have been twenty more increments.
until_more() {
    local try from
    from=$(cat number 2>/dev/null)
    for try in $(seq 300); do
        [ "$(cat number 2>/dev/null || echo 0)" -ge $((${from:-0} + 20)) ] && return
        sleep 0.2
    done
    cat client.log role.log
    return 1
}

# Increments over one connection, each more by one than that before, until told that it is enough.
increments() {
    local number=0 answer
    # It is protected before its server listens, if that is how its processor's turns fall.
    until { exec 3<>/dev/tcp/10.9.0.10/6379; } 2>/dev/null; do sleep 0.2; done
    until [ -e enough ]; do
        printf '*2\r\n$4\r\nINCR\r\n$1\r\nn\r\n' >&3
        IFS= read -r -t 60 -u 3 answer || { echo "no answer after $number increments"; return 1; }
        number=$((number + 1))
        echo "$number" >number
        [ "$answer" = ":$number"$'\r' ] || { echo "increment $number was answered $answer"; return 1; }
    done
    echo "done: $number increments over one connection, none lost"
}
