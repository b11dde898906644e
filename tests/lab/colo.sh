# QEMU's COLO, for `bench` to compare with: the same guest run by QEMU, and protected as QEMU's docs/COLO-FT.txt has it, disk included.
# Sourced on a lab host after linux.sh. On a host by itself: colo_alone. On two: colo_secondary on b and colo_primary on a; when the guest is
# up, colo_receive on b, then colo_begin on a, which returns when the guest is protected; colo_takeover on b when a is dead.

qemu() {
    : >role.log
    # shellcheck disable=SC2154
    qemu-system-x86_64 -accel kvm -cpu host -M pc -m 192 -smp 1 -nodefaults -no-user-config -display none \
        -kernel linux/vmlinuz -initrd linux/initrd -append "$quiet unwatched ip=$address/24" -serial file:role.log \
        -netdev tap,id=hn0,ifname=tap0,script=no,downscript=no,vhost=off \
        -device virtio-net-pci,netdev=hn0,mac=52:54:00:09:00:10,romfile= -qmp tcp:127.0.0.1:4444,server,nowait "$@" </dev/null >qemu.log 2>&1 &
}

# Gives QEMU the orders on its input, a line each, and prints the last answer.
qmp() {
    exec {control}<>/dev/tcp/127.0.0.1/4444
    {
        echo '{"execute":"qmp_capabilities"}'
        cat
    } | {
        local order answer
        read -r -t 60 answer <&"$control"
        while read -r order; do
            echo "$order" >&"$control"
            while read -r -t 60 answer <&"$control"; do [[ $answer != '{"timestamp"'* ]] && break; done
            [[ $answer == '{"return"'* ]] || { echo "$order: $answer" >&2; tail -n 20 qemu.log >&2; exit 1; }
        done
        echo "$answer"
    }
    exec {control}>&-
}

colo_alone() {
    qemu -drive file=linux/a.img,format=raw,if=virtio,cache=writeback
}

colo_primary() {
    qemu -drive if=none,id=colo-disk0,driver=quorum,read-pattern=fifo,vote-threshold=1,children.0.file.filename=linux/a.img,children.0.driver=raw \
        -device virtio-blk-pci,drive=colo-disk0,addr=0x8 \
        -chardev socket,id=mirror0,host=192.0.2.2,port=9003,server=on,wait=off -chardev socket,id=compare1,host=192.0.2.2,port=9004,server=on,wait=off \
        -chardev socket,id=compare0,host=127.0.0.1,port=9001,server=on,wait=off -chardev socket,id=compare0-0,host=127.0.0.1,port=9001 \
        -chardev socket,id=compare_out,host=127.0.0.1,port=9005,server=on,wait=off -chardev socket,id=compare_out0,host=127.0.0.1,port=9005
}

colo_secondary() {
    local image
    for image in active hidden; do qemu-img create -q -f qcow2 linux/$image.qcow2 512M; done
    # Its card joins the bridge when it takes over.
    ip link set tap0 nomaster
    qemu -drive if=none,id=parent0,file.filename=linux/b.img,driver=raw \
        -drive if=none,id=childs0,driver=replication,mode=secondary,file.driver=qcow2,top-id=colo-disk0,file.file.filename=linux/active.qcow2,file.backing.driver=qcow2,file.backing.file.filename=linux/hidden.qcow2,file.backing.backing=parent0 \
        -drive if=none,id=colo-disk0,driver=quorum,read-pattern=fifo,vote-threshold=1,children.0=childs0 \
        -device virtio-blk-pci,drive=colo-disk0,addr=0x8 \
        -chardev socket,id=red0,host=192.0.2.2,port=9003,reconnect=1 -chardev socket,id=red1,host=192.0.2.2,port=9004,reconnect=1 \
        -object filter-redirector,id=f1,netdev=hn0,queue=tx,indev=red0,vnet_hdr_support=on \
        -object filter-redirector,id=f2,netdev=hn0,queue=rx,outdev=red1,vnet_hdr_support=on \
        -object filter-rewriter,id=rew0,netdev=hn0,queue=all,vnet_hdr_support=on -incoming tcp:192.0.2.3:9998
}

