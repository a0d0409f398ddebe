# shellcheck shell=bash
# Starts and stops addcowd and the QEMU guests that use its disks.
#
# Relies on common.sh, on make_guest_image having run, and on `addcowd` and `addcow` in PATH. All
# of it works in the current folder with relative names, so that socket paths stay short.
# Everything started here is gone when the script ends. Nothing here waits without a limit.
#
# One guest runs at a time. Its console goes to NAME.console.log. Its job talks over a second
# serial port: what it prints goes to NAME.job.log, and `guest_send` gives it a line to read.

qemu=(qemu-system-x86_64)  # the emulator to run and its first options; see qemu10.sh
accel=()                   # set by choose_accelerator
slow=1                     # how many times longer things may take without KVM
guest_memory=512M
# On a busy host an emulated timer may be too late for the kernel's test of it, which ends in a panic
# ("IO-APIC + timer doesn't work").
kernel_options=no_timer_check
guest_pid=
guest_name=
guest_pump_pid=
guest_echo=no              # yes: what the job prints is shown at once
declare -A daemon_pid=()   # by the add-cow file's name

at_exit 'stop_everything'
stop_everything() {
    local disk
    [ -z "$guest_pid" ] || stop_process "$guest_pid" 5
    [ -z "$guest_pump_pid" ] || stop_process "$guest_pump_pid" 1
    for disk in "${!daemon_pid[@]}"; do stop_process "${daemon_pid[$disk]}" 5; done
    return 0
}

# Chooses KVM when it really runs a guest, else emulation. That /dev/kvm opens, and even that it
# runs a boot sector, proves little (there are hosts where a kernel then hangs), so the guest's
# own kernel must reach its initrd in time.
choose_accelerator() {
    # Emulating five-level page tables costs time and brings nothing.
    accel=(-accel "tcg,thread=multi" -cpu "max,la57=off")
    slow=4
    if grep -qE '^flags.* (vmx|svm)( |$)' /proc/cpuinfo && [ -w /dev/kvm ] && kvm_boots; then
        accel=(-accel kvm -cpu host)
        slow=1
        note "KVM works here"
    else
        note "no usable KVM here: the processor is emulated (TCG), everything is slower"
    fi
}

kvm_boots() {
    timeout -k 5 20 qemu-system-x86_64 -accel kvm -cpu host -m 256 -machine q35 -nodefaults \
        -no-user-config -no-reboot -display none -serial stdio -kernel "$image_dir/vmlinuz" \
        -initrd "$image_dir/initrd" -append "console=ttyS0 panic=-1 quiet addcow.probe" \
        </dev/null 2>/dev/null | grep -q 'initrd: alive'
}

# socket_of DISK: the socket path that daemon_start uses for an add-cow file.
socket_of() { printf '%s.sock' "${1%.add-cow}"; }

# daemon_start DISK [OPTION...]: starts addcowd for an add-cow file and waits for its socket.
daemon_start() {
    local disk=$1 socket tries=100
    shift
    socket=$(socket_of "$disk")
    addcowd --blk-file "$disk" --socket-path "$socket" "$@" >>"$disk.log" 2>&1 </dev/null &
    daemon_pid[$disk]=$!
    until [ -S "$socket" ]; do
        if ! kill -0 "${daemon_pid[$disk]}" 2>/dev/null || [ "$tries" -eq 0 ]; then
            show_log_end "$disk.log"
            die "addcowd has not opened $socket; whole log: $PWD/$disk.log"
        fi
        sleep 0.1
        tries=$((tries - 1))
    done
}

# daemon_stop DISK: SIGTERM. The daemon must end by itself, with status 0, and remove its socket.
daemon_stop() {
    local disk=$1 pid=${daemon_pid[$1]} tries=200 status=0
    kill -TERM "$pid" 2>/dev/null || true
    while kill -0 "$pid" 2>/dev/null && [ "$tries" -gt 0 ]; do
        sleep 0.1
        tries=$((tries - 1))
    done
    [ "$tries" -gt 0 ] || die "addcowd for $disk goes on 20 s after SIGTERM; log: $PWD/$disk.log"
    wait "$pid" || status=$?
    unset "daemon_pid[$disk]"
    if [ "$status" -ne 0 ]; then
        show_log_end "$disk.log"
        die "addcowd for $disk ended with status $status; whole log: $PWD/$disk.log"
    fi
    [ ! -e "$(socket_of "$disk")" ] || die "addcowd for $disk has left its socket behind"
}

# daemon_kill DISK: SIGKILL.
daemon_kill() {
    local pid=${daemon_pid[$1]}
    kill -KILL "$pid" 2>/dev/null || die "addcowd for $1 has ended; log: $PWD/$1.log"
    wait "$pid" 2>/dev/null || true
    unset "daemon_pid[$1]"
}

