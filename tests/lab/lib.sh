# Lab hosts: QEMU processes with hardware KVM inside, emulated. Sourced by `one`, used by the cases, in a network namespace of their own.
#
#   host_start a [1 [3072 [listen|connect|TAP [popcnt=off]]]]    boots a host of that name: processors, MiB, which end of the wire it
#                                                is, or that its end is a TAP of this machine, and what its processor lacks
#   host_run a 'script'                          runs a script there, prints its output, returns its exit code
#   host_kill a                                  ends it like a power failure
#   outside                                      a folder of this machine's in which clients of linux.sh can work
#   wires                                        a network of this machine's: 192.0.2.1, with the TAPs wire-a and wire-b for two hosts
#
# A host has what is in $payload, a folder, under /run/lab; what is in its bin/ is on the PATH. The Linux guest of $linux is in linux/.

# Boots a host. Two hosts on the wire, the one that listens first, have a card of that name.
host_start() {
    local name=$1 processors=${2:-1} memory=${3:-3072} wire=${4:-} without=${5:-} at=$scratch/$1 port number cards=()
    # One that comes back is another.
    rm -rf "$at"
    mkdir "$at"
    # a is 1, b is 2.
    number=$(($(printf '%d' "'$name") % 32))
    port=$((20000 + number))
    if [ -n "$wire" ]; then
        case $wire in
            listen | connect) cards=(-netdev "socket,id=wire,$wire=127.0.0.1:40000") ;;
            *) cards=(-netdev "tap,id=wire,ifname=$wire,script=no,downscript=no") ;;
        esac
        cards+=(-device "virtio-net-pci,netdev=wire,mac=52:54:00:00:01:0$number")
    fi
    tar -C "$payload" -cf "$at/payload.tar" .
    # The disk's changes are dropped with the process. `-cpu max` is slow, and other machines than q35 lose their clock at times.
    # With a thread for each processor QEMU's SVM makes guests write to, and read, pages that they no longer have. With several
    # processors in one thread their turns end guests: an interrupt that the hypervisor injects comes a second time at the next turn, also to a
    # guest that takes none (`helper_vmrun` leaves it in `exception_index`). Hence one processor; guests may have more.
    qemu-system-x86_64 -accel tcg,thread=single -M q35 -cpu "EPYC,svm=on,npt=on${without:+,$without}" -smp "$processors" -m "$memory" \
        -nodefaults -no-user-config -display none -no-reboot \
        -kernel "$image/vmlinux" -initrd "$image/boot.cpio" \
        -append "console=ttyS0 quiet panic=-1 mitigations=off nokaslr tsc=reliable no_timer_check" \
        -drive "file=$image/root.img,format=raw,if=none,id=root,snapshot=on,cache=unsafe" -device virtio-blk-pci,drive=root \
        -drive "file=$at/payload.tar,format=raw,if=none,id=payload,readonly=on" -device virtio-blk-pci,drive=payload \
        -drive "file=$linux/guest.img,format=raw,if=none,id=guest,snapshot=on,cache=unsafe" -device virtio-blk-pci,drive=guest \
        -netdev "user,id=agent,restrict=on,hostfwd=tcp:127.0.0.1:$port-:5000,hostfwd=udp:127.0.0.1:$port-:9" \
        -device virtio-net-pci,netdev=agent,mac=52:54:00:00:00:aa "${cards[@]}" \
        -serial "file:$at/console" >"$at/qemu" 2>&1 &
    hosts[$name]=$!
    ports[$name]=$port
    # Now and then the emulated processor loses a timer interrupt and halts until the next of another kind: minutes, if none comes.
    while kill -0 "${hosts[$name]}"; do
        echo >"/dev/udp/127.0.0.1/$port"
        sleep 0.2
    done >/dev/null 2>&1 &
    until grep -aq LAB-READY "$at/console" 2>/dev/null; do
        kill -0 "${hosts[$name]}" 2>/dev/null || { echo "host $name ended while it booted: $(grep -v "TCG doesn.t support" "$at/qemu")" >&2; return 1; }
        sleep 0.1
    done
    # It is ready a moment before its agent listens.
    local try
    for try in {1..100}; do
        host_run "$name" true >"$at/agent" 2>&1 && return
        sleep 0.1
    done
    cat "$at/agent" >&2
    return 1
}

# Runs a script on a host.
host_run() {
    local name=$1 script=$2 line
    exec {agent}<>"/dev/tcp/127.0.0.1/${ports[$name]}" || { echo "host $name does not answer" >&2; return 1; }
    printf '%s\n' "$(printf '%s' "$script" | base64 -w0)" >&"$agent"
    while IFS= read -r line <&"$agent"; do
        if [[ $line == LAB-EXIT\ * ]]; then
            exec {agent}>&-
            return "${line#LAB-EXIT }"
        fi
        printf '%s\n' "$line"
    done
    exec {agent}>&-
    echo "host $name was lost" >&2
    return 1
}

# Ends a host at once.
host_kill() {
    kill -KILL "${hosts[$1]}"
    wait "${hosts[$1]}" 2>/dev/null || true
    unset "hosts[$1]"
}

wires() {
    local side
    ip link add clients type bridge
    ip address add 192.0.2.1/24 dev clients
    ip link set clients up
    for side in a b; do
        ip tuntap add dev "wire-$side" mode tap
        ip link set "wire-$side" master clients up
    done
}

outside() {
    local file
    mkdir -p "$scratch/outside/linux"
    cd "$scratch/outside"
    for file in key bulk.sha256; do debugfs -R "dump /$file linux/$file" "$linux/guest.img" 2>/dev/null; done
    chmod 600 linux/key
    # shellcheck source=linux.sh
    source "$here/linux.sh"
}