colo_receive() {
    qmp >/dev/null <<'ORDERS'
{"execute":"nbd-server-start","arguments":{"addr":{"type":"inet","data":{"host":"192.0.2.3","port":"9999"}}}}
{"execute":"nbd-server-add","arguments":{"device":"parent0","writable":true}}
{"execute":"migrate-set-capabilities","arguments":{"capabilities":[{"capability":"x-colo","state":true}]}}
ORDERS
}

colo_begin() {
    qmp >/dev/null <<'ORDERS'
{"execute":"drive-mirror","arguments":{"device":"colo-disk0","job-id":"resync","target":"nbd://192.0.2.3:9999/parent0","mode":"existing","format":"raw","sync":"full"}}
ORDERS
    within 120 'disk_jobs | grep -q "\"ready\": true"' "the disk's copy is not ready"
    qmp >/dev/null <<'ORDERS'
{"execute":"stop"}
{"execute":"block-job-cancel","arguments":{"device":"resync"}}
ORDERS
    within 60 '! disk_jobs | grep -q resync' "the disk's copy does not end"
    qmp >/dev/null <<'ORDERS'
{"execute":"human-monitor-command","arguments":{"command-line":"drive_add -n buddy driver=replication,mode=primary,file.driver=nbd,file.host=192.0.2.3,file.port=9999,file.export=parent0,node-name=replication0"}}
{"execute":"x-blockdev-change","arguments":{"parent":"colo-disk0","node":"replication0"}}
{"execute":"migrate-set-capabilities","arguments":{"capabilities":[{"capability":"x-colo","state":true}]}}
{"execute":"migrate-set-parameters","arguments":{"max-bandwidth":10000000000}}
{"execute":"object-add","arguments":{"qom-type":"filter-mirror","id":"m0","netdev":"hn0","queue":"tx","outdev":"mirror0","vnet_hdr_support":true}}
{"execute":"object-add","arguments":{"qom-type":"filter-redirector","id":"redire0","netdev":"hn0","queue":"rx","indev":"compare_out","vnet_hdr_support":true}}
{"execute":"object-add","arguments":{"qom-type":"filter-redirector","id":"redire1","netdev":"hn0","queue":"rx","outdev":"compare0","vnet_hdr_support":true}}
{"execute":"object-add","arguments":{"qom-type":"iothread","id":"iothread1"}}
{"execute":"object-add","arguments":{"qom-type":"colo-compare","id":"comp0","primary_in":"compare0-0","secondary_in":"compare1","outdev":"compare_out0","iothread":"iothread1","vnet_hdr_support":true}}
{"execute":"migrate","arguments":{"uri":"tcp:192.0.2.3:9998"}}
ORDERS
    within 120 colo_runs "the guest is not protected"
}

disk_jobs() { qmp <<<'{"execute":"query-block-jobs"}'; }

# Tries a command for so many seconds, or says that of it and what QEMU has to say.
within() {
    local end=$((SECONDS + $1))
    until eval "$2"; do
        [ $SECONDS -lt $end ] || { echo "$3: $(qmp <<<'{"execute":"query-migrate"}')" >&2; tail -n 20 qemu.log >&2; return 1; }
        sleep 0.5
    done
}

colo_runs() { qmp <<<'{"execute":"query-colo-status"}' | grep -q '"mode": "primary"'; }

# Without the time that it takes to see that a is dead, which COLO leaves to others.
colo_takeover() {
    qmp >/dev/null <<'ORDERS'
{"execute":"nbd-server-stop"}
{"execute":"x-colo-lost-heartbeat"}
ORDERS
    ip link set tap0 master br0
    qmp >/dev/null <<'ORDERS'
{"execute":"object-del","arguments":{"id":"f2"}}
{"execute":"object-del","arguments":{"id":"f1"}}
{"execute":"human-monitor-command","arguments":{"command-line":"announce_self"}}
ORDERS
}
