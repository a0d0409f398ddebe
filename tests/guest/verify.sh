#!/bin/sh
# Guest job: what filesystem.sh has left is there and whole.
set -eu
. /run/job.lib

for disk in $(cow_disks); do
    e2fsck -fn "$(device_of "$disk")" >/dev/null
    mount_disk "$disk"
    verify "$disk"
    umount "/mnt/$disk"
done
