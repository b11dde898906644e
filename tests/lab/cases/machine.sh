# The machine's own tests on kvm_amd: memory, the dirty log and ring, saving and restoring, devices.
limit=420

check() {
    host_start a
    host_run a 'grep -qw svm /proc/cpuinfo && test -c /dev/kvm'
    host_run a 'set -eo pipefail; cd tests && for test in *; do TANDEM_REQUIRE_KVM=1 TANDEM_GUEST_ELF=/run/lab/guest ./$test 2>&1 || exit 1; done | tee all
        grep "^test result" all | awk "{ passed += \$4 } END { if (!passed) exit 1; print passed \" tests passed\" }"'
}
