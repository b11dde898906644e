#!/usr/bin/env bash
# Makes conversation.pcap: what a guest (02:00:00:00:00:01, 10.0.0.1, fd00::1) and a client say, by this kernel. Needs root, tcpdump, python3.
set -euo pipefail
cd "$(dirname "$0")"
guest="capture-guest-$$" client="capture-client-$$"
trap 'ip netns del "$guest" 2>/dev/null; ip netns del "$client" 2>/dev/null' EXIT
ip netns add "$guest"
ip netns add "$client"
ip -n "$guest" link add eth0 address 02:00:00:00:00:01 gso_max_segs 1 type veth peer name eth0 address 02:00:00:00:00:02 netns "$client"
for side in "$guest 1" "$client 9"; do
    read -r name number <<<"$side"
    ip -n "$name" addr add "10.0.0.$number/24" dev eth0
    ip -n "$name" -6 addr add "fd00::$number/64" dev eth0 nodad
    ip -n "$name" link set lo up
    ip -n "$name" link set eth0 gso_max_segs 1 up
done
ip netns exec "$guest" tcpdump -q -n -i eth0 -s 0 -U -w conversation.pcap &
tcpdump=$!
sleep 1
serve='
import socket, threading
def tcp(family, address):
    listener = socket.create_server((address, 80), family=family)
    for _ in range(3):
        connection, _ = listener.accept()
        request = connection.recv(4096)
        for part in range(5):
            connection.sendall(bytes((at * 7 + part) % 251 for at in range(1900)))
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(4096): pass
        connection.close()
def udp():
    service = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    service.bind(("10.0.0.1", 53))
    for _ in range(4):
        question, client = service.recvfrom(9000)
        service.sendto(question[::-1], client)
threads = [threading.Thread(target=tcp, args=(socket.AF_INET, "10.0.0.1")),
           threading.Thread(target=tcp, args=(socket.AF_INET6, "fd00::1")), threading.Thread(target=udp)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
out = socket.create_connection(("10.0.0.9", 7000))
out.sendall(b"a line of the log\n" * 100)
out.shutdown(socket.SHUT_WR)
out.recv(1)
'
ask='
import socket, time
log = socket.create_server(("10.0.0.9", 7000))
for family, address in [(socket.AF_INET, "10.0.0.1"), (socket.AF_INET6, "fd00::1")] * 3:
    connection = socket.socket(family)
    connection.connect((address, 80))
    connection.sendall(b"GET /")
    while connection.recv(1000): pass
    connection.close()
question = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for size in [20, 3000, 40, 5000]:
    question.sendto(bytes(at % 256 for at in range(size)), ("10.0.0.1", 53))
    question.recv(9000)
connection, _ = log.accept()
while connection.recv(4096): pass
connection.close()
'
ip netns exec "$guest" python3 -c "$serve" &
server=$!
sleep 1
ip netns exec "$client" ping -q -c 2 -i 0.2 10.0.0.1 >/dev/null
ip netns exec "$client" ping -q -c 1 -s 2000 10.0.0.1 >/dev/null
ip netns exec "$client" python3 -c "$ask"
wait "$server"
sleep 1
kill "$tcpdump"
wait "$tcpdump" || true
