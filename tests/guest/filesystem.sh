#!/bin/sh
# Guest job: ext4 on every add-cow disk, across a restart of the daemons.
#
# Relies on the disks' serial numbers (see tests/guest/run). Makes a file system, writes, trims,
# checks, asks the host to restart the daemons, verifies, writes on. Leaves /manifest-DISK on the root
# disk and the file systems for the next boot (verify.sh). Any failure ends the job.
set -eu
# shellcheck source=tests/guest/lib.sh
. /run/job.lib

# Fills the mounted file system of disk $1 with part of Debian and with odd sizes.
fill() {
    mkdir "/mnt/$1/$2"
    cp -a /usr/lib/x86_64-linux-gnu/perl-base /usr/bin/perl /etc "/mnt/$1/$2/"
    dd if=/dev/urandom of="/mnt/$1/$2/random" bs=100003 count=60 status=none
    for size in 1 511 512 513 4095 4097 65535 65537; do
        dd if=/dev/urandom of="/mnt/$1/$2/size-$size" bs=$size count=1 status=none
    done
}

remember() { (cd "/mnt/$1" && find . -type f -exec sha256sum {} +) >"/manifest-$1"; }

for disk in $(cow_disks); do
    mkfs.ext4 -q -F "$(device_of "$disk")"
    mount_disk "$disk"
    fill "$disk" first
    fill "$disk" second
    sync
    rm -r "/mnt/$disk/first"
    fstrim -v "/mnt/$disk"
    fill "$disk" third
    remember "$disk"
    umount "/mnt/$disk"
    check_file_system "$disk"
    mount_disk "$disk"
    verify "$disk"
done

sync
echo "restart the daemons"
read -r answer
echo "after the restart ($answer)"

for disk in $(cow_disks); do
    verify "$disk"
    rm -r "/mnt/$disk/second"
    fill "$disk" fourth
    fstrim -v "/mnt/$disk"
    remember "$disk"
    umount "/mnt/$disk"
    check_file_system "$disk"
    mount_disk "$disk"
    verify "$disk"
    umount "/mnt/$disk"
done
