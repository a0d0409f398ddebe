#!/bin/sh
# Guest job: what filesystem.sh has left is there and whole.
set -eu
# shellcheck source=tests/guest/lib.sh
. /run/job.lib

look() {
    check_file_system "$1"
    mount_disk "$1"
    verify "$1"
    umount "/mnt/$1"
}

on_every_disk look
