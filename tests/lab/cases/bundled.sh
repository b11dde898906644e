# The bundled guest on kvm_amd: a pair in one lab host serves clients while a host of it is killed, and nothing is lost.
limit=420

check() {
    host_start a
    # An emulated processor stands still for longer than a real one.
    local demo='tandem demo --takeover-limit 2s --json'
    for how in '--kill primary' '--kill secondary' '--mode buffered'; do
        host_run a "$(declare -f nothing_is_lost); $demo $how >demo.json 2>demo.err || nothing_is_lost || { cat demo.err demo.json; exit 1; }"
    done
    echo "a primary and a secondary killed in lockstep, a primary in buffered mode: nothing lost"
}

# Says whether nothing is wrong but that datagrams were lost: where a processor stands still for longer than their client waits, they are.
nothing_is_lost() {
    local fact
    for fact in takeover_ms:[0-9] failed_requests:0, wrong_answers:0, lost_writes:0, broken_connections:0,; do
        sed 's/.*"totals"//' demo.json | grep -q "\"${fact%%:*}\":${fact#*:}" || return 1
    done
}
