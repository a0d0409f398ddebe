#!/bin/sh
# Guest job: ext4 on every add-cow disk at the same time, across a restart of the daemons.
#
# Relies on the disks' serial numbers (see tests/guest/run). Makes a file system, writes, trims,
# checks, asks the host to restart the daemons, verifies, writes on. Leaves /manifest-DISK on the
# root disk and the file systems for the next boot (verify.sh). Any failure ends the job.
set -eu
# shellcheck source=tests/guest/lib.sh
. /run/job.lib

# fill DISK FOLDER: puts part of Debian and files of odd sizes into a new folder.
fill() {
    mkdir "/mnt/$1/$2"
    cp -a /usr/lib/x86_64-linux-gnu/perl-base /etc "/mnt/$1/$2/"
    dd if=/dev/urandom of="/mnt/$1/$2/random" bs=100003 count=20 status=none
    for size in 1 511 512 513 4095 4097 65535 65537; do
        dd if=/dev/urandom of="/mnt/$1/$2/size-$size" bs=$size count=1 status=none
    done
}

# remember DISK: notes the checksums that `verify` wants to see again.
remember() { (cd "/mnt/$1" && find . -type f -exec sha256sum {} +) >"/manifest-$1"; }

# settle DISK: after a check of the unmounted file system, everything is there.
settle() {
    remember "$1"
    umount "/mnt/$1"
    check_file_system "$1"
    mount_disk "$1"
    verify "$1"
}

before_restart() {
    mkfs.ext4 -q -F "$(device_of "$1")"
    mount_disk "$1"
    fill "$1" first
    fill "$1" second
    sync
    rm -r "/mnt/$1/first"
    fstrim -v "/mnt/$1"
    fill "$1" third
    settle "$1"
}

after_restart() {
    verify "$1"
    rm -r "/mnt/$1/second"
    fstrim -v "/mnt/$1"
    fill "$1" fourth
    settle "$1"
    umount "/mnt/$1"
}

on_every_disk before_restart
sync
echo "restart the daemons"
read -r answer
echo "after the restart ($answer)"
on_every_disk after_restart
