# A stock Debian kernel boots with 1, 2 and 4 processors; nginx, redis, ssh and a bulk download are right, and so is what watches
# inside; it boots again when it is reset, and powering it off ends `tandem run` with a disk that needs no repair.
limit=900

check() {
    host_start a 1
    host_run a '. linux.sh; network 1; disk a.img'
    local vcpus
    for vcpus in 1 2 4; do
        host_run a "$(declare -f one_life); . linux.sh; one_life $vcpus"
    done
    echo "booted with 1, 2 and 4 processors, reset and powered off: $(host_run a 'grep -aoh "after [0-9.]* s" *.log | tr "\n" " "')"
}

one_life() {
    local log=$1.log pid status=0
    tandem run --name a "${boots[@]}" --image linux/a.img --memory 256M --vcpus "$1" --tap tap0 >"$log" 2>&1 </dev/null &
    pid=$!
    until_said 180 GUEST-READY "$log"
    serves "$1"
    if [ "$1" = 2 ]; then
        inside reboot || true
        until_said 180 GUEST-READY "$log" 2
        serves "$1"
    fi
    inside poweroff || true
    wait "$pid" || status=$?
    [ $status = 0 ] || { echo "powered off, tandem ended with $status"; cat "$log"; return 1; }
    e2fsck -fn linux/a.img >fsck.log 2>&1 || { cat fsck.log; return 1; }
}
