# The bundled guest on kvm_amd: a pair in one lab host serves clients while a host of it is killed, and nothing is lost.
limit=420

check() {
    host_start a
    # An emulated processor stands still for longer than a real one.
    local demo='tandem demo --takeover-limit 2s --json'
    for how in '--kill primary' '--kill secondary' '--mode buffered'; do
        host_run a "$demo $how >demo.json 2>demo.err || { cat demo.err demo.json; exit 1; }"
    done
    echo "a primary and a secondary killed in lockstep, a primary in buffered mode: nothing lost"
}
