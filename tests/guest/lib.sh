# shellcheck shell=sh
# What the guest jobs share; the initrd brings it as /run/job.lib.

# device_of SERIAL: the block device with this serial number.
device_of() {
    for file in /sys/block/vd*/serial; do
        if [ "$(tr -d '\0' <"$file")" = "$1" ]; then
            name=${file%/serial}
            echo "/dev/${name##*/}"
            return 0
        fi
    done
    echo "no disk with the serial number $1" >&2
    return 1
}

# The serial numbers of the add-cow disks under test.
cow_disks() {
    for serial in c512 c4k c64k c2m; do
        if device_of "$serial" >/dev/null 2>&1; then echo "$serial"; fi
    done
}

# on_every_disk FUNCTION: calls FUNCTION DISK for all add-cow disks at once; all must succeed. Each
# call is a shell of its own that stops at its first failure.
on_every_disk() {
    children=
    for disk in $(cow_disks); do
        "$1" "$disk" &
        children="$children $!"
    done
    [ -n "$children" ]
    for child in $children; do wait "$child"; done
}

mount_disk() {
    mkdir -p "/mnt/$1"
    mount "$(device_of "$1")" "/mnt/$1"
}

# verify DISK: its files have the remembered checksums, read from the disk and not from memory.
verify() {
    echo 3 >/proc/sys/vm/drop_caches
    (cd "/mnt/$1" && sha256sum --quiet -c "/manifest-$1")
    echo "$1: $(wc -l <"/manifest-$1") files are whole"
}

# check_file_system DISK: e2fsck finds nothing to repair in the unmounted file system.
check_file_system() {
    if ! e2fsck -fn "$(device_of "$1")" >"/tmp/e2fsck-$1.log" 2>&1; then
        cat "/tmp/e2fsck-$1.log"
        echo "$1: e2fsck has found faults"
        return 1
    fi
}