# vhost_disk DISK QUEUES: sets `disk_options` to QEMU's options for a disk that addcowd serves.
vhost_disk() {
    local id=${1%.add-cow}
    disk_options=(-chardev "socket,id=c-$id,path=$(socket_of "$1"),reconnect=1"
        -device "vhost-user-blk-pci,chardev=c-$id,num-queues=$2")
}

# machine_options PROCESSORS: sets `machine` to QEMU's options for the machine without its disks.
machine_options() {
    machine=("${accel[@]}" -smp "$1" -m "$guest_memory" -no-user-config -nodefaults -no-reboot
        -object "memory-backend-memfd,id=mem,size=$guest_memory,share=on"
        -machine "q35,memory-backend=mem" -kernel vmlinuz)
}

# guest_start NAME JOB PROCESSORS QEMU-OPTION...: boots a guest whose first disk is its root file
# system, and which runs the script JOB, with lib.sh from JOB's folder as /run/job.lib. Wants
# vmlinuz and initrd in the current folder.
guest_start() {
    local name=$1 job=$2 processors=$3 tree machine
    shift 3
    tree=$(mktemp -d)
    install -m 755 "$job" "$tree/job"
    [ ! -e "$(dirname "$job")/lib.sh" ] || cp "$(dirname "$job")/lib.sh" "$tree/job.lib"
    { cat initrd && make_cpio "$tree"; } >"$name.initrd"
    rm -rf "$tree"
    rm -f "$name".job.{in,out,log} "$name.console.log"
    mkfifo "$name.job.in" "$name.job.out"
    : >"$name.job.log"
    pump_job_output <"$name.job.out" "$name" &
    guest_pump_pid=$!
    machine_options "$processors"
    "${qemu[@]}" "${machine[@]}" -display none -initrd "$name.initrd" \
        -append "root=/dev/vda console=ttyS0 panic=-1 $kernel_options" -serial "file:$name.console.log" \
        -chardev "pipe,id=job,path=$name.job" -serial chardev:job "$@" \
        >"$name.qemu.log" 2>&1 </dev/null &
    guest_pid=$!
    guest_name=$name
}

# Copies the job's lines to its log, and to the terminal when asked.
pump_job_output() {
    local line
    while IFS= read -r line; do
        printf '%s\n' "$line" >>"$1.job.log"
        if [ "$guest_echo" = yes ] && [ "${line#job-exit}" = "$line" ]; then
            printf '      guest| %s\n' "$line"
        fi
    done
}

# guest_fail CAUSE: ends the script with the guest's last words.
guest_fail() {
    show_log_end "$guest_name.qemu.log" 5
    show_log_end "$guest_name.console.log" 12
    show_log_end "$guest_name.job.log" 12
    die "guest $guest_name: $1; logs: $PWD/$guest_name.{qemu,console,job}.log"
}

# guest_wait_line LINE SECONDS: waits until the job has printed LINE. The limit grows under TCG.
guest_wait_line() {
    local tries=$(($2 * slow * 5))
    until grep -qxF -- "$1" "$guest_name.job.log"; do
        kill -0 "$guest_pid" 2>/dev/null || guest_fail "ended before it said \"$1\""
        grep -q '^job-exit' "$guest_name.job.log" && guest_fail "its job ended before \"$1\""
        [ "$tries" -gt 0 ] || guest_fail "has not said \"$1\" in $(($2 * slow)) s"
        sleep 0.2
        tries=$((tries - 1))
    done
}

# guest_send LINE: gives the job a line to read.
guest_send() { printf '%s\n' "$1" >"$guest_name.job.in"; }

# guest_finish SECONDS: waits for the power-off; the job must have ended with status 0 and the
# kernel must not have complained about a disk. The limit grows under TCG.
guest_finish() {
    local tries=$(($1 * slow * 5)) status=0 trouble
    trouble='I/O error|EXT4-fs (error|warning)|Buffer I/O|Remounting|blocked for more|BUG:|Oops'
    while kill -0 "$guest_pid" 2>/dev/null; do
        [ "$tries" -gt 0 ] || guest_fail "has not powered off in $(($1 * slow)) s"
        sleep 0.2
        tries=$((tries - 1))
    done
    wait "$guest_pid" || status=$?
    guest_pid=
    wait "$guest_pump_pid" || true
    guest_pump_pid=
    [ "$status" -eq 0 ] || guest_fail "QEMU ended with status $status"
    grep -qx 'job-exit 0' "$guest_name.job.log" || guest_fail "its job failed"
    if grep -nE "$trouble" "$guest_name.console.log"; then
        guest_fail "its kernel complains (lines above)"
    fi
    rm -f "$guest_name".job.{in,out} "$guest_name.initrd"
}
