#!/bin/sh
# Guest job: writes to the root disk and remembers checksums; boot-verify.sh looks for them.
set -eu
uname -r
mkdir /srv/boot
cp -a /usr/lib/x86_64-linux-gnu/perl-base /srv/boot/
dd if=/dev/urandom of=/srv/boot/random bs=1M count=8 status=none
rm -r /usr/share/perl5
(cd /srv/boot && find . -type f -exec sha256sum {} +) >/root/manifest
sync
