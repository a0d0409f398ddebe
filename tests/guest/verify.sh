#!/bin/sh
# Guest job: what filesystem.sh has left is there and whole.
set -eu
# shellcheck source=tests/guest/lib.sh
. /run/job.lib

for disk in $(cow_disks); do
    check_file_system "$disk"
    mount_disk "$disk"
    verify "$disk"
    umount "/mnt/$disk"
done
